"""Otter's instructions with their images and examples."""

import base64
import io
import json
import pickle

import numpy as np
import pyarrow as arrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from mindspeed_mm import registry
from mindspeed_mm.cli.main import main
from mindspeed_mm.data.datasets._files import ReadOptions
from mindspeed_mm.data.datasets.mimic_it import cleaned, drawn_numbers
from mindspeed_mm.data.image import ImageError, ImageProcessor, load_image
from mindspeed_mm.data.index import Index
from mindspeed_mm.data.json_members import JsonMembers
from mindspeed_mm.data.media import FramedImages
from mindspeed_mm.data.set_config import DATASETS, BasicParameters
from mindspeed_mm.data.template import get_template
from mindspeed_mm.errors import ConfigError, DataError
from tests.helpers.media import dataset_of


def encoded(width, colour="red"):
    data = io.BytesIO()
    Image.new("RGB", (width, 3), colour).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


IMAGES = {f"IMG_{number}": encoded(4 + number) for number in range(5)}
RECORDS = {
    f"LA_{number}": {
        "instruction": f"What is IN  the pic-ture {number}?",
        "answer": f"A/B cat {number}.",
        "image_ids": [f"IMG_{number}"],
        "rel_ins_ids": [f"LA_{other}" for other in range(4) if other != number],
    }
    for number in range(4)
}
RECORDS["LA_3"]["image_ids"] = ["IMG_3", "IMG_4"]


@pytest.fixture
def read(tmp_path):
    """read(records=RECORDS, images=IMAGES, **mimic_it) -> source"""

    def make(records=None, images=IMAGES, seed=None, options=None, **chosen):
        content = {"meta": {"version": "0.0.1"}, "data": RECORDS if records is None else records}
        path = tmp_path / "LA_instructions.json"
        path.write_text(records if isinstance(records, str) else json.dumps(content, indent=1))
        if isinstance(images, dict):
            (tmp_path / "LA.json").write_text(json.dumps(images))
            images = tmp_path / "LA.json"
        given = chosen | ({} if images is None else {"images": str(images)})
        parameters = BasicParameters(data_path=str(path), sampling_seed=seed, mimic_it=given)
        kind = registry.find(DATASETS, "mimic_it", "DATASET", what="dataset_type")
        return kind(parameters, options or ReadOptions(get_template("v1"), None))

    return make


def test_a_record_alone(read):
    source = read()
    assert len(source) == 4 and source.facts[:, 1].tolist() == [1, 1, 1, 2]
    sample = source[3]
    assert sample.id == "LA_3" and [turn.role for turn in sample.turns] == ["human", "gpt"]
    assert (
        sample.turns[0].text == "<image>\n<image>\nwhat is in the pic ture 3?" and sample.turns[1].text == "a b cat 3."
    )
    assert [load_image(image).size for image in sample.images] == [(7, 3), (8, 3)]
    assert read(clean_text=False)[0].turns[0].text == "<image>\nWhat is IN  the pic-ture 0?"
    assert cleaned("*.What's THIS -/  a b\n\nc? ") == "what's this a b c?"


def test_examples_stand_before_it(read):
    sample = read(in_context=True)[1]
    assert [turn.text.split()[-1] for turn in sample.turns[::2]] == ["0?", "2?", "3?", "1?"]
    assert [turn.role for turn in sample.turns] == ["human", "gpt"] * 4 and all(turn.learned for turn in sample.turns)
    assert [load_image(image).width for image in sample.images] == [4, 6, 7, 8, 5]
    drawn = [read(in_context=True, shots=2, seed=seed) for seed in (1, 1, 2)]
    turns = [[source[number].turns for number in range(4)] for source in drawn]
    assert turns[0] == turns[1] != turns[2]
    assert all(len(own) == 6 for own in turns[0])
    assert read(in_context=True, shots=3)[0].turns == read(in_context=True)[0].turns


