"""Muon on a whole decoder: three steps are those of torch.optim.Muon and AdamW on transformers' model."""

import pytest
import torch
import torch.nn.functional as F

from mindspeed_mm.models.spec import load_model_spec
from tests.helpers.decoder_ranks import labels_of
from tests.helpers.tiny_decoders import make, rows, save

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_three_steps(tmp_path, name):
    """q, k, v, gate and up by themselves where the release has them so; Phi-3's are one matrix."""
    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.platform import get_platform
    from mindspeed_mm.platform.distributed import init_single_process

    init_single_process(get_platform("cpu"))
    from megatron.driver.muon import MuonAdamW

    theirs = make(name)
    ours, _ = build_vlm(load_model_spec(save(theirs, name, tmp_path)), Runtime(), torch.device("cpu"))
    trained = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    matrices = {parameter: parameter.matrices for parameter in trained if parameter.matrices is not None}
    options, muon = {"lr": 3e-3, "weight_decay": 0.1}, {"momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    named = dict(theirs.named_parameters())
    hidden = [key for key, parameter in named.items() if ".layers." in key and parameter.dim() == 2]
    assert sum(map(torch.numel, matrices)) == sum(named[key].numel() for key in hidden)
    rest = [parameter for key, parameter in named.items() if key not in hidden]
    groups = [{"params": trained}]
    theirs_muon = torch.optim.Muon([named[key] for key in hidden], **muon, **options)
    steps = [
        [MuonAdamW(groups, matrices, momentum=0.95, steps=5, adjust_lr="match_rms_adamw", eps=1e-3, **options)],
        [theirs_muon, torch.optim.AdamW(rest, eps=1e-3, **options)],
    ]
    ids = rows(length=24)
    labels = labels_of(ids)
    seen = []
    for _ in range(4):
        wanted = F.cross_entropy(theirs(input_ids=ids).logits.transpose(1, 2), labels, ignore_index=-100)
        found = ours(ids, torch.arange(24)[None], labels=labels).mean()
        seen.append(found.item())
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=0)  # Newton-Schulz steps are in bfloat16
        for optimizers, loss in zip(steps, (found, wanted), strict=True):
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert seen[-1] < seen[0] - 0.05
