"""The output folder: whole, absent, or as it was."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from merging import adapted, load_plain, method_options, save_peft
from tiny import save_tiny_model

from glasstune.core.errors import InputError, RunError
from glasstune.export import place
from glasstune.workflows.merge import merge


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("place") / "base")


@pytest.fixture(scope="module")
def adapter(base):
    return save_peft(adapted(base, method_options("llama", "lora")), base.parent / "adapter")


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_output_is_not_overwritten_without_force(base, adapter, tmp_path):
    output = tmp_path / "out"
    merge(adapter, output, base=str(base), certificate=False)
    before = _files(output)
    with pytest.raises(InputError, match="already") as caught:
        merge(adapter, output, base=str(base), certificate=False)
    assert caught.value.code == "output_exists"
    assert "--force" in caught.value.fix
    assert _files(output) == before
    merge(adapter, output, base=str(base), certificate=False, dtype="float32", force=True)
    assert _files(output) != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    load_plain(output)


def test_force_replaces_models_only(base, adapter, tmp_path):
    output = tmp_path / "photos"
    output.mkdir()
    (output / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match="holds no model"):
        merge(adapter, output, base=str(base), force=True)
    assert _files(output) == {"holiday.jpg": b"x"}


@pytest.mark.parametrize("where", ["base", "adapter", "."])
def test_what_is_read_is_never_the_output(base, adapter, where):
    output = base.parent / where
    before = _files(base.parent)
    with pytest.raises(InputError, match="is, or holds, what is read"):
        merge(adapter, output, base=str(base), force=True)
    assert _files(base.parent) == before


def test_files_and_links_are_refused(base, adapter, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(InputError, match="the output is a"):
            merge(adapter, tmp_path / name, base=str(base), force=True)
    with pytest.raises(InputError, match=r"nothing can be written"):
        place.check_output(Path("/proc/nothing/out"), [], force=False)


def test_an_empty_folder_may_be_filled(base, adapter, tmp_path):
    (tmp_path / "out").mkdir()
    merge(adapter, tmp_path / "out", base=str(base), certificate=False)
    load_plain(tmp_path / "out")


def test_too_little_disk_is_seen_before_anything_is_written(base, adapter, tmp_path, monkeypatch):
    import collections

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(place.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**5))
    with pytest.raises(RunError, match="are free") as caught:
        merge(adapter, tmp_path / "out", base=str(base))
    assert caught.value.code == "disk_full"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_in_the_middle_leaves_nothing(base, adapter, tmp_path, monkeypatch):
    from glasstune.core import tensor_writer

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_writer.os, "pwrite", full)
    with pytest.raises(RunError, match="disk is full") as caught:
        merge(adapter, tmp_path / "out", base=str(base))
    assert "--output" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


_KILLED = """
    import os, signal, sys, time
    from glasstune.workflows.merge import merge

    class Stop:
        def start(self, task, total, unit):
            if task == sys.argv[4]:
                print("here", flush=True)
                time.sleep(60)
        def advance(self, *a, **k): ...
        def finish(self, task): ...
        def say(self, text): ...

    merge(sys.argv[1], sys.argv[3], base=sys.argv[2], dtype="float32", force=True, progress=Stop())
"""


@pytest.mark.parametrize(
    ("task", "number"), [("merge", signal.SIGTERM), ("certificate", signal.SIGKILL)]
)
def test_a_kill_leaves_nothing_half(base, adapter, tmp_path, task, number):
    output = tmp_path / "out"
    merge(adapter, output, base=str(base), certificate=False)
    before = _files(output)
    words = [sys.executable, "-c", textwrap.dedent(_KILLED), adapter, base, output, task]
    with subprocess.Popen([str(w) for w in words], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "here"
            while_it_runs = [path for path in tmp_path.iterdir() if path.name != "out"]
            assert len(while_it_runs) == 1
            assert while_it_runs[0].name.startswith(".out.merge-")
            # Another merge into the same place leaves the living one alone.
            with place.aside(output):
                assert while_it_runs[0].is_dir()
            process.send_signal(number)
            process.wait(30)
        finally:
            process.kill()
    assert _files(output) == before
    merge(adapter, output, base=str(base), certificate=False, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_without_a_lock_is_a_leftover_only_when_it_is_old(tmp_path):
    output, left = tmp_path / "out", tmp_path / ".out.merge-abc"
    left.mkdir()
    with place.aside(output):
        assert left.is_dir()
    old = time.time() - 7200
    os.utime(left, (old, old))
    with place.aside(output):
        assert not left.exists()


def test_a_leftover_of_an_output_with_brackets_in_its_name(tmp_path):
    output, left = tmp_path / "out[1]", tmp_path / ".out[1].merge-abc"
    left.mkdir()
    (left / ".lock").touch()
    with place.aside(output):
        assert not left.exists()


def test_a_refusal_leaves_no_empty_parents(base, adapter, tmp_path):
    other = save_tiny_model(tmp_path / "other", hidden_size=32)
    with pytest.raises(InputError):
        merge(adapter, tmp_path / "new" / "out", base=str(other), certificate=False)
    place.check_output(tmp_path / "new" / "out", [], force=False)
    place.check_space(tmp_path / "new" / "out", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    merge(adapter, tmp_path / "new" / "out", base=str(base), certificate=False)
    load_plain(tmp_path / "new" / "out")


@pytest.mark.parametrize("name", [".", "..", "../in"])
def test_the_folder_in_which_the_command_runs_is_refused(tmp_path, monkeypatch, name):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    with pytest.raises(InputError, match="in which the command runs") as caught:
        place.check_output(Path(name), [], force=True)
    assert caught.value.code == "output_is_held"


def test_a_mount_point_is_refused_and_not_only_after_the_merge(tmp_path, monkeypatch):
    monkeypatch.setattr(place.os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    place.check_output(tmp_path / "out", [], force=False)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="mount point") as caught:
        place.check_output(tmp_path / "out", [], force=False)
    assert str(tmp_path / "out" / "merged") in caught.value.fix


def test_an_output_that_cannot_be_moved_leaves_nothing_beside_it(tmp_path, monkeypatch):
    output, rename = tmp_path / "out", Path.rename
    output.mkdir()

    def held(path, target):
        if path == output:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(place, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", held)
    with pytest.raises(RunError, match="busy") as caught, place.aside(output) as folder:
        place.put_in_place(folder, output)
    assert caught.value.code == "output_is_held"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_the_old_output_goes_only_when_the_new_one_is_there(tmp_path, monkeypatch, exchange):
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("old")
    if not exchange:
        monkeypatch.setattr(place, "_exchange", lambda *_: False)
    with place.aside(output) as folder:
        (folder / "config.json").write_text("new")
        place.put_in_place(folder, output)
    assert _files(output) == {"config.json": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_rename_that_fails_leaves_the_old_output(tmp_path, monkeypatch):
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("old")
    monkeypatch.setattr(place, "_exchange", lambda *_: False)
    right = Path.rename

    def rename(self, to):
        if self.name.startswith(".out.merge-") and Path(to).name == "out":
            raise OSError(18, "Invalid cross-device link")
        return right(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with place.aside(output) as folder:
        (folder / "config.json").write_text("new")
        with pytest.raises(OSError, match="cross-device"):
            place.put_in_place(folder, output)
    assert _files(output) == {"config.json": b"old"}
