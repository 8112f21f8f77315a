"""Train a network in latent space: settings, VAE, data, latents, loop, samples. The same command resumes.

    python train.py --arch dit --objective rf               # all from scratch, ten minutes on two cores
    python train.py --arch unet --objective ddpm --prediction v --data fashion-mnist
    python train.py --arch mmdit --objective rf --data shapes --cond text      # captions instead of classes
    python train.py --arch vae --data FOLDER --image-size 128 192   # only the autoencoder

From a picture to the loss: data.py decodes it, the VAE encodes it once into cache.py's latents,
`Denoising.loss` draws a latent and a time and collects the conditions, and the path (rectified_flow.py or
ddpm.py) mixes in noise and compares the network's prediction with its target. A run lives in runs/NAME
(run.py). Without --vae, a VAE is trained first, as a run of its own that all networks on this data share.
"""

from __future__ import annotations

import argparse
import copy
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import conditioning
import settings
from cache import LatentCache, fingerprint_tensors, pieces
from conditioning import VALIDATED
from data import Dataset, batch_indices, grid, load_data, send, to_tensor, to_uint8
from published import load_weights
from run import (Plan, State, build_model, build_path, checkpoint_blocks, compile_blocks, describe,
                 fit_weights, load_checkpoint, load_vae, pack_vae, prepare, unpack_vae)
from sample import draw_batches
from settings import OBJECTIVES
from vae import VAE

SAMPLE_ROWS = 10       # rows of samples.png
PREVIEW_BATCH = 64     # pictures drawn at a time, for samples.png and previews


# ---- tasks: what is trained. A task provides the model, the loss of a batch, validation and previews

