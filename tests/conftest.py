"""Shared fixtures: tiny models, real data where it is, a quiet progress."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Set before torch loads. One thread: tiny tensors gain nothing from more, two test processes
# would fight for two cores, and the number of threads is part of a CPU's exact bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from runs import QuietProgress, missing
from several import Several
from tiny import save_tiny_model


def pytest_configure(config: pytest.Config) -> None:
    """Gives the tests a cache of their own, in which expanded GGUF files are the user's."""
    usual = Path(os.environ.get("GLASSTUNE_CACHE") or Path.home() / ".cache" / "glasstune")
    (usual / "gguf").mkdir(parents=True, exist_ok=True)
    own = tempfile.mkdtemp(prefix="glasstune-tests-")
    Path(own, "gguf").symlink_to(usual / "gguf", target_is_directory=True)
    os.environ["GLASSTUNE_CACHE"] = own
    config.add_cleanup(lambda: shutil.rmtree(own, ignore_errors=True))
    config.add_cleanup(lambda: os.environ.update(GLASSTUNE_CACHE=str(usual)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    kept = [item for item in items if item.get_closest_marker("slow") is None]
    dropped = [item for item in items if item.get_closest_marker("slow") is not None]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 2-layer Llama in fp32 and a tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def qa_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 short question-answer rows as a JSON array."""
    path = tmp_path_factory.mktemp("data") / "qa.json"
    rows = [
        {
            "instruction": f"What is {number} plus {number % 7}?",
            "input": "" if number % 3 else "Answer in words." * (number % 5),
            "output": f"It is {number + number % 7}." + " Sure." * (number % 6),
        }
        for number in range(60)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Several]:
    """Starts several ranks of a run."""
    ranks = Several(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture
def quiet() -> QuietProgress:
    return QuietProgress()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets (`GLASSTUNE_TEST_DATA`)."""
    folder = os.environ.get("GLASSTUNE_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        missing("GLASSTUNE_TEST_DATA")
    return Path(str(folder))
