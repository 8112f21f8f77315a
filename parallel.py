"""Which rank holds what: data parallel, sharded (FSDP2) and tensor parallel training, on PyTorch's engine.

    torchrun --nproc-per-node 8 train.py --arch dit --preset XL/2 --objective rf --shard --tensor-parallel 2
    python parallel.py                          # one loss and gradient of four processes, in three layouts

Data parallel (DDP): every rank has all weights and a part of the batch; gradients are averaged. Sharded: a
rank keeps a share of each weight, its gradient, optimizer state and average; a block's weights are gathered
when it runs. Tensor parallel: the ranks of a group have the same pictures and compute a part of each product,
for which attention is cut by heads and the MLP by hidden channels (Shoeybi et al. 2019, arXiv:1909.08053).

The mesh is (data, tensor): neighbouring ranks form a tensor group, and the groups share the batch.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


# ---- a step, whole or in parts

class Step(nn.Module):
    """A model together with whatever is done with it, as one forward pass: DDP and FSDP prepare weights and
    gradients there. The model may then be called several times, or by other methods than its `forward`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, call: Callable, *inputs):
        try:
            return call(self.model, *inputs)
        except Exception as error:       # raised by `run`, once the weights that were gathered are freed
            return error


def run(step: nn.Module | None, model: nn.Module, call: Callable, *inputs):
    """call(model, *inputs), as a forward pass of `step` where the model is distributed."""
    if step is None:
        return call(model, *inputs)
    result = step(call, *inputs)
    if isinstance(result, Exception):
        raise result
    return result


def replicate(model: nn.Module) -> nn.Module:
    """Data parallel: the step of a model that is whole on every rank. The ranks must begin with the same
    weights, as the same seed or checkpoint gives them."""
    return nn.parallel.DistributedDataParallel(Step(model), gradient_as_bucket_view=True)


@contextmanager
def synchronised(step: nn.Module | None, last: bool) -> Iterator[None]:
    """Where a batch is taken in pieces, gradients are averaged over the ranks with the last of them only."""
    if isinstance(step, nn.parallel.DistributedDataParallel) and not last:
        with step.no_sync():
            yield
        return
    if step is not None and not isinstance(step, nn.parallel.DistributedDataParallel):
        step.set_requires_gradient_sync(last)
    yield


# ---- tensor parallel: where the linear layers of a block are cut

