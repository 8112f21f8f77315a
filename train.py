"""Train a network in latent space: settings, VAE, data, latents, loop, samples. The same command resumes.

    python train.py --arch dit --objective rf               # all from scratch, ten minutes on two cores
    python train.py --arch unet --objective ddpm --prediction v --data fashion-mnist
    python train.py --arch mmdit --objective rf --data shapes --cond text      # captions instead of classes
    python train.py --arch vae --data FOLDER --image-size 128 192   # only the autoencoder

From a picture to the loss: data.py decodes it, the VAE encodes it once into cache.py's latents,
`Denoising.loss` (tasks.py) draws a latent and a time and collects the conditions, and the path
(rectified_flow.py or ddpm.py) mixes in noise and compares the network's prediction with its target. A run
lives in runs/NAME (run.py). Without --vae, a VAE is trained first, as a run of its own that all networks on
this data share.
"""

from __future__ import annotations

import cli

cli.quiet_imports(__name__)             # before those that take seconds

import argparse
import copy
import math
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import conditioning
import ema
import machine
import settings
from checkpoints import load_checkpoint, load_vae
from cli import program, signals
from data import Dataset, load_data
from deferred import deferred
from mixed import MixedAutoencoding, MixedDenoising
from networks import checkpoint_blocks, compile_blocks, pack_vae, unpack_vae
from parallel import Sharding, replicate, synchronised
from plan import Plan, data_changed, fit_weights, prepare
from ranks import Ranks, launched
from run import Run, describe
from settings import ARCHITECTURES, BLOCKS, CHANGEABLE, OBJECTIVES
from state import State
from tasks import Autoencoding, Denoising, Interrupted, Task
from weights import load_weights

SAMPLE_ROWS = 10       # rows of samples.png


def learning_rate(step: int, args: argparse.Namespace, rise: int = 0) -> float:
    """Linear warm-up from step `rise`, a plateau, and a linear decay to zero over the last `cooldown` share
    of the steps."""
    left = (args.steps - step) / max(1.0, args.cooldown * args.steps)      # 1 where the decay begins
    return args.lr * min(1.0, (step + 1 - rise) / max(1, args.warmup), left)


def changes(args: argparse.Namespace, run: Run, saved: dict) -> tuple[list[str], int]:
    """What a run that goes on does otherwise than before, in words, and the step from which its learning rate
    warms up."""
    begun = run.read_settings()
    begun["steps"] = saved["training"].get("steps", begun["steps"])
    step, rise = saved["step"], saved["training"].get("rise", 0)
    words = []
    for name in CHANGEABLE:
        if getattr(args, name) != begun[name]:
            words.append(f"--{name.replace('_', '-')} {getattr(args, name)} from step {step:,} on, before "
                         f"{begun[name]}")
    if args.steps != begun["steps"]:
        # Up to its plateau, a run of any length has the same rates, so the steps so far are those of the
        # longer run; once they fall, they are not.
        shorter = argparse.Namespace(**vars(args) | {"steps": begun["steps"]})
        if learning_rate(step - 1, shorter, rise) == learning_rate(step - 1, args, rise):
            exactly = "exactly"
            if rise > 0 or len(words) > 1:             # it rose anew before, or more than --steps changes
                exactly = "not exactly"
            words.append(f"the learning rate had not begun to fall; this is {exactly} a run of that length")
        else:
            rise = step
            words.append(f"the learning rate had begun to fall; it rises again{how_far(args, rise)}; this is "
                         "not exactly a run of that length")
    return words, rise


def how_far(args: argparse.Namespace, rise: int) -> str:
    """How soon and how far the learning rate rises from step `rise` on."""
    # After the warm-up it can only fall.
    rates = [learning_rate(step, args, rise) for step in range(rise, min(args.steps, rise + args.warmup + 1))]
    highest = max(rates) / args.lr
    if highest == 1:
        return f" within {args.warmup:,} steps"
    words = (f" to at most {min(highest, 0.99):.2g} of --lr, as it falls over the last {args.cooldown:g} of "
             "all steps")
    if args.cooldown < 1:
        # the fewest steps with which the fall does not begin before the warm-up ends
        full = math.ceil((rise + max(1, args.warmup) - 1) / (1 - args.cooldown))
        words += f"; for the full rate give --steps {full}"
    return words


