"""The house: who may import whom, who owns which library, how long a file may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from rooms import LIBRARY_OWNERS, MAX_LINES, MAY_IMPORT, architecture_page

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "glasstune"
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Yields (dotted module, line, whether it stands inside a function)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        child
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.walk(node)
    }
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, node in inside
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module, node.lineno, node in inside


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_what_they_may(path: Path) -> None:
    room = room_of(path)
    for module, line, inside in imports(path):
        library = module.split(".")[0]
        owners = LIBRARY_OWNERS.get(library)
        if owners is not None:
            assert room in owners, f"{path}:{line}: {library} belongs to {', '.join(owners)}"
        if library != "glasstune":
            continue
        other = module.split(".")[1] if "." in module else ""
        if room == "" or other in ("", room):
            continue
        assert other in MAY_IMPORT[room], f"{path}:{line}: {room} may not import {other}"
        if room == "cli" and other == "workflows":
            assert inside, f"{path}:{line}: workflows only inside a command's function"


def test_a_forbidden_import_is_seen(tmp_path: Path) -> None:
    """The test above must be able to fail."""
    file = tmp_path / "bad.py"
    file.write_text("def f():\n    from glasstune.training.loop import Loop\n")
    assert list(imports(file)) == [("glasstune.training.loop", 2, True)]
    assert "training" not in MAY_IMPORT["audit"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_architecture_page_is_fresh() -> None:
    page = ROOT / "docs" / "ARCHITECTURE.md"
    assert page.read_text(encoding="utf-8") == architecture_page(), (
        "run: python tests/support/rooms.py"
    )
