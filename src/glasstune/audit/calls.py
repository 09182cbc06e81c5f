"""What each module saw when it was called: hooks that are set before the forward.

The hooks only look. Under torch.compile they step aside at once, and modules inside a region that
is compiled already get none, so that nothing is traced differently or compiled again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from glasstune.audit.peft_names import AdapterState, adapter_state, has_adapter

Memory = StorageWeakRef

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)


@dataclass(slots=True)
class ModuleCalls:
    """All forward calls of one module within the audit.

    Args:
        count: Calls in the forward; a recomputation in a backward is not counted.
        with_grad: Of them, calls with gradients on.
        inference: Of them, calls under `inference_mode`.
        reentrant: Whether a call without gradients was inside reentrant checkpointing.
        recomputed: Calls while a backward ran.
        line: `file.py:12` of the first call.
        no_grad_line: The same of the first call with gradients off.
        parameters: The module's own parameters at the latest call, and whether they needed a
            gradient then.
        adapter: What PEFT's switches said at the latest call.
    """

    count: int = 0
    with_grad: int = 0
    inference: int = 0
    reentrant: bool = False
    recomputed: int = 0
    line: str | None = None
    no_grad_line: str | None = None
    parameters: dict[str, tuple[Tensor, bool]] = field(default_factory=dict)
    adapter: AdapterState | None = None


@dataclass(slots=True)
class Event:
    """One call, in the order of things.

    Args:
        path: Of the module.
        start: Moment at which it began.
        end: Moment at which it returned; -1 where it did not.
        grad_in: Whether an input needed a gradient.
        plain_in: Memory of the inputs that needed none.
        integers_in: Whether all of those held integers.
        line: `file.py:12`.
        grad_enabled: Whether gradients were on.
        nodes: `grad_fn` of the outputs.
        out: Memory of the outputs.
        has_in: Whether any input was a tensor.
    """

    path: str
    start: int
    end: int = -1
    grad_in: bool = False
    plain_in: tuple[Memory, ...] = ()
    integers_in: bool = False
    line: str | None = None
    grad_enabled: bool = True
    nodes: tuple[Any, ...] = ()
    out: tuple[Memory, ...] = ()
    has_in: bool = False


class CallLog:
    """Hooks on every module of a model, and what they saw.

    Args:
        model: Any module.
        on_output: Called with (path, output tensor) for each floating-point output in the forward
            and in a recomputation; None for no look at outputs.
        on_start: Called before an outermost call.
        on_parameters: Called with (module path, its own parameters) where they are not those of
            the last call.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        on_output: Callable[[str, Tensor], None] | None = None,
        on_start: Callable[[], None] | None = None,
        on_parameters: Callable[[str, Mapping[str, Tensor]], None] | None = None,
    ) -> None:
        self.calls: dict[str, ModuleCalls] = {}
        self.events: list[Event] = []
        self.compiled: set[str] = set()
        self.autocast = False
        self.muted = False
        self.known: set[int] = set()
        self._on_output = on_output
        self._on_start = on_start
        self._on_parameters = on_parameters
        self._open: list[Event] = []
        self._clock = 0
        self._handles: list[RemovableHandle] = []
        self._model = model

    @property
    def seen(self) -> bool:
        """Whether any call was seen."""
        return bool(self.calls)

    def attach(self) -> None:
        """Sets the hooks."""
        for path, module in self._model.named_modules():
            if any(_within(path, region) for region in self.compiled):
                continue
            if is_compiled_module(module):
                self.compiled.add(path)
                continue
            adapted = has_adapter(module)
            before = _before(self, path, adapted)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(_after(self, path)))

    def detach(self) -> None:
        """Removes the hooks; what was seen stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._open = []

    def in_compiled_region(self, path: str) -> bool:
        """Whether a module lies in a region whose calls cannot be seen."""
        return any(_within(path, region) for region in self.compiled)

    def forget_graph(self) -> None:
        """Drops the order of calls and its hold on the graph; the counts stay."""
        self.events = [event for event in self.events if event.end < 0]

    def enter(self, path: str, module: nn.Module, args: Any, kwargs: Any, adapted: bool) -> None:
        """Notes that a call begins."""
        calls = self.calls.setdefault(path, ModuleCalls())
        if in_backward():
            calls.recomputed += 1
            return
        if not self._open and self._on_start is not None:
            self._on_start()
        grad = torch.is_grad_enabled()
        line = caller_line()
        calls.count += 1
        calls.with_grad += grad
        calls.line = calls.line or line
        if not grad:
            calls.no_grad_line = calls.no_grad_line or line
            calls.inference += torch.is_inference_mode_enabled()
            calls.reentrant = calls.reentrant or _inside_reentrant()
        # Frozen weights that are only passing (offloaded, loaded for one call) are not held.
        own = {
            name: value
            for name, value in module._parameters.items()
            if value is not None and (value.requires_grad or id(value) in self.known)
        }
        if own:
            if self._on_parameters is not None and any(
                _changed(calls.parameters.get(name), value) for name, value in own.items()
            ):
                self._on_parameters(path, own)
            calls.parameters = {name: (value, value.requires_grad) for name, value in own.items()}
        if adapted:
            calls.adapter = adapter_state(module)
        tensors = [*tensors_in(args), *tensors_in(kwargs)]
        if tensors and not self._open:
            self.autocast |= torch.is_autocast_enabled(tensors[0].device.type)
        plain = [tensor for tensor in tensors if not tensor.requires_grad]
        event = Event(
            path,
            self._tick(),
            grad_in=len(plain) < len(tensors),
            plain_in=memory_of(plain),
            integers_in=bool(plain) and not any(_is_float(tensor) for tensor in plain),
            line=line,
            grad_enabled=grad,
            has_in=bool(tensors),
        )
        self.events.append(event)
        self._open.append(event)

    def leave(self, path: str, output: Any) -> None:
        """Notes that a call returned."""
        outputs = list(tensors_in(output))
        if self._on_output is not None:
            for tensor in outputs:
                if _is_float(tensor):
                    self._on_output(path, tensor)
        if in_backward():
            return
        # A call that raised left its event open: it is passed over.
        while self._open:
            event = self._open.pop()
            if event.path == path:
                event.end = self._tick()
                event.nodes = tuple(t.grad_fn for t in outputs if t.grad_fn is not None)
                event.out = memory_of(outputs)
                return

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def _before(log: CallLog, path: str, adapted: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or log.muted or _in_transform():
            return
        log.enter(path, module, args, kwargs, adapted)

    return hook


def _after(log: CallLog, path: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or log.muted or _in_transform():
            return
        log.leave(path, output)

    return hook


def _changed(held: tuple[Tensor, bool] | None, value: Tensor) -> bool:
    return held is None or held[0] is not value or held[1] != value.requires_grad


def _within(path: str, region: str) -> bool:
    return path == region or region == "" or path.startswith(region + ".")


def is_compiled_module(module: nn.Module) -> bool:
    """Whether calling the module runs a region that torch.compile made of it."""
    return (
        type(module).__name__ == "OptimizedModule"
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        or hasattr(module.__dict__.get("forward"), "compiled")  # within FSDP2's own hooks
    )


def in_backward() -> bool:
    """Whether a backward is running in this thread."""
    running: int = torch._C._current_graph_task_id()
    return running != -1


def _in_transform() -> bool:
    """Whether torch.func is transforming: its tensors must not be kept."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def tensors_in(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """Yields the tensors of nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item, depth - 1)
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, depth - 1)


def caller_line() -> str | None:
    """`file.py:12` of the nearest frame outside torch and the audit."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH, _HERE)):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def _inside_reentrant() -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and "CheckpointFunction" in code.co_qualname:
            return True
        frame = frame.f_back
    return False


def _is_float(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def memory_of(tensors: Sequence[Tensor]) -> tuple[Memory, ...]:
    """Names the memory of tensors without keeping it.

    An address alone would not do: memory that was freed is given out again. A weak reference keeps
    the number of a storage from being used for another one.
    """
    return tuple(
        StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        for tensor in tensors
        if tensor.layout == torch.strided
    )
