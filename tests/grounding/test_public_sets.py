"""Public data sets with boxes: a small file in each one's own form, read through data.json to questions and answers."""

import json

import pytest
from PIL import Image

from mindspeed_mm import registry
from mindspeed_mm.data.build import read_options
from mindspeed_mm.data.config import DataConfig
from mindspeed_mm.data.grounding.entities import read_entities
from mindspeed_mm.data.grounding.parameters import KINDS
from mindspeed_mm.data.set_config import DATASETS
from mindspeed_mm.data.template import get_template
from mindspeed_mm.errors import ConfigError, DataError

BOX, BOX2 = [0, 0, 100, 100], [50, 25, 100, 100]
SEEN, SEEN2 = "[0.00,0.25,0.50,0.75]", "[0.25,0.38,0.50,0.75]"
"""BOX and BOX2 in the image of 200 x 100 pixels that is padded to a square."""
POINT, SEEN_POINT = [100, 50], "[0.50,0.50]"

REC = {"img_path": "7.jpg", "expression": "the {red} door", "bbox": BOX, "dataset_name": "refcoco"}
FLICKR = {
    "image_id": 7,
    "boxes": [BOX, BOX2],
    "sentence": "<ph_st>A man<ph_ed> holds <ph_st>two bags<ph_ed> on <ph_st>a day<ph_ed>.",
    "boxes_seq": [[0], [0, 1], []],
}
GQA = {
    "imageId": "7",
    "question": "Is the door red?",
    "answer": "yes",
    "fullAnswer": "Yes, the door is red.",
    "semanticStr": "select: door (11)->verify color: red [0]->exist (-)",
    "annotations": {"question": {"2": "11"}, "fullAnswer": {"1:3": "11", "4": "12"}},
    "cot": {"boxes": [BOX2], "value": "<ph_st>The door<ph_ed> is red.", "seq": [[0]]},
}
POINT_QA = {"file_path": "7.jpg", "question": "Which colour?", "point": POINT, "bbox": BOX, "answer": "red"}
TWICE = {"obj_question": "Doors?", "super_question": "Things?", "general_question": "These?"} | POINT_QA
del TWICE["question"]
V7W = {"file_path": "7.jpg", "question": "Which?", "candidates": [BOX2], "point": POINT, "answer": BOX}
GPT4GEN = {
    "img_path": "7.jpg",
    "boxes": [BOX, BOX2],
    "question": "Is the door<boxes> open?",
    "question_boxes_seq": [[1]],
    "cot_with_ans": "It<boxes> is ajar. So the answer is yes.",
    "answer_boxes_seq": [[0]],
    "answer": "yes",
}
VQA_E = {"file_path": "7.jpg", "question": "Red?", "explanation": ["The door is red", 0.9], "multiple_answers": "yes"}
VQA_X = {"file_path": "7.jpg", "question": "Red?", "justification": "It is.", "multiple_choice_answer": "yes"}
VQA = {"image_path": "7.jpg", "question": "Red?", "annotation": {"multiple_choice_answer": "yes"}}

WHERE, HERE, ASK = "<image>\nWhere is {}? Answer with its box.", "Answer: {} .", "<image>\n{}"
CAPTION = "<image>\nDescribe the image in one sentence, with the boxes of the things that you name."
NAMES = "<image>\nWrite a caption that names what is in {}."
PLAIN = "A man holds two bags on a day."


def gqa(version, question, answer):
    return "gqa", GQA, {"version": version}, ASK.format(question), f"{answer} The answer is yes.".strip()


