"""What a device and its libraries take and give: measured on the device itself, in a moment."""

from __future__ import annotations

import torch


def library_bytes() -> int:
    """Returns what CUDA's product libraries keep allocated once products have run.

    cuBLAS takes a workspace from torch's allocator for each thread that multiplies: the main one
    and autograd's. Its size depends on the card, so it is measured: two small products of each
    type, forward and backward, and nothing of ours left behind.
    """
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.ones(64, 64, device="cuda", dtype=dtype, requires_grad=True)
        bias = torch.ones(64, device="cuda", dtype=dtype)
        (torch.addmm(bias, x, x) @ x).sum().backward()  # type: ignore[no-untyped-call]
        del x, bias
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before
