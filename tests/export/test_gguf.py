"""GGUF files, read back by transformers and by hand."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_models import bpe_tokenizer, half_exact_model
from runs import QuietProgress

from glasstune.core.errors import InputError, RunError
from glasstune.export.gguf import pair_rows, write_gguf

IDS = torch.randint(0, 480, (2, 24), generator=torch.Generator().manual_seed(1))
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama one kv head, wide heads": {"head_dim": 32, "num_key_value_heads": 1},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen2 tied": {"tie_word_embeddings": True},
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return bpe_tokenizer("gpt-2")


def export(folder: Path, tokenizer: Any, family: str, *kinds: str, **overrides: Any) -> Any:
    """Returns (model, files, what was said)."""
    model = half_exact_model(folder, family, **overrides)
    tokenizer.save_pretrained(folder)
    said = QuietProgress()
    files = write_gguf(folder, kinds or ("f16",), said)
    return model, files, said.lines


def read_back(file: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    from glasstune.models.quiet import quiet_transformers

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, **options
        ).eval()


def tensors(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def values(file: Path) -> dict[str, np.ndarray]:
    return {
        name: gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for name, tensor in tensors(file).items()
    }


def metadata(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_back_the_same_model(name: str, tmp_path: Path, tokenizer: Any) -> None:
    """Weights that float16 holds exactly: the logits are equal, not near."""
    model, (file,), _ = export(tmp_path, tokenizer, name.split()[0], **FAMILIES[name])
    back = read_back(file)
    assert ("output.weight" in tensors(file)) == ("tied" not in name)
    assert back.config.tie_word_embeddings == ("tied" in name)
    with torch.no_grad():
        # The same float32 weights; only the order of sums may differ.
        torch.testing.assert_close(back(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6)


def test_rotary_pairs_by_hand() -> None:
    """One head of width 6 by hand: rows 0 3, 1 4, 2 5 become neighbours; two heads, each alone."""
    rows = np.arange(12)[:, None] * np.ones((1, 2))
    assert pair_rows(rows[:6], 1)[:, 0].tolist() == [0, 3, 1, 4, 2, 5]
    assert pair_rows(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert pair_rows(rows[:6, 0], 1).tolist() == [0, 3, 1, 4, 2, 5]


def test_rotary_pairs_of_large_tensors_keep_their_order_over_pieces(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in many pieces, each of whole heads, the file is the same byte for byte."""
    _, (file,), _ = export(tmp_path, tokenizer, "llama", "q8_0", head_dim=32)
    whole = file.read_bytes()
    monkeypatch.setattr("glasstune.export.gguf._PIECE", 64 * 5)
    (again,) = write_gguf(tmp_path, ["q8_0"])
    assert again.read_bytes() == whole


def test_biases_go_along(tmp_path: Path, tokenizer: Any) -> None:
    model, (file,), _ = export(tmp_path, tokenizer, "llama", attention_bias=True, mlp_bias=True)
    found, state = values(file), model.state_dict()
    block = "model.layers.1."
    for name, theirs in {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
                         "ffn_down": "mlp.down_proj", "ffn_up": "mlp.up_proj"}.items():  # fmt: skip
        want = state[f"{block}{theirs}.bias"].numpy()
        np.testing.assert_array_equal(found[f"blk.1.{name}.bias"], want)
    # Heads of 16: row i stands before row i + 8.
    heads = state[f"{block}self_attn.q_proj.bias"].numpy().reshape(4, 16)
    want = np.stack([heads[:, :8], heads[:, 8:]], axis=2).reshape(-1)
    np.testing.assert_array_equal(found["blk.1.attn_q.bias"], want)


def test_types_are_those_of_llama_cpp(tmp_path: Path, tokenizer: Any) -> None:
    """Norms in F32; a row of 100 values is no whole number of Q8_0 blocks and stays F16."""
    _, files, _ = export(tmp_path, tokenizer, "llama", "f16", "q8_0", intermediate_size=100)
    half, eight = map(tensors, files)
    for name, tensor in half.items():
        assert tensor.tensor_type.name == ("F32" if "norm" in name else "F16"), name
    for name, tensor in eight.items():
        want = "F32" if "norm" in name else "F16" if "ffn_down" in name else "Q8_0"
        assert tensor.tensor_type.name == want, name
    assert [metadata(file)["general.file_type"] for file in files] == [1, 7]


