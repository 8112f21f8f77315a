"""Mixture of experts: a feed-forward layer of many small networks, of which each token uses a few.

    python moe.py                        # compares with a loop over experts; how even three routers are
    python train.py --arch dit --objective rf --experts 8 --top-k 2 --shared-experts 1 --moe-blocks deep

A router chooses pairs of a token and an expert within each picture, so that no picture depends on another:
"token", each token its top k experts (Shazeer et al. 2017, arXiv:1701.06538; in diffusion DiT-MoE,
arXiv:2407.11633); "expert", each expert its top tokens (Zhou et al. 2022, arXiv:2202.09368; EC-DiT,
arXiv:2410.02098); "race", the top of all pairs (Race-DiT, arXiv:2503.16057). Small experts, some of them
shared by all tokens: DeepSeekMoE, arXiv:2401.06066. Shapes: B pictures of N tokens, D the width, E experts of
H hidden units, M chosen pairs a picture, R rows (pairs of all pictures).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

ROUTERS = ("token", "expert", "race")
BLOCKS = ("all", "deep", "every-other")     # which blocks of a network have experts: see has_experts


def has_experts(where: str, block: int, depth: int) -> bool:
    """Whether a block, counted from 0, has experts: all, the deeper half, or every second one."""
    if where == "deep":
        return block >= depth // 2
    return where == "all" or block % 2 == 1


# ---- products in groups: rows that are sorted by expert, each group times the matrix of its expert

def counts_of(ends: Tensor) -> Tensor:
    return ends.diff(prepend=ends.new_zeros(1))


def product_loop(x: Tensor, weight: Tensor, bias: Tensor, ends: Tensor) -> Tensor:
    """x (R, K), weight (E, K, F), bias (E, F) and ends (E,), where the rows of each expert end -> (R, F)."""
    counts = counts_of(ends).tolist()        # makes the CPU wait for a GPU
    return torch.cat([torch.addmm(b, rows, w) for rows, w, b in zip(x.split(counts), weight, bias)])


@functools.cache
def has_grouped_mm(device: str, dtype: torch.dtype) -> bool:
    """Whether this version of PyTorch has a kernel for such products. It is tried, as versions differ."""
    if not hasattr(F, "grouped_mm") or (device == "cuda" and dtype != torch.bfloat16):
        return False
    x = torch.ones(8, 8, device=device, dtype=dtype)
    ends = torch.tensor([0, 8], device=device, dtype=torch.int32)
    try:
        both = F.grouped_mm(x, x.expand(2, 8, 8).clone(), offs=ends), F.grouped_mm(x.T, x, offs=ends)
        return both[1].shape == (2, 8, 8) and bool((both[0] == 8).all())
    except (RuntimeError, NotImplementedError):
        return False


def kernel_fits(x: Tensor, columns: int) -> bool:
    aligned = x.shape[1] * x.itemsize % 16 == 0 and columns * x.itemsize % 16 == 0
    return aligned and len(x) > 0 and has_grouped_mm(x.device.type, x.dtype)


def product_in_groups(x: Tensor, weight: Tensor, bias: Tensor, ends: Tensor) -> Tensor:
    """As product_loop."""
    if not kernel_fits(x, weight.shape[2]):
        return product_loop(x, weight, bias, ends)
    biases = bias.repeat_interleave(counts_of(ends), dim=0, output_size=len(x))
    return F.grouped_mm(x.contiguous(), weight, offs=ends).add_(biases)


def outer_in_groups(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """x (R, K) and y (R, F) -> (E, K, F): the sum of the outer products of each expert's rows."""
    if kernel_fits(x, y.shape[1]):
        return F.grouped_mm(x.contiguous().T, y.contiguous(), offs=ends)
    counts = counts_of(ends).tolist()
    return torch.stack([a.T @ b for a, b in zip(x.split(counts), y.split(counts))])


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, _, ends = inputs
    ctx.save_for_backward(x, weight, ends)


def _product_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    x, weight, ends = ctx.saved_tensors
    to_x = operators.product(grad, weight.transpose(1, 2), weight.new_zeros(weight.shape[:2]), ends)
    # A product with the rows' membership sums in the same order in every run, also on a GPU.
    rows = torch.arange(len(x), device=x.device)
    member = (rows < ends[:, None]) & (rows >= (ends - counts_of(ends))[:, None])        # (E, R)
    return to_x, operators.outer(x, grad, ends), member.to(grad.dtype) @ grad, None


