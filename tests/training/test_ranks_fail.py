"""A rank that is killed, missing, unlike the others or in trouble: one clear message, soon."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from several import free_port, steps, wait_for_steps, written

from glasstune.core.errors import InputError
from glasstune.core.ranks import Rank, this_rank
from glasstune.training.peers import Peers

SLOW = pytest.mark.slow(reason="the silence of a process that is gone has to last")


@pytest.mark.parametrize("victim", [pytest.param(1, marks=SLOW), 0])
def test_a_killed_rank_ends_the_others_soon(tiny_llama, qa_file, tmp_path, several, victim) -> None:
    """Rank 0 keeps the meeting place: its end is noticed too. The last checkpoint is good."""
    output = tmp_path / "run"
    training = {"max_steps": 500, "save_steps": 2}
    config = written(tiny_llama, qa_file, output, training=training)
    count = 3 - victim  # where there are two others, one of them speaks
    pids = several.start(["train", str(config)], count)
    wait_for_steps(output, 7)
    os.kill(pids[victim], signal.SIGKILL)
    started = time.monotonic()
    ended = several.end()
    assert time.monotonic() - started < 30
    assert ended.codes.pop(victim) == -signal.SIGKILL
    assert set(ended.codes) == {1}
    (error,) = ended.errors()
    assert re.search(rf"rank {victim}\b.* is gone", error), error
    assert "--resume" in ended.log
    done = max(int(p.name.split("-")[1]) for p in (output / "checkpoints").glob("step-*"))
    config = written(tiny_llama, qa_file, output, training={**training, "max_steps": done + 2})
    assert several.run(["train", str(config), "--resume"], 2).codes == [0, 0]
    assert [step for step, _, _ in steps(output)] == list(range(1, done + 3))


@SLOW
def test_a_stopped_rank_is_noticed_by_its_silence(tiny_llama, qa_file, tmp_path, several) -> None:
    """Its connections stay open, and nothing but the heartbeat tells."""
    output = tmp_path / "run"
    config = written(tiny_llama, qa_file, output, training={"max_steps": 500})
    quick = "import glasstune.training.peers as p\np.LOST_SECONDS, p.GRACE_SECONDS = 3.0, 1.0"
    pids = several.start(["train", str(config)], 2, patches={0: quick})
    wait_for_steps(output, 3)
    os.kill(pids[1], signal.SIGSTOP)
    started = time.monotonic()
    deadline = started + 20
    while "is gone" not in Path(several.logs[0]).read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(pids[1], signal.SIGKILL)
    ended = several.end()
    assert ended.codes == [1, -signal.SIGKILL]
    (error,) = ended.errors()
    assert "rank 1 on" in error


OTHER: dict[str, tuple[str, str]] = {
    "config": ("", "training.learning_rate: 0.2 on rank 0, 0.1 on rank 1"),
    "versions": (
        "import glasstune.workflows.ranks as r\nr.versions = lambda: {'torch': '1.0'}",
        "rank 1 on .* runs with .*torch 1.0",
    ),
    "data": ("", "fingerprint of the data"),
}


@pytest.mark.parametrize("what", list(OTHER))
def test_a_rank_with_something_of_its_own_is_named(
    tiny_llama, qa_file, tmp_path, several, what
) -> None:
    patch, says = OTHER[what]
    config = written(tiny_llama, qa_file, tmp_path / "run")
    words = [["train", str(config)], ["train", str(config)]]
    if what == "config":
        words[1].append("training.learning_rate=0.1")
    if what == "data":
        rows = json.loads(qa_file.read_text())
        rows[3]["output"] += " And more."
        other = tmp_path / "qa.json"
        other.write_text(json.dumps(rows))
        words[1].append(f"data.sources.0.path={other}")
    ended = several.run(words, 2, patches={1: patch})
    assert ended.codes == [2, 2]
    (error,) = ended.errors()
    assert re.search(says, error), error
    assert "rank 1" in error


def test_files_may_lie_elsewhere_on_another_machine(tiny_llama, qa_file, tmp_path, several) -> None:
    """Their content counts: two machines with a disk of their own."""
    config = written(tiny_llama, qa_file, tmp_path / "run", training={"max_steps": 2})
    shutil.copytree(tiny_llama, tmp_path / "models" / "copy")
    (tmp_path / "data").mkdir()
    shutil.copy(qa_file, tmp_path / "data" / qa_file.name)
    mine = ["train", str(config)]
    theirs = [
        *mine, f"model.path={tmp_path}/models/copy", f"training.output_dir={tmp_path}/nowhere",
        f"data.sources.0.path={tmp_path}/data/{qa_file.name}", "data.num_workers=2",
    ]  # fmt: skip
    ended = several.run([mine, theirs], 2, nodes=2)
    assert ended.codes == [0, 0], ended.log
    assert not (tmp_path / "nowhere").exists()
    hosts = json.loads((tmp_path / "run" / "run.json").read_text())["ranks"]["hosts"]
    assert len(hosts) == 2


@SLOW
def test_a_wrong_config_is_said_once(tiny_llama, qa_file, tmp_path, several) -> None:
    config = written(tiny_llama, qa_file, tmp_path / "run")
    ended = several.run(["train", str(config), "training.lerning_rate=1"], 2)
    assert ended.codes == [2, 2]
    assert len(ended.errors()) == 1
    words = ["train", str(config)]
    ended = several.run([words, [*words, "training.lerning_rate=1"]], 2)
    assert ended.codes == [1, 2]
    (error,) = ended.errors()  # the rank with the mistake says it, the other goes with it
    assert error.startswith("error: rank 1: ")
    assert "lerning_rate" in error


def test_a_rank_that_does_not_come_is_named(tiny_llama, qa_file, tmp_path, several) -> None:
    config = written(
        tiny_llama, qa_file, tmp_path / "run",
        training={"distributed": {"timeout_seconds": 3}},
    )  # fmt: skip
    ended = several.run(["train", str(config)], 3, only=[0, 2])
    assert ended.codes == [1, 1]
    (error,) = ended.errors()
    assert "rank 1 of 3 did not come within 3 s" in error


def test_an_unreachable_meeting_place_is_named() -> None:
    rank = Rank(index=1, count=2, address="127.0.0.1", port=free_port())
    with pytest.raises(Exception, match=f"127.0.0.1:{rank.port} within 1 s") as caught:
        Peers(rank, 1.0)
    assert getattr(caught.value, "code", "") == "master_unreachable"


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
        {"WORLD_SIZE": "two"},
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "http"},
    ],
)
def test_half_an_environment_is_refused(variables) -> None:
    with pytest.raises(InputError) as caught:
        this_rank(variables)
    assert caught.value.code == "rank_environment"


def test_one_process_of_torchrun_is_one_process() -> None:
    variables = {"WORLD_SIZE": "1", "RANK": "0", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert this_rank(variables) == Rank(restart=2)


LOSS = """
import os, torch