def quantise_by_hand(row: list[float]) -> list[float]:
    """One block of 32: scale = largest / 127 kept as float16, halves away from zero."""
    assert len(row) == 32
    scale = np.float32(max(abs(x) for x in row)) / np.float32(127)
    kept = float(np.float16(scale))
    out = []
    for x in row:
        ratio = float(np.float32(x) * (np.float32(1) / scale)) if scale else 0.0
        out.append(math.copysign(math.floor(abs(ratio) + 0.5), ratio) * kept)
    return out


def test_q8_0_equals_a_quantiser_written_by_hand(tmp_path: Path, tokenizer: Any) -> None:
    model, (file,), _ = export(tmp_path, tokenizer, "qwen2", "q8_0")
    found, state = values(file), model.state_dict()
    for name, theirs in {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
    }.items():
        weight = state[theirs].numpy()
        for row in (0, 7, len(weight) - 1):
            want = [
                value
                for at in range(0, weight.shape[1], 32)
                for value in quantise_by_hand(weight[row, at : at + 32].tolist())
            ]
            np.testing.assert_array_equal(found[name][row], np.array(want, np.float32))
    error = np.abs(found["token_embd.weight"] - state["model.embed_tokens.weight"].numpy())
    assert 0 < error.max() <= np.abs(found["token_embd.weight"]).max() / 254 * 1.01


def test_hyperparameters(tmp_path: Path, tokenizer: Any) -> None:
    _, (file,), _ = export(
        tmp_path, tokenizer, "llama", head_dim=32, rms_norm_eps=3e-6, max_position_embeddings=77,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0},
    )  # fmt: skip
    found = metadata(file)
    assert found["general.architecture"] == "llama"
    assert found["general.name"] == tmp_path.name
    expected = {
        "context_length": 77, "embedding_length": 64, "block_count": 2, "feed_forward_length": 128,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 32,
        "attention.value_length": 32, "rope.dimension_count": 32, "vocab_size": 512,
    }  # fmt: skip
    assert {key: found[f"llama.{key}"] for key in expected} == expected
    assert found["llama.rope.freq_base"] == 12345.0
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(3e-6)


def test_llama3_rope_is_a_tensor_of_divisors(tmp_path: Path, tokenizer: Any) -> None:
    """transformers' own frequencies with and without the rule; their ratio is the tensor."""
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    model, (file,), _ = export(
        tmp_path, tokenizer, "llama", head_dim=64, rope_parameters=rope,
        max_position_embeddings=512,
    )  # fmt: skip
    plain = 500000.0 ** -(torch.arange(0, 64, 2).float() / 64)
    want = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert len({round(float(x), 3) for x in want}) > 3, "all three cases of the rule occur"
    np.testing.assert_allclose(values(file)["rope_freqs.weight"], want, rtol=1e-5)
    assert "llama.rope.scaling.type" not in metadata(file)


def test_scaled_rope_is_written(tmp_path: Path, tokenizer: Any) -> None:
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    _, (file,), _ = export(tmp_path / "a", tokenizer, "llama", rope_parameters=rope)
    found = metadata(file)
    assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == ("linear", 4)
    rope = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "attention_factor": 1.5,
        "original_max_position_embeddings": 128, "beta_fast": 16.0,
    }  # fmt: skip
    _, (file,), _ = export(tmp_path / "b", tokenizer, "qwen2", rope_parameters=rope)
    found = metadata(file)
    assert found["qwen2.rope.scaling.type"] == "yarn"
    assert found["qwen2.rope.scaling.original_context_length"] == 128
    assert found["qwen2.rope.scaling.yarn_beta_fast"] == 16
    # llama.cpp multiplies by 0.1 ln 4 + 1 on its own.
    own = 0.1 * math.log(4) + 1
    assert found["qwen2.rope.scaling.attn_factor"] * own == pytest.approx(1.5)