class Autoencoding:
    """The task of the VAE: reconstruct pictures through a Gaussian latent."""

    objective = None      # a VAE's checkpoint has no objective and no other VAE
    vae = None

    def __init__(self, args: argparse.Namespace, data: Dataset, val: Dataset, plan: Plan, cache_dir: Path):
        self.args = args
        self.data = data
        self.cache_dir = cache_dir
        self.device = plan.device
        self.val = to_tensor(val.images[:VALIDATED]).to(self.device)   # kept there for every validation

    def build(self) -> VAE:
        return build_model("vae", settings.vae_config(self.args, self.data.images.shape[-1]))

    def loss(self, model: VAE, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """(B,) loss, and (B,) zeros in place of times, which a VAE does not have."""
        x = to_tensor(self.data.images[indices])                       # (B, C, H, W) in [-1, 1]
        if self.args.flip:                                             # each picture independently
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
        loss, _ = model.loss(send(x, self.device), self.args.kl_weight)
        return loss, loss.new_zeros(len(x))

    def validate(self, model: VAE) -> dict:
        generator = torch.Generator(self.device).manual_seed(0)        # the same noise each time
        # In pieces, because all pictures at once may not fit into memory; each is weighted by its size.
        totals: dict[str, Tensor] = {}
        for piece in pieces((len(self.val), *self.val.shape[2:], 1)):
            loss, logs = model.loss(self.val[piece.start:piece.stop], self.args.kl_weight, generator)
            for name, value in ({"val_loss": loss.mean()} | logs).items():
                totals[name] = totals.get(name, 0) + len(piece) * value
        return {name: (total / len(self.val)).tolist() for name, total in totals.items()}

    def preview(self, model: VAE, rows: int = 0) -> Image.Image:
        """Pictures, each with its reconstruction below."""
        x = self.val[:32]                                              # 16 pictures per row
        pairs = [torch.cat([part, model.decode(model.encode(part).mean)]) for part in x.split(16)]
        return grid(to_uint8(torch.cat(pairs)), columns=min(16, len(x)))

    def finish(self, model: VAE, ema: VAE) -> None:
        """Measure the scale of the latents, once, with the averaged weights, which later runs use."""
        mean, var = encode_latents(ema, self.data, self.args.flip, self.cache_dir).statistics()
        ema.set_latent_statistics(mean, var)
        model.set_latent_statistics(mean, var)


class Denoising:
    """The task of a network in latent space: predict the path's target from a noisy latent."""

    def __init__(self, args: argparse.Namespace, data: Dataset, val: Dataset, plan: Plan, cache_dir: Path):
        self.args = args
        self.device = plan.device
        self.vae = plan.vae.to(plan.device)
        self.conditioning = plan.conditioning
        self.objective = settings.objective_config(args)
        self.path = build_path(self.objective)
        self.cache = encode_latents(self.vae, data, args.flip, cache_dir)
        # Validation uses fixed pictures, noise and times, so that its losses can be compared between steps.
        # The times are spread evenly over [0, 1]: each bucket of val_by_time holds a quarter of them.
        with torch.no_grad():
            parts = to_tensor(val.images[:VALIDATED]).split(32)        # the VAE needs much memory per picture
            self.x0 = torch.cat([self.vae.normalize(self.vae.encode(x.to(self.device)).mean) for x in parts])
        n = len(self.x0)
        generator = torch.Generator().manual_seed(0)
        self.t = ((torch.arange(n) + 0.5) / n)[torch.randperm(n, generator=generator)].to(self.device)
        self.eps = torch.randn(self.x0.shape, generator=generator).to(self.device)

    def build(self) -> torch.nn.Module:
        config = settings.network_config(self.args, self.vae.config.latent_channels, self.conditioning)
        return build_model(self.args.arch, config, self.conditioning.text)

    def loss(self, model: torch.nn.Module, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """(B,) loss and the (B,) times at which it was taken."""
        # Keep the order of the random draws (latent, dropout, rewording, time, noise): otherwise a seed would
        # mean another run, and runs that began before the change would not resume bit for bit.
        z = self.cache.batch(indices)                                  # a fresh draw from the posterior
        x0 = self.vae.normalize(send(z, self.device))                  # (B, C, h, w), mean 0 and std 1
        dropped = torch.rand(len(z)) < self.args.label_dropout         # each example independently
        cond = self.conditioning.batch(model, indices, dropped)        # y, or context, mask, pooled
        t = send(self.path.sample_t(len(x0)), self.device)
        return self.path.loss(model, x0, t=t, **cond), t

    def validate(self, model: torch.nn.Module) -> dict:
        cond = self.conditioning.validation(model)
        loss = self.path.loss(model, self.x0, t=self.t, eps=self.eps, **cond)
        # A mean over all times hides where a network fails: near noise, near data or in between.
        quarter = (self.t * 4).long()
        by_time = {}
        for i in quarter.unique().tolist():
            by_time[f"{i / 4}-{(i + 1) / 4}"] = loss[quarter == i].mean().item()
        return {"val_loss": loss.mean().item(), "val_by_time": by_time}

    def preview(self, model: torch.nn.Module, rows: int = 3) -> Image.Image:
        """Samples, with guidance 2 where the network is trained for it."""
        asked = self.conditioning.preview(model, rows)
        defaults = OBJECTIVES[self.objective["name"]]
        # Picture i is drawn with seed i in every preview, so that previews of two steps can be compared.
        images = draw_batches(model, self.vae, self.path, self.x0.shape[1:], asked, range(len(asked.turn)),
                              PREVIEW_BATCH, sampler=defaults.sampler, steps=defaults.steps,
                              scale=2.0 if self.conditioning.guidable else 1.0)
        return grid(np.concatenate(list(images)), asked.columns, captions=asked.captions)

    def finish(self, model: torch.nn.Module, ema: torch.nn.Module) -> None:
        pass                                                           # nothing is left to measure


Task = Autoencoding | Denoising


def encode_latents(vae: VAE, data: Dataset, flip: bool, cache_dir: Path) -> LatentCache:
    device = next(vae.parameters()).device

    def encode(images: np.ndarray, mirrored: bool) -> tuple[Tensor, Tensor]:
        # The picture is mirrored, not the latent: an encoder does not commute with mirroring.
        x = to_tensor(images).to(device)
        posterior = vae.encode(x.flip(-1) if mirrored else x)
        return posterior.mean, posterior.std

    # Latents depend on the encoder alone: a change of the decoder leaves the cache valid.
    encoder = {name: weight for name, weight in vae.state_dict().items()
               if name.startswith(("encoder.", "quant_conv.", "patch_encoder."))}
    height, width = data.images.shape[1:3]
    shape = (vae.config.latent_channels, height // vae.factor, width // vae.factor)
    stamp = {"vae": fingerprint_tensors(encoder), "data": data.fingerprint}
    return LatentCache(cache_dir / "latents.npy", data.images, encode, shape, stamp, flip)


# ---- the run

def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, a plateau, and a linear decay to zero over the last `cooldown` share of the steps."""
    left = (args.steps - step) / max(1.0, args.cooldown * args.steps)      # 1 where the decay begins
    return args.lr * min(1.0, (step + 1) / max(1, args.warmup), left)


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of stopping, so that the loop can finish its step."""
    received: list[int] = []
    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def new_state(args: argparse.Namespace, task: Task, plan: Plan) -> State:
    torch.manual_seed(args.seed)                       # after the caches, which are not built every time
    model = task.build().to(plan.device)
    if plan.initial is not None:
        load_weights(model, fit_weights(model, plan.initial, args.init_from), args.init_from)
        plan.initial = None                            # frees memory: these may be several GB
    # Convolutions are faster with the channels last, except in a bf16 U-Net on the CPU.
    if args.arch == "vae" or (args.arch == "unet" and plan.device.type == "cuda"):
        model = model.to(memory_format=torch.channels_last)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    # Weight decay applies to matrices only, as usual; biases and the gains of norms are not decayed.
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    # The second beta is 0.95, because 0.999 would average over more steps than a short run has. A fused
    # optimizer updates all weights in one kernel; it is not used on MPS.
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=plan.device.type != "mps", betas=(0.9, 0.95))
    # After the copy, because the averaged model is never trained and needs neither.
    if args.grad_checkpoint:
        checkpoint_blocks(model)
    if args.compile:
        compile_blocks(model)
    return State(model, ema, optimizer, plan.device)


def execute(args: argparse.Namespace, plan: Plan) -> bool:
    """One run, or the rest of it, from data to samples. False when a signal interrupted it."""
    # ---- on CUDA, products that autocast leaves in fp32 may use TF32, unless --precision is fp32
    torch.backends.cuda.matmul.allow_tf32 = args.precision != "fp32"
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"

    # ---- data, in memory or memory-mapped; its caches lie beside the VAE, for all networks on this VAE
    run = plan.run
    home = run.folder
    if plan.vae_args is not None:
        home = Path(plan.vae_args.runs_dir) / plan.vae_args.name
    cache_dir = Path(args.cache_dir) if args.cache_dir else home
    data, val = [load_data(args.data, split, tuple(args.image_size), Path(args.data_dir), cache_dir,
                           plan.words, plan.folder) for split in ("train", "val")]
    if plan.vae and plan.vae.config.image_channels != data.images.shape[-1]:
        raise ValueError(f"--vae {args.vae}: for pictures with {plan.vae.config.image_channels} channels; "
                         f"those of --data {args.data} have {data.images.shape[-1]}")

    with run.hold():                                   # from here on, no other process trains in this folder
        # ---- what the folder holds must be this run
        run.write_settings(args)
        saved = run.load()
        if saved:
            training = saved["training"]
            if training["data"] != data.identity:      # the same step would get another batch
                raise ValueError(f"--data {args.data}: changed since {run.folder} began; use another --name "
                                 "to train on the data as it is now")
            if training["finished"]:
                print(f"{run.folder} is finished: {saved['step']:,} steps")
                return True
            fingerprint = plan.conditioning.fingerprint
            if training.get("encoder", fingerprint) != fingerprint:
                raise ValueError(f"--text-encoder {args.text_encoder}: not the files that {run.folder} began "
                                 "with; give those, or use another --name")

        # ---- the task, with its caches
        if args.arch == "vae":
            task = Autoencoding(args, data, val, plan, cache_dir)
        else:
            if saved:
                plan.vae = unpack_vae(saved["vae"])        # the one that the run began with
            plan.conditioning.attach(data, val, cache_dir, resumed=saved is not None)
            task = Denoising(args, data, val, plan, cache_dir)
        return train(args, plan, task, data, saved)


def train(args: argparse.Namespace, plan: Plan, task: Task, data: Dataset, saved: dict | None) -> bool:
    """The loop, from the first or the saved step to samples.png. False when a signal interrupted it."""
    # ---- setup
    run = plan.run
    state = new_state(args, task, plan)
    model, ema, optimizer = state.model, state.ema, state.optimizer

    def save(step: int, finished: bool = False) -> None:
        run.save(checkpoint_of(args, plan, task, state, data, step, finished))

    # ---- resume: weights, optimizer and random generators; the order of the data follows from the step
    start = 0
    if saved:
        start = saved["step"]
        state.restore(saved, str(run.checkpoint))
    run.rewind_metrics(start)     # a killed run has logged steps that it never saved
    if not saved:
        save(0)                   # from now on --vae and --init-from are no longer needed
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{run.folder}: {args.arch} with {millions:.1f} M parameters on {len(data):,} pictures; "
          f"{plan.device.type}, {plan.number_format}; step {start:,} of {args.steps:,}", flush=True)

    # ---- the loop
    unread: list[Tensor] = []     # (4,) per step: loss, gradient norm, min and max time; see read_losses
    with signals() as stop:       # a list that is empty until SIGINT or SIGTERM
        bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=args.name, unit="step",
                   mininterval=0.5)
        for step in bar:
            # -- the gradient of one batch, in `accumulate` pieces, each of which needs a share of the memory
            rate = learning_rate(step, args)
            for group in optimizer.param_groups:
                group["lr"] = rate
            model.train()
            losses, times = [], []
            batch = batch_indices(len(data), args.batch_size, step, args.seed)   # a pure function of the step
            for indices in np.split(batch, args.accumulate):
                with plan.autocast():
                    loss, t = task.loss(model, indices)
                (loss.mean() / args.accumulate).backward()      # outside autocast, as PyTorch recommends
                losses.append(loss.detach().mean())             # stays on the device: nothing waits for it
                times.append(t)

            # -- one optimizer step; weights change fast at first, so they are then averaged over few steps
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)   # the norm before clipping
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.average(decay=min(args.ema, (step + 1) / (step + 10)))
            times = torch.cat(times)
            unread.append(torch.stack([torch.stack(losses).mean(), norm, times.min(), times.max()]))

            # -- log, also before each checkpoint, so that weights that are not finite are never saved
            done = step + 1
            last = done == args.steps or bool(stop)             # validate, preview and save now
            validates = last or done % args.val_every == 0
            previews = last or done % args.preview_every == 0
            saves = last or done % args.save_every == 0
            if done % args.log_every == 0 or validates or previews or saves:
                entry = {"step": done, **read_losses(unread, done, plan), "lr": rate}
                bar.set_postfix(loss=f"{entry['loss']:.4f}")
                run.record(entry)

            # -- validate and preview: the averaged weights and, to compare by eye, the raw ones
            model.eval()
            with torch.no_grad(), plan.autocast():
                if validates:
                    run.record({"step": done, **task.validate(ema)})
                    bar.write(describe(run.records[-1]))
                if previews and not stop:              # an interrupted run should end soon
                    for name, network in (("ema", ema), ("raw", model)):
                        run.save_picture(f"preview-{done:06d}-{name}.png", task.preview(network))
                    run.plot_loss()

            # -- save
            if saves:
                save(done)
            if stop:
                bar.close()
                print(f"stopped at step {done:,} of {args.steps:,}, saved; the same command continues",
                      flush=True)
                return False

    # ---- finish: samples from the averaged weights, in fp32, which any machine reproduces
    task.finish(model, ema)
    with torch.no_grad():
        run.save_picture("samples.png", task.preview(ema, rows=SAMPLE_ROWS))
    run.plot_loss()
    save(args.steps, finished=True)
    return True


