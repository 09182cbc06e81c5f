"""A model's forward with one layer in memory at a time, read when it is reached.

The forward is the class's own: hooks fill a layer's weights before it runs and empty them after.
Hidden states and logits are two passes, so that the head is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from glasstune.core.errors import RunError
from glasstune.models.head import causal_model

Fetch = Callable[[list[str]], Mapping[str, Tensor]]
"""Gives weights of the plain model by name, as stored or at any float type."""

_LOGITS = 2**23
"""Logits that are made at a time: 32 MB in float32."""


def module_paths(model: nn.Module) -> dict[int, str]:
    """Returns each module's path by `id`; take it before an adapter wraps some of them."""
    return {id(module): path for path, module in model.named_modules()}


class StreamedModel:
    """A model without weights that fetches them layer by layer.

    Args:
        model: Plain, or with adapters around some modules; what is on the meta device is fetched.
        paths: `module_paths` of the plain model.
        fetch: Gives the weights.
        dtype: What floats are cast to.
        device: Where the layers run.
        whole: Ids of modules around which nothing may be split (adapters look at their base's
            weight from outside).
        unread: Ids of modules whose weights no forward reads.
        keep_float32: Names of weights that stay float32 in a 16-bit forward.
        on_read: Told the bytes that were fetched for a layer.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Mapping[int, str],
        fetch: Fetch,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        whole: Collection[int] = (),
        unread: Collection[int] = (),
        keep_float32: Collection[str] = (),
        on_read: Callable[[int], None] | None = None,
    ) -> None:
        self.model = model
        self.causal = causal_model(model)
        self.device = device or torch.device("cpu")
        self._paths, self._fetch, self._dtype = paths, fetch, dtype
        self._unread, self._float32 = frozenset(unread), frozenset(keep_float32)
        self._on_read = on_read
        self._keep = False
        self._loaded: dict[int, list[tuple[dict[str, Any], str, Any]]] = {}
        self._hooks: list[Any] = []
        self._place_buffers()
        for unit in _units(self.causal, frozenset(whole)):
            if self._wanted(unit):
                self._hooks.append(unit.register_forward_pre_hook(self._load))
                self._hooks.append(unit.register_forward_hook(self._free, always_call=True))

    def close(self) -> None:
        """Removes the hooks and every weight."""
        self._free_all()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @torch.no_grad()
    def hidden(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Runs the backbone once over all rows.

        Args:
            rows: Token ids, none empty; shorter ones are padded on the right behind a mask.

        Returns:
            The last hidden state of each row's own tokens, [L, d] on the CPU.
        """
        longest = max(len(row) for row in rows)
        ids_BL = torch.zeros((len(rows), longest), dtype=torch.long)
        mask_BL = torch.zeros_like(ids_BL)
        for index, row in enumerate(rows):
            ids_BL[index, : len(row)] = torch.as_tensor(row)
            mask_BL[index, : len(row)] = 1
        output = self.causal.base_model(
            input_ids=ids_BL.to(self.device),
            attention_mask=mask_BL.to(self.device),
            use_cache=False,
            return_dict=True,
        )
        self._output = type(output)
        states_BLD = output[0]
        return [states_BLD[index, : len(row)].cpu() for index, row in enumerate(rows)]

    @torch.no_grad()
    def logits(self, states: Sequence[Tensor]) -> Iterator[Tensor]:
        """Runs the head, and what the class does behind it, over hidden states.

        The class's own forward runs with its backbone replaced by the states, so that scales and
        caps are those of the class.

        Args:
            states: Of `hidden`.

        Yields:
            Float32 logits of a few tokens, [n, V] on the CPU, in order.

        Raises:
            RunError: `head_not_found`: the class does not call the backbone that it names.
        """
        tokens_ND = torch.cat(list(states))
        vocabulary = self.causal.config.get_text_config(decoder=True).vocab_size
        step = max(1, _LOGITS // vocabulary)
        with self._kept():
            for start in range(0, len(tokens_ND), step):
                chunk = tokens_ND[start : start + step]
                yield self._head(chunk.unsqueeze(0).to(self.device))[0].float().cpu()

    def _head(self, states_1ND: Tensor) -> Tensor:
        called = False

        def given(*_: Any, **__: Any) -> Any:
            nonlocal called
            called = True
            return self._output(last_hidden_state=states_1ND)

        backbones = [self.causal.base_model]
        if hasattr(self.causal, "get_decoder"):
            decoder = self.causal.get_decoder()
            backbones += [decoder] if decoder is not self.causal.base_model else []
        for backbone in backbones:
            backbone.__dict__["forward"] = given
        try:
            ids = torch.zeros(states_1ND.shape[:2], dtype=torch.long, device=self.device)
            logits: Tensor = self.causal(input_ids=ids, use_cache=False).logits
        finally:
            for backbone in backbones:
                del backbone.__dict__["forward"]
        if not called:
            kind = type(self.causal).__name__
            raise RunError(
                "head_not_found",
                f"{kind} does not call its {self.causal.base_model_prefix} as a module, so its "
                "layers cannot be read one by one",
                where="certificate",
                fix="use --no-certificate, and compare the merged model yourself",
            )
        return logits

    @contextmanager
    def _kept(self) -> Iterator[None]:
        self._keep = True
        try:
            yield
        finally:
            self._keep = False
            self._free_all()

    def _wanted(self, unit: nn.Module) -> list[tuple[dict[str, Any], str, str]]:
        """Returns (holder, key, name) of every weight of a unit that must be fetched."""
        found: list[tuple[dict[str, Any], str, str]] = []
        for module in unit.modules():
            if id(module) in self._unread:
                continue
            path = self._paths.get(id(module))
            holders: list[tuple[dict[str, Any], Iterable[str]]] = [
                (module._parameters, [n for n, v in module._parameters.items() if v is not None]),
                (module._buffers, module._buffers.keys() - module._non_persistent_buffers_set),
            ]
            for holder, names in holders:
                for name in names:
                    value = holder[name]
                    if value is None or (holder is module._parameters and not value.is_meta):
                        continue
                    if path is None:
                        raise RuntimeError(f"{name} of {type(module).__name__} has no weight")
                    found.append((holder, name, f"{path}.{name}" if path else name))
        return found

    def _load(self, unit: nn.Module, _: Any) -> None:
        if id(unit) in self._loaded:
            return
        wanted = self._wanted(unit)
        fetched = dict(self._fetch([name for _, _, name in wanted]))
        put, size = [], 0
        for holder, key, name in wanted:
            value = fetched.pop(name, None)  # as stored, it goes as soon as it is converted
            if value is None:  # a buffer that the checkpoint leaves to the class
                continue
            size += value.nbytes
            put.append((holder, key, holder[key]))
            dtype = torch.float32 if name in self._float32 else self._dtype
            if value.is_floating_point():
                value = value.to(dtype)
            value = value.to(self.device)
            is_parameter = isinstance(holder[key], Parameter)
            holder[key] = Parameter(value, requires_grad=False) if is_parameter else value
        self._loaded[id(unit)] = put
        if self._on_read is not None:
            self._on_read(size)

    def _free(self, unit: nn.Module, *_: Any) -> None:
        if not self._keep:
            self._put_back(id(unit))

    def _put_back(self, unit: int) -> None:
        for holder, key, empty in self._loaded.pop(unit, ()):
            holder[key] = empty

    def _free_all(self) -> None:
        for unit in list(self._loaded):
            self._put_back(unit)

    def _place_buffers(self) -> None:
        """Moves what is not on the meta device: buffers and adapters."""
        for module in self.model.modules():
            holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for holder in holders:
                for name, value in holder.items():
                    if value is not None and not value.is_meta and value.device != self.device:
                        moved = value.to(self.device)
                        if isinstance(value, Parameter):
                            moved = Parameter(moved, requires_grad=False)
                        holder[name] = moved


def _units(module: nn.Module, whole: frozenset[int]) -> Iterator[nn.Module]:
    """Yields the modules that are filled and emptied at once, each with all that is below it."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif id(child) in whole or _owns(child):
            yield child
        else:
            yield from _units(child, whole)


def _owns(module: nn.Module) -> bool:
    values = [*module._parameters.values(), *module._buffers.values()]
    persistent = module._buffers.keys() - module._non_persistent_buffers_set
    return any(value is not None for value in module._parameters.values()) or (
        bool(values) and bool(persistent)
    )
