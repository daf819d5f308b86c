"""No key of a record, turn or message is dropped without a word; marks on turns decide what is learned."""

import json

import pytest

from mindspeed_mm.constants import IGNORE_INDEX
from mindspeed_mm.data.keys import LLAVA_TURN, digest, is_learned, one_typing_error
from mindspeed_mm.errors import DataError, UnknownKeyError
from tests.helpers.media import dataset_of

LLAVA = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cat."}]
MESSAGES = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
SEEN = [{"role": "user", "content": "<image>What is it?"}, MESSAGES[1]]
RECORDS = {
    "llava": {"conversations": LLAVA},
    "sharegpt": {"conversations": LLAVA},
    "messages": {"messages": MESSAGES},
    "preference": {"prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."},
}


@pytest.fixture
def source(make_config):
    """source(kind, records, unknown_keys=...) -> the records of that kind of file, all looked at."""
    from mindspeed_mm import registry
    from mindspeed_mm.data.build import read_options
    from mindspeed_mm.data.set_config import DATASETS
    from mindspeed_mm.data.template import get_template

    def build(kind, records, **parameters):
        config = make_config(records, dataset_type=kind, **parameters)
        options = read_options(config, get_template("v1"))
        return registry.find(DATASETS, kind, "DATASET", what="dataset_type")(
            config.dataset_param.basic_parameters[0], options
        )

    return build


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("video", "clip.mp4", '"?video"?. is not read here: videos and audio'),
        ("videos", ["1.mp4"], "is not read here: videos and audio"),
        ("system_prompt", "Be brief.", "is not read here: this format has no system text"),
        ("Image", "red.png", 'is no key of a record; did you mean "image"'),
        ("imgae", "red.png", 'did you mean "image"'),
        ("tools", [{"name": "f"}], "tools and their calls are not trained on"),
        ("weight", 0.5, "a mark belongs on the turn"),
    ],
)
def test_letter_a_keys_that_change_training_are_refused(source, kind, key, value, message):
    with pytest.raises(UnknownKeyError, match=r"records.json: record 1, line 1: .*" + message):
        source(kind, [RECORDS[kind], RECORDS[kind] | {key: value}])
    found = source(kind, [RECORDS[kind], RECORDS[kind] | {key: value}], unknown_keys="warn")
    assert found[1].ignored == (key,) and found.facts[:, 3].tolist() == [0, digest([key])]


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("image_url", "a record names images by"),  # ends like a harmless key
        ("videoPath", "videos and audio"),
        ("Video", "videos and audio"),
        ("tool_call_id", "tools and their calls"),
        ("file_name", "a record names images by"),
        ("image_1", "a record names images by"),  # NLVR2 and MMMU number them
        ("video_frames", "videos and audio"),
        ("chat_template_kwargs", "prompts are written by the template alone"),
        ("mask", "it says what is not learned; marks here are"),  # NeMo's {"mask": "User"}
    ],
)
def test_letter_a_keys_of_other_suites_in_other_spellings(source, kind, key, message):
    with pytest.raises(UnknownKeyError, match=f"'{key}' is not read here: {message}"):
        source(kind, [RECORDS[kind] | {key: "x"}])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<video>\nWhat happens?", "<video> in a text"),
        ("<image_1> and <|image_pad|>?", "<image_1> in a text, <|image_pad|> in a text"),
        ("<image>What is it?", "<image> without an image"),
        ("<img src='a.jpg'> and <b>bold</b> in <video src='x'></video>", ""),
    ],
)
def test_letter_a_marks_of_media_that_stay_text_are_told(source, text, told):
    turns = [LLAVA[0] | {"value": text}, LLAVA[1] | {"value": "<video> is text here"}]
    assert ", ".join(source("sharegpt", [{"conversations": turns}])[0].ignored) == told


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("mark", ["<img>a/b.jpg</img>", "<IMG>https://x.org/1</IMG>", "<video>b.mp4</video>"])
def test_letter_a_a_file_that_a_text_names_is_refused(source, kind, mark):
    """Qwen-VL's and ms-swift's way; it would be trained on as text, without the image."""
    record = json.loads(json.dumps(RECORDS[kind]).replace("What is it?", f"1: {mark} What?"))
    with pytest.raises(UnknownKeyError, match=f"line 1: a text names a file as '{mark}', which is not read here"):
        source(kind, [record])
    assert len(source(kind, [record], unknown_keys="warn")[0].ignored) == 1


