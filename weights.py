"""Weights in files: one file or several with an index, .safetensors or of torch, mapped into memory.

    python weights.py                    # writes a .safetensors file, maps it, and refuses damaged ones

A state is a dict of tensors by name. What is read here is mapped: a tensor's bytes are read from the disk
when they are first used, and none is in memory twice. The format of .safetensors is that of
github.com/huggingface/safetensors: the length of a header (8 bytes, little endian), the header (JSON: for
each name its dtype, shape, and begin and end behind the header), the bytes. Only tensors are read: nothing
in a file is run. Every error is one line for the user (ValueError).
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import os
import stat
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
LONGEST_HEADER = 2**27       # bytes; the official package has a limit as well, of 100 MB
# What diffusers and transformers call the weights in a folder. Of the variants, the first one that is there.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
VARIANTS = ("", "fp32.", "bf16.", "fp16.")
# In a pipeline's folder, how the names of the subfolders that are read begin, and the endings of such files.
SUBFOLDERS = ("unet", "transformer", "vae", "text_encoder", "tokenizer", "scheduler")
ENDINGS = (".json", ".txt", ".model", ".safetensors", ".sft", ".bin", ".ckpt", ".pt", ".pth")


# ---- states and models

def check_weights(model: torch.nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Raise ValueError, one line that begins with `what`, with the first names or shapes that do not fit."""
    own = model.state_dict()
    wrong = [f"missing {name}" for name in own if name not in state]
    wrong += [f"surplus {name}" for name in state if name not in own]
    wrong += [f"{name} of shape {tuple(state[name].shape)}, not {tuple(weight.shape)}"
              for name, weight in own.items() if name in state and state[name].shape != weight.shape]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{what}: weights do not fit the network: {'; '.join(wrong[:3])}{more}")


def load_weights(model: torch.nn.Module, state: dict[str, Tensor], what: str) -> torch.nn.Module:
    """Copy a state into a model, strictly, and return the model. Raises ValueError as check_weights does."""
    check_weights(model, state, what)
    model.load_state_dict(state)
    return model


def assign_weights(model: torch.nn.Module, state: dict[str, Tensor], what: str) -> torch.nn.Module:
    """Make the tensors of a state the weights of a model, which was built on the meta device, in their dtype
    and without a copy; and return the model. Raises ValueError as check_weights does."""
    check_weights(model, state, what)
    model.load_state_dict(state, assign=True)
    return model