CASES = [
    ("rec", REC, {}, WHERE.format("the {red} door"), HERE.format(SEEN)),
    ("rec", REC, {"template_string": "<expr>?<image>"}, "the {red} door?<image>", HERE.format(SEEN)),
    ("reg", REC, {}, f"<image>\nDescribe what is in {SEEN}, so that nothing else fits.", "the {red} door"),
    ("caption", {"img_path": "7.jpg", "caption": "A door."}, {"template_string": "<image>"}, "<image>", "A door."),
    ("flickr30k", FLICKR, {}, CAPTION, f"A man{SEEN} holds two bags{SEEN[:-1]};{SEEN2[1:]} on a day."),
    ("flickr30k_reverse", FLICKR, {"box_max_num": 1}, NAMES.format(SEEN) + " Use words alone.", PLAIN),
    gqa("q-a", "Is the door red?", ""),
    gqa("qb-a", f"Is the door{SEEN} red?", ""),
    gqa("q-l", "Is the door red?", "Yes, the door is red."),
    gqa("q-bl", "Is the door red?", f"Yes, the door{SEEN} is red{SEEN2}."),
    gqa("q-c", "Is the door red?", "The door is red."),
    gqa("q-bc", "Is the door red?", f"The door{SEEN2} is red."),
    gqa("q-s", "Is the door red?", "select: door->verify color: red [0]->exist."),
    gqa("qb-bs", f"Is the door{SEEN} red?", f"select: door {SEEN}->verify color: red [0]->exist."),
    ("vqa_v2", VQA, {}, ASK.format("Red?"), "The answer is yes."),
    ("vqa_v2", VQA | {"annotation": None}, {}, ASK.format("Red?"), "The answer is UNKNOWN."),
    ("vqa_e", VQA_E, {}, ASK.format("Red?"), "The door is red. So the answer is yes."),
    ("vqa_x", VQA_X, {}, ASK.format("Red?"), "It is. So the answer is yes."),
    ("pope", {"image": "7.jpg", "text": "A cat?", "label": "no"}, {}, ASK.format("A cat?"), "The answer is no ."),
    ("point_qa_local", POINT_QA, {}, ASK.format(f"Which colour? {SEEN_POINT}"), "The answer is red."),
    ("point_qa_local", POINT_QA, {"version": "b"}, ASK.format(f"Which colour? {SEEN}"), "The answer is red."),
    ("point_qa_twice", TWICE, {"version": "super-p"}, ASK.format(f"Things? {SEEN_POINT}"), "The answer is red."),
    ("gpt4gen", GPT4GEN, {}, ASK.format(f"Is the door{SEEN2} open?"), "The answer is yes."),
    (
        "gpt4gen",
        GPT4GEN,
        {"version": "c"},
        ASK.format(f"Is the door{SEEN2} open?"),
        "It is ajar. So the answer is yes.",
    ),
    (
        "gpt4gen",
        GPT4GEN,
        {"version": "bc"},
        ASK.format(f"Is the door{SEEN2} open?"),
        f"It{SEEN} is ajar. So the answer is yes.",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image, and GQA's scene graphs."""
    folder = tmp_path_factory.mktemp("sets")
    Image.new("RGB", (200, 100)).save(folder / "7.jpg")
    objects = {"11": {"x": 0, "y": 0, "w": 100, "h": 100}, "12": {"x": 50, "y": 25, "w": 50, "h": 75}}
    graphs = [{"image_id": "6", "objects": {}}, {"image_id": "7", "objects": objects}]
    (folder / "graphs.jsonl").write_text("".join(json.dumps(graph) + "\n" for graph in graphs))
    (folder / "wrong.json").write_text(json.dumps({"7": 0}))
    (folder / "list.json").write_text("[]")
    return folder


def records(folder, kind, rows, settings):
    """The source of some records."""
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    grounding = {"precision": 2} | settings
    if kind == "gqa":
        grounding = {"scene_graphs": str(folder / "graphs.jsonl")} | grounding
    basic = {"data_path": str(path), "data_folder": str(folder), "grounding": grounding}
    parameters = {
        "dataset_type": kind,
        "basic_parameters": basic,
        "preprocess_parameters": {"train_pipeline": {"pad2square": True}},
    }
    loaded = DataConfig.load({"dataset_param": parameters})
    make = registry.find(DATASETS, kind, "DATASET", what="dataset_type")
    return make(loaded.dataset_param.basic_parameters[0], read_options(loaded, get_template("v1")))


@pytest.mark.parametrize(("kind", "record", "settings", "question", "answer"), CASES)
def test_a_record_becomes_a_question_and_an_answer(folder, kind, record, settings, question, answer):
    sample = records(folder, kind, [record], settings)[0]
    assert [turn.text for turn in sample.turns] == [question, answer]
    assert sample.images == (str(folder / "7.jpg"),)


def test_every_kind_has_a_case():
    elsewhere = {"grounding", "v7w_point", "clevr", "vcr", "science_qa"}  # the last three: test_reasoned_sets.py
    assert {case[0] for case in CASES} | elsewhere == set(KINDS)
    assert set(KINDS) <= set(registry.available(DATASETS))


@pytest.mark.parametrize(("version", "answer"), [("b", SEEN), ("p", SEEN_POINT)])
def test_candidates_stand_in_an_order_by_chance(folder, version, answer):
    orders = set()
    for seed in range(8):
        sample = records(folder, "v7w_point", [V7W], {"version": version, "seed": seed})[0]
        question, text = (turn.text for turn in sample.turns)
        assert text == HERE.format(answer) and question.startswith(ASK.format("Which? Candidates: "))
        orders.add(question)
    assert len(orders) == 2 and all(SEEN in order and SEEN2 in order for order in orders)


def test_what_is_chosen_depends_on_record_and_seed_alone(folder, tmp_path):
    (tmp_path / "questions.json").write_text(json.dumps([f"<image> {number} <expr>" for number in range(9)]))
    file = {"template_file": str(tmp_path / "questions.json")}
    rows = [REC | {"expression": f"door {number}"} for number in range(20)]

    def asked(**more):
        return [sample.turns[0].text for sample in records(folder, "rec", rows, file | more)]

    def numbers(texts):
        return {text.split()[1] for text in texts}

    assert asked() == asked() != asked(seed=1)
    assert len(numbers(asked())) > 4
    assert numbers(asked(fixed_template=True)) == {"0"} and numbers(asked(max_dynamic_size=2)) == {"0", "1"}


def test_boxes_of_a_caption_and_its_question(folder):
    """All by chance: whichever phrase was picked, its box is in the question and, asked for, in the caption."""
    for seed in range(6):
        settings = {"box_max_num": 1, "caption_with_box": "question", "seed": seed}
        question, answer = (turn.text for turn in records(folder, "flickr30k_reverse", [FLICKR], settings)[0].turns)
        shown = question.split(" in ")[1].split(". Repeat")[0]
        assert shown in (SEEN, SEEN2) and answer.count(shown) == 1 and answer.replace(shown, "") == PLAIN
    question, answer = (
        turn.text for turn in records(folder, "flickr30k_reverse", [FLICKR], {"caption_with_box": "all"})[0].turns
    )
    assert answer.count(SEEN[:-1]) == 2 and "words" not in question


WRONG = [
    ("rec", REC | {"bbox": [0, 0, 300, 50]}, {}, "outside of the image of 200 x 100"),
    ("rec", REC | {"bbox": None}, {}, '"bbox" is None; expected 4 finite numbers'),
    ("rec", REC | {"expression": "a <boxes>"}, {}, '"expression" holds <boxes>, which stands for'),
    ("rec", REC | {"expression": 3}, {}, '"expression" is 3; expected a text'),
    ("rec", REC | {"expresion": "x"}, {}, 'did you mean "expression"'),
    ("flickr30k", FLICKR | {"boxes_seq": [[0]]}, {}, "it marks 3 phrases; expected a list with a list of numbers"),
    ("flickr30k", FLICKR | {"boxes_seq": [[0], [5], []]}, {}, "name 5, and there are 2 boxes"),
    ("flickr30k", FLICKR | {"sentence": "<ph_st>A man"}, {}, "which are not pairs around words"),
    ("flickr30k_reverse", FLICKR | {"boxes_seq": [[], [], []]}, {}, "no phrase with a box"),
    ("gqa", GQA | {"imageId": "9"}, {"version": "qb-a"}, "has no scene graph in"),
    (
        "gqa",
        GQA | {"annotations": {"question": {"2": "99"}}},
        {"version": "qb-a"},
        "names object 99, which the image's",
    ),
    ("gqa", GQA | {"annotations": {"question": {"7": "11"}}}, {"version": "qb-a"}, "names the words '7' of 4"),
    ("gqa", GQA | {"annotations": {"question": []}}, {"version": "qb-a"}, None),
    ("gqa", GQA | {"annotations": {"question": [1]}}, {"version": "qb-a"}, r"is \[1\]; expected an object"),
    ("vqa_e", VQA_E | {"explanation": []}, {}, '"explanation" does not begin with a text'),
    ("vqa_e", VQA_E | {"explanation": "x"}, {}, "\"explanation\" is 'x'; expected a list"),
    ("pope", {"image": "7.jpg", "text": "A cat?", "label": "maybe"}, {}, 'expected "yes" or "no"'),
    ("gpt4gen", GPT4GEN | {"question_boxes_seq": [[4]]}, {}, r"boxes_seq\[0\] names 4, and there are 2 boxes"),
    ("gpt4gen", GPT4GEN | {"question_boxes_seq": None}, {}, '"question_boxes_seq" is None; expected a list'),
]


@pytest.mark.parametrize(("kind", "record", "settings", "message"), WRONG)
def test_a_broken_record_is_named_with_file_line_and_field(folder, kind, record, settings, message):
    if message is None:
        assert records(folder, kind, [record], settings)[0].turns
        return
    with pytest.raises(DataError, match=rf"(?s){kind}\.jsonl.*line 1.*{message}"):
        records(folder, kind, [record], settings)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("rec", {"version": "b"}, "dataset_type rec does not read grounding.version; it reads notation, precision"),
        ("grounding", {"seed": 1}, "dataset_type grounding does not read grounding.seed"),
        ("gqa", {"version": "q"}, 'grounding.version is "q"; dataset_type gqa has q-a, q-c'),
        ("rec", {"template_string": "<image> where?"}, "holds 0 <expr>; expected exactly one"),
        ("gqa", {"version": "qb-a", "scene_graphs": None}, "give grounding.scene_graphs"),
        ("gqa", {"version": "qb-a", "scene_graph_index": "list.json"}, "is no JSON object of image ids and lines"),
        ("gqa", {"version": "qb-a", "scene_graph_index": "none.json"}, "cannot read grounding.scene_graph_index"),
    ],
)
def test_settings_that_do_not_fit(folder, kind, settings, message):
    record = {"gqa": GQA, "rec": REC}.get(kind, REC)
    if "scene_graph_index" in settings:
        settings = settings | {"scene_graph_index": str(folder / settings["scene_graph_index"])}
    with pytest.raises(ConfigError, match=message):
        records(folder, kind, [record], settings)


