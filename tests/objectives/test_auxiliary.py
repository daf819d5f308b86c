"""Conversations beside preference pairs: their loss, their order, every layout, and what does not go together."""

import argparse
import json
import math
from itertools import islice

import pytest
import torch
from PIL import Image

from mindspeed_mm.cli.main import main
from mindspeed_mm.constants import IGNORE_INDEX
from mindspeed_mm.data.build import build_loader
from mindspeed_mm.data.collate import Collator
from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.data.sample import Encoded
from mindspeed_mm.data.tokenizer import load_tokenizer
from tests.helpers.golden_training import records
from tests.helpers.media import dataset_of
from tests.helpers.tiny_pairs import LORA, train_alone, train_pairs, write_pairs
from tests.objectives.test_dpo_runs import compare
from tests.parallel.test_command import COMMON, LAYOUTS

WEIGHT = "--pref-auxiliary-weight 0.5"


def captions(folder, count):
    """filter_cap.json of cc_sbu_align with so many captions, as a set."""
    rows = [{"image_id": str(number), "caption": "A cat. " * (1 + number % 3)} for number in range(count)]
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": rows}))
    for number in range(count):
        Image.new("RGB", (50, 30), (9, 200, 20 * number)).save(folder / f"{number}.jpg")
    return {"data_path": str(folder / "filter_cap.json"), "data_folder": str(folder), "dataset_type": "minigpt4"}


@pytest.fixture
def folder(golden, tmp_path):
    """Pairs with five captions."""
    write_pairs(golden, tmp_path)
    change(tmp_path, auxiliary_parameters=captions(tmp_path, 5))
    return tmp_path


def change(folder, **parameters):
    data = json.loads((folder / "data.json").read_text())
    data["dataset_param"] |= parameters
    (folder / "data.json").write_text(json.dumps(data))