def in_dtype(state: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Convert a state to a dtype, in place, and return it. None: weights stay as they are, but those of 8
    bits, in which nothing can be computed, become bfloat16."""
    for name, weight in state.items():
        kept = torch.bfloat16 if weight.dtype.itemsize == 1 else weight.dtype
        state[name] = weight.to(dtype or kept)         # the same tensor where nothing changes
    return state


TRAINED = "use an earlier copy of the file, or train again under another --name"


def check_finite(state: dict[str, Tensor], what: str, remedy: str = TRAINED) -> None:
    """Raise ValueError, one line that begins with `what` and ends with the remedy, for weights with NaN or
    infinity: they draw nothing and no training recovers them."""
    for name, weight in state.items():
        if not weight.is_floating_point() or not weight.numel():
            continue
        if weight.dtype.itemsize == 1:
            weight = weight.half()         # comparisons are not defined in 8 bits
        # NaN is the smallest and the largest of numbers that include it; a hundred times as fast as isfinite
        if not all(torch.isfinite(extreme) for extreme in weight.aminmax()):
            raise ValueError(f"{what}: damaged: {name} has values that are not finite (NaN or infinity); "
                             f"{remedy}")


# ---- .safetensors

def read_header(file: Path) -> tuple[dict, int]:
    """The header of a .safetensors file, and where its bytes begin. Raises ValueError or OSError."""
    total = file.stat().st_size
    with open(file, "rb") as content:
        size = int.from_bytes(content.read(8), "little")
        if not 2 <= size <= min(total - 8, LONGEST_HEADER):
            raise ValueError(f"a header of {size:,} bytes in a file of {total:,}")
        header = json.loads(content.read(size))
    if not isinstance(header, dict):
        raise ValueError("a header that is not a table")
    return header, 8 + size


def map_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file. Raises ValueError where its header contradicts itself or the
    file's size."""
    header, start = read_header(file)
    header.pop("__metadata__", None)
    room = file.stat().st_size - start
    last = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        numbers = [*entry["shape"], begin, end]
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise ValueError(f"{name}: sizes that are not whole numbers")
        size = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
        if not last <= begin <= end <= room or size != end - begin:
            raise ValueError(f"{name}: bytes {begin} to {end} of {room}, for a size of {size}")
        last = end
    if not header or room == 0:
        return {name: torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
                for name, entry in header.items()}

    state: dict[str, Tensor] = {}
    with open(file, "rb") as content, warnings.catch_warnings():
        try:
            # private: who writes into a tensor changes its copy of the page, not the file
            pages = mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError:                    # more than the system would set aside for such copies
            warnings.simplefilter("ignore")      # of torch, that the pages cannot be written to
            pages = mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ)
        for name, entry in header.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            dtype = DTYPES[entry["dtype"]]
            if begin == end:
                state[name] = torch.empty(entry["shape"], dtype=dtype)
            elif begin % dtype.itemsize:   # no kernel need accept such an address: this one is copied
                whole = torch.frombuffer(bytearray(pages[begin:end]), dtype=dtype)
                state[name] = whole.view(entry["shape"])
            else:
                count = (end - begin) // dtype.itemsize
                state[name] = torch.frombuffer(pages, dtype=dtype, count=count,
                                               offset=begin).view(entry["shape"])
    return state


# ---- files of torch

class Ignored:
    """What takes the place of every object of a file that is not a tensor, number, string or container."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def map_pickle(file: Path) -> dict:
    """What torch.save has written. Objects of other kinds, such as the settings and callbacks that authors
    save beside the weights, become `Ignored`: their classes are not imported and no code of theirs is run."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:                      # not a zip file: the format before torch 1.6
        return torch.load(file, map_location="cpu", weights_only=True)
    with torch.serialization.safe_globals([(Ignored, name) for name in names]):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


# ---- any file, or several

def check_readable(path: str | Path) -> None:
    """Raise ValueError, which names it, for a file or folder that this user may not read, or for what a
    pipeline's folder holds of that kind. Otherwise some calls would raise an error and others find nothing,
    as if it were not there. What does not exist is not refused here."""
    path = Path(path)
    try:
        mode = os.stat(path).st_mode       # needs the right to enter the folder around it
        names = os.listdir(path) if stat.S_ISDIR(mode) else []
        if stat.S_ISREG(mode):             # not a pipe, which would be waited for
            open(path, "rb").close()
    except PermissionError as error:
        raise ValueError(f"{error.filename or path}: cannot be read (permission denied); make it "
                         "readable") from None
    except OSError:                        # not there, a broken link: refused where it is read
        return
    for name in names:
        if name.startswith(SUBFOLDERS) or name.endswith(ENDINGS):
            check_readable(path / name)


def weights_file(folder: Path) -> Path:
    """The file, or the index of several, with the weights in a folder of diffusers or transformers; or the
    only file of weights in it. Raises ValueError if there is none."""
    for kind, variant, stem in itertools.product(("safetensors", "bin"), VARIANTS, STEMS):
        for name in (f"{stem}.{variant}{kind}", f"{stem}.{variant}{kind}.index.json",
                     f"{stem}.{kind}.{variant}index.json", f"{stem}.{kind}.index.{variant}json"):
            if (folder / name).is_file():
                return folder / name
    others = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".sft", ".ckpt", ".pt")]
    if len(others) == 1:
        return others[0]
    raise ValueError(f"{folder}: {len(others) or 'no'} files of weights in this folder, and none of a usual "
                     "name (diffusion_pytorch_model.safetensors, model.safetensors, .bin, or an index of "
                     "parts); name the file")


