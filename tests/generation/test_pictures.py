"""Pictures of several requests go through the tower together, each distinct one once."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

import mindspeed_mm as mm
from mindspeed_mm.data.image import ImageError
from mindspeed_mm.data.sample import ImageBytes


@pytest.fixture(scope="module")
def vlm(golden):
    return mm.load(golden / "models" / "llava_hf", device="cpu")


@pytest.fixture
def engine(vlm):
    return vlm.engine(batch_size=8)


@pytest.fixture
def tower(engine, monkeypatch):
    """Sizes of the tower's calls."""
    calls, compute = [], engine._decoder.image_features
    monkeypatch.setattr(
        engine._decoder, "image_features", lambda pixels: (calls.append(len(pixels)), compute(pixels))[1]
    )
    return calls


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (20 + number, 20), (200, 3 * number, 90))


def request(name, *images, start=""):
    from mindspeed_mm.generation.engine import GenerationRequest

    return GenerationRequest(str(name), prompt=start + "<image>" * len(images) + "What is it?", images=images)


def answers(engine, requests, size):
    return [r.token_ids for r in engine.generate(requests, {"max_new_tokens": 4}, size, on_error="return")]


def test_pictures_of_a_group_go_through_the_tower_together(engine, tower):
    requests = [request(i, picture(i)) for i in range(6)]
    together = answers(engine, requests, 6)
    assert tower == [6]
    assert answers(engine, requests, 1) == together and tower == [6]  # nothing is computed again


def test_the_tower_takes_so_many_at_once(engine, tower, monkeypatch):
    monkeypatch.setattr(engine.pictures, "_batch", 4)
    whole = answers(engine, [request(0, *map(picture, range(6))), request(1, picture(6))], 2)
    assert all(len(ids) == 4 for ids in whole) and max(tower) <= 4 and sum(tower) == 7


def test_equal_pictures_are_one_whatever_they_come_as(engine, tmp_path):
    shown = picture(1)
    shown.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(data)
    sources = (str(tmp_path / "a.png"), tmp_path / "b.png", ImageBytes("c", data), shown, shown.copy())
    found = answers(engine, [request(i, source) for i, source in enumerate(sources)], 5)
    assert len(set(found)) == 1
    assert engine.pictures.computed == 2  # one by the file's bytes, one by the pixels


def test_forgotten_pictures_are_computed_again(engine):
    engine.pictures._kept = 1
    for start in ("a", "b"):  # no prompt begins as an earlier one does
        answers(engine, [request(i, picture(i), start=start) for i in range(3)], 3)
    assert engine.pictures.computed == 5


def broken_picture() -> Image.Image:
    """A PIL picture whose file ends too early; nobody has read it yet."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    return Image.open(io.BytesIO(buffer.getvalue()[:600]))


BAD = {
    "cut off": (broken_picture, "a picture in memory cannot be decoded"),
    "type": (lambda: 3, "found a int as a picture; expected a path"),
    "folder": (lambda: str(Path(__file__).parent), "is no file; expected a picture"),
    "large": (lambda: Image.new("1", (20_000, 20_000)), "is 20000 x 20000 pixels; at most"),
    "long": (lambda: Image.new("1", (20_000, 1)), "400000000 pixels when padded to a square"),
    "shape": (lambda: torch.zeros(3, 8, 8), r"found a picture of shape \[3, 8, 8\]; expected \[3, 56, 56\]"),
    "bytes": (lambda: ImageBytes("member.jpg", b"no picture"), "image member.jpg cannot be decoded"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_picture_fails_its_request_alone(engine, kind):
    make, message = BAD[kind]
    alone = answers(engine, [request(0, picture(0)), request(2, picture(2))], 1)
    handles = [
        engine.submit(request(i, image), {"max_new_tokens": 4})
        for i, image in enumerate((picture(0), make(), picture(2)))
    ]
    with pytest.raises(ImageError, match=message):
        handles[1].wait()
    assert [handles[0].wait().token_ids, handles[2].wait().token_ids] == alone


def test_file_that_cannot_be_read(engine, tmp_path, monkeypatch):
    picture(0).save(tmp_path / "a.png")
    monkeypatch.setattr("mindspeed_mm.generation.pictures.MAX_FILE_BYTES", 10)
    with pytest.raises(ImageError, match="has more than 10 bytes: scale it down"):
        engine.pictures.find([tmp_path / "a.png"])
    monkeypatch.setattr(
        Path, "read_bytes", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    monkeypatch.setattr("mindspeed_mm.generation.pictures.MAX_FILE_BYTES", 2**30)
    with pytest.raises(ImageError, match=r"cannot be read \(Permission denied\)"):
        engine.pictures.find([tmp_path / "a.png"])


def test_picture_of_another_size_than_the_towers(vlm):
    engine = vlm.engine()
    engine.pictures._processor = vlm.image_processor.model_copy(update={"crop_size": {"height": 28, "width": 28}})
    with pytest.raises(ImageError, match="the image processor gives 28 x 28 pixels, the tower takes 56 x 56"):
        engine.submit(request(0, picture(0))).wait()
