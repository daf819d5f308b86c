"""Letter A in the readers of public sets: a mistyped, foreign or inner key is never dropped without a word."""

import pytest

from mindspeed_mm.data.grounding.parameters import KINDS
from mindspeed_mm.errors import DataError, UnknownKeyError
from tests.grounding.test_public_sets import CASES, GQA, POINT_QA, V7W, folder, records  # noqa: F401 - a fixture
from tests.grounding.test_reasoned_sets import CLEVR, SCIENCE, VCR

RECORDS = {kind: record for kind, record, *_ in reversed(CASES)}
RECORDS |= {"caption": {"img_path": "7.jpg", "caption": "A door."}, "v7w_point": V7W}
RECORDS |= {"clevr": CLEVR, "vcr": VCR, "science_qa": SCIENCE, "point_qa_local": POINT_QA}
TALK = [{"from": "human", "value": "<image>Where?"}, {"from": "gpt", "value": "<boxes>", "boxes_seq": [[0]]}]
RECORDS["grounding"] = {"image": "7.jpg", "target": {"boxes": [[0, 0, 9, 9]]}, "conversations": TALK}


def test_every_kind_is_here():
    assert set(RECORDS) == set(KINDS)


@pytest.mark.parametrize("kind", RECORDS)
def test_letter_a_mistyped_keys_of_public_sets(folder, kind):  # noqa: F811
    record = RECORDS[kind]
    assert records(folder, kind, [record], {})[0].ignored == ()
    for key in record:
        if len(key) < 5 or key == "dataset_name":  # short ones are not compared; that one changes nothing
            continue
        wrong = {name if name != key else key[:-2] + key[-1]: value for name, value in record.items()}
        with pytest.raises(UnknownKeyError, match=f'did you mean "{key}"'):
            records(folder, kind, [wrong], {})


@pytest.mark.parametrize("kind", RECORDS)
def test_letter_a_foreign_keys_of_public_sets(folder, kind):  # noqa: F811
    with pytest.raises(UnknownKeyError, match="'video' is not read here: videos and audio"):
        records(folder, kind, [RECORDS[kind] | {"video": "a.mp4"}], {})
    own = next(
        key
        for key in ("image", "img_path", "image_path", "file_path", "imageId", "image_id")
        + ("image_filename", "img_fn")
        if key in RECORDS[kind]
    )
    with pytest.raises(UnknownKeyError, match=rf"'img' is not read here: .* names images by .*\"{own}\""):
        records(folder, kind, [RECORDS[kind] | {"img": "8.jpg"}], {})


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("gqa", GQA | {"annotations": {"quesion": {"2": "11"}}}, r'annotations.\'quesion\' .*did you mean "question"'),
        ("gqa", GQA | {"cot": GQA["cot"] | {"box": []}}, None),
        ("gqa", GQA | {"cot": {"boxes": [], "valu": "x", "seq": []}}, r'cot.\'valu\' .*did you mean "value"'),
        (
            "clevr",
            CLEVR | {"program": [{"function": "filter_shape", "inputs": [], "value_input": ["cube"], "ans": []}]},
            r'"program"\[0\].\'value_input\' .*did you mean "value_inputs"',
        ),
        ("grounding", RECORDS["grounding"] | {"target": {"boxs": [[0, 0, 9, 9]]}}, 'did you mean "boxes"'),
    ],
)
def test_letter_a_keys_of_inner_objects(folder, kind, record, message):  # noqa: F811
    if message is None:  # an empty value says nothing
        assert records(folder, kind, [record], {})[0].ignored == ()
        return
    with pytest.raises(DataError, match=message):
        records(folder, kind, [record], {"version": "q-s"} if kind == "clevr" else {})


def test_letter_a_unknown_inner_keys_are_told(folder):  # noqa: F811
    target = {"boxes": [[0, 0, 9, 9]], "mood": "curious"}
    found = records(folder, "grounding", [RECORDS["grounding"] | {"target": target}], {})
    assert found[0].ignored == ("target.mood",)
    cot = GQA["cot"] | {"mood": "curious"}
    assert records(folder, "gqa", [GQA | {"cot": cot}], {})[0].ignored == ("cot.mood",)
