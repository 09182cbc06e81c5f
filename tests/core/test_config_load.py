import inspect
from pathlib import Path

import pytest
import yaml

from glasstune.core.config import AdapterConfig, Config, ModelConfig
from glasstune.core.config_fields import defaults_yaml, known_keys, schema
from glasstune.core.config_load import config_from_mapping, dump_config, load_config, load_text
from glasstune.core.config_names import FLAT, FOREIGN
from glasstune.core.errors import InputError

BASE = "model: {path: m}\ndata: {sources: [{path: d.json}]}\n"


def load(text="", *overrides, base=BASE):
    return load_text(base + text, "c.yaml", list(overrides))


def refused(text="", *overrides, base=BASE):
    with pytest.raises(InputError) as caught:
        load(text, *overrides, base=base)
    assert caught.value.exit_code == 2
    return caught.value


def test_l01_learning_rate_1e_minus_5_is_a_number():
    assert load("training: {learning_rate: 1e-5}").config.training.learning_rate == 1e-5
    assert load("", "training.learning_rate=1e-5").config.training.learning_rate == 1e-5


def test_l01_wrong_type_names_file_line_key_value_and_expected_type():
    error = refused("training:\n  seed: 1\n  learning_rate: fast\n")
    assert error.where == "c.yaml:5"
    assert error.code == "wrong_type"
    assert "training.learning_rate" in error.message
    assert "'fast'" in error.message
    assert "a number of at least 0" in error.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training: {seed: 1.5}", "a whole number"),
        ("training: {learning_rate: true}", "a number"),
        ("training: {learning_rate: .inf}", "a number"),
        ("training: {deterministic: maybe}", "true or false"),
        ("training: {per_device_train_batch_size: 0}", "at least 1 or auto"),
        ("training: {save_strategy: no}", "steps or epoch"),
        ("training: {report_to: [x]}", "tensorboard"),
        ("training: [1]", "a section"),
        ("losses: [{name: a, weight: {from: 0, to: x, steps: 3}}]", "losses.0.weight.to"),
        ("losses: [x]", "name: next_token"),
        ("losses: []", "is empty"),
        ("audit: {gate_allow: [{}]}", "names"),
        ("adapter: {r: 0}", "at least 1"),
        ("adapter: {target_modules: 4}", "text or a list of names"),
    ],
)
def test_wrong_values_say_what_is_expected(text, words):
    error = refused(text)
    assert words in error.message
    assert error.where == "c.yaml:3"


def test_every_wrong_key_is_named():
    error = refused("training: {seed: x, max_steps: y}")
    assert "training.seed" in error.message
    assert "training.max_steps" in error.message


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("training: {learning_rat: 1}", "training.learning_rate"),
        ("training: {sed: 1}", "training.seed"),
        ("model: {learning_rate: 1e-4, path: m}", "training.learning_rate"),
        ("model: {pth: m}", "model.path"),
        ("modl: {path: m}", "model"),
        ("losses: [{name: a, weght: 2}]", "losses.N.weight"),
        ("audit: {first_step_gat: off}", "audit.first_step_gate"),
        ("training: {distributed: {strategi: ddp}}", "training.distributed.strategy"),
    ],
)
def test_unknown_keys_name_the_nearest(text, key):
    base = "data: {sources: [{path: d}]}\n" if text.startswith("model:") else BASE
    error = refused(text, base=base)
    assert error.code == "unknown_key"
    assert error.fix == f"did you mean {key}?"


def test_a_key_like_nothing_is_still_refused():
    assert "config --defaults" in refused("zzzzqqq: 1").fix


# --- foreign names ---------------------------------------------------------------------------


def test_foreign_names_are_translated_and_said_once():
    loaded = load(
        "load_in_4bit: true\nlora_rank: 4\nlora_target: q_proj,v_proj\ncutoff_len: 77\n"
        "warmup_ratio: 0.1\nval_set_size: 0.05\ngradient_checkpointing: true\nfp16: true\n"
        "optim: paged_adamw_8bit\nreport_to: none\nmicro_batch_size: 2\nnum_epochs: 5\n"
        "do_train: true\nstage: sft\nfinetuning_type: lora\nbnb_4bit_quant_type: nf4\n"
    )
    config = loaded.config
    assert config.model.bits == 4
    assert config.model.dtype == "float16"
    assert config.model.quantization == {"bnb_4bit_quant_type": "nf4"}
    assert config.adapter.r == 4
    assert config.adapter.target_modules == ["q_proj", "v_proj"]
    assert config.data.max_length == 77
    assert config.data.validation_split == 0.05
    assert config.training.warmup_steps == 0.1
    assert config.training.recompute == "full"
    assert config.training.optim == "adamw_8bit"
    assert config.training.report_to == []
    assert config.training.per_device_train_batch_size == 2
    assert config.training.num_train_epochs == 5
    assert len(loaded.notes) == len(set(loaded.notes))
    for name in ("load_in_4bit", "lora_rank", "cutoff_len", "do_train"):
        assert sum(note.split(":")[0].split()[0] == name for note in loaded.notes) == 1, name


