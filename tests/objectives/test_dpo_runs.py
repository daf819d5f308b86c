"""`mindspeed-mm train --objective dpo`: every layout, packing, the kinds of references, resuming."""

import json

import pytest
import torch

from tests.helpers.golden_training import full_tensors, records
from tests.helpers.tiny_pairs import LORA, SIZES, train_alone, train_pairs, write_pairs
from tests.parallel.test_command import LAYOUTS

LN2 = 0.6931471805599453


@pytest.fixture
def folder(golden, tmp_path):
    write_pairs(golden, tmp_path)
    return tmp_path


def check_start(row):
    """HA-DPO's first line: loss ln 2, no margin, no accuracy, since ties do not count."""
    assert row["loss"] == pytest.approx(LN2, abs=1e-6)
    for name in ("chosen", "rejected", "margins", "accuracies"):
        assert row[f"rewards/{name}"] == 0
    for side in ("chosen", "rejected"):
        assert row[f"logps/{side}"] == row[f"reference_logps/{side}"] < 0


def compare(found, wanted, what):
    """Losses, norms and everything that the objective logs."""
    keys = [key for key in wanted[0] if key in ("loss", "grad_norm") or "/" in key]
    assert len(keys) >= 10 and len(found) == len(wanted)
    for row, other in zip(found, wanted, strict=True):
        for key in keys:
            assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), (what, row["iteration"], key)


@pytest.mark.parametrize("packing", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "packed"])
def test_adapters_at_every_layout(ranks, golden, folder, packing):
    if packing:
        write_pairs(golden, folder, dataloader_param={"packing": True})
    assert ranks(1).run(train_pairs, str(folder), "one", LORA) == [0]
    wanted = records(folder / "one")
    check_start(wanted[0])
    assert wanted[-1]["rewards/margins"] > 0 and wanted[-1]["loss"] < LN2
    assert wanted[0]["supervised"] > 2 if packing else wanted[0]["supervised"] == 2
    for name in ("TP2 SP", "PP2 VPP2", "CP2", "DP2"):
        assert ranks(2).run(train_pairs, str(folder), name, f"{LORA} {LAYOUTS[name]}") == [0, 0], name
        compare(records(folder / name), wanted, name)