class Operators:
    """The two products as operators of PyTorch: so they compile in any dtype and without a look inside,
    whichever way they compute. They are made with the first experts, because that imports PyTorch's compiler:
    a second for which every other program would wait."""

    def __init__(self):
        self.product = None
        self.outer = None

    def make(self) -> None:
        if self.product is not None:
            return
        self.product = torch.library.custom_op("moe::product_in_groups", product_in_groups, mutates_args=())
        self.outer = torch.library.custom_op("moe::outer_in_groups", outer_in_groups, mutates_args=())
        self.product.register_fake(lambda x, weight, bias, ends: x.new_empty(x.shape[0], weight.shape[2]))
        self.outer.register_fake(lambda x, y, ends: x.new_empty(ends.shape[0], x.shape[1], y.shape[1]))
        self.product.register_autograd(_product_backward, setup_context=_keep)


operators = Operators()


def product(x: Tensor, weight: Tensor, bias: Tensor, ends: Tensor) -> Tensor:
    if x.is_meta:                            # the same shapes and FLOPs, which plan.py and others count
        return torch.addmm(bias[0], x, weight[0])
    # Kernels have no derivative in forward mode, which rectified_flow.MeanFlow takes. Compiled code is not
    # traced under one.
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None:
        return product_loop(x, weight, bias, ends)
    return operators.product(x, weight, bias, ends)


# ---- experts

def activation(x: Tensor, gated: bool) -> Tensor:
    if gated:                                # SwiGLU
        gate, x = x.chunk(2, dim=-1)
        return F.silu(gate) * x
    return F.gelu(x, approximate="tanh")


class Shared(nn.Module):
    """The shared experts, which every token uses: together they are one feed-forward layer."""

    def __init__(self, width: int, hidden: int, gated: bool):
        super().__init__()
        self.gated = gated
        self.fc1 = nn.Linear(width, hidden * (1 + gated))
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activation(self.fc1(x), self.gated))


