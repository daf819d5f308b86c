"""MiniGPT-v2's training sets as records of ours: tags of tasks in the questions, boxes on a grid of 0..100.

Each set is a function of its public annotation files that yields records of one of two kinds: `llava`, or `grounding`
where boxes are to be written (data/grounding, notation minigpt_v2). A question comes from a pool of templates with
`<question>`, `<expr>` or `<objs>` in them. The draws of the original (one of several sentences, answers or templates at
each reading) are made once here, from the seed and the record.
"""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_mm.data import multitask_questions as pools
from mindspeed_mm.data.captions import blip_caption
from mindspeed_mm.data.grounding.item import BOXES, EXPRESSION, OBJECTS, QUESTION
from mindspeed_mm.data.grounding.templates import QuestionTemplates
from mindspeed_mm.data.record_stream import record_stream
from mindspeed_mm.errors import ConfigError, DataError

MAX_PICKLE_BYTES = 256 * 2**20
REFER_PIXELS = 16384
"""Regions of Visual Genome are smaller than that, as in the original."""


@dataclass(frozen=True)
class Draw:
    """What is chosen once for a record: a template, a sentence, an answer."""

    templates: QuestionTemplates
    clean: Callable[[str], str]
    seed: int = 0

    def question(self, name: str, **values: str) -> str:
        """A template with its placeholders filled in."""
        found = {f"<{key}>": value for key, value in values.items()}
        return QuestionTemplates.filled(self.templates.chosen(name, self.seed), found)

    def one(self, name: str, values: list[Any]) -> Any:
        """One of several values, those that come twice twice as likely."""
        return random.Random(f"{self.seed} {name}").choice(values)


Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """A set: its reader (annotation files, Draw -> records), its questions, what stands in them, the files it takes.

    questions: one is chosen for each record; none where the records bring their own.
    files: what each of the files is.
    """

    read: Callable[..., Rows]
    questions: tuple[str, ...]
    placeholder: str | None
    files: tuple[str, ...] = ("annotations",)


def records_of(
    name: str,
    files: list[str | Path],
    *,
    templates: QuestionTemplates | None = None,
    seed: int = 0,
    keep_text: bool = False,
) -> Rows:
    """Records of a set.

    Args:
        name: of TASKS.
        files: its annotation files; several of a set that has one are read one behind the other.
        templates: of the questions; None: the original's pool.
        seed: of all draws.
        keep_text: leave captions, questions and answers as they are, instead of `blip_caption`.

    Raises:
        ConfigError: an unknown set, another number of files.
        DataError: a file that cannot be read or is of another form.
    """
    if name not in TASKS:
        raise ConfigError(f'found the task "{name}"; expected one of {", ".join(TASKS)}')
    task = TASKS[name]
    groups = [[file] for file in files] if len(task.files) == 1 else [files]
    if not files or len(groups[0]) != len(task.files):
        raise ConfigError(f"task {name}: found {len(files)} files; expected {len(task.files)}: {', '.join(task.files)}")
    templates = templates or QuestionTemplates(task.questions or ("",), _placeholders(task))
    draw = Draw(templates, (lambda text: text) if keep_text else blip_caption, seed)
    try:
        for group in groups:
            yield from task.read(*map(Path, group), draw)
    except DataError:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{', '.join(map(str, files))}: found another form than that of {name} ({error!r:.200}); expected "
            f"{', '.join(task.files)}. Give the files of this set."
        ) from error


def templates_of(name: str, text: str | None, file: str | Path | None) -> QuestionTemplates:
    """Question templates of a set: a text, or a JSON list of texts. Raises ConfigError, also where the records of the
    set bring their own questions."""
    if not TASKS[name].questions:
        raise ConfigError(f"task {name}: found question templates; its records bring their own: leave them out")
    return QuestionTemplates.read(text, file, _placeholders(TASKS[name]))


def _placeholders(task: Task) -> tuple[str, ...]:
    return () if task.placeholder is None else (task.placeholder,)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; correct the path.") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); download or copy it again.") from error


def _list(path: Path) -> Iterator[Any]:
    """The elements of a JSON list (or of JSONL), one by one: Visual Genome's regions take hundreds of megabytes."""
    try:
        with path.open("rb") as file:
            for number, (text, _) in enumerate(record_stream(file, path)):
                try:
                    yield json.loads(text)
                except ValueError as error:
                    raise DataError(f"{path}: record {number} is not JSON ({error}). Copy the file again.") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; correct the path.") from error