def test_frames_of_a_video(read):
    """One <image> for all images of a record; of more than are wanted the first, the last and some between."""
    images = {f"IMG_{number}": encoded(4 + number) for number in range(9)}
    record = RECORDS["LA_0"] | {"image_ids": list(images), "rel_ins_ids": []}
    sample = read({"a": record, "b": RECORDS["LA_1"] | {"rel_ins_ids": []}}, images, frames=4)[0]
    assert sample.turns[0].text.count("<image>") == len(sample.images) == 1
    assert [load_image(frame).width for frame in sample.files] == [4, 6, 9, 12]
    processor = ImageProcessor.from_config({"size": {"shortest_edge": 28}, "crop_size": 28})
    media = FramedImages(processor, 1, max_frames=4, fast_resize=False)
    item, alone = media.item(sample.images[0]), media.item(sample.files[1])
    assert item.rows == (4,) and item.grid.tolist() == [[4, 1, 1]] and torch.equal(item.pixels[1:2], alone.pixels)
    with pytest.raises(ImageError, match="found a video of 4 frames .IMG_0 of .*; the model has embeddings for 3"):
        FramedImages(processor, 1, max_frames=3, fast_resize=False).item(sample.images[0])
    assert read({"a": record}, images)[0].turns[0].text.count("<image>") == 9


def test_groups_of_otters_yaml(read, tmp_path):
    """TEXT_ONLY has no images, num_samples draws or repeats, train_config lists records and examples."""
    plain = {"a": {"instruction": "Hi", "answer": "Hello", "image_ids": [], "rel_ins_ids": []}}
    assert read(plain, images=None)[0].images == ()
    some, same, more = read(num_samples=2, seed=3), read(num_samples=2, seed=3), read(num_samples=6, seed=3)
    names = [[source[number].id for number in range(len(source))] for source in (some, same, more)]
    assert names[0] == names[1] and len(set(names[0])) == 2
    assert names[2] == ["LA_0", "LA_1", "LA_2", "LA_3", *(f"{name}#1" for name in names[0])]
    assert np.bincount(drawn_numbers(3, 11, 0)).tolist() in ([4, 4, 3], [4, 3, 4], [3, 4, 4])
    again = read(num_samples=40, in_context=True, shots=1)
    assert len({again[4 * turn].turns[0].text for turn in range(10)}) > 1, "each round draws examples of its own"
    config = tmp_path / "train.json"
    config.write_text(json.dumps({"LA_2": ["LA_0"], "LA_1": []}))
    listed = read(train_config=str(config), in_context=True)
    assert [listed[number].id for number in range(2)] == ["LA_2", "LA_1"]
    assert [len(listed[number].turns) for number in range(2)] == [4, 2]
    config.write_text(json.dumps({"LA_9": []}))
    with pytest.raises(DataError, match=r'train.json: record 0: the id "LA_9" is not in "data" of .*LA_instructions'):
        read(train_config=str(config))


@pytest.mark.parametrize("index_name", [None, "image_id"])
def test_images_in_parquet(read, tmp_path, index_name):
    name = index_name or "__index_level_0__"
    path = tmp_path / "LA.parquet"
    parquet.write_table(arrow.table({"base64": list(IMAGES.values()), name: list(IMAGES)}), path)
    source = read(images=path)
    assert [load_image(image).width for image in source[3].images] == [7, 8]
    with pytest.raises(DataError, match="names 'IMG_9', which is not in .*LA.parquet"):
        read({"a": RECORDS["LA_0"] | {"image_ids": ["IMG_9"]}}, images=path)
    parquet.write_table(arrow.table({"base64": ["x", "y"], name: ["a", "a"]}), path)
    with pytest.raises(DataError, match="has the id a in rows 0 and 1; expected each once"):
        read(images=path)
    parquet.write_table(arrow.table({"image": ["x"], name: ["a"]}), path)
    with pytest.raises(DataError, match=f"has the columns image, {name}; expected base64 and one of ids"):
        read(images=path)


