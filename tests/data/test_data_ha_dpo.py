"""HA-DPO's files joined with Visual Genome's image list."""

import json

import pytest

from mindspeed_mm import registry
from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.data.datasets._files import ReadOptions
from mindspeed_mm.data.datasets.ha_dpo import QUESTIONS
from mindspeed_mm.data.set_config import DATASETS, BasicParameters
from mindspeed_mm.data.template import get_template
from mindspeed_mm.errors import ConfigError, DataError
from tests.helpers.media import dataset_of

URL = "https://cs.example.org/rak248/{}/{}.jpg"
IMAGES = [
    {"image_id": 1, "url": URL.format("VG_100K_2", 1), "width": 20, "height": 10},
    {"image_id": 2, "url": URL.format("VG_100K", 2), "width": 20, "height": 10},
]
GOOD = ["A dog.", "A brown dog.", "One dog."]
BAD = ["A dog and a cat.", "A cat."]
POPE = {"image_id": 2, "question": "Is there a cat?", "answer": "yes", "chosen": "No.", "reject": "Yes."}


@pytest.fixture
def read(tmp_path):
    """read(content, images=IMAGES, **keys) -> source"""

    def make(content, images=IMAGES, **keys):
        (tmp_path / "image_data.json").write_text(json.dumps(images))
        path = tmp_path / "desc_data.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        parameters = BasicParameters(data_path=str(path), data_folder=str(tmp_path), **keys)
        kind = registry.find(DATASETS, "ha_dpo", "DATASET", what="dataset_type")
        return kind(parameters, ReadOptions(get_template("v1"), None))

    return make


def test_descriptions_in_both_forms(read, tmp_path):
    by_image = read({"1": {"chosen": GOOD, "rejected": BAD}, "2": {"chosen": GOOD, "rejected": BAD}})
    listed = read([{"image_id": number, "chosen": GOOD, "rejected": BAD} for number in (2, 1)])
    assert by_image.pairs and len(by_image) == len(listed) == 2
    for number in (0, 1):
        ours, theirs = by_image[number], listed[1 - number]
        assert (ours.turns, ours.rejected, ours.images, ours.id) == (
            *(theirs.turns, theirs.rejected, theirs.images, theirs.id),
        )
    sample = by_image[0]
    assert sample.images == (f"{tmp_path}/VG_100K_2/1.jpg",)
    assert sample.turns[0].text.removeprefix("<image>\n") in QUESTIONS
    assert sample.turns[1].text in GOOD and sample.rejected[1].text in BAD
    assert sample.turns[0] == sample.rejected[0]


def test_draws_follow_the_seed(read):
    content = {str(number): {"chosen": GOOD, "rejected": BAD} for number in range(20)}
    images = [{"image_id": number, "url": URL.format("VG_100K", number)} for number in range(20)]

    def drawn(**keys):
        source = read(content, images, **keys)
        return [(source[n].turns[0].text, source[n].turns[1].text, source[n].rejected[1].text) for n in range(20)]

    assert drawn() == drawn(sampling_seed=42) != drawn(sampling_seed=43)
    assert len(set(drawn())) > 5


def test_questions(read, caplog):
    rows = [POPE, POPE | {"correct": True}, {**POPE, "rejected": POPE["reject"], "correct": False}]
    del rows[2]["reject"]
    with caplog.at_level("INFO"):
        source = read(rows)
    assert len(source) == 2 and '1 of 3 rows are "correct" and left out' in caplog.text
    assert source[0].turns[0].text == "<image>\nIs there a cat?"
    assert (source[0].id, source[1].id) == ("2-0", "2-2") and "record 2" in source[1].where
    assert source[0].rejected == source[1].rejected and source[0].images[0].endswith("VG_100K/2.jpg")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"3": {"chosen": GOOD, "rejected": BAD}}, "record 0: image_id 3 is not in .*image_data.json; expected Visual"),
        ([{"chosen": GOOD, "rejected": BAD}], "record 0: is .*; expected an object with an image_id"),
        ({"1": {"chosen": [], "rejected": BAD}}, r'record 0: "chosen" is \[\]; expected a list of descriptions'),
        ({"1": {"chosen": GOOD}}, 'record 0: "rejected" is None; expected a list'),
        ({"1": {"chosen": ["A."], "rejected": ["A."]}}, "there is nothing to prefer"),
        ([POPE | {"video": "x.mp4"}], "\"?'?video.* is not read here"),
        ([POPE | {"chosen": " "}], '"chosen" is empty'),
        ([POPE | {"correct": True}], "holds no records to learn from"),
        ("3", "holds 3; expected a list of rows"),
        ("{", "is not JSON"),
    ],
)
def test_broken_files(read, content, words):
    with pytest.raises(DataError, match=words):
        read(content)


def test_broken_image_lists(read, tmp_path):
    content = {"1": {"chosen": GOOD, "rejected": BAD}}
    with pytest.raises(DataError, match="expected Visual Genome's list"):
        read(content, {"1": "x"})
    with pytest.raises(DataError, match='expected {"image_id": 1, "url"'):
        read(content, [{"image_id": 1}])
    with pytest.raises(DataError, match="cannot read .*nowhere.json: No such file.*image_data"):
        read(content, image_data=str(tmp_path / "nowhere.json"))


def test_a_mix_of_both_is_trained_on(make_config, tokenizer, image_folder, tmp_path):
    """HA-DPO's mix: the questions once, the descriptions twice."""
    (image_folder / "VG_100K").mkdir()
    (image_folder / "red.png").rename(image_folder / "VG_100K" / "2.jpg")
    (image_folder / "image_data.json").write_text(json.dumps(IMAGES))
    (tmp_path / "pope.json").write_text(json.dumps([POPE, POPE | {"question": "Is there a dog?"}]))
    (tmp_path / "desc.json").write_text(json.dumps({"2": {"chosen": GOOD, "rejected": BAD}}))
    sets = [
        {"data_path": str(tmp_path / name), "data_folder": str(image_folder), "repeat_time": times}
        for name, times in (("pope.json", 1), ("desc.json", 2))
    ]
    config = make_config([], dataset_type="ha_dpo", basic_parameters=sets)
    dataset = dataset_of(config, tokenizer, 4, 200, preferences=True)
    assert len(dataset) == 4
    assert dataset[2].input_ids == dataset[3].input_ids and dataset[0].branches and len(dataset[0].media) == 1
    sets[0]["dataset_type"], sets[0]["image_data"] = "preference", "x.json"
    with pytest.raises(ConfigError, match='has "image_data", which only the dataset_type "ha_dpo" reads'):
        DataConfig.load(config.model_dump(mode="json") | {"dataset_param": parameters(config, sets)})


def parameters(config, sets):
    return config.dataset_param.model_dump(mode="json", exclude_none=True) | {"basic_parameters": sets}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"corect": True}, 'did you mean "correct"'),  # the row would have been trained on
        ({"image": "VG_100K/2.jpg"}, "'image' is not read here: a row of ha_dpo names images by \"image_id\""),
        ({"promt": "Look."}, None),
        ({"video": "a.mp4"}, "videos and audio are not trained on"),
        ({"rejct": "No."}, 'did you mean "reject"'),
    ],
)
def test_letter_a_keys_of_rows(read, row, message):
    if message is None:
        assert read([POPE | row])[0].ignored == ("promt",)
        return
    with pytest.raises(DataError, match=message):
        read([POPE | row])