def mine(batch):
    if os.environ["RANK"] == "1" and batch.step == 3:
        {what}
    return batch.hidden.square().mean(-1).sum(), len(batch)
"""


def run_with_loss(tiny_llama: Path, qa_file: Path, tmp_path: Path, several: Any, what: str) -> Any:
    code = tmp_path / "loss.py"
    code.write_text(LOSS.format(what=what))
    losses = [{"name": "next_token"}, {"name": "mine", "weight": 0.1, "function": f"{code}:mine"}]
    config = written(tiny_llama, qa_file, tmp_path / "run", losses=losses)
    return several.run(["train", str(config)], 2)


def test_a_rank_that_fails_says_why_and_the_other_ends(
    tiny_llama, qa_file, tmp_path, several
) -> None:
    ended = run_with_loss(tiny_llama, qa_file, tmp_path, several, 'raise ValueError("my own bug")')
    assert ended.codes == [1, 1]
    (error,) = ended.errors()
    assert "rank 1" in error
    assert "my own bug" in error


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ('batch.hidden.sum() * float("nan")', "'mine' is nan at step 3"),
        ("(batch.hidden * 0).abs().sqrt().sum()", "gradient at step 3 is not finite"),
    ],
)
def test_what_is_not_finite_on_one_rank_names_its_rows(
    tiny_llama, qa_file, tmp_path, several, value, says
) -> None:
    what = f"return {value}, len(batch)"
    ended = run_with_loss(tiny_llama, qa_file, tmp_path, several, what)
    assert ended.codes == [1, 1]
    (error,) = ended.errors()
    assert says in error
    assert "qa.json" in error
    assert "of rank 1" in error


def test_a_dead_tensor_is_named_once(tiny_llama, qa_file, tmp_path, several) -> None:
    """No tensor that never gets a gradient makes the ranks wait for each other (S01)."""
    dead = """
