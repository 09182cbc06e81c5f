"""The mask that is shown against the batch that is trained and against the raw rows."""

from __future__ import annotations

import io

import numpy as np
import pytest
from chat_tokenizers import trained_text
from preparing import BASE, CHATML, alpaca, prepare
from rich.console import Console

from glasstune.core.mask import ShownDocument, ShownRow, ShownToken, ShownTurn
from glasstune.data.mask import show_rows, token_texts
from glasstune.reports.mask_text import print_rows


def test_states_of_a_pack_follow_the_template() -> None:
    data = prepare(alpaca(3), max_length=256)
    (row,) = show_rows(data, 5)
    assert len(row.documents) == 3
    assert row.documents[0].start == 0
    assert [d.start for d in row.documents[1:]] == [d.end for d in row.documents[:-1]]
    for document in row.documents:
        number = int(document.origin[5])
        own = row.tokens[document.start : document.end]
        trained = "".join(token.text for token in own if token.state == "trained")
        assert trained == f"Because {number}.<|im_end|>"
        assert document.trained == sum(token.state == "trained" for token in own)
        text = "".join(token.text for token in own)
        assert text == (
            f"<|im_start|>user\nwhy {number}?<|im_end|>\n"
            f"<|im_start|>assistant\nBecause {number}.<|im_end|>\n"
        )
        special = [token.text for token in own if token.state == "special"]
        assert special == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
        assert [t.text for t in own if t.special] == [*special, "<|im_end|>"]
    rest = row.tokens[row.documents[-1].end :]
    assert {token.state for token in rest} <= {"padding"}
    assert len(row.tokens) % 8 == 0


def test_rows_come_in_the_order_of_the_first_epoch() -> None:
    data = prepare(alpaca(40), max_length=64, seed=5)
    shown = show_rows(data, 4)
    assert [row.row for row in shown] == data.train.order(5, 0)[:4].tolist()
    batch = data.train.micro_batch([shown[0].row], 0, 0)
    assert [token.id for token in shown[0].tokens][: batch.tokens] == (
        batch.input_ids[0, : batch.tokens].tolist()
    )
    trained = [token.state == "trained" for token in shown[0].tokens]
    assert np.flatnonzero(batch.targets[0] != -100).tolist() == [
        k - 1 for k, yes in enumerate(trained) if yes
    ]


def test_baichuan2_shows_what_is_trained_instead() -> None:
    rows = [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}] * 2}]
    markers = {"user": 195, "assistant": 196}
    data = prepare([{"path": rows, "format": "baichuan2"}], BASE, markers=markers, packing=False)
    (row,) = show_rows(data, 1)
    instead = [(k, token.instead) for k, token in enumerate(row.tokens) if token.instead]
    second = [token.id for token in row.tokens].index(195, 1)
    assert instead == [(second, "</s>")]
    assert trained_text(BASE, data.train.documents[0].labels).count("</s>") == 3
    assert row.documents[0].trained == data.train.documents[0].trained_tokens


@pytest.mark.parametrize("text", ["Was für ein Ωhm: 二十 😀!", "  a\n\n b", "", "plain words"])
@pytest.mark.parametrize("tokenizer", [CHATML, BASE])
def test_token_texts_join_to_the_text(text: str, tokenizer: object) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    texts = token_texts(tokenizer, ids)  # type: ignore[arg-type]
    assert len(texts) == len(ids)
    assert "".join(texts) == text


def test_a_character_stands_at_the_token_that_completes_it() -> None:
    ids = CHATML("二", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    assert token_texts(CHATML, ids) == ["", "", "二"]
    assert token_texts(CHATML, ids[:2]) == ["", "\ufffd"]


def test_printed_rows_need_no_colour() -> None:
    tokens = (
        ShownToken("<s>", 1, "special", True),
        ShownToken("a\n", 2, "context"),
        ShownToken("b", 3, "trained"),
        ShownToken("c", 4, "trained", False, "</s>"),
        ShownToken("<s>", 1, "special", True),
        ShownToken("d", 5, "trained"),
        ShownToken("<s>", 1, "padding", True),
    )
    told = (ShownTurn("user", 0, 2), ShownTurn("assistant", 2, 4))
    documents = (
        ShownDocument("x.json:1", "x", 0, 4, 2, told),
        ShownDocument("x.json:2", "x", 4, 6, 1),
    )
    stream = io.StringIO()
    print_rows([ShownRow(7, tokens, documents)], Console(file=stream, width=100))
    assert stream.getvalue().splitlines() == [
        "row 7: 2 documents, 6 tokens, 3 trained",
        "  x.json:1 (x): positions 0 to 3, 2 trained",
        "   turn 0 user",
        "    special * <s>",
        r"    context . a\n",
        "   turn 1 assistant",
        "    trained + b│c => </s>",
        "  x.json:2 (x): positions 4 to 5, 1 trained",
        "    special * <s>",
        "    trained + d",
        "    padding _ 1 positions",
        "",
    ]
    coloured = io.StringIO()
    print_rows([ShownRow(7, tokens, documents)], Console(file=coloured, force_terminal=True))
    assert "\x1b[1;32mb" in coloured.getvalue()
