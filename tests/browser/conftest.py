"""One Chromium for all tests of pages; each test gets a watched page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import Page, started


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The browser's driver; skips where the machine has no Chromium."""
    with started(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def page(chromium: Any, tmp_path: Path) -> Iterator[Page]:
    """A page to open; the test fails if it logs an error or asks for anything but itself."""
    watched = Page(chromium, tmp_path)
    watched.problems()  # what an earlier test left
    yield watched
    assert watched.problems() == []