def test_letter_a_a_key_without_a_value_says_nothing(source):
    """As exports of tables have them: null or empty in every record."""
    empty = {"image": None, "images": [], "system": ""}
    assert source("sharegpt", [{"conversations": LLAVA} | empty])[0].turns[0].role == "human"
    seen = [{"from": "human", "value": "<image>What?"}, LLAVA[1]]
    assert len(source("llava", [{"conversations": seen, "image": "", "images": ["red.png"]}])[0].images) == 1
    with pytest.raises(DataError, match="image is 'https://x.org/1.png'; expected a file in data_folder"):
        source("llava", [{"conversations": seen, "image": "https://x.org/1.png"}])


def test_letter_a_where_an_image_comes_from_is_harmless_beside_it(source):
    turns = [LLAVA[0] | {"value": "<image>\nWhat is it?"}, LLAVA[1]]
    record = {"image": "red.png", "conversations": turns, "image_url": "https://x.org/1.jpg", "mask": False}
    assert source("llava", [record])[0].ignored == ()


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("llava", {"conversations": [LLAVA[0] | {"content": "And why?"}, LLAVA[1]]}, "'content'.*would not be trained"),
        ("llava", {"conversations": [LLAVA[0], LLAVA[1] | {"masked": True}]}, "'masked'.*it says what is not learned"),
        ("messages", {"messages": [MESSAGES[0], MESSAGES[1] | {"do_train": False}]}, 'marks of a turn are "loss"'),
        ("preference", {"chosen": MESSAGES[1] | {"loss": False}}, "a preference record has no marks"),
        ("preference", {"prompt": [{"role": "user", "content": [{"type": "text", "text": "A", "txet": "B"}]}]}, "txet"),
        ("preference", {"chosen": MESSAGES[1] | {"value": "B"}}, r"chosen\.'value' is not read here"),
        ("messages", {"images": [{"path": "1.png", "video": "x"}], "messages": SEEN}, r"images\[0\]\.'video'"),
    ],
)
def test_letter_a_inner_keys(source, kind, record, message):
    with pytest.raises(UnknownKeyError, match=message):
        source(kind, [RECORDS[kind] | record])


def test_letter_a_parts_that_name_an_image_twice(source):
    def messages(**part):
        content = [{"type": "image", **part}, {"type": "text", "text": "What?"}]
        return [{"messages": [{"role": "user", "content": content}, MESSAGES[1]]}]

    with pytest.raises(DataError, match=r'content\[0\] has "image" and "path"; expected one of them'):
        source("messages", messages(image="1.png", path="2.png"))
    with pytest.raises(UnknownKeyError, match=r"image_url\.'max_pixels' is not read here"):
        source("messages", messages(image_url={"url": "1.png", "max_pixels": 9}))
    found = source("messages", messages(image_url={"url": "1.png", "detail": "low"}))
    assert found[0].ignored == ("messages[].content[].image_url.detail",)


def test_letter_a_a_key_given_twice_is_refused(source, tmp_path):
    from mindspeed_mm.data.json_members import JsonMembers
    from mindspeed_mm.data.records import RecordFile

    twice = '{"from": "human", "value": "What?", "value": "Why?"}'
    (tmp_path / "twice.json").write_text(f'[{{"conversations": [{twice}, {json.dumps(LLAVA[1])}]}}]')
    with pytest.raises(DataError, match=r'record 0 \(line 1, .*key "value" is given twice in one object'):
        RecordFile(tmp_path / "twice.json").verified(0)
    (tmp_path / "members.json").write_text(f'{{"a": {twice}}}')
    with pytest.raises(DataError, match='key "value" is given twice in one object'):
        JsonMembers(tmp_path / "members.json").value(0)


@pytest.mark.parametrize("kind", RECORDS)
def test_harmless_keys_and_empty_values_pass(source, kind):
    more = {"source": "web", "image_id": 3, "clip_score": 0.3, "video": None, "videos": [], "tools": "[]", "weight": 1}
    assert source(kind, [RECORDS[kind] | more])[0].ignored == ()


def test_system_is_read_by_sharegpt_alone(source):
    record = RECORDS["sharegpt"] | {"system": "Answer in French."}
    assert source("sharegpt", [record], template_name="v1")[0].turns[0].role == "system"
    with pytest.raises(UnknownKeyError, match="'system' is not read here"):
        source("llava", [record])


@pytest.mark.parametrize("name", ["key_typo", "msg_videos", "system", "video"])
def test_the_cases(source, cases, name):
    records = json.loads((cases / "01_video_key_ignored" / f"{name}.json").read_text())
    for record in records:
        record.pop("image", None)
        for turn in record.get("conversations", []):
            turn["value"] = turn["value"].replace("<image>", "")
    with pytest.raises(UnknownKeyError, match="unknown_keys"):
        source("messages" if name.startswith("msg") else "llava", records)


