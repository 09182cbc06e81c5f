import pytest

from glasstune.core.errors import InputError
from glasstune.core.yaml_text import parse_yaml, plain_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.0e-5", 1e-5),
        ("2E4", 2e4),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("0x1F", 31),
        ("1_000", 1000),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("no", "no"),
        ("true", True),
        ("", None),
        ("~", None),
        ("1__0", "1__0"),
        ("1e", "1e"),
        ("9" * 6000, "9" * 6000),
    ],
)
def test_l01_plain_scalars_follow_yaml_12(text, value):
    read = plain_value(text)
    assert read == value
    assert type(read) is type(value)


def test_quoted_text_stays_text_and_tags_hold():
    assert parse_yaml("a: '1e-5'\nb: !!str 5\nc: !!float 3", "f").value == {
        "a": "1e-5",
        "b": "5",
        "c": 3.0,
    }


def test_lines_are_those_of_the_file():
    document = parse_yaml("# c\na:\n  - x: 1\n\n  - y: 2\n", "f.yaml")
    assert document.where(("a", 1, "y")) == "f.yaml:5"
    assert document.where(("a", 1, "absent")) == "f.yaml:5"
    assert document.where(("absent",)) == "f.yaml"


def test_merge_key_gives_way_to_own_keys():
    text = "base: &b {x: 1, y: 2}\nmine:\n  <<: *b\n  y: 3\n"
    assert parse_yaml(text, "f").value["mine"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("text", "code", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "duplicate_key", 3, "first in line 1"),
        ("a:\n  b: 1\n  b: 1\n", "duplicate_key", 3, "a.b"),
        ("a:\n\tb: 1\n", "yaml_syntax", 2, "tab"),
        ("a: [1\n", "yaml_syntax", 2, "expected"),
        ("a: b: c\n", "yaml_syntax", 1, "mapping values"),
        ("a: 1\n---\nb: 2\n", "yaml_syntax", 2, "another document"),
        ("a: *nowhere\n", "yaml_syntax", 1, "nowhere"),
        ("? [1, 2]\n: 3\n", "yaml_key", 1, "plain text"),
        ("a: !!python/object:os.system {}\n", "yaml_tag", 1, "not supported"),
        ("a: !!int x\n", "yaml_tag", 1, "does not fit"),
        ("&a [*a]\n", "yaml_too_deep", 1, "without end"),
    ],
)
def test_broken_text_names_its_line(text, code, line, words):
    with pytest.raises(InputError) as caught:
        parse_yaml(text, "f.yaml")
    assert caught.value.code == code
    assert caught.value.where == f"f.yaml:{line}"
    assert words in caught.value.message


def test_alias_bomb_and_depth_are_refused_quickly():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
    )
    for text in (bomb, "[" * 5000):
        with pytest.raises(InputError) as caught:
            parse_yaml(text, "f")
        assert caught.value.code == "yaml_too_deep"
