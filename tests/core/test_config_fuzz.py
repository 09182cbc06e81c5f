"""Any text is a Config or an InputError, never another exception."""

import string

import yaml
from fuzz import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glasstune.core.config import Config
from glasstune.core.config_fields import known_keys
from glasstune.core.config_load import load_text
from glasstune.core.config_names import FLAT, FOREIGN
from glasstune.core.errors import InputError

KEYS = [path.rsplit(".", 1)[-1] for path in known_keys()] + sorted(FOREIGN) + sorted(FLAT)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["auto", "all", "none", "lora", "qlora", "1e-5", "bf16", "4", "a,b"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)
FAST = settings(
    max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def load(text, overrides=()):
    try:
        loaded = load_text(text, "f", overrides)
    except InputError as error:
        return error.message
    assert isinstance(loaded.config, Config)
    return None


@FAST
@given(st.text(alphabet=string.printable + "é\u2028\ufeff\x00", max_size=80))
def test_any_text(text):
    load(text)


@FAST
@given(st.dictionaries(st.sampled_from(KEYS), values, max_size=5))
def test_any_mapping_of_known_names(mapping):
    load(yaml.safe_dump({"model": {"path": "m"}, "data": {"sources": [{"path": "d"}]}, **mapping}))


@FAST
@given(
    st.lists(
        st.builds(
            "{}={}".format,
            st.lists(st.sampled_from([*KEYS, "0", "1", "x"]), min_size=1, max_size=4).map(".".join),
            st.one_of(st.text(max_size=12), values.map(str)),
        ),
        max_size=3,
    )
)
def test_any_overrides(overrides):
    load("model: {path: m}\ndata: {sources: [{path: d}]}", overrides)
