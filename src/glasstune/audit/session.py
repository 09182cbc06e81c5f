"""One open audit: hooks, what they saw, and what the terms gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from glasstune.audit.breaks import find_breaks
from glasstune.audit.calls import CallLog
from glasstune.audit.finite import OutputWatch
from glasstune.audit.norms import many_stats
from glasstune.audit.state import TermState, Watched, text_of

SMALL_BUFFER = 1 << 16
"""Entries of a buffer that is put back after a recomputation without asking whether it changed."""

Engine = Literal["grad", "backward", "none", "unknown"]


class Session:
    """Everything between entering and leaving an audit.

    Args:
        model: The model.
        audited: Whether a parameter of that name is audited.
        activations: Whether outputs are watched for NaN and Inf.
        frozen_values: Whether frozen parameters are summarised.
        keep_values: Whether tensors are kept as text.
        leaves: Tensors beside the model's whose `.grad` must not change (the optimiser's).
        left_alone: Whether the caller leaves every `.grad` alone from the backward to the end of
            the audit. What came is then read there, once, instead of tensor by tensor on arrival.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        audited: Callable[[str], bool],
        activations: bool,
        frozen_values: bool,
        keep_values: bool,
        leaves: Sequence[Tensor] = (),
        left_alone: bool = False,
    ) -> None:
        self.model = model
        self.left_alone = left_alone
        self.splits = True
        self.leaves = leaves
        self.watched: dict[int, Watched] = {}
        self.values: dict[int, Tensor] = {}
        self.terms: dict[str, TermState] = {}
        self.outputs = OutputWatch()
        self.log = CallLog(
            model,
            on_output=self.outputs.look if activations else None,
            on_start=self._forward_begins,
            on_parameters=self._new_parameters,
        )
        self.engine: Engine = "none"
        self.notes: dict[str, str] = {}
        self.no_graph = ""
        self.compiled = False
        self.reentrant = False
        self.muted = False
        self.arrivals = 0
        self._audited = audited
        self._frozen_values = frozen_values
        self._keep_values = keep_values
        self._arrivals_at_start = 0
        self._analysed = False
        self._buffers: list[tuple[nn.Module, str, Tensor, int]] = []

    def attach(self) -> None:
        """Sets every hook and notes values and buffers as they are."""
        named = [pair for pair in self.model.named_parameters() if self._audited(pair[0])]
        for name, tensor in named:
            self._watch(name, tensor)
        self._note_values([tensor for _, tensor in named])
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_inference():
                    self._buffers.append((module, name, buffer, buffer._version))
        self.log.known = set(self.watched)
        self.log.attach()

    def detach(self) -> None:
        """Removes every hook."""
        self.log.detach()
        self.outputs.detach()
        for watched in self.watched.values():
            if watched.handle is not None:
                watched.handle.remove()
                watched.handle = None

    def hook_unfrozen(self) -> None:
        """Hooks parameters that were unfrozen since the audit began."""
        for watched in self.watched.values():
            if watched.handle is None and watched.tensor.requires_grad:
                watched.handle = self._hook(watched)

    def mute(self, on: bool) -> None:
        """Makes the hooks look away while the audit itself runs a backward."""
        self.muted = self.log.muted = self.outputs.muted = on

    def written_buffers(self) -> list[tuple[nn.Module, str, Tensor]]:
        """Buffers that the forward has written, or may have: small ones are not asked.

        Batch norm's kernel writes its running mean without counting up its version.
        """
        found = []
        for module, name, buffer, version in self._buffers:
            current = module._buffers.get(name)
            if current is None or current.is_inference():
                continue
            written = current is not buffer or current._version != version
            if written or current.numel() <= SMALL_BUFFER:
                found.append((module, name, current))
        return found

    def find_breaks(self, loss_nodes: set[Any] | None) -> None:
        """Looks where the road of each parameter ends that nothing has reached so far."""
        dead = [
            watched.tensor
            for watched in self.watched.values()
            if watched.tensor.requires_grad
            and not watched.arrivals
            and watched.reached_at_all() is not True
        ]
        for key, broken in find_breaks(self.log.events, dead, loss_nodes).items():
            held = self.watched[key].broken
            if broken.last is not None or held is None:
                self.watched[key].broken = broken
        self._analysed = True
        self.log.forget_graph()

    def finish(self) -> None:
        """Looks at what the last round left."""
        if not self._analysed:
            self.find_breaks(None)

    def release(self, keep_gradients: bool) -> None:
        """Frees what only the record needed; the graph is let go."""
        for watched in self.watched.values():
            watched.release(keep_gradients)
        for state in self.terms.values():
            state.last = None

    def _watch(self, name: str, tensor: Tensor) -> None:
        watched = Watched(name, tensor)
        self.watched[id(tensor)] = watched
        if self._keep_values:
            watched.texts["value"] = text_of(tensor)
        if tensor.requires_grad:
            watched.handle = self._hook(watched)

    def _note_values(self, tensors: Sequence[Tensor]) -> None:
        """Summarises parameters as they are now."""
        chosen = [
            tensor
            for tensor in tensors
            if (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
            and not tensor.is_meta
            and (tensor.requires_grad or self._frozen_values)
        ]
        for tensor, row in zip(chosen, many_stats(chosen), strict=True):
            self.values[id(tensor)] = row

    def _hook(self, watched: Watched) -> RemovableHandle:
        def arrived(gradient: Tensor | None) -> None:
            # None: a custom backward said that it gives nothing.
            if gradient is not None and not self.muted:
                self.arrivals += 1
                watched.arrive(
                    gradient,
                    self.arrivals,
                    has_terms=bool(self.terms) and self.splits,
                    keep_text=self._keep_values,
                    left_alone=self.left_alone,
                )

        handle: RemovableHandle = watched.tensor.register_hook(arrived)  # type: ignore[no-untyped-call]
        return handle

    def _new_parameters(self, path: str, own: Mapping[str, Tensor]) -> None:
        """Hooks a parameter that was put in, or unfrozen, after the audit began."""
        for attribute, tensor in own.items():
            name = f"{path}.{attribute}" if path else attribute
            watched = self.watched.get(id(tensor))
            if watched is None and self._audited(name):
                self._watch(name, tensor)
                self._note_values([tensor])
            elif watched is not None and watched.handle is None and tensor.requires_grad:
                watched.handle = self._hook(watched)

    def _forward_begins(self) -> None:
        """An outermost call: where a backward has run since the last, a new round begins."""
        for term in self.terms.values():
            term.fresh = False
        if self.arrivals > self._arrivals_at_start or self._analysed:
            if not self._analysed:
                self.find_breaks(None)
            self._arrivals_at_start = self.arrivals
            self._analysed = False
