"""What sample.py draws, as an array: for the benchmarks that score samples."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample


def drawn(flags: Sequence[str]) -> np.ndarray:
    """The samples of `sample.py FLAGS`: pictures uint8 (N, H, W, C), or sounds int16 (N, T). What it prints,
    the name of a temporary file, is dropped; its progress bar is not."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/samples.npz"
        with contextlib.redirect_stdout(io.StringIO()):
            sample.main([*flags, "--out", out])
        return np.load(out)["arr_0"]
