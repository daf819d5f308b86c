"""Adapters that are put on and taken off: logits are those of a model that was loaded with the one that is on."""

import peft
import pytest
import torch

import mindspeed_mm as mm
from mindspeed_mm.errors import ConfigError, WeightError
from tests.helpers.tiny_decoders import make, rows, save

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
"""What weights in blocks of 64 can be."""


def adapter(folder, seed, **changes):
    """A random adapter of PEFT's, its folder."""
    wrapped = peft.get_peft_model(make("llama", **SIZES), peft.LoraConfig(**({"r": 3, "lora_alpha": 7} | changes)))
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in wrapped.named_parameters():
        if "lora_A" in key or "lora_B" in key:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"quantize": "int8"}, marks=pytest.mark.slow), {"quantize": "nf4", "double_quant": True}],
    ids=str,
)
def test_switched_adapters(tmp_path, options):
    from mindspeed_mm.inference.adapters import AdapterSwitch

    path, ids = save(make("llama", **SIZES), "llama", tmp_path), rows(2, 9)
    folders = [
        adapter(tmp_path / "few", 1, target_modules=["q_proj", "down_proj"]),
        adapter(tmp_path / "all", 2, target_modules="all-linear", r=5, use_dora=not options),
    ]
    wanted = [mm.load(path, device="cpu", adapter=folder, **options).logits(ids) for folder in (None, *folders)]
    vlm = mm.load(path, device="cpu", **options)
    switch = AdapterSwitch(vlm)
    attached = [None, *map(switch.attach, folders)]
    for number in (0, 1, 2, 2, 0, 2, 1, 0):
        switch.use(attached[number])
        assert torch.equal(vlm.logits(ids), wanted[number])
    switch.use(attached[2])
    hooks = len(vlm.model.text_decoder.decoder._forward_pre_hooks)
    with pytest.raises(WeightError, match="found no adapter_config.json"):
        switch.attach(tmp_path)
    other = switch.attach(folders[0])
    assert torch.equal(vlm.logits(ids), wanted[2]) and len(vlm.model.text_decoder.decoder._forward_pre_hooks) == hooks
    switch.use(other)
    assert torch.equal(vlm.logits(ids), wanted[1])
    if options:
        with pytest.raises(ConfigError, match="found a DoRA adapter"):
            switch.attach(adapter(tmp_path / "dora", 1, target_modules=["q_proj"], use_dora=True))
