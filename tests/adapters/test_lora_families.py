"""LoRA on a tiny model of every family: three AdamW steps at each layout are those of PEFT on transformers' model."""

import json
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import mindspeed_mm as mm
from checkpoint_converters.checkpoint.adapters import adapters_of_run
from mindspeed_mm.models.adapters.peft_format import OUTER
from mindspeed_mm.models.adapters.targets import WEIGHT, all_sites
from mindspeed_mm.models.spec import load_model_spec
from tests.helpers.golden_training import GoldenLayout, records
from tests.helpers.tiny_families import MAKERS, TinyFamily, make_family
from tests.helpers.vlm_ranks import train
from tests.parallel.comparison import names

LORA = {"r": 3, "alpha": 7}
STEPS = 3
ADAM = "--lr 1e-2 --adam-eps 1e-2 --weight-decay 0.01"
SPREADS = {
    "one": GoldenLayout(),
    "packed": GoldenLayout(packed=True),
    "TP2": GoldenLayout(tensor=2),
    "PP2": GoldenLayout(pipeline=2),
    "CP2": GoldenLayout(context=2),
}
LAYOUTS = names(SPREADS, slow=("CP2", "PP2"))
OF_THEIR_OWN = ("flamingo", "minigpt4")
"""Families without a class in transformers, whose adapters have the names of the decoder alone."""


@dataclass
class Adapted:
    """A family's model with PEFT's adapters on it, trained by torch's AdamW."""

    base: TinyFamily
    wrapped: peft.PeftModel
    modules: dict[str, dict[str, str]]
    """Slot -> {our Hugging Face name of an adapted linear: its name in `base.theirs`}."""
    model: dict
    """Our model.json."""
    samples: list
    start: dict[str, torch.Tensor]
    """A and B before the first step, by PEFT's names."""
    losses: list[float]
    norms: list[float]


def odd_targets(base: TinyFamily) -> dict[str, dict[str, str]]:
    """Every second kind of linear of decoder and vision encoder."""
    split, _, _ = base.names.split(dict(base.theirs.named_parameters()))
    found = {}
    for slot in ("text_decoder",) if base.family.name in OF_THEIR_OWN else ("text_decoder", "vision_encoder"):
        part, spec = base.spec.parts()[slot], base.spec.part(slot)
        theirs = {step.target: step.sources for step in part.rules[base.names.dialects[slot]].steps(spec.geometry)}
        kinds = sorted({site.short for site in all_sites(part, spec)})[::2]
        found[slot] = {
            site.module: split[slot][theirs[site.step.target][site.number]].removesuffix(WEIGHT)
            for site in all_sites(part, spec)
            if site.short in kinds
        }
    return found


def model_of(base: TinyFamily, modules: dict[str, dict[str, str]], adapter: Path) -> dict:
    """A model.json in which the adapters alone are trained."""
    made = json.loads(base.spec.model_dump_json(exclude_unset=True))
    blocks = {"text_decoder": made["text_decoder"], **made["image_encoder"]}
    for slot, block in blocks.items():
        block["freeze"] = slot not in modules
        if slot in modules:
            block["lora"] = LORA | {"target_modules": list(modules[slot]), "load": str(adapter)}
    return made


def save_adapter(wrapped: peft.PeftModel, modules: dict[str, dict[str, str]], folder: Path, *, decoder: bool) -> None:
    """PEFT's folder; with `decoder` under the names of the decoder's own class."""
    wrapped.save_pretrained(folder)
    if not decoder:
        return
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {}
    for ours, theirs in modules["text_decoder"].items():
        for end in (".lora_A.weight", ".lora_B.weight"):
            renamed[OUTER + ours + end] = tensors[OUTER + theirs + end]
    assert len(renamed) == len(tensors)
    save_file(renamed, folder / "adapter_model.safetensors")


def pairs(wrapped: peft.PeftModel) -> dict[str, torch.Tensor]:
    """A and B by the name of their module in the model that is wrapped."""
    return {
        name.removeprefix(OUTER).replace(".default.weight", ""): parameter.detach().clone()
        for name, parameter in wrapped.named_parameters()
        if ".lora_" in name
    }


