"""`mindspeed-mm reference`: what it leaves is all that a run needs, at any layout, and it is not done twice."""

import json
import shutil

import pytest
import torch

from mindspeed_mm.data.reference_store import KEY_BYTES, RECORD_BYTES, ReferenceStore
from tests.helpers.golden_training import records
from tests.helpers.tiny_pairs import LORA, SIZES, train_alone, write_pairs
from tests.parallel.test_command import COMMON, LAYOUTS


@pytest.fixture
def folder(golden, tmp_path):
    write_pairs(golden, tmp_path)
    return tmp_path


def reference(folder, flags):
    """The command in this process; its exit code."""
    from mindspeed_mm.cli.main import main

    files = ["--mm-model", f"{folder}/model.json", "--mm-data", f"{folder}/data.json"]
    return main(["reference", *files, *COMMON.split(), *flags.split(), "--json"])


def on_rank(folder, flags):
    """The same on a rank of the pool."""
    import os

    import torch

    os.environ["WORLD_SIZE"] = str(torch.distributed.get_world_size())  # as torchrun sets it
    try:
        return reference(folder, flags)
    finally:
        del os.environ["WORLD_SIZE"]


def stored(place):
    """Records of the one model in a folder, and their values by pair."""
    (model,) = place.iterdir()
    content = b"".join(path.read_bytes() for path in model.iterdir())
    keys = sorted({content[start : start + KEY_BYTES] for start in range(0, len(content), RECORD_BYTES)})
    return len(content) // RECORD_BYTES, keys, ReferenceStore(place, model.name).values(keys)


def no_passes(monkeypatch):
    """Counts passes of the reference; those of the check at the start are the policy's."""
    from mindspeed_mm.objectives.dpo import Dpo

    seen, plain = [], Dpo.reference_forward
    monkeypatch.setattr(Dpo, "reference_forward", lambda *given: seen.append(1) or plain(*given))
    return seen


def test_a_run_takes_what_the_command_made(folder, single_process, monkeypatch, capsys):
    flags = f"{SIZES} {LORA}"
    cached = f"{flags} --pref-cache {folder}/cache --save {folder}/never"
    assert train_alone(folder, "live", flags) == 0
    capsys.readouterr()
    assert reference(folder, f"{cached} --global-batch-size 5") == 0  # 12 pairs: the last batch is filled up
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    (model,) = (folder / "cache").iterdir()
    assert said == {"folder": str(model), "pairs": 12, "computed": 12, "samples": 12}
    assert not (folder / "never").exists()
    seen = no_passes(monkeypatch)
    assert reference(folder, cached) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["computed"] == 0
    assert len(seen) == 2  # both micro-batches of the first step, under the policy
    assert train_alone(folder, "cached", f"{flags} --pref-cache {folder}/cache") == 0
    assert len(seen) == 4
    for row, other in zip(records(folder / "cached"), records(folder / "live"), strict=True):
        for key in other:
            if key in ("loss", "grad_norm") or key.startswith(("rewards/", "logps/", "reference_logps/")):
                assert row[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6), key


def test_a_command_that_was_cut_short_goes_on(folder, single_process, capsys):
    cached = f"{SIZES} {LORA} --pref-cache {folder}/cache"
    assert reference(folder, cached) == 0
    (path,) = next((folder / "cache").iterdir()).iterdir()
    path.write_bytes(path.read_bytes()[: 8 * RECORD_BYTES])
    capsys.readouterr()
    assert reference(folder, cached) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["pairs"], said["computed"]) == (12, 4) and stored(folder / "cache")[0] == 12
    (model,) = (folder / "cache").iterdir()
    shutil.rmtree(model)
    model.write_text("what is in the way")
    assert reference(folder, cached) == 1
    assert "12 pairs could not be written; expected a folder with room" in capsys.readouterr().err


def test_every_layout_makes_the_same(ranks, golden, folder):
    """Each pair is written once; a run with packed rows whose trained parts have first values begins as that model."""
    wanted = None
    for name in ("TP2 SP", "PP2 VPP2", "CP2", "DP2"):
        place = folder / name.replace(" ", "-")
        flags = f"{SIZES} {LORA} {LAYOUTS[name]} --global-batch-size 4 --pref-cache {place}"
        assert ranks(2).run(on_rank, str(folder), flags) == [0, 0], name
        found = stored(place)
        wanted = wanted or found
        assert found[:2] == wanted[:2] and found[0] == 12, name
        torch.testing.assert_close(found[2], wanted[2], rtol=1e-5, atol=1e-5)
    write_pairs(golden, folder, trained=("text_decoder", "vision_projector"), dataloader_param={"packing": True})
    assert ranks(2).run(on_rank, str(folder), f"{SIZES} {LAYOUTS['DP2']} --pref-cache {place}") == [0, 0]
    assert stored(place)[0] == 12


CASES = {
    "no folder": (f"{SIZES} {LORA}", "mindspeed-mm reference needs --pref-cache DIR"),
    "no reference": (f"{SIZES} {LORA} --pref-loss simpo --pref-cache cache", "has no reference model"),
    "no room": (
        f"{SIZES} {LORA} --pref-cache {__file__}/cache",
        "cannot be made: Not a directory; name another",
    ),
    "features": (f"{SIZES} {LORA} --pref-cache cache --feature-cache f", "does not go with a reference: leave it out"),
    "no pairs": ("--objective sft --pref-cache cache", "holds preference records"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_refused(folder, capsys, single_process, case):
    flags, words = CASES[case]
    assert reference(folder, flags) != 0
    assert words in capsys.readouterr().err
