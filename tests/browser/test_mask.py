"""The page of a data check in Chromium: tokens are drawn, told, folded away, by mouse and keys."""

from __future__ import annotations

from typing import Any

import pytest
from masks import HOSTILE, by_hand, hand_record, real

from browser import Page
from glasstune.reports.mask_page import mask_page

RIGHT, LEFT, DOWN, UP, HOME, END = "\ue014", "\ue012", "\ue015", "\ue013", "\ue011", "\ue010"


@pytest.fixture(scope="module")
def html() -> str:
    """A row made by hand, then real ones."""
    return mask_page(hand_record(), [by_hand(), *real()[1]])


def tokens(page: Page, row: int = 0) -> list[Any]:
    """[text, classes] of every token that is drawn, as JavaScript sees them."""
    found: list[Any] = page.run(
        "return [...document.querySelectorAll('.row')[arguments[0]].querySelectorAll('.tokens .t')]"
        ".filter(t => t.getClientRects().length).map(t => [t.textContent, t.className])",
        row,
    )
    return found


def states(page: Page, row: int = 0) -> list[str]:
    return [classes.split()[1] for _, classes in tokens(page, row)]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_opens_readable(page: Page, html: str, width: int, dark: bool) -> None:
    page.open(html, width=width, dark=dark)
    page.one("#rows-unfold").click()
    page.until("document.querySelectorAll('.row .body:not(:empty)').length === 4")
    page.screenshot(f"mask-{width}-{'dark' if dark else 'light'}")
    assert page.overflow() <= 0
    assert page.contrast(
        "h1, h2, h3, h4, h4 span, p, th, td, small, code, dd, dt, label, button, summary, li, .t,"
        ".title, .tell, .instead, .odd, .ws"
    ) >= 4.5  # fmt: skip
    # The trained tint is a picture to the browser, so its contrast is worked out here.
    tint = page.run(
        "return getComputedStyle(document.documentElement).getPropertyValue('--trained')"
    )
    page.run("document.body.style.background = arguments[0]", tint)
    page.run("document.querySelectorAll('.row').forEach(r => r.style.background = 'none')")
    assert page.contrast(".tokens .t.trained, .tokens .t.trained .ws") >= 4.5


def test_every_token_of_the_record_stands_there_with_its_state(page: Page, html: str) -> None:
    page.open(html)
    page.one("#rows-unfold").click()
    page.until("document.querySelectorAll('.row .body:not(:empty)').length === 4")
    for number, row in enumerate(real()[1], start=1):
        real_tokens = [token for token in row["tokens"] if token["state"] != "padding"]
        padding = len(row["tokens"]) - len(real_tokens)
        wanted = [token["state"] for token in real_tokens] + ["padding"] * bool(padding)
        assert states(page, number) == wanted
        for (text, _), token in zip(tokens(page, number), real_tokens, strict=False):
            assert text.replace("\u21b5\n", "\n").replace("\u00b7", " ") == token["text"]
        heads = page.run(
            "return [...document.querySelectorAll('.row')[arguments[0]].querySelectorAll('h4')]"
            ".map(h => h.textContent)",
            number,
        )
        for index, document in enumerate(row["documents"]):
            assert heads[index].startswith(f"Document {index + 1}")
            size = document["end"] - document["start"]
            assert f"{size} tokens, {document['trained']} trained" in heads[index]


def test_whitespace_and_control_characters_can_be_seen(page: Page, html: str) -> None:
    page.open(html)
    shown = dict(tokens(page))
    assert "\u21b5\n" in shown
    assert "\u00b7\u00b7" in shown, "two blanks"
    assert "\u2192" in shown, "a tab"
    assert "\u25ab" in shown, "a part of a character"
    assert "aU+202Eb" in shown, "it would turn the text around"
    assert " sp" in shown[" Hello"]
    dot = "return getComputedStyle(document.querySelector('.tokens .sp'), '::before').content"
    assert page.run(dot) == '"\u00b7"'
    assert "<user></s>" in shown, "what is trained in its place"
    assert page.texts(".tokens .instead") == ["</s>"]


def test_a_state_is_told_by_more_than_colour(page: Page, html: str) -> None:
    page.open(html)
    styles = page.run(
        "return ['trained', 'context', 'special', 'padding'].map(name => {"
        "const s = getComputedStyle(document.querySelector('.tokens .t.' + name));"
        "return [s.borderTopStyle, s.backgroundImage.replace(/rgb[^)]*[)]/g, ''), s.backgroundSize]"
        ".join('|')})"
    )
    assert len(set(styles)) == 4, "without colours they still differ"
    assert "dashed" in styles[2]
    assert "dotted" in styles[3]
    for sign, name in zip("+.*_", ("trained", "context", "special", "padding"), strict=True):
        assert any(text.startswith(f"{name} {sign}") for text in page.texts(".key li"))


def told(page: Page) -> str:
    return str(page.run("return document.getElementById('tell').textContent"))


