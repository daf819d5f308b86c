import pytest

from evaluation.prompts import Prompt
from evaluation.tsv import Row
from evaluation.work import split_work


def rows_of(*images):
    return [Row(number, {}, number, 0, 1, image_cell) for number, image_cell in enumerate(images)]


def prompts_of(rows, lengths=None):
    return {row.index: Prompt(text="x" * (lengths[row.index] if lengths else 10)) for row in rows}


def test_questions_on_one_image_stand_together_long_ones_first():
    rows = rows_of("a", "b", "a", "c", "b", "a")
    prompts = prompts_of(rows, [10, 30, 20, 5, 31, 15])
    (own,) = split_work(rows, prompts, 1)
    assert [row.index for row in own] == [4, 1, 2, 5, 0, 3]


def test_more_images_come_first():
    rows = [Row(0, {}, 0, 0, 1, "a"), Row(1, {}, 1, 0, 3, "b"), Row(2, {}, 2, 0, 0, "")]
    assert [row.index for row in split_work(rows, prompts_of(rows), 1)[0]] == [1, 0, 2]


@pytest.mark.parametrize("replicas", [1, 2, 3, 7, 50])
def test_every_row_is_asked_once_and_loads_are_even(replicas):
    rows = rows_of(*(f"p{number // 4}" for number in range(400)))
    shares = split_work(rows, prompts_of(rows), replicas)
    assert sorted(row.index for share in shares for row in share) == list(range(400))
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 4


def test_groups_stay_whole_where_there_are_many():
    rows = rows_of(*(f"p{number // 4}" for number in range(400)))
    for share in split_work(rows, prompts_of(rows), 2):
        assert len({row.image for row in share}) == len(share) / 4


def test_one_image_with_all_questions_keeps_no_replica_idle():
    rows = rows_of(*["a"] * 90)
    assert {len(share) for share in split_work(rows, prompts_of(rows), 3)} == {30}


def test_fewer_rows_than_replicas():
    assert sorted(map(len, split_work(rows_of("a", "b"), prompts_of(rows_of("a", "b")), 4))) == [0, 0, 1, 1]
    assert split_work([], {}, 2) == [[], []]