def checkpoint_of(args: argparse.Namespace, plan: Plan, task: Task, state: State, data: Dataset, step: int,
                  finished: bool) -> dict:
    """Everything that sample.py needs and, under "training", what a resumed run needs in addition."""
    conditions = plan.conditioning.stored()
    data_entry = {"source": args.data, "size": args.image_size} | conditions.pop("data")
    # the identities of the data and of a frozen encoder's outputs: neither may change on resume
    training = {"data": data.identity, "encoder": plan.conditioning.fingerprint, "finished": finished}
    return {"arch": args.arch, "config": asdict(state.model.config), "objective": task.objective,
            "step": step, "data": data_entry, **conditions, "vae": pack_vae(task.vae) if task.vae else None,
            **state.weights(), "training": training | state.training()}


def read_losses(unread: list[Tensor], done: int, plan: Plan) -> dict[str, float]:
    """Return the mean loss and gradient norm of `unread`, whose last step is `done`, and empty it. This makes
    the CPU wait for the GPU, so the loop does it only now and then. Raises FloatingPointError if one of them
    is not finite."""
    values = torch.stack(unread).tolist()
    unread.clear()
    for step, (loss, norm, low, high) in enumerate(values, done + 1 - len(values)):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            remedy = "a lower --lr or --precision fp32" if plan.bf16 else "a lower --lr"
            raise FloatingPointError(
                f"loss {loss} with gradient norm {norm} at step {step}, times {low:.3f} to {high:.3f}, "
                f"{plan.number_format}: stopped. {plan.run.checkpoint} holds the last good weights; begin "
                f"another --name with {remedy}")
    return {"loss": sum(row[0] for row in values) / len(values),
            "grad_norm": sum(row[1] for row in values) / len(values)}


