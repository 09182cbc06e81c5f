"""Adapters that go on, share memory or start in a special way, through the whole road."""

from __future__ import annotations

import pytest
import torch
from runs import QuietProgress, adapter_weights, tiny_run
from tiny import save_tiny_model

from glasstune.core.config_load import load_config
from glasstune.core.errors import InputError
from glasstune.workflows.train import train


@pytest.fixture(scope="module")
def start(tiny_llama, qa_file, tmp_path_factory):
    """A run of two updates whose adapter has rank 4."""
    output = tmp_path_factory.mktemp("start") / "run"
    train(
        tiny_run(tiny_llama, qa_file, output, training={"max_steps": 2}), progress=QuietProgress()
    )
    return output / "adapter"


def onward(tiny_llama, qa_file, output, folder, **adapter):
    config = tiny_run(tiny_llama, qa_file, output, training={"max_steps": 1})
    return config.model_copy(
        update={"adapter": type(config.adapter)(path=str(folder), **adapter)}, deep=True
    )


def test_a_saved_adapter_keeps_its_options_and_the_config_says_them(
    tiny_llama, qa_file, tmp_path, quiet, start
) -> None:
    output = tmp_path / "run"
    config = onward(tiny_llama, qa_file, output, start, target_modules="all-linear")
    train(config, progress=quiet)
    written = load_config(output / "config.yaml").config
    assert (written.adapter.r, written.adapter.lora_alpha) == (4, 8)
    assert any("q_proj" in name for name in written.adapter.target_modules)
    train(written, overwrite=True, progress=quiet)  # what was written runs again


@pytest.mark.parametrize(
    "other", [{"r": 8}, {"lora_dropout": 0.1}, {"target_modules": ["q_proj"]}, {"use_dora": True}]
)
def test_other_options_beside_a_saved_adapter_are_refused(
    tiny_llama, qa_file, tmp_path, quiet, start, other
) -> None:
    config = onward(tiny_llama, qa_file, tmp_path / "run", start, **other)
    with pytest.raises(InputError) as caught:
        train(config, progress=quiet)
    assert caught.value.code == "contradiction"
    assert caught.value.where == f"adapter.{next(iter(other))}"


def test_saved_modules_that_share_their_weight_are_saved(qa_file, tmp_path, quiet) -> None:
    """What the finding of tied weights advises must run."""
    model = save_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    config = tiny_run(
        model, qa_file, tmp_path / "run", training={"max_steps": 2},
        adapter={"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    )  # fmt: skip
    train(config, progress=quiet)
    weights = adapter_weights(tmp_path / "run" / "adapter")
    head = weights["base_model.model.lm_head.weight"]
    assert torch.equal(head, weights["base_model.model.model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("adapter", "code"),
    [
        ({"init_lora_weights": "eva"}, "not_built"),
        ({"target_modules": [], "target_parameters": ["q_poj.weight"]}, "module_not_found"),
    ],
)
def test_options_that_peft_would_pass_over_are_refused(
    tiny_llama, qa_file, tmp_path, quiet, adapter, code
) -> None:
    with pytest.raises(InputError) as caught:
        train(tiny_run(tiny_llama, qa_file, tmp_path / "run", adapter=adapter), progress=quiet)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("section", "values", "where"),
    [
        ("training", {"compute": "bf16"}, "training.compute"),
        ("training", {"max_memory": "lots"}, "training.max_memory"),
        ("training", {"save_strategy": "epoch", "save_steps": 5}, "training.save_steps"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(
    tiny_llama, qa_file, tmp_path, quiet, section, values, where
) -> None:
    config = tiny_run(tiny_llama, qa_file, tmp_path / "run", **{section: values})
    with pytest.raises(InputError) as caught:
        train(config, progress=quiet)
    assert caught.value.where.startswith(where)


def test_a_max_memory_that_nothing_fits_is_refused(tiny_llama, qa_file, tmp_path, quiet) -> None:
    config = tiny_run(
        tiny_llama, qa_file, tmp_path / "run", training={"max_steps": 1, "max_memory": "1MiB"}
    )  # fmt: skip
    with pytest.raises(InputError, match=r"needs .* and 1\.0 MiB may be used"):
        train(config, progress=quiet)
    assert not (tmp_path / "run" / "adapter").exists()