@pytest.mark.parametrize("section", ["", "model", "training", "adapter", "data"])
def test_foreign_names_are_known_in_every_section(section):
    line = "load_in_8bit: true" if not section else f"{section}.load_in_8bit=true"
    loaded = load("", line.replace(": ", "="))
    assert loaded.config.model.bits == 8


def test_load_in_4bit_inside_quantization():
    loaded = load("", "model.quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4}")
    assert loaded.config.model.bits == 4
    assert loaded.config.model.quantization == {"bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("text", "base"),
    [
        ("load_in_4bit: true", "model: {path: m, bits: 8}\ndata: {sources: [{path: d}]}\n"),
        ("load_in_4bit: false", "model: {path: m, bits: 4}\ndata: {sources: [{path: d}]}\n"),
        ("load_in_4bit: true\nload_in_8bit: true", BASE),
        ("bf16: true\nfp16: true", BASE),
        ("bf16: true", "model: {path: m, dtype: float32}\ndata: {sources: [{path: d}]}\n"),
        ("cutoff_len: 5\nsequence_len: 6", BASE),
        ("training: {warmup_steps: 10, warmup_ratio: 0.1}", BASE),
        ("model_name_or_path: other", BASE),
        ("gradient_checkpointing: true\ntraining: {recompute: none}", BASE),
    ],
)
def test_contradictions_are_errors_that_name_both(text, base):
    error = refused(text, base=base)
    assert error.code == "contradiction"
    assert " but " in error.message
    assert error.where.startswith("c.yaml:")


def test_two_names_with_one_value_agree():
    assert load("cutoff_len: 5\nsequence_len: 5").config.data.max_length == 5


def test_an_override_replaces_what_the_file_says_by_another_name():
    assert load("load_in_8bit: true", "model.bits=4").config.model.bits == 4
    error = refused("", "model.bits=8", "load_in_4bit=true")
    assert error.code == "contradiction"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("stage: dpo", "not_supported"),
        ("finetuning_type: full", "not_supported"),
        ("rl: dpo", "not_supported"),
        ("val_set_size: 100", "not_supported"),
        ("warmup_ratio: 3", "wrong_type"),
        ("quantization_bit: 5", "wrong_type"),
        ("load_in_4bit: 4", "wrong_type"),
        ("adapter: ia3", "wrong_type"),
    ],
)
def test_foreign_values_without_a_meaning_here_are_refused(text, code):
    error = refused(text)
    assert error.code == code
    assert error.where == "c.yaml:3"


def test_axolotl_forms():
    loaded = load_text(
        "base_model: m\nadapter: qlora\ndatasets:\n- path: a/b\n  type: alpaca\n"
        "- path: json\n  data_files: x.json\n  type: sharegpt\n  conversation: chatml\n"
        "sequence_len: 512\nlora_r:\nflash_attention: true\nlora_target_linear: true\n",
        "a.yaml",
    )
    sources = loaded.config.data.sources
    assert [(s.path, s.format) for s in sources] == [("a/b", "alpaca"), ("x.json", "conversations")]
    assert loaded.config.model.bits == 4
    assert any("conversation of json has no counterpart" in note for note in loaded.notes)
    assert any("flash_attention has no counterpart" in note for note in loaded.notes)


def test_every_foreign_name_points_to_a_real_key_and_shadows_none():
    probe = {True: 1, "adamw": 1}
    keys = known_keys()
    for name, key in FLAT.items():
        assert key in keys or key.startswith("adapter."), name
    for name, rule in FOREIGN.items():
        assert name not in keys, f"{name} is a key of ours at the top level"
        for value in (True, False, 4, 0.1, "x", "lora", "sft", ["a"], None, *probe):
            try:
                meaning = rule(name, value)
            except InputError:
                continue
            for key in meaning.values:
                known = key in keys or key.startswith(
                    ("adapter.", "model.quantization.", "data.chat_template_kwargs.")
                )
                assert known, (name, key)


def test_no_foreign_name_hides_an_option_of_lora_config():
    peft = pytest.importorskip("peft")
    options = set(inspect.signature(peft.LoraConfig).parameters)
    assert not options & set(FOREIGN)


# --- overrides -------------------------------------------------------------------------------


