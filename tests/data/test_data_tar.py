"""Tar shards are read at random, by content, and damage is named."""

import io
import json
import tarfile

import pytest
from PIL import Image

from mindspeed_mm.data import index
from mindspeed_mm.data.sample import ImageMember
from mindspeed_mm.errors import DataError
from tests.helpers.media import dataset_of


def image(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


RECORD = (
    b'{"id": "own", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "Red."}]}'
)
TEXT_ONLY = b'{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}'


def pair(name, text="A caption."):
    return [(f"{name}.jpg", image("red")), (f"{name}.txt", text.encode())]


@pytest.fixture
def build(make_config, tokenizer, tmp_path):
    def make(path=tmp_path / "shards", **dataset_param):
        usual = {"template_name": "plain", "basic_parameters": {"data_path": str(path)}}
        config = make_config([], dataset_type="tar", **(usual | dataset_param))
        return dataset_of(config, tokenizer, 4, 100)

    (tmp_path / "shards").mkdir()
    return make


def test_shards(build, tmp_path, tokenizer):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    record = json.dumps({"id": "own", "conversations": turns}).encode()
    unnamed = b'{"id": null, "caption": "x"}'
    members = [(pair("x/000")[0]), ("x/000.json", unnamed), ("x/001.png", image("blue")), ("x/001.json", record)]
    write(tmp_path / "shards" / "b.tar", members)
    write(tmp_path / "shards" / "a.tar", pair("007", "First."))
    dataset = build()
    assert len(dataset) == 3
    samples = [dataset[number] for number in (2, 0, 1)]
    assert samples[0].sample_id == "own" and samples[1].sample_id.endswith("a.tar: record 0")
    assert dataset[1].sample_id.endswith("b.tar: record 0")
    text = tokenizer.decode([label for label in samples[1].labels if label != -100])
    assert text.strip() == "First."
    assert all(sample.media[0].pixels.shape == (1, 3, 28, 28) for sample in samples)
    assert len(build(tmp_path / "shards" / "[b-z].tar")) == 2
    assert len(build(overlong="drop").lengths) == 3


def test_captions_as_blip_has_them(build, tmp_path, tokenizer):
    members = pair("a", 'A "Cat" (here)!') + [("b.png", image("blue")), ("b.json", RECORD)]
    write(tmp_path / "shards" / "a.tar", members)
    basic = {"data_path": str(tmp_path / "shards"), "caption_processor": "blip_caption"}
    dataset = build(basic_parameters=basic)
    texts = [tokenizer.decode([label for label in dataset[n].labels if label != -100]).strip() for n in (0, 1)]
    assert texts == ["a cat here", "Red."]  # a conversation stays as it is


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (pair("a")[:1], r"record 0 \(a\) has 1 images and 0 texts"),
        ([*pair("a"), ("a.caption", b"x")], "has 1 images and 2 texts.*such as 000001.jpg, 000001.txt"),
        ([*pair("a"), ("a.mp4", b"x")], r"record 0 \(a\) has a .mp4: videos and audio are not trained on"),
        ([pair("a")[0], ("a.json", b"{")], "the text cannot be read"),
        ([pair("a")[0], ("a.json", b"[]")], r"the .json is '\[\]'; expected an object"),
        ([pair("a")[0], ("a.json", b"{}")], 'the .json has no "conversations" and no "caption"; expected such as'),
        ([pair("a")[0], ("a.json", b'{"caption": 3}')], "caption is 3; expected a text"),
        ([pair("a")[0], ("a.json", b'{"conversations": []}')], r'"conversations" is \[\]; expected a list'),
        ([pair("a")[0], ("a.json", TEXT_ONLY)], '"conversations" holds 0 <image> placeholders; expected one, as in'),
        ([pair("a")[0], ("a.txt", b"\xff")], "the text cannot be read"),
        (
            [pair("a")[0], ("a.json", b'{"id": "\\ud800", "caption": "x"}')],
            "record 0: id holds half of a surrogate pair",
        ),
        ([*pair("a"), *pair("a")], "a.tar: a.jpg is there twice in one sample"),
        ([], "holds no samples"),
    ],
)
def test_damage(build, tmp_path, members, message):
    write(tmp_path / "shards" / "a.tar", members)
    with pytest.raises(DataError, match=message):
        build()


def test_metadata_beside_a_caption_is_ignored(build, tmp_path):
    """As img2dataset writes its shards."""
    write(tmp_path / "shards" / "a.tar", [*pair("0"), ("0.json", b'{"caption": "x", "url": "y"}'), *pair("1")])
    assert len(build()) == 2


def test_lengths_do_not_need_the_images(build, tmp_path, monkeypatch):
    write(tmp_path / "shards" / "a.tar", [*pair("0"), *pair("1")])
    monkeypatch.setattr(ImageMember, "read", lambda self: pytest.fail("an image was read"))
    assert build(overlong="drop").lengths.tolist()


def test_a_shard_that_became_shorter(build, tmp_path):
    write(tmp_path / "shards" / "a.tar", pair("0"))
    dataset = build()
    (tmp_path / "shards" / "a.tar").write_bytes(b"x" * 520)
    with pytest.raises(DataError, match="ends within a member; the file has changed"):
        dataset[0]
    with pytest.raises(OSError, match="ends within it; the file has changed"):
        ImageMember("x", tmp_path / "shards" / "a.tar", 500, 100).read()


def test_stored_shards_are_mapped(build, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "SMALL_BYTES", 0)
    for number in range(3):
        write(tmp_path / "shards" / f"{number}.tar", pair("0"))
    for _ in range(2):
        dataset = build(index_folder=str(tmp_path / "index"))
        assert len(dataset) == 3 and dataset[2].media


def test_no_tar(build, tmp_path):
    with pytest.raises(DataError, match="no tar files at"):
        build()
    (tmp_path / "shards" / "a.tar").write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match="expected an uncompressed tar file"):
        build()


def test_a_bad_image_in_a_shard(build, tmp_path):
    write(tmp_path / "shards" / "a.tar", [("a.jpg", b"no image"), ("a.txt", b"x")])
    with pytest.raises(DataError, match="a.tar: record 0: image .*a.tar: record 0: image cannot be decoded"):
        build()[0]
