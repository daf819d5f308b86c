"""The perceiver resampler against open_flamingo's outputs, whole and split over ranks."""

import re

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_mm.config.load import load_config
from mindspeed_mm.errors import ConfigError, DataError, WeightError
from mindspeed_mm.models.vision_projector import perceiver
from mindspeed_mm.weights.files import SafetensorsFile
from mindspeed_mm.weights.sources import PartSource, Source
from tests.helpers.reference import DATA
from tests.helpers.tensor_ranks import start_rank

GOLDEN = DATA / "golden_flamingo"
CASES = ("llama_every1_latest", "llama_every2_all", "mpt_every1_latest", "mpt_every2_all")
WIDTH = 40


def spec_of(**changes) -> perceiver.PerceiverSpec:
    return load_config(perceiver.PerceiverSpec, {"input_size": WIDTH, "hidden_size": WIDTH} | changes, what="projector")


def resampler(case: str, tensor: int = 1, **changes):
    """Ours with the weights of a case, or this rank's share of it."""
    rank = start_rank(tensor)
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.weights.loading import load_part

    spec = spec_of(**changes)
    module = perceiver.PART.build(spec, Runtime(tensor_model_parallel_size=tensor))
    path = GOLDEN / f"{case}.weights.safetensors"
    files = SafetensorsFile(path)
    stored = {name.removeprefix("perceiver."): name for name in files.names if name.startswith("perceiver.")}
    part = PartSource("vision_projector", "flamingo", path, None, files, stored)
    source = Source(path, "flamingo", None, {"vision_projector": part})
    load_part(module, perceiver.PART, spec, source, tp_rank=rank, tp_size=tensor)
    return module


def features_of(values: torch.Tensor, frames: tuple[int, ...]):
    """Features of items, [frames of all items, P, W]."""
    from mindspeed_mm.models.media import Features, Media

    items = len(frames)
    media = Media(torch.empty(0), frames, torch.ones(items, 3).long(), torch.zeros(items, 2).long())
    return Features(values.flatten(0, 1), tuple(count * values.shape[1] for count in frames), media)


def golden(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(features [I, P, W], outputs [I, L, W])."""
    tensors = load_file(GOLDEN / f"{case}.case.safetensors")
    assert tensors["features"].shape[2] == 1
    return tensors["features"].flatten(0, 2).flatten(2).transpose(1, 2), tensors["perceiver"].flatten(0, 1)


def resampled(case: str, tensor: int) -> torch.Tensor:
    values, _ = golden(case)
    with torch.no_grad():
        return resampler(case, tensor)(features_of(values, (1,) * len(values))).values


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_open_flamingo(case):
    wanted = golden(case)[1].flatten(0, 1)
    torch.testing.assert_close(resampled(case, 1), wanted, atol=2e-4, rtol=0)


def test_two_ranks_share_the_heads(ranks):
    wanted = golden(CASES[0])[1].flatten(0, 1)
    for found in ranks(2).run(resampled, CASES[0], 2):
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=0)


def test_a_video_is_one_item_of_all_its_frames():
    values, _ = golden(CASES[0])
    module = resampler(CASES[0])
    with torch.no_grad():
        ragged = module(features_of(values, (1, 3, 2)))
        assert ragged.counts == (64,) * 3
        alone = [module(features_of(values[a:b], (b - a,))).values for a, b in ((0, 1), (1, 4), (4, 6))]
        torch.testing.assert_close(ragged.values, torch.cat(alone), atol=1e-6, rtol=1e-6)
        turned = module(features_of(values[[2, 1, 3]], (3,))).values
    torch.testing.assert_close(turned, alone[1], atol=1e-5, rtol=0)  # frames have no order without embeddings


def test_embeddings_give_frames_an_order():
    from mindspeed_mm.models.runtime import Runtime

    values, _ = golden(CASES[0])
    resampler(CASES[0])  # process groups
    module = perceiver.PART.build(spec_of(max_frames=3), Runtime())
    with torch.no_grad():
        first, turned = (module(features_of(values[rows], (3,))).values for rows in ([0, 1, 2], [1, 0, 2]))
        assert (first - turned).abs().max() > 1e-4
        with pytest.raises(DataError, match="found a video of 4 frames; the perceiver has embeddings for 3"):
            module(features_of(values[:4], (4,)))


def test_otter_names_a_layer_otherwise():
    names = perceiver.FLAMINGO_RULES.expected(spec_of().geometry)
    renamed = {re.sub(r"^(layers\.\d+)\.0\.", r"\1.", name) for name in names}
    renamed = {re.sub(r"^(layers\.\d+)\.1\.(?=[013]\.(weight|bias)$)", r"\1.feed_forward.", name) for name in renamed}
    assert renamed == set(perceiver.OTTER_RULES.expected(spec_of().geometry))


def test_a_checkpoint_of_another_perceiver():
    with pytest.raises(WeightError, match=r"latents gives latents the shape \[64, 40\]; expected \[32, 40\]"):
        resampler(CASES[0], num_latents=32)
    with pytest.raises(WeightError, match=r"layers\.5\."):
        resampler(CASES[0], num_layers=5)


def test_blocks_that_are_no_perceiver():
    with pytest.raises(ConfigError, match="hidden_size is 48; expected 40, the input_size: the latents are as wide"):
        spec_of(hidden_size=48)
    with pytest.raises(ConfigError, match="the perceiver's linears have no biases"):
        spec_of(add_bias_linear=True)
    assert perceiver.from_hf({"vision_config": {"hidden_size": 24}}).ffn_hidden_size == 96
