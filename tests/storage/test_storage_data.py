"""Data files and images behind `s3://`: training's loader, evaluate and infer, and what is missing there."""

import io
import json
import tarfile

import pytest
from PIL import Image

from mindspeed_mm import registry
from mindspeed_mm.data.build import build_loader, read_options
from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.data.presence import look_for_images
from mindspeed_mm.data.set_config import DATASETS
from mindspeed_mm.data.storage import service
from mindspeed_mm.data.template import get_template
from mindspeed_mm.errors import ConfigError, DataError
from tests.helpers.media import dataset_of

COLOURS = ("red", "green", "blue")


def png(colour, size=(20, 10)):
    content = io.BytesIO()
    Image.new("RGB", size, colour).save(content, format="PNG")
    return content.getvalue()


def record(number, image):
    turns = [{"from": "human", "value": f"<image>\nWhat is {number}?"}, {"from": "gpt", "value": f"It is {number}."}]
    return {"id": f"r{number}", "image": image, "conversations": turns}


def config_of(path="s3://data/sets/train.jsonl", folder="s3://data/images/", **changes):
    basic = {"data_path": path, "data_folder": folder} | changes.pop("basic", {})
    pipeline = {"size": {"shortest_edge": 28}, "crop_size": 28, "pad2square": True}
    parameters = {
        "dataset_type": "multimodal",
        "basic_parameters": basic,
        "preprocess_parameters": {"train_pipeline": pipeline},
        "template_name": "v1",
    }
    return DataConfig.load({"dataset_param": parameters | changes})


@pytest.fixture
def filled(store):
    """The store with three records and their images."""
    rows = [record(number, f"{colour}.png") for number, colour in enumerate(COLOURS)]
    store.put("s3://data/sets/train.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    for colour in COLOURS:
        store.put(f"s3://data/images/{colour}.png", png(colour))
    return store


def built(config, tokenizer):
    return dataset_of(config, tokenizer, 4, 256)


def test_workers_read_a_set_and_its_images_from_the_store(filled, tokenizer, storage_cache):
    dataset = built(config_of(), tokenizer)
    assert look_for_images(dataset).missing == 0
    options = {"consumed_samples": 0, "micro_batch_size": 3, "dp_rank": 0, "dp_size": 1, "seed": 1, "pad_token_id": 0}
    batches = [build_loader(dataset, num_workers=workers, **options) for workers in (0, 2)]
    own, of_workers = (next(iter(loader)) for loader in batches)
    assert sorted(own.sample_ids) == ["r0", "r1", "r2"] and own.sample_ids == of_workers.sample_ids
    assert own.media.pixels.equal(of_workers.media.pixels)
    assert len(list((storage_cache / "images").glob("*/*"))) == 3
    for loader in batches:
        loader.close()


def test_messages_name_the_address(filled, tokenizer):
    filled.put("s3://data/sets/bad.jsonl", b'{"id": "a", "image": "red.png", "conversations": 3}\n')
    with pytest.raises(DataError, match=r"s3://data/sets/bad.jsonl: record 0 \(id a\)"):
        built(config_of("s3://data/sets/bad.jsonl"), tokenizer)
    with pytest.raises(DataError, match="cannot read the data file s3://data/sets/no.jsonl: there is no such object"):
        built(config_of("s3://data/sets/no.jsonl"), tokenizer)
    with pytest.raises(ConfigError, match=r"found the address 's3:///train.jsonl'; expected s3://bucket/folder/file"):
        built(config_of("s3:///train.jsonl"), tokenizer)


@pytest.mark.parametrize("name", ["../sets/train.jsonl", "s3://other/red.png", "/red.png", "a/../../x.png"])
def test_an_image_stays_in_its_folder(filled, tokenizer, name):
    filled.put("s3://data/sets/out.jsonl", json.dumps(record(0, name)).encode())
    with pytest.raises(DataError, match=r"record 0 .*which lies outside data_folder 's3://data/images/'"):
        built(config_of("s3://data/sets/out.jsonl"), tokenizer)


def test_a_whole_address_below_the_folder_is_taken(filled, tokenizer):
    filled.put("s3://data/sets/whole.jsonl", json.dumps(record(0, "s3://data/images/red.png")).encode())
    assert built(config_of("s3://data/sets/whole.jsonl"), tokenizer)[0].media


def test_a_missing_image_follows_the_policy(filled, tokenizer):
    rows = [record(0, "none.png"), record(1, "red.png")]
    filled.put("s3://data/sets/two.jsonl", "\n".join(map(json.dumps, rows)).encode())
    with pytest.raises(DataError, match="record 0 .*image s3://data/images/none.png is missing"):
        built(config_of("s3://data/sets/two.jsonl"), tokenizer)[0]
    skipping = built(config_of("s3://data/sets/two.jsonl", image_error="skip"), tokenizer)
    assert skipping[0].sample_id == "r1" and "none.png is missing" in skipping[0].skipped[0]
    assert look_for_images(skipping).missing == 1


def test_an_image_that_the_store_refuses_names_its_record(filled, tokenizer, monkeypatch):
    dataset = built(config_of(image_error="skip"), tokenizer)

    def refuse(address):
        raise DataError(f"{address} may not be read: the store refuses the keys of the environment")

    monkeypatch.setattr(service, "content_of", refuse)
    with pytest.raises(
        DataError, match=r'train.jsonl: record 1 \(id r1\): "image": s3://data/images/green.png may not'
    ):
        dataset[1]


def test_a_changed_data_file_is_fetched_again(filled, tokenizer):
    assert len(built(config_of(), tokenizer)) == 3
    filled.put("s3://data/sets/train.jsonl", json.dumps(record(0, "red.png")).encode())
    assert len(built(config_of(), tokenizer)) == 1


def test_boxes_need_the_size_of_an_image_in_the_store(filled):
    turns = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "<boxes>", "boxes_seq": [[0]]}]
    item = {"image": "red.png", "target": {"boxes": [[0, 0, 10, 10]]}, "conversations": turns}
    filled.put("s3://data/sets/items.jsonl", json.dumps(item).encode())
    filled.put("s3://data/sets/questions.json", json.dumps(["Where is <expr> in <image>?"]).encode())
    rec = {"img_path": "red.png", "expression": "it", "bbox": [0, 0, 10, 10]}
    filled.put("s3://data/sets/rec.jsonl", json.dumps(rec).encode())
    for kind, name, more in (
        ("grounding", "items", {}),
        ("rec", "rec", {"grounding": {"template_file": "s3://data/sets/questions.json"}}),
    ):
        config = config_of(f"s3://data/sets/{name}.jsonl", dataset_type=kind, basic=more)
        reader = registry.find(DATASETS, kind, "DATASET", what="dataset_type")
        sample = reader(config.dataset_param.basic_parameters[0], read_options(config, get_template("v1")))[0]
        assert "[0.000,0.250,0.500,0.750]" in sample.turns[1].text
    assert sample.turns[0].text == "Where is it in <image>?"


