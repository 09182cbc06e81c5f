"""The house's plan: one table that the test enforces and `docs/ARCHITECTURE.md` prints.

Run this file to write the page again.
"""

from __future__ import annotations

from pathlib import Path

MAX_LINES = 450

ROOMS = {
    "core": "config models, errors, units, findings, records, choices, protocols; no torch",
    "data": "formats to messages to template to ids and labels to packs; says what is wrong",
    "models": "loading, quantisation rules, facts and packing per family, the output head",
    "adapters": "PEFT: injection, target names, save and read back",
    "kernels": "one folder an operation: plain reference, fused version, public door",
    "fast": "speed_up: kernels, grouping and compile put onto a PEFT model",
    "audit": "which tensor learns, by which term, and if not, why; knows no trainer",
    "planner": "bytes and seconds by part, recomputation, planned against measured",
    "training": "step, loop, loss terms, optimiser, schedule, checkpoints, metrics",
    "generation": "generate, evaluate, chat",
    "export": "merge, certificate, GGUF",
    "integrations": "callback and term loss for transformers.Trainer and TRL",
    "reports": "terminal and web pages, from records alone",
    "workflows": "one function a command: config in, record out; the Python API",
    "cli": "parse, call one workflow, render",
}

EVERY = tuple(ROOMS)
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "core": (),
    "kernels": ("core",),
    "data": ("core",),
    "audit": ("core",),
    "reports": ("core",),
    "models": ("core", "kernels"),
    "adapters": ("core", "models"),
    "fast": ("core", "kernels", "models", "adapters"),
    "planner": ("core", "kernels", "models", "adapters", "fast"),
    "generation": ("core", "data", "kernels", "models", "adapters"),
    "export": ("core", "models", "adapters", "generation"),
    "training": ("core", "data", "kernels", "models", "adapters", "fast"),
    "integrations": ("core", "audit"),
    "workflows": tuple(room for room in EVERY if room != "cli"),
    "cli": ("core", "reports", "workflows"),
}

LIBRARY_OWNERS: dict[str, tuple[str, ...]] = {
    "bitsandbytes": ("models",),
    "datasets": ("data",),
    "gguf": ("models", "export"),
    "jinja2": ("reports", "data"),
    "peft": ("adapters",),
    "pyarrow": ("data",),
    "pydantic": ("core",),
    "rich": ("reports",),
    "safetensors": ("core",),
    "sentencepiece": ("models",),
    "tensorboard": ("reports",),
    "transformers": ("models", "data", "generation", "integrations"),
    "triton": ("kernels",),
    "typer": ("cli",),
    "yaml": ("core",),
}


def architecture_page() -> str:
    """Returns the text of `docs/ARCHITECTURE.md`."""
    lines = [
        "# Architecture",
        "",
        "One package, `src/glasstune/`, in fifteen rooms. Data flows one way: a config file",
        "becomes rows, rows become packed token batches, batches meet the adapted model, steps",
        "become records, records become reports. `tests/architecture` enforces both tables from",
        "the code's own imports, and this page is printed from the test's data.",
        "",
        "| room | holds | may import |",
        "|---|---|---|",
    ]
    for room, holds in ROOMS.items():
        allowed = ", ".join(MAY_IMPORT[room]) or "nothing of the project"
        if room == "workflows":
            allowed = "every room but cli"
        if room == "cli":
            allowed = "core, reports; workflows inside a command's function only"
        lines.append(f"| {room} | {holds} | {allowed} |")
    lines += [
        "",
        "`audit` and `training` never meet: the audit fits the loop through the `StepHook`",
        "protocol in core, so it serves any other trainer as well.",
        "",
        "## Who owns which library",
        "",
        "| library | rooms |",
        "|---|---|",
        *(f"| {name} | {', '.join(owners)} |" for name, owners in LIBRARY_OWNERS.items()),
        "",
        f"No file is longer than {MAX_LINES} lines.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    page = Path(__file__).parents[2] / "docs" / "ARCHITECTURE.md"
    page.write_text(architecture_page(), encoding="utf-8")
