import pytest
from evaluation_helpers import choice_rows, write_table


@pytest.fixture
def table_path(tmp_path):
    """A table of six questions; see choice_rows."""
    return write_table(tmp_path / "toy.tsv", choice_rows())
