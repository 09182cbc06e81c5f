"""Metrics by hand-made examples, and a user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from glasstune.core.errors import InputError
from glasstune.generation.metrics import load_metrics, means, score


@pytest.mark.parametrize(
    ("name", "answer", "reference", "want"),
    [
        ("exact_match", " 42\n", "42", 1),
        ("exact_match", "42.", "42", 0),
        ("exact_match", "Paris", "paris", 0),
        ("exact_match", "", "a", 0),
        ("contains", "It is Paris, of course.", " Paris ", 1),
        ("contains", "It is paris.", "Paris", 0),
        ("contains", "Par", "Paris", 0),
        ("json_valid", ' {"a": [1, 2.5e3, null]} ', "", 1),
        ("json_valid", "7", "", 1),
        ("json_valid", '{"a": NaN}', "", 0),
        ("json_valid", "[Infinity]", "", 0),
        ("json_valid", "{'a': 1}", "", 0),
        ("json_valid", '{"a": 1} done', "", 0),
        ("json_valid", "```json\n{}\n```", "", 0),
        ("json_valid", "", "", 0),
        ("json_valid", "[" * 100_000, "", 0),
    ],
)
def test_built_in(name: str, answer: str, reference: str, want: int) -> None:
    assert load_metrics(name)[name](answer, reference, {}) == want


def test_means_by_hand() -> None:
    found = score(
        load_metrics("exact_match, contains"), ["a", "b c", "d"], ["a", "c", "x"], [{}] * 3,
        ["r1", "r2", "r3"],
    )  # fmt: skip
    assert found == [
        {"exact_match": 1, "contains": 1},
        {"exact_match": 0, "contains": 1},
        {"exact_match": 0, "contains": 0},
    ]
    assert means(found) == {"exact_match": pytest.approx(1 / 3), "contains": pytest.approx(2 / 3)}
    assert means([]) == {}


def mine(tmp_path: Path, body: str) -> str:
    (tmp_path / "mine.py").write_text(body)
    return f"{tmp_path}/mine.py"


def test_a_users_function_with_and_without_the_row(tmp_path: Path) -> None:
    file = mine(
        tmp_path,
        "def two(answer, reference):\n    return answer[:1] == reference[:1]\n"
        "def three(answer, reference, row):\n    return len(answer) / row['best']\n"
        "def more(answer, reference, row=None, scale=2):\n    return scale * bool(row)\n",
    )
    found = load_metrics(f"{file}:two,{file}:three, exact_match,{file}:more")
    assert list(found) == ["two", "three", "exact_match", "more"]
    (values,) = score(found, ["ab"], ["ax"], [{"best": 8}], ["row 1"])
    assert values == {"two": 1.0, "three": 0.25, "exact_match": 0.0, "more": 2.0}
    assert all(type(value) is float for value in values.values())


@pytest.mark.parametrize(
    ("names", "code"),
    [
        ("exact", "unknown_metric"),
        ("exact_match,exact_match", "metric_twice"),
        ("", "unknown_metric"),
        ("{file}:answer", "metric_name_taken"),
        ("exact_match,{file}:eval_loss", "metric_name_taken"),
        ("none.py:fn", "function_file_missing"),
        ("{file}:absent", "function_missing"),
        ("{file}:one", "metric_arguments"),
    ],
)
def test_wrong_names_say_what_to_do(names: str, code: str, tmp_path: Path) -> None:
    file = mine(tmp_path, "def one(answer):\n    return 1\n")
    with pytest.raises(InputError) as error:
        load_metrics(names.format(file=file))
    assert error.value.code == code
    assert error.value.where == "--metric"
    assert error.value.fix


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("return 1 / 0", "metric_fails"),
        ("return 'good'", "metric_no_number"),
        ("return None", "metric_no_number"),
        ("return float('nan')", "metric_no_number"),
        ("return 10**400", "metric_no_number"),
        ("import numpy; return numpy.ones(2)", "metric_no_number"),
        ("import torch; return torch.ones(2)", "metric_no_number"),
    ],
)
def test_a_function_that_fails_names_the_row(body: str, code: str, tmp_path: Path) -> None:
    file = mine(tmp_path, f"def fn(answer, reference):\n    {body}\n")
    with pytest.raises(InputError, match=r"rows\.jsonl:7") as error:
        score(load_metrics(f"{file}:fn"), ["a"], ["b"], [{}], ["rows.jsonl:7"])
    assert error.value.code == code


def test_a_file_that_cannot_be_imported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="NameError") as error:
        load_metrics(mine(tmp_path, "nonsense\n") + ":fn")
    assert error.value.code == "function_file_fails"
