"""How many pictures a second tar shards give, by the number of worker processes, against what a training
needs; and the memory that a folder of many pictures takes.

    python benchmarks/loading.py                          # JPEGs of 256 x 256, in a temporary folder
    python benchmarks/loading.py --workers 0 4 16 --pictures 8192 --tflops 400
    python benchmarks/loading.py --folder 200000          # bytes of memory a picture, by what is done

What a network needs follows from its floating-point operations: XL/2 at 256 x 256 takes 118.6 GMACs forward,
as Peebles and Xie 2022 (arXiv:2212.09748, table 9) count them, and three times that with the backward pass.
On latents, a training needs those; on pictures, only the VAE's training and the encoding read at all.
A folder's memory is that of Python and NumPy, by tracemalloc, which makes it several times slower, and the
process's largest, by the system, without tracemalloc. Memory-mapped files are not counted.
"""

import argparse
import gc
import io
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import shards
from cli import Parser, integer, number, program
from data import load_folder
from decoded import open_pictures
from folder import list_folder

STEP_FLOPS = 3 * 2 * 118.6e9         # of XL/2 for one picture: forward and backward


def write(folder: Path, pictures: int, per_shard: int, side: int) -> None:
    """Shards of JPEGs of smooth noise, about as large as photographs of that size, and shards of latents."""
    rng = np.random.default_rng(0)
    raws = []
    for _ in range(64):              # a few pictures, many times: decoding takes as long
        coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        out = io.BytesIO()
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        raws.append(out.getvalue())
    latent = shards.npy_bytes(rng.standard_normal((1, 2, 4, side // 8, side // 8)).astype(np.float16))
    for name, ending, contents in (("pictures", "jpg", raws), ("latents", "npy", [latent])):
        (folder / name).mkdir()
        for start in range(0, pictures, per_shard):
            members = ((f"{i:08d}", {ending: contents[i % len(contents)], "cls": str(i % 1000).encode()})
                       for i in range(start, min(start + per_shard, pictures)))
            shards.write_shard(folder / name / f"{start // per_shard:05d}.tar", members)
    print(f"{len(raws[0]) / 1024:.0f} KiB a picture, {len(latent) / 1024:.0f} KiB a latent")


def rate(reader, order: shards.ShardOrder, steps: int) -> float:
    """Examples a second over this many batches; the first one, which waits for the processes, is not
    counted."""
    reader.expect(map(order, range(steps + 1)))
    read = reader.batch if isinstance(reader, shards.ShardLatents) else reader.__getitem__
    read(order(0))
    began = time.perf_counter()
    for step in range(1, steps + 1):
        read(order(step))
    seconds = time.perf_counter() - began
    reader.expect(())
    return steps * order.batch_size / seconds


def write_folder(folder: Path, pictures: int) -> None:
    """Many names, in class folders of at most 10,000, of one tiny picture; every tenth class has a copy of
    its own, as a file has at most 65,000 names."""
    out = io.BytesIO()
    Image.new("RGB", (2, 2), (255, 0, 0)).save(out, "PNG")
    for i in range(pictures):
        if i % 10_000 == 0:
            name = folder / f"n{i // 10_000:08d}"
            name.mkdir()
        if i % 50_000 == 0:
            original = name / "picture.png"
            original.write_bytes(out.getvalue())
        else:
            os.link(original, name / f"n{i // 10_000:08d}_{i:08d}.png")        # as those of ImageNet


def measure_folder(folder: Path, cache: Path, traced: bool) -> None:
    """Print how many bytes a picture each step takes at its peak and at its end, or how long it takes."""
    held: dict[str, object] = {}

    def listed() -> None:
        held["folder"] = list_folder(folder)

    def opened(multiple: tuple[int, int] | None = None) -> None:
        held["pictures"] = open_pictures(held["folder"], (2, 2), cache, multiple=multiple)

    def loaded() -> None:
        held["pictures"] = load_folder(held["folder"], "train", (2, 2), cache)

    steps = {"list": listed, "decode": opened, "compare": opened, "load": loaded,
             "decode, --aspect": lambda: opened((1, 1)), "compare, --aspect": lambda: opened((1, 1))}
    with tempfile.TemporaryDirectory() as temporary:       # what is loaded once does not count
        write_folder(Path(temporary), 3)
        load_folder(list_folder(Path(temporary)), "train", (2, 2), Path(temporary) / "cache")
    if traced:
        sys.intern = lambda text: text      # a table of a few MiB, in which the parts of paths come and go
        tracemalloc.start()
    for name, step in steps.items():
        held.pop("pictures", None)
        gc.collect()
        tracemalloc.reset_peak()
        began = time.perf_counter()
        step()
        seconds = time.perf_counter() - began
        now, peak = tracemalloc.get_traced_memory()
        count = len(held["folder"].pictures)
        if traced:
            print(f"{name}: {peak / count:.0f} bytes a picture at its peak, {now / count:.0f} at rest",
                  flush=True)
        else:
            print(f"{name}: {count / seconds:,.0f} pictures a second", flush=True)
    if not traced and sys.platform == "linux":
        import resource
        print(f"largest memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB, of "
              "which the program, PyTorch included, and the memory-mapped files are a part")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=integer(1), default=2048)
    parser.add_argument("--per-shard", type=integer(1), default=256)
    parser.add_argument("--side", type=integer(1), default=256)
    parser.add_argument("--batch-size", type=integer(1), default=64)
    parser.add_argument("--steps", type=integer(1), default=16)
    parser.add_argument("--workers", type=integer(0, 512), nargs="+", default=[0, 1, 2])
    parser.add_argument("--tflops", type=number(0, 1e6, above=True), default=400.0,
                        help="what the GPU reaches in bf16")
    parser.add_argument("--folder", type=integer(1), metavar="N",
                        help="measure a folder of N pictures instead")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure_folder(Path(args.measure[0]), Path(args.measure[1]), args.measure[2] == "traced")
    if args.folder:
        with tempfile.TemporaryDirectory() as temporary:
            pictures = Path(temporary) / "pictures"
            pictures.mkdir()
            write_folder(pictures, args.folder)
            for how in ("traced", "timed"):        # each in a process of its own, with a cache of its own
                subprocess.run([sys.executable, __file__, "--measure", str(pictures),
                                str(Path(temporary) / how), how], check=True)
        return None
    need = args.tflops * 1e12 / STEP_FLOPS * (256 / args.side) ** 2
    print(f"XL/2 at {args.side} x {args.side} on a GPU that reaches {args.tflops:g} TFLOPS trains on at most "
          f"{need:,.0f} examples a second")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder, args.pictures, args.per_shard, args.side)
        manifest = {"flips": 1, "shape": [4, args.side // 8, args.side // 8]}
        for name in ("pictures", "latents"):
            found = shards.find_shards(str(folder / name))
            began = time.perf_counter()
            index = shards.open_index(found, folder / f"{name}-index")
            print(f"{name}: {len(index) / (time.perf_counter() - began):,.0f} samples a second indexed, once")
            rows = shards.TrainingRows(len(index), shards.validation_samples(len(index)))
            order = shards.ShardOrder(rows.per_shard(index), args.batch_size, seed=0)
            for workers in args.workers:
                reader = shards.ShardLatents(index, manifest, rows, flip=False, workers=workers)
                if name == "pictures":
                    reader = shards.ShardPictures(index, (args.side, args.side), rows, workers=workers)
                print(f"{name}, {workers} workers: {rate(reader, order, args.steps):,.0f} a second",
                      flush=True)


if __name__ == "__main__":
    sys.exit(program("loading.py", main))
