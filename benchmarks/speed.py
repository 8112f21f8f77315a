"""Measure attention, a training step and guided sampling, against PyTorch's own kernels and diffusers.

    python benchmarks/speed.py --out speed.json          (from the repository's root; diffusers is optional)
    python benchmarks/speed.py --only attention          (or train, sample)

All candidates run in one process and take turns for several rounds; a figure is the median over the rounds
(on a GPU, one network after another, because together they would not fit). Networks run under bf16 autocast
if the hardware has bf16, as in train.py, else in float32. On a GPU they are the published DiT presets and
Stable Diffusion's U-Net; on a CPU, sizes that finish in five minutes. diffusers' models have the same shape,
run in the same loop, and are compiled block by block like ours (its DiT embeds time and class in every block,
ours only once).

A multiplication and an addition count as two FLOPs. Attention takes 4 B heads N^2 head_dim forward, and 2.5
times that backward. A network's forward pass is counted by torch's FlopCounterMode with attention written out
(for a DiT block of width D and N tokens: 24 N D^2 + 4 N^2 D + 12 D^2; 0.24 TFLOP for XL/2 at N = 256); a
training step is three of them. "Utilisation" is FLOPs over time, as a share of the rate of a large matrix
product on this machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import attention as attention_file
import dit
import unet
from rectified_flow import RectifiedFlow
from run import compile_blocks, graphed
from samplers import SAMPLERS, guided
from settings import has_bf16

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if has_bf16(DEVICE) else torch.float32
Row = dict[str, object]


# ---- measuring

def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds(functions: dict[str, Callable], rounds: int = 7, least: float = 0.2) -> dict[str, float]:
    """Seconds per call of each function. They take turns, each for at least `least` seconds per round."""
    repeats = {}
    times = {name: [] for name in functions}
    for name, function in functions.items():
        for _ in range(3):
            function()
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        repeats[name] = max(1, round(least / (time.perf_counter() - start)))
    for _ in range(rounds):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            synchronize()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(part) for name, part in times.items()}


def proc(file: str, name: str) -> str:
    """The first value of that name in a file of Linux's /proc; "0" elsewhere."""
    path = Path(file)
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "0")


def is_late(deadline: float, what: str) -> bool:
    late = time.monotonic() > deadline
    if late:
        print(f"{what}: left out, because the time is up (--minutes)", flush=True)
    return late


def matrix_rate() -> float:
    """FLOP/s of a large matrix product, as the peak rate of this device."""
    n = 8192 if CUDA else 2048
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=DTYPE)
    return 2 * n**3 / seconds({"": lambda: a @ b}, least=0.05)[""]


# ---- attention alone

def attempt(make: Callable) -> Callable | None:
    """The function that `make` returns, or None if it fails, as when a backend does not take these inputs."""
    try:
        function = make()
        function()
        synchronize()
        return function
    except Exception as error:                           # Triton and each backend raise their own types
        if CUDA:
            torch.cuda.empty_cache()
        print(f"  (left out: {type(error).__name__}: {str(error)[:90]!r})", file=sys.stderr)
        return None


def measure(calls: dict[str, Callable], inputs: list[torch.Tensor], flops: float) -> Row:
    """Seconds and TFLOP/s of each call on these inputs: forward, backward, and both."""
    row = {}
    for way in ("forward", "both"):
        functions = {}
        for name, call in calls.items():
            def once(call=call):
                if way == "forward":
                    with torch.no_grad():
                        return call(*inputs)
                return torch.autograd.grad(call(*inputs), inputs, inputs[0])
            functions[name] = attempt(lambda once=once: once)
        for name, took in seconds({n: f for n, f in functions.items() if f}, least=0.02).items():
            row[f"{name} {way}"] = took
    for name in calls:
        if f"{name} both" in row:
            row[f"{name} backward"] = row[f"{name} both"] - row[f"{name} forward"]
    work = {"forward": flops, "backward": 2.5 * flops, "both": 3.5 * flops}
    return row | {f"{name} TFLOP/s": work[name.split()[-1]] / took / 1e12 for name, took in row.items()}


def sdpa(backend: SDPBackend) -> Callable:
    def call(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)
    return call