def new_state(args: argparse.Namespace, task: Task, plan: Plan) -> State:
    """The network with its initial weights, on its device, with averages and optimizer."""
    torch.manual_seed(args.seed)       # only here: making the caches draws numbers, and is not always needed
    # A VAE is small, and some of its first weights are computed from others, so it is built whole.
    if args.shard and args.arch != "vae":
        model, initial = deferred(task.build)
    else:
        model = task.build()
        initial = None
    if plan.initial is not None:
        state = fit_weights(model, plan.initial, args.init_from, plan.initial_classes,
                            plan.conditioning.classes, initial)
        if initial is None:
            load_weights(model, state, args.init_from)
        else:
            initial = state                            # read when the model is cut
        plan.initial = None                            # frees memory: these may be several GB
    if not args.shard:
        model = model.to(plan.device)
        # Convolutions are faster with the channels last, except in a bf16 U-Net on the CPU.
        if args.arch == "vae" or (args.arch == "unet" and plan.device.type == "cuda"):
            model = model.to(memory_format=torch.channels_last)
    averages = {length: copy.deepcopy(model).eval().requires_grad_(False)
                for length in ema.widths_kept(args.ema)}
    # After the copies, because an averaged model is never trained and needs neither.
    if args.grad_checkpoint:
        checkpoint_blocks(model)
    if args.compile:
        # attention's own kernels, but only in trainings of the kind that has been run on a GPU
        compile_blocks(model, kernels=not (args.shard or args.aspect or args.grad_checkpoint))
        print("--compile: the first step compiles the network, which can take minutes", flush=True)
    state = State(model, averages, plan.device)
    if args.shard:
        state.shard(Sharding(plan.ranks.size, plan.ranks.tensor, plan.device, BLOCKS,
                             ARCHITECTURES[args.arch].blocks, plan.bf16 and args.arch != "vae",
                             plan.ranks.patience), initial, experts=args.expert_parallel)
    elif plan.ranks.size > 1:
        state.steps[model] = replicate(model)
    # The second beta is 0.95, because 0.999 would average over more steps than a short run has. A fused
    # optimizer updates all weights in one kernel; it is not used on MPS.
    state.optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.lr,
                                        fused=plan.device.type != "mps", betas=(0.9, 0.95))
    return state


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay applies to matrices only, as usual; biases and the gains of norms are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def execute(args: argparse.Namespace, plan: Plan, network_follows: bool = False) -> int:
    """One run, or the rest of it, from data to samples. Returns an exit status: 0, or 128 + N after signal
    N. network_follows: whether it is the VAE of a network that the same command trains next."""
    # ---- on CUDA, products that autocast leaves in fp32 may use TF32, unless --precision is fp32
    torch.backends.cuda.matmul.allow_tf32 = args.precision != "fp32"
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"

    # ---- data, in memory or memory-mapped; its caches lie beside the VAE, for all networks on this VAE
    run, cache_dir, ranks = plan.run, plan.cache_dir, plan.ranks
    if ranks.size > 1:
        print(f"{ranks.size} processes: the first makes the caches that are missing while the others wait",
              flush=True)
    with ranks.in_turn():
        data, val = [load_data(args.data, split, tuple(args.image_size), Path(args.data_dir), cache_dir,
                               plan.words, plan.folder, crop=args.crop, multiple=plan.multiple,
                               rate=args.rate)
                     for split in ("train", "val")]
    if plan.vae and args.rate is None and plan.vae.config.image_channels != data.images.shape[-1]:
        raise ValueError(f"--vae {args.vae}: for pictures with {plan.vae.config.image_channels} channels; "
                         f"those of --data {args.data} have {data.images.shape[-1]}")

    with run.hold():                                   # from here on, no other process trains in this folder
        # ---- what the folder holds must be this run, in all processes; else nothing is written
        saved = run.load()
        ranks.agree({"the data": data.identity, "the step saved": saved["step"] if saved else None}
                    | {f"--{name.replace('_', '-')}": getattr(args, name) for name in settings.ROWS},
                    "start all processes with the same command, on the same folders")
        if not run.settings.is_file():
            run.write_settings(args)
        if saved:
            training = saved["training"]
            if training["data"] not in (data.identity, *data.former_identities):
                raise ValueError(data_changed(args, run, training["finished"]))   # other batches would follow
            if training["finished"] and saved["step"] >= args.steps:
                print(f"{run.folder} is finished: {saved['step']:,} steps")
                return 0
            fingerprint = plan.conditioning.fingerprint
            if training.get("encoder", fingerprint) != fingerprint:
                raise ValueError(f"--text-encoder {args.text_encoder}: not the files that {run.folder} began "
                                 "with; give those, or use another --name")

        # ---- the task, with its caches
        if args.arch == "vae":
            kind = MixedAutoencoding if args.aspect else Autoencoding
            rest = "and then the scale of its latents"
        else:
            if saved:
                plan.vae = unpack_vae(saved["vae"])        # the one that the run began with
            with ranks.in_turn():                          # captions are encoded once
                plan.conditioning.attach(data, val, cache_dir, resumed=saved is not None)
            plan.conditioning.attach_lengths(data, val)
            kind = MixedDenoising if args.aspect else Denoising
            rest = "and then the samples"
        if network_follows:
            rest += "; the network follows"
        return train(args, plan, kind(args, data, val, plan, cache_dir), data, saved, rest)


