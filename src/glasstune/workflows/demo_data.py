"""A data set that every machine has: questions about Python, answered by its own documentation.

Docstrings of the standard library and the language reference that `pydoc` carries
(`pydoc_data.topics`) become question-answer pairs. The same Python gives the same rows in the
same order, whatever the hash seed, the platform's addresses or what was imported before.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glasstune.core.errors import InputError
from glasstune.data.write import write_rows

DemoFormat = Literal["alpaca", "conversations", "messages", "csv", "tsv", "parquet", "text"]

# Modules whose import does nothing but define names (no window, no browser, no poem), and that
# are in every build from 3.11 to 3.14. One that is missing all the same is passed over.
_MODULE_NAMES = """
abc argparse array ast asyncio base64 bdb binascii bisect builtins bz2 calendar cmath cmd code
codecs codeop collections collections.abc colorsys concurrent.futures configparser contextlib copy
copyreg csv dataclasses datetime decimal difflib dis doctest email.header email.message
email.policy email.utils enum fileinput filecmp fnmatch fractions ftplib functools gc getopt
getpass gettext glob graphlib gzip hashlib heapq hmac html html.parser http.client http.cookies
http.server imaplib importlib importlib.metadata importlib.resources inspect io ipaddress itertools
json keyword linecache locale logging logging.config logging.handlers lzma mailbox marshal math
mimetypes modulefinder multiprocessing netrc numbers operator optparse os os.path pathlib pdb pickle
pickletools pkgutil platform plistlib poplib pprint profile pstats py_compile pyclbr pydoc queue
quopri random re reprlib runpy sched secrets select selectors shelve shlex shutil signal smtplib
socket socketserver sqlite3 ssl stat statistics string stringprep struct subprocess symtable sys
sysconfig tabnanny tarfile tempfile textwrap threading time timeit token tokenize tomllib trace
traceback tracemalloc types typing unicodedata unittest unittest.mock urllib.error urllib.parse
urllib.request urllib.robotparser uuid venv warnings wave weakref webbrowser wsgiref.util
xml.dom.minidom xml.etree.ElementTree xml.sax xmlrpc.client zipapp zipfile zipimport zlib zoneinfo
"""
MODULES = tuple(_MODULE_NAMES.split())

# Addresses and file paths (a default such as `executable='/usr/bin/python3'`) differ by process
# and machine.
_OF_THIS_MACHINE = re.compile(r"0x[0-9a-fA-F]{6,}|<[^<>]* at |='(/|[A-Z]:)")
_SIGNATURE_LINE = re.compile(r"^[\w.]+\(.*\)(\s*(->|--|:|=).*)?$", re.DOTALL)
_SHORTEST, _LONGEST = 20, 700  # characters of an answer
_PARAGRAPHS = 4  # of one topic: later ones answer no question that a person would ask


@dataclass(frozen=True, slots=True)
class Pair:
    """A question and its answer.

    Args:
        name: What it is about, for example `math.gcd`; unique together with the question.
        question: What a person would ask.
        answer: The documentation's words.
    """

    name: str
    question: str
    answer: str


def demo_pairs() -> list[Pair]:
    """Makes all pairs, in a fixed order that mixes the subjects.

    Returns:
        Some thousand pairs; no question occurs twice.
    """
    pairs: dict[str, Pair] = {}
    answers: set[str] = set()
    for pair in (*_library(), *_topics()):
        if pair.question not in pairs and pair.answer not in answers:
            pairs[pair.question] = pair
            answers.add(pair.answer)
    return sorted(pairs.values(), key=lambda p: hashlib.sha256(p.question.encode()).digest())


def write_demo_data(
    folder: Path, format: DemoFormat = "alpaca", rows: int | None = None, skip: int = 0
) -> Path:
    """Writes the pairs to a file in one of the shapes that people train on.

    Args:
        folder: Where to write; made if it does not exist.
        format: `alpaca` and `conversations` (JSON arrays), `messages` and `text` (JSON lines),
            `csv`, `tsv` and `parquet` (columns `prompt` and `completion`).
        rows: How many rows; None = all.
        skip: Pairs to leave out at the start, for a file that shares none with another.

    Returns:
        The file.

    Raises:
        InputError: The format is unknown, or fewer rows exist than asked for.
    """
    shapes = {
        "alpaca": ("python_docs_alpaca.json", _alpaca),
        "conversations": ("python_docs_conversations.json", _conversations),
        "messages": ("python_docs_messages.jsonl", _messages),
        "text": ("python_docs_text.jsonl", _text),
        "csv": ("python_docs.csv", _prompt_completion),
        "tsv": ("python_docs.tsv", _prompt_completion),
        "parquet": ("python_docs.parquet", _prompt_completion),
    }
    if format not in shapes:
        raise InputError(
            "unknown_format", f"no demo data in {format!r}", fix="use one of " + ", ".join(shapes)
        )
    file_name, shape = shapes[format]
    made = shape(demo_pairs()[skip:])
    if rows is not None:
        if rows > len(made):
            raise InputError(
                "too_many_rows", f"{rows} rows asked for, this Python's documentation has "
                f"{len(made)}", fix=f"ask for at most {len(made)}"
            )  # fmt: skip
        made = made[:rows]
    folder.mkdir(parents=True, exist_ok=True)
    return write_rows(made, folder / file_name)


def _alpaca(pairs: list[Pair]) -> list[dict[str, Any]]:
    # Every third question is put as instruction and input, so that both parts are used.
    rows = []
    for index, pair in enumerate(pairs):
        about = index % 3 == 0
        rows.append({
            "instruction": "Answer this question about Python." if about else pair.question,
            "input": pair.question if about else "",
            "output": pair.answer,
        })  # fmt: skip
    return rows


def _conversations(pairs: list[Pair]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"python_docs_{index}",
            "conversations": [
                turn
                for pair in group
                for turn in (
                    {"from": "human", "value": pair.question},
                    {"from": "gpt", "value": pair.answer},
                )
            ],
        }
        for index, group in enumerate(_grouped(pairs))
    ]


def _messages(pairs: list[Pair]) -> list[dict[str, Any]]:
    rows = []
    for index, group in enumerate(_grouped(pairs)):
        messages = []
        if index % 4 == 0:
            messages.append({"role": "system", "content": "You know Python's documentation."})
        for pair in group:
            messages.append({"role": "user", "content": pair.question})
            messages.append({"role": "assistant", "content": pair.answer})
        rows.append({"messages": messages})
    return rows


def _prompt_completion(pairs: list[Pair]) -> list[dict[str, Any]]:
    return [{"prompt": pair.question, "completion": pair.answer} for pair in pairs]


def _text(pairs: list[Pair]) -> list[dict[str, Any]]:
    return [{"text": f"{pair.question}\n{pair.answer}"} for pair in pairs]


def _grouped(pairs: list[Pair]) -> Iterator[list[Pair]]:
    """Yields conversations: every third one has two turns."""
    position = index = 0
    while position < len(pairs):
        size = 2 if index % 3 == 2 else 1
        yield pairs[position : position + size]
        position, index = position + size, index + 1


def _library() -> Iterator[Pair]:
    for module_name in MODULES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(module_name)
        except ImportError:  # a build without, for example, sqlite3 or lzma
            continue
        yield from _of(module_name, module, f"What is Python's module `{module_name}` for?")
        for name in _public_names(module):
            value = inspect.getattr_static(module, name)
            if _belongs(value, module_name):
                yield from _of_member(f"{module_name}.{name}", value)


def _public_names(module: types.ModuleType) -> list[str]:
    exported = getattr(module, "__all__", None)
    names = exported if exported is not None else vars(module)
    return sorted(n for n in set(names) if not n.startswith("_") and n in vars(module))


def _belongs(value: Any, module_name: str) -> bool:
    """Whether the object is the module's own: a name imported from elsewhere is asked there."""
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return False
    home = str(getattr(value, "__module__", None) or module_name)
    first = module_name.split(".", maxsplit=1)[0]
    return home.split(".", maxsplit=1)[0].lstrip("_") in (first, "") or home in (
        module_name,
        "posixpath",
        "genericpath",
    )


