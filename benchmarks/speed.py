"""Measure attention, a training step and guided sampling, against PyTorch's own kernels and diffusers.

    python benchmarks/speed.py --out speed.json          (from the repository's root; diffusers is optional)
    python benchmarks/speed.py --only attention          (or train, sample)

All candidates of a row run in one process and take turns for seven rounds, after each has been called until
its time is steady; a figure is the median over the rounds. On a GPU, networks run one after another, because
together they would not fit. The backward pass is timed by itself, on a graph that is built before the clock
starts: no figure is the difference of two others. The spread is the range of the middle half of the rounds,
as a share of their median. A steady load causes no spread, so on a CPU the share of the time in which this
thread waited for a core is measured as well. A row with more than 10 % of either is measured up to three
times, and the calmest time counts; "?" marks the figures that still have more.

Networks run under bf16 autocast if the hardware has bf16, as in train.py, else in float32. On a GPU they are
the published DiT presets and Stable Diffusion's U-Net; on a CPU, small ones. diffusers' models have the same
shape, run in the same loop, and are compiled block by block like ours (its DiT embeds time and class in every
block, ours only once).

A multiplication and an addition count as two FLOPs. Attention takes 4 B heads N^2 head_dim forward, and 2.5
times that backward. A network's forward pass is counted by torch's FlopCounterMode with attention written out
(for a DiT block of width D and N tokens: 24 N D^2 + 4 N^2 D + 12 D^2; 0.24 TFLOP for XL/2 at N = 256); a
training step is three of them. "Utilisation" is FLOPs over time, as a share of the best rate of a matrix
product on this machine: the fastest round over several shapes, measured again before each network.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import attention as attention_file
import dit
import unet
from cli import Parser, number, one_of, program
from files import write_atomically
from machine import has_bf16
from networks import compile_blocks, graphed
from rectified_flow import RectifiedFlow
from samplers import SAMPLERS, guided

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if has_bf16(DEVICE) else torch.float32
Row = dict[str, object]
Prepare = Callable[[], Callable]     # does what is not timed, and returns the call that is

ROUNDS = 7
LEAST_ROUNDS = 5                     # with fewer, the spread would mean little
ATTEMPTS = 3                         # how often a noisy row is measured at most
NOISY = 0.10                         # a spread, or a share of waiting, above this is marked
WARM_UP = 0.1                        # seconds of warm-up at least: clock rates and caches need them
COMPILE_TIME = 40                    # seconds that must be left, because compilation cannot be interrupted
now = time.perf_counter              # the clocks of this file: the tests replace them
cpu_now = time.thread_time           # stands still while this thread waits for a core


# ---- measuring

def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


class Limits(NamedTuple):
    """Points in time, in seconds of `now`."""
    stop: float          # no call begins after this
    repeat: float        # a noisy measurement is not repeated if it would end after this


class Round(NamedTuple):
    seconds: float       # per call
    waited: float = 0.0  # seconds of them in which this thread had no core


class Timing(NamedTuple):
    seconds: float       # per call: the median over the rounds
    fastest: float
    spread: float        # range of the middle half of the rounds / median
    waited: float        # share of the time in which this thread had no core; 0 on a GPU
    rounds: int

    @property
    def noise(self) -> float:
        return max(self.spread, self.waited)


class Measured(NamedTuple):
    timings: dict[str, Timing]       # by candidate; empty if the time was up too soon
    attempts: int

    @property
    def noise(self) -> float:
        return max((timing.noise for timing in self.timings.values()), default=math.inf)


def summary(rounds: list[Round]) -> Timing:
    """A single disturbed round moves neither the median nor the quartiles by much; a busy machine does."""
    times = [each.seconds for each in rounds]
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    # Summed first, because the clock of the thread is coarse on some systems.
    waited = max(0.0, sum(each.waited for each in rounds)) / sum(times)
    return Timing(median, min(times), (high - low) / median, waited, len(times))


def time_calls(call: Callable, repeats: int) -> Round:
    """A GPU works on after a call returns, so it is waited for on both sides."""
    synchronize()
    cpu_start = cpu_now()
    start = now()
    for _ in range(repeats):
        call()
    synchronize()
    took = now() - start
    waited = 0.0 if CUDA else took - (cpu_now() - cpu_start)     # waiting for a GPU is no disturbance
    return Round(took / repeats, waited / repeats)


def warm_up(call: Callable, stop: float) -> float:
    """Call until three times in a row are not 10 % faster than the fastest time before, and return that time.

    Compilation, autotuning, memory pools and clock rates make the first calls slower. A load makes calls
    slower, but never faster, so this ends on a busy machine, too."""
    begun = now()
    fastest = time_calls(call, 1).seconds
    steady = 0
    while now() < stop and (steady < 3 or now() - begun < WARM_UP):
        took = time_calls(call, 1).seconds
        steady += 1
        if took < 0.9 * fastest:
            fastest = took
            steady = 0
    return fastest


def take_turns(candidates: dict[str, Prepare], repeats: dict[str, int],
               stop: float) -> dict[str, list[Round]]:
    """The rounds of each candidate. A load that comes and goes then meets all of them."""
    rounds = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        this_round = {}
        for name, prepare in candidates.items():
            if now() >= stop:
                return rounds                            # without the one that is not complete
            this_round[name] = time_calls(prepare(), repeats[name])
        for name, took in this_round.items():
            rounds[name].append(took)
    return rounds


def measure(candidates: dict[str, Prepare], limits: Limits, least: float) -> Measured:
    """Measure each candidate, for about `least` seconds per round. All results come from the same attempt,
    the one whose noisiest candidate is the calmest, so that they can be compared with each other."""
    repeats = {}
    for name, prepare in candidates.items():
        fastest = warm_up(prepare(), limits.stop)
        repeats[name] = max(1, round(least / max(fastest, 1e-9)))

    best = Measured({}, 0)
    for count in range(1, ATTEMPTS + 1):
        begun = now()
        rounds = take_turns(candidates, repeats, limits.stop)
        if any(len(each) < LEAST_ROUNDS for each in rounds.values()):
            break
        found = Measured({name: summary(each) for name, each in rounds.items()}, count)
        best = min(best, found, key=lambda measured: measured.noise)._replace(attempts=count)
        ends_at = now() + (now() - begun)                # of another attempt
        if best.noise <= NOISY or ends_at > limits.repeat:
            break
    return best


def mark(text: str, doubtful: bool) -> str:
    return text + ("?" if doubtful else " ")


def share(end: float, left: int) -> float:
    """When the next of `left` items should be done, so that all get equal parts of the time until `end`."""
    return now() + (end - now()) / left


def attempt(what: str, make: Callable) -> object | None:
    """The result of `make`, or None if it fails, as when a backend does not take these inputs."""
    try:
        made = make()
        synchronize()
        return made
    except Exception as error:                           # Triton and each backend raise their own types
        print(f"{what}: left out, {type(error).__name__}: {str(error)[:120]!r}", flush=True)
    if CUDA:                                             # after `error` is gone, which keeps tensors alive
        torch.cuda.empty_cache()
    return None


def proc(file: str, name: str) -> str:
    """The first value of that name in a file of Linux's /proc; "0" elsewhere."""
    path = Path(file)
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "0")


