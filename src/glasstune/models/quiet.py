"""Keeps transformers' bars and log lines off the terminal while it loads or converts."""

from __future__ import annotations

import logging as standard_logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Errors only, no progress bars; what loading had to say is read from its report instead."""
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    # On its first import bitsandbytes may miss an optional package of kernels, and says so.
    bnb = standard_logging.getLogger("bitsandbytes")
    level = bnb.level
    bnb.setLevel(standard_logging.ERROR)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        bnb.setLevel(level)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