def attention_alone(deadline: float, flex_everywhere: bool) -> Iterator[Row]:
    for dim in (64, 128) if CUDA else (64,):
        for n in (256, 512, 1024, 4096, 16384) if CUDA else (16, 64, 256, 1024):
            if is_late(deadline, f"attention at N {n}, head_dim {dim}"):
                continue
            heads, batch = (16, max(1, 65536 // n)) if CUDA else (4, max(1, 1024 // n))
            shape = (batch, n, heads, dim)               # the memory layout of a projection's output
            q, k, v = (torch.randn(shape, device=DEVICE, dtype=DTYPE).transpose(1, 2).requires_grad_()
                       for _ in "qkv")
            calls = {backend.name.split("_")[0].lower(): sdpa(backend) for backend in (
                SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)}
            if n <= 4096:
                calls["math"] = sdpa(SDPBackend.MATH)
            if CUDA:
                from torch.nn.attention.flex_attention import flex_attention
                if flex_everywhere or n in (1024, 4096):     # each size takes seconds to compile
                    calls["flex"] = torch.compile(flex_attention, dynamic=False)
                if attention_file.triton:
                    calls["ours"] = attention_file.fused_attention
            else:
                calls = {"flash": calls["flash"], "math": calls["math"], "ours": attention_file.attention}
            row = {"what": "attention", "N": n, "head_dim": dim, "batch": batch, "heads": heads}
            row |= measure(calls, [q, k, v], 4 * batch * heads * n * n * dim)

            weights = [torch.rand(dim, device=DEVICE, requires_grad=True) for _ in "qk"]
            angles = torch.randn(n, dim // 2, device=DEVICE)
            rope = angles.cos(), angles.sin()
            best = min((name for name in calls if name != "ours" and f"{name} both" in row),
                       key=lambda name: row[f"{name} both"])

            @torch.compile(dynamic=False)
            def prepare(q, k, q_norm, k_norm):
                q, k = attention_file.rms_norm(q, q_norm), attention_file.rms_norm(k, k_norm)
                return attention_file.rotate(q, rope), attention_file.rotate(k, rope)

            def apart(q, k, v, q_norm, k_norm):
                return calls[best](*prepare(q, k, q_norm, k_norm), v)

            def ours(q, k, v, q_norm, k_norm):
                call = attention_file.fused_attention if CUDA else attention_file.attention
                return call(q, k, v, q_norm=q_norm, k_norm=k_norm, rope=rope)

            fused = measure({"apart": apart} | ({"ours": ours} if "ours" in calls else {}),
                            [q, k, v, *weights], 4 * batch * heads * n * n * dim)
            yield row | {f"norm+rope, {name}": value for name, value in fused.items()} | {"best": best}
            print(f"N {n:5d} d {dim:3d}  forward, backward in ms:  {in_ms(row, calls)}\n"
                  f"       with norm and rope:  {in_ms(fused, ('apart', 'ours'))}", flush=True)


def in_ms(row: Row, names: Iterable[str]) -> str:
    return "  ".join(f"{name} {1e3 * row[f'{name} forward']:.3f}, {1e3 * row[f'{name} backward']:.3f}"
                     for name in names if f"{name} backward" in row)


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
CASES = [
    Case("DiT-XL/2, 256 tokens", "dit", dit.PRESETS["XL/2"] | DIT, 32, 256),
    Case("modern XL/2, 256 tokens", "dit", dit.PRESETS["XL/2"] | {"num_classes": 1000}, 32, 128),
    Case("U-Net of SD 1, 64 x 64", "unet", SD1, 64, 32),
    *(Case(f"DiT-{name}, {(side // 2) ** 2} tokens", "dit", dit.PRESETS[name] | DIT, side, batch)
      for name, side, batch in (("XL/2", 64, 64), ("B/2", 32, 256), ("S/2", 32, 256), ("B/2", 64, 64),
                                ("S/2", 64, 64)))] if CUDA else [
    Case("DiT small, 16 tokens", "dit", dit.PRESETS["small"] | DIT | {"patch": (2, 2)}, 8, 64),
    Case("U-Net small, 8 x 8", "unet", SMALL, 8, 32)]


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
            compile_blocks(model)
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
        made["ours compiled, kernels"] = lambda: ours(True)      # `networks` selects them instead of SDPA
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


def sampling(case: Case, model: torch.nn.Module, batch: int, steps: int, graphs: bool) -> Callable[[], None]:
    """Guided Euler sampling, both branches in one batch. graphs: as sample.py --compile does on a GPU."""
    path = RectifiedFlow()
    xt, _, cond = inputs(case, batch)
    uncond = {"y": torch.full_like(cond["y"], 1000)} if "y" in cond else {"context": 0 * cond["context"]}
    denoise = guided(graphed(model) if graphs else model, path, cond, uncond, 4.0)

    @torch.no_grad()
    def draw():
        with autocast():
            SAMPLERS["euler"](denoise, path, xt, path.times(steps))
    return draw


def flops_forward(case: Case) -> float:
    """FLOPs of a forward pass for one picture."""
    cls, config = (dit.DiT, dit.DiTConfig) if case.arch == "dit" else (unet.UNet, unet.UNetConfig)
    xt, t, cond = (part if isinstance(part, dict) else part.to("meta") for part in inputs(case, 1))
    with torch.device("meta"), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        cls(config(**case.config))(xt, t, **{name: part.to("meta") for name, part in cond.items()})
    return counter.get_total_flops()


def peak(index: int, name: str) -> None:
    """Print the peak memory, in MiB, of this process after three training steps; `networks` runs it in a new
    process on a CPU. VmHWM is the peak of this process alone; getrusage's may begin at that of its parent."""
    step = training(CASES[index], variants(CASES[index])[name]())
    for _ in range(3):
        step()
    print("peak", int(proc("/proc/self/status", "VmHWM").split()[0]) / 1024)


def networks(only: str, rate: float, deadline: float) -> Iterator[Row]:
    for index, case in enumerate(CASES):
        flops = flops_forward(case)
        makers = variants(case)
        if only == "train":
            batch = batch_of(case)
        else:
            batch = 16 if CUDA else 4
        uses = {name: (make, batch, 20, False) for name, make in makers.items()}
        if CUDA and only == "sample" and case.name == "DiT-XL/2, 256 tokens":
            uses = {"ours, 50 steps": (makers["ours"], 1, 50, False),
                    "ours graphed, 50 steps": (makers["ours"], 1, 50, True)} | uses
        functions, memory, took = {}, {}, {}
        for name, (make, pictures, steps, graphs) in uses.items():
            if is_late(deadline, f"{only}, {case.name}, {name}"):
                continue
            attention_file.KERNEL = name.endswith("kernels")
            torch.manual_seed(0)
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            try:
                model = make()
                functions[name] = (training(case, model) if only == "train" else
                                   sampling(case, model.eval(), pictures, steps, graphs))
                for _ in range(3):
                    functions[name]()
                if CUDA:                                 # one at a time: together they would not fit
                    memory[name] = torch.cuda.max_memory_allocated() / 2**20
                    held = torch.cuda.memory_allocated()
                    took |= seconds({name: functions[name]}, rounds=5)
                    if torch.cuda.memory_allocated() > held:
                        print(f"{case.name}, {name}: holds more memory after more calls", flush=True)
            except Exception as error:                   # leave this one out and go on with the others
                functions.pop(name, None)
                print(f"{only}, {case.name}, {name}, batch {pictures}: left out, {type(error).__name__}: "
                      f"{str(error)[:120]!r}", flush=True)
            if CUDA:
                model = None
                functions.clear()
                torch._dynamo.reset()
                torch.cuda.empty_cache()
            elif only == "train" and name in functions:
                done = subprocess.run([sys.executable, __file__, "--peak", str(index), name],
                                      capture_output=True, text=True, check=True)
                memory[name] = float(done.stdout.split("peak")[-1])
        took = took or seconds(functions, rounds=5, least=0.5)
        torch._dynamo.reset()
        for name, each in took.items():
            _, pictures, steps, _ = uses[name]
            used = flops * pictures * (3 if only == "train" else 2 * steps) / each / rate
            yield {"what": only, "case": case.name, "variant": name, "batch": pictures, "seconds": each,
                   "images/s": pictures / each, "utilisation": used, "MiB": memory.get(name)}
            print(f"{only:6s} {case.name:22s} {name:22s} {1e3 * each:9.1f} ms {pictures / each:9.2f} images/s"
                  f" {used:6.1%} " + (f"{memory[name]:8.0f} MiB" if name in memory else ""), flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=("attention", "train", "sample"),
                   default=["attention", "train", "sample"])
    p.add_argument("--out", type=Path, help="write every figure as JSON")
    p.add_argument("--minutes", type=float, default=8, help="begin nothing new after this time (default: 8)")
    p.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.peak:
        peak(int(args.peak[0]), args.peak[1])
        return
    if CUDA:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = torch.cuda.get_device_name() if CUDA else (
        f"{proc('/proc/cpuinfo', 'model name')} ({platform.machine()}), {torch.get_num_threads()} threads")
    rate = matrix_rate()
    print(f"{device}, torch {torch.__version__}, {DTYPE}: {rate / 1e12:.3g} TFLOP/s in a matrix product",
          flush=True)
    if importlib.util.find_spec("diffusers") is None:
        print("diffusers is not installed (pip install diffusers): its rows are left out", flush=True)
    begun = time.monotonic()
    rows = []
    torch._dynamo.config.cache_size_limit = 64
    for i, only in enumerate(args.only, 1):
        deadline = begun + 60 * args.minutes * i / len(args.only) - 20
        if only == "attention":
            found = attention_alone(deadline, flex_everywhere=len(args.only) == 1)
        else:
            found = networks(only, rate, deadline)
        for row in found:
            rows.append(row)
            if args.out:                                 # after every row, in case the run is cut short
                args.out.write_text(json.dumps({
                    "device": device, "torch": torch.__version__, "dtype": str(DTYPE),
                    "date": time.strftime("%Y-%m-%d"), "matrix FLOP/s": rate, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