def train(args: argparse.Namespace, plan: Plan, task: Task, data: Dataset, saved: dict | None,
          rest: str) -> int:
    """The loop, from the first or the saved step to samples.png. rest: what follows the last step, in words.
    Returns the exit status, as execute."""
    # ---- setup
    run = plan.run
    state = new_state(args, task, plan)

    # ---- resume: weights, optimizer and random generators; the order of the data follows from the step
    resumed = saved is not None
    start = saved["step"] if resumed else 0
    changed, rise = changes(args, run, saved) if resumed else ([], 0)
    if resumed:
        state.restore(saved, str(run.checkpoint))
        saved.clear()             # frees memory, though the callers hold on to it
    run.rewind_metrics(start)     # a killed run has logged steps that it never saved

    # A checkpoint is whole and replaces the one before at once, so a kill costs the steps since, never more.
    def save(step: int, finished: bool = False) -> None:
        run.save(checkpoint_of(args, plan, task, state, data, step, rise, finished))
        keep(args, run, step)

    if changed or not resumed:
        save(start)               # from now on --vae and --init-from are no longer needed
        run.write_settings(args)
    else:
        keep(args, run, start)    # a killed run may have saved and not kept it
    # Print what runs, where and from which step: it may not be what the user remembers.
    for line in changed:
        print(f"{run.folder}: {line}")
    print(f"{described(args, plan, task, state)}; step {start:,} of {args.steps:,}", flush=True)

    # ---- the loop; the batches of all steps are announced, as they may be read ahead
    task.expect(piece for step in range(start, args.steps) for piece in task.split(task.order(step)))
    unread: list[Tensor] = []     # (4,) per step: loss, gradient norm, min and max time; see read_losses
    with signals() as received:   # a list that is empty until a signal comes
        stop = plan.ranks.agreed(received)
        bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=args.name, unit="step",
                   mininterval=0.5)
        for step in bar:
            # -- one step; then its weights join the averages
            rate = learning_rate(step, args, rise)
            batch = task.order(step)                           # a pure function of the step
            unread.append(update(args, plan, task, state, batch, rate))
            done = step + 1
            state.average(done)

            # -- say how long it will take, once the first steps, which are slower, are over
            if done == start + 5:
                began = time.monotonic()
            if done == start + 25:
                seconds = (time.monotonic() - began) / 20
                if seconds * (args.steps - done) >= 5:
                    bar.write(forecast(seconds, args.steps - done, plan.device, rest))

            # -- log, also before each checkpoint, so that weights that are not finite are never saved
            stopping = bool(stop)
            last = done == args.steps or stopping               # an interrupted run saves, and only that
            validates = (last or done % args.val_every == 0) and not stopping
            previews = last or done % args.preview_every == 0
            saves = last or done % args.save_every == 0 or (validates and args.keep_best)
            if done % args.log_every == 0 or validates or previews or saves:
                entry = {"step": done, **read_losses(unread, done, plan), "lr": rate}
                run.record(entry)
                bar.set_postfix(loss=f"{entry['loss']:.4f}")

            # -- validate, save, preview, in this order; a signal cuts short a validation or a preview, and
            # the next step is then the last one
            if validates:
                validate(plan, task, state, done, stop, bar)
            if saves:
                save(done)
            if previews and not stop:
                preview(plan, task, state, done, stop)
            if last and stop:
                bar.close()
                task.expect(())
                print(stopped(done, args.steps), flush=True)
                return 128 + stop[0]

    # ---- finish: samples from the averaged weights, in fp32, which any machine reproduces
    task.finish([state.model, *state.averages.values()], lambda: state.whole_average(task.build))
    with torch.no_grad():
        attempt("samples.png", lambda: run.save_picture("samples.png", state.run(state.ema, task.preview, [],
                                                                                 SAMPLE_ROWS)), plan.ranks)
    plot(plan)
    save(args.steps, finished=True)
    plan.ranks.meet()                  # what comes next reads this checkpoint
    return 0


