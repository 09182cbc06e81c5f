"""Texts on which a merged model is compared: some of everything that a model may be asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

GENERIC = (
    "The capital of France is Paris, and the river that runs through it is called the",
    "Once upon a time there was a small village at the edge of a dark forest, where",
    "Q: A train travels 180 km in 2.5 hours. What is its mean speed?\nA: The mean speed is",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
    '{"name": "Ada Lovelace", "born": 1815, "fields": ["mathematics", "computing"], "cited":',
    "SELECT customer, SUM(amount) FROM orders WHERE year = 2024 GROUP BY customer ORDER BY",
    "Die Bundesrepublik Deutschland besteht aus sechzehn Ländern, von denen das größte",
    "La photosynthèse est le processus par lequel les plantes transforment la lumière en",
    "El agua hierve a cien grados Celsius al nivel del mar, pero en la montaña",
    "水在标准大气压下的沸点是一百摄氏度，冰点是零摄氏度。请解释为什么",
    "日本で一番高い山は富士山です。その高さは",
    "Москва является столицей России, а самый большой город Сибири называется",
    "الماء يتكون من ذرتين من الهيدروجين وذرة واحدة من",
    "भारत की राजधानी नई दिल्ली है और सबसे लंबी नदी",
)
"""Starts of texts in ten languages, code, data and arithmetic."""

GENERIC_TOKENS = 48
"""Longest generic prompt."""

HELD_OUT_ROWS = 8
HELD_OUT_TOKENS = 128
"""Of a run's validation rows: the first ones, cut there."""


@dataclass(frozen=True)
class Prompts:
    """Token ids.

    Args:
        held_out: Rows that the run did not train on.
        generic: `GENERIC` in the model's tokens.
    """

    held_out: list[list[int]] = field(default_factory=list)
    generic: list[list[int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(map(len, [*self.held_out, *self.generic]))


def random_prompts(vocabulary: int, longest: int) -> list[list[int]]:
    """Returns ids that stand for the texts where there is no tokenizer; always the same ones."""
    draw = Random(0)
    length = max(1, min(24, longest))
    return [[draw.randrange(vocabulary) for _ in range(length)] for _ in GENERIC]
