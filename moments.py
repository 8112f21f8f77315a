"""The optimizer of a sharded run on disk: a folder to which each rank writes its share.

    python moments.py                    # two ranks write a folder; one process reads it, and finds damage

checkpoint.pt holds whole weights, which one rank can gather one by one. The optimizer has twice as many
numbers and nobody needs it but a run that goes on, so each rank writes what it has of it, with
torch.distributed.checkpoint (DCP). Any number of ranks in any layout reads it again, or one process. The
checkpoint names the folder and the SHA-256 of its files; what does not fit is refused in one line. Nothing of
a folder is unpickled but the few plain types that DCP writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cuts import Cut
from parallel import Sharding, local, run

MOMENTS = ("exp_avg", "exp_avg_sq")      # what AdamW keeps of each weight, besides the number of steps


def save_moments(run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer,
                 sharding: Sharding) -> dict:
    """Write what AdamW keeps of every weight, by name, to a new folder within `run`. Returns what the
    checkpoint has to say of it: its name, the SHA-256 of each of its files, and the size of a tensor group.
    Raises OSError with one line, on all ranks, where one of them cannot write."""
    import torch.distributed.checkpoint as dcp

    # Never the folder of an earlier checkpoint, which has to stay whole until the new one is complete.
    chosen = [None]
    if dist.get_rank() == 0:
        names = [f"optimizer-{step:06d}", *(f"optimizer-{step:06d}-{again}" for again in range(2, 10_000))]
        chosen = [next(name for name in names if not os.path.lexists(run / name))]
    dist.broadcast_object_list(chosen)
    folder = run / chosen[0]
    state = {name: dict(optimizer.state[weight]) for name, weight in model.named_parameters()
             if weight in optimizer.state}
    try:
        dcp.save(state, checkpoint_id=folder)
    except dcp.api.CheckpointException as error:       # the same one on all ranks
        reason = reason_of(error)
        if "enforce fail" in reason or "PytorchStreamWriter" in reason:
            reason = "the disk is full or the file too large"
        raise OSError(f"cannot write {folder}: {reason}") from None
    files = sorted(file.name for file in folder.iterdir())
    sums = {name: sha256_of(folder / name) for name in files[dist.get_rank()::dist.get_world_size()]}
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, sums)
    merged = {name: value for part in everywhere for name, value in part.items()}
    return {"folder": chosen[0], "sha256": merged, "tensor": sharding.tensor}


def reason_of(error: BaseException) -> str:
    """Why torch.distributed.checkpoint failed on the first rank that did, in a line."""
    reason = next(iter(error.failures.values()))[0]
    return getattr(reason, "strerror", None) or str(reason).split("\n")[0]


def open_from_disk(file: Path) -> IO[bytes]:
    """A file to read, as the disk holds it and not as the memory still has it."""
    content = open(file, "rb")
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return content


def sha256_of(file: Path) -> str:
    digest = hashlib.sha256()
    with open_from_disk(file) as content:
        while piece := content.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def damage_of(run: Path, saved: dict, part: slice = slice(None)) -> str | None:
    """What is wrong with the folder that `save_moments` described so, as far as these of its files go; None
    if nothing is."""
    name, tensor, sums = (saved.get(key) for key in ("folder", "tensor", "sha256"))
    sums = {} if sums is None else sums                # of any type, in a checkpoint that was changed
    if not (isinstance(name, str) and re.fullmatch(r"optimizer-\d+(-\d+)?", name)
            and type(tensor) is int and 0 < tensor < 2**16 and isinstance(sums, dict)
            and all(isinstance(file, str) and Path(file).name == file for file in sums)):
        return f"its optimizer is {str(saved)[:80]!r}"
    folder = run / name
    if not (folder / ".metadata").is_file():
        return f"{folder} is missing or not complete"
    for file in sorted(sums)[part]:
        try:
            if sha256_of(folder / file) != sums[file]:
                return f"the checksum of {folder / file} does not fit"
        except OSError as error:
            return f"{folder / file} cannot be read ({error.strerror})"
    return None


def check_moments(run: Path, saved: dict) -> None:
    """Raises ValueError, on all ranks, where the folder of the optimizer is not as it was saved."""
    if not dist.is_initialized():
        found = [damage_of(run, saved)]
    else:                                              # each reads a part, as there may be many gigabytes
        found = [None] * dist.get_world_size()
        part = slice(dist.get_rank(), None, dist.get_world_size())
        dist.all_gather_object(found, damage_of(run, saved, part))
    for problem in found:
        if problem:
            raise ValueError(problem)


class Plain(pickle.Unpickler):
    """Reads what PyTorch writes of a folder, and nothing else: a pickle from elsewhere may start programs."""

    ALLOWED = {
        "torch.distributed.checkpoint.metadata": (
            "Metadata", "MetadataIndex", "TensorProperties", "TensorStorageMetadata", "ChunkStorageMetadata",
            "StorageMeta", "_MEM_FORMAT_ENCODING"),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
        "torch.serialization": ("_get_layout",), "collections": ("OrderedDict",),
        "torch": ("Size", "float32", "float64", "bfloat16", "float16"),
        "pathlib": ("PosixPath", "WindowsPath"), "pathlib._local": ("PosixPath", "WindowsPath")}

    def find_class(self, module: str, name: str):
        if name not in self.ALLOWED.get(module, ()):
            raise ValueError(f"{module}.{name} is no part of a checkpoint")
        return super().find_class(module, name)


def read_metadata(folder: Path) -> dict:
    """What the folder holds, by name. Raises ValueError with one line where it is not of `save_moments`."""
    try:
        with open(folder / ".metadata", "rb") as file:
            metadata = Plain(file).load()
        found = metadata.state_dict_metadata
        # PyTorch reads what is no tensor as a pickle of any kind.
        good = all(hasattr(entry, "chunks") for entry in found.values()) and all(
            Path(info.relative_path).name == info.relative_path for info in metadata.storage_data.values())
    except Exception as error:                         # a dozen types for a damaged pickle
        raise ValueError(f"{folder / '.metadata'}: damaged, or changed by another program "
                         f"({' '.join(str(error).split())[:80]})") from None
    if not good:
        raise ValueError(f"{folder / '.metadata'}: changed by another program")
    return found


def load_moments(run: Path, saved: dict, model: nn.Module, optimizer: torch.optim.Optimizer,
                 sharding: Sharding | None, cuts: dict[str, Cut]) -> None:
    """Read the folder that `save_moments` described so, into a model in any other layout. cuts: of the model
    in a tensor group, whether or not it is cut now. Raises ValueError where the folder is not complete."""
    import torch.distributed.checkpoint as dcp

    folder = run / saved["folder"]
    entries = read_metadata(folder)
    for name, weight in model.named_parameters():
        if f"{name}.step" not in entries:              # before the first step
            continue
        # One weight at a time, whole: another layout cuts it at other places.
        found = {"step": torch.zeros(())} | {key: torch.empty(weight.shape) for key in MOMENTS}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")        # of a single process, which is as intended
                dcp.load({name: found}, checkpoint_id=folder, no_dist=True)
        except dcp.api.CheckpointException as error:
            raise ValueError(f"{folder}: damaged ({reason_of(error)[:80]})") from None
        for key in MOMENTS:
            if saved["tensor"] > 1 and name in cuts:
                found[key] = cuts[name].restored(found[key], saved["tensor"])
        place_moments(name, weight, found, optimizer, sharding)


def share_moments(saved: dict, model: nn.Module, optimizer: torch.optim.Optimizer,
                  sharding: Sharding) -> None:
    """The same from the state dict of an optimizer whose weights were whole."""
    names = {weight: name for name, weight in model.named_parameters()}
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, found in saved["state"].items():
        place_moments(names[weights[number]], weights[number], found, optimizer, sharding)


@torch.no_grad()
def place_moments(name: str, weight: nn.Parameter, whole: dict[str, Tensor], optimizer: torch.optim.Optimizer,
                  sharding: Sharding | None) -> None:
    optimizer.state[weight] = {"step": whole["step"].to(weight.device)}
    for key in MOMENTS:
        optimizer.state[weight][key] = target = torch.zeros_like(weight)
        local(target).copy_(sharding.share(name, whole[key]) if sharding else whole[key])


# ---- demonstration

def demo(folder: Path) -> None:
    """A step of the optimizer in two processes, whose folder is then compared with that of one process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    several = "WORLD_SIZE" in os.environ
    if several:
        dist.init_process_group("gloo")
        sharding = Sharding(2, 1, torch.device("cpu"), (nn.Linear,), (), bf16=False)
        step = sharding.shard(model, trained=True)
        optimizer = torch.optim.AdamW(model.parameters())
    x = torch.linspace(-1, 1, 24).view(3, 8)
    run(step if several else None, model, lambda model: model(x).square().mean()).backward()
    optimizer.step()
    if several:
        described = save_moments(folder, 1, model, optimizer, sharding)
        if dist.get_rank() == 0:
            (folder / "described.json").write_text(json.dumps(described))
        dist.barrier()                                     # neither ends while the other is still at work
        dist.destroy_process_group()
        os._exit(0)                                        # why not by returning: ranks.leave

    wanted = {weight: dict(state) for weight, state in optimizer.state.items()}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                    __file__, str(folder)], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    described = json.loads((folder / "described.json").read_text())
    load_moments(folder, described, model, optimizer, None, {})
    error = max((optimizer.state[weight][key] - state[key]).abs().max().item()
                for weight, state in wanted.items() for key in MOMENTS)
    files = ", ".join(sorted(described["sha256"]))
    print(f"{files}: read by one process, they differ by {error:.0e} from its own")
    file = folder / described["folder"] / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    print(f"with one bit changed: {damage_of(folder, described)}".replace(f"{folder}{os.sep}", ""))


def main() -> None:
    if len(sys.argv) > 1:
        demo(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        demo(Path(folder))


if __name__ == "__main__":
    main()
