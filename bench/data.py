"""Rows a second and peak memory of the data preparation, against `datasets.map`.

    python bench/data.py speed --model FOLDER [--rows 20000] [--processes 2] [--rounds 3]
    python bench/data.py memory --model FOLDER [--megabytes 100 500] [--processes 2]

The rows are those of alpaca_en_demo.json in GLASSTUNE_TEST_DATA (or made up), each with words of
its own, so that no two are the same. Every measurement runs in a process of its own.

`datasets.map` is used as its documentation advises: batched, with the tokenizer's own batch call.
It is measured twice. `ids` renders each conversation once and tokenises it: it gives no labels.
`labels` also renders and tokenises the prompt, to know what is trained, as TRL does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

WAYS = ("glasstune", "map_ids", "map_labels")


def seed_rows() -> list[dict[str, str]]:
    folder = os.environ.get("GLASSTUNE_TEST_DATA")
    if folder:
        text = (Path(folder) / "alpaca_en_demo.json").read_text(encoding="utf-8")
        rows: list[dict[str, str]] = json.loads(text)
        return rows
    words = ["the", "of", "and", "to", "in", "is", "it", "you", "that", "he", "was", "for", "on"]
    chosen = random.Random(0)

    def text(count: int) -> str:
        return " ".join(chosen.choices(words, k=count))

    return [{"instruction": text(12), "input": "", "output": text(90)} for _ in range(1000)]


def write_rows(path: Path, *, rows: int | None = None, size: int | None = None) -> int:
    """Writes JSONL of a number of rows, or of bytes at about 500 a row; returns the rows."""
    source, chosen, count, written = seed_rows(), random.Random(1), 0, 0
    words = sorted({word for row in source for word in row["output"].split()})
    with path.open("w", encoding="utf-8") as file:
        while (rows is not None and count < rows) or (size is not None and written < size):
            row = source[count % len(source)]
            # About half of the answer is exchanged, so that caches of words help as in life.
            answer = row["output"].split(" ")[: 60 if size is not None else None]
            for place in range(0, len(answer), 2):
                answer[place] = chosen.choice(words)
            line = json.dumps(
                {
                    **row,
                    "instruction": f"{row['instruction']} ({count})",
                    "output": " ".join(answer),
                },
                ensure_ascii=False,
            )
            written += file.write(line + "\n")
            count += 1
    return count


def conversation(instruction: str, text: str, output: str) -> list[dict[str, str]]:
    question = f"{instruction}\n\n{text}" if text else instruction
    return [{"role": "user", "content": question}, {"role": "assistant", "content": output}]


def cpu_seconds() -> float:
    """Processor time of this process and of those that it waited for."""
    parts = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in parts)


def by_glasstune(model: str, path: Path, processes: int) -> dict[str, Any]:
    from glasstune.core.choices import Choices
    from glasstune.core.config import DataConfig, SourceConfig
    from glasstune.core.facts import ModelFacts
    from glasstune.data.prepare import prepare_data
    from glasstune.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    facts = ModelFacts("llama", len(tokenizer), 8192, True, "bench")
    config = DataConfig(sources=[SourceConfig(path=str(path))], max_length=2048)
    start, used = time.perf_counter(), cpu_seconds()
    data = prepare_data(config, tokenizer, facts, seed=0, choices=Choices(), processes=processes)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": cpu_seconds() - used,
        "rows": data.record.rows,
    }


def by_map(model: str, path: Path, processes: int, *, labels: bool) -> dict[str, Any]:
    import datasets

    from glasstune.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        chats = [
            conversation(*row)
            for row in zip(batch["instruction"], batch["input"], batch["output"], strict=True)
        ]
        texts = tokenizer.apply_chat_template(chats, tokenize=False)
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        if not labels:
            return {"input_ids": ids}
        heads = tokenizer.apply_chat_template(
            [chat[:-1] for chat in chats], tokenize=False, add_generation_prompt=True
        )
        starts = [len(head) for head in tokenizer(heads, add_special_tokens=False)["input_ids"]]
        masked = [[-100] * n + row[n:] for n, row in zip(starts, ids, strict=True)]
        return {"input_ids": ids, "labels": masked}

    start, used = time.perf_counter(), cpu_seconds()
    table = datasets.load_dataset("json", data_files=str(path), split="train")
    table = table.map(
        encode,
        batched=True,
        num_proc=processes if processes > 1 else None,
        remove_columns=table.column_names,
    )
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": cpu_seconds() - used,
        "rows": len(table),
    }


def measure(way: str, model: str, path: Path, processes: int) -> dict[str, Any]:
    """Runs one way in this process and tells its peak memory."""
    if way == "glasstune":
        found = by_glasstune(model, path, processes)
    else:
        found = by_map(model, path, processes, labels=way == "map_labels")
    from glasstune.core.memory import peak_resident_bytes

    main = peak_resident_bytes()
    return {**found, "peak_bytes": main}


class Watch:
    """Looks at the memory of a process and its children while it runs.

    The kernel's own maximum of a child starts with the size of the process that started it.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.worker = self.whole = 0
        with contextlib.suppress(OSError, IndexError):
            while process.poll() is None:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
                workers = [self._bytes(pid, "VmHWM") for pid in children.split()]
                self.worker = max([self.worker, *workers])
                every = [str(process.pid), *children.split()]
                self.whole = max(self.whole, sum(self._bytes(pid, "VmRSS") for pid in every))
                time.sleep(0.2)

    @staticmethod
    def _bytes(pid: str, name: str) -> int:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:  # it ended
            return 0
        return int(status.split(f"{name}:")[1].split()[0]) * 1024 if name in status else 0