def test_keys_of_turns_and_parts(source):
    turns = [LLAVA[0], LLAVA[1] | {"tool_calls": [1]}]
    with pytest.raises(UnknownKeyError, match=r"conversations\[1\].'tool_calls' is not read here"):
        source("llava", [{"conversations": turns}])
    parts = [{"type": "text", "text": "What?", "txet": "Why?"}]
    with pytest.raises(UnknownKeyError, match=r'content\[0\].\'txet\' is no key of a text part; did you mean "text"'):
        source("messages", [{"messages": [{"role": "user", "content": parts}, MESSAGES[1]]}])
    found = source("messages", [{"messages": [MESSAGES[0] | {"mood": "curious"}, MESSAGES[1]]}])
    assert found[0].ignored == ("messages[].mood",)


def test_the_line_is_named(source, tmp_path):
    record = json.dumps(RECORDS["llava"])
    config_path = tmp_path / "records.json"
    with pytest.raises(UnknownKeyError, match="record 2, line 5: 'Image'"):
        from mindspeed_mm.data.config import BasicParameters
        from mindspeed_mm.data.datasets._files import ReadOptions
        from mindspeed_mm.data.datasets.llava import DATASET
        from mindspeed_mm.data.template import get_template

        wrong = json.dumps(RECORDS["llava"] | {"Image": "a.png"})
        config_path.write_text(f"[\n{record},\n\n{record},\n{wrong}\n]")
        DATASET(BasicParameters(data_path=str(config_path)), ReadOptions(get_template("v1")))


def test_other_keys_are_told_once_with_their_number(make_config, tokenizer, caplog):
    records = [RECORDS["llava"] | ({"mood": "curious"} if i % 2 else {}) for i in range(9)]
    dataset_of(make_config(records), tokenizer, 16, 512)
    told = [entry.getMessage() for entry in caplog.records if "nothing reads" in entry.getMessage()]
    assert len(told) == 1 and "4 records have keys that nothing reads: mood (the first is" in told[0]


@pytest.mark.parametrize(("kind", "turns"), [("llava", LLAVA), ("sharegpt", LLAVA), ("messages", MESSAGES)])
@pytest.mark.parametrize(
    "mark", [{"loss": False}, {"weight": 0}, {"train": False}, {"learnable": False, "weight": 0.0}]
)
def test_letter_a_marked_answers_are_not_learned(make_config, tokenizer, kind, turns, mark):
    key = "messages" if kind == "messages" else "conversations"
    pair = [*turns, turns[0], turns[1] | mark]
    marked, plain = (
        dataset_of(make_config([{key: each}], dataset_type=kind), tokenizer, 16, 512)[0]
        for each in (pair, [*turns, *turns])
    )
    assert marked.input_ids == plain.input_ids
    learned = [[i for i, label in enumerate(item.labels) if label != IGNORE_INDEX] for item in (marked, plain)]
    assert learned[0] == learned[1][: len(learned[1]) // 2] and learned[0]


def test_marks_that_are_refused(source):
    with pytest.raises(DataError, match=r"conversations\[1\].weight is 0.5; expected true, false, 1 or 0"):
        source("llava", [{"conversations": [LLAVA[0], LLAVA[1] | {"weight": 0.5}]}])
    with pytest.raises(DataError, match=r"conversations\[1\] has marks that disagree"):
        source("sharegpt", [{"conversations": [LLAVA[0], LLAVA[1] | {"weight": 1, "loss": False}]}])
    with pytest.raises(DataError, match=r"messages\[0\].loss asks to learn a turn that is no answer"):
        source("messages", [{"messages": [MESSAGES[0] | {"loss": True}, MESSAGES[1]]}])
    assert is_learned({"loss": None, "weight": 1}, "gpt", "x") and not is_learned({"loss": False}, "human", "x")


def test_typing_errors():
    near = ["Image", "imag", "imagee", "imgae", "inage", "IMAGE ", "ima-ge"]
    assert [one_typing_error(name, "image") for name in near] == [True] * len(near)
    assert not any(one_typing_error(name, "image") for name in ("img", "message", "mirage", "gamei", ""))
    assert one_typing_error("Id", "id") and not one_typing_error("is", "id")
    assert one_typing_error("conversation", "conversations") and LLAVA_TURN.unused({"from": 1}, "", "error") == []
