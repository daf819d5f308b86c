"""The objective dpo against TRL's DPOTrainer with PEFT on the same tiny LLaVA."""

import json

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_converters.checkpoint.adapters import export_adapter
from mindspeed_mm.data.collate import Collator
from mindspeed_mm.models.spec import load_model_spec
from tests.helpers.golden_training import records
from tests.helpers.tiny_pairs import train_pairs, write_pairs
from tests.helpers.trl_reference import TheirTrainer, adapted, describe
from tests.parallel.comparison import names

STEPS = 5
LAYOUTS = {
    "one": "",
    "TP2 SP": "--tensor-model-parallel-size 2 --sequence-parallel",
    "PP2": "--pipeline-model-parallel-size 2",
    "DP2": "--use-distributed-optimizer",
    "pairs in one row": "--micro-batch-size 2",
}
METRICS = [f"rewards/{what}" for what in ("chosen", "rejected", "accuracies", "margins")]
METRICS += [f"{what}/{side}" for what in ("logps", "logits") for side in ("chosen", "rejected")]


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    """Records, data.json that keeps their order, model.json and the first adapter."""
    place = tmp_path_factory.mktemp("trl")
    write_pairs(golden, place, dataloader_param={"shuffle": False})
    adapted(golden, place)
    describe(golden, place)
    return place


def samples_of(folder):
    """All pairs as our data code encodes them."""
    from mindspeed_mm.data.build import build_dataset
    from mindspeed_mm.data.config import DataConfig
    from mindspeed_mm.data.tokenizer import load_tokenizer
    from mindspeed_mm.models.family import media_of_data

    config = DataConfig.load(folder / "data.json")
    tokenizer = load_tokenizer(config.dataset_param.tokenizer_config.from_pretrained)
    media = media_of_data(load_model_spec(folder / "model.json"), config)
    dataset = build_dataset(config, tokenizer, media, 192, preferences=True)
    return [dataset[number] for number in range(len(dataset))]


def moved(model):
    """The adapter of a model away from its start, B not zero."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def our_step(folder, adapter, samples, options):
    """Loss, metrics and gradients by PEFT's names of one batch."""
    from mindspeed_mm.platform import get_platform
    from mindspeed_mm.platform.distributed import init_single_process

    init_single_process(get_platform("cpu"))
    from mindspeed_mm.models.adapters.lora import adapters_off
    from mindspeed_mm.models.adapters.targets import sites
    from mindspeed_mm.models.build import build_vlm
    from mindspeed_mm.models.part import find_part
    from mindspeed_mm.models.runtime import Runtime
    from mindspeed_mm.objectives import find_objective

    model = json.loads((folder / "model.json").read_text())
    model["text_decoder"]["lora"]["load"] = str(adapter)
    (folder / "moved.json").write_text(json.dumps(model))
    spec = load_model_spec(folder / "moved.json")
    vlm, _ = build_vlm(spec, Runtime(), torch.device("cpu"))
    objective, batch = find_objective("dpo").configured(options), Collator(0)(samples)
    with torch.no_grad(), adapters_off(vlm):
        output, report = objective.reference_forward(batch, vlm)
        object.__setattr__(batch, "reference", report(output)[2]["log_probs"])
    output, loss_function = objective.forward(batch, vlm)
    total, count, found = loss_function(output)
    (total / count).backward()
    gradients = {}
    parameters = dict(vlm.text_decoder.named_parameters())
    for site in sites(find_part("text_decoder", "llama"), spec.text_decoder):
        for which in "ab":
            gradient = parameters[f"{site.owner}.lora.{site.short}.{which}"].grad
            gradients[f"{site.module.removeprefix('model.')}.lora_{which.upper()}"] = gradient
    return {name: (value / number).item() for name, (value, number) in found.items()}, gradients


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_one_batch(golden, folder, tmp_path, loss):
    """Loss, rewards, log-probabilities, logits and gradients, away from the start."""
    samples = samples_of(folder)[:5]
    trainer = TheirTrainer(golden, adapted(golden, tmp_path), samples, tmp_path, loss_type=[loss], beta=0.2)
    moved(trainer.model)
    trainer.model.save_pretrained(tmp_path / "moved", selected_adapters=["default"])
    inputs = trainer.data_collator([{"prompt": str(number)} for number in range(len(samples))])
    trainer.model.train()
    their_loss = trainer._compute_loss(trainer.model, inputs, False)
    their_loss.backward()
    found, gradients = our_step(folder, tmp_path / "moved", samples, {"loss": loss, "beta": 0.2})
    assert found["lm loss"] == pytest.approx(their_loss.item(), rel=1e-5)
    theirs = trainer._metrics["train"]
    assert abs(theirs["rewards/margins"][-1]) > 0.01
    for name in METRICS:
        assert found[name] == pytest.approx(theirs[name][-1], rel=1e-5, abs=1e-5), name
    compared = 0
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            key = name.partition("language_model.")[2].removesuffix(".default.weight")
            assert (gradients[key] - parameter.grad).norm() <= 2e-5 * parameter.grad.norm(), key
            compared += 1
    assert compared == len(gradients) == 4 * 5 * 2


@pytest.fixture(scope="module")
def their_run(golden, folder, tmp_path_factory):
    """TRL's log and adapter after STEPS steps of AdamW."""
    place = tmp_path_factory.mktemp("their-run")
    model = adapted(golden, place)
    trainer = TheirTrainer(
        *(golden, model, samples_of(folder), place),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        adam_epsilon=1e-3,
    )
    trainer.train()
    trainer.model.save_pretrained(place / "trained", selected_adapters=["default"])
    return trainer.state.log_history[:STEPS], load_file(place / "trained" / "adapter_model.safetensors")


@pytest.mark.parametrize("layout", names(LAYOUTS, slow=("DP2",)))
def test_five_steps_of_adamw(ranks, folder, their_run, tmp_path, layout):
    log, adapter = their_run
    flags = f"--train-iters {STEPS} --weight-decay 0.1 {LAYOUTS[layout]}"
    size = 2 if layout.endswith("2") or "SP" in layout else 1
    name = layout.replace(" ", "-")
    assert ranks(size).run(train_pairs, str(folder), name, flags) == [0] * size
    rows = records(folder / name)
    for row, theirs in zip(rows, log, strict=True):
        for key in ("loss", "grad_norm", *METRICS):
            assert row[key] == pytest.approx(float(theirs[key]), rel=2e-5, abs=1e-5), (row["iteration"], key)
    export_adapter(folder / name, tmp_path / "adapter")
    ours = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert ours.keys() == adapter.keys()
    for key, wanted in adapter.items():
        assert (ours[key] - wanted).norm() <= 1e-5 * wanted.norm(), key
