"""Log-probabilities of the reference on disk: found by content alone, at any layout, damage told."""

import pytest
import torch

from mindspeed_mm.data.reference_store import RECORD_BYTES, ReferenceStore, pair_key
from mindspeed_mm.models.media import Media
from tests.helpers.golden_training import records
from tests.helpers.tiny_pairs import LORA, SIZES, train_alone, train_pairs, write_pairs
from tests.parallel.test_command import LAYOUTS


def image(level):
    return (Media.of_images(torch.full((1, 3, 2, 2), level)),)


def test_a_pair_is_named_by_its_content():
    base = [1, 2, 3], [-100, 2, 3], (1, 1, 1), image(0.5)
    others = [
        ([1, 2, 4], *base[1:]),
        (base[0], [-100, -100, 3], *base[2:]),
        (*base[:2], (0, 2, 1), base[3]),
        (*base[:3], image(0.25)),
        (*base[:3], ()),
    ]
    keys = {pair_key(*each) for each in (base, *others)}
    assert len(keys) == 6 and pair_key(*base) in keys


def test_what_is_written_is_read_and_damage_is_left_out(tmp_path, caplog):
    store = ReferenceStore(tmp_path, "model")
    keys = [bytes([number] * 16) for number in range(3)]
    values = torch.tensor([[-1.5, -2.0], [-3.25, -4.0], [-5.0, -6.0]])
    store.add(keys[:2], values[:2], write=True)
    store.add(keys[2:], values[2:], write=False)
    assert torch.equal(store.values(keys), values) and len(store) == 3
    again = ReferenceStore(tmp_path, "model")
    assert keys[2] not in again and torch.equal(again.values(keys[:2]), values[:2])
    assert len(ReferenceStore(tmp_path, "another model")) == 0
    (path,) = (tmp_path / "model").glob("*.logprobs")
    content = bytearray(path.read_bytes())
    content[RECORD_BYTES + 18] ^= 1
    path.write_bytes(bytes(content) + b"cut")
    with caplog.at_level("WARNING"):
        damaged = ReferenceStore(tmp_path, "model")
    assert len(damaged) == 1 and "2 damaged records are left out" in caplog.text


def test_a_disk_that_takes_nothing(tmp_path, caplog):
    (tmp_path / "model").write_text("in the way")
    store, keys = ReferenceStore(tmp_path, "model"), [bytes(16), bytes([1] * 16)]
    for key in keys:
        store.add([key], torch.tensor([[-1.0, -2.0]]), write=True)
    assert store.unwritten == 2 and store.values(keys).tolist() == [[-1, -2], [-1, -2]]
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}/model: File exists; log-probabilities are kept for this run alone"
    ]


@pytest.fixture
def folder(golden, tmp_path):
    write_pairs(golden, tmp_path)
    return tmp_path


def passes(monkeypatch):
    """Counts the passes of the reference."""
    from mindspeed_mm.objectives.dpo import Dpo

    seen, plain = [], Dpo.reference_forward
    monkeypatch.setattr(Dpo, "reference_forward", lambda *given: seen.append(1) or plain(*given))
    return seen


@pytest.mark.parametrize(
    "layouts", [["PP2", "DP2"], pytest.param(["TP2 SP", "CP2"], marks=pytest.mark.slow)], ids=" and ".join
)
def test_a_second_run_needs_no_pass_of_the_reference(
    ranks, golden, folder, layouts, single_process, monkeypatch, capsys
):
    flags = f"{SIZES} {LORA} --train-iters 6"
    cached = f"{flags} --pref-cache {folder}/cache"
    assert train_alone(folder, "plain", flags) == 0
    assert train_alone(folder, "first", cached) == 0
    seen = passes(monkeypatch)
    assert train_alone(folder, "second", f"{cached} --pref-beta 0.1") == 0
    assert len(seen) == 2  # both micro-batches of the check at the start, under the policy
    assert "12 pairs are in" in capsys.readouterr().err
    for name in ("first", "second"):
        for row, other in zip(records(folder / name), records(folder / "plain"), strict=True):
            assert [row[key] for key in other if "/" in key and "/s" not in key] == [
                other[key] for key in other if "/" in key and "/s" not in key
            ]
    for name in layouts:
        assert ranks(2).run(train_pairs, str(folder), name, f"{cached} {LAYOUTS[name]}") == [0, 0]
        for row, other in zip(records(folder / name), records(folder / "plain"), strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-6), name
    (model,) = (folder / "cache").iterdir()  # the same model at every layout
    assert sum(path.stat().st_size for path in model.iterdir()) == 12 * RECORD_BYTES


def test_other_data_and_other_models_are_not_found(golden, folder, single_process, monkeypatch):
    flags = f"{SIZES} {LORA} --train-iters 2 --pref-cache {folder}/cache"
    assert train_alone(folder, "first", flags) == 0
    seen = passes(monkeypatch)
    data = (folder / "data.json").read_text()
    (folder / "data.json").write_text(
        data.replace('"preprocess_parameters": {', '"preprocess_parameters": {"pad2square": true, ')
    )
    assert train_alone(folder, "padded", flags) == 0
    assert len(seen) > 2
    (folder / "data.json").write_text(data)
    (folder / "model.json").write_text(
        (folder / "model.json").read_text().replace("vicuna", "llava_hf").replace("1000", "1024")
    )
    assert train_alone(folder, "other", flags) == 0
    assert len(list((folder / "cache").iterdir())) == 2


def test_a_store_without_a_reference(folder, single_process, capsys):
    assert train_alone(folder, "one", f"{SIZES} {LORA} --pref-loss simpo --pref-cache {folder}/cache") != 0
    assert "--pref-cache is given, but the objective dpo with these options has no reference" in capsys.readouterr().err
    assert train_alone(folder, "one", f"{SIZES} {LORA} --pref-cache {folder}/data.json") != 0
    assert "is not a folder: name one" in capsys.readouterr().err