def test_overrides_reach_into_lists_and_maps():
    config = load(
        "",
        "data.sources.0.path=*.json",
        "data.sources.1.path=b.json",
        "losses.0.weight=0.5",
        "data.markers.user=5",
        "training.report_to=[tensorboard]",
        "training.run_name=2024",
        "model.attn_implementation=",
        "adapter.rank_pattern={q_proj: 4}",
        "data.chat_template_kwargs.date_string=2024-01-01",
    ).config
    assert [source.path for source in config.data.sources] == ["*.json", "b.json"]
    assert config.losses[0].name == "next_token"
    assert config.losses[0].weight == 0.5
    assert config.data.markers == {"user": 5, "assistant": 196}
    assert config.training.report_to == ["tensorboard"]
    assert config.training.run_name == "2024"
    assert config.model.attn_implementation is None
    assert config.adapter.lora_options()["rank_pattern"] == {"q_proj": 4}
    assert config.data.chat_template_kwargs == {"date_string": "2024-01-01"}


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("nonsense", "bad_override", "key=value"),
        ("=3", "bad_override", "key=value"),
        ("a..b=1", "bad_override", "key=value"),
        ("data.sources.3.path=x", "bad_override", "list of 1"),
        ("training.lerning_rate=3", "unknown_key", "lerning_rate"),
        ("training.seed=-1", "wrong_value", "-1"),
        ("training.report_to=[tensorboard", "yaml_syntax", "expected"),
        ("model=foo", "wrong_type", "a section"),
        ("model.path.x=2", "wrong_type", "model.path"),
        ("5=2", "unknown_key", "5"),
    ],
)
def test_bad_overrides_name_themselves(override, code, words):
    error = refused("", override)
    assert error.code == code
    assert words in error.message
    assert override in error.where or override in error.message


def test_model_and_data_alone():
    config = load_config(None, ["training.seed=3"], model="m", data="d.json").config
    assert config == Config(
        model=ModelConfig(path="m"),
        data={"sources": [{"path": "d.json"}]},
        training={"seed": 3},
    )


def test_model_flag_replaces_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(BASE)
    config = load_config(file, [], model="other", data="e.json").config
    assert config.model.path == "other"
    assert [source.path for source in config.data.sources] == ["e.json"]


@pytest.mark.parametrize(("model", "data", "key"), [("m", None, "data"), (None, "d", "model")])
def test_missing_halves_are_named(model, data, key):
    with pytest.raises(InputError) as caught:
        load_config(None, [], model=model, data=data)
    assert caught.value.code == "missing_key"
    assert key in caught.value.message
    assert f"--{key}" in caught.value.fix


# --- batch arithmetic ------------------------------------------------------------------------


def batch(config):
    training = config.training
    return (
        training.train_batch_size,
        training.per_device_train_batch_size,
        training.gradient_accumulation_steps,
    )


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ("{}", (16, "auto", "auto")),
        ("{train_batch_size: 8, per_device_train_batch_size: 4}", (8, 4, "auto")),
        ("{per_device_train_batch_size: 4, gradient_accumulation_steps: 8}", (32, 4, 8)),
        (
            "{train_batch_size: 32, per_device_train_batch_size: 4, "
            "gradient_accumulation_steps: 8}",
            (32, 4, 8),
        ),
        ("{per_device_train_batch_size: 32}", (32, 32, "auto")),
        ("{gradient_accumulation_steps: 4}", (16, "auto", 4)),
    ],
)
def test_batch_sizes_that_agree(given, sizes):
    assert batch(load(f"training: {given}").config) == sizes


@pytest.mark.parametrize(
    ("given", "arithmetic"),
    [
        (
            "{train_batch_size: 16, per_device_train_batch_size: 4, "
            "gradient_accumulation_steps: 2}",
            "4 rows x 2 forwards = 8, but training.train_batch_size is 16",
        ),
        ("{train_batch_size: 16, gradient_accumulation_steps: 3}", "5.333"),
        ("{train_batch_size: 16, per_device_train_batch_size: 32}", "32 are more than"),
    ],
)
def test_batch_sizes_that_disagree_show_the_arithmetic(given, arithmetic):
    error = refused(f"training: {given}")
    assert error.code == "batch_arithmetic"
    assert arithmetic in error.message


