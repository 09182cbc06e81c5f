import pytest

import glasstune
from glasstune.core.config import Config
from glasstune.core.errors import InputError


def test_unknown_names_are_ordinary_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        glasstune.nonsense  # noqa: B018


@pytest.mark.parametrize("name", sorted(set(glasstune.__all__) - {"__version__"}))
def test_every_export_loads(name):
    assert getattr(glasstune, name) is not None
    assert name in dir(glasstune)


def test_train_takes_a_mapping_with_rows_and_a_config(tiny_llama, tmp_path, quiet):
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(40)]
    mapping = {
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "data": {"sources": [{"path": rows}], "max_length": 64},
        "training": {"output_dir": str(tmp_path / "run"), "max_steps": 1},
    }
    record = glasstune.train(mapping, ["training.seed=5"], dry_run=True, progress=quiet)
    assert record.updates == 1
    assert record.data.rows == 40
    config = glasstune.load_config(None, [], model=str(tiny_llama), data="absent.json").config
    assert isinstance(config, Config)
    with pytest.raises(InputError, match="absent"):
        glasstune.train(config, dry_run=True, progress=quiet)
    with pytest.raises(TypeError, match="overrides"):
        glasstune.train(config, ["training.seed=1"])


def test_load_model_gives_a_plain_model_and_its_tokenizer(tiny_llama):
    model, tokenizer = glasstune.load_model(str(tiny_llama), dtype="float32")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer("hello")["input_ids"]
    with pytest.raises(InputError, match="bitz"):
        glasstune.load_model(str(tiny_llama), bitz=4)
