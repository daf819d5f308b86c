"""MiniGPT-v2's sets: public annotation files -> records -> what the model is trained on."""

import json
import pickle

import pytest
from PIL import Image

from mindspeed_mm.cli.main import main
from mindspeed_mm.config.minigpt4_tasks import DATA_YAMLS, KINDS
from mindspeed_mm.data.captions import blip_caption
from mindspeed_mm.data.datasets._files import ReadOptions
from mindspeed_mm.data.grounding.parameters import GroundingParameters
from mindspeed_mm.data.grounding.templates import QuestionTemplates
from mindspeed_mm.data.multitask import TASKS, records_of, templates_of
from mindspeed_mm.data.rendering import render_turns
from mindspeed_mm.data.set_config import DATASETS, BasicParameters
from mindspeed_mm.data.template import get_template
from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.registry import find

REF = {"ref_id": 7, "ann_id": 3, "image_id": 9, "split": "train", "sentences": [{"raw": "The Cat."}]}
INSTANCES = {
    "annotations": [{"id": 3, "bbox": [12.9, 10, 30.1, 25]}],
    "images": [{"id": 9, "width": 100, "height": 50}],
}
REGION = {"image_id": 4, "region_id": 1, "x": -1, "y": 5, "width": 20, "height": 10, "phrase": "a red hat"}
QUESTION = {"image": "val/a.jpg", "question_id": 1, "question": "What is it?", "answer": ["A Cat!", "A Cat!"]}
TALK = {"id": "9", "conversations": [{"value": "<image>\nHi"}, {"value": "Yes."}, {"value": "Why?"}, {"value": "So."}]}
PHRASE = "<p>A cat</p> {<1><2><3><4>}"
FILES = {
    **dict.fromkeys(("coco_vqa", "ok_vqa"), ([QUESTION],)),
    "aok_vqa": ([{"image": "a.jpg", "question": "What is it?", "direct_answers": ["a cat"]}],),
    "gqa": ([QUESTION | {"answer": "a cat"}],),
    "ocrvqa": (
        {
            "k": {"split": 1, "imageURL": "http://x/b.png", "questions": ["What is it?"], "answers": ["a cat"]},
            "v": {"split": 2},
        },
    ),
    "coco_caption": ([{"image": "train2014/a.jpg", "caption": "A cat."}, {"image": "val2014/b.jpg", "caption": "x"}],),
    "textcaps_caption": ({"data": [{"image_id": "a", "caption_str": "A cat."}]},),
    **dict.fromkeys(("refcoco", "refcocop", "refcocog"), ([REF, REF | {"split": "val"}], INSTANCES)),
    **dict.fromkeys(("invrefcoco", "invrefcocop", "invrefcocog"), ([REF], INSTANCES)),
    "refvg": (
        [{"regions": [REGION, REGION | {"width": 200, "height": 100}, REGION | {"width": 0}]}],
        [{"image_id": 4, "url": "http://x/VG_100K/4.jpg", "width": 40, "height": 20}],
    ),
    "flickr_grounded_caption": ([{"image_id": 5, "grounded_caption": PHRASE}],),
    "flickr_CaptionToPhrase": ([{"image_id": 5, "caption": "A cat.", "output": PHRASE}],),
    "flickr_ObjectToPhrase": ([{"image_id": 5, "phrase": "A cat", "bbox": "{<1><2><3><4>}"}],),
    **dict.fromkeys(("llava_conversation", "llava_detail", "llava_reason", "multitask_conversation"), ([TALK],)),
    "unnatural_instruction": (
        [{"instances": [{"instruction_with_input": "Add 1 + 1.", "constraints": "A number.", "output": "2."}]}],
    ),
}
SHOWN = "[INST] <Img><image></Img> "
BOX = "{<12><20><43><70>}"
WANTED = {
    **dict.fromkeys(("coco_vqa", "ok_vqa", "aok_vqa", "gqa"), f"{SHOWN}[vqa] what is it? [/INST]a cat</s>"),
    "ocrvqa": f"{SHOWN}[vqa] Based on the image, respond to this question with a short answer: "
    "what is it? [/INST]a cat</s>",
    **dict.fromkeys(
        ("coco_caption", "textcaps_caption"),
        f"{SHOWN}[caption] Can you briefly explain what you see in the image? [/INST]a cat</s>",
    ),
    **dict.fromkeys(("refcoco", "refcocop", "refcocog"), f"{SHOWN}[refer] where is the cat ? [/INST]{BOX}</s>"),
    **dict.fromkeys(
        ("invrefcoco", "invrefcocop", "invrefcocog"),
        f"{SHOWN}[identify] identify the object present at this location {BOX} [/INST]the cat</s>",
    ),
    "refvg": f"{SHOWN}[refer] where can I locate the a red hat ? [/INST]{{<0><25><50><75>}}</s>",
    "flickr_grounded_caption": f"{SHOWN}[grounding] please describe this image in details [/INST]{PHRASE}</s>",
    "flickr_CaptionToPhrase": f"{SHOWN}[detection] A cat. [/INST]{PHRASE}</s>",
    "flickr_ObjectToPhrase": f"{SHOWN}[detection] A cat [/INST]{PHRASE}</s>",
    **dict.fromkeys(
        ("llava_conversation", "llava_detail", "llava_reason", "multitask_conversation"),
        f"{SHOWN}Hi [/INST]Yes.</s><s>[INST] Why? [/INST]So.</s>",
    ),
    "unnatural_instruction": "[INST] add 1 + 1 a number [/INST]2</s>",
}


