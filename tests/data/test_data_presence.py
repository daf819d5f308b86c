"""Missing image files are found when a run starts."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from mindspeed_mm.data import presence
from mindspeed_mm.data.dataset import Policies
from mindspeed_mm.data.presence import Presence, look_for_images
from mindspeed_mm.errors import DataError


class Records:
    """As much of a dataset as is asked."""

    def __init__(self, folder, count, policy="error"):
        self.names = [str(folder / f"{number}.png") for number in range(count)]
        self.policies = Policies(image_error=policy)

    def __len__(self):
        return len(self.names)

    def sample(self, index):
        return SimpleNamespace(where=f"rows.json: record {index}", files=(self.names[index],))


@pytest.fixture
def records(tmp_path):
    found = Records(tmp_path, 20)
    for number, name in enumerate(found.names):
        if number not in (3, 11):
            Path(name).write_bytes(b"x")
    return found


def test_missing_files_are_counted_and_named(records):
    found = look_for_images(records)
    assert (found.samples, found.images, found.missing, found.is_whole) == (20, 20, 2, True)
    assert sorted(text.split(":")[1] for text in found.examples) == [" record 11", " record 3"]
    assert all("is missing" in text for text in found.examples)


def test_shares_add_up(records):
    whole = look_for_images(records)
    parts = [look_for_images(records, share, 3) for share in range(3)]
    total = sum(parts, Presence())
    assert (total.samples, total.missing, sorted(total.examples)) == (20, 2, sorted(whole.examples))


def test_time_ends_it(records, monkeypatch):
    moments = iter(range(100))
    monkeypatch.setattr(presence.time, "monotonic", lambda: float(next(moments)))
    found = look_for_images(records, seconds=4)
    assert 0 < found.samples < 20 and not found.is_whole


@pytest.mark.usefixtures("single_process")
def test_a_run_is_refused_or_told(records, tmp_path, caplog):
    from mindspeed_mm.platform import get_platform
    from mindspeed_mm.platform.distributed import init_single_process

    init_single_process(get_platform("cpu"))
    from mindspeed_mm.trainer.start_checks import check_images

    with pytest.raises(DataError, match=r"2 image files are missing or empty \(looked for 20 images of 20 records\)"):
        check_images(records)
    records.policies = Policies(image_error="skip")
    check_images(records)
    assert "2 image files are missing or empty" in caplog.text
    records.names = [name for number, name in enumerate(records.names) if number not in (3, 11)]
    with caplog.at_level("INFO", logger="mindspeed_mm"):
        check_images(records)
    assert "images: looked for 18 images of 18 records, all are there" in caplog.text
