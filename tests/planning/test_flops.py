"""The operation count of a whole step against torch's own counter, forwards and backwards."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mindspeed_mm.data.collate import Collator
from tests.helpers.tiny_families import MAKERS, make_family
from tests.planning.planned_run import EVERYTHING, OTTER, STAGE_1, STAGE_2, VISION_ENCODER, layers_model, model
from tests.planning.real_run import Work, batches_of


def counted_flops(spec, batch, monkeypatch) -> int:
    """What torch counts of a step of a model of random weights."""
    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.objectives.sft import OBJECTIVE
    from mindspeed_mm.platform import fused, get_platform, host_products
    from mindspeed_mm.platform.distributed import init_single_process

    init_single_process(get_platform("cpu"))
    vlm, _ = build_vlm(spec, Runtime(), torch.device("cpu"), load_weights=False)
    # The counter does not know torch's CPU attention kernel and oneDNN's products; plain matrix products it does.
    monkeypatch.setattr(host_products, "choose", lambda *_: host_products.PLAIN)
    # Norms are not counted, ours have sums in the form of matrix products.
    monkeypatch.setattr(fused.FusedRMSNorm, "apply", lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output, loss = OBJECTIVE.forward_step(iter([batch]), vlm)
        loss(output)[0].backward()
    return counter.get_total_flops()


def decoder_scores(spec, batch) -> float:
    """Our count of the decoder's attention, forwards."""
    from mindspeed_mm.models.operations import EncoderWork
    from mindspeed_mm.trainer.flops import forward_flops

    return forward_flops(spec, lengths=batch.lengths, work=EncoderWork(), supervised=0).scores


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "packed"])
@pytest.mark.parametrize("model_id", MAKERS)
def test_families(single_process, model_id, packed, monkeypatch, tmp_path):
    """Images of several sizes, several in a row, with the decoder's attention counted as each sample's triangle."""
    from mindspeed_mm.trainer.flops import batch_flops

    tiny = make_family(model_id, tmp_path)
    rows = tiny.rows((2, 1, 0))
    length = sum(len(row.input_ids) for row in rows) if packed else None
    batch = Collator(0, row_length=length)([rows] if packed else rows)
    counted, ours = counted_flops(tiny.spec, batch, monkeypatch), batch_flops(tiny.spec, batch)
    # Questions that a projector reads are short, and left out.
    close = 0.05 if tiny.spec.vision_projector.reads_instructions else 1e-9
    # Plain products take each sample's square.
    assert counted == pytest.approx(ours + 3 * decoder_scores(tiny.spec, batch), rel=close)


def test_what_otter_trains(single_process, monkeypatch, tmp_path):
    """The decoder's own linears are frozen, those of its cross-attention are not, and neither is its embedding."""
    from mindspeed_mm.models.spec import load_model_spec, model_block
    from mindspeed_mm.trainer.flops import batch_flops

    tiny = make_family("flamingo", tmp_path)
    block = model_block(tiny.spec.part_specs(), "flamingo")
    block["text_decoder"] |= {"freeze": True, "parameters": OTTER}
    block["image_encoder"]["vision_encoder"]["freeze"] = True
    spec, batch = load_model_spec(block), Collator(0)(tiny.rows((2, 1, 0)))
    counted = counted_flops(spec, batch, monkeypatch)
    assert counted == pytest.approx(batch_flops(spec, batch) + 3 * decoder_scores(spec, batch), rel=1e-9)
    assert counted < 0.95 * batch_flops(tiny.spec, batch)


MODELS = {
    "stage 1": model(STAGE_1),
    "stage 2": model(STAGE_2),
    "everything": model(EVERYTHING),
    "several layers": layers_model(),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("packed", [0, 3], ids=["plain", "packed"])
def test_forward_and_backward(single_process, name, packed, monkeypatch):
    from mindspeed_mm.models.spec import load_model_spec
    from mindspeed_mm.trainer.flops import batch_flops, score_flops

    spec = load_model_spec(MODELS[name])
    batch = next(batches_of(Work({}, "", packed=packed), spec, 2, 1))
    counted = counted_flops(spec, batch, monkeypatch)
    assert sum(batch.lengths) == 2 * max(1, packed) * 192
    ours, own_scores = batch_flops(spec, batch), decoder_scores(spec, batch)
    # We count each sample's own triangle, whatever row it stands in.
    rows, length = batch.input_ids.shape
    text = spec.text_decoder
    square = text.num_layers * score_flops(
        heads=text.num_attention_heads, head_size=text.kv_channels, lengths=[length] * rows, causal=False
    )
    assert own_scores == pytest.approx(square / 2 / max(1, packed))
    # Plain products take each sample's square.
    assert counted == pytest.approx(ours + 3 * own_scores, rel=1e-9)
    assert VISION_ENCODER["num_layers"] == spec.vision_encoder.num_built_layers + 1
