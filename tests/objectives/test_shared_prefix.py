"""A pair in one row, its prompt and images once, against its two conversations each by itself."""

import json
from dataclasses import replace

import pytest
import torch

from mindspeed_mm.data.build import build_dataset
from mindspeed_mm.data.collate import Collator
from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.data.tokenizer import load_tokenizer
from mindspeed_mm.models.family import media_of_data
from mindspeed_mm.models.spec import load_model_spec
from mindspeed_mm.platform import get_platform
from tests.helpers.tiny_pairs import write_pairs
from tests.interaction.post_block_helpers import write_block

BLOCKS = {
    "no block": None,
    "cross": {"cross": True},
    "text": {"cross": False, "text": True},
}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_shared_prompt_changes_nothing(golden, tmp_path, block):
    """Log-probabilities and gradients of every parameter, of pairs with and without images."""
    from mindspeed_mm.platform.distributed import init_single_process

    platform = get_platform("cpu")
    if not torch.distributed.is_initialized():
        init_single_process(platform)
    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.complete import read_model
    from mindspeed_mm.models.loss import token_log_probs
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.objectives import find_objective
    from mindspeed_mm.objectives._pairs import pair_row, pair_sums

    write_pairs(golden, tmp_path, trained=("text_decoder", "vision_projector"))
    model, form = json.loads((tmp_path / "model.json").read_text()), BLOCKS[block]
    config, spec = DataConfig.load(tmp_path / "data.json"), load_model_spec(tmp_path / "model.json")
    words = load_tokenizer(config.dataset_param.tokenizer_config.from_pretrained)
    dataset = build_dataset(config, words, media_of_data(spec, config), 192, preferences=True)
    samples = [dataset[number] for number in range(3)]
    if form is not None:
        text = {"cross_attention": form["cross"], "self_attention": form.get("text", False)}
        model["interaction"] = text | {"ckpt_path": str(write_block(tmp_path / "block.pt", **form))}
    vlm, _ = build_vlm(read_model(model), Runtime(), torch.device("cpu"))

    def alone(sample, side):
        shared, first, _ = sample.branches
        own = slice(shared, shared + first) if side == 0 else slice(shared + first, None)
        halves = {key: getattr(sample, key)[:shared] + getattr(sample, key)[own] for key in ("input_ids", "labels")}
        batch = Collator(0)([replace(sample, **halves, branches=None)])
        head = {"labels": batch.labels, "media": batch.media, "head": token_log_probs}
        return vlm(batch.input_ids, batch.position_ids, **head)[:, 0].sum()

    wanted = torch.stack([torch.stack([alone(sample, side) for side in (0, 1)]) for sample in samples])
    wanted[:, 0].sub(wanted[:, 1]).square().sum().backward()
    gradients = {name: tensor.grad.clone() for name, tensor in vlm.named_parameters() if tensor.grad is not None}
    vlm.zero_grad()
    batch = Collator(0)(samples)
    row, output = find_objective("dpo")._through(batch, vlm, None)
    assert (
        row.batch.input_ids.shape[1]
        == pair_row(batch, vlm.config).owners.numel()
        < sum(2 * sample.branches[0] + sum(sample.branches[1:]) for sample in samples)
    )
    found = pair_sums(output, row).log_probs
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    found[:, 0].sub(found[:, 1]).square().sum().backward()
    assert len(gradients) > 20
    for name, tensor in vlm.named_parameters():
        if name in gradients:
            assert (tensor.grad - gradients[name]).norm() <= 2e-4 * gradients[name].norm() + 1e-6, name