def test_it_becomes_tokens_and_can_be_sent_to_workers(read, tmp_path, make_config, tokenizer):
    source = pickle.loads(pickle.dumps(read(in_context=True)))
    assert load_image(source[0].images[0]).width == 5
    own = {"images": str(tmp_path / "LA.json"), "in_context": True, "shots": 1}
    sets = [{"data_path": str(tmp_path / "LA_instructions.json"), "mimic_it": own}]
    config = make_config([], dataset_type="mimic_it", basic_parameters=sets)
    encoded_sample = dataset_of(config, tokenizer, 4, 200)[0]
    shown = len(read(in_context=True, shots=1)[0].images)
    assert len(encoded_sample.media) == shown >= 2 and encoded_sample.input_ids.count(-200) == 4 * shown
    assert any(label != -100 for label in encoded_sample.labels)
    sets[0]["dataset_type"] = "llava"
    with pytest.raises(ConfigError, match='has "mimic_it", which only the dataset_type "mimic_it" reads'):
        make_config([], dataset_type="mimic_it", basic_parameters=sets)


def test_check_data_finds_all_broken_records_and_images(read, tmp_path, golden, make_config):
    read(images=IMAGES | {"IMG_2": "no base64!", "IMG_3": encoded(9)})
    broken = {"a": RECORDS["LA_0"] | {"rel_ins_ids": ["LA_9"]}, "b": RECORDS["LA_1"] | {"image_ids": ["IMG_9"]}}
    content = {"data": RECORDS | broken}
    (tmp_path / "LA_instructions.json").write_text(json.dumps(content))
    own = {"images": str(tmp_path / "LA.json"), "in_context": True}
    sets = [{"data_path": str(tmp_path / "LA_instructions.json"), "mimic_it": own}]
    config = make_config([], dataset_type="mimic_it", basic_parameters=sets).model_dump(mode="json", exclude_none=True)
    config["dataset_param"]["tokenizer_config"] = {"from_pretrained": str(golden / "tokenizer")}
    (tmp_path / "data.json").write_text(json.dumps(config))
    line = ["check-data", "--mm-data", str(tmp_path / "data.json"), "--seq-length", "400", "--workers", "1"]
    assert main([*line, "--tokens-per-image", "4", "--report", str(tmp_path / "report.json")]) == 1
    told = (tmp_path / "report.json").read_text()
    assert "LA_9" in told and "IMG_9" in told and "no base64" in told


def test_large_files_are_indexed_once_and_mapped(tmp_path, monkeypatch):
    """Blocks of a few bytes: each member is cut somewhere; keys and values hold whatever JSON allows."""
    monkeypatch.setattr("mindspeed_mm.data.record_starts.BLOCK_BYTES", 7)
    monkeypatch.setattr("mindspeed_mm.data.index.SMALL_BYTES", 1)
    members = {f'k"{number}\u00e9, }}': [number, {"}": '{"]'}, "x" * number] for number in range(40)}
    path = tmp_path / "m.json"
    path.write_bytes(b"\xef\xbb\xbf " + json.dumps({"meta": {"data": 1}, "data": members}, ensure_ascii=False).encode())
    found = JsonMembers(path, index=Index(path, tmp_path / "i"), inside="data")
    assert len(found) == 40 and len(list((tmp_path / "i").glob("*.members"))) == 1
    for number, (key, value) in enumerate(members.items()):
        assert (found.key(number), found.value(number), found.find(key)) == (key, value, number)
    assert found.find("nothing") is None
    monkeypatch.setattr("mindspeed_mm.data.json_members.object_members", None)
    assert JsonMembers(path, index=Index(path, tmp_path / "i"), inside="data").find(key) == 39


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ('{"meta": {}, "data": {}}', '"data" of .*instructions.json holds nothing; expected members by id'),
        ('{"meta": {}}', 'cannot be parsed: it has no member "data". Expected a JSON object by id'),
        ("[1]", "expected an object at byte 0, found '\\['"),
        ('{"data": {"a": 1 "b": 2}}', "expected a comma or the object's end at byte 17, found '\"'"),
        ('{"data": {"a": 1,}}', "expected a key in quotes at byte 17, found '}'"),
        ('{"data": {"a" 1}}', "expected a colon behind the key at byte 14, found '1'"),
        ('{"data": {"a": {"instruction": "x}}', "a: not JSON at byte"),
        ('{"data": {"a": 1, "a": 2}}', 'has the key "a" twice \\(bytes 10 and 18\\)'),
    ],
)
def test_damaged_files(read, records, message):
    with pytest.raises(DataError, match=message):
        read(records)