def test_pointing_tells_id_state_and_place(page: Page, html: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    page.open(html)
    hello = next(each for each in page.all(".tokens .t") if each.text.strip() == "Hello")
    ActionChains(page.driver).move_to_element(hello).perform()
    assert told(page) == (
        "\u201c Hello\u201d \u00b7 id 13 \u00b7 trained + \u00b7 position 4 \u00b7 "
        "document 1, its token 4"
    )
    bar = page.one("#tell").rect
    view = page.run("return [scrollY, innerHeight]")
    assert view[0] <= bar["y"] <= view[0] + view[1], "the words are in sight"


@pytest.mark.parametrize("width", [400, 1280])
def test_each_turn_stands_under_its_role(page: Page, html: str, width: int) -> None:
    page.open(html, width=width)
    page.one("#rows-unfold").click()
    page.until("document.querySelectorAll('.row .body:not(:empty)').length === 4")
    found = page.run(
        "return [...document.querySelectorAll('.row')[1].querySelectorAll('.turn')].map(t => "
        "[t.querySelector('h5 b').textContent, [...t.querySelectorAll('.tokens .t')].map("
        "each => each.textContent).join('')])"
    )
    row = real()[1][0]
    wanted = [turn for document in row["documents"] for turn in document["turns"]]
    assert [role for role, _ in found] == [turn["role"] for turn in wanted]
    for (role, text), turn in zip(found, wanted, strict=True):
        assert role in ("user", "assistant")
        assert text.replace("\u21b5\n", "\n").replace("\u00b7", " ") == "".join(
            token["text"] for token in row["tokens"][turn["start"] : turn["end"]]
        )
    page.run("document.querySelectorAll('.row')[1].querySelectorAll('.turn .t')[0].focus()")
    assert told(page).endswith("\u00b7 turn 0, user")
    beside = page.run(
        "const [h, p] = document.querySelector('.turn').children;"
        "return h.getBoundingClientRect().right <= p.getBoundingClientRect().left"
    )
    assert beside is (width == 1280)


def test_arrow_keys_go_from_token_to_token(page: Page, html: str) -> None:
    page.open(html)
    page.run("document.querySelector('.tokens .t').focus()")
    assert told(page).startswith("\u201c<s>\u201d \u00b7 id 1 \u00b7 special * (control token)")
    page.keys(RIGHT)
    assert "id 10" in told(page)
    page.keys(LEFT, DOWN)
    assert "id 13" in told(page), "below the line break"
    page.keys(UP)
    assert "position 0" in told(page)
    page.keys(END)
    assert "padding _" in told(page)
    assert "positions 13 to 17" in told(page)
    page.keys(LEFT)
    assert "id 19" in told(page)
    assert "document 2, its token 2" in told(page)
    page.keys(LEFT, LEFT)
    assert "trained here: \u201c</s>\u201d" in told(page)
    page.keys(HOME)
    assert "position 0" in told(page)
    assert page.run("return document.getElementById('live').textContent") == told(page)
    assert page.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    # One token a document is in the order of Tab.
    stops = "return document.querySelector('.row').querySelectorAll('.t[tabindex=\"0\"]').length"
    assert page.run(stops) == 3


def test_only_what_is_trained(page: Page, html: str) -> None:
    page.open(html)
    page.one("#only-trained").click()
    assert set(states(page)) == {"trained"}
    assert len(states(page)) == 8
    gaps = page.texts(".row[open] .gap")
    assert gaps == [f"\u22ef {n} not trained \u22ef" for n in (4, 1, 5)]
    page.one("#only-trained").click()
    assert set(states(page)) == {"trained", "context", "special", "padding"}
    assert page.all(".gap") == []


def test_rows_are_drawn_when_they_are_unfolded(page: Page, html: str) -> None:
    page.open(html)
    drawn = "return [...document.querySelectorAll('.row .body')].map(b => b.childElementCount > 0)"
    assert page.run(drawn) == [True, False, False, False]
    page.all(".row summary")[2].click()
    page.until("document.querySelectorAll('.row .body:not(:empty)').length === 2")
    assert page.run(drawn) == [True, False, True, False]
    page.one("#rows-fold").click()
    assert page.all(".tokens") == []


def test_a_row_of_8192_tokens_stays_quick(page: Page) -> None:
    row = by_hand()
    word = {"text": " word", "id": 7, "state": "context", "special": False, "instead": None}
    row["tokens"] = [word | {"state": ("trained", "context")[k // 30 % 2]} for k in range(8192)]
    row["documents"] = [
        {"origin": "a", "source": "b", "start": k, "end": k + 2048, "trained": 1024}
        for k in range(0, 8192, 2048)
    ]
    page.open(mask_page(hand_record(), [row]), width=400)
    assert page.run("return document.querySelectorAll('.tokens .t').length") == 8192
    assert page.overflow() <= 0
    page.run("document.querySelector('.tokens .t').focus()")
    spent = page.run(
        "const start = performance.now();"
        "const press = (key) => document.activeElement.dispatchEvent("
        "new KeyboardEvent('keydown', {key, bubbles: true, cancelable: true}));"
        "for (let k = 0; k < 5; k += 1) { press('ArrowRight'); press('ArrowDown'); }"
        "window.reached = document.activeElement.place[1];"
        "document.getElementById('only-trained').click();"
        "document.body.getBoundingClientRect();"
        "return performance.now() - start;"
    )
    assert spent < 3000
    assert page.run("return window.reached") > 10


def test_hostile_text_is_inert(page: Page) -> None:
    record = hand_record(by_source={HOSTILE: dict.fromkeys(
        ("rows", "kept", "tokens", "trained_tokens"), 1)})  # fmt: skip
    page.open(mask_page(record, [by_hand()]))
    page.run("document.querySelectorAll('.tokens .t')[11].focus()")
    assert HOSTILE in told(page)
    assert page.one("h1").text == HOSTILE
    assert page.run("return document.images.length") == 0
    assert page.run("return document.title").startswith(HOSTILE)


def test_without_rows(page: Page) -> None:
    page.open(mask_page(hand_record()))
    assert "No rows are shown" in page.one("#rows").text
    assert not page.all("#only-trained")