def described(args: argparse.Namespace, plan: Plan, task: Task, state: State) -> str:
    """What is trained, on what, and how."""
    millions = sum(p.numel() for p in state.model.parameters()) / 1e6
    kind = task.medium.name if task.pairs is None else "pairs of noise and sample"
    return (f"{plan.run.folder}: {args.arch} with {millions:.1f} M parameters on {len(task.order):,} {kind}; "
            f"{plan.device.type}, {plan.number_format}, at least {plan.memory / 2**20:,.0f} MiB of memory "
            "for weights, optimizer and a batch")


def validate(plan: Plan, task: Task, state: State, step: int, stop: list[int], bar: tqdm) -> None:
    """Validate the averaged weights; without a record if a signal comes meanwhile."""
    # With the training's autocast, so that both losses mean the same.
    with torch.no_grad(), plan.autocast():
        try:
            plan.run.record({"step": step, **state.run(state.ema, task.validate, stop)})
        except Interrupted:
            return
    bar.write(describe(plan.run.records[-1]))


def preview(plan: Plan, task: Task, state: State, step: int, stop: list[int]) -> None:
    """Previews of the averaged weights and, to compare by eye, of the raw ones; and the losses as a curve."""
    state.model.eval()
    with torch.no_grad(), plan.autocast():
        for kind, network in (("ema", state.ema), ("raw", state.model)):
            name = f"preview-{step:06d}-{kind}.png"
            attempt(name, lambda: plan.run.save_picture(name, state.run(network, task.preview, stop)),
                    plan.ranks)
    plot(plan)


def plot(plan: Plan) -> None:
    """The losses and, where there are any, the loads of the experts, as pictures."""
    attempt("loss.png", plan.run.plot_loss, plan.ranks)
    attempt("experts.png", plan.run.plot_experts, plan.ranks)