def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    for number, (overrides, says) in enumerate(
        [({"hidden_act": "gelu"}, "hidden_act"), ({"rope_parameters": dynamic}, "rope_type")]
    ):
        folder = tmp_path / str(number)
        with pytest.raises(InputError, match=says):
            export(folder, tokenizer, "llama", **overrides)
        assert not list(folder.glob("*.gguf"))
    half_exact_model(tmp_path / "gpt2", "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match="family gpt2") as error:
        write_gguf(tmp_path / "gpt2", ["f16"])
    assert "llama, mistral, qwen2" in error.value.fix


def test_a_sliding_window_is_said(tmp_path: Path, tokenizer: Any) -> None:
    _, _, said = export(tmp_path, tokenizer, "mistral", sliding_window=64)
    assert any("last 64 only" in line for line in said)


def test_kinds_are_checked_first(tmp_path: Path) -> None:
    for kinds in (["q4_k"], []):
        with pytest.raises(InputError) as error:
            write_gguf(tmp_path, kinds)
        assert error.value.code == "bad_gguf_kind"


def test_a_value_that_float16_cannot_hold_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    model = half_exact_model(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 70000.0
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.weight holds 70000") as error:
        write_gguf(tmp_path, ["f16"])
    assert error.value.fix == "use q8_0"
    assert [path.name for path in tmp_path.iterdir() if "gguf" in path.name] == []
    write_gguf(tmp_path, ["q8_0"])


def test_a_folder_that_is_still_written_gives_its_future_name(
    tmp_path: Path, tokenizer: Any
) -> None:
    _, (file,), _ = export(tmp_path / ".mine-1.5.merge-x7_q", tokenizer, "llama")
    assert metadata(file)["general.name"] == "mine-1.5"


def test_lost_and_foreign_tensors_are_named(tmp_path: Path, tokenizer: Any) -> None:
    from safetensors.torch import load_file, save_file

    half_exact_model(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    lost = state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        write_gguf(tmp_path, ["f16"])
    state |= {"model.layers.1.mlp.up_proj.weight": lost, "model.extra.weight": lost.clone()}
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.extra\.weight"):
        write_gguf(tmp_path, ["f16"])


def test_shards_and_one_file_give_the_same_bytes(tmp_path: Path, tokenizer: Any) -> None:
    model = half_exact_model(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    for name in ("one", "many"):
        tokenizer.save_pretrained(tmp_path / name)
    one, many = (write_gguf(tmp_path / name, ["f16"], name="m")[0] for name in ("one", "many"))
    assert one.read_bytes() == many.read_bytes()
    next((tmp_path / "many").glob("*00002*")).unlink()
    with pytest.raises(InputError, match="index names"):
        write_gguf(tmp_path / "many", ["f16"])


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    half_exact_model(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("glasstune.export.gguf._encode", full)
    with pytest.raises(RunError) as error:
        write_gguf(tmp_path, ["f16"])
    assert error.value.code == "disk_full"
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_memory_is_that_of_a_piece(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No piece holds more values than the limit, and every byte read is counted."""
    half_exact_model(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    seen: list[int] = []
    from glasstune.export import gguf as module

    encode = module._encode
    monkeypatch.setattr(module, "_PIECE", 2048)
    monkeypatch.setattr(
        module, "_encode", lambda data, *rest: (seen.append(data.size), encode(data, *rest))[1]
    )
    write_gguf(tmp_path, ["f16"])
    assert max(seen) <= 2048
    assert sum(seen) == sum(
        int(np.prod(tensor.shape)) for tensor in tensors(tmp_path / "model-f16.gguf").values()
    )


def test_glasstune_reads_its_own_file(tmp_path: Path, tokenizer: Any) -> None:
    """The file opens like any other GGUF: expanded once, answering like the folder."""
    from glasstune.workflows.generate import generate

    _, (file,), _ = export(tmp_path / "m", tokenizer, "llama")
    apart = tmp_path / "alone"
    apart.mkdir()
    shutil.copy(file, apart / "model.gguf")
    options: dict[str, Any] = {"max_new_tokens": 8, "dtype": "float32"}
    want = generate(str(tmp_path / "m"), ["hello"], **options)
    assert generate(str(apart / "model.gguf"), ["hello"], **options) == want
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "llama"


def test_our_own_file_opens_with_its_template_and_special_tokens(
    tmp_path, tokenizer, monkeypatch
) -> None:
    """transformers reads neither out of a file with this kind of tokenizer."""
    from copy import deepcopy

    from transformers import AutoTokenizer

    from glasstune.models.gguf import expand_gguf

    monkeypatch.setenv("GLASSTUNE_CACHE", str(tmp_path / "cache"))
    talks = deepcopy(tokenizer)
    talks.eos_token = talks.pad_token = talks.convert_ids_to_tokens(5)
    talks.chat_template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    _, (file,), _ = export(tmp_path / "model", talks, "llama")
    again = AutoTokenizer.from_pretrained(expand_gguf(file))
    rows = [{"role": "user", "content": "a list"}]
    assert again.chat_template == talks.chat_template
    for name in ("eos_token", "pad_token", "bos_token"):
        assert getattr(again, name) == getattr(talks, name)
    wanted = talks.apply_chat_template(rows, tokenize=False)
    assert again.apply_chat_template(rows, tokenize=False) == wanted
