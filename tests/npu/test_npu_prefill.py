"""Prompts of a batch one behind the other on the stand-in for an NPU (npu_fusion_attention, TND), against the CPU's
padded rows."""

import copy

import pytest
import torch

from mindspeed_mm.doctor.parity import model
from tests.npu.test_npu_inference import answers

CHANGES = {
    "llama": {},
    "mistral": {"model_id": "mistral", "sliding_window": 5},
    "mpt": {"model_id": "mpt", "num_query_groups": 4, "normalization": "LayerNorm", "gated_linear_unit": False},
    "gemma2": {"model_id": "gemma2", "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
}
"""Of the decoder of doctor's model: grouped heads, a window, ALiBi, and a soft cap, which the operator has not."""

LENGTHS = (14, 5, 9)
STARTS = (6, 0, 4)


def layouts() -> list[tuple[str, int, int]]:
    """Starts to note (layout, sparse mode, query positions) of each call of npu_fusion_attention; none on the CPU."""
    import sys

    found, stand_in = [], sys.modules.get("torch_npu")
    if stand_in is None:
        return found
    operator = torch.ops.npu.npu_fusion_attention

    def noted(query, *args, **options):
        places = query.shape[0] if options["input_layout"] == "TND" else query.shape[0] * query.shape[2]
        found.append((options["input_layout"], options.get("sparse_mode", 0), places))
        return operator(query, *args, **options)

    stand_in.npu_fusion_attention = noted
    return found


def noted_no_more() -> None:
    import sys

    stand_in = sys.modules.get("torch_npu")
    if stand_in is not None:
        del stand_in.npu_fusion_attention


def passes(decoder, features=()) -> list[torch.Tensor]:
    """Logits of whole prompts of different lengths, of the same filled in by parts, and of a token behind each."""
    prompts = [list(range(3 + row, 3 + row + length)) for row, length in enumerate(LENGTHS)]
    if features:
        prompts[1][1 : 1 + len(features[0])] = [-200] * len(features[0])
    decoder.cache.reserve(4, 20)
    found = [decoder.prefill(prompts, features, 0)]
    for row, start in enumerate(STARTS):
        if start:
            found.append(decoder.prefill([prompts[row][:start]], (), row + 1))
    rests = [prompt[start:] for prompt, start in zip(prompts, STARTS, strict=True)]
    found.append(decoder.prefill(rests, features, 1, STARTS))
    decoder.cache.copy_rows([1, 2, 3], [0, 1, 2], 20)
    return [*found, decoder.step([7, 8, 9], list(LENGTHS))]


def of_doctor(name: str) -> tuple[list[torch.Tensor], list]:
    """`passes` of doctor's model with a decoder of CHANGES, and the calls of the operator."""
    from mindspeed_mm.generation.decode import Decoder
    from mindspeed_mm.models.media import Media
    from mindspeed_mm.platform import current_platform
    from mindspeed_mm.platform.distributed import init_single_process

    platform, described = current_platform(), copy.deepcopy(model.MODEL)
    init_single_process(platform)
    described["text_decoder"] |= CHANGES[name]
    before, model.MODEL = model.MODEL, described
    try:
        decoder = Decoder(model.build(platform, torch.float32).eval())
    finally:
        model.MODEL = before
    image = Media.of_images(model.drawn((1, 3, model.SIDE, model.SIDE), torch.Generator().manual_seed(3)))
    (item,) = decoder.image_features([image])
    calls = layouts()
    try:
        return passes(decoder, [item.projected]), calls
    finally:
        noted_no_more()


def equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    """To 1e-5 of the largest logit."""
    pairs = list(zip(found, wanted, strict=True))
    return all((one - other).abs().max() <= 1e-5 * other.abs().max() for one, other in pairs)


@pytest.mark.parametrize("name", CHANGES)
def test_packed_prompts_equal_the_cpus_rows(ranks, npu_ranks, name):
    ((wanted, _),) = ranks(1).run(of_doctor, name)
    ((found, calls),) = npu_ranks(1).run(of_doctor, name)
    assert equal(found, wanted)
    if name == "gemma2":
        assert not calls  # the general way, in padded rows
        return
    layers, rests = model.MODEL["text_decoder"]["num_layers"], sum(LENGTHS) - sum(STARTS)
    mode = 4 if name == "mistral" else 3
    prefills = [sum(LENGTHS), *(start for start in STARTS if start), rests]
    assert calls[:-layers] == [("TND", mode, places) for places in prefills for _ in range(layers)]
    assert {layout for layout, _, _ in calls[-layers:]} == {"BNSD"}  # the step


def of_golden(golden, parts: tuple[int, int]) -> list[torch.Tensor]:
    """`passes` of the golden model, spread over `parts` tensor-parallel ranks and pipeline stages."""
    import mindspeed_mm as mm
    from mindspeed_mm.generation.decode import Decoder
    from mindspeed_mm.platform import current_platform

    vlm = mm.load(
        golden / "models" / "llava_hf",
        device=current_platform().name,
        tensor_model_parallel_size=parts[0],
        pipeline_model_parallel_size=parts[1],
        dtype="fp32",
    )
    return passes(Decoder(vlm.model))


@pytest.mark.parametrize("parts", [(2, 1), (1, 2)], ids=["TP2", "PP2"])
def test_two_ranks_equal_the_cpu(ranks, npu_ranks, golden, parts):
    (wanted,) = ranks(1).run(of_golden, golden, (1, 1))
    for found in npu_ranks(2).run(of_golden, golden, parts):
        assert equal(found, wanted)


def asked_together(golden, dtype: str) -> tuple[list, list]:
    """Tokens of prompts of very different lengths, and the calls of the operator."""
    prompts = [[1, *range(300, 300 + length)] for length in (3, 40, 11)]
    calls = layouts()
    try:
        return answers(golden, dtype, prompts, [])[0], calls
    finally:
        noted_no_more()


def test_prompts_of_any_lengths_take_one_pass(ranks, npu_ranks, golden):
    ((found, calls),) = npu_ranks(1).run(asked_together, golden, "fp32")
    assert [call for call in calls if call[0] == "TND"] == [("TND", 3, 4 + 41 + 12)] * 4
    assert found == ranks(1).run(asked_together, golden, "fp32")[0][0]


def prefill_without_values() -> list[str]:
    """Devices of the logits of prompts that begin, and of prompts that go on, on a device whose tensors have no values:
    whatever waits for one fails."""
    from mindspeed_mm.generation.decode import Decoder
    from mindspeed_mm.platform import current_platform
    from mindspeed_mm.platform.distributed import init_single_process

    platform, nowhere = current_platform(), torch.device("meta")
    init_single_process(platform)
    vlm = model.build(platform, torch.float32).eval()
    vlm.text_decoder.rotary._frequencies_on(nowhere)  # moved once, by the first pass
    decoder = Decoder(vlm.to(nowhere))
    platform._causal_mask = None  # it stays where it was made
    decoder.cache.reserve(3, 20)
    image = torch.empty(model.IMAGE_TOKENS, 64, device=nowhere)
    prompts = [[1, *[-200] * model.IMAGE_TOKENS, 5], [1, 5, 6]]
    try:
        return [decoder.prefill(prompts, [image], 0, starts).device.type for starts in (None, [0, 4])]
    finally:
        platform._causal_mask = None


def test_a_prefill_never_waits(npu_ranks):
    assert npu_ranks(1).run(prefill_without_values) == [["meta", "meta"]]


def cache_that_is_too_short() -> str:
    from mindspeed_mm.models.kit.kv_cache import KVCache

    cache = KVCache(1, 1, 2, torch.float32, torch.device("cpu"))
    cache.reserve(2, 64)
    try:
        cache.begin_packed(0, [60, 0], [5, 3])
    except ValueError as error:
        return str(error)
    return ""


def test_a_cache_that_is_too_short_is_told():
    assert cache_that_is_too_short() == "the cache holds 64 positions, position 64 was asked for"