class Cut(NamedTuple):
    """A weight is cut along `dim`, which consists of parts of these sizes, like q, k and v. Each rank of a
    tensor group has an equal share of every part. gathered: whether the layer's output, of which each rank
    computes a share, is put together on all of them."""
    dim: int
    sizes: tuple[int, ...]
    gathered: bool = False

    def order(self, ranks: int) -> Tensor:
        """The index that puts the first rank's shares of all parts first, then the second rank's: so ordered,
        the weight is cut into contiguous pieces."""
        order, starts = [], [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        for rank in range(ranks):
            for start, size in zip(starts, self.sizes):
                share = size // ranks
                order.append(torch.arange(start + rank * share, start + (rank + 1) * share))
        return torch.cat(order)

    def ordered(self, weight: Tensor, ranks: int) -> Tensor:
        """The weight in that order."""
        return weight.index_select(self.dim, self.order(ranks).to(weight.device))

    def restored(self, weight: Tensor, ranks: int) -> Tensor:
        """The inverse of `ordered`."""
        return weight.index_select(self.dim, self.order(ranks).argsort().to(weight.device))


def linears_of(module: nn.Module, in_block: bool) -> dict[str, Cut]:
    """The linear layers directly in a module of a transformer that are cut, by their names in it. A layer cut
    along its outputs (dim 0) is followed by one cut along its inputs (dim 1), whose products are added up; or
    its output is gathered. in_block: whether the module is a block, or within one."""
    cuts = {}
    if in_block and isinstance(getattr(module, "qkv", None), nn.Linear):     # a stream has a method `qkv`
        width = (module.qkv.in_features,)
        cuts["qkv"] = Cut(0, 3 * width)
        if module.proj is not None:
            cuts["proj"] = Cut(1, width)
    elif in_block and isinstance(getattr(module, "fc1", None), nn.Linear):
        hidden = module.fc2.in_features
        cuts |= {"fc1": Cut(0, (hidden,) * (module.fc1.out_features // hidden)), "fc2": Cut(1, (hidden,))}
    elif in_block and hasattr(module, "linear1"):
        width = module.width
        hidden = module.linear2.in_features - width
        cuts |= {"linear1": Cut(0, (width, width, width, hidden)), "linear2": Cut(1, (width, hidden))}
    elif isinstance(getattr(module, "mlp", None), nn.Sequential):            # embeds a time or a vector
        hidden = (module.mlp[2].in_features,)
        cuts |= {"mlp.0": Cut(0, hidden), "mlp.2": Cut(1, hidden)}
    # Modulations, whose shifts, scales and gates act on whole tokens, and the embedding of a text's tokens.
    # What stays whole is little: patches, labels and the output layer are 0.2 % of XL/2, 0.02 % of SD 3.
    for name, holder in (("adaLN_modulation.1", "adaLN_modulation"), ("context_embedder",) * 2):
        if hasattr(module, holder):
            cuts[name] = Cut(0, (module.get_submodule(name).out_features,), gathered=True)
    return cuts


def tensor_plan(model: nn.Module, blocks: tuple[type, ...]) -> dict[str, dict[str, Cut]]:
    """The linear layers that are cut, by the name of the module that they are in. blocks: the model's."""
    in_blocks = {inner for block in model.modules() if isinstance(block, blocks) for inner in block.modules()}
    found = {name: linears_of(module, module in in_blocks) for name, module in model.named_modules()}
    return {name: linears for name, linears in found.items() if linears}


def cuts_of(model: nn.Module, blocks: tuple[type, ...]) -> dict[str, Cut]:
    """The cut of every weight and bias that has one, by its name."""
    cuts = {}
    for name, linears in tensor_plan(model, blocks).items():
        for linear, cut in linears.items():
            path = f"{name}.{linear}".lstrip(".")      # of the model itself, the name is empty
            cuts[f"{path}.weight"] = cut
            if cut.dim == 0:
                cuts[f"{path}.bias"] = cut
    return cuts


def check_tensor_parallel(model: nn.Module, blocks: tuple[type, ...], ranks: int) -> None:
    """Raises ValueError where `ranks` cannot share the heads or the hidden channels of the blocks."""
    for name, linears in tensor_plan(model, blocks).items():
        module = model.get_submodule(name)
        counts = {size: "hidden channels" for cut in linears.values() for size in cut.sizes}
        if hasattr(module, "heads"):
            counts[module.heads] = "heads"
        for count, what in counts.items():
            if count % ranks:
                raise ValueError(f"--tensor-parallel {ranks}: does not divide the {count} {what} of this "
                                 "network; give a divisor, or 1")
        if getattr(module, "conv", None) is not None:
            raise ValueError(f"--tensor-parallel {ranks}: not with --conv, whose channels are not cut; leave "
                             "one of them out")


class CutLinear(nn.Linear):
    """A linear layer that a tensor group shares, also in forward mode (torch.func.jvp), for which DTensor has
    no rules: the derivative of what it computes is what it computes, without the bias, of the derivative."""

    def __call__(self, x: Tensor) -> Tensor:
        if torch._C._are_functorch_transforms_active():
            return _Forward.apply(x, self, True)
        return super().__call__(x)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, layer: CutLinear, biased: bool) -> Tensor:
        # In here no transform is active.
        bias = layer.bias
        if not biased:
            layer._parameters["bias"] = None
        try:
            return layer(x)
        finally:
            layer._parameters["bias"] = bias

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.layer = inputs[1]

    @staticmethod
    def jvp(ctx, tangent: Tensor, *others: None) -> Tensor:
        return _Forward.apply(tangent, ctx.layer, False)


# ---- sharded, and tensor parallel

class Sharding:
    """How models of one architecture are cut over `size` ranks, `tensor` of which form a tensor group.

    blocks: the classes whose weights are gathered together; cut: those of them that are tensor parallel.
    bf16: whether trained blocks are gathered in bfloat16, as autocast would round them anyway. patience: how
    long a rank waits for the others of its groups; without it, as long as PyTorch does."""

    def __init__(self, size: int, tensor: int, device: torch.device, blocks: tuple[type, ...],
                 cut: tuple[type, ...], bf16: bool, patience: timedelta | None = None):
        from torch.distributed.device_mesh import init_device_mesh

        # An advice that a gathering could be one operation; it happens when a checkpoint is saved.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        self.mesh = init_device_mesh(device.type, (size // tensor, tensor), mesh_dim_names=("data", "tensor"))
        if patience is not None:                       # a mesh has no argument for it
            for group in self.mesh.get_all_groups():
                dist.distributed_c10d._set_pg_timeout(patience, group)
        self.size = size
        self.tensor = tensor
        self.device = device
        self.blocks = blocks
        self.cut = cut
        self.bf16 = bf16
        self.cuts: dict[str, Cut] = {}

    def shard(self, model: nn.Module, trained: bool) -> nn.Module:
        """Cut the weights of a model, which must be whole and equal on all ranks, in place. Returns its step.
        trained: False for an average, which has no backward pass and keeps its precision. Weights that have
        been distributed over the data dimension already, as experts may be, stay as they are. A model on the
        meta device gets memory for this rank's share, which has to be loaded then."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = self.mesh["data"]
        apart = set(filter(is_cut, model.parameters()))
        if self.tensor > 1:
            self.cut_linears(model)
        exact = MixedPrecisionPolicy(cast_forward_inputs=False)
        rounded = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        blocks = [block for block in model.modules() if isinstance(block, self.blocks)]
        for block in blocks:
            # The backward pass begins with the last block, so its weights are kept until then.
            again = not (trained and block is blocks[-1])
            fully_shard(block, mesh=mesh, reshard_after_forward=again, ignored_params=apart,
                        mp_policy=rounded if trained and self.bf16 else exact)
        step = fully_shard(Step(model), mesh=mesh, reshard_after_forward=True, ignored_params=apart,
                           mp_policy=exact)
        if next(model.parameters()).is_meta:
            step.to_empty(device=self.device)
        return step

    @torch.no_grad()
    def cut_linears(self, model: nn.Module) -> None:
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        self.cuts = cuts_of(model, self.cut)
        for name, weight in model.named_parameters():
            if name in self.cuts:
                weight.copy_(self.cuts[name].ordered(weight, self.tensor))
        for name, linears in tensor_plan(model, self.cut).items():
            module = model.get_submodule(name)
            styles = {}
            for linear, cut in linears.items():
                styles[linear] = RowwiseParallel() if cut.dim else ColwiseParallel()
                if cut.gathered:
                    styles[linear] = ColwiseParallel(output_layouts=Replicate())
                module.get_submodule(linear).__class__ = CutLinear
            parallelize_module(module, self.mesh["tensor"], styles)
            for size in ("heads", "width"):            # of this rank
                if hasattr(module, size):
                    setattr(module, size, getattr(module, size) // self.tensor)

    # ---- whole weights and this rank's share of them

    def share(self, name: str, whole: Tensor) -> Tensor:
        """This rank's piece of the weight of this name, or of a moment of it, as `shard` has cut it."""
        data, tensor = self.mesh.get_coordinate()
        if name in self.cuts:
            cut = self.cuts[name]
            whole = cut.ordered(whole, self.tensor).chunk(self.tensor, cut.dim)[tensor]
        pieces = whole.chunk(self.size // self.tensor)
        return pieces[data] if data < len(pieces) else whole[:0]

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The weight of this name, put together on the CPU. All ranks have to ask for it."""
        found = gathered(part)
        return self.cuts[name].restored(found, self.tensor) if name in self.cuts else found

    def state_of(self, model: nn.Module, everywhere: bool = False) -> dict[str, Tensor]:
        """The state dict of a model that has been cut, put together weight by weight: on rank 0, or
        everywhere."""
        state = {}
        for name, part in model.state_dict().items():
            found = self.whole(name, part)
            if everywhere or dist.get_rank() == 0:
                state[name] = found
        return state

    @torch.no_grad()
    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Copy this rank's share of whole weights, which are asked for one by one."""
        for name, part in model.state_dict().items():
            whole = state[name]
            local(part).copy_(self.share(name, whole) if is_cut(part) else whole)

    def everywhere(self, here: bool) -> bool:
        """Whether it is so on all ranks."""
        flag = torch.tensor(int(here))
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    # ---- gradients

    @torch.no_grad()
    def finish_gradients(self, model: nn.Module, most: float) -> Tensor:
        """Complete the gradients, and scale them as a whole so that their norm is at most `most`. Returns
        that norm before."""
        parameters = dict(model.named_parameters())
        total = 0.0
        for name, parameter in parameters.items():
            gradient = local(parameter.grad)
            if self.tensor > 1 and name.endswith(("q_norm", "k_norm")):
                # Each rank of a tensor group has the gradient by its own heads.
                dist.all_reduce(gradient, group=self.mesh["tensor"].get_group())
            copies = 1 if name in self.cuts else self.tensor       # of this piece, in a tensor group
            total = total + gradient.double().square().sum() / copies
        dist.all_reduce(total)
        norm = total.sqrt()
        scale = (most / (norm + 1e-6)).clamp(max=1.0)              # as torch.nn.utils.clip_grad_norm_
        torch._foreach_mul_([local(parameter.grad) for parameter in parameters.values()], scale.float())
        return norm.float()


def is_cut(part: Tensor) -> bool:
    return hasattr(part, "to_local")                               # a DTensor


def local(part: Tensor) -> Tensor:
    """What this rank has of a tensor: all of it, where it is not cut."""
    return part.to_local() if is_cut(part) else part


def gathered(part: Tensor) -> Tensor:
    found = part.detach()
    return (found.full_tensor() if is_cut(found) else found).cpu()


# ---- the optimizer's state as a folder, of which every rank writes its share

MOMENTS = ("exp_avg", "exp_avg_sq")      # what AdamW keeps of each weight, besides the number of steps


def save_moments(run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Write what AdamW keeps of every weight, by name, with torch.distributed.checkpoint, to a new folder
    within `run`. Returns what the checkpoint has to say of it: its name, and the SHA-256 of each of its
    files. Raises OSError with one line, on all ranks, where one of them cannot write."""
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
    return {"folder": chosen[0], "sha256": merged}


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


def load_moments(folder: Path, tensor: int, model: nn.Module, optimizer: torch.optim.Optimizer,
                 sharding: Sharding | None, cuts: dict[str, Cut]) -> None:
    """Read what `save_moments` wrote in tensor groups of this size, into a model in any other layout. cuts:
    of the model, whether or not it is cut now. Raises ValueError where the folder is not complete."""
    import torch.distributed.checkpoint as dcp

    saved = read_metadata(folder)
    for name, weight in model.named_parameters():
        if f"{name}.step" not in saved:                # before the first step
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
            if tensor > 1 and name in cuts:
                found[key] = cuts[name].restored(found[key], tensor)
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

def demo() -> None:
    """One loss and gradient, by every layout of four processes."""
    if "WORLD_SIZE" not in os.environ:
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4",
                        __file__], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        return
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc2(self.fc1(x).relu())

    def error(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    for name, tensor in (("replicated", None), ("sharded", 1), ("sharded, tensor parallel", 2)):
        torch.manual_seed(0)
        model = nn.Sequential(Block(), Block())
        x = torch.randn(16, 8)
        groups = size // (tensor or 1)
        if tensor is None:
            step = replicate(model)
        else:
            sharding = Sharding(size, tensor, torch.device("cpu"), (Block,), (Block,), bf16=False)
            step = sharding.shard(model, trained=True)
        loss = run(step, model, error, x.chunk(groups)[rank // (tensor or 1)])
        loss.backward()
        held = sum(local(weight).numel() for weight in model.parameters())
        gradient = gathered(model[0].fc1.weight.grad).double().square().sum().sqrt()
        dist.all_reduce(loss.detach_())
        if rank == 0:
            print(f"{name}: rank 0 holds {held:,} weights; loss {loss / size:.6f}, gradient of the first "
                  f"layer {gradient:.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(demo())