def main(argv: list[str] | None = None) -> None:
    started = time.time()
    args = settings.parse(argv)
    plan = prepare(args)
    # The VAE comes first: a run of its own, as a rule on the same pictures without their captions.
    if plan.vae_args is not None:
        pictures = None                            # a VAE begun with --cond text lists them with captions
        if plan.folder and plan.vae_args.cond != "text":
            pictures = plan.folder._replace(words=None)
        if not execute(plan.vae_args, prepare(plan.vae_args, pictures)):
            return
        plan.vae = load_vae(Path(plan.vae_args.runs_dir) / plan.vae_args.name)
    if not execute(args, plan):
        return

    # Print where the results are, and a command that draws more samples.
    folder = plan.run.folder
    minutes = (time.time() - started) / 60
    print(f"{folder / 'samples.png'}, {folder / 'loss.png'} after {minutes:.1f} minutes")
    if args.arch != "vae":                       # a VAE draws nothing by itself
        defaults = OBJECTIVES[args.objective]
        finished = conditioning.of_checkpoint(load_checkpoint(folder), plan.device)
        guidance = " --cfg 2" if finished.guidable else ""
        print(f"more: python sample.py {folder}{finished.hint()} --n 64 --sampler {defaults.sampler} "
              f"--steps {defaults.steps}{guidance} --seed 0 --out grid.png")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:                    # outside the loop; inside it, the step is finished and saved
        print("train.py: interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)
