"""The web page for the tests that look at it."""

import pytest


@pytest.fixture(scope="module")
def site(golden):
    """See open_site. While it is open, playwright's event loop runs in this thread: it ends with its module."""
    from tests.helpers.web_page import open_site

    with open_site(golden) as found:
        yield found


@pytest.fixture
def opened(site):
    """See open_page."""
    from tests.helpers.web_page import open_page

    with open_page(site) as found:
        yield found