def test_tar_shards_of_the_store(store, tokenizer):
    for number, colour in enumerate(COLOURS[:2]):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as archive:
            for name, part in ((f"{number}.png", png(colour)), (f"{number}.txt", f"a {colour} field".encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(part)
                archive.addfile(entry, io.BytesIO(part))
        store.put(f"s3://data/shards/0000{number}.tar", content.getvalue())
    for path in ("s3://data/shards", "s3://data/shards/*.tar"):
        dataset = built(config_of(path, dataset_type="tar", template_name="plain"), tokenizer)
        assert len(dataset) == 2 and dataset[1].media
    with pytest.raises(DataError, match="no tar files at s3://data/none"):
        built(config_of("s3://data/none", dataset_type="tar", template_name="plain"), tokenizer)


def test_questions_and_images_of_a_benchmark(store):
    from evaluation.questions import read_questions

    rows = [{"img_path": f"{colour}.png", "expression": colour, "bbox": [0, 0, 9, 9]} for colour in COLOURS]
    store.put("s3://data/rec/REC.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    store.put("s3://data/rec/red.png", png("red"))
    store.put("s3://data/images/green.png", png("green", (5, 4)))
    table = read_questions("s3://data/rec/REC.jsonl")
    assert table.images(table.rows[0])[0].size == (20, 10) and table.path.name == "REC.jsonl"
    elsewhere = read_questions("s3://data/rec/REC.jsonl", image_root="s3://data/images")
    assert elsewhere.images(elsewhere.rows[1])[0].size == (5, 4) and elsewhere.image_sizes() is None
    with pytest.raises(DataError, match=r"REC.jsonl, row with index 2: image file s3://data/rec/blue.png: there is no"):
        table.images(table.rows[2])
    store.put("s3://data/rec/out.tsv", b"index\tquestion\timage_path\n1\twhat\t../red.png\n")
    with pytest.raises(DataError, match=r"image file ../red.png lies outside s3://data/rec"):
        read_questions("s3://data/rec/out.tsv")


def test_requests_and_images_of_infer(filled):
    from mindspeed_mm.generation.images import ImageError, _read
    from mindspeed_mm.inference.request_file import read_requests

    filled.put("s3://data/images/requests.jsonl", b'{"prompt": "What?", "image": "red.png"}\n')
    (line,) = read_requests("s3://data/images/requests.jsonl").values()
    assert line.digest("s3://data/images") and _read("s3://data/images/red.png").data == png("red")
    with pytest.raises(ImageError, match="image s3://data/images/no.png: there is no such object"):
        _read("s3://data/images/no.png")


def test_a_cache_without_a_limit_of_images_still_reads(filled, tokenizer, monkeypatch, storage_cache):
    monkeypatch.setenv("MINDSPEED_MM_STORAGE_CACHE_GB", "0.0000007")  # the JSON lines fit, images beside them do not
    dataset = built(config_of(), tokenizer)
    assert [dataset[number].sample_id for number in range(3)] == ["r0", "r1", "r2"]
    assert sum(path.stat().st_size for path in storage_cache.glob("[if]*/*/*")) <= 700