def same(found, wanted, name):
    compare(found, wanted, name)
    losses = [[row["auxiliary loss"] for row in rows] for rows in (found, wanted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4), name


def test_every_layout_trains_on_the_same(ranks, folder):
    flags = f"{LORA} {WEIGHT}"
    assert ranks(1).run(train_pairs, str(folder), "one", flags) == [0]
    wanted = records(folder / "one")
    for row in wanted:
        assert row["auxiliary loss"] > 0.1 and row["supervised"] == 2  # pairs
    assert wanted[0]["loss"] == pytest.approx(math.log(2) + 0.5 * wanted[0]["auxiliary loss"], rel=1e-6)
    assert wanted[-1]["auxiliary loss"] < wanted[0]["auxiliary loss"]
    for name in ("TP2 SP", "CP2", "DP2"):
        assert ranks(2).run(train_pairs, str(folder), name, f"{flags} {LAYOUTS[name]}") == [0, 0], name
        same(records(folder / name), wanted, name)
    flags = f"{flags} --global-batch-size 4 --train-iters 2"
    assert ranks(1).run(train_pairs, str(folder), "four", flags) == [0]
    two = f"{flags} --micro-batch-size 2 {LAYOUTS['PP2 VPP2']}"  # two pairs in one row, with padding
    assert ranks(2).run(train_pairs, str(folder), "rows", two) == [0, 0]
    same(records(folder / "rows"), records(folder / "four"), "PP2 VPP2")


def test_the_loss_is_that_of_the_conversation_alone(golden, folder, single_process):
    change(folder, auxiliary_parameters=captions(folder, 1))
    assert train_alone(folder, "pairs", f"--objective dpo {LORA} {WEIGHT} --train-iters 1") == 0
    change(folder, auxiliary_parameters=[], basic_parameters=captions(folder, 1))
    assert train_alone(folder, "alone", f"--objective sft {LORA} --train-iters 1") == 0
    (pairs,), (alone,) = records(folder / "pairs"), records(folder / "alone")
    assert pairs["auxiliary loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert pairs["rewards/margins"] == 0


def test_the_gradient_of_each_token(single_process):
    """-weight / tokens of its conversation, and nothing of it in the answers' sums."""
    from mindspeed_mm.objectives import find_objective
    from mindspeed_mm.objectives._pairs import pair_row, pair_sums
    from mindspeed_mm.platform import get_platform
    from mindspeed_mm.platform.distributed import init_single_process

    init_single_process(get_platform("cpu"))
    from megatron.core.transformer import TransformerConfig

    pair = Encoded("pair", [5, 6, 7, 8, 9], [IGNORE_INDEX, IGNORE_INDEX, 7, IGNORE_INDEX, 9], branches=(1, 2, 2))
    talk = Encoded("talk", [5, 4, 3, 2], [IGNORE_INDEX, 4, 3, 2])
    batch = Collator(0, pad_multiple=16)([[pair, talk]])
    assert batch.sample_ids == ["pair"] and batch.branches == ((1, 2, 2), (4,)) and batch.tokens == 9
    row = pair_row(batch, TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1))
    values = torch.arange(-10.0, 0.0).view(5, 2).requires_grad_()
    sums = pair_sums(values, row)
    assert sums.log_probs.tolist() == [[-10.0, -8.0]] and sums.beside.tolist() == [pytest.approx(-4.0)]
    object.__setattr__(row.batch, "reference", torch.tensor([[-10.0, -8.0]]))
    objective = find_objective("dpo").configured({"auxiliary_weight": 0.6})
    total, count, found = objective._measure(row, values)
    assert count == 1 and total.item() == pytest.approx(math.log(2) + 0.6 * 4)
    assert [float(x) for x in found["auxiliary loss"]] == [pytest.approx(4.0), 1]
    total.backward()
    assert values.grad[2:, 0].tolist() == pytest.approx([-0.2] * 3)
    assert values.grad[:2, 0].tolist() == pytest.approx([-0.05, 0.05])  # beta / 2


def test_order(golden, folder):
    """Each caption comes once before one comes again; any number of ranks, any start."""
    config, tokenizer = DataConfig.load(folder / "data.json"), load_tokenizer(golden / "tokenizer")
    sets = {"pairs": {"preferences": True}, "captions": {"auxiliary": True}}
    pairs, others = (dataset_of(config, tokenizer, 4, 200, **options) for options in sets.values())
    common = {"micro_batch_size": 1, "seed": 3, "num_workers": 0, "pad_token_id": 0, "companions": others}

    def read(start, count, rank=0, size=1):
        given = {"consumed_samples": start, "dp_rank": rank, "dp_size": size}
        return [(*x.sample_ids, x.tokens, x.branches) for x in islice(build_loader(pairs, **given, **common), count)]

    whole = read(0, 15)
    assert read(4, 3) == whole[4:7] and read(0, 7, 1, 2) == whole[1:14:2]
    sequence = build_loader(pairs, consumed_samples=0, dp_rank=0, dp_size=1, **common)
    media = [round(batch.media.pixels[-1][2].mean().item(), 3) for batch in islice(sequence, 10)]
    assert len(set(media[:5])) == 5 == len(set(media[5:]))


def test_what_does_not_go_together(folder, capsys, single_process):
    def refused(words, flags):
        assert train_alone(folder, "refused", f"{LORA} {flags}") == 1
        assert words in capsys.readouterr().err

    refused("has auxiliary_parameters, which this objective does not read", "--objective dpo")
    refused("auxiliary_weight", "--objective dpo --pref-auxiliary-weight -1")
    change(folder, auxiliary_parameters=[])
    refused("the data config has no auxiliary_parameters", f"--objective dpo {WEIGHT}")
    change(folder, auxiliary_parameters={"data_path": str(folder / "rows.json"), "data_folder": str(folder)})
    refused("holds preference records", f"--objective dpo {WEIGHT}")
    change(folder, auxiliary_parameters=captions(folder, 2) | {"weight": 2})
    refused("filter_cap.json in auxiliary_parameters has a weight", f"--objective dpo {WEIGHT}")
    change(folder, auxiliary_parameters=captions(folder, 2))
    (folder / "1.jpg").unlink()
    refused("1.jpg", f"--objective dpo {WEIGHT}")
    data = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(data | {"dataloader_param": {"packing": True}}))
    refused("packing does not go with auxiliary_parameters", f"--objective dpo {WEIGHT}")


def test_check_data_looks_at_them(folder, capsys):
    files = ["--mm-data", str(folder / "data.json"), "--mm-model", str(folder / "model.json")]
    assert main(["check-data", *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["records"] == 12 + 5


def test_a_plan_counts_them(folder, single_process):
    from mindspeed_mm.planning.planner import _mean_sample
    from mindspeed_mm.platform import get_platform
    from mindspeed_mm.trainer.inputs import RunInputs

    platform = get_platform("cpu")
    from megatron.driver import arguments

    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser)
    args = arguments.from_namespace(parser.parse_args(COMMON.replace("--device cpu", "").split()), world_size=1)
    files = folder / "model.json", folder / "data.json"
    inputs = RunInputs(args, platform, *files, "dpo", objective_options={"auxiliary_weight": 0.5}, weights=False)
    longest, mean, supervised, work = _mean_sample(inputs.spec, inputs.companions)
    lengths = [len(inputs.companions[number].input_ids) for number in range(5)]
    assert (longest, mean) == (max(lengths), sum(lengths) / 5) and supervised > 3 and work.tokens > 1
