"""What one rank holds of a training, by the layout of the processes, in GiB; and whether that is so.

    python benchmarks/scale.py                  # XL/2, SD3-medium and FLUX, without memory for them
    python benchmarks/scale.py --networks flux-dev --layouts 256/shard/8 --batch 2 --precision fp32
    python benchmarks/scale.py --check          # small networks in 1, 2 and 4 processes

A layout is RANKS, RANKS/shard or RANKS/shard/TENSOR, as train.py's --shard and --tensor-parallel make it.
Weights, gradients, moments and averages follow from shapes: a weight's cut over a tensor group, then chunks
of its first dimension; the rank that is shown has the largest piece of each. Activations are what autograd
keeps in a forward pass of fake tensors, under autocast for bf16. --check counts the same in real
processes, and reads how their memory grows from the system (Linux).
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ema
import settings
from cli import Flag, integer, make_parser, number, one_of, program
from cuts import Cut, check_tensor_parallel, cuts_of, tensor_plan
from deferred import deferred
from dit import Block
from mmdit import JointBlock, SingleBlock
from networks import build_model, checkpoint_blocks
from parallel import Sharding, local, replicate
from plan import kept_bytes
from ranks import Ranks, environments, launched
from state import State

GIB = 2**30
MIB = 2**20


# ---- networks and layouts

class Network(NamedTuple):
    arch: str
    config: dict
    latent: tuple[int, int, int]     # C, h, w
    length: int = 0                  # text tokens

    @property
    def tokens(self) -> int:
        """Of the picture."""
        p, q = self.config.get("patch", (2, 2))
        return (self.latent[1] // p) * (self.latent[2] // q)

    @property
    def blocks(self) -> tuple[type, ...]:
        return settings.ARCHITECTURES[self.arch].blocks


PRESETS = {arch: settings.ARCHITECTURES[arch].presets for arch in ("dit", "mmdit")}
NETWORKS = {
    # 256 x 256 pixels, 1000 classes; 1024 x 1024, with 77 tokens of CLIP and as many of T5; with 512 of T5
    "XL/2": Network("dit", PRESETS["dit"]["XL/2"] | {"num_classes": 1000}, (4, 32, 32)),
    "sd3-medium": Network("mmdit", PRESETS["mmdit"]["sd3-medium"], (16, 128, 128), 154),
    "flux-dev": Network("mmdit", PRESETS["mmdit"]["flux-dev"], (16, 128, 128), 512),
}
# More than 128 tokens, so that a CPU runs the kernels of attention that a GPU would.
CHECKED = {
    "a DiT": Network("dit", dict(width=512, depth=8, heads=8, num_classes=1000), (4, 32, 32)),
    "an MMDiT": Network("mmdit", dict(width=384, depth=3, single_depth=4, heads=6), (4, 32, 32), 32),
}


class Layout(NamedTuple):
    ranks: int = 1
    shard: bool = False
    tensor: int = 1

    @property
    def groups(self) -> int:
        """Over how many ranks a weight is cut, after the cut over a tensor group."""
        return self.ranks // self.tensor if self.shard else 1

    @property
    def typed(self) -> str:
        shard = "/shard" if self.shard else ""
        return f"{self.ranks}{shard}{f'/{self.tensor}' if self.tensor > 1 else ''}"

    def __str__(self) -> str:
        if self.ranks == 1:
            return "1 process"
        words = f"{self.ranks}, {'sharded' if self.shard else 'data parallel'}"
        return f"{words}, tensor {self.tensor}" if self.tensor > 1 else words


def layout(string: str) -> Layout:
    """For argparse's `type=`."""
    match = re.fullmatch(r"([1-9]\d{0,6})(/shard(?:/([1-9]\d{0,6}))?)?", string)
    if match is None:
        raise argparse.ArgumentTypeError(f"{string}: must be RANKS, RANKS/shard or RANKS/shard/TENSOR, like "
                                         "64/shard/8")
    found = Layout(int(match[1]), match[2] is not None, int(match[3] or 1))
    if found.shard and found.ranks == 1:
        raise argparse.ArgumentTypeError(f"{string}: one process has nobody to share with; give more ranks")
    if found.ranks % found.tensor:
        raise argparse.ArgumentTypeError(f"{string}: {found.tensor} does not divide {found.ranks} ranks")
    return found


LAYOUTS = ["1", "8", "8/shard", "64/shard", "8/shard/2", "64/shard/2", "8/shard/8", "64/shard/8"]
CHECKED_LAYOUTS = ["1", "2", "2/shard", "2/shard/2", "4/shard", "4/shard/2"]


# ---- weights

