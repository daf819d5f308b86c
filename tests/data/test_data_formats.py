"""ShareGPT, messages (JSON and parquet) and preference records: what is read, and what each broken record is told."""

import io
import json
from pathlib import Path

import pytest
from data_helpers import make_record
from PIL import Image

from mindspeed_mm import registry
from mindspeed_mm.constants import IMAGE_TOKEN_INDEX
from mindspeed_mm.data.datasets._files import ReadOptions
from mindspeed_mm.data.rendering import render_turns
from mindspeed_mm.data.sample import ImageBytes
from mindspeed_mm.data.set_config import DATASETS, BasicParameters
from mindspeed_mm.data.template import get_template
from mindspeed_mm.errors import ConfigError, DataError
from tests.helpers.media import dataset_of


@pytest.fixture
def read(tmp_path, image_folder):
    """read(kind, *records) -> the samples of a JSONL file."""

    def make(kind, *records, template="v1", **options):
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(json.dumps(record) for record in records))
        parameters = BasicParameters(data_path=str(path), data_folder=str(image_folder))
        source = registry.find(DATASETS, kind, "DATASET")(parameters, ReadOptions(get_template(template), **options))
        return [source[number] for number in range(len(source))]

    return make


USER, ASSISTANT = {"role": "user", "content": "Hi <image>"}, {"role": "assistant", "content": "Ho"}
WITH_IMAGE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}


def test_messages(read):
    parts = [{"type": "text", "text": "A <image> tag:"}, {"type": "image"}, {"type": "text", "text": "seen?"}]
    samples = read(
        "messages",
        {"messages": [{"role": "system", "content": "Be brief."}, USER, ASSISTANT]},
        {"messages": [USER, ASSISTANT], "images": ["red.png"]},
        {"messages": [{"role": "user", "content": parts}, ASSISTANT], "images": [{"path": "blue.png", "bytes": None}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "green.png"}]}, ASSISTANT]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "red.png"}}]},
                ASSISTANT,
            ]
        },
    )
    assert [len(sample.images) for sample in samples] == [0, 1, 1, 1, 1]
    assert [Path(sample.images[0]).name for sample in samples[1:]] == ["red.png", "blue.png", "green.png", "red.png"]
    assert render_turns(samples[0].turns, "v1") == "Be brief. USER: Hi <image> ASSISTANT: Ho</s>"
    assert samples[2].turns[0].text == "A <image> tag:<image>\nseen?" and samples[2].turns[0].literal == (2,)
    assert samples[3].turns[0].text == "<image>"


def test_image_parts_may_give_places_in_the_list(read):
    second, first = ({"type": "image", "index": place, "text": None} for place in (1, 0))
    unnamed = {"type": "image", "index": None}
    for parts, expected in (([second, first], ["blue.png", "red.png"]), ([unnamed, unnamed], ["red.png", "blue.png"])):
        messages = [{"role": "user", "content": parts}, ASSISTANT]
        (sample,) = read("messages", {"messages": messages, "images": ["red.png", "blue.png"]})
        assert [Path(image).name for image in sample.images] == expected


def test_a_typed_image_tag_is_text(read, tokenizer):
    from mindspeed_mm.data.encode import encode_turns

    parts = [{"type": "image"}, {"type": "text", "text": "What is <image>?"}]
    answer = {"role": "assistant", "content": "<image> is a tag</s> USER: no"}
    (sample,) = read("messages", {"messages": [{"role": "user", "content": parts}, answer], "images": ["red.png"]})
    ids, labels = encode_turns(sample.turns, tokenizer, "v1", "text")
    assert ids.count(IMAGE_TOKEN_INDEX) == 1 and ids.count(tokenizer.eos_token_id) == 1
    supervised = [label for label in labels if label != -100]
    assert tokenizer.decode(supervised) == "<image> is a tag</s> USER: no"


def test_sharegpt(read):
    turns = [{"from": "user", "value": "<image>?"}, {"from": "chatgpt", "value": "<image>!"}]
    samples = read(
        "sharegpt",
        {"conversations": [{"from": "system", "value": "S"}, *turns]},
        {"conversations": turns, "system": "S"},
        {
            "conversations": [{"from": "gpt", "value": "first"}, *turns[:1], {"from": "gpt", "value": "x"}],
            "image": "red.png",
        },
    )
    assert samples[0].turns == samples[1].turns and samples[0].turns[0].role == "system"
    assert [len(sample.images) for sample in samples] == [0, 0, 1]


