"""The device of a plan: what may be used of it, how fast it is, how blocks will run on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from glasstune.core.choices import Choices
from glasstune.core.config import Config
from glasstune.core.units import format_bytes, parse_bytes
from glasstune.workflows.prepare_run import Prepared

if TYPE_CHECKING:
    from glasstune.planner.model import MemoryModel
    from glasstune.planner.trace import Batch

CUDA_CONTEXT = 685 * 2**20
"""What the driver takes for a process once kernels run: measured on an H100 (CUDA 13)."""

CUDA_SLACK = 0.02
"""What CUDA's allocator cannot give out, as a share of the activations: assumed, not measured.

On an H100 it held 1 to 24 % more than was asked of it (20 runs with room to spare), most of it
cache that it gives back where memory is short.
"""


@dataclass
class Device:
    """A device before a run.

    Args:
        kind: `cpu` or `cuda`.
        name: For people.
        fast: Whether layers of one input share a product.
        compiled: Whether blocks are compiled.
        attention: Implementation that the family needs, None for its own.
        rate: Operations a second of products.
        bandwidth: Bytes a second, read and written, of the device's memory.
        rate_note: Where that comes from.
        context: Bytes of driver and libraries.
        library: Bytes that product libraries keep.
        slack: Share of the activations that the allocator holds beside them.
        notes: How these were found.
    """

    kind: str
    name: str
    fast: bool
    compiled: bool
    attention: str | None = None
    rate: float = 0.0
    bandwidth: float = 1.0
    rate_note: str = ""
    context: int = 0
    library: int = 0
    slack: float = 0.0
    notes: dict[str, str] = field(default_factory=dict)

    def measure(self, model: MemoryModel, batch: Batch) -> None:
        """Measures the rate of products, and what libraries take, in a fraction of a second."""
        import torch

        from glasstune.planner.seconds import SHARE, probe_bandwidth, probe_rate

        causal = model.shadow.model.get_base_model()
        width = int(causal.get_output_embeddings().weight.shape[1])
        dtype = torch.float32 if model.shadow.autocast is None else torch.bfloat16
        emulated = model.setup.fp8 and self.kind == "cpu"
        if emulated:
            dtype = torch.float32
        self.rate = probe_rate(torch.device(self.kind), width, batch.tokens, dtype)
        share = SHARE[self.kind, self.compiled]
        self.rate_note = (
            f"products of this model's width run at {self.rate / 1e12:.2f} TFLOP/s here, measured "
            f"just now; a whole step reaches {share:.0%} of that (calibrated)"
        )
        if model.setup.fp8 and not emulated:
            self.rate_note += "; a float8 product takes half as long, all beside products as long"
        if emulated:
            self.rate_note += "; float8 products are emulated in float32 here"
        if self.compiled:
            self.bandwidth = probe_bandwidth(torch.device(self.kind))
        if self.kind == "cuda":
            from glasstune.planner.device import library_bytes

            self.library, self.context, self.slack = library_bytes(), CUDA_CONTEXT, CUDA_SLACK
            self.notes["workspace"] = (
                f"product libraries keep {format_bytes(self.library)}, measured on this device; "
                f"the allocator's slack is {self.slack:.0%} of the activations (assumed)"
            )
            self.notes["context"] = "the driver's context: measured on an H100"

    def limit(self, config: Config) -> tuple[int, str]:
        """Returns what may be used, and where that number comes from."""
        given = config.training.max_memory
        if given is not None:
            return parse_bytes(given, where="training.max_memory"), "training.max_memory"
        if self.kind == "cuda":
            return self.free(), "free on the device, its driver's context with it"
        return self.free(), "free in memory, with what this process has"

    def free(self) -> int:
        """Returns what this process has and may still take."""
        if self.kind == "cuda":
            import torch

            free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
            return free + self.context
        from glasstune.planner.host import available_bytes, resident_bytes

        return available_bytes() + resident_bytes()

    def download(self, prepared: Prepared, base: int) -> int | None:
        """Returns the bytes still to be fetched: 0 for local models, None where not known."""
        if prepared.resolved.kind != "hub":
            return 0
        from huggingface_hub import try_to_load_from_cache

        for name in ("model.safetensors", "model.safetensors.index.json"):
            if isinstance(try_to_load_from_cache(prepared.resolved.folder_or_id, name), str):
                return 0
        return base if prepared.config.model.bits == 16 else None


def device_of(prepared: Prepared, updates: int) -> Device:
    """Returns the device of a run, and how its blocks will be run there."""
    import torch

    from glasstune.fast.compile import decide
    from glasstune.models.families.table import family_of
    from glasstune.models.load import choose_device

    place = choose_device(prepared.config.model.device, Choices())
    compiled, _ = decide(prepared.config.training.compile, place, updates, prepared.choices)
    family = family_of(prepared.resolved.config)
    name = "CPU"
    if place.type == "cuda":
        name = torch.cuda.get_device_name(place)
    # Packed layers have float8 products in groups alone.
    inside = prepared.config.training.compute == "fp8" and prepared.config.model.bits != 16
    return Device(
        place.type, name, compiled or place.type != "cpu" or inside, compiled,
        None if family is None else family.attention,
    )  # fmt: skip