def is_late(deadline: float, what: str) -> bool:
    late = now() >= deadline
    if late:
        print(f"{what}: left out, because the time is up (--minutes)", flush=True)
    return late


# rows, inner dimension and columns of the products from which the best rate is taken
if CUDA:
    MATRIX_SHAPES = [(4096, 4096, 4096), (8192, 8192, 8192), (16384, 8192, 8192), (65536, 1152, 4608)]
else:
    MATRIX_SHAPES = [(256, 256, 256), (512, 512, 512), (1024, 1024, 1024), (4096, 256, 1024)]


def matrix_product(rows: int, inner: int, columns: int, transposed: bool) -> Callable:
    """transposed: the second factor is stored as the weight of a linear layer is, (columns, inner)."""
    a = torch.randn(rows, inner, device=DEVICE, dtype=DTYPE)
    if transposed:
        b = torch.randn(columns, inner, device=DEVICE, dtype=DTYPE).T
    else:
        b = torch.randn(inner, columns, device=DEVICE, dtype=DTYPE)
    return lambda: a @ b


def matrix_rate() -> float:
    """FLOP/s of a matrix product at its best, as the peak rate of this device.

    No single shape and layout is the fastest on every machine. The fastest round counts, not the median,
    because a load can only lower the rate."""
    candidates = {}
    flops = {}
    for rows, inner, columns in MATRIX_SHAPES:
        for transposed in (False, True):
            name = f"{rows} x {inner} x {columns}, transposed {transposed}"
            product = matrix_product(rows, inner, columns, transposed)
            candidates[name] = lambda product=product: product
            flops[name] = 2 * rows * inner * columns
    # It takes a second or two, and is never repeated: the spread is of no interest.
    measured = measure(candidates, Limits(stop=math.inf, repeat=-math.inf), least=0.02)
    return max(flops[name] / timing.fastest for name, timing in measured.timings.items())


