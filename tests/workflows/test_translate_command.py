"""Reading a pasted command: bash, torchrun's and accelerate's own parsers are the truth."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from baichuan2_command import PUBLISHED

from glasstune.core.errors import InputError
from glasstune.workflows.translate_command import looks_like_command, read_command
from glasstune.workflows.translate_launch import devices

SCRIPTS = {
    "published": PUBLISHED,
    "one line": "deepspeed fine-tune.py --use_lora True --run_name 'two words' --seed 3",
    "equals signs": 'fine-tune.py --data_path="a b.json" --seed=3 --use_lora=True',
    "variables": 'D=data\nexport M="org/my model"\nX=$D/x.json\n'
    'deepspeed fine-tune.py --data_path "$X" --model_name_or_path "${M}" --use_lora True\n',
    "after cd, to a file, in the background": "cd /tmp && nohup python -u fine-tune.py --seed 2 "
    "--use_lora True > log.txt 2>&1 &\n",
    "to a pipe": "python fine-tune.py --seed 2 --use_lora True 2>&1 | tee log.txt",
    "environment first": "CUDA_VISIBLE_DEVICES=0,1 OMP_NUM_THREADS=4 torchrun --nproc_per_node 2 "
    "fine-tune.py --use_lora True",
    "comments": "#!/bin/bash\n# --not this\nset -e\ndeepspeed fine-tune.py --seed 1 \\\n"
    "  --use_lora True # the adapter\n",
    "json": """python fine-tune.py --lr_scheduler_kwargs '{"num_cycles": 1}' --use_lora True""",
    "setup before it": "pip install --upgrade peft\ngit clone --depth 1 https://x/y\n"
    "python fine-tune.py --use_lora True",
}
STUBS = """
cd() { :; }; git() { :; }; pip() { :; }; nohup() { "$@"; }
for name in deepspeed torchrun python fine-tune.py; do
  eval "$name() { printf '%s\\0' \\"\\$@\\" > '{out}'; }"