class Held(NamedTuple):
    """Bytes on one rank. The first four stay between steps, the last is there while blocks run."""
    parameters: int
    gradients: int
    optimizer: int       # two moments of each weight, and the number of steps
    averages: int
    in_use: int          # see `in_use`

    @property
    def lasting(self) -> int:
        return sum(self[:4])


def shape_of_cut(name: str, weight: Tensor, cuts: dict[str, Cut], tensor: int) -> list[int]:
    """The weight's shape on one rank of a tensor group."""
    shape = list(weight.shape)
    if name in cuts:
        shape[cuts[name].dim] //= tensor
    return shape


def pieces(model: nn.Module, blocks: tuple[type, ...], where: Layout) -> dict[str, int]:
    """How many numbers of each weight the first rank has, which no other rank exceeds."""
    cuts = cuts_of(model, blocks)
    found = {}
    for name, weight in model.named_parameters():
        shape = shape_of_cut(name, weight, cuts, where.tensor)
        shape[0] = math.ceil(shape[0] / where.groups)
        found[name] = math.prod(shape)
    return found


def in_use(model: nn.Module, blocks: tuple[type, ...], where: Layout, bf16: bool) -> int:
    """Bytes of weights, and of gradients on their way, besides those that the rank holds all the time.

    Sharded: whatever is in no block, whole; two neighbouring blocks, as one is gathered while the other runs;
    and the gradient of one, whole, as it was computed and in the float32 in which the ranks add it up. Not
    sharded: the copies in bf16 that autocast makes of the matrices."""
    if not where.shard:
        layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        return 2 * sum(weight.numel() for layer in layers for weight in layer.parameters()) if bf16 else 0
    cuts = cuts_of(model, blocks)
    size = 2 if bf16 else 4
    names = {module: name for name, module in model.named_modules()}
    counts = {names[block]: 0 for block in model.modules() if isinstance(block, settings.BLOCKS)}
    rest = 0
    for name, weight in model.named_parameters():
        count = math.prod(shape_of_cut(name, weight, cuts, where.tensor))
        home = [block for block in counts if name.startswith(f"{block}.")]
        if home:
            counts[home[0]] += count
        else:
            rest += count
    in_order = list(counts.values())
    pairs = [sum(in_order[i:i + 2]) for i in range(len(in_order))]
    return 4 * rest + size * max(pairs) + (size + 4) * max(in_order)


def held(network: Network, where: Layout, length: float, bf16: bool) -> Held:
    """length: of --ema. Raises ValueError where the network cannot be cut so."""
    with torch.device("meta"):
        model = build_model(network.arch, network.config)
    check_tensor_parallel(model, network.blocks, where.tensor)
    counts = pieces(model, network.blocks, where)
    weights = 4 * sum(counts.values())
    averages = len(ema.widths_kept(length)) * weights
    return Held(weights, weights, 2 * weights + 4 * len(counts), averages,
                in_use(model, network.blocks, where, bf16))


# ---- activations