def _of_member(name: str, value: Any) -> Iterator[Pair]:
    shown = name.removeprefix("builtins.")
    if not inspect.isclass(value):
        yield from _of(shown, value, f"What does Python's `{shown}` do?")
        yield from _signature(shown, value)
        return
    if issubclass(value, BaseException):
        yield from _of(shown, value, f"What does the Python exception `{shown}` mean?")
        return
    yield from _of(shown, value, f"What is Python's class `{shown}`?")
    for member in sorted(vars(value)):
        method = vars(value)[member]
        if member.startswith("_") or isinstance(method, types.DynamicClassAttribute):
            continue
        if inspect.isroutine(method) or isinstance(method, property):
            kind = "property" if isinstance(method, property) else "method"
            asked = f"What does the {kind} `{member}` of Python's `{shown}` do?"
            yield from _of(f"{shown}.{member}", method, asked)


def _of(name: str, value: Any, question: str) -> Iterator[Pair]:
    answer = _first_paragraph(getattr(value, "__doc__", None))
    if answer is not None:
        yield Pair(name, question, answer)


def _signature(name: str, value: Any) -> Iterator[Pair]:
    try:
        signature = str(inspect.signature(value))
    except (ValueError, TypeError):  # many functions in C have none
        return
    # A default shown as an object (`<...>`) depends on the process or says nothing.
    answer = f"Its signature is `{name.rpartition('.')[2]}{signature}`."
    if "<" not in signature and 2 < len(signature) < 200 and _usable(answer):
        yield Pair(name, f"How is Python's `{name}` called?", answer)


def _first_paragraph(text: Any) -> str | None:
    """Returns a docstring's first paragraph of words as one line, or None where none serves."""
    if not isinstance(text, str):
        return None
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        line = " ".join(paragraph.split())
        # C functions open with `name(arguments) -> result`; the words come after.
        lines = paragraph.strip().split("\n")
        if _SIGNATURE_LINE.match(lines[0].strip()) and len(lines) > 1:
            line = " ".join(" ".join(lines[1:]).split())
        elif _SIGNATURE_LINE.match(line):
            continue
        return line if _usable(line) else None
    return None


def _usable(answer: str) -> bool:
    return _SHORTEST <= len(answer) <= _LONGEST and not _OF_THIS_MACHINE.search(answer)


def _topics() -> Iterator[Pair]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship it apart
        return
    for key in sorted(topics):
        title, _, body = topics[key].strip().partition("\n")
        title = title.strip().replace('"', "`")
        for number, answer in enumerate(_prose(body)[:_PARAGRAPHS], start=1):
            asked = f'What does the Python reference say about "{title}"'
            yield Pair(key, f"{asked}?" if number == 1 else f"{asked}, part {number}?", answer)


def _prose(body: str) -> list[str]:
    """Returns the paragraphs that are whole sentences: no grammar, code, heading or list."""
    found = []
    for paragraph in body.split("\n\n"):
        answer = " ".join(paragraph.split()).replace('"', "`")
        plain = not paragraph.lstrip("\n").startswith((" ", "*", "=", "-", "~"))
        if plain and answer.endswith(".") and len(answer) >= 60 and _usable(answer):
            found.append(answer)
    return found