def apart(way: str, model: str, path: Path, processes: int) -> dict[str, Any]:
    """Measures in a new process with an empty cache of its own."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "GLASSTUNE_CACHE": cache,
            "HF_DATASETS_CACHE": cache,
            "OMP_NUM_THREADS": "1",
            # One process uses one processor in both ways.
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, __file__, "one", "--model", model, "--way", way]
        command += ["--file", str(path), "--processes", str(processes)]
        said = Path(cache) / "said"
        with (
            said.open("wb") as err,
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=err
            ) as process,
        ):
            watch = Watch(process)
            out, _ = process.communicate()
        if process.returncode:
            raise SystemExit(said.read_text())
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return {**found, "worker_bytes": watch.worker, "whole_bytes": watch.whole}


def speed(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        rows = write_rows(path, rows=args.rows)
        print(f"{rows:,} rows, {path.stat().st_size / 1e6:.0f} MB, {args.processes} processes")
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for round_ in range(args.rounds):
            # One after the other in every round, so that other work on the machine meets all.
            for way in WAYS if round_ % 2 == 0 else tuple(reversed(WAYS)):
                found[way].append(apart(way, args.model, path, args.processes))
            each = ", ".join(f"{way} {rows / found[way][-1]['seconds']:,.0f}" for way in WAYS)
            print(f"  round {round_ + 1}: {each} rows/s; load {os.getloadavg()[0]:.1f}", flush=True)
        for way in WAYS:
            rate = median(rows / run["seconds"] for run in found[way])
            spent = median(run["cpu_seconds"] / rows * 1e6 for run in found[way])
            pairs = list(zip(found[way], found["glasstune"], strict=True))
            faster = median(theirs["seconds"] / ours["seconds"] for theirs, ours in pairs)
            leaner = median(theirs["cpu_seconds"] / ours["cpu_seconds"] for theirs, ours in pairs)
            print(
                f"median {way:<11} {rate:7,.0f} rows/s, {spent:4.0f} us of processor time a row: "
                f"Glasstune is {faster:.2f} times as fast, by processor time {leaner:.2f} times"
            )


def memory(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in args.megabytes:
            path = Path(folder) / f"rows-{megabytes}.jsonl"
            rows = write_rows(path, size=megabytes * 1_000_000)
            found = apart("glasstune", args.model, path, args.processes)
            print(
                f"{megabytes} MB, {rows:,} rows: {found['seconds']:.0f} s, "
                f"{rows / found['seconds']:,.0f} rows/s, peak of the main process "
                f"{found['peak_bytes'] / 2**20:.0f} MiB, of the largest worker "
                f"{found['worker_bytes'] / 2**20:.0f} MiB, of all together "
                f"{found['whole_bytes'] / 2**20:.0f} MiB",
                flush=True,
            )
            path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("speed", "memory", "one"):
        command = commands.add_parser(name)
        command.add_argument("--model", required=True)
        command.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
        command.add_argument("--rows", type=int, default=20_000)
        command.add_argument("--rounds", type=int, default=3)
        command.add_argument("--megabytes", type=int, nargs="+", default=[100, 500])
        command.add_argument("--way", choices=WAYS)
        command.add_argument("--file", type=Path)
    args = parser.parse_args()
    if args.command == "one":
        print(json.dumps(measure(args.way, args.model, args.file, args.processes)))
    else:
        {"speed": speed, "memory": memory}[args.command](args)


if __name__ == "__main__":
    main()
