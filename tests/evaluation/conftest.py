import pytest
from evaluation_helpers import JudgeServer, choice_rows, write_table


@pytest.fixture
def table_path(tmp_path):
    """A table of six questions; see choice_rows."""
    return write_table(tmp_path / "toy.tsv", choice_rows())


@pytest.fixture
def server():
    """A judge; see JudgeServer."""
    started = JudgeServer()
    yield started
    started.http.shutdown()
    started.http.server_close()