@pytest.mark.parametrize(
    "layouts", [["PP2 VPP2"], pytest.param(["TP2 SP", "DP2"], marks=pytest.mark.slow)], ids=" and ".join
)
def test_the_first_values_of_what_is_trained_are_the_reference(ranks, golden, folder, layouts):
    """Decoder and projector themselves: no adapter, no second model; also where a run goes on."""
    write_pairs(golden, folder, trained=("text_decoder", "vision_projector"))
    place, flags = str(folder), "--train-iters 4 --lr 1e-3"
    assert ranks(1).run(train_pairs, place, "whole", flags) == [0]
    wanted = records(folder / "whole")
    check_start(wanted[0])
    assert wanted[3]["rewards/margins"] > 0
    assert ranks(1).run(train_pairs, place, "cut", f"{flags} --exit-interval 2") == [0]
    assert ranks(1).run(train_pairs, place, "cut", f"{flags} --load {folder}/cut") == [0]
    found = records(folder / "cut")
    for row, other in zip(found, wanted, strict=True):
        assert all(row[key] == other[key] for key in other if "/" in key and key != "samples/s")
    ours, theirs = full_tensors(folder / "cut"), full_tensors(folder / "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for name in layouts:
        assert ranks(2).run(train_pairs, place, name, f"{flags} {LAYOUTS[name]}") == [0, 0]
        compare(records(folder / name), wanted, name)


def test_adapters_go_on_exactly(ranks, golden, folder):
    """At another layout and in the midst of packed rows, too; the reference stays the model without adapters."""
    write_pairs(golden, folder, dataloader_param={"packing": True})
    place, flags = str(folder), f"{LORA} --train-iters 4"
    assert ranks(1).run(train_pairs, place, "whole", flags) == [0]
    assert ranks(1).run(train_pairs, place, "cut", f"{flags} --exit-interval 2") == [0]
    assert ranks(2).run(train_pairs, place, "cut", f"{flags} --load {folder}/cut {LAYOUTS['PP2']}") == [0, 0]
    compare(records(folder / "cut"), records(folder / "whole"), "PP2")


def test_micro_batches_and_recomputation_change_nothing(ranks, folder):
    """Rows of several pairs, with the padding that virtual stages keep; and every layer computed twice."""
    flags = f"{LORA} --global-batch-size 4"
    assert ranks(1).run(train_pairs, str(folder), "one", flags) == [0]
    wanted = records(folder / "one")
    assert ranks(2).run(train_pairs, str(folder), "two", f"{flags} --micro-batch-size 2 {LAYOUTS['PP2 VPP2']}") == [
        0,
        0,
    ]
    compare(records(folder / "two"), wanted, "virtual stages")
    model = json.loads((folder / "model.json").read_text())
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    model["text_decoder"] |= full
    (folder / "model.json").write_text(json.dumps(model))
    assert ranks(1).run(train_pairs, str(folder), "again", flags) == [0]
    compare(records(folder / "again"), wanted, "recomputed")


def test_losses_without_a_reference(folder, capsys, single_process):
    """Their first loss is not that of equal models, nothing is computed twice, and the log has no reference."""
    for flags in ("--pref-loss simpo --pref-beta 2", "--pref-loss orpo", "--pref-reference-free --pref-ftx 0.5"):
        name = flags.split()[-1]
        assert train_alone(folder, name, f"{SIZES} {LORA} {flags} --log-format megatron") == 0
        rows = records(folder / name)
        assert "reference_logps/chosen" not in rows[0]
        assert rows[-1]["rewards/margins"] > rows[0]["rewards/margins"]
    assert rows[0]["sft loss"] > 0
    log = capsys.readouterr().err
    assert "reference model" not in log and "dpo loss:" in log and "rewards/margins:" in log


def test_the_log_has_the_names_of_ha_dpo_on_request(folder, single_process):
    """In metrics.jsonl and in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = f"{SIZES} {LORA} --pref-hadpo-keys --train-iters 2 --tensorboard-dir {folder}/board"
    assert train_alone(folder, "one", flags) == 0
    events = EventAccumulator(str(folder / "board")).Reload()
    for key in ("rewards/margins", "rewards/accuracies", "logps/chosen", "logits/rejected", "referece_logps/chosen"):
        shown = [event.value for event in events.Scalars(key)]
        assert shown == pytest.approx([row[key] for row in records(folder / "one")], rel=1e-5), key
    for row in records(folder / "one"):
        for side in ("chosen", "rejected"):
            assert row[f"policy_logps/{side}"] == row[f"logps/{side}"]
            assert row[f"referece_logps/{side}"] == row[f"reference_logps/{side}"]
    assert train_alone(folder, "two", f"{SIZES} {LORA} --pref-hadpo-keys --pref-loss simpo --train-iters 1") == 0
    (row,) = records(folder / "two")
    assert "policy_logps/chosen" in row and "referece_logps/chosen" not in row


def test_validation_and_an_objective_of_the_file(folder, capsys, single_process):
    data = json.loads((folder / "data.json").read_text())
    data["dataset_param"]["validation_parameters"] = data["dataset_param"]["basic_parameters"]
    data["objective"] = {"name": "dpo", "beta": 0.3}
    (folder / "data.json").write_text(json.dumps(data))
    assert train_alone(folder, "one", f"--train-iters 2 --lr 1e-2 {LORA} --eval-interval 1 --log-format megatron") == 0
    log = capsys.readouterr().err
    assert "reference model: adapters switched off" in log and "loss 0.6931, margins 0" in log
    assert "validation loss at iteration 1 | dpo loss value: " in log and "PPL" not in log
    assert train_alone(folder, "two", f"--train-iters 2 --lr 1e-2 {LORA} --eval-interval 1 --log-format short") == 0
    log = capsys.readouterr().err
    assert "rewards/margins " in log and "validation loss " in log and "perplexity" not in log


def test_passes_share_the_features_of_the_images(folder, single_process, monkeypatch):
    """Of reference, check at the start and policy."""
    from mindspeed_mm.models.vlm import ImageEncoder

    seen, plain = [], ImageEncoder.features
    monkeypatch.setattr(ImageEncoder, "features", lambda self, media: seen.append(len(media)) or plain(self, media))
    assert train_alone(folder, "one", f"{SIZES} {LORA}") == 0
    samples = 3 * 2
    assert sum(seen) <= samples and records(folder / "one")[-1]["iteration"] == 3


CASES = {
    "no objective": ([], {}, "", "holds preference records (dataset_type preference)"),
    "equal": ([{"chosen": "a", "rejected": "a"}], {}, "", "there is nothing to prefer"),
    "empty": ([{"chosen": " ", "rejected": "a"}], {}, "", '"chosen" is empty'),
    "nothing to train": ([], {}, "", "has nothing to train: freeze is true for every part"),
    "cache": ([], {}, LORA + " --feature-cache cache", "--feature-cache does not go with the objective dpo"),
    "dropout": ([], {}, LORA + " --lora-dropout 0.1", "or leave --lora-dropout out"),
    "long": ([{"chosen": "Ho " * 300, "rejected": "a"}], {}, LORA, "its chosen side has"),
    "plain": ([], {"template_name": "plain"}, LORA, "answers straight behind an image"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_trained(golden, folder, capsys, single_process, case):
    """Refused with the cause before any weight is read, or at the first batch."""
    changes, parameters, flags, words = CASES[case]
    rows = [
        {"prompt": "<image>\nWhat?", "images": ["red.png"], "chosen": f"a {number}", "rejected": "b"}
        for number in range(4)
    ]
    rows = [row | change for row, change in zip(rows, changes, strict=False)] + rows[len(changes) :]
    write_pairs(golden, folder, rows=rows, trained=() if case == "nothing to train" else ("text_decoder",))
    data = json.loads((folder / "data.json").read_text())
    data["dataset_param"] |= parameters
    (folder / "data.json").write_text(json.dumps(data))
    objective = "--objective sft" if case == "no objective" else "--objective dpo"
    assert train_alone(folder, "one", f"{objective} {flags}") != 0
    assert words in capsys.readouterr().err
