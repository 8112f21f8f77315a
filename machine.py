"""What this machine has: its devices, whether they multiply bfloat16, their memory, a compiler.

    python machine.py                    # prints it
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch

# Where Linux says how much memory a container may use, in versions 2 and 1 of its control groups.
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def pick_device(name: str = "auto", local: int | None = None) -> torch.device:
    """"auto" takes CUDA, then MPS, then the CPU. local: the number of this process among several on this
    machine, each of which has a GPU of its own. Raises ValueError for a device that is not available."""
    present = ["cpu"]
    if torch.backends.mps.is_available():
        present.insert(0, "mps")
    if torch.cuda.is_available():
        present.insert(0, "cuda")
    several = local is not None and name in ("auto", "cuda")
    if several and "cuda" in present:
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine has no GPU of its own, as there are "
                             f"{torch.cuda.device_count()}; start as many by --nproc-per-node, or give "
                             "--device cpu")
        return torch.device("cuda", local)
    if name == "auto":
        return torch.device(present[0])
    kind, _, index = name.partition(":")
    if index and local is not None:
        raise ValueError(f"--device {name}: each of several processes takes a GPU of its own; give cuda")
    known = kind in present
    if index:
        known = known and kind == "cuda" and index.isdigit() and int(index) < torch.cuda.device_count()
    if not known:
        raise ValueError(f"--device {name}: not available here; use one of {', '.join(present)}")
    return torch.device(name)


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, rather than emulating it."""
    if device.type == "cpu":
        return getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def precision_on(device: torch.device, precision: str | None) -> str | None:
    """The precision asked for. "auto" is bf16 where the hardware multiplies it; emulated, it would be far
    slower than fp32."""
    if precision != "auto":
        return precision
    return "bf16" if has_bf16(device) else "fp32"


def memory(device: torch.device) -> int | None:
    """Bytes of memory in all, used or not: what the machine has, or what a container may use of it. None
    where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    limits = []
    try:
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):          # Windows has no sysconf
        pass
    for file in CGROUPS:
        try:
            limits.append(int(Path(file).read_text()))
        except (OSError, ValueError):                      # ValueError: "max", no limit
            pass
    return min(limits, default=None)


def peak_memory(device: torch.device) -> int | None:
    """Bytes of memory that this process has used at most so far; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:                                    # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def check_room(what: str, need: dict[str, int], have: int | None, where: str, remedy: str) -> None:
    """Raise ValueError if the parts of `need`, in bytes, exceed what there is (None: not known). A CPU that
    runs out of memory kills the process without a word."""
    total = sum(need.values())
    if have is not None and total > have:
        parts = ", ".join(f"{name} {in_words(size)}" for name, size in need.items())
        raise ValueError(f"{what} needs at least {in_words(total)} of {where} ({parts}), where "
                         f"{in_words(have)} are there; {remedy}")


def in_words(size: int) -> str:
    """Bytes in the unit that suits them."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def check_compiler(device: torch.device) -> None:
    """Raises ValueError where torch.compile would find no compiler."""
    compilers = (os.environ.get("CXX", "g++"), "clang++", "cl")
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise ValueError("--compile: found no C++ compiler, which the CPU needs; install g++, or leave "
                         "--compile out")


def demo() -> None:
    """Print the device that "auto" takes, and its memory."""
    device = pick_device()
    size = memory(device)
    print(f"{device}: {'bf16' if has_bf16(device) else 'no bf16'}, "
          f"{'memory not known' if size is None else in_words(size)}")


if __name__ == "__main__":
    demo()