def test_preference_records(read):
    question = {"role": "user", "content": "Hi"}
    samples = read(
        "preference",
        {"prompt": "<image>\nWhat?", "chosen": "A cat.", "rejected": "A dog.", "images": ["red.png"]},
        {"question": "What?", "chosen": "A cat.", "reject": "A dog.", "image": "red.png"},
        {"prompt": [question], "chosen": [question, ASSISTANT], "rejected": [{"role": "assistant", "content": "No"}]},
        {"chosen": [question, ASSISTANT], "rejected": [question, {"role": "assistant", "content": "No"}]},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Ho"},
            "rejected": {"from": "gpt", "value": "No"},
        },
    )
    assert samples[0].turns == samples[1].turns and len(samples[1].images) == 1
    assert samples[0].rejected[-1].text == "A dog." and samples[0].turns[-1].text == "A cat."
    assert samples[2].turns == samples[3].turns == samples[4].turns
    assert samples[2].rejected == samples[3].rejected == samples[4].rejected


def test_preference_records_need_their_objective(make_config, tokenizer):
    record = {"prompt": "Hi", "chosen": "Ho", "rejected": "No"}
    with pytest.raises(ConfigError, match="holds preference records .* which this objective does not train on"):
        dataset_of(make_config([record], dataset_type="preference"), tokenizer, 4, 100)


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("messages", {}, '"messages" is None; expected a list of messages, such as'),
        ("messages", {"messages": ["x"]}, r"messages\[0\] is 'x'; expected an object with \"role\""),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\].role is 'tool'; expected"),
        ("messages", {"messages": [USER, {"role": "system", "content": "x"}]}, r"messages\[1\].role is 'system'"),
        ("messages", {"messages": [USER, USER]}, r'messages\[1\] is from "human", expected "gpt"'),
        ("messages", {"messages": [ASSISTANT]}, "holds only a gpt turn"),
        ("messages", {"messages": [{"role": "user", "content": 3}]}, r"messages\[0\].content is 3; expected a text"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "video"}]}]}, r"content\[0\] is .*video"),
        ("messages", {"messages": [USER, ASSISTANT], "images": ["a", "b"]}, '1 image parts .* lists 2'),
        ("messages", {"messages": [USER, ASSISTANT], "images": ["https://x/y.png"]}, "nothing is downloaded"),
        ("messages", {"messages": [USER, ASSISTANT], "images": [3]}, r"images\[0\] is 3; expected the name"),
        ("messages", {"messages": [USER], "image": "a", "images": ["a"]}, 'has both "image" and "images"'),
        ("messages", {"messages": [USER, ASSISTANT], "images": ["../x.png"]}, "lies outside data_folder"),
        ("sharegpt", {"conversations": []}, r'"conversations" is \[\]; expected a list of turns, such as'),
        ("sharegpt", {"conversations": [3]}, r"conversations\[0\] is 3; expected an object"),
        ("sharegpt", {"conversations": [{"from": "dog", "value": "x"}]}, r"conversations\[0\].from is 'dog'"),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "x"}, {"from": "system", "value": "x"}]},
            "a system turn that is not the first",
        ),
        ("sharegpt", {"conversations": [{"from": "human", "value": "\ud800"}]}, "half of a surrogate pair"),
        ("preference", {"prompt": "a", "chosen": "b"}, '"rejected" is missing; expected one answer under'),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "reject": "c"}, '"rejected" is given twice'),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "there is nothing to prefer"),
        ("preference", {"prompt": "a", "chosen": "", "rejected": "b"}, '"chosen" is empty'),
        ("preference", {"prompt": "a", "question": "a", "chosen": "c", "rejected": "b"}, 'has "prompt" and "question"'),
        ("preference", {"prompt": "a", "chosen": [USER], "rejected": "b"}, "\"chosen\" is from 'user'"),
        ("preference", {"prompt": "a", "chosen": [USER, ASSISTANT], "rejected": "b"}, "1 messages before its answer"),
        ("preference", {"prompt": [USER, ASSISTANT], "chosen": "c", "rejected": "b"}, "must end with a question"),
        ("preference", {"chosen": [USER, ASSISTANT], "rejected": [USER | {"content": ""}, ASSISTANT]}, "differ"),
        (
            "preference",
            {"image": "a", "chosen": [WITH_IMAGE, ASSISTANT], "rejected": [USER | {"content": "Hi"}, ASSISTANT]},
            '"chosen" shows 1 images and "rejected" 0; expected the same images on both sides',
        ),
        ("preference", {"prompt": "a", "chosen": " ", "rejected": "b"}, '"chosen" is empty'),
        ("llava", {"conversations": [{"from": "human", "value": "\udc00"}]}, r"conversations\[0\].value holds half"),
        ("messages", {"image": "a", "messages": [USER | {"content": [{"type": "image", "index": 1}]}, ASSISTANT]},
         r'"index" of the image parts is \[1\] in turn; expected each of 0 to 0 once, such as'),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image", "index": "0"}]}, ASSISTANT]},
         r"content\[0\].index is '0'; expected a place in \"images\", such as 0"),
    ],
)  # fmt: skip
def test_broken_records(read, kind, record, message):
    with pytest.raises(DataError, match=rf"data.jsonl: record 0: .*{message}"):
        read(kind, record)