def working_dtype(x: Tensor) -> torch.dtype:
    """That of autocast, which does not know the products above; else that of x."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class Experts(nn.Module):
    """E feed-forward layers, all weights of one kind in one tensor."""

    def __init__(self, count: int, width: int, hidden: int, gated: bool):
        super().__init__()
        operators.make()
        self.count = count
        self.gated = gated
        self.mesh = None                     # see distribute_experts
        fan = hidden * (1 + gated)
        self.fc1 = nn.Parameter(torch.empty(count, fan, width))
        self.fc2 = nn.Parameter(torch.empty(count, width, hidden))
        # One dimension, as an optimizer that decays matrices only goes by their number.
        self.fc1_bias = nn.Parameter(torch.zeros(count * fan))
        self.fc2_bias = nn.Parameter(torch.zeros(count * width))
        for weight in (self.fc1, self.fc2):  # Xavier, each expert by its own size, as any linear layer here
            bound = math.sqrt(6 / (weight.shape[1] + weight.shape[2]))
            nn.init.uniform_(weight, -bound, bound)

    def one(self, i: int, x: Tensor) -> Tensor:
        """Expert i alone, of x (..., D)."""
        biases = [bias.view(self.count, -1)[i] for bias in (self.fc1_bias, self.fc2_bias)]
        return F.linear(activation(F.linear(x, self.fc1[i], biases[0]), self.gated), self.fc2[i], biases[1])

    def forward(self, rows: Tensor, expert: Tensor) -> Tensor:
        """rows (R, D), sorted by their expert, (R,) -> (R, D)."""
        if self.mesh is not None:
            return self.exchange(self, rows, expert)
        return self.compute(rows, expert, self.fc1, self.fc1_bias, self.fc2, self.fc2_bias)

    def compute(self, rows: Tensor, expert: Tensor, fc1: Tensor, fc1_bias: Tensor, fc2: Tensor,
                fc2_bias: Tensor) -> Tensor:
        dtype, count = working_dtype(rows), len(fc1)
        ends = (expert[:, None] == torch.arange(count, device=rows.device)).sum(0).cumsum(0).to(torch.int32)
        hidden = product(rows.to(dtype), fc1.to(dtype).transpose(1, 2),
                         fc1_bias.to(dtype).view(count, -1), ends)
        return product(activation(hidden, self.gated), fc2.to(dtype).transpose(1, 2),
                       fc2_bias.to(dtype).view(count, -1), ends)


# ---- the router

class Routing(NamedTuple):
    pair: Tensor      # (B, M), int64: token * E + expert, the chosen pairs of each picture
    gates: Tensor     # (B, N, E), float32: the weights of the experts' outputs, 0 where not chosen


class _AddGradient(torch.autograd.Function):
    """The identity, with a gradient that is added to the one of the output."""

    @staticmethod
    def forward(ctx, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad + ctx.saved_tensors[0], None


class Router(nn.Module):
    """Which experts a token uses, and how much of each. It computes in float32, whatever the dtype.

    `balance` is the weight of the balance loss (Fedus et al. 2021, arXiv:2101.03961, eq. 4), which is taken
    within each picture (DeepSeek-V2, arXiv:2405.04434, section 2.2.3): E sum_i f_i P_i, the mean over the
    batch; f_i is the share of the pairs that expert i has, P_i the mean of its probabilities. It is 1 where
    the load is even. Packed pictures are one sequence, over all of which it is taken, as the first of these
    papers does with a batch. Only its gradient exists, in training: the loss that is logged stays what it
    was."""

    def __init__(self, width: int, experts: int, top_k: int, kind: str):
        super().__init__()
        if kind not in ROUTERS:
            raise ValueError(f"router {kind!r}: must be {', '.join(ROUTERS)}")
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k {top_k}: must be between 1 and the number of experts, {experts}")
        self.kind = kind
        self.top_k = top_k
        self.balance = 0.0
        self.weight = nn.Parameter(torch.empty(experts, width))
        bound = math.sqrt(3 / width)         # logits of variance 1
        nn.init.uniform_(self.weight, -bound, bound)

    def choose(self, probs: Tensor) -> Tensor:
        """probs (B, N, E) -> (B, M) pairs, as many as top_k a token on average."""
        n, e = probs.shape[1:]
        if self.kind == "race":
            return probs.flatten(1).topk(self.top_k * n).indices
        tokens = torch.arange(n, device=probs.device)[:, None]                           # (N, 1)
        experts = torch.arange(e, device=probs.device)                                   # (E,)
        if self.kind == "expert":
            capacity = -(-self.top_k * n // e)                     # rounded up
            tokens = probs.topk(capacity, dim=1).indices                                 # (B, C, E)
        else:
            experts = probs.topk(self.top_k, dim=2).indices                              # (B, N, k)
        return (tokens * e + experts).flatten(1)

    def forward(self, x: Tensor) -> Routing:
        """x (B, N, D)."""
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            probs = (x.float() @ self.weight.float().T).softmax(dim=2)                   # (B, N, E)
        pair = self.choose(probs.detach())
        chosen = torch.zeros_like(probs).flatten(1).scatter(1, pair, 1.0).view_as(probs)
        if self.training and self.balance and torch.is_grad_enabled():
            share = chosen.sum(1, keepdim=True) / pair.shape[1]                          # (B, 1, E)
            slope = self.balance * share.shape[2] * share / (x.shape[0] * x.shape[1])
            probs = _AddGradient.apply(probs, slope.expand_as(probs).contiguous())
        # The gates of a token add up to 1, so that equal experts are one dense layer (Komatsuzaki et al.
        # 2022, section 4). With one expert the gate is 1 whatever the router says: its gradient is then that
        # of the gate before, divided by its value, so that the router learns whether the expert was of use.
        total = (probs * chosen).sum(2, keepdim=True)
        total = torch.where(chosen.sum(2, keepdim=True) > 1, total, total.detach())
        return Routing(pair, probs * chosen / total.clamp(min=1e-30))


# ---- the layer

class MoE(nn.Module):
    """A feed-forward layer of `experts`, of which a token uses top_k (on average, unless the router is
    "token"), and of `shared` more that all tokens use. Raises ValueError for sizes that do not fit."""

    def __init__(self, width: int, hidden: int, experts: int, top_k: int, shared: int = 0,
                 router: str = "token", gated: bool = True):
        super().__init__()
        self.router = Router(width, experts, top_k, router)
        self.experts = Experts(experts, width, hidden, gated)
        self.shared = Shared(width, shared * hidden, gated) if shared else None

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D). grid: of the tokens, which other feed-forward layers take; not used."""
        b, n, d = x.shape
        pair, gates = self.router(x)
        weight = gates.flatten(1).gather(1, pair).flatten()                              # (R,)
        e = gates.shape[2]
        pair = (pair + n * e * torch.arange(b, device=x.device)[:, None]).flatten()
        order = (pair % e).argsort(stable=True)                    # by expert
        expert, token = (pair % e)[order], (pair // e)[order]
        rows = x.reshape(b * n, d)[token]                                                # (R, D)
        rows = self.experts(rows, expert) * weight[order][:, None]
        # index_put, unlike index_add, sums in the same order in every run, also on a GPU
        out = rows.new_zeros(b * n, d).index_put((token,), rows, accumulate=True).view(b, n, d).to(x.dtype)
        return out if self.shared is None else out + self.shared(x)

    def specification(self, x: Tensor) -> Tensor:
        """What `forward` computes, as a sum over all experts; the tests compare the two."""
        out = torch.zeros_like(x) if self.shared is None else self.shared(x)
        gates = self.router(x).gates
        for i in range(self.experts.count):
            out = out + gates[..., i, None] * self.experts.one(i, x)
        return out


def set_balance(model: nn.Module, weight: float) -> None:
    """The weight of the balance loss of every router. Where a batch is taken in pieces whose losses are
    averaged, it is the weight divided by their number."""
    for module in model.modules():
        if isinstance(module, Router):
            module.balance = weight


def upcycled(model: nn.Module, dense: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a dense network as those of `model`, which has experts where that has feed-forward
    layers: every expert begins as such a layer (Komatsuzaki et al. 2022, arXiv:2212.05055), the shared ones
    without effect, the router as in `own`, the state of `model`. Both networks then compute the same."""
    dense = dict(dense)
    for name, module in model.named_modules():
        if not isinstance(module, MoE) or f"{name}.fc1.weight" not in dense:
            continue
        for layer in ("fc1", "fc2"):
            weight, bias = (dense.pop(f"{name}.{layer}.{kind}") for kind in ("weight", "bias"))
            dense[f"{name}.experts.{layer}"] = weight.expand(module.experts.count, *weight.shape)
            dense[f"{name}.experts.{layer}_bias"] = bias.repeat(module.experts.count)
        dense |= {part: own[part] for part in own
                  if part.startswith((f"{name}.router.", f"{name}.shared."))}
        for part in ("weight", "bias"):
            if module.shared is not None:
                dense[f"{name}.shared.fc2.{part}"] = torch.zeros_like(own[f"{name}.shared.fc2.{part}"])
    return dense


# ---- the load of the experts

class Loads:
    """How many pairs each expert of each layer had, and how many tokens had none, by quarters of the time."""

    def __init__(self):
        # Of the present call of the network: (B,) by picture or, where pictures are packed, (N,) by token.
        self.quarter = None
        self.counts: dict[str, Tensor] = {}  # (4, E + 2): pairs by expert, tokens without, all tokens

    def enter(self, model: nn.Module, inputs: tuple, named: dict) -> None:
        t = named["t"] if "t" in named else inputs[1]
        if forward_ad.unpack_dual(t).tangent is not None:                    # the call is one of several
            self.quarter = None
            return
        self.quarter = (t * 4).long().clamp(0, 3).cpu()
        xt = named["xt"] if "xt" in named else inputs[0]
        if isinstance(xt, list):                                             # packed in this order
            counts = [math.prod(model.x_embedder.grid(picture)) for picture in xt]
            self.quarter = self.quarter.repeat_interleave(torch.tensor(counts))

    def add(self, name: str, routing: Routing) -> None:
        if self.quarter is None:
            return
        b, n, e = routing.gates.shape
        chosen = torch.zeros(b, n * e).scatter(1, routing.pair.cpu(), 1.0).view(b * n, e)
        without = (chosen.sum(1, keepdim=True) == 0).double()
        rows = torch.cat([chosen.double(), without, torch.ones_like(without)], dim=1)      # (B N, E + 2)
        table = self.counts.setdefault(name, torch.zeros(4, e + 2, dtype=torch.float64))
        table.index_add_(0, self.quarter.repeat_interleave(b * n // len(self.quarter)), rows)

    def record(self) -> dict:
        """For metrics.jsonl, by layer and quarter of the time: the load of each expert in units of an even
        one, and the share of tokens that no expert took."""
        load, without = {}, {}
        for name, table in self.counts.items():
            pairs, tokens = table[:, :-2], table[:, -1]
            seen = [i for i in range(4) if tokens[i] > 0]
            quarters = {i: f"{i / 4}-{(i + 1) / 4}" for i in seen}
            even = pairs.mean(1, keepdim=True)
            load[name] = {quarters[i]: [round(x, 3) for x in (pairs[i] / even[i]).tolist()] for i in seen}
            without[name] = {quarters[i]: round(float(table[i, -2] / tokens[i]), 4) for i in seen}
        return {"expert_load": load, "without_expert": without} if load else {}


@contextmanager
def counted(model: nn.Module) -> Iterator[Loads]:
    """Within it, the loads of all calls model(xt, t, ...) are counted. For a model that is not compiled."""
    loads, hooks = Loads(), []
    for name, module in model.named_modules():
        if isinstance(module, Router):
            layer = name.rpartition(".mlp.router")[0]
            hooks.append(module.register_forward_hook(
                lambda module, inputs, routing, layer=layer: loads.add(layer, routing)))
    if hooks:
        hooks.append(model.register_forward_pre_hook(loads.enter, with_kwargs=True))
    try:
        yield loads
    finally:
        for hook in hooks:
            hook.remove()


# ---- experts on several ranks

def distribute_experts(module: nn.Module, mesh) -> None:
    """Give each rank of a one-dimensional torch DeviceMesh an equal part of the experts of every MoE in the
    module, as DTensors Shard(0) with rank 0's values. Every rank calls the module with pictures of its own;
    tokens travel to their experts and back (Lepikhin et al. 2020, arXiv:2006.16668). The gradients of experts
    are means over the ranks, as data parallelism makes those of all other weights. Raises ValueError where
    the mesh does not divide the experts."""
    from torch.distributed.tensor import Shard, distribute_tensor

    layers = [layer for layer in module.modules() if isinstance(layer, Experts)]
    for layer in layers:
        if layer.count % mesh.size():
            raise ValueError(f"experts {layer.count}: not a multiple of the {mesh.size()} ranks that share "
                             "them; give --experts that is, or fewer ranks")
    for layer in layers:
        layer.mesh = mesh
        # Not compiled, as the sizes of what is sent depend on the values.
        layer.exchange = torch.compiler.disable(exchanged)
        for name, weight in list(layer.named_parameters()):
            part = distribute_tensor(weight.data, mesh, [Shard(0)])
            setattr(layer, name, nn.Parameter(part, requires_grad=weight.requires_grad))


def exchanged(layer: Experts, rows: Tensor, expert: Tensor) -> Tensor:
    """Experts.forward, with every row computed by the rank that has its expert."""
    from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd

    group, ranks = layer.mesh.get_group(), layer.mesh.size()
    own = layer.count // ranks               # experts of a rank
    sent = torch.bincount(expert, minlength=layer.count)                                 # (E,)
    arriving = all_to_all_single(sent, None, None, group)                                # (ranks * own,)
    out_sizes = sent.view(ranks, own).sum(1).tolist()
    in_sizes = arriving.view(ranks, own).sum(1).tolist()
    arrived = all_to_all_single_autograd(rows.contiguous(), in_sizes, out_sizes, group)
    # They come rank by rank, from each sorted by expert.
    mine = torch.arange(own, device=rows.device).repeat(ranks).repeat_interleave(arriving)
    order = mine.argsort(stable=True)
    weights = []
    for weight in (layer.fc1, layer.fc1_bias, layer.fc2, layer.fc2_bias):
        local = weight.to_local()
        if local.requires_grad:
            local.register_hook(lambda grad: grad / ranks)         # a sum over the ranks becomes a mean
        weights.append(local)
    done = layer.compute(arrived[order], mine[order], *weights)[order.argsort()]
    return all_to_all_single_autograd(done.contiguous(), out_sizes, in_sizes, group)


def demo() -> None:
    """Compare each router's layer with the sum over all experts, and print the loads of its experts."""
    torch.manual_seed(0)
    x, t = torch.randn(64, 64, 96), torch.rand(64)
    for kind in ROUTERS:
        layer = MoE(96, 64, experts=8, top_k=2, shared=1, router=kind)
        with torch.no_grad():
            error = (layer(x) - layer.specification(x)).abs().max()
            with counted(layer) as loads:
                layer(x, t)                  # in the place of a network that takes the time
        found = loads.record()
        load = [value for row in found["expert_load"][""].values() for value in row]
        without = max(found["without_expert"][""].values())
        print(f"{kind:6s} off by {error:.0e}; loads from {min(load):.2f} to {max(load):.2f} of an even one; "
              f"at most {without:.1%} of the tokens without an expert")


if __name__ == "__main__":
    demo()
