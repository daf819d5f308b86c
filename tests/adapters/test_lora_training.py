"""LoRA against the peft library on transformers' models: losses, gradients and AdamW steps at every layout."""

import json

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.optimizers import create_loraplus_optimizer

from mindspeed_mm.models.adapters.splits import their_b
from mindspeed_mm.models.adapters.targets import sites
from mindspeed_mm.models.part import find_part
from mindspeed_mm.models.spec import load_model_spec
from tests.helpers.decoder_ranks import (
    RECOMPUTED,
    DecoderStep,
    Spread,
    check_recomputation,
    joined_losses,
    labels_of,
    take_step,
)
from tests.helpers.tiny_decoders import make, rows, save
from tests.parallel.comparison import names

PACKED = {"phi3": ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]}
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
NAMES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3")
PEFT_NAMES = {"a": "lora_A", "b": "lora_B", "m": "lora_magnitude_vector"}
SPREADS = {
    "one process": Spread(),
    "TP2": Spread(tensor=2),
    "TP2 SP": Spread(tensor=2, sequence_parallel=True),
    "PP2": Spread(pipeline=2),
    "CP2": Spread(context=2),
}


def wrapped(name, folder, **changes):
    """A random model with a random adapter of PEFT on it, and the model.json of both."""
    theirs = make(name)
    block = {"r": 3, "alpha": 7, "use_rslora": name == "qwen3", "target_modules": PACKED.get(name, TARGETS)} | changes
    if name == "llama" and not changes:
        block["target_modules"] = "all-linear"
    path = save(theirs, name, folder, lora=block | {"load": str(folder / "adapter")}, pipeline_num_layers=None)
    kinds = {key: block.get(key, False) for key in ("use_rslora", "use_dora")}
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=block["target_modules"], **kinds)
    model = peft.get_peft_model(theirs, config)
    torch.manual_seed(11)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder / "adapter")
    return model, path