def changed(**values):
    return {"LA_0": RECORDS["LA_0"] | {"rel_ins_ids": []}, "x": RECORDS["LA_1"] | {"rel_ins_ids": ["LA_0"]} | values}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_ids": ["no"]}, '"image_ids" of "x" names \'no\', which is not in .*LA.json; expected its base64'),
        ({"image_ids": "IMG_1"}, '"image_ids" of "x" is \'IMG_1\'; expected a list of ids'),
        ({"image_ids": ["IMG_1"] * 257}, '"image_ids" of "x" holds 257 ids; at most 256 are read'),
        ({"rel_ins_ids": ["no"]}, 'record 1 \\(id x\\): the id "no" is not in "data" of'),
        ({"rel_ins_ids": "LA_0"}, "its examples are 'LA_0'; expected a list of ids"),
        ({"rel_ins_ids": ["LA_0"] * 65}, "it has 65 examples; at most 64 are read"),
        ({"rel_ins_ids": ["x"]}, "it is its own example, which would show the answer"),
        ({"answer": 3}, 'instructions.json: record 1 .*line 14: "answer" of "x" is 3; expected a text'),
        ({"image": "a.png"}, '"x".\'image\' is not read here: a record names images by "image_ids"'),
        ({"image_ids": None, "image_id": "IMG_1"}, None),
        ({"answers": "x"}, '"x".\'answers\' is no key of a record; did you mean "answer"'),
    ],
)
def test_broken_records(read, values, message):
    if message is None:  # Case: "image_id" passed as a harmless key, and the image was gone
        message, records = 'did you mean "image_ids"', changed(**values)
        del records["x"]["image_ids"]
    else:
        records = changed(**values)
    with pytest.raises(DataError, match=message):
        read(records, in_context=True)


def test_other_bad_input(read, tmp_path):
    with pytest.raises(DataError, match="\"LA_0\" is 'text'; expected a record such as"):
        read({"LA_0": "text"})
    with pytest.raises(DataError, match="names 'IMG_0', but the set has no images; give .images. in .mimic_it."):
        read(images=None)
    for name in ("LA.pkl", "LA.pt"):
        with pytest.raises(DataError, match=f"{name} may be a pickle, which can run code .* expected JSON or parquet"):
            read(images=tmp_path / name)
    with pytest.raises(DataError, match="cannot read .*no.json: No such file"):
        read(images=tmp_path / "no.json")
    for key, value, message in (
        ("num_samples", 0, "found 0, expected -1 for all records, or a number of them from 1"),
        ("shots", 2, '"shots" is given without "in_context": true'),
    ):
        with pytest.raises(ValueError, match=message):
            read(**{key: value})
    (tmp_path / "raw.json").write_bytes(b'{"data": {"a": {"instruction": "\xff", "answer": ""}}}')
    with pytest.raises(DataError, match="bytes 15 to 49: no text in UTF-8, or changed since it was indexed"):
        JsonMembers(tmp_path / "raw.json", inside="data").value(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not base64!", "IMG_0 of .*LA.json cannot be decoded .its text is no base64"),
        (5, "its value is 5, no base64 in quotes"),
        ("", "IMG_0 of .*LA.json is empty .0 bytes."),
        (base64.b64encode(b"no image").decode(), "cannot be decoded .its bytes begin as no known format"),
    ],
)
def test_broken_images(read, text, message):
    with pytest.raises(ImageError, match=message):
        load_image(read(images=IMAGES | {"IMG_0": text})[0].images[0])


def test_an_image_that_is_too_large(read, monkeypatch):
    monkeypatch.setattr("mindspeed_mm.data.image_texts.MAX_BASE64", 8)
    with pytest.raises(ImageError, match="its base64 has [0-9]+ characters, at most 8 are read"):
        load_image(read()[0].images[0])
