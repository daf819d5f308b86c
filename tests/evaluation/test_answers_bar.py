"""Letter P: the bar of an evaluation counts the answers of all ranks."""

import threading

import evaluation.progress
from evaluation.progress import AnswersBar


class CountedRanks:
    """Rank 0 of two, whose other rank has counted 3 answers already, and 2 before this evaluation."""

    rank, world_size, is_leader = 0, 2, True

    def __init__(self):
        self.answers = 2

    def count(self, answers):
        self.answers += answers
        return self.answers


def completed(bar):
    return bar._bar.tasks[0].completed, bar._bar.tasks[0].total


def test_the_bar_counts_the_answers_of_every_rank(capsys):
    ranks = CountedRanks()
    bar = AnswersBar("toy", ranks)
    with bar.asking(8):
        bar.advance()
        assert completed(bar) == (1, 8)
        ranks.count(3)  # what another rank does
        bar.advance()
        assert completed(bar) == (5, 8)
        ranks.count(3)
    assert completed(bar) == (8, 8) and "8/8" in capsys.readouterr().err


def test_it_follows_the_others_once_this_rank_is_done(monkeypatch, capsys):
    monkeypatch.setattr(evaluation.progress, "BETWEEN", 0.001)
    asked = threading.Event()

    class OtherRanks(CountedRanks):
        def count(self, answers):
            if threading.current_thread().name == "answers":
                asked.set()
            return super().count(answers)

    bar = AnswersBar("toy", OtherRanks())
    with bar.asking(2):
        bar.wait_for_others()
        assert asked.wait(30)


def test_a_store_that_has_gone_ends_the_watching(monkeypatch):
    class GoneRanks(CountedRanks):
        def count(self, answers):
            raise RuntimeError("the store has gone")

    bar = AnswersBar("toy", GoneRanks(), show=False)
    monkeypatch.setattr(evaluation.progress, "BETWEEN", 0.001)
    bar._watch()  # returns


def test_a_hidden_bar_counts_nothing():
    ranks = CountedRanks()
    bar = AnswersBar("toy", ranks, show=False)
    with bar.asking(2):
        bar.advance()
    assert ranks.answers == 2


def count_on_this_rank(add):
    """Answers that rank 0 sees when both ranks have added theirs."""
    from evaluation.ranks import TorchRanks

    ranks = TorchRanks()
    before = ranks.count(0)
    ranks.all_gather(None)
    ranks.count(add[ranks.rank])
    ranks.all_gather(None)
    return ranks.count(0) - before


def test_ranks_count_together(ranks):
    assert ranks(2).run(count_on_this_rank, (3, 4)) == [7, 7]