@pytest.fixture(scope="module", params=sorted(MAKERS))
def adapted(request, tmp_path_factory) -> Adapted:
    folder = tmp_path_factory.mktemp(request.param)
    base = make_family(request.param, folder / "base")
    modules = odd_targets(base)
    names = [name for own in modules.values() for name in own.values()]
    wrapped = peft.get_peft_model(base.theirs, peft.LoraConfig(r=3, lora_alpha=7, target_modules=names))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    save_adapter(wrapped, modules, folder / "adapter", decoder=request.param in OF_THEIR_OWN)
    model = model_of(base, modules, folder / "adapter")
    samples, start = base.rows((2, 0, 1)), pairs(wrapped)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-2, weight_decay=0.01)
    losses, norms = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = base.their_loss(samples)
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.get_total_norm([each.grad for each in trained if each.grad is not None]).item())
        optimizer.step()
    return Adapted(base, wrapped, modules, model, samples, start, losses, norms)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_steps_of_adamw(ranks, adapted, tmp_path, layout):
    """Losses, gradient norms, every value of A and B, and how far they have moved."""
    spread, base = SPREADS[layout], adapted.base
    ranks(spread.ranks).run(train, str(base.folder), spread, adapted.samples, str(tmp_path), STEPS, ADAM, adapted.model)
    found = records(tmp_path)
    assert [row["loss"] for row in found] == pytest.approx(adapted.losses, rel=1e-5)
    assert [row["grad_norm"] for row in found] == pytest.approx(adapted.norms, rel=1e-4)
    spec, wanted = load_model_spec(adapted.model), pairs(adapted.wrapped)
    for slot, modules in adapted.modules.items():
        own = adapters_of_run(tmp_path, spec, slot)
        assert own.keys() == modules.keys()
        for ours, theirs in modules.items():
            for which, tensor in zip("AB", own[ours], strict=False):
                name = f"{theirs}.lora_{which}"
                error, moved = tensor - wanted[name], wanted[name] - adapted.start[name]
                assert error.abs().max() <= 1e-5 * wanted[name].abs().max(), (name, layout)
                assert error.norm() <= 1e-4 * moved.norm(), (name, layout)
    if layout == "one":
        check_merged_and_exported(adapted, tmp_path)


VLLM = {
    "llava": ("model.language_model.layers.", "model.vision_tower.", "model.multi_modal_projector."),
    "llava_next": ("model.language_model.layers.", "model.vision_tower.", "model.multi_modal_projector."),
    "qwen2_5_vl": ("model.language_model.layers.", "model.visual."),
}
"""Prefixes that vLLM's hf_to_vllm_mapper of these classes translates, behind `base_model.model.`."""


def check_vllm_names(family: str, folder: Path) -> None:
    """vLLM takes tensors `base_model.model.PREFIX...lora_A.weight`, targets by their last word, and a config without
    bias, DoRA and modules_to_save."""
    names = set(load_file(folder / "adapter_model.safetensors"))
    config = json.loads((folder / "adapter_config.json").read_text())
    modules = {name.removeprefix(OUTER).partition(".lora_")[0] for name in names}
    assert names == {f"{OUTER}{module}.lora_{which}.weight" for module in modules for which in "AB"}
    assert set(config["target_modules"]) == modules
    assert config["bias"] == "none" and not config["use_dora"] and "modules_to_save" not in config
    if family in VLLM:
        assert all(name.startswith(VLLM[family]) for name in modules)


def check_merged_and_exported(adapted: Adapted, run: Path) -> None:
    """The run's weights are merged ones; what it exports is what PEFT computes with, and what we read again."""
    base = adapted.base
    decoder = base.family.name in OF_THEIR_OWN
    mm.convert(run, run / "adapter", to="peft", parts=["text_decoder"] if decoder else None)
    ids = torch.tensor([[5, 9, 4, 17, 23, 8, 6]])
    plain, merged = (mm.load(path, device="cpu").logits(ids) for path in (base.folder, run))
    switched = mm.load(base.folder, device="cpu", adapter=run / "adapter")
    torch.testing.assert_close(switched.logits(ids), merged, atol=2e-5, rtol=0)
    with switched.disable_adapter():
        assert torch.equal(switched.logits(ids), plain)
    assert (merged - plain).abs().max() > 1e-3
    if decoder:
        return
    check_vllm_names(base.family.name, run / "adapter")
    wanted = pairs(adapted.wrapped)
    adapted.wrapped.load_adapter(run / "adapter", "ours")
    adapted.wrapped.set_adapter("ours")
    loss = base.their_loss(adapted.samples).item()
    adapted.wrapped.set_adapter("default")
    assert loss == pytest.approx(base.their_loss(adapted.samples).item(), rel=1e-5)
    assert wanted.keys() == {name for name in pairs(adapted.wrapped) if not name.endswith("ours.weight")}