done
"""


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_words_are_those_that_bash_gives_the_program(text: str, tmp_path: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    out = tmp_path / "words"
    stubs = STUBS.replace("{out}", str(out))
    subprocess.run([bash, "-c", f"{stubs}\n{text}\nwait"], check=True, cwd=tmp_path)
    seen = out.read_text().split("\0")[:-1]
    if "fine-tune.py" in seen:
        seen = seen[seen.index("fine-tune.py") + 1 :]
    given: dict[str, list[str]] = {}
    for word in seen:  # HfArgumentParser's own rule for names and values
        if word.startswith("--"):
            name, sign, value = word[2:].partition("=")
            given[name] = [value] if sign else []
        else:
            given[name].append(word)
    command = read_command(text, "x")
    assert command is not None
    assert command.script == "fine-tune.py"
    assert list(command.options) == list(given)
    for name, words in given.items():
        value = command.options[name]
        if isinstance(value, bool):
            assert words in (["True"], []), name
        elif isinstance(value, (int, float)):
            assert [value] == [float(word) for word in words], name
        else:
            assert [value] == [json.loads(word) if word[0] == "{" else word for word in words], name


PASTED = {
    "trailing blanks after the backslash": "deepspeed fine-tune.py \\  \n --seed 3 \\ \n "
    "--use_lora True",
    "all in one line": r"deepspeed fine-tune.py \ --seed 3 \ --use_lora True",
    "a Windows console": "deepspeed fine-tune.py ^\r\n --seed 3 ^\r\n --use_lora True",
    "PowerShell": "deepspeed fine-tune.py `\n --seed 3 `\n --use_lora True",
    "a chat's dashes and quotes": "deepspeed fine-tune.py —seed “3” –-use_lora True",
    "a prompt": "$ deepspeed fine-tune.py --seed 3 --use_lora True",
    "wide blanks": "deepspeed\u00a0fine-tune.py\u3000--seed 3 --use_lora True",
}


@pytest.mark.parametrize("text", PASTED.values(), ids=PASTED)
def test_what_pasting_does_to_a_command(text: str) -> None:
    command = read_command(text, "x")
    assert command is not None
    assert command.options == {"seed": 3, "use_lora": True}
    assert command.launcher == "deepspeed"


TORCHRUN = [
    "torchrun --nproc_per_node 4 fine-tune.py --seed 1",
    "torchrun --nproc-per-node=4 --nnodes 2 --node_rank 0 --master_port 295 fine-tune.py --seed 1",
    "torchrun --standalone --nproc_per_node=gpu fine-tune.py --seed 1",
    "torchrun --nnodes 1:3 --nproc_per_node 2 fine-tune.py --seed 1",
    "torchrun fine-tune.py --seed 1",
    "python -m torch.distributed.run --nproc_per_node 3 fine-tune.py --seed 1",
]


@pytest.mark.parametrize("text", TORCHRUN)
def test_torchrun_is_read_as_its_own_parser_reads_it(text: str) -> None:
    from torch.distributed.run import get_args_parser

    words = text.split()
    own = get_args_parser().parse_args(words[3 if words[1] == "-m" else 1 :])
    command = read_command(text, "x")
    assert command is not None
    assert (command.launcher, command.script) == ("torchrun", own.training_script)
    assert command.options == {"seed": 1}
    fewest, _, most = own.nnodes.partition(":")
    known = own.nproc_per_node.isdigit() and most in ("", fewest)
    expected = int(own.nproc_per_node) * int(fewest) if known else None
    assert devices(command) == expected


ACCELERATE = [
    "accelerate launch --num_processes 8 fine-tune.py --seed 1",
    "accelerate launch --multi_gpu --mixed_precision=bf16 fine-tune.py --seed 1",
    "accelerate launch --num_processes=2 --num_machines 1 --use_deepspeed --zero_stage 3 "
    "fine-tune.py --seed 1",
]


@pytest.mark.parametrize("text", ACCELERATE)
def test_accelerate_is_read_as_its_own_parser_reads_it(text: str) -> None:
    from accelerate.commands.launch import launch_command_parser

    own = launch_command_parser().parse_args(text.split()[2:])
    command = read_command(text, "x")
    assert command is not None
    assert (command.launcher, command.script) == ("accelerate", own.training_script)
    assert devices(command) == own.num_processes
    assert {name: getattr(own, name) for name in command.launch} == {
        name: str(value) if isinstance(getattr(own, name), str) else value
        for name, value in command.launch.items()
    }


@pytest.mark.parametrize(
    ("start", "number"),
    [
        ("deepspeed", None),
        ('deepspeed --hostfile=""', None),
        ("deepspeed --num_gpus 2", 2),
        ("deepspeed --num_gpus=2 --num_nodes 3", 6),
        ("deepspeed --num_gpus 2 --hostfile hosts", None),
        ("deepspeed --include localhost:0,1", 2),
        ("deepspeed --include=localhost:1", 1),
        ('deepspeed --include "worker-0@worker-1:0,2"', None),
        ("deepspeed --include worker-0:1@worker-1:0,2", 3),
        ("deepspeed --exclude localhost:0", None),
        ("CUDA_VISIBLE_DEVICES=0,3 deepspeed", 2),
        ("CUDA_VISIBLE_DEVICES=0,3 python", 2),
        ("CUDA_VISIBLE_DEVICES=1 python3", 1),
        ("python3.10 -u", None),
        ("", 1),
    ],
)
def test_how_many_devices_a_launcher_starts(start: str, number: int | None) -> None:
    command = read_command(f"{start} fine-tune.py --seed 1", "x")
    assert command is not None
    assert command.options == {"seed": 1}
    assert devices(command) == number


def test_what_is_no_command() -> None:
    for text in ("a: b\nc: it's --x\n", "- a\n- b\n", "words only\n", "name: --x y\n", ""):
        assert read_command(text, "x") is None
    assert not looks_like_command("runs/my file.yaml")
    assert not looks_like_command("--help")
    assert looks_like_command("fine-tune.py --use_lora True")


def test_faults_of_a_command_are_named() -> None:
    with pytest.raises(InputError, match="never closes") as caught:
        read_command('fine-tune.py --data_path "x.json --seed 1', "run.sh")
    assert caught.value.where == "run.sh"
    with pytest.raises(InputError, match="expected True or False, found 'maybe'"):
        read_command("fine-tune.py --use_lora maybe", "x")
    command = read_command("fine-tune.py --data_path $DATA/x.json --seed $1", "x")
    assert command is not None
    assert command.lost == ["$DATA is not set in this text: write its value"]
    command = read_command("python a.py --seed 1\npython b.py --seed 2\n", "x")
    assert command is not None
    assert command.script == "a.py"
    assert "2 commands" in command.lost[0]
