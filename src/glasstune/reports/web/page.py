"""One self-contained HTML file from a record: the frame that every page shares.

A page is a template that extends `base.html.j2`, a mapping of data for its scripts, and nothing
else: no file beside it, no request, no library. To build one::

    html = render_page(
        "inspect.html.j2",
        kind="inspect",                 # the small word beside the name Glasstune
        title="bloom-2b6",              # heading of the page
        findings=[...],                 # contract findings; shown on top, worst first. A finding
                                        # may carry "labels": ["4 bit", ...] (what it belongs to)
        data={...},                     # JSON for scripts: `glasstune.data`
        styles=("inspect.css",),        # files of this folder, after style.css
        scripts=("inspect.js",),        # files of this folder, after script.js
        context={"record": record},     # names for the template
    )

Blocks of `base.html.j2`: `lead` (below the heading), `content` (sections). Macros for templates
are in `parts.html.j2` (`section`, `facts`, `bar`, `finding_list`, `scroll_table`). Filters:
`size` (decimal bytes), `count`, `commas`, `percent`, `shape`.

What holds the page safe: autoescape; data as JSON without `<`, `>` and `&`; a policy that allows
the very styles and scripts of the page by their hash and nothing from anywhere. So a template
must not use `style="..."`, `onclick="..."` and the like (the browser would refuse them): widths
are SVG attributes, events are set by the scripts. The scripts build elements with
`glasstune.el(...)`, which sets text and attributes and never parses HTML.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from glasstune import __version__
from glasstune.core.files import dump_json
from glasstune.reports.findings import worst_first
from glasstune.reports.numbers import count_text, percent_text, shape_text, size_text

Json = Mapping[str, Any]


def render_page(
    template: str,
    *,
    kind: str,
    title: str,
    findings: Iterable[Json] = (),
    data: Any = None,
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
    context: Json | None = None,
    made: date | None = None,
) -> str:
    """Renders one page.

    Args:
        template: Name of a template in `templates/` that extends `base.html.j2`.
        kind: What the page shows (`inspect`, `gradients`, ...).
        title: Heading, as plain text.
        findings: Findings of the contract, worst are put first; `labels` of each is optional.
        data: Anything that JSON can hold, for the scripts; NaN and Inf become null.
        styles: Style files after `style.css`.
        scripts: Script files after `script.js`.
        context: Names for the template.
        made: Date in the footer; None for today (UTC).

    Returns:
        The HTML text.
    """
    style = _joined(("style.css", *styles))
    script = _joined(("script.js", *scripts))
    return _environment().get_template(template).render(
        **(context or {}),
        kind=kind,
        title=title,
        findings=worst_first(findings),
        policy=_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        data=script_json(data),
        version=__version__,
        made=(made or datetime.now(UTC).date()).isoformat(),
    )  # fmt: skip


def script_json(value: Any) -> Markup:
    """Serialises to JSON that may stand inside a `<script>` element.

    No `<`, `>` or `&` is left, so no name of a model can close the element or open a comment;
    the line separators that old engines took for line ends are escaped too.
    """
    text = dump_json(value)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _policy(style: str, script: str) -> str:
    """Returns the page's Content-Security-Policy: its own style and script, nothing else."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


@cache
def _joined(names: tuple[str, ...]) -> str:
    """Returns the text of files of this folder, one after the other, with plain line ends."""
    folder = files(__package__)
    texts = [folder.joinpath(name).read_text(encoding="utf-8") for name in names]
    # Browsers hash what their parser gives them, and that has no carriage return.
    text = "\n" + "\n".join(texts).replace("\r\n", "\n")
    lowered = text.lower()
    assert not any(mark in lowered for mark in ("</script", "</style", "<!--"))
    return text


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("glasstune.reports.web", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        size=size_text,
        count=count_text,
        commas=lambda count: f"{count:,}",
        percent=percent_text,
        shape=shape_text,
    )
    return environment