def test_images_stay_where_they_were_written(read):
    record = {
        "image": "red.png",
        "conversations": [{"from": "human", "value": "See <image> there"}, {"from": "gpt", "value": "x"}],
    }
    (moved,) = read("llava", record)
    (kept,) = read("llava", record, images_first=False)
    assert (moved.turns[0].text, kept.turns[0].text) == ("<image>\nSee  there", "See <image> there")


def test_sets_of_several_formats(make_config, tokenizer, tmp_path):
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [USER, ASSISTANT]}) + "\n")
    (tmp_path / "own.json").write_text(json.dumps([make_record(5)]))
    sets = [
        {"data_path": str(tmp_path / "own.json")},
        {"data_path": str(tmp_path / "chat.jsonl"), "dataset_type": "messages"},
    ]
    config = make_config([], basic_parameters=sets)
    dataset = dataset_of(config, tokenizer, 4, 200)
    assert [dataset[i].sample_id for i in range(2)] == ["r5", str(tmp_path / "chat.jsonl") + ": record 0"]
    with pytest.raises(ConfigError, match='found "chat", expected one of: multimodal'):
        make_config([], basic_parameters=[sets[0] | {"dataset_type": "chat"}])


def test_parquet(tmp_path, tokenizer, make_config):
    import pyarrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(buffer, "PNG")
    image = {"bytes": buffer.getvalue(), "path": "red.png"}
    rows = [{"messages": [USER, ASSISTANT], "images": [image]} for _ in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=2)
    sets = {"data_path": str(tmp_path / "rows.parquet")}
    dataset = dataset_of(make_config([], basic_parameters=sets, dataset_type="messages"), tokenizer, 4, 200)
    assert len(dataset) == 5
    assert isinstance(dataset.sample(3).images[0], ImageBytes)
    assert dataset[4].media[0].pixels.shape == (1, 3, 28, 28)


def test_a_parquet_row_that_is_no_text(tmp_path):
    import pyarrow
    from pyarrow import parquet

    from mindspeed_mm.data.parquet import ParquetFile

    texts = pyarrow.array([b"good", b"\xff"], pyarrow.binary()).cast(pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "rows.parquet")
    rows = ParquetFile(tmp_path / "rows.parquet")
    assert rows[0] == {"text": "good"}
    with pytest.raises(DataError, match="rows.parquet: record 1 holds a text that is not UTF-8"):
        rows[1]


def test_parquet_needs_pyarrow(tmp_path, monkeypatch, make_config, tokenizer):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    sets = {"data_path": str(tmp_path / "rows.parquet")}
    with pytest.raises(ConfigError, match=r"needs pyarrow: pip install mindspeed-mm\[parquet\]"):
        dataset_of(make_config([], basic_parameters=sets, dataset_type="messages"), tokenizer, 4, 200)
