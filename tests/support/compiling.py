"""Marks for tests that compile: warnings of torch's own compiler."""

from __future__ import annotations

import pytest

QUIET_COMPILER = [
    # For any compiled function with an input that is no leaf.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    # torch 2.11's own, as its compiler is imported.
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    # dynamo makes an instance for each autograd function that it traces.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
