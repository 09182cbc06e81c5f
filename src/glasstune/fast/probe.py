"""Tries torch.compile on a small function, forward and backward."""

from __future__ import annotations

import os
import shutil
import time

import torch


def compiler_found() -> str | None:
    """Returns the C++ compiler that torch.compile would use on a CPU, or None."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if shutil.which(name):
            return name
    return None


def try_compile(device: str) -> float:
    """Compiles a small function and compares it with the plain one.

    Returns:
        Seconds that compilation and the first call took.

    Raises:
        Exception: Whatever torch raises where compilation does not work here.
        ArithmeticError: The compiled function computes something else.
    """

    def plain(x: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.silu(x) * x).sum(-1)

    x = torch.linspace(-2, 2, 64, device=device).reshape(8, 8)
    started = time.monotonic()
    compiled = torch.compile(plain, dynamic=False)
    given = x.clone().requires_grad_(True)
    (got,) = torch.autograd.grad(compiled(given).sum(), given)
    seconds = time.monotonic() - started
    truth = x.clone().requires_grad_(True)
    (want,) = torch.autograd.grad(plain(truth).sum(), truth)
    if not torch.allclose(got, want, atol=1e-5):
        raise ArithmeticError("the compiled function has another gradient")
    return seconds
