"""Tensor parallelism: which linear layers of a DiT or MM-DiT a group of ranks shares, and where they are cut.

    python cuts.py                       # three processes share a block

Attention is cut by heads and the MLP by hidden channels: a layer's outputs, then the inputs of the layer that
follows, so that only its output is added up over the ranks (Shoeybi et al. 2019, arXiv:1909.08053). Of the
layers that produce modulations, each rank computes some columns, which are gathered. Where one layer yields
several things (q, k and v; gate and value), each of them is cut, so its rows are put in another order first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


# ---- the plan

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


# ---- the layers

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


@torch.no_grad()
def cut_linears(model: nn.Module, blocks: tuple[type, ...], mesh) -> dict[str, Cut]:
    """Cut a model, which must be whole and equal on all ranks of this one-dimensional DeviceMesh, in place.
    The weights become DTensors; heads and widths become those of one rank. Returns the cuts, by weight."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    cuts = cuts_of(model, blocks)
    for name, weight in model.named_parameters():
        if name in cuts:
            weight.copy_(cuts[name].ordered(weight, mesh.size()))
    for name, linears in tensor_plan(model, blocks).items():
        module = model.get_submodule(name)
        styles = {}
        for linear, cut in linears.items():
            styles[linear] = RowwiseParallel() if cut.dim else ColwiseParallel()
            if cut.gathered:
                styles[linear] = ColwiseParallel(output_layouts=Replicate())
            module.get_submodule(linear).__class__ = CutLinear
        parallelize_module(module, mesh, styles)
        for size in ("heads", "width"):
            if hasattr(module, size):
                setattr(module, size, getattr(module, size) // mesh.size())
    return cuts


# ---- demonstration

def demo() -> None:
    """Cut the hidden channels and the modulation of a block over three processes."""
    if "WORLD_SIZE" not in os.environ:
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3",
                        __file__], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        return
    from torch.distributed.device_mesh import init_device_mesh

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(12, 48), nn.Linear(48, 12)
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(12, 12))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.adaLN_modulation(x) * self.fc2(self.fc1(x).relu())

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    x, direction = torch.randn(2, 8, 12)
    model = Block()
    wanted = torch.func.jvp(model, (x,), (direction,))
    numbers = sum(weight.numel() for weight in model.parameters())
    cut_linears(model, (Block,), init_device_mesh("cpu", (3,)))
    with torch.no_grad():
        found = torch.func.jvp(model, (x,), (direction,))
    held = sum(getattr(weight, "to_local", lambda: weight)().numel() for weight in model.parameters())
    errors = [(a - b).abs().max().item() for a, b in zip(found, wanted)]
    if dist.get_rank() == 0:
        print(f"a rank holds {held} of {numbers:,} weights; its output differs by {errors[0]:.0e}, and the "
              f"derivative along a direction by {errors[1]:.0e}", flush=True)
    dist.barrier()                             # none ends while another is still at work
    dist.destroy_process_group()
    os._exit(0)                                # why not by returning: ranks.leave


if __name__ == "__main__":
    sys.exit(demo())
