"""The dataset kind `grounding`: JSONL with boxes through data.json, with file, line and field in messages."""

import json

import pytest
from PIL import Image

from mindspeed_mm.data.build import read_options
from mindspeed_mm.data.config import BasicParameters, DataConfig
from mindspeed_mm.data.datasets.grounding import DATASET
from mindspeed_mm.data.grounding.templates import QuestionTemplates
from mindspeed_mm.data.template import get_template
from mindspeed_mm.errors import ConfigError, DataError


def item(box, image="a.png", **target):
    return {
        "id": str(box),
        "image": image,
        "target": {"boxes": [box]} | target,
        "conversations": [
            {"from": "human", "value": "<image>\nWhere?"},
            {"from": "gpt", "value": "Answer: <boxes> .", "boxes_seq": [[0]]},
        ],
    }


def config(tmp_path, rows, grounding=None, **changes):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    basic = {"data_path": str(path), "data_folder": str(tmp_path)}
    basic |= {} if grounding is None else {"grounding": grounding}
    parameters = {
        "dataset_type": "grounding",
        "basic_parameters": basic,
        "preprocess_parameters": {"train_pipeline": {"pad2square": True}},
        "index_folder": str(tmp_path / "index"),
    }
    return DataConfig.load({"dataset_param": parameters | changes})


def answers(tmp_path, rows, grounding=None, **changes):
    loaded = config(tmp_path, rows, grounding, **changes)
    source = DATASET(loaded.dataset_param.basic_parameters[0], read_options(loaded, get_template("v1")))
    return [source[number].turns[1].text for number in range(len(source))]


def test_boxes_are_written_as_the_model_sees_the_image(tmp_path):
    rows = [item([0, 0, 100, 100]), item([50, 25, 100, 100])]
    assert answers(tmp_path, rows) == ["Answer: [0.000,0.250,0.500,0.750] .", "Answer: [0.250,0.375,0.500,0.750] ."]
    # CLIP's crop of an image that is not padded: the left half of the box is cut off.
    cropped = {"preprocess_parameters": {"train_pipeline": {"pad2square": False}}}
    assert answers(tmp_path, rows[:1], **cropped) == ["Answer: [0.000,0.000,0.500,1.000] ."]
    assert answers(tmp_path, rows[:1], {"notation": "minigpt_v2"}) == ["Answer: {<0><25><50><75>} ."]
    assert answers(tmp_path, rows[:1], {"notation": "round", "precision": 1}) == ["Answer: (0.0,0.2,0.5,0.8) ."]


def test_given_sizes_and_fractions(tmp_path):
    absent = item([0, 0, 100, 100], "absent.png", width=100, height=100)
    assert answers(tmp_path, [absent]) == ["Answer: [0.000,0.000,1.000,1.000] ."]
    normalised = [item([0, 0, 0.5, 1])]
    assert answers(tmp_path, normalised, {"normalised": True}) == ["Answer: [0.000,0.250,0.500,0.750] ."]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (item([0, 0, 201, 100]), r"items.jsonl.*line 2: target.boxes\[0\] is .* outside of the image of 200 x 100"),
        (item([0, 0, 0.5, 1]), r'line 2: target.boxes\[0\] is .*"normalised": true'),
        (item([9, 0, 5, 1]), r"line 2: target.boxes\[0\] .* lies before its left or top"),
        (item([0, 0, 9, 9], "none.png"), r"line 2: .*none.png is missing"),
    ],
)
def test_messages_name_file_line_and_field(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        answers(tmp_path, [item([0, 0, 9, 9]), row])


def test_settings_that_do_not_fit(tmp_path):
    with pytest.raises(ConfigError, match="'square', 'round'"):
        config(tmp_path, [], {"notation": "curly"})
    with pytest.raises(ConfigError, match="precision is of brackets"):
        config(tmp_path, [], {"notation": "internvl", "precision": 2})
    with pytest.raises(ConfigError, match='has "grounding", which only the dataset_type "grounding" or "rec" or'):
        config(tmp_path, [], {"notation": "round"}, dataset_type="llava")
    assert BasicParameters(data_path="a").grounding is None


def test_question_templates(tmp_path):
    file = tmp_path / "questions.json"
    file.write_text(json.dumps([f"{n} <expr> {{x}} <image>" for n in range(5)]))
    read = QuestionTemplates.read(None, file, ("<expr>", "<image>"), 4)
    chosen = [read.chosen(str(n), seed=1) for n in range(40)]
    assert set(chosen) == set(read.texts) and len(read.texts) == 4
    assert chosen == [read.chosen(str(n), seed=1) for n in range(40)] != [read.chosen(str(n)) for n in range(40)]
    assert read.chosen("7", fixed=True) == read.texts[0]
    values = {"<expr>": "the <image>", "<image>": "HERE"}
    assert read.filled(read.texts[0], values) == "0 the <image> {x} HERE"


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("[]", {}, "there is no question template"),
        ('["<expr> <expr>"]', {}, r"holds 2 <expr>; expected exactly one"),
        ('["a"]', {"most": 0}, "found max_dynamic_size 0"),
        ('["a"]', {"text": "a <expr>"}, "give exactly one"),
        ("{", {}, "is not JSON"),
        ('"a"', {}, "expected a JSON list of texts"),
        (None, {}, "cannot read template_file"),
    ],
)
def test_question_templates_that_are_none(tmp_path, content, arguments, message):
    file = tmp_path / "questions.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        QuestionTemplates.read(arguments.get("text"), file, ("<expr>",), arguments.get("most"))