def test_batch_arithmetic_counts_devices(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = "{per_device_train_batch_size: 4, gradient_accumulation_steps: 2}"
    assert load(f"training: {given}").config.training.train_batch_size == 16


@pytest.mark.parametrize(("total", "rows", "fits"), [(1, 1, True), (3, 2, True), (3, 3, False)])
def test_the_largest_share_of_a_device_is_what_may_be_asked_for(monkeypatch, total, rows, fits):
    """A resolved config holds it, and is loaded again on resume, by as many devices."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = f"training: {{train_batch_size: {total}, per_device_train_batch_size: {rows}}}"
    if fits:
        assert load(given).config.training.train_batch_size == total
    else:
        assert refused(given).code == "batch_arithmetic"


# --- files -----------------------------------------------------------------------------------


def write(tmp_path, content: bytes) -> Path:
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"", "empty_config", "empty"),
        (b"# only a comment\n", "empty_config", "empty"),
        (b"\xef\xbb\xbf", "empty_config", "empty"),
        (b"- a\n- b\n", "not_a_mapping", "a list"),
        (b"just text\n", "not_a_mapping", "just text"),
        (b"model:\n  path: \xff\xfe\n", "not_utf8", "UTF-8"),
        (b"model:\n\tpath: m\n", "yaml_syntax", "tab"),
        (b"model: {path: m}\nmodel: {path: n}\n", "duplicate_key", "model"),
        (b"a: \x00\n", "yaml_syntax", "YAML"),
    ],
)
def test_bad_files_have_one_clear_message(tmp_path, content, code, words):
    file = write(tmp_path, content)
    with pytest.raises(InputError) as caught:
        load_config(file)
    assert caught.value.code == code
    assert words in caught.value.message
    assert str(file) in caught.value.where


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_with_a_byte_order_mark_load_alike(tmp_path, encoding):
    file = tmp_path / "c.yaml"
    file.write_bytes(BASE.replace("path: m", "path: 模型").encode(encoding))
    assert load_config(file).config.model.path == "模型"


def test_windows_line_ends(tmp_path):
    file = write(tmp_path, BASE.replace("\n", "\r\n").encode())
    assert load_config(file).config == load().config


def test_missing_file_names_a_like_one(tmp_path):
    write(tmp_path, b"")
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "confg.yaml")
    assert caught.value.code == "config_not_found"
    assert "config.yaml" in caught.value.fix


def test_a_folder_is_refused_and_its_config_named(tmp_path):
    write(tmp_path, b"")
    with pytest.raises(InputError) as caught:
        load_config(tmp_path)
    assert caught.value.code == "config_is_folder"
    assert "config.yaml" in caught.value.fix


def test_paths_stay_relative_to_the_current_folder(tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "c.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("configs/c.yaml")).config.data.sources[0].path == "d.json"


# --- Python, dump, defaults, schema ----------------------------------------------------------


def test_a_mapping_from_python_may_hold_rows():
    rows = [{"prompt": "a", "completion": "b"}]
    loaded = config_from_mapping(
        {"model": {"path": Path("m")}, "data": {"sources": [{"path": rows}]}}
    )
    assert loaded.config.data.sources[0].rows == rows
    assert loaded.config.model.path == "m"


def test_a_file_may_not_hold_rows_in_place_of_a_path():
    error = refused("", base="model: {path: m}\ndata: {sources: [{path: [a.json, b.json]}]}\n")
    assert error.code == "wrong_type"
    assert "data.sources.0.path" in error.message


def test_dump_loads_to_the_same_config():
    text = (
        "losses: [{name: next_token}, {name: z_loss, weight: {from: 0, to: 1e-4, steps: 20}}]\n"
        "adapter: {use_dora: true, rank_pattern: {q_proj: 2}, target_modules: [q_proj]}\n"
        "training: {learning_rate: 1e-5, compile: false, report_to: [tensorboard]}\n"
    )
    base = (
        "model: {path: m, bits: 4, quantization: {bnb_4bit_quant_type: nf4}}\n"
        "data: {sources: [{path: d, columns: {prompt: q}}], validation: [{path: v}]}\n"
    )
    config = load(text, base=base).config
    again = load_text(dump_config(config)).config
    assert again == config
    assert dump_config(again) == dump_config(config)


def test_given_tells_what_the_user_set():
    loaded = load("training: {seed: 0}\nload_in_4bit: true", "data.max_length=64")
    assert loaded.given == {
        "model.path",
        "data.sources",
        "training.seed",
        "model.bits",
        "data.max_length",
    }


def test_defaults_load_and_are_the_defaults():
    text = defaults_yaml()
    config = load_text(text).config
    assert config.model == ModelConfig(path="MODEL")
    assert config.adapter == AdapterConfig()
    assert config == Config(model={"path": "MODEL"}, data={"sources": [{"path": "DATA"}]})
    top = yaml.safe_load(text)
    for path, key in known_keys().items():
        if ".N" in path or key.section:
            continue
        place = top
        for part in path.split("."):
            assert part in place, path
            place = place[part]


def test_every_key_has_a_meaning_in_the_schema():
    assert all(key.meaning for key in known_keys().values())
    definitions = schema()["$defs"]
    assert "learning_rate" in definitions["TrainingConfig"]["properties"]
    assert definitions["WeightSchedule"]["required"] == ["from", "to", "steps"]
    assert "rows" not in definitions["SourceConfig"]["properties"]


def test_validation_and_split_exclude_each_other():
    base = (
        "model: {path: m}\n"
        "data: {sources: [{path: d}], validation: [{path: v}], validation_split: 0.1}\n"
    )
    assert "exclude" in refused("", base=base).message
