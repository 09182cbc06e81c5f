"""Regional compilation: each block on its own, so that one graph serves all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from glasstune.core.choices import Choices
from glasstune.core.errors import InputError
from glasstune.fast.group import Group
from glasstune.fast.probe import compiler_found

Compile = bool | Literal["auto"]

# The first steps take 12 to 20 s longer, an update of the shape of Llama-3-8B is 0.2 to 0.5 s
# shorter (H100).
WORTH_UPDATES = 60

# Blocks share graphs, but train and eval, gradients on and off, adapters on and off and the first
# block (whose input needs no gradient) each have their own.
RECOMPILE_LIMIT = 64


def decide(
    compile: Compile, device: torch.device, updates: int | None, choices: Choices
) -> tuple[bool, str]:
    """Decides whether blocks are compiled.

    Args:
        compile: What was asked.
        device: Where the model is.
        updates: How many updates will be made, None where not known.
        choices: Notes an automatic decision.

    Returns:
        Whether, and why.

    Raises:
        InputError: `no_compiler`: asked for where it cannot work.
    """
    missing = _missing_compiler(device)
    if compile is True:
        if missing:
            raise InputError(
                "no_compiler",
                f"compile is true, but {missing}",
                where="training.compile",
                fix="install a C++ compiler (g++), or set compile to auto or false",
            )
        return True, "asked for"
    if compile is False:
        return False, "compile is false"
    on, reason = _automatic(device, updates, missing)
    choices.record("training.compile", on, reason)
    return on, reason


def _automatic(device: torch.device, updates: int | None, missing: str | None) -> tuple[bool, str]:
    if missing:
        return False, missing
    if device.type != "cuda":
        return False, f"on a {device.type} compiling takes longer than it saves; true asks for it"
    if updates is not None and updates < WORTH_UPDATES:
        return (
            False,
            f"{updates} updates do not pay for a cold start of 12 to 20 s ({WORTH_UPDATES} do)",
        )
    return True, "blocks run faster than their cold start of 12 to 20 s costs"


def _missing_compiler(device: torch.device) -> str | None:
    if compiler_found() is None:
        return "there is no C++ compiler (g++, clang++ or CXX), which torch.compile needs"
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "Triton is not installed or does not know this GPU"
    return None


class Entry:
    """Stands where a block's compiled call is kept: looks at its groups, then runs the graph.

    A block that FSDP2 shards gathers its weights in hooks of its call. They stay around the graph,
    not in it: there the entry stands in the place of `forward`, which runs between them.

    Args:
        block: The block.
        groups: Those whose members lie in the block.
        options: Of `torch.compile`.
    """

    def __init__(
        self, block: nn.Module, groups: Sequence[Group], options: Mapping[str, Any]
    ) -> None:
        self.block: Any = block
        self.sharded = any(kind.__name__ == "FSDPModule" for kind in type(block).__mro__)
        self.plain: Callable[..., Any] = block.forward if self.sharded else block._call_impl
        self.groups = list(groups)
        self.compiled: Any = torch.compile(self.plain, **options)
        # transformers 5.24 recomputes a layer from within its forward, 5.17 from around its call.
        self.recomputes_inside = not any(
            "__call__" in kind.__dict__ for kind in type(block).__mro__ if kind is not nn.Module
        )

    def put_in(self) -> None:
        """Lets calls of the block come here."""
        if self.sharded:
            self.block.forward = self
        else:
            self.block._compiled_call_impl = self

    def take_out(self) -> None:
        """Lets calls of the block go to the block again."""
        if self.sharded:
            del self.block.forward
        else:
            self.block._compiled_call_impl = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the block."""
        if torch.compiler.is_compiling():  # the whole model is being compiled by someone
            return self.plain(*args, **kwargs)
        if any(map(_is_cache, args)) or any(map(_is_cache, kwargs.values())):
            # A cache grows with each token: every length would be a graph of its own.
            try:
                return self.plain(*args, **kwargs)
            finally:
                self._leave()
        recomputed = getattr(self.block, "gradient_checkpointing", False) and self.block.training
        if recomputed and self.recomputes_inside and torch.is_grad_enabled():
            inner = partial(self._run_once, **kwargs)
            return self.block._gradient_checkpointing_func(inner, *args)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            for group in self.groups:
                group.look()
                group.open = True
            return self.compiled(*args, **kwargs)
        finally:
            self._leave()

    def _run_once(self, *args: Any, **kwargs: Any) -> Any:
        """Runs under a checkpoint that lies around the graph: dynamo does not trace one well."""
        self.block.gradient_checkpointing = False
        try:
            return self._run(*args, **kwargs)
        finally:
            self.block.gradient_checkpointing = True

    def _leave(self) -> None:
        for group in self.groups:
            group.open = False
            group.leave()


def compile_regions(
    regions: Mapping[str, nn.Module], groups: Sequence[Group], options: Mapping[str, Any]
) -> list[str]:
    """Compiles the call of each region; torch does the work when it is first called.

    Args:
        regions: Path to module; none inside another.
        groups: All groups of the model.
        options: Of `torch.compile`.

    Returns:
        The paths that are compiled; a module that was compiled before is left alone.
    """
    done = []
    for path, module in regions.items():
        if module._compiled_call_impl is not None:
            continue
        inside = [group for group in groups if group.paths[0].startswith(f"{path}.")]
        Entry(module, inside, options).put_in()
        done.append(path)
    return done


def entry_of(module: nn.Module) -> Entry | None:
    """Returns what stands in a module's call, or None where it is not compiled by us."""
    for found in (module._compiled_call_impl, module.__dict__.get("forward")):
        if isinstance(found, Entry):
            return found
    return None


def free_regions(regions: Mapping[str, nn.Module]) -> None:
    """Takes our compiled calls away again."""
    for module in regions.values():
        if (entry := entry_of(module)) is not None:
            entry.take_out()


def _is_cache(value: Any) -> bool:
    return any(kind.__name__ == "Cache" for kind in type(value).__mro__)