class _Plain(pickle.Unpickler):
    """Lists, dicts, texts and numbers alone."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _refs(path: Path) -> list[dict[str, Any]]:
    """RefCOCO's refs(...).p, a pickle of plain values."""
    try:
        if path.stat().st_size > MAX_PICKLE_BYTES:
            raise DataError(f"{path} is larger than {MAX_PICKLE_BYTES} bytes; expected refs(unc).p of RefCOCO.")
        with path.open("rb") as file:
            return _Plain(file).load()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; correct the path.") from error
    except (pickle.UnpicklingError, EOFError, ImportError, MemoryError) as error:
        raise DataError(f"{path} is refused ({error}); expected refs(unc).p of RefCOCO, plain values alone.") from error


def _talk(identity: Any, image: str | None, *turns: str) -> dict[str, Any]:
    """A LLaVA record of question, answer, question, ..."""
    values = [("human", "gpt")[number % 2] for number in range(len(turns))]
    talk = [{"from": role, "value": text} for role, text in zip(values, turns, strict=True)]
    if image is not None:
        talk[0]["value"] = f"<image>\n{talk[0]['value']}"
    return {"id": str(identity)} | ({} if image is None else {"image": image}) | {"conversations": talk}


def _coco(number: Any) -> str:
    return f"COCO_train2014_{int(number):012d}.jpg"


def _located(identity: str, image: str, size: tuple[int, int], box: tuple[float, ...], turns: tuple[str, str]) -> dict:
    """A grounding item with one box [left, top, width, height] in its question or answer."""
    left, top, width, height = box
    right, bottom = min(left + width, size[0]), min(top + height, size[1])
    talk = [{"from": role, "value": text} for role, text in zip(("human", "gpt"), turns, strict=True)]
    talk[0]["value"] = f"<image>\n{talk[0]['value']}"
    for turn in talk:
        if BOXES in turn["value"]:
            turn["boxes_seq"] = [[0]]
    target = {"boxes": [[left, top, right, bottom]], "width": size[0], "height": size[1]}
    return {"id": identity, "image": image, "target": target, "conversations": talk}


def _expressions(refs: Path, instances: Path, draw: Draw) -> Iterator[tuple[str, str, tuple[int, int], tuple, str]]:
    """(name, image, size, box, expression) of RefCOCO's training references."""
    content = _json(instances)
    boxes = {entry["id"]: entry["bbox"] for entry in content["annotations"]}
    sizes = {entry["id"]: (entry["width"], entry["height"]) for entry in content["images"]}
    for ref in _refs(refs):
        if ref["split"] == "train":
            name = str(ref["ref_id"])
            text = draw.clean(draw.one(name, [entry["raw"] for entry in ref["sentences"]]))
            yield name, _coco(ref["image_id"]), sizes[ref["image_id"]], tuple(boxes[ref["ann_id"]]), text


def _refer(refs: Path, instances: Path, draw: Draw) -> Rows:
    for name, image, size, box, text in _expressions(refs, instances, draw):
        yield _located(name, image, size, box, (draw.question(name, expr=text), BOXES))


def _identify(refs: Path, instances: Path, draw: Draw) -> Rows:
    for name, image, size, box, text in _expressions(refs, instances, draw):
        yield _located(name, image, size, box, (draw.question(name, objs=BOXES), text))


def _refer_genome(regions: Path, image_data: Path, draw: Draw) -> Rows:
    images = {entry["image_id"]: entry for entry in _list(image_data)}
    for entry in _list(regions):
        for region in entry["regions"]:
            if region["width"] * region["height"] >= REFER_PIXELS or region["width"] < 1 or region["height"] < 1:
                continue
            image = images[region["image_id"]]
            box = tuple(max(0, region[key]) for key in ("x", "y", "width", "height"))
            question = draw.question(str(region["region_id"]), expr=draw.clean(region["phrase"]))
            place = "/".join(image["url"].split("/")[-2:])
            size = (image["width"], image["height"])
            yield _located(str(region["region_id"]), place, size, box, (question, BOXES))