def test_a_scene_graph_of_another_image(folder, tmp_path):
    index = {"version": "qb-a", "scene_graph_index": str(folder / "wrong.json")}
    with pytest.raises(DataError, match="is the scene graph of image 6; correct scene_graph_index"):
        records(folder, "gqa", [GQA], index)
    (tmp_path / "graphs.jsonl").write_text('{"image_id": "7", "objects": {"11": {"x": 0}}}\n')
    with pytest.raises(DataError, match='"objects" is no object of boxes with x, y, w and h'):
        records(folder, "gqa", [GQA], {"version": "qb-a", "scene_graphs": str(tmp_path / "graphs.jsonl")})


ENTITIES = """<annotation>
<object><name>11</name><name>12</name>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>101</xmax><ymax>101</ymax></bndbox></object>
<object><name>12</name><bndbox><xmin>51</xmin><ymin>26</ymin><xmax>101</xmax><ymax>101</ymax></bndbox></object>
<object><name>13</name><scene>1</scene></object></annotation>"""


def entities(tmp_path, xml=ENTITIES, text=None):
    for name in ("Annotations", "Sentences"):
        (tmp_path / name).mkdir()
    (tmp_path / "Annotations" / "7.xml").write_text(xml)
    line = "[/EN#11/people A man] holds [/EN#12/other/bags two bags] on [/EN#13/scene a day] ."
    (tmp_path / "Sentences" / "7.txt").write_text(line + "\n" if text is None else text)
    return tmp_path


