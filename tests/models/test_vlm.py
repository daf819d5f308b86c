"""Fusion, freezing, loss and parallel slices of the VLM."""

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_mm.errors import DataError
from tests.helpers.golden_model import collate, load_expected, model_json, training_samples


def build(golden, *, tensor_parallel: int = 1, sequence_parallel: bool = False, trained=(), dtype=torch.float32):
    """The golden model on this rank."""
    from mindspeed_mm.platform import get_platform

    get_platform("cpu")
    from megatron.core import parallel_state
    from megatron.core import tensor_parallel as tensor_parallel_core

    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.models.spec import load_model_spec

    if not torch.distributed.is_initialized():
        from mindspeed_mm.platform.distributed import init_single_process

        init_single_process(get_platform("cpu"))
    elif not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
        tensor_parallel_core.model_parallel_cuda_manual_seed(1)
    spec = load_model_spec(model_json(golden, trained=trained))
    runtime = Runtime(
        tensor_model_parallel_size=tensor_parallel, sequence_parallel=sequence_parallel, params_dtype=dtype
    )
    return build_vlm(spec, runtime, torch.device("cpu"))[0]


def losses_and_gradient(golden, tensor_parallel: int, sequence_parallel: bool):
    """(summed loss, gradient of the projector's last bias) of the first golden training step on this rank."""
    vlm = build(golden, tensor_parallel=tensor_parallel, sequence_parallel=sequence_parallel, trained=ALL)
    batch = collate(training_samples(golden)[0])
    if sequence_parallel and batch.input_ids.shape[1] % tensor_parallel:
        from mindspeed_mm.data.collate import Collator

        batch = Collator(0, (56, 56), pad_multiple=tensor_parallel)(training_samples(golden)[0])
    loss = vlm(batch.input_ids, batch.position_ids, labels=batch.labels, pixel_values=batch.pixel_values).sum()
    loss.backward()
    projector = vlm.image_encoder.projector.encoder
    return (
        loss.item(),
        projector.linear_fc2.bias.grad.clone(),
        vlm.text_decoder.decoder.layers[0].mlp.linear_fc2.weight.grad,
    )


ALL = ("text_decoder", "vision_encoder", "vision_projector")


@pytest.mark.parametrize("case", ["one_image", "two_images", "batch_two", "text_only"])
def test_loss_equals_transformers(golden, case):
    import json

    meta = json.loads((golden / "expected" / "meta.json").read_text())["cases"][case]
    expected = load_expected(golden, case)
    ids = expected["expanded_input_ids"].masked_fill(expected["expanded_input_ids"] == 1000, -200)
    labels = torch.cat((expected["expanded_labels"][:, 1:], torch.full((ids.shape[0], 1), -100)), dim=1)
    vlm = build(golden)
    with torch.no_grad():
        losses = vlm(ids, torch.arange(ids.shape[1])[None], labels=labels, pixel_values=expected.get("pixel_values"))
    assert losses.numel() == sum(meta["supervised_tokens_per_row"])
    assert losses.mean().item() == pytest.approx(meta["loss"], abs=5e-5)


def test_frozen_parts_get_no_gradient(golden):
    vlm = build(golden, trained=("vision_projector",))
    batch = collate(training_samples(golden)[0])
    vlm(batch.input_ids, batch.position_ids, labels=batch.labels, pixel_values=batch.pixel_values).sum().backward()
    with_gradient = {name.split(".")[1] for name, p in vlm.named_parameters() if p.grad is not None}
    assert with_gradient == {"projector"}
    features = vlm.image_encoder.features(batch.pixel_values)
    assert not features.requires_grad


def test_text_only_batch_reaches_every_trained_parameter(golden):
    """Data-parallel ranks must agree on which gradients exist, whatever their samples hold."""
    vlm = build(golden, trained=ALL)
    ids = torch.randint(3, 900, (2, 12))
    vlm(ids, torch.arange(12)[None], labels=ids).sum().backward()
    assert all(parameter.grad is not None for parameter in vlm.parameters())
    assert all(parameter.grad.abs().max() == 0 for parameter in vlm.image_encoder.parameters())


def test_all_masked_batch_has_a_loss_of_nothing(golden):
    vlm = build(golden, trained=ALL)
    ids = torch.randint(3, 900, (1, 12))
    losses = vlm(ids, torch.arange(12)[None], labels=torch.full_like(ids, -100))
    assert losses.numel() == 0
    losses.sum().backward()
    assert all(parameter.grad.abs().max() == 0 for parameter in vlm.parameters() if parameter.grad is not None)


def test_image_positions_must_match_images(golden):
    vlm = build(golden)
    images = load_file(golden / "images" / "preprocessed.safetensors")
    with pytest.raises(DataError, match="15 image positions but 1 images of 16 tokens each = 16"):
        vlm(torch.full((1, 15), -200), torch.arange(15)[None], pixel_values=images["gray.pad"][None])


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_slices_give_the_same_loss_and_gradient(ranks, golden, sequence_parallel):
    single = ranks(1).run(losses_and_gradient, golden, 1, False)[0]
    double = ranks(2).run(losses_and_gradient, golden, 2, sequence_parallel)
    for rank, (loss, bias_gradient, slice_gradient) in enumerate(double):
        assert loss == pytest.approx(single[0], rel=1e-5)
        torch.testing.assert_close(bias_gradient, single[1], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(slice_gradient, single[2].chunk(2, dim=1)[rank], atol=1e-3, rtol=1e-4)
