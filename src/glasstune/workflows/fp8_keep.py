"""`training.fp8_keep: auto`: measured once, before the base is converted, and then the run's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glasstune.core.batch import Document
from glasstune.core.config_load import load_config
from glasstune.core.files import write_json_atomic
from glasstune.core.fp8 import Fp8Record

if TYPE_CHECKING:
    from glasstune.data.packing import PackedSet
    from glasstune.training.distributed import World
    from glasstune.workflows.prepare_run import Prepared

FILE = "fp8.json"
_TOKENS = 512
"""Of the rows that layers are measured with, padding included."""
_ROWS = 16
"""From which those are taken."""


@dataclass
class Fp8Keep:
    """Decides which layers of a base stay in bfloat16.

    Args:
        folder: The run folder, whose own decision is followed where the run goes on; None: none.
        world: The ranks of the run; rank 0 measures.
        record: What was measured, where it was.
    """

    folder: Path | None = None
    world: World | None = None
    record: Fp8Record | None = None

    def resolve(self, prepared: Prepared, base: Any) -> None:
        """Makes `training.fp8_keep: auto` a list.

        Args:
            prepared: The run; its config is resolved in place.
            base: Loaded, plain, not converted.

        Raises:
            InputError: `no_fp8`: the GPU has no float8 products.
        """
        from glasstune.models.fp8 import check_device
        from glasstune.models.load import choose_device

        training, choices = prepared.config.training, prepared.choices
        if training.fp8_keep != "auto":
            return
        device = choose_device(prepared.config.model.device, choices)
        check_device(device)
        decided = self.world.broadcast(self._saved()) if self.world else self._saved()
        if decided is not None:
            why = "as the run began"
        elif base.device.type != device.type:
            decided = []
            why = "not measured: the base waits in the host's memory until it is sharded"
        else:
            if self.world is None or self.world.writes:
                self.record = measure(prepared, base)
            mine = {} if self.record is None else self.record.kept
            kept: dict[str, str] = self.world.broadcast(mine) if self.world else mine
            decided = list(kept)
            why = "no layer's error asks for bfloat16" if not kept else "their errors ask for it"
            for path, reason in kept.items():
                choices.record(f"training.fp8_keep {path}", "bfloat16", reason)
        training.fp8_keep = choices.record("training.fp8_keep", decided, why)

    def write(self, folder: Path) -> None:
        """Writes `fp8.json`, where something was measured."""
        if self.record is not None:
            write_json_atomic(folder / FILE, self.record.to_dict())

    def lines(self) -> list[str]:
        """What was measured, for the terminal; empty where nothing was."""
        from glasstune.reports.fp8_text import fp8_lines

        return [] if self.record is None else fp8_lines(self.record.to_dict())

    def _saved(self) -> list[str] | None:
        """Returns the list of a run that goes on, or None."""
        file = None if self.folder is None else self.folder / "config.yaml"
        if file is None or not file.is_file():
            return None
        keep = load_config(file).config.training.fp8_keep
        return None if keep == "auto" else keep


def measure(prepared: Prepared, base: Any) -> Fp8Record:
    """Measures a base on a few training rows, and decides.

    Args:
        prepared: The run.
        base: Loaded, plain, not converted.
    """
    import torch

    from glasstune.data.packing import PackedSet
    from glasstune.models.fp8 import candidates
    from glasstune.models.fp8_report import measure_fp8

    rows = _few(prepared.data.train, prepared.config.training.seed)
    few = PackedSet.build(rows, max_length=_TOKENS, packed=False, seed=0)
    batch = few.micro_batch(range(len(rows)), 0, prepared.pad_id)
    skip = prepared.config.model.quantization.get("llm_int8_skip_modules")
    record = measure_fp8(
        base, candidates(base, skip), torch.from_numpy(batch.input_ids),
        torch.from_numpy(batch.attention_mask), torch.from_numpy(batch.targets),
    )  # fmt: skip
    record.decide()
    return record


def _few(train: PackedSet, seed: int) -> list[Document]:
    """Returns the first rows of the run, cut to equal parts of the tokens.

    Rows are cut shorter as long as something of them is trained.
    """
    documents = list(islice(_in_order(train, seed), _ROWS))
    for length in (_TOKENS // 4, _TOKENS // 2, _TOKENS):
        cut = [_cut(document, length) for document in documents]
        found = [document for document in cut if document.trained_tokens]
        if found:
            return found[: _TOKENS // max(map(len, found))]
    first = _cut(documents[0], _TOKENS)  # its prompt fills it: then the prompt is what is predicted
    return [replace(first, labels=first.ids)]


def _in_order(train: PackedSet, seed: int) -> Iterator[Document]:
    for pack in train.order(seed, 0):
        for index in train.packs[int(pack)].tolist():
            yield train.documents[index]


def _cut(document: Document, length: int) -> Document:
    return replace(document, ids=document.ids[:length], labels=document.labels[:length])