def test_flickr30k_entities_become_records(folder, tmp_path):
    (record,) = read_entities(entities(tmp_path), "7")
    assert record["boxes"] == [BOX, BOX2] and record["boxes_seq"] == [[0], [0, 1]]
    sample = records(folder, "flickr30k", [record], {})[0]
    assert sample.turns[1].text == f"A man{SEEN} holds two bags{SEEN[:-1]};{SEEN2[1:]} on a day ."


@pytest.mark.parametrize(
    ("xml", "text", "message"),
    [
        ("<annotation>", None, "is no annotation of Flickr30k Entities"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation/>', None, "declares a document type"),
        (ENTITIES, "[/EN#11 A man] waits", "line 1: found brackets"),
        (ENTITIES.replace("<xmin>1<", "<xmin>x<"), None, "is no annotation of Flickr30k"),
    ],
)
def test_broken_entities(tmp_path, xml, text, message):
    with pytest.raises(DataError, match=message):
        list(read_entities(entities(tmp_path, xml, text), "7"))


def test_entities_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="expected the folders Sentences and Annotations"):
        list(read_entities(tmp_path, "7"))
    folder = entities(tmp_path)
    monkeypatch.setattr("mindspeed_mm.data.grounding.entities.MOST_BYTES", 3)
    with pytest.raises(DataError, match="has more than 3 bytes"):
        list(read_entities(folder, "7"))
    monkeypatch.undo()
    (folder / "Sentences" / "7.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is no text in UTF-8"):
        list(read_entities(folder, "7"))
