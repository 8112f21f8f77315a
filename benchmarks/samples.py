"""What sample.py draws, as an array, and of which runs: for the benchmarks that score samples."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample
from checkpoints import load_checkpoint
from files import check_writable


def drawn(flags: Sequence[str]) -> np.ndarray:
    """The samples of `sample.py FLAGS`: pictures uint8 (N, H, W, C), or sounds int16 (N, T). What it prints,
    the name of a temporary file, is dropped; its progress bar is not."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/samples.npz"
        with contextlib.redirect_stdout(io.StringIO()):
            sample.main([*flags, "--out", out])
        return np.load(out)["arr_0"]


def check_out(flag: str, file: str | Path | None, endings: Collection[str] = ()) -> None:
    """Raise ValueError where a file is asked for that cannot be written. endings: those it may have."""
    if file is None:
        return
    file = Path(file)
    if endings and file.suffix.lower() not in endings:
        raise ValueError(f"{flag} {file}: must end in {', '.join(endings)}")
    if not file.parent.is_dir():
        raise ValueError(f"{flag} {file}: the folder {file.parent} does not exist; create it first")
    check_writable(file)


def check_replaces(out: Path, file: Path, read: Callable[[Path], object], what: str) -> None:
    """Raise ValueError where a file that --out would replace is there and `read` refuses it."""
    if file.exists():
        try:
            read(file)
        except ValueError:
            raise ValueError(f"--out {out}: {file} exists and is not a {what}; give another name") from None


def network_run(run: str, source: str) -> dict:
    """The checkpoint of a run whose network was trained on this --data. Raises ValueError for any other."""
    checkpoint = load_checkpoint(run)
    if checkpoint["arch"] == "vae":
        raise ValueError(f"{run}: an autoencoder alone; give the run of a network")
    if checkpoint["data"]["source"] != source:
        raise ValueError(f"{run}: was trained on {checkpoint['data']['source']}; give a run of --data "
                         f"{source}")
    return checkpoint
