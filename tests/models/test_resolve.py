"""From a path to a config: folder, hub id, GGUF file, and everything that can be wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors
from tiny_gguf import write_tiny_gguf

from glasstune.core.choices import Choices
from glasstune.core.config import ModelConfig
from glasstune.core.errors import InputError
from glasstune.models import gguf, resolve
from glasstune.models.hub import hub_errors_explained
from glasstune.models.load import load_base
from glasstune.models.resolve import resolve_model


def hub_error(kind: type[Exception], status: int) -> Exception:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("the hub's own words", response=response)


def test_a_folder_and_its_config_file(tiny_llama):
    resolved = resolve_model(str(tiny_llama))
    assert resolved.kind == "folder"
    assert resolved.config.model_type == "llama"
    assert resolved.folder_or_id == str(tiny_llama)
    by_file = resolve_model(str(tiny_llama / "config.json"))
    assert by_file.fingerprint == resolved.fingerprint


def test_fingerprint_sees_weights_and_config_but_not_versions(tiny_llama, tmp_path):
    base = resolve_model(str(tiny_llama)).fingerprint
    copy = Path(shutil.copytree(tiny_llama, tmp_path / "copy"))
    assert resolve_model(str(copy)).fingerprint == base
    content = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**content, "transformers_version": "0"}))
    assert resolve_model(str(copy)).fingerprint == base
    (copy / "config.json").write_text(json.dumps({**content, "rms_norm_eps": 1e-3}))
    assert resolve_model(str(copy)).fingerprint != base
    (copy / "config.json").write_text(json.dumps(content))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert resolve_model(str(copy)).fingerprint != base


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            hub_error(errors.GatedRepoError, 403),
            "gated_model",
            ["https://huggingface.co/owner/name", "hf auth login", "licence"],
        ),
        (hub_error(errors.GatedRepoError, 401), "gated_model", ["401", "hf auth login"]),
        (hub_error(errors.RepositoryNotFoundError, 404), "model_not_found", ["spelling"]),
        (hub_error(errors.HfHubHTTPError, 401), "gated_model", ["hf auth login"]),
        (
            errors.LocalEntryNotFoundError("no connection"),
            "hub_unreachable",
            ["HF_ENDPOINT", "HF_HOME", "local folder"],
        ),
        (errors.OfflineModeIsEnabled("offline"), "hub_unreachable", ["HF_ENDPOINT", "offline"]),
        (ConnectionError("refused"), "hub_unreachable", ["HF_ENDPOINT"]),
        (errors.EntryNotFoundError("no config.json"), "not_a_model", ["config.json"]),
        (errors.HFValidationError("bad id"), "bad_model_id", ["path"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_hub_errors_say_what_to_do(error, code, words, monkeypatch):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(resolve, "hf_hub_download", refuse)
    with pytest.raises(InputError) as caught:
        resolve_model("owner/name")
    assert caught.value.code == code
    assert all(word in str(caught.value) for word in words)


def test_hub_errors_inside_an_oserror_are_found():
    """transformers wraps them, here at the weights of a gated model."""

    def refuse():
        raise OSError("a gated repo") from hub_error(errors.GatedRepoError, 403)

    with pytest.raises(InputError, match="licence"), hub_errors_explained("owner/name"):
        refuse()


def test_other_errors_pass_unchanged():
    with pytest.raises(ZeroDivisionError), hub_errors_explained("owner/name"):
        raise ZeroDivisionError


@pytest.mark.parametrize("path", ["./nothing", "/no/such/folder", "a/b/c", "model.gguf"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(path, monkeypatch):
    monkeypatch.setattr(resolve, "hf_hub_download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="does not exist") as caught:
        resolve_model(path)
    assert caught.value.code == "model_not_found"


def test_a_near_name_is_offered(tiny_llama):
    with pytest.raises(InputError) as caught:
        resolve_model(str(tiny_llama.parent / "lama"))
    assert "llama" in caught.value.fix


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        resolve_model(str(tmp_path))
    assert caught.value.code == "adapter_not_model"
    assert "adapter.path" in caught.value.fix
    other = tmp_path / "other"
    other.mkdir()
    (other / "q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError) as caught:
        resolve_model(str(other))
    assert "q4.gguf" in caught.value.fix


@pytest.mark.parametrize("text", ["{", "[1]", '{"model_type": "lama"}'])
def test_bad_configs(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError) as caught:
        resolve_model(str(tmp_path))
    assert caught.value.code in ("bad_model_config", "unknown_architecture")
    if "lama" in text:
        assert "llama" in str(caught.value)


def test_code_of_a_checkpoint_runs_only_when_trusted(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}})
    )
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import PreTrainedConfig\n"
        "class Config(PreTrainedConfig):\n    model_type = 'mine'\n"
    )
    with pytest.raises(InputError) as caught:
        resolve_model(str(tmp_path))
    assert caught.value.code == "remote_code_needed"
    assert "trust_remote_code" in caught.value.fix
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GLASSTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def test_gguf_is_expanded_once_and_loads_at_every_precision(cache, tmp_path, monkeypatch):
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    choices = Choices()
    resolved = resolve_model(str(file), choices=choices)
    assert resolved.kind == "gguf"
    assert choices.get("model.expanded") is not None
    folder = Path(resolved.folder_or_id)
    assert folder.parent == cache
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert (folder / "tokenizer.json").is_file()
    assert os.listdir(cache) == [folder.name]  # nothing half-written is left

    monkeypatch.setattr(gguf, "_convert", lambda *_: pytest.fail("expanded again"))
    again = resolve_model(str(file))
    assert again.fingerprint == resolved.fingerprint
    for bits in (16, 8, 4):
        config = ModelConfig(path=str(file), bits=bits, device="cpu")
        model = load_base(config, resolved, choices=Choices())
        logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
        assert torch.isfinite(logits).all()


def test_gguf_values_are_the_files_own(cache, tmp_path):
    import gguf as gguf_package

    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    resolved = resolve_model(str(file))
    model = load_base(
        ModelConfig(path=str(file), dtype="bfloat16", device="cpu"), resolved, choices=Choices()
    )
    tensors = {tensor.name: tensor.data for tensor in gguf_package.GGUFReader(str(file)).tensors}
    for name, parameter in (
        ("token_embd.weight", model.model.embed_tokens.weight),
        ("blk.0.ffn_down.weight", model.model.layers[0].mlp.down_proj.weight),
        ("blk.0.attn_v.weight", model.model.layers[0].self_attn.v_proj.weight),
    ):
        expected = torch.tensor(tensors[name]).bfloat16()
        assert torch.equal(parameter, expected), name


def test_a_gguf_that_fails_leaves_no_folder(cache, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match="GGUF"):
        resolve_model(str(bad))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(write_tiny_gguf(tmp_path / "tiny.gguf").read_bytes()[:3000])
    with pytest.raises(InputError) as caught:
        resolve_model(str(cut))
    assert caught.value.code == "bad_gguf"
    assert not cache.exists() or os.listdir(cache) == []


def test_a_run_folder_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="holds a run") as error:
        resolve_model(str(tmp_path))
    assert "adapter.path" in error.value.fix