@pytest.fixture
def files(tmp_path):
    def made(name):
        paths = []
        for number, content in enumerate(FILES[name]):
            paths.append(tmp_path / f"{name}-{number}")
            if "refcoco" in name and number == 0:
                paths[-1].write_bytes(pickle.dumps(content))
            else:
                paths[-1].write_text(json.dumps(content))
        return paths

    return made


@pytest.mark.parametrize("name", TASKS)
def test_sets(name, files, tmp_path):
    """The command's file, read by the kind of data set that it names, in MiniGPT-v2's template."""
    target = tmp_path / "records.jsonl"
    assert main(["convert-data", *map(str, files(name)), str(target), "--to", name]) == 0
    (record,) = [json.loads(line) for line in target.read_text().splitlines()]
    if "image" in record:
        (tmp_path / record["image"]).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 50)).save(tmp_path / record["image"])
    grounding = GroundingParameters(notation="minigpt_v2") if KINDS[name] == "grounding" else None
    parameters = BasicParameters(data_path=str(target), data_folder=str(tmp_path), grounding=grounding)
    template = get_template("minigpt4_v2")
    dataset = find(DATASETS, KINDS[name], "DATASET", what="dataset_type")(parameters, ReadOptions(template))
    assert len(dataset) == 1
    assert render_turns(dataset[0].turns, "minigpt4_v2") == WANTED[name]
    images = {"refvg": "VG_100K/4.jpg", "refcoco": "COCO_train2014_000000000009.jpg", "coco_vqa": "a.jpg"}
    if name in images:
        assert dataset[0].images == (str(tmp_path / images[name]),)


def test_every_set_has_a_kind_and_defaults():
    assert set(KINDS) == set(TASKS) == set(DATA_YAMLS)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.questions])
def test_questions_come_from_the_pool_of_the_task(name, files, tmp_path):
    """Each of the pool is asked of some record, always the same of one record, with its tag in front."""
    task, tag = TASKS[name], TASKS[name].questions[0].partition(" ")[0]
    assert tag in ("[vqa]", "[caption]", "[refer]", "[identify]", "[grounding]", "[detection]")
    templates = QuestionTemplates(task.questions, () if task.placeholder is None else (task.placeholder,))
    chosen = [templates.chosen(str(number)) for number in range(200)]
    assert set(chosen) == set(task.questions) and all(text.startswith(f"{tag} ") for text in chosen)
    (record,) = records_of(name, files(name))
    (again,) = records_of(name, files(name))
    assert record == again and f"{tag} " in record["conversations"][0]["value"]


def test_draws_and_templates(files, tmp_path):
    pool = tmp_path / "pool.json"
    pool.write_text(json.dumps([f"[vqa] {number} <question>" for number in range(5)]))
    rows = [QUESTION | {"question_id": number, "answer": ["yes", "yes", "no"]} for number in range(60)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))

    def made(seed):
        templates = templates_of("coco_vqa", None, pool)
        found = records_of("coco_vqa", [path], templates=templates, seed=seed, keep_text=True)
        return [tuple(turn["value"] for turn in record["conversations"]) for record in found]

    assert made(0) == made(0) != made(1)
    questions, answers = zip(*made(0), strict=True)
    assert len(set(questions)) == 5 and questions[0].endswith("What is it?")
    assert set(answers) == {"yes", "no"} and 30 < answers.count("yes") < 50
    assert blip_caption('A "Cat"; (here)!\n  ' + "b " * 60) == " ".join(["a cat here", *["b"] * 47])


def test_refused(files, tmp_path, capsys):
    def refused(error, message, name, paths, **options):
        with pytest.raises(error, match=message):
            list(records_of(name, paths, **options))

    good = files("refcoco")
    refused(ConfigError, 'found the task "coco"; expected one of coco_vqa', "coco", [])
    refused(ConfigError, "task refcoco: found 1 files; expected 2: refs", "refcoco", good[:1])
    refused(DataError, "cannot read .*none", "coco_vqa", [tmp_path / "none"])
    refused(DataError, "cannot read .*none", "refcoco", [tmp_path / "none", good[1]])
    evil = tmp_path / "evil.p"
    evil.write_bytes(b"cos\ngetcwd\n(tR.")
    refused(DataError, "is refused .it asks for os.getcwd", "refcoco", [evil, good[1]])
    (tmp_path / "text").write_text("x")
    refused(DataError, "is not JSON", "coco_vqa", [tmp_path / "text"])
    refused(DataError, "found another form than that of coco_vqa", "coco_vqa", [good[1]])
    with pytest.raises(ConfigError, match="task llava_detail: found question templates; its records bring their own"):
        templates_of("llava_detail", "Hi", None)
    with pytest.raises(ConfigError, match="holds 0 <question>; expected exactly one"):
        templates_of("coco_vqa", "[vqa]", None)
    target = tmp_path / "out.jsonl"
    target.write_text("")
    line = ["convert-data", *map(str, files("gqa")), str(target), "--to", "gqa"]
    assert main(line) == 1 and "exists; expected a new file. Give --overwrite" in capsys.readouterr().err
    assert main([*line, "--overwrite"]) == 0 and target.read_text()
    assert main([*line, "--columns", "a"]) == 1 and "--columns has no meaning with --to gqa" in capsys.readouterr().err
    assert main(["convert-data", str(target), "--to", "gqa"]) == 1
    assert "alone; expected SRC ... DST" in capsys.readouterr().err
    assert main([*line[:-3], str(tmp_path / "no" / "out"), "--to", "gqa"]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*.part"))