def attempt(name: str, draw: Callable[[], None], ranks: Ranks) -> None:
    """Draw and write a picture. A failure is a warning, because the training can go on without the picture; a
    signal ends it with nothing written. One of several processes raises a RuntimeError instead, because the
    others may be waiting for it within the network."""
    try:
        draw()
    except Interrupted:
        pass
    except (RuntimeError, OSError, ValueError) as error:
        if ranks.size > 1 and isinstance(error, RuntimeError):
            raise
        message = " ".join(str(error).split("\n"))
        tqdm.write(f"warning: {name} could not be made ({message})", file=sys.stderr)


def stopped(step: int, steps: int) -> str:
    """The last line of a run that a signal has ended."""
    if step == steps:
        return f"all {steps:,} steps are done and saved; the same command draws the samples"
    return f"stopped at step {step:,} of {steps:,}, saved; the same command continues"


def update(args: argparse.Namespace, plan: Plan, task: Task, state: State, batch: np.ndarray,
           rate: float) -> Tensor:
    """One step of the optimizer, on the batch with these indices. Returns (4,): the loss, the norm of its
    gradient before clipping, and the lowest and highest time; loss and times of this process's part, the loss
    scaled so that its mean over all processes is that of the pictures."""
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.model.train()
    losses, times = [], []
    pieces = task.split(batch)                          # each of which needs a share of the memory
    for number, indices in enumerate(pieces, 1):
        with synchronised(state.steps.get(state.model), number == len(pieces)):
            with plan.autocast():
                loss, t = state.run(state.model, task.loss, indices)
            # The mean over the batch: every picture counts the same, however many a piece has. The backward
            # pass is outside autocast, as PyTorch recommends.
            parts = len(batch) / (len(loss) * plan.ranks.shares)           # of this size make up the batch
            share = loss.mean() / parts
            share.backward()
        losses.append(share.detach())                   # stays on the device: nothing waits for it
        times.append(t)
    # Scaled as a whole where it is too long, which keeps the direction of the step.
    norm = state.clip_gradients(args.clip)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    times = torch.cat(times)
    return torch.stack([torch.stack(losses).sum(), norm, times.min(), times.max()])


def keep(args: argparse.Namespace, run: Run, step: int) -> None:
    """Keep the checkpoint of this step under the names that --keep and --keep-best ask for."""
    # Both are further names of the file just saved, which take no time.
    if args.keep:
        run.keep_latest(step, args.keep)
    if args.keep_best and run.best_step() == step:
        run.keep("best.pt")
    run.clean()


def checkpoint_of(args: argparse.Namespace, plan: Plan, task: Task, state: State, data: Dataset, step: int,
                  rise: int, finished: bool) -> dict:
    """Everything that sample.py needs and, under "training", what a resumed run needs in addition."""
    if not state.is_finite():          # the last update may have overflowed, after a loss that was finite
        raise diverged("weights that are not finite", f"after step {step}", plan)
    conditions = plan.conditioning.stored()
    data_entry = ({"source": args.data, "size": list(plan.size)} | conditions.pop("data")
                  | plan.conditioning.stored_lengths())
    if args.aspect:
        data_entry["aspect"] = task.sizes()
    # the identities of the data and of a frozen encoder's outputs: neither may change on resume
    training = {"data": data.identity, "encoder": plan.conditioning.fingerprint, "steps": args.steps,
                "rise": rise, "finished": finished}
    if task.pairs is not None:
        training["pairs"] = task.pairs.drawn_from
    return {"arch": args.arch, "config": asdict(state.model.config), "objective": task.objective,
            "step": step, "data": data_entry, **conditions, "vae": pack_vae(task.vae) if task.vae else None,
            **state.weights(), "training": training | state.training(plan.run, step)}


