"""`glasstune config`: the defaults as commented YAML, or the JSON Schema."""

from __future__ import annotations

import json
from typing import Any, Literal

from glasstune.core.config_fields import defaults_yaml, schema
from glasstune.core.yaml_text import parse_yaml


def config_text(which: Literal["defaults", "schema"]) -> tuple[str, dict[str, Any]]:
    """Returns what `glasstune config` prints, and the same as a record."""
    if which == "schema":
        record = schema()
        return json.dumps(record, indent=2, ensure_ascii=False) + "\n", record
    text = defaults_yaml()
    return text, dict(parse_yaml(text, "defaults").value)
