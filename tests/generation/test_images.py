"""Images of several requests go through the vision encoder together, each distinct one once."""

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
def vision_encoder(engine, monkeypatch):
    """Sizes of the vision encoder's calls."""
    calls, compute = [], engine._decoder.image_features
    monkeypatch.setattr(
        engine._decoder, "image_features", lambda pixels: (calls.append(len(pixels)), compute(pixels))[1]
    )
    return calls


def image_of(number: int) -> Image.Image:
    return Image.new("RGB", (20 + number, 20), (200, 3 * number, 90))


def request(name, *images, start=""):
    from mindspeed_mm.generation.engine import GenerationRequest

    return GenerationRequest(str(name), prompt=start + "<image>" * len(images) + "What is it?", images=images)


def answers(engine, requests, size):
    return [r.token_ids for r in engine.generate(requests, {"max_new_tokens": 4}, size, on_error="return")]


def test_images_of_a_group_go_through_the_vision_encoder_together(engine, vision_encoder):
    requests = [request(i, image_of(i)) for i in range(6)]
    together = answers(engine, requests, 6)
    assert vision_encoder == [6]
    assert answers(engine, requests, 1) == together and vision_encoder == [6]  # nothing is computed again


def test_what_is_remembered_of_an_image_holds_no_other_one(engine):
    answers(engine, [request(0, *map(image_of, range(4)))], 1)
    for item in engine.image_features._known.values():
        values = item.projected
        assert values.untyped_storage().nbytes() == values.numel() * values.element_size()


def test_the_vision_encoder_takes_so_many_at_once(engine, vision_encoder, monkeypatch):
    monkeypatch.setattr("mindspeed_mm.generation.images.VISION_ENCODER_BATCH", 4)
    whole = answers(engine, [request(0, *map(image_of, range(6))), request(1, image_of(6))], 2)
    assert all(len(ids) == 4 for ids in whole) and max(vision_encoder) <= 4 and sum(vision_encoder) == 7


def test_equal_images_are_one_whatever_they_come_as(engine, tmp_path):
    shown = image_of(1)
    shown.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(data)
    sources = (str(tmp_path / "a.png"), tmp_path / "b.png", ImageBytes("c", data), shown, shown.copy())
    found = answers(engine, [request(i, source) for i, source in enumerate(sources)], 5)
    assert len(set(found)) == 1
    assert engine.image_features.computed == 2  # one by the file's bytes, one by the pixels


def test_forgotten_images_are_computed_again(engine, monkeypatch):
    monkeypatch.setattr("mindspeed_mm.generation.images.VISION_ENCODER_BATCH", 1)
    engine.image_features._most = 1
    for start in ("a", "b"):  # no prompt begins as an earlier one does
        answers(engine, [request(i, image_of(i), start=start) for i in range(3)], 3)
    assert engine.image_features.computed == 5


def broken_image() -> Image.Image:
    """A PIL image whose file ends too early; nobody has read it yet."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    return Image.open(io.BytesIO(buffer.getvalue()[:600]))


BAD = {
    "cut off": (broken_image, "an image in memory cannot be decoded"),
    "deep": (lambda: Image.new("F", (8, 8)), "has 32-bit pixels"),
    "type": (lambda: 3, "found a int as an image; expected a path"),
    "folder": (lambda: str(Path(__file__).parent), "is no file; expected an image"),
    "large": (lambda: Image.new("1", (20_000, 20_000)), "is 20000 x 20000 pixels; at most"),
    "long": (lambda: Image.new("1", (20_000, 1)), "400000000 pixels when padded to a square"),
    "shape": (lambda: torch.zeros(3, 8, 8), r"does not fit: .* shape \[1, 3, 8, 8\]; expected \[images, 3, 56, 56\]"),
    "bytes": (lambda: ImageBytes("member.jpg", b"no image"), "image member.jpg cannot be decoded"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_fails_its_request_alone(engine, kind):
    make, message = BAD[kind]
    alone = answers(engine, [request(0, image_of(0)), request(2, image_of(2))], 1)
    handles = [
        engine.submit(request(i, image), {"max_new_tokens": 4})
        for i, image in enumerate((image_of(0), make(), image_of(2)))
    ]
    with pytest.raises(ImageError, match=message):
        handles[1].wait()
    assert [handles[0].wait().token_ids, handles[2].wait().token_ids] == alone


def test_file_that_cannot_be_read(engine, tmp_path, monkeypatch):
    image_of(0).save(tmp_path / "a.png")
    monkeypatch.setattr("mindspeed_mm.generation.images.MAX_FILE_BYTES", 10)
    with pytest.raises(ImageError, match="has more than 10 bytes: scale it down"):
        engine.image_features.find([tmp_path / "a.png"])
    monkeypatch.setattr(
        Path, "read_bytes", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    monkeypatch.setattr("mindspeed_mm.generation.images.MAX_FILE_BYTES", 2**30)
    with pytest.raises(ImageError, match=r"cannot be read \(Permission denied\)"):
        engine.image_features.find([tmp_path / "a.png"])