def read_losses(unread: list[Tensor], done: int, plan: Plan) -> dict[str, float]:
    """Return the mean loss and gradient norm of `unread`, whose last step is `done`, and empty it. This makes
    the CPU wait for the GPU, so the loop does it only now and then. Raises FloatingPointError if one of them
    is not finite."""
    loss, norm, low, high = plan.ranks.stacked(torch.stack(unread)).unbind(2)      # each (ranks, steps)
    unread.clear()
    losses, norms = loss.mean(0).tolist(), norm[0].tolist()                        # the norm is that of all
    for i, step in enumerate(range(done + 1 - len(losses), done + 1)):
        if not (math.isfinite(losses[i]) and math.isfinite(norms[i])):
            times = f"{low[:, i].min():.3f} to {high[:, i].max():.3f}"
            raise diverged(f"loss {losses[i]} with gradient norm {norms[i]}",
                           f"at step {step}, times {times}", plan)
    return {"loss": sum(losses) / len(losses), "grad_norm": sum(norms) / len(norms)}


def forecast(seconds: float, steps: int, device: torch.device, rest: str) -> str:
    """The line that says how long the rest will take. seconds: for one step; steps: how many are left; rest:
    what follows them, in words."""
    left = seconds * steps
    duration = f"{left:.0f} seconds"
    if left > 90:
        duration = f"{left / 60:.0f} minutes"
    if left > 2 * 3600:
        duration = f"{left / 3600:.1f} hours"
    peak = machine.peak_memory(device)
    memory = f", {peak / 2**20:,.0f} MiB of memory" if peak else ""
    return f"{seconds:.2g} s a step{memory}: about {duration} are left, {rest}"


def diverged(what: str, where: str, plan: Plan) -> FloatingPointError:
    """The error to raise. Every save checks the weights, so those of the checkpoint are good."""
    saved = plan.run.load() or {"step": 0}
    remedy = f"repeat the command with a lower --lr: it continues from step {saved['step']:,}"
    if plan.bf16:
        remedy += ", or begin another --name with --precision fp32"
    return FloatingPointError(f"{what} {where}, {plan.number_format}: stopped. {plan.run.checkpoint} holds "
                              f"the last good weights; {remedy}")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 128 + N where signal N interrupted the training."""
    with launched() as ranks:          # one process, or those that torchrun has started
        return run_command(argv, ranks)


def run_command(argv: list[str] | None, ranks: Ranks) -> int:
    """This process's part of the command."""
    started = time.monotonic()         # unlike the time of day, it never jumps
    # Whatever can be refused is refused here, before a file is written or a minute spent.
    args = settings.parse(argv)
    plan = prepare(args, ranks=ranks)
    if plan.finished:
        print(f"{plan.run.folder} is finished: {args.steps:,} steps")
    # The VAE comes first: a run of its own, as a rule on the same pictures without their captions.
    if plan.vae_args is not None:
        pictures = None                            # a VAE begun with --cond text lists them with captions
        if plan.folder and plan.vae_args.cond != "text":
            pictures = plan.folder._replace(words=None)
        status = execute(plan.vae_args, prepare(plan.vae_args, pictures, ranks), network_follows=True)
        if status:
            return status
        plan.vae = load_vae(Path(plan.vae_args.runs_dir) / plan.vae_args.name)
    status = 0 if plan.finished else execute(args, plan)
    if status:
        return status

    # Print where the results are, and a command that draws more samples.
    folder = plan.run.folder
    minutes = (time.monotonic() - started) / 60
    made = [str(folder / name) for name in ("samples.png", "loss.png") if (folder / name).is_file()]
    print(f"{', '.join(made) or folder} after {minutes:.1f} minutes")
    if args.arch != "vae":                       # a VAE draws nothing by itself
        defaults = OBJECTIVES[args.objective]
        finished = conditioning.of_checkpoint(load_checkpoint(folder, args.shard), plan.device)
        guidance = f" --cfg {defaults.scale:g}" if finished.guidable and defaults.scale != 1 else ""
        many = "--n 64" if args.rate is None else "--n 8"
        out = "grid.png" if args.rate is None else "sounds.wav"
        print(f"more: python sample.py {shlex.quote(str(folder))}{finished.hint()} {many} "
              f"--sampler {defaults.sampler} --steps {defaults.steps}{guidance} --seed 0 --out {out}")
    return 0


if __name__ == "__main__":
    sys.exit(program("train.py", main))