import glasstune.adapters.inject as inject
real = inject.add_adapter
def add(base, **options):
    model = real(base, **options)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    layer.register_forward_hook(lambda module, args, out: out.detach())
    return model
inject.add_adapter = add
"""
    config = written(tiny_llama, qa_file, tmp_path / "run")
    ended = several.run(["train", str(config)], 2, patches={0: dead, 1: dead})
    assert ended.codes == [1, 1]
    (error,) = ended.errors()
    assert "trained tensors do not learn" in error
    assert "layers.0.self_attn.q_proj.lora_A" in error


def test_ranks_that_drift_apart_are_stopped_at_a_checkpoint(
    tiny_llama, qa_file, tmp_path, several
) -> None:
    """E03: nothing else would show that gradients are no longer shared."""
    drift = """
import glasstune.training.loop as loop
real = loop.move
def move(parameters, *rest):
    found = real(parameters, *rest)
    name = sorted(parameters)[2]
    parameters[name].data.view(-1)[0] += 1e-7
    return found
loop.move = move
"""
    config = written(tiny_llama, qa_file, tmp_path / "run", training={"save_steps": 4})
    ended = several.run(["train", str(config)], 2, patches={1: drift})
    assert ended.codes == [1, 1]
    (error,) = ended.errors()
    assert "after update 4 rank 1 holds other weights than rank 0 in 1 of" in error


@SLOW
def test_a_rank_that_hangs_in_its_device_ends_before_torchrun_kills_it(
    tiny_llama, qa_file, tmp_path, several
) -> None:
    """A GPU's collective never returns when a rank dies, and no Python runs in the main thread.

    torchrun sends SIGTERM to the others then, and SIGKILL after 30 s.
    """
    hang = """
import os
import glasstune.training.loop as loop
real = loop.launch_update
def launch(adapted, terms, batches, step, *rest, **options):
    if step == 4:
        os.read(os.pipe()[0], 1)
    return real(adapted, terms, batches, step, *rest, **options)
loop.launch_update = launch
"""
    output = tmp_path / "run"
    config = written(tiny_llama, qa_file, output)
    pids = several.start(["train", str(config)], 2, patches={0: hang})
    wait_for_steps(output, 3)
    os.kill(pids[1], signal.SIGKILL)
    os.kill(pids[0], signal.SIGTERM)
    started = time.monotonic()
    ended = several.end()
    assert time.monotonic() - started < 25
    assert ended.codes == [1, -signal.SIGKILL]
    (error,) = ended.errors()
    assert "rank 1 on" in error
    assert "is gone" in error


@SLOW
@pytest.mark.parametrize("killed", [True, False])
def test_a_signal_while_weights_are_read(tiny_llama, qa_file, tmp_path, several, killed) -> None:
    """torchrun's own SIGTERM, because a process was killed; and one that is meant."""
    slow = (
        "import time\nimport glasstune.models.load as load\n"
        "load.load_base = lambda *_, **__: (open({!r}, 'w'), time.sleep(60))\n"
    )
    places = [tmp_path / "0", tmp_path / "1"]
    patches = {rank: slow.format(str(place)) for rank, place in enumerate(places)}
    config = written(tiny_llama, qa_file, tmp_path / "run")
    pids = several.start(["train", str(config)], 2, patches=patches)
    deadline = time.monotonic() + 30
    while not all(place.exists() for place in places):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(pids[1], signal.SIGKILL if killed else signal.SIGTERM)
    os.kill(pids[0], signal.SIGTERM)
    started = time.monotonic()
    ended = several.end()
    assert time.monotonic() - started < 25
    if not killed:
        assert ended.codes == [-signal.SIGTERM, -signal.SIGTERM]
        assert ended.errors() == []
        return
    assert ended.codes == [1, -signal.SIGKILL]
    (error,) = ended.errors()
    assert "rank 1 on" in error
    assert "is gone" in error