def forward_of(network: Network, model: nn.Module, bf16: bool = False) -> Callable[[int], Tensor]:
    """The function that runs the model on a batch of this size, of any numbers."""
    def forward(count: int) -> Tensor:
        cond = {}
        if network.arch == "mmdit":
            c = model.config
            cond["context"] = torch.zeros(count, network.length, c.context_width)
            cond["pooled"] = torch.zeros(count, c.pooled_width)
            if c.guidance:
                cond["guidance"] = torch.zeros(count)
        elif model.config.num_classes:
            cond["y"] = torch.zeros(count, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            return model(torch.zeros(count, *network.latent), torch.zeros(count), **cond)
    return forward


def cut_for_one(model: nn.Module, blocks: tuple[type, ...], tensor: int) -> None:
    """Give the linear layers and the attentions of a model the sizes that they have in a tensor group. Those
    whose output is gathered stay as they are, as autograd keeps the same of them."""
    for holder, linears in tensor_plan(model, blocks).items():
        module = model.get_submodule(holder)
        for name, cut in linears.items():
            if cut.gathered:
                continue
            shape = list(module.get_submodule(name).weight.shape)
            shape[cut.dim] //= tensor
            module.set_submodule(name, nn.Linear(shape[1], shape[0]))
        for size in ("heads", "width"):
            if hasattr(module, size):
                setattr(module, size, getattr(module, size) // tensor)


def log_sums(model: nn.Module, tokens: int) -> int:
    """What the kernels of attention keep of a picture besides their inputs and output, which `kept_bytes`
    leaves out: the logarithm of the softmax's denominator, for each head and row, in float32."""
    count = 0
    for module in model.modules():
        if isinstance(module, (Block, JointBlock, SingleBlock)):
            heads = module.heads if isinstance(module, SingleBlock) else attention_of(module).heads
            count += heads * tokens
    return 4 * count


def attention_of(block: nn.Module) -> nn.Module:
    return block.attn if isinstance(block, Block) else block.x_block.attn


class Activations(NamedTuple):
    """Bytes per picture that the backward pass needs."""
    kept: int
    recomputed: int      # with --grad-checkpoint: inputs of all blocks, and all of the one that runs again


def activations(network: Network, tensor: int, bf16: bool) -> Activations:
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Autocast does not know the meta device. A fake tensor has no memory, and the device that it is told.
    device = "cpu" if bf16 else "meta"
    with FakeTensorMode() if bf16 else nullcontext():
        with torch.device(device):
            model = build_model(network.arch, network.config)
            cut_for_one(model, network.blocks, tensor)
        forward = forward_of(network, model, bf16)
        kept = kept_bytes(model, forward, device)
        inputs, again = recomputed(model, forward, device)
    return Activations(kept, inputs + again)


def recomputed(model: nn.Module, forward: Callable[[int], Tensor], device: str) -> tuple[int, int]:
    """What is kept with gradient checkpointing, and what the largest block keeps when it runs again."""
    checkpoint_blocks(model)
    inputs = kept_bytes(model, forward, device)
    kinds = {}                           # one block of each size and class
    for block in model.modules():
        if isinstance(block, settings.BLOCKS):
            kinds[type(block), sum(weight.numel() for weight in block.parameters())] = block
    again = 0
    for block in kinds.values():
        checkpointed = block.__dict__.pop("forward")
        again = max(again, kept_bytes(model, forward, device) - inputs)
        block.forward = checkpointed
    return inputs, again


# ---- the table

HEADS = ["layout", "parameters", "gradients", "optimizer", "averages", "in use", "a picture",
         "a picture, checkpointed"]


def in_gib(size: float) -> str:
    return f"{size / GIB:,.2f}" if size < 10 * GIB else f"{size / GIB:,.1f}"


def total_in_gib(size: int, room: float) -> str:
    return in_gib(size) if size <= room else f"{in_gib(size)} (too much)"


def table(network: Network, layouts: list[Layout], length: float, bf16: bool, batch: int,
          room: float) -> list[str]:
    """Markdown. length: of --ema; batch: pictures that a rank has at a time; room: bytes of its device."""
    heads = [*HEADS, f"total of {batch}", f"total of {batch}, checkpointed", "pictures that fit"]
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    per_picture: dict[int, Activations] = {}                # by the size of the tensor group
    for where in layouts:
        try:
            weights = held(network, where, length, bf16)
        except ValueError as error:
            why = str(error).split(": ", 1)[1].split(";")[0]
            rows.append(f"| {where} | not possible: {why}" + " |" * (len(heads) - 1))
            continue
        if where.tensor not in per_picture:
            per_picture[where.tensor] = activations(network, where.tensor, bf16)
        each = per_picture[where.tensor]
        fixed = sum(weights)
        totals = [total_in_gib(fixed + batch * size, room) for size in each]
        fit = [f"{max(0, int((room - fixed) // size)):,}" for size in each]
        cells = [str(where), *map(in_gib, weights), *map(in_gib, each), *totals, " or ".join(fit)]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def describe(name: str, network: Network, bf16: bool) -> str:
    with torch.device("meta"):
        model = build_model(network.arch, network.config)
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    text = f" and {network.length} of text" if network.length else ""
    return (f"{name}: {millions:,.1f} M parameters, {network.tokens:,} tokens{text}, "
            f"{'bf16' if bf16 else 'fp32'}; GiB of a rank")


# ---- the check: one process of it

def resident(key: str = "VmRSS") -> int:
    """Bytes of memory of this process; VmHWM: the most since it was last reset."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)     # what was freed goes back to the system
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def total_bytes(tensors: list[Tensor]) -> int:
    return sum(local(tensor).numel() * local(tensor).element_size() for tensor in tensors)


class Kept:
    """The bytes that autograd keeps within the block, each once, as far as they are no weights."""

    def __init__(self, weights: list[Tensor]):
        self.weights = {local(weight).untyped_storage()._cdata for weight in weights}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def keep(self, x: Tensor) -> Tensor:
        part = local(x)
        storage = getattr(part, "elem", part).untyped_storage()   # elem: of a sum that is on its way
        if storage._cdata not in self.weights:
            self.storages[storage._cdata] = storage
        return x

    def __enter__(self) -> Kept:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def distributed(network: Network, where: Layout, length: float, checkpointed: bool) -> State:
    """A model with its averages and optimizer, cut as train.new_state cuts it."""
    torch.manual_seed(0)
    model, initial = build_model(network.arch, network.config), None
    if where.shard:
        model, initial = deferred(lambda: build_model(network.arch, network.config))
    averages = {width: copy.deepcopy(model).eval().requires_grad_(False)
                for width in ema.widths_kept(length)}
    if checkpointed:
        checkpoint_blocks(model)
    cpu = torch.device("cpu")
    state = State(model, averages, cpu)
    if where.shard:
        state.shard(Sharding(where.ranks, where.tensor, cpu, settings.BLOCKS, network.blocks, bf16=False),
                    initial)
    elif where.ranks > 1:
        state.steps[model] = replicate(model)
    state.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return state


def measure(network: Network, where: Layout, length: float, batch: int, checkpointed: bool) -> dict[str, int]:
    """What this process holds after steps of the optimizer, in bytes: counted, and as the system sees it."""
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")          # begins VmHWM anew
    state = distributed(network, where, length, checkpointed)
    begun = resident("VmHWM") - before
    forward = forward_of(network, state.model)
    weights = list(state.model.parameters())

    def run(count: int) -> Tensor:
        return state.run(state.model, lambda model, count: forward(count), count)

    def step(number: int) -> None:
        run(batch).square().mean().backward()
        state.clip_gradients(1.0)
        state.optimizer.step()
        state.average(number)

    # The first step makes buffers that stay, the second adds to gradients that are there: the most at a time.
    step(1)
    Path("/proc/self/clear_refs").write_text("5")
    step(2)
    found = {"begun": begun, "peak": resident("VmHWM") - before}
    moments = [value for values in state.optimizer.state.values() for value in values.values()]
    found |= {"parameters": total_bytes(weights), "gradients": total_bytes([each.grad for each in weights]),
              "optimizer": total_bytes(moments),
              "averages": total_bytes([each for network in state.averages.values()
                                       for each in network.parameters()]),
              "resident": resident() - before}

    # ---- activations: what one batch of twice the size keeps more
    kept, grown = [], []
    for count in (batch, 2 * batch):
        start = resident()
        with Kept(weights) as keeping:
            result = run(count)
        kept.append(keeping.bytes)
        keeping.storages.clear()
        grown.append(resident() - start)
        result.square().mean().backward()              # FSDP frees what it gathered in a backward pass
        del result
    return found | {"kept": (kept[1] - kept[0]) // batch, "grown": (grown[1] - grown[0]) // batch}


def measure_here(args: argparse.Namespace) -> None:
    """One process of those that `check` or torchrun starts. Rank 0 prints the most that any rank has."""
    with launched() as ranks:
        check_launch(args, ranks)
        torch.set_num_threads(1)
        network, options = CHECKED[args.measure], (args.ema, args.batch, args.grad_checkpoint)
        # First with next to nothing, for the code that PyTorch loads when it is needed.
        least = network._replace(config=network.config | {"width": 128, "heads": 2, "depth": 1})
        measure(least, args.layouts[0], *options)
        found = measure(network, args.layouts[0], *options)
        everywhere = ranks.gathered(found)
        if ranks.first:
            print(json.dumps({key: max(each[key] for each in everywhere) for key in found}), flush=True)


def check_launch(args: argparse.Namespace, ranks: Ranks) -> None:
    if len(args.layouts) != 1 or args.layouts[0].ranks != ranks.size:
        raise ValueError(f"--layouts {' '.join(each.typed for each in args.layouts)}: must be one, of "
                         f"{ranks.size} ranks")


# ---- the check: all of them

def start(words: list[str], count: int) -> dict[str, int]:
    """Run this program in so many processes, as torchrun does, and return what the first prints."""
    # A fixed threshold lets glibc give every large tensor back when it is freed.
    shared = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    processes = [subprocess.Popen([sys.executable, __file__, *words], env=shared | own, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                 for own in environments(count)]
    try:
        ends = [process.communicate() for process in processes]
    finally:
        for process in processes:        # after Ctrl-C
            process.kill()
    if any(process.returncode for process in processes):
        raise RuntimeError("a process of the check failed:\n" + "\n".join(error for _, error in ends))
    return json.loads(ends[0][0].strip().splitlines()[-1])


def difference(found: int, expected: int) -> str:
    """Both in MiB, and by how much the first exceeds the second."""
    if found == expected:
        return f"{found / MIB:,.1f}, equal"
    return f"{found / MIB:,.1f} for {expected / MIB:,.1f}, {found / expected - 1:+.1%}"


def check(args: argparse.Namespace) -> int:
    """Print what the processes hold, beside what the table has for them. Returns 1 where a count of bytes
    differs."""
    status = 0
    heads = ["layout", *HEADS[1:5], "a picture", "memory of the four", "memory a picture", "most in a step",
             "most at the start"]
    for name, network in CHECKED.items():
        print(describe(name, network, bf16=False).replace("GiB", "MiB") + "\n")
        print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|", flush=True)
        for where in args.layouts:
            words = ["--measure", name, "--layouts", where.typed, "--ema", str(args.ema), "--batch",
                     str(args.batch)]
            words += ["--grad-checkpoint"] if args.grad_checkpoint else []
            found = start(words, where.ranks)
            wanted = held(network, where, args.ema, bf16=False)
            each = activations(network, where.tensor, bf16=False)
            with torch.device("meta"):
                model = build_model(network.arch, network.config)
                cut_for_one(model, network.blocks, where.tensor)
            kept = each.kept + log_sums(model, network.tokens + network.length)
            if args.grad_checkpoint:
                kept, _ = recomputed(model, forward_of(network, model), "meta")
            cells = [difference(found[key], getattr(wanted, key)) for key in HEADS[1:5]]
            if not all(cell.endswith("equal") for cell in cells):
                status = 1
            total = sum(wanted) + args.batch * each[args.grad_checkpoint]
            cells += [difference(found["kept"], kept), difference(found["resident"], wanted.lasting),
                      difference(found["grown"], kept), difference(found["peak"], total),
                      f"{found['begun'] / MIB:,.1f}"]
            print(f"| {where} | " + " | ".join(cells) + " |", flush=True)
        print()
    if status:
        print("scale.py: the counts of weights differ from the table", file=sys.stderr)
    return status


# ---- the program

FLAGS = {
    "what": [
        Flag("--networks", "networks of the table (default: all)", one_of(NETWORKS), list(NETWORKS), "+",
             "NAME"),
        Flag("--layouts", "RANKS, RANKS/shard or RANKS/shard/TENSOR (default: "
                          f"{' '.join(LAYOUTS)}; with --check: {' '.join(CHECKED_LAYOUTS)})", layout, None,
             "+", "LAYOUT"),
        Flag("--batch", "pictures that a rank has at a time (default: 4; with --check: 1)",
             integer(1, 10**6)),
        Flag("--precision", "bf16 (default), or fp32; --check has fp32", one_of(("bf16", "fp32")), "bf16"),
        Flag("--ema", "as train.py's: a width, for which two averages are kept, or a decay, for one "
                      "(default: as train.py has it; with --check, 0.03)", settings.average_length),
        Flag("--memory", "GiB of a rank's device (default: 80)", number(0.1, 1e6), 80.0),
    ],
    "the check": [
        Flag("--check", "start processes with small networks, and compare what they hold with the table"),
        Flag("--grad-checkpoint", "with --check: recompute the blocks"),
        Flag("--measure", "be one of the processes of --check, which torchrun can start as well",
             one_of(CHECKED), metavar="NETWORK"),
    ],
}


def main(argv: list[str] | None = None) -> int:
    args = make_parser("What one rank holds of a training, by the layout of the processes.",
                       FLAGS).parse_args(argv)
    checks = args.check or args.measure is not None
    if args.grad_checkpoint and not checks:
        raise ValueError("--grad-checkpoint: only with --check; the table has both columns")
    if checks and not Path("/proc/self/clear_refs").exists():
        raise ValueError("--check: reads the memory of processes from /proc, which only Linux has")
    args.batch = args.batch or (1 if checks else 4)
    if checks and args.ema is None:
        args.ema = 0.03
    args.layouts = args.layouts or [layout(each) for each in (CHECKED_LAYOUTS if checks else LAYOUTS)]
    if args.measure is not None:
        measure_here(args)
        return 0
    if args.check:
        return check(args)
    bf16 = args.precision == "bf16"
    for name in args.networks:
        print(describe(name, NETWORKS[name], bf16) + "\n", flush=True)
        default = settings.ARCHITECTURES[NETWORKS[name].arch].defaults["ema"]
        length = default if args.ema is None else args.ema
        rows = table(NETWORKS[name], args.layouts, length, bf16, args.batch, args.memory * GIB)
        print("\n".join(rows) + "\n", flush=True)
    print("In use: the weights of the blocks that are gathered, and the gradient of one on its way; or, not "
          "sharded,\nautocast's copies in bf16. Checkpointed: --grad-checkpoint, with the block that runs "
          "again.")
    return 0


if __name__ == "__main__":
    sys.exit(program("scale.py", main))