# ---- attention alone

FORWARD_COST = {"forward": 1.0, "backward": 2.5, "both": 3.5}        # FLOPs, as multiples of the forward pass


class AttentionSize(NamedTuple):
    n: int
    head_dim: int
    batch: int
    heads: int

    @property
    def flops(self) -> int:
        """FLOPs of a forward pass."""
        return 4 * self.batch * self.heads * self.n * self.n * self.head_dim


def attention_sizes() -> list[AttentionSize]:
    if CUDA:
        return [AttentionSize(n, head_dim, max(1, 65536 // n), 16)
                for head_dim in (64, 128) for n in (256, 512, 1024, 4096, 16384)]
    return [AttentionSize(n, 64, max(1, 1024 // n), 4) for n in (16, 64, 256, 1024)]


def passes(call: Callable, inputs: list[torch.Tensor]) -> dict[str, Prepare]:
    """The forward pass, the backward pass and both of call(*inputs), whose output has inputs[0]'s shape."""
    gradient = inputs[0].detach()

    @torch.no_grad()
    def forward():
        return call(*inputs)

    def prepare_backward():
        out = call(*inputs)          # the graph, which is kept: one of them serves a whole round
        return lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)

    def both():
        return torch.autograd.grad(call(*inputs), inputs, gradient)

    return {"forward": lambda: forward, "backward": prepare_backward, "both": lambda: both}


def measure_passes(calls: dict[str, Callable], inputs: list[torch.Tensor], limits: Limits) -> Measured:
    """Measure every pass of every call, all in turns: "flash forward", "flash backward", ..."""
    candidates = {}
    # PyTorch requires this setting where a compiled backward pass runs with retain_graph=True.
    with torch._functorch.config.patch(donated_buffer=False):
        for name, call in calls.items():
            for way, prepare in passes(call, inputs).items():
                if attempt(f"{name} {way}", lambda prepare=prepare: prepare()()) is None:
                    break
                candidates[f"{name} {way}"] = prepare
        return measure(candidates, limits, least=0.03)


def pass_figures(measured: Measured, flops: float) -> Row:
    """Seconds, TFLOP/s and noise of each pass. flops: FLOPs of a forward pass."""
    row = {}
    for name, timing in measured.timings.items():
        row[name] = timing.seconds
        row[f"{name} TFLOP/s"] = FORWARD_COST[name.split()[-1]] * flops / timing.seconds / 1e12
        row[f"{name} spread"] = timing.spread
        row[f"{name} waited"] = timing.waited
    return row


def in_ms(measured: Measured) -> str:
    figures = []
    for name, timing in measured.timings.items():
        call, way = name.rsplit(" ", 1)
        figure = mark(f"{1e3 * timing.seconds:.3f}", timing.noise > NOISY)
        if way == "forward":
            figures.append(f" {call} {figure}")
        elif way == "backward":
            figures.append(figure)
    spread = max(timing.spread for timing in measured.timings.values())
    waited = max(timing.waited for timing in measured.timings.values())
    return " ".join(figures) + (f"  spread up to {spread:.0%}, waited up to {waited:.0%}, "
                                f"attempts {measured.attempts}")


def sdpa(backend: SDPBackend) -> Callable:
    def call(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)
    return call


def bare_calls(n: int, flex: bool) -> dict[str, Callable]:
    """Attention without norm and rotation, by name."""
    if not CUDA:
        return {"flash": sdpa(SDPBackend.FLASH_ATTENTION), "math": sdpa(SDPBackend.MATH),
                "ours": attention_file.attention}
    calls = {"flash": sdpa(SDPBackend.FLASH_ATTENTION), "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
             "efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION)}
    if flex:
        from torch.nn.attention.flex_attention import flex_attention
        calls["flex"] = torch.compile(flex_attention, dynamic=False)
    if attention_file.triton:
        calls["ours"] = attention_file.fused_attention
    return calls


def norm_and_rope_calls(size: AttentionSize, best: Callable, kernels: bool) -> dict[str, Callable]:
    """Attention of (q, k, v, q_norm, k_norm) with norm and rotation: "apart", where they are compiled and
    followed by the `best` bare call, and "ours"."""
    angles = torch.randn(size.n, size.head_dim // 2, device=DEVICE)
    rope = angles.cos(), angles.sin()
    our_call = attention_file.fused_attention if CUDA else attention_file.attention

    @torch.compile(dynamic=False)
    def normed_and_rotated(q, k, q_norm, k_norm):
        q, k = attention_file.rms_norm(q, q_norm), attention_file.rms_norm(k, k_norm)
        return attention_file.rotate(q, rope), attention_file.rotate(k, rope)

    def apart(q, k, v, q_norm, k_norm):
        return best(*normed_and_rotated(q, k, q_norm, k_norm), v)

    def ours(q, k, v, q_norm, k_norm):
        return our_call(q, k, v, q_norm=q_norm, k_norm=k_norm, rope=rope)

    if kernels:
        return {"apart": apart, "ours": ours}
    return {"apart": apart}


def attention_row(size: AttentionSize, flex: bool, deadline: float, until: float) -> Row | None:
    """The figures of one size, or None if the deadline came too soon. until: when noise is no longer a reason
    to measure again."""
    shape = (size.batch, size.n, size.heads, size.head_dim)      # the memory layout of a projection's output
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=DTYPE).transpose(1, 2).requires_grad_() for _ in "qkv")
    calls = bare_calls(size.n, flex)
    bare = measure_passes(calls, [q, k, v], Limits(deadline, share(until, 2)))
    if not bare.timings:
        return None
    print(f"N {size.n:5d} d {size.head_dim:3d}  forward, backward in ms: {in_ms(bare)}", flush=True)

    best = min((name for name in calls if name != "ours" and f"{name} both" in bare.timings),
               key=lambda name: bare.timings[f"{name} both"].seconds)
    weights = [torch.rand(size.head_dim, device=DEVICE, requires_grad=True) for _ in "qk"]
    fused = measure_passes(norm_and_rope_calls(size, calls[best], "ours" in calls), [q, k, v, *weights],
                           Limits(deadline, until))
    if fused.timings:
        print(f"                     with norm and rope: {in_ms(fused)}", flush=True)

    found = [measured for measured in (bare, fused) if measured.timings]
    timings = [timing for measured in found for timing in measured.timings.values()]
    row = {"what": "attention", "N": size.n, "head_dim": size.head_dim, "batch": size.batch,
           "heads": size.heads}
    row |= pass_figures(bare, size.flops)
    row |= {f"norm+rope, {name}": value for name, value in pass_figures(fused, size.flops).items()}
    return row | {"best": best, "spread": max(timing.spread for timing in timings),
                  "waited": max(timing.waited for timing in timings),
                  "noisy": any(timing.noise > NOISY for timing in timings),
                  "attempts": max(measured.attempts for measured in found)}


def attention_alone(deadline: float, flex_everywhere: bool) -> Iterator[Row]:
    sizes = attention_sizes()
    for i, size in enumerate(sizes):
        what = f"attention at N {size.n}, head_dim {size.head_dim}"
        if is_late(deadline, what):
            continue
        flex = flex_everywhere or size.n in (1024, 4096)         # each size takes seconds to compile
        row = attention_row(size, flex, deadline, share(deadline, len(sizes) - i))
        if row:
            yield row
        else:
            is_late(deadline, what)


# ---- networks

class Case(NamedTuple):
    name: str
    arch: str
    config: dict
    side: int           # of the latent
    batch: int          # of a training step


DIT = dit.PUBLISHED_BLOCK | {"num_classes": 1000}
SD1 = unet.PRESETS["sd1"] | {"time_offset": 0.0}
SMALL = dict(widths=(64, 128), attention=(False, True), heads=2, groups=16, context_width=64)
# batches of a GPU with more than 100 GiB; a smaller one takes half of each
GPU_CASES = [
    Case("modern XL/2, 256 tokens", "dit", dit.PRESETS["XL/2"] | {"num_classes": 1000}, 32, 128),
    Case("DiT-XL/2, 256 tokens", "dit", dit.PRESETS["XL/2"] | DIT, 32, 256),
    Case("U-Net of SD 1, 64 x 64", "unet", SD1, 64, 32),
    Case("DiT-XL/2, 1024 tokens", "dit", dit.PRESETS["XL/2"] | DIT, 64, 64),
    Case("DiT-B/2, 256 tokens", "dit", dit.PRESETS["B/2"] | DIT, 32, 256),
    Case("DiT-S/2, 256 tokens", "dit", dit.PRESETS["S/2"] | DIT, 32, 256),
    Case("DiT-B/2, 1024 tokens", "dit", dit.PRESETS["B/2"] | DIT, 64, 64),
    Case("DiT-S/2, 1024 tokens", "dit", dit.PRESETS["S/2"] | DIT, 64, 64),
]
CPU_CASES = [
    Case("DiT small, 16 tokens", "dit", dit.PRESETS["small"] | DIT | {"patch": (2, 2)}, 8, 64),
    Case("U-Net small, 8 x 8", "unet", SMALL, 8, 32),
]
CASES = GPU_CASES if CUDA else CPU_CASES


class Use(NamedTuple):
    """What is measured of one network."""
    name: str
    make: Callable[[], torch.nn.Module]
    batch: int
    steps: int = 20              # of sampling
    graphs: bool = False         # sample as sample.py --compile does on a GPU

    @property
    def compiled(self) -> bool:
        return self.graphs or "compiled" in self.name


class Theirs(torch.nn.Module):
    """diffusers' model of the same shape, called like ours."""

    def __init__(self, case: Case):
        super().__init__()
        if case.arch == "dit":
            from diffusers import DiTTransformer2DModel
            c = dit.DiTConfig(**case.config)
            self.net = DiTTransformer2DModel(
                num_attention_heads=c.heads, attention_head_dim=c.width // c.heads, in_channels=4,
                out_channels=4, num_layers=c.depth, sample_size=case.side, patch_size=c.patch[0],
                num_embeds_ada_norm=c.num_classes)
        else:
            from diffusers import UNet2DConditionModel
            c = unet.UNetConfig(**case.config)
            down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in c.attention]
            self.net = UNet2DConditionModel(
                block_out_channels=c.widths, layers_per_block=c.layers, cross_attention_dim=c.context_width,
                norm_num_groups=c.groups, attention_head_dim=c.heads, down_block_types=down,
                up_block_types=[name.replace("Down", "Up") for name in reversed(down)])

    def forward(self, xt, t, y=None, context=None):
        if context is None:
            return self.net(xt, timestep=(1000 * t).long(), class_labels=y).sample
        return self.net(xt, 1000 * t, context).sample


def variants(case: Case) -> dict[str, Callable[[], torch.nn.Module]]:
    """Functions that make the networks to compare, each on the device, by name."""
    layout = torch.channels_last if CUDA and case.arch == "unet" else torch.contiguous_format

    def ours(compiled: bool):
        cls, config = (dit.DiT, dit.DiTConfig) if case.arch == "dit" else (unet.UNet, unet.UNetConfig)
        with DEVICE:
            model = cls(config(**case.config)).to(memory_format=layout)
        if compiled:
            compile_blocks(model, kernels=True)
        return model

    def theirs(compiled: bool):
        with DEVICE:
            model = Theirs(case).to(memory_format=layout)
        if compiled:
            for block in model.modules():                # compiling the whole network would take minutes
                if type(block).__name__ in ("BasicTransformerBlock", "ResnetBlock2D"):
                    block.compile()
        return model

    made = {"ours": lambda: ours(False), "ours compiled": lambda: ours(True)}
    if CUDA and case.arch == "dit" and attention_file.triton:
        made["ours compiled, kernels"] = lambda: ours(True)      # `build` selects them instead of SDPA
    if case.name.startswith("modern") or importlib.util.find_spec("diffusers") is None:
        return made
    return made | {"diffusers": lambda: theirs(False), "diffusers compiled": lambda: theirs(True)}


def autocast():
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=DTYPE == torch.bfloat16)


def batch_of(case: Case) -> int:
    small = CUDA and torch.cuda.get_device_properties(0).total_memory < 100 * 2**30
    return case.batch // 2 if small else case.batch


def inputs(case: Case, batch: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
    xt, t = torch.randn(batch, 4, case.side, case.side, device=DEVICE), torch.rand(batch, device=DEVICE)
    if case.arch == "dit":
        return xt, t, {"y": torch.randint(1000, (batch,), device=DEVICE)}
    words = 77 if CUDA else 16
    return xt, t, {"context": torch.randn(batch, words, case.config["context_width"], device=DEVICE)}


def training(case: Case, model: torch.nn.Module) -> Callable[[], None]:
    """A training step as in train.py (autocast, backward, fused AdamW), without clipping and averaging."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    xt, t, cond = inputs(case, batch_of(case))
    eps = torch.randn_like(xt)

    def step():
        with autocast():
            loss = F.mse_loss(model(xt, t, **cond).float(), eps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def sampling(case: Case, model: torch.nn.Module, use: Use) -> Callable[[], None]:
    """Guided Euler sampling, both branches in one batch."""
    path = RectifiedFlow()
    xt, _, cond = inputs(case, use.batch)
    uncond = {"y": torch.full_like(cond["y"], 1000)} if "y" in cond else {"context": 0 * cond["context"]}
    denoise = guided(graphed(model) if use.graphs else model, path, cond, uncond, 4.0)

    @torch.no_grad()
    def draw():
        with autocast():
            SAMPLERS["euler"](denoise, path, xt, path.times(use.steps))
    return draw


def flops_forward(case: Case) -> float:
    """FLOPs of a forward pass for one picture."""
    cls, config = (dit.DiT, dit.DiTConfig) if case.arch == "dit" else (unet.UNet, unet.UNetConfig)
    xt, t, cond = (part if isinstance(part, dict) else part.to("meta") for part in inputs(case, 1))
    with torch.device("meta"), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        cls(config(**case.config))(xt, t, **{name: part.to("meta") for name, part in cond.items()})
    return counter.get_total_flops()


def print_peak(index: int, name: str) -> None:
    """Print the peak memory, in MiB, of this process after three training steps; `peak_memory` runs it in a
    new process. VmHWM is the peak of this process alone; getrusage's may begin at that of its parent."""
    step = training(CASES[index], variants(CASES[index])[name]())
    for _ in range(3):
        step()
    print("peak", int(proc("/proc/self/status", "VmHWM").split()[0]) / 1024)


def peak_memory(index: int, name: str, until: float) -> float | None:
    """Peak memory, in MiB, of training on a CPU, or None if the time is up first."""
    if now() >= until:
        return None
    try:
        done = subprocess.run([sys.executable, __file__, "--peak", str(index), name], capture_output=True,
                              text=True, check=True, timeout=until - now())
    except subprocess.TimeoutExpired:
        return None
    return float(done.stdout.split("peak")[-1]) or None      # 0 where there is no /proc


def uses_of(case: Case, only: str) -> list[Use]:
    batch = batch_of(case)
    if only == "sample":
        batch = 16 if CUDA else 4
    makers = variants(case)
    uses = [Use(name, make, batch) for name, make in makers.items()]
    if CUDA and only == "sample" and case.name == "DiT-XL/2, 256 tokens":
        uses = [Use("ours, 50 steps", makers["ours"], 1, 50),
                Use("ours graphed, 50 steps", makers["ours"], 1, 50, graphs=True), *uses]
    # If time is short, compiling should not use up the time of those that need none; on a GPU, it is the
    # compiled ones that count.
    return sorted(uses, key=lambda use: use.compiled != CUDA)


def build(only: str, case: Case, use: Use) -> Callable[[], None]:
    """A function to measure: a training step, or the sampling of a batch. It has run three times, so that it
    is compiled and its memory is allocated."""
    attention_file.KERNEL = use.name.endswith("kernels")
    torch.manual_seed(0)
    model = use.make()
    if only == "train":
        function = training(case, model)
    else:
        function = sampling(case, model.eval(), use)
    for _ in range(3):
        function()
    return function


def network_row(only: str, case: Case, use: Use, timing: Timing, attempts: int, flops: float, rate: float,
                memory: float | None) -> Row:
    """Print and return the figures of one network. flops: FLOPs of a forward pass for one picture;
    rate: FLOP/s of a matrix product; memory: MiB."""
    passes_per_call = 3 if only == "train" else 2 * use.steps    # a step: forward, and twice that backward
    utilisation = flops * use.batch * passes_per_call / timing.seconds / rate
    noisy = timing.noise > NOISY
    impossible = utilisation > 1                 # the matrix product was slowed down more than the network
    held = ""
    if memory:
        held = f" {memory:8.0f} MiB"
    elif only == "train":
        held = "  memory not measured"
    print(f"{only:6s} {case.name:22s} {use.name:22s} " + mark(f"{1e3 * timing.seconds:9.1f} ms", noisy)
          + f" spread {timing.spread:4.0%} waited {timing.waited:4.0%}"
          + f" {use.batch / timing.seconds:9.2f} images/s "
          + mark(f"{utilisation:6.1%}", noisy or impossible) + held, flush=True)
    return {"what": only, "case": case.name, "variant": use.name, "batch": use.batch,
            "seconds": timing.seconds, "images/s": use.batch / timing.seconds, "utilisation": utilisation,
            "MiB": memory, "matrix FLOP/s": rate, "spread": timing.spread, "waited": timing.waited,
            "noisy": noisy or impossible, "rounds": timing.rounds, "attempts": attempts}


def measure_networks(only: str, index: int, uses: list[Use], flops: float, rate: float,
                     limits: Limits) -> Iterator[Row]:
    """Build the networks, measure them in turns, and release them."""
    case = CASES[index]
    functions = {}
    for use in uses:
        what = f"{only}, {case.name}, {use.name}, batch {use.batch}"
        if is_late(limits.stop, what):
            continue
        if use.compiled and now() > limits.stop - COMPILE_TIME:
            print(f"{what}: left out, because compiling it may take longer than the time left (--minutes)",
                  flush=True)
            continue
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        function = attempt(what, lambda use=use: build(only, case, use))
        if function is not None:
            functions[use.name] = function
    if not functions:
        return

    what = f"{only}, {case.name}, {', '.join(functions)}"
    peak = held = 0.0
    if CUDA:
        peak = torch.cuda.max_memory_allocated() / 2**20
        held = torch.cuda.memory_allocated()
    candidates = {name: lambda function=function: function for name, function in functions.items()}
    # Repetitions leave time for the memory, which is measured afterwards.
    until = share(limits.repeat, 2)
    least = 0.2 if CUDA else 0.5
    measured = attempt(what, lambda: measure(candidates, Limits(limits.stop, until), least))
    if measured is None or not measured.timings:
        is_late(limits.stop, what)
        return
    if CUDA and torch.cuda.memory_allocated() > held:
        print(f"{what}: holds more memory after more calls", flush=True)

    for use in uses:
        if use.name not in measured.timings:
            continue
        memory = peak if CUDA else None
        if only == "train" and not CUDA:
            memory = attempt(f"memory of {case.name}, {use.name}",
                             lambda use=use: peak_memory(index, use.name, limits.repeat))
        yield network_row(only, case, use, measured.timings[use.name], measured.attempts, flops, rate, memory)


def networks(only: str, rate: float, deadline: float) -> Iterator[Row]:
    """rate: the best rate of a matrix product so far."""
    for i, case in enumerate(CASES):
        if is_late(deadline, f"{only}, {case.name}"):
            continue
        until = share(deadline, len(CASES) - i)
        uses = uses_of(case, only)
        # On a GPU one at a time, because together they would not fit.
        groups = [[use] for use in uses] if CUDA else [uses]
        # Measured again close to the networks: clock rates and the machine's load change within minutes.
        rate = max(rate, matrix_rate())
        flops = flops_forward(case)
        for j, group in enumerate(groups):
            limits = Limits(deadline, share(until, len(groups) - j))
            yield from measure_networks(only, i, group, flops, rate, limits)
            torch._dynamo.reset()
            gc.collect()                                   # or the next one's memory includes this one's
            if CUDA:
                torch.cuda.empty_cache()


# ---- the program

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Raises ValueError with a line for the user."""
    names = ["attention", "train", "sample"]
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", type=one_of(names), default=names, metavar="WHAT",
                   help="attention, train, sample, or several of them (default: all)")
    p.add_argument("--out", type=Path, help="write every figure as JSON")
    p.add_argument("--minutes", type=number(0.1, 10_000), default=8,
                   help="end after about this time (default: 8)")
    p.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.out and (args.out.is_dir() or not args.out.absolute().parent.is_dir()):
        raise ValueError(f"--out {args.out}: must be a file in a folder that exists")
    return args


def describe_machine(rate: float) -> Row:
    """Print what the figures depend on, and return it."""
    if CUDA:
        device = torch.cuda.get_device_name()
    else:
        device = (f"{proc('/proc/cpuinfo', 'model name')} ({platform.machine()}), "
                  f"{torch.get_num_threads()} threads")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None         # Windows has none
    print(f"{device}, torch {torch.__version__}, {DTYPE}: {rate / 1e12:.3g} TFLOP/s in a matrix product")
    if load and load > 0.5:
        print(f"load average {load:.1f} on {os.cpu_count()} cores: other processes are running, or were a "
              "minute ago; measure on an idle machine")
    print(f'"?" marks figures with a spread or waiting above {NOISY:.0%}, and utilisations above 100%',
          flush=True)
    if importlib.util.find_spec("diffusers") is None:
        print("diffusers is not installed (pip install diffusers): its rows are left out", flush=True)
    return {"device": device, "torch": torch.__version__, "dtype": str(DTYPE),
            "date": time.strftime("%Y-%m-%d"), "load average": load, "matrix FLOP/s": rate}


def main(argv: list[str] | None = None) -> None:
    begun = now()
    args = parse_args(argv)
    if args.peak:
        print_peak(int(args.peak[0]), args.peak[1])
        return
    if CUDA:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.cache_size_limit = 64
    rate = matrix_rate()
    machine = describe_machine(rate)

    rows = []
    for i, only in enumerate(args.only):
        end = share(begun + 60 * args.minutes, len(args.only) - i)
        deadline = end - min(20, (end - now()) / 4)      # what is running then cannot be interrupted
        if only == "attention":
            found = attention_alone(deadline, flex_everywhere=len(args.only) == 1)
        else:
            found = networks(only, rate, deadline)
        for row in found:
            rows.append(row)
            if args.out:                                 # after every row, in case the run is interrupted
                text = json.dumps(machine | {"rows": rows}, indent=1)
                write_atomically(args.out, lambda file, text=text: file.write(text.encode()))


if __name__ == "__main__":
    sys.exit(program("speed.py", main))
