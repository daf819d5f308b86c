"""Letter P: of several ranks one shows a bar."""

import pytest

from mindspeed_mm.data import progress


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_the_first_rank_shows_the_bar(monkeypatch, capsys, rank, shown):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(progress, "QUIET_SECONDS", -1.0)
    with progress.progress_bar("looking", 2) as advance:
        advance(1)
        advance(1)
    assert ("looking" in capsys.readouterr().err) == shown