@pytest.fixture(scope="module", params=NAMES)
def pair(request, tmp_path_factory):
    """(name, model.json, losses and gradients of PEFT)."""
    model, path = wrapped(request.param, tmp_path_factory.mktemp(request.param))
    ids = rows(length=24)
    labels = labels_of(ids)
    losses = F.cross_entropy(model(input_ids=ids).logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    losses[labels != -100].mean().backward()
    return request.param, path, losses.detach(), gradients_of(model)


def whole(shards, part, spec):
    """Gradients of A and B of the whole part in PEFT's names."""
    found = {}
    for site in sites(part, spec):
        for which, axis in (("a", 1), ("b", 0), ("m", 0)) if spec.lora.use_dora else (("a", 1), ("b", 0)):
            key = f"{site.owner}.lora.{site.short}.{which}"
            by_rank = {shard.tensor_rank: shard.gradients[key] for shard in shards if key in shard.gradients}
            pieces = [by_rank[rank] for rank in sorted(by_rank)]
            split = (site.step.rule.axis == 1) == (which == "a")
            for other in pieces[1:] if not split else ():
                torch.testing.assert_close(other, pieces[0])
            blocks = site.step.rule.blocks(spec.geometry) if which != "a" and len(site.step.sources) == 1 else 1
            if split:
                pieces = [
                    torch.cat(block, axis) for block in zip(*(p.chunk(blocks, axis) for p in pieces), strict=True)
                ]
                full = torch.cat(pieces, axis)
            else:
                full = pieces[0]
            if which != "a":
                full = their_b(site, full.view(len(full), -1), spec.geometry).view(full.shape)
            found[f"{site.module}.{PEFT_NAMES[which]}.weight"] = full
    return found


def values_of(model):
    """What trains of a model of PEFT, by its names without the wrapper's."""
    return {
        key.removeprefix("base_model.model.").replace(".default", ""): parameter
        for key, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def gradients_of(model):
    """The gradients of it."""
    return {key: parameter.grad for key, parameter in values_of(model).items()}


def check_spread(ranks, name, path, spread, losses, wanted):
    """A step of ours at a layout gives PEFT's losses of `rows(24)` and its gradients; returns what the ranks found."""
    ids = rows(length=24)
    labels = labels_of(ids)
    run = (str(staged(path) if spread.pipeline > 1 else path), spread, DecoderStep(ids, labels))
    shards = [take_step(*run)] if spread.ranks == 1 else ranks(spread.ranks).run(take_step, *run)
    torch.testing.assert_close(joined_losses(shards), losses.t()[labels.t() != -100], atol=2e-4, rtol=0)
    found = whole(shards, find_part("text_decoder", name), load_model_spec(path).text_decoder)
    assert found.keys() == wanted.keys()
    for key, gradient in wanted.items():
        assert (found[key] - gradient).norm() <= 1e-4 * gradient.norm(), key
    return shards


@pytest.mark.parametrize("layout", names(SPREADS, slow=("TP2",)))
def test_losses_and_gradients(ranks, pair, layout):
    name, path, losses, wanted = pair
    shards = check_spread(ranks, name, path, SPREADS[layout], losses, wanted)
    assert all(".lora." in key for shard in shards for key in shard.gradients)


KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora+": {"loraplus_lr_ratio": 8.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_of_adamw(tmp_path, kind):
    """Ours against PEFT's, each with torch's AdamW on its own adapters; LoRA+ with the optimizer that PEFT makes."""
    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.platform import get_platform
    from mindspeed_mm.platform.distributed import init_single_process

    init_single_process(get_platform("cpu"))
    model, path = wrapped("qwen2", tmp_path, **KINDS[kind])
    ours, _ = build_vlm(load_model_spec(path), Runtime(), torch.device("cpu"))
    ours.train()
    ids = rows(length=24)
    labels = labels_of(ids)
    rate, options = 1e-3 if kind == "lora+" else 1e-2, {"eps": 1e-2, "weight_decay": 0.1}
    groups = [
        {"params": [parameter], "lr": rate * parameter.optimizer_values.get("lr_factor", 1.0)}
        for parameter in ours.parameters()
        if parameter.requires_grad
    ]
    steps = [torch.optim.AdamW(groups, **options)]
    if kind == "lora+":
        options = {"eps": 1e-2, "loraplus_weight_decay": 0.1, "loraplus_lr_ratio": 8.0}
        steps.append(create_loraplus_optimizer(model, torch.optim.AdamW, lr=rate, **options))
    else:
        steps.append(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, **options))
    for _ in range(3):
        logits = model(input_ids=ids).logits
        wanted = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100)
        found = ours(ids, torch.arange(24)[None], labels=labels).mean()
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        for optimizer, loss in zip(steps, (found, wanted), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    check_adapters(ours, model)


def check_adapters(ours, model):
    """Every A, B and length of rows is that of PEFT's model: within 1e-5 of the largest value of the tensor."""
    wanted = {key: value for key, value in values_of(model).items() if ".lora_" in key}
    part, spec = find_part("text_decoder", "qwen2"), ours.spec.text_decoder
    held = dict(ours.text_decoder.named_parameters())
    for site in sites(part, spec):
        for which, name in PEFT_NAMES.items():
            tensor = held.get(f"{site.owner}.lora.{site.short}.{which}")
            if tensor is None:
                continue
            theirs, tensor = wanted.pop(f"{site.module}.{name}.weight").detach(), tensor.detach()
            found = tensor if which == "a" else their_b(site, tensor.view(len(tensor), -1), spec.geometry)
            error = (found.view(theirs.shape) - theirs).abs().max()
            assert error <= 1e-5 * theirs.abs().max(), (site.module, which)
    assert not wanted


@pytest.mark.parametrize("kind", RECOMPUTED)
def test_recomputation_changes_nothing(pair, kind):
    check_recomputation(pair[1], kind, DecoderStep(rows(length=24), labels_of(rows(length=24))))


@pytest.mark.parametrize("layout", ["PP2", "TP2 SP"])
def test_adapters_of_the_last_layer_alone(ranks, tmp_path, layout):
    """With pipeline stages the first one trains nothing."""
    _, path = wrapped("llama", tmp_path, target_modules=r".*layers\.2\..*(q_proj|down_proj)")
    path = staged(path)
    step, spread = DecoderStep(rows(length=24), labels_of(rows(length=24))), SPREADS[layout]
    part, spec = find_part("text_decoder", "llama"), load_model_spec(path).text_decoder
    found = whole(ranks(2).run(take_step, str(path), spread, step), part, spec)
    wanted = whole([take_step(str(path), Spread(), step)], part, spec)
    assert found.keys() == wanted.keys() and len(found) == 4
    for key, gradient in wanted.items():
        assert (found[key] - gradient).norm() <= 1e-5 * gradient.norm(), key


def test_dropout_is_of_training_alone(tmp_path):
    _, path = wrapped("llama", tmp_path, dropout=0.5)
    step = DecoderStep(rows(length=24), labels_of(rows(length=24)))
    model = json.loads(path.read_text())
    del model["text_decoder"]["lora"]["dropout"]
    without = path.with_name("without.json")
    without.write_text(json.dumps(model))
    dropped, plain = (take_step(str(each), Spread(), step).losses for each in (path, without))
    assert (dropped - plain).abs().max() > 1e-4
    import mindspeed_mm as mm

    one, other = (mm.load(each, device="cpu").logits(step.ids) for each in (path, without))
    assert torch.equal(one, other)


def test_the_plan_counts_adapters(tmp_path):
    from types import SimpleNamespace

    from mindspeed_mm.planning.parameters import _adapter_sizes

    model, path = wrapped("llama", tmp_path)
    spec = load_model_spec(path)
    runtime = SimpleNamespace(stages=1)
    job = SimpleNamespace(spec=spec, tensor=1, pipeline=1, runtime=runtime)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(size for size, _ in _adapter_sizes(job, "text_decoder", 0)) == trained


def staged(path):
    """A copy of model.json that puts one of the three layers on the first stage."""
    model = json.loads(path.read_text())
    model["text_decoder"]["pipeline_num_layers"] = [1, 2]
    other = path.with_name("stages.json")
    other.write_text(json.dumps(model))
    return other
