"""The operation count of a whole step against torch's own counter, forwards and backwards."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.planning.planned_run import EVERYTHING, STAGE_1, STAGE_2, VISION_ENCODER, model
from tests.planning.real_run import Work, batches_of


@pytest.mark.parametrize("trained", [STAGE_1, STAGE_2, EVERYTHING], ids=["stage 1", "stage 2", "everything"])
@pytest.mark.parametrize("packed", [0, 3], ids=["plain", "packed"])
def test_forward_and_backward(single_process, trained, packed, monkeypatch):
    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.models.spec import load_model_spec
    from mindspeed_mm.platform import fused, get_platform, host_products
    from mindspeed_mm.platform.distributed import init_single_process
    from mindspeed_mm.trainer.flops import forward_flops, score_flops, step_flops
    from mindspeed_mm.trainer.step import forward_step

    init_single_process(get_platform("cpu"))
    spec = load_model_spec(model(trained))
    vlm, _ = build_vlm(spec, Runtime(), torch.device("cpu"))
    batch = next(batches_of(Work({}, "", packed=packed), spec, 2, 1))
    # The counter does not know torch's CPU attention kernel and oneDNN's products; plain matrix products it does.
    monkeypatch.setattr(host_products, "choose", lambda *_: host_products.PLAIN)
    # Norms are not counted, ours have sums in the form of matrix products.
    monkeypatch.setattr(fused.RMSNorm, "apply", lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output, loss = forward_step(iter([batch]), vlm)
        loss(output)[0].backward()
    images = batch.num_images
    facts = {"lengths": batch.lengths, "images": images, "supervised": batch.supervised}
    assert sum(batch.lengths) == 2 * max(1, packed) * 192
    ours, own_scores = step_flops(spec, **facts), forward_flops(spec, **facts).scores
    # We count each sample's own triangle, whatever row it stands in.
    rows, length = batch.input_ids.shape
    text = spec.text_decoder
    square = text.num_layers * score_flops(
        heads=text.num_attention_heads, head_size=text.kv_channels, lengths=[length] * rows, causal=False
    )
    assert own_scores == pytest.approx(square / 2 / max(1, packed))
    # Plain products take each sample's square.
    assert counter.get_total_flops() == pytest.approx(ours + 3 * own_scores, rel=1e-9)
    assert VISION_ENCODER["num_layers"] == spec.vision_encoder.num_built_layers + 1