def _captions(path: Path, draw: Draw) -> Rows:
    content = _json(path)
    for number, row in enumerate(content["data"] if isinstance(content, Mapping) else content):
        image = row["image"].split("/")[-1] if "image" in row else f"{row['image_id']}.jpg"
        caption = row["caption"] if "caption" in row else row["caption_str"]
        if "image" not in row or "train" in row["image"]:
            yield _talk(number, image, draw.question(str(number)), draw.clean(caption))


def _questions(path: Path, draw: Draw) -> Rows:
    """Rows with "answer", a text or a list of texts of which one is drawn; A-OKVQA's have "direct_answers"."""
    for number, row in enumerate(_list(path)):
        name = str(row.get("question_id", number))
        found = row["answer"] if "answer" in row else row["direct_answers"]
        answer = draw.one(name, found) if isinstance(found, list) else found
        question = draw.question(name, question=draw.clean(row["question"]))
        yield _talk(name, row["image"].split("/")[-1], question, draw.clean(answer))


def _book_covers(path: Path, draw: Draw) -> Rows:
    for key, row in _json(path).items():
        if row["split"] != 1:
            continue
        image = key + Path(row["imageURL"]).suffix
        for number, (question, answer) in enumerate(zip(row["questions"], row["answers"], strict=True)):
            name = f"{key}-{number}"
            yield _talk(name, image, draw.question(name, question=draw.clean(question)), draw.clean(answer))


def _phrases(path: Path, draw: Draw) -> Rows:
    """Flickr30k's sets, whose answers have their boxes written already."""
    for number, row in enumerate(_list(path)):
        name, image = str(number), f"{row['image_id']}.jpg"
        if "grounded_caption" in row:
            yield _talk(name, image, draw.question(name), row["grounded_caption"])
        elif "phrase" in row:
            answer = f"<p>{row['phrase']}</p> {row['bbox']}"
            yield _talk(name, image, draw.question(name, expr=row["phrase"]), answer)
        else:
            yield _talk(name, image, draw.question(name, expr=row["caption"]), row["output"])


def _conversations(path: Path, draw: Draw) -> Rows:
    for row in _list(path):
        turns = [turn["value"] for turn in row["conversations"]]
        turns[0] = turns[0].replace("<image>", "").replace("\n", "").strip()
        yield _talk(row["id"], _coco(row["id"]), *turns)


def _instructions(path: Path, draw: Draw) -> Rows:
    for number, row in enumerate(_list(path)):
        found = row["instances"][0]
        text = found["instruction_with_input"]
        text += "" if found["constraints"] is None else f" {found['constraints']}"
        yield _talk(number, None, draw.clean(text), draw.clean(found["output"]))


REFERENCES = ("refs(unc).p or refs(umd).p", "instances.json")
_VQA = Task(_questions, pools.VQA, QUESTION)
_CAPTION = Task(_captions, pools.CAPTION, None)
_TALK = Task(_conversations, (), None)
_REFER = Task(_refer, pools.REFER, EXPRESSION, REFERENCES)
_IDENTIFY = Task(_identify, pools.IDENTIFY, OBJECTS, REFERENCES)
_DETECTION = Task(_phrases, pools.DETECTION, EXPRESSION)
TASKS: dict[str, Task] = {
    **dict.fromkeys(("coco_vqa", "ok_vqa", "aok_vqa", "gqa"), _VQA),
    "ocrvqa": Task(_book_covers, pools.VQA, QUESTION),
    **dict.fromkeys(("coco_caption", "textcaps_caption"), _CAPTION),
    **dict.fromkeys(("refcoco", "refcocop", "refcocog"), _REFER),
    **dict.fromkeys(("invrefcoco", "invrefcocop", "invrefcocog"), _IDENTIFY),
    "refvg": Task(_refer_genome, pools.REFER, EXPRESSION, ("region_descriptions.json", "image_data.json")),
    "flickr_grounded_caption": Task(_phrases, pools.GROUNDING, None),
    **dict.fromkeys(("flickr_CaptionToPhrase", "flickr_ObjectToPhrase"), _DETECTION),
    **dict.fromkeys(("llava_conversation", "llava_detail", "llava_reason", "multitask_conversation"), _TALK),
    "unnatural_instruction": Task(_instructions, (), None),
}
"""MiniGPT-v2's sets by the names of their builders."""
