"""`ema` behind a checkpoint's path: the moving averages wherever weights are read."""

import json

import pytest
import torch

import mindspeed_mm as mm
from mindspeed_mm.cli.main import main
from mindspeed_mm.errors import CheckpointError, WeightError
from tests.evaluation.evaluation_helpers import choice_rows, write_table
from tests.parallel.test_command import describe_data, folder, train  # noqa: F401  folder is a fixture

LORA = "--train-iters 3 --lr 1e-2 --lora-r 3 --lora-target-modules q_proj down_proj"


def test_a_lora_run(ranks, golden, folder, capsys):  # noqa: F811
    """A and B are averaged, then merged; the projector, which is trained as a whole, is averaged too."""
    describe_data(golden, folder)
    assert ranks(1).run(train, str(folder), "run", f"{LORA} --ema-decay 0.5") == [0]
    run, ids = folder / "run", torch.arange(3, 20)[None]
    plain, averaged = (mm.load(path, device="cpu") for path in (run, run / "ema"))
    wanted = averaged.logits(ids)
    assert (plain.logits(ids) - wanted).abs().max() > 1e-3
    image = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    features = [vlm.project(vlm.vision_features(image)) for vlm in (plain, averaged)]
    assert (features[0] - features[1]).abs().max() > 1e-4
    again = mm.load(run / "iter_0000003" / "ema", device="cpu")
    assert torch.equal(again.logits(ids), wanted)
    mm.convert(run / "ema", folder / "hf", to="llava-hf", dtype="fp32")
    found = mm.load(folder / "hf", device="cpu")
    torch.testing.assert_close(found.logits(ids)[..., : wanted.shape[-1]], wanted, atol=1e-4, rtol=0)
    mm.convert(run / "ema", folder / "adapter", to="peft", parts=["text_decoder"])
    found = mm.load(folder / "model.json", device="cpu", adapter=folder / "adapter")
    torch.testing.assert_close(found.logits(ids), wanted, atol=1e-4, rtol=0)
    words = ["infer", "--model", str(run / "ema"), "--prompt", "Hi", "--max-new-tokens", "2", "--device", "cpu"]
    assert main(words) == 0
    capsys.readouterr()
    table = write_table(folder / "toy.tsv", choice_rows(2))
    words = ["--dataset-path", str(table), "--evaluation-dataset", "toy", "--result-output-path", str(folder / "out")]
    words += ["--max-new-tokens", "2", "--device", "cpu", "--json"]
    for path, name in ((run, "run_iter_0000003"), (run / "ema", "run_iter_0000003_ema")):
        assert main(["evaluate", "--model", str(path), *words]) == 0
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (told["model"], told["n"], told["resumed"]) == (name, 2, 0)


def test_what_is_not_there(ranks, golden, folder):  # noqa: F811
    describe_data(golden, folder)
    assert ranks(1).run(train, str(folder), "run", f"{LORA} --no-save-optim") == [0]
    with pytest.raises(CheckpointError, match="holds no moving average of the weights: the run had no --ema-decay"):
        mm.load(folder / "run" / "ema", device="cpu")
    with pytest.raises(WeightError, match="no such file or folder"):
        mm.load(folder / "nothing" / "ema", device="cpu")
