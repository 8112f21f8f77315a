"""Which rank holds what: data parallel, sharded (FSDP2) and tensor parallel training, on PyTorch's engine.

    torchrun --nproc-per-node 8 train.py --arch dit --preset XL/2 --objective rf --shard --tensor-parallel 2
    python parallel.py                          # one loss and gradient of four processes, in three layouts

Data parallel (DDP): every rank has all weights and a part of the batch; gradients are averaged. Sharded: a
rank keeps a share of each weight, its gradient, optimizer state and average; a block's weights are gathered
when it runs. Tensor parallel: the ranks of a group have the same pictures and compute a part of each product;
cuts.py says which layers are cut, and where.

The mesh is (data, tensor): neighbouring ranks form a tensor group, and the groups share the batch.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

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


# ---- sharded, with tensor parallelism or without

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
        self.cuts = {}                                 # what cuts.py has cut, by its name

    def shard(self, model: nn.Module, trained: bool) -> nn.Module:
        """Cut the weights of a model, which must be whole and equal on all ranks, in place. Returns its step.
        trained: False for an average, which has no backward pass and keeps its precision. Weights that have
        been distributed over the data dimension already, as experts may be, stay as they are. A model on the
        meta device gets memory for this rank's share, which has to be loaded then."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = self.mesh["data"]
        apart = set(filter(is_cut, model.parameters()))
        if self.tensor > 1:
            from cuts import cut_linears               # only here: all else can do without that file

            self.cuts = cut_linears(model, self.cut, self.mesh["tensor"])
        exact = MixedPrecisionPolicy(cast_forward_inputs=False)
        rounded = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        blocks = [block for block in model.modules() if isinstance(block, self.blocks)]
        # The backward pass begins with the network's last block, so its weights are kept until then. A text
        # encoder comes behind the network, and has blocks of its own.
        own = [block for block in blocks if isinstance(block, self.cut)] or blocks
        for block in blocks:
            again = not (trained and block is own[-1])
            fully_shard(block, mesh=mesh, reshard_after_forward=again, ignored_params=apart,
                        mp_policy=rounded if trained and self.bf16 else exact)
        step = fully_shard(Step(model), mesh=mesh, reshard_after_forward=True, ignored_params=apart,
                           mp_policy=exact)
        if next(model.parameters()).is_meta:
            step.to_empty(device=self.device)
        return step

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
            module, _, kind = name.rpartition(".")
            heads_are_cut = f"{module}.qkv.weight" in self.cuts or f"{module}.linear1.weight" in self.cuts
            if heads_are_cut and kind in ("q_norm", "k_norm"):
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
    dist.barrier()                             # none ends while another is still at work
    dist.destroy_process_group()
    os._exit(0)                                # why not by returning: ranks.leave


if __name__ == "__main__":
    sys.exit(demo())