def stored_bytes(path: str | Path) -> int:
    """The size of the weights in a folder or file, 0 where there are none: what they take in memory unless
    they are converted."""
    path = Path(path)
    try:
        file = weights_file(path) if path.is_dir() else path
        files = [file]
        if file.suffix == ".json":
            files = [file.parent / name for name in set(json.loads(file.read_text())["weight_map"].values())]
        return sum(part.stat().st_size for part in files)
    except (ValueError, KeyError, TypeError, AttributeError, OSError):     # refused where they are read
        return 0


def map_weights(path: str | Path) -> dict[str, Tensor]:
    """A state from a .safetensors file, a torch file, an index of several, or a folder that has one of these;
    on the CPU, mapped, in the file's dtypes. Where a torch file has several sets of weights, the EMA weights.
    Raises ValueError, also for a checkpoint of train.py."""
    file = Path(path)
    if file.is_dir():
        file = weights_file(file)
    if not file.is_file():
        raise ValueError(f"{file}: no such file; download it first")
    if file.suffix == ".json":
        return map_parts(file)
    is_own = False
    try:
        if file.suffix in (".safetensors", ".sft"):
            return map_safetensors(file)
        state = map_pickle(file)
        is_own = "arch" in state and "ema" in state
        for part in ("ema", "state_dict", "model"):        # where authors keep weights, the best ones first
            if isinstance(state.get(part), dict):
                state = state[part]
        state = {name: weight for name, weight in state.items()
                 if isinstance(name, str) and isinstance(weight, Tensor)}
    except PermissionError:
        raise ValueError(f"{file}: cannot be read (permission denied); make it readable") from None
    except Exception as error:         # a dozen types for damaged files; all mean the same to the user
        reason = str(error) if type(error) is ValueError else type(error).__name__
        remedy = "download it again"
        if file.suffix not in (".safetensors", ".sft"):
            remedy += ", or, where it holds objects of other kinds too, convert it to .safetensors"
        raise ValueError(f"{file}: not a file of weights, or damaged ({reason}); {remedy}") from None
    if is_own:
        raise ValueError(f"{file}: is a run of train.py, not a published file; give it without --published")
    return state


def map_parts(index: Path) -> dict[str, Tensor]:
    """The state whose files an index lists, each in the same folder."""
    try:
        places = json.loads(index.read_text())["weight_map"]
        files = sorted(set(places.values()))
        if not files or any(Path(name).name != name or "\\" in name for name in files):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index}: not an index of weights, or damaged; download it again") from None
    state: dict[str, Tensor] = {}
    for name in files:
        if not (index.parent / name).is_file():
            raise ValueError(f"{index}: its part {name} is missing; download it too")
        state |= map_weights(index.parent / name)
    missing = [name for name in places if name not in state]
    if missing:
        raise ValueError(f"{index}: none of its parts has {missing[0]}; download them again")
    return state


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """As `map_weights`, after a look at every value. Raises ValueError for NaN and infinity too."""
    state = map_weights(path)
    check_finite(state, str(path))
    return state


def demo() -> None:
    """Write a file by hand, map it, and show what is refused."""
    def content(size: int) -> bytes:
        entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, size]}
        header = json.dumps({"weight": entry}).encode()
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header + torch.arange(6.0).numpy().tobytes()

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        file.write_bytes(content(24))
        print(f"read: {read_weights(file)['weight'].tolist()}")
        file.write_bytes(content(32))
        try:
            read_weights(file)
        except ValueError as refusal:
            print(f"refused: {str(refusal).replace(folder, '...')}")


if __name__ == "__main__":
    demo()
