"""Marks that let packed layers ask for float8 products."""

from __future__ import annotations

from typing import Any

import pytest
from families import family_model
from speeding import quantize, wide_enough
from torch import nn

from glasstune.core.errors import InputError
from glasstune.kernels.int8_linear import Int8Linear
from glasstune.models.fp8 import mark_fp8


def packed(bits: int) -> Any:
    model = family_model("llama", **wide_enough("llama"))
    quantize(model, bits)
    return model


def marks(model: Any) -> list[str]:
    return [p for p, m in model.named_modules() if getattr(m, "_glasstune_fp8", False)]


@pytest.mark.parametrize("bits", [4, 8])
def test_every_packed_layer_and_no_other(bits) -> None:
    model = packed(bits)
    done = mark_fp8(model)
    assert done == marks(model)
    assert len(done) == 7 * model.config.num_hidden_layers
    assert "lm_head" not in done


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_kept_by_path_ending_or_glob(bits) -> None:
    model = packed(bits)
    mark_fp8(model)  # marks are set anew
    done = mark_fp8(model, ["model.layers.0.*", "down_proj"])
    assert done == marks(model)
    ends = {path.rsplit(".", 1)[-1] for path in done}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    assert all(path.startswith("model.layers.1.") for path in done)


def test_16_bit_layers_have_none() -> None:
    assert mark_fp8(family_model("llama")) == []


def test_widths_that_tensor_cores_do_not_take_are_refused() -> None:
    model = nn.Sequential(Int8Linear(24, 32), Int8Linear(32, 32))
    with pytest.raises(InputError) as caught:
        mark_fp8(model)
    assert caught.value.code == "bad_weights"
    assert caught.value.where == "0.weight"
    assert mark_fp8(model, ["0"]) == ["1"]
