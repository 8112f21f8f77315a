"""A run: its folder, its checkpoints, the models they hold, and the plan that is checked before training
writes anything.

    python run.py                         # a run that is killed and continued
    python run.py runs/shapes-dit-rf      # what a run's checkpoint holds

A run lives in one folder: settings.json, metrics.jsonl, previews, loss.png, samples.png and checkpoint.pt.
The checkpoint is all that sample.py needs: the architecture and its configuration, the objective, the size of
the pictures, class names or the text encoder, the VAE, raw and averaged weights. It holds plain types and
tensors and is always read with weights_only=True. Every file is replaced atomically, so that a run can be
read, killed and continued at any moment.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.utils.checkpoint
from PIL import Image, ImageDraw
from torch import Tensor

import conditioning
import published
import settings
from cache import locked, write_atomically
from conditioning import Conditioning
from data import Folder, find_folder
from published import check_weights, load_weights
from settings import ARCHITECTURES, BLOCKS, OBJECTIVES, RESUMABLE
from text import TextConfig, TextEncoder
from vae import VAE, VAEConfig


# ---- the folder

class Run:
    """The folder of one run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoint = folder / "checkpoint.pt"
        self.settings = folder / "settings.json"
        self.metrics = folder / "metrics.jsonl"
        self.records: list[dict] = []                  # the lines of metrics.jsonl

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep other processes from training in the folder."""
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.folder / "lock"))
            except BlockingIOError:
                raise ValueError(f"{self.folder}: another process is training in this folder; wait for it, "
                                 "or use another --name") from None
            yield

    def load(self) -> dict | None:
        """The checkpoint, if the run has begun."""
        return load_checkpoint(self.checkpoint) if self.checkpoint.is_file() else None

    def save(self, checkpoint: dict) -> None:
        write_atomically(self.checkpoint, lambda file: torch.save(checkpoint, file))

    def save_picture(self, name: str, picture: Image.Image) -> None:
        write_atomically(self.folder / name, lambda file: picture.save(file, "PNG"))

    # ---- settings

    def read_settings(self) -> dict | None:
        if not self.settings.is_file():
            return None
        try:
            return dict(json.loads(self.settings.read_text()))
        except (ValueError, TypeError):
            raise ValueError(f"{self.settings}: damaged; restore it, or use another --name") from None

    def write_settings(self, args: argparse.Namespace) -> None:
        """Only once: a resumed run keeps the settings that it began with."""
        if not self.settings.is_file():
            text = json.dumps(vars(args), indent=1)
            write_atomically(self.settings, lambda file: file.write(text.encode()))

    def check_settings(self, args: argparse.Namespace) -> None:
        """Refuse a folder that holds a run with other settings."""
        found = self.read_settings()
        if found is None:
            return
        for name in sorted(set(vars(args)) - RESUMABLE):
            begun, now = found.get(name), getattr(args, name)
            if name == "text_encoder" and begun and now:
                # A frozen encoder may move to another folder; its files are compared later.
                begun, now = begun.partition(":")[0], now.partition(":")[0]
            if begun != now:
                raise ValueError(f"{self.folder} holds a run with --{name.replace('_', '-')} "
                                 f"{found.get(name)}, not {getattr(args, name)}; repeat its settings to "
                                 "continue it, or use another --name")

    # ---- metrics

    def rewind_metrics(self, step: int) -> None:
        """Read the records up to this step and drop later ones, which the resumed run will write again."""
        self.records = []
        lines = self.metrics.read_text().splitlines() if self.metrics.is_file() else []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:                         # a line truncated by a kill
                continue
            if record["step"] <= step:
                self.records.append(record)
        text = "".join(json.dumps(record) + "\n" for record in self.records)
        write_atomically(self.metrics, lambda file: file.write(text.encode()))

    def record(self, entry: dict) -> None:
        self.records.append(entry)
        with open(self.metrics, "a") as out:
            out.write(json.dumps(entry) + "\n")

    def plot_loss(self) -> None:
        picture = loss_curve(self.records)
        if picture is not None:
            self.save_picture("loss.png", picture)


def loss_curve(records: list[dict]) -> Image.Image | None:
    """Training loss (running mean) and validation loss over steps, on a logarithmic axis."""
    train: list[tuple[int, float]] = []
    validation: list[tuple[int, float]] = []
    smooth = None
    for record in records:
        if "loss" in record:
            smooth = record["loss"] if smooth is None else 0.7 * smooth + 0.3 * record["loss"]
            train.append((record["step"], smooth))
        elif "val_loss" in record:
            validation.append((record["step"], record["val_loss"]))
    points = [(step, max(value, 1e-9)) for step, value in train + validation]
    if not points:
        return None

    last = max(step for step, _ in points)
    low = min(value for _, value in points)
    high = 1.05 * max(value for _, value in points)
    width, height = 900, 420
    left, right, top, bottom = 70, 30, 30, 40          # margins
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)

    def place(step: float, value: float) -> tuple[float, float]:
        """Pixel coordinates of a point of the curve."""
        share = math.log(max(value, 1e-9) / low) / math.log(high / low)
        return left + step / last * (width - left - right), height - bottom - share * (height - bottom - top)

    for i in range(5):                                 # grid lines and their labels
        value = low * (high / low) ** (i / 4)
        step = last * i / 4
        pen.line([place(0, value), place(last, value)], fill="#dddddd")
        pen.text((8, place(0, value)[1] - 6), f"{value:.3g}", fill="black")
        pen.text((place(step, low)[0] - 10, height - bottom + 10), f"{step:.0f}", fill="black")
    for name, curve, colour, x in (("train", train, "#1f77b4", left),
                                   ("validation", validation, "#d62728", left + 60)):
        pen.text((x, 8), name, fill=colour)
        pen.line([place(*point) for point in curve], fill=colour, width=2)
    return image


def describe(record: dict) -> str:
    """A validation record as a line for the terminal."""
    line = f"step {record['step']:,}: validation loss {record['val_loss']:.4f}"
    if "psnr" in record:
        stds = " ".join(f"{std:.2f}" for std in record["latent_std"])
        line += f", PSNR {record['psnr']:.1f} dB, KL {record['kl']:.0f} nats, latent std {stds}"
    if "val_by_time" in record:
        line += ", by time " + "  ".join(f"{name} {loss:.3f}" for name, loss in record["val_by_time"].items())
    return line


# ---- checkpoints

def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint, from its run folder or file, on the CPU. Raises ValueError with a line for the user."""
    path = Path(path)
    file = path / "checkpoint.pt" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path}: no checkpoint there ({file} does not exist); train one with train.py")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        for part in ("arch", "config", "objective", "data", "label_dropout", "vae", "model", "ema"):
            checkpoint[part]                           # raises KeyError if it is missing
        checkpoint.setdefault("text", None)            # older checkpoints lack it
    except Exception as error:      # a dozen types for a damaged file; all mean the same to the user
        raise ValueError(f"{file}: not a checkpoint of train.py, or damaged ({type(error).__name__})"
                         ) from None
    return checkpoint


def load_published(name: str, weights: str | Path, vae: str | Path) -> dict:
    """A published network and its VAE, in the form of a checkpoint. Raises ValueError with a line for the
    user."""
    row = published.MODELS[name]
    with torch.device("meta"):                         # only names and shapes are needed to check the file
        model = build_model("dit", row.config)
    state = published.read_network(name, weights)
    check_weights(model, state, str(weights))
    autoencoder = load_vae(vae)
    published.check_vae(name, autoencoder, str(vae))
    return {"arch": "dit", "config": row.config, "objective": row.objective, "step": 0,
            "data": {"source": "imagenet", "size": [row.side, row.side],
                     "classes": [str(i) for i in range(1000)]},
            "text": None, "label_dropout": 0.1, "model": state, "ema": state, "vae": pack_vae(autoencoder)}


@dataclass
class State:
    """The parts of a run that training steps change."""
    model: torch.nn.Module
    ema: torch.nn.Module                               # the model with averaged weights
    optimizer: torch.optim.Optimizer
    device: torch.device

    @torch.no_grad()
    def average(self, decay: float) -> None:
        # ema = decay * ema + (1 - decay) * model, for all weights in one call
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)

    def weights(self) -> dict:
        return {"model": self.model.state_dict(), "ema": self.ema.state_dict()}

    def training(self) -> dict:
        """What a resumed run needs besides the weights. The position in the data is not among it, because
        data.batch_indices is a function of the step."""
        cuda_rng = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {"optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state(), "cuda_rng": cuda_rng}

    def restore(self, saved: dict, what: str) -> None:
        load_weights(self.model, saved["model"], what)
        load_weights(self.ema, saved["ema"], what)
        self.optimizer.load_state_dict(saved["training"]["optimizer"])
        torch.set_rng_state(saved["training"]["rng"])
        if self.device.type == "cuda" and saved["training"]["cuda_rng"] is not None:
            torch.cuda.set_rng_state(saved["training"]["cuda_rng"], self.device)


# ---- building what a checkpoint holds

def build_model(arch: str, config: dict, text: dict | None = None) -> torch.nn.Module:
    """text: the checkpoint's text encoder. The built-in one becomes a part of the model, `model.text`,
    because it is trained, averaged and saved with it."""
    row = ARCHITECTURES[arch]
    model = row.model(make_config(arch, row.config, config))
    if text is not None and text["encoder"] == "bytes":
        model.text = TextEncoder(make_config("text encoder", TextConfig, text["config"]))
    return model


def make_config(name: str, kind: type, values: dict):
    """The dataclass `kind` with these values. Raises ValueError for a value that it has no field for."""
    surplus = sorted(set(values) - {field.name for field in fields(kind)})
    if surplus:
        raise ValueError(f"{name} has no setting {surplus[0]!r}; this checkpoint is from another version")
    return kind(**values)


def build_path(objective: dict):
    """The path of an objective as the checkpoint stores it: its name in OBJECTIVES and its options."""
    options = dict(objective)
    return OBJECTIVES[options.pop("name")].path(**options)


def pack_vae(vae: VAE) -> dict:
    return {"config": asdict(vae.config), "state": vae.state_dict()}


def unpack_vae(packed: dict, what: str = "VAE") -> VAE:
    vae = load_weights(build_model("vae", packed["config"]), packed["state"], what)
    return vae.eval().requires_grad_(False)


def load_vae(path: str | Path) -> VAE:
    """A VAE with averaged weights, in evaluation mode: from a finished VAE run, from inside another run's
    checkpoint, or a published one (see published.load_vae). Raises ValueError with a line for the user."""
    path = Path(path)
    if (path / "config.json").is_file() and not (path / "checkpoint.pt").is_file():
        return published.load_vae(path)                # a diffusers folder
    try:
        checkpoint = load_checkpoint(path)
    except ValueError:
        if path.is_file():
            return published.load_vae(path)
        raise
    if checkpoint["arch"] != "vae":
        return unpack_vae(checkpoint["vae"])
    if not checkpoint["training"]["finished"]:         # the scale of its latents is measured at the end
        raise ValueError(f"{path}: this VAE is not finished (step {checkpoint['step']:,}); "
                         "run its command again")
    return unpack_vae({"config": checkpoint["config"], "state": checkpoint["ema"]}, str(path))


def compile_blocks(model: torch.nn.Module, **options) -> None:
    """torch.compile each block in place, so that the names of the weights stay as they are. Blocks of one
    class share the compiled code. It is compiled for the first size and, when a second one appears, once more
    for all sizes."""
    torch._dynamo.config.cache_size_limit = 64         # a U-Net's blocks have many widths
    for block in model.modules():
        if isinstance(block, BLOCKS):
            block.compile(**options)


def checkpoint_blocks(model: torch.nn.Module) -> None:
    """Gradient checkpointing: keep the input of each block only, and run the block again in the backward pass
    (Chen et al. 2016, arXiv:1604.06174)."""
    def recomputed(forward: Callable) -> Callable:
        def again(*inputs, **more):                    # not functools.partial, which torch.compile skips
            # No block draws random numbers, so the state of the generator need not be restored.
            return torch.utils.checkpoint.checkpoint(forward, *inputs, use_reentrant=False,
                                                     preserve_rng_state=False, **more)
        return again

    for block in model.modules():
        if isinstance(block, BLOCKS):
            block.forward = recomputed(block.forward)


def graphed(model: torch.nn.Module) -> Callable[..., Tensor]:
    """The model compiled for sampling and, on CUDA, replayed as a graph. The first call runs without either,
    because it fills the network's tables of positions, whose memory a graph would overwrite."""
    compiled = None

    def call(*inputs: Tensor, **cond: Tensor) -> Tensor:
        nonlocal compiled
        if compiled is None:
            compiled = torch.compile(model, mode="reduce-overhead")
            return model(*inputs, **cond)
        return compiled(*inputs, **cond).clone()       # a graph overwrites its output in the next call
    return call


# ---- the plan: everything that training needs, checked before anything is written

@dataclass
class Plan:
    run: Run
    device: torch.device
    bf16: bool                                   # whether the network runs under bf16 autocast
    conditioning: Conditioning
    words: str | None                            # the text of each picture: "captions", "embeddings" or None
    folder: Folder | None                        # the listing of --data, if that is a folder
    vae: VAE | None = None                       # None until it has been trained
    vae_args: argparse.Namespace | None = None   # the settings to train it with
    initial: dict[str, Tensor] | None = None     # weights to start from

    @property
    def number_format(self) -> str:
        return "bf16 autocast" if self.bf16 else "fp32"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


def prepare(args: argparse.Namespace, folder: Folder | None = None) -> Plan:
    """The plan of a run, made without writing anything. folder: the listing of --data, if it was made before.
    Raises ValueError with a line for the user if something cannot work."""
    run = Run(Path(args.runs_dir) / args.name)
    run.check_settings(args)
    device = settings.pick_device(args.device)
    if args.compile:
        settings.check_compiler(device)
    bf16 = args.precision == "bf16" or (args.precision == "auto" and settings.has_bf16(device))
    words = None
    if args.cond == "text":
        words = "embeddings" if args.text_encoder == "none" else "captions"
    if folder is None:
        folder = find_folder(args.data, words)
    cond = "none" if args.arch == "vae" else args.cond
    condition = conditioning.of_settings(cond, settings.text_config(args), args.label_dropout, device)
    plan = Plan(run, device, bf16, condition, words, folder)

    vae_args = args
    if args.arch != "vae":
        build_path(settings.objective_config(args))        # refuses options that contradict each other
        begun = run.load()
        if args.vae:
            plan.vae = given_vae(args, begun)
        else:
            earlier = Run(Path(args.runs_dir) / settings.vae_name(args)).read_settings()
            vae_args = plan.vae_args = settings.vae_settings(args, earlier)
        if args.init_from and not begun:
            plan.initial = initial_weights(args)
        condition.load_encoder(args.data, folder)
    vae_config = plan.vae.config if plan.vae else VAEConfig(**settings.vae_config(vae_args, image_channels=3))
    check_shapes(args, vae_config, condition, plan.initial)
    return plan


def given_vae(args: argparse.Namespace, begun: dict | None) -> VAE:
    """The VAE of --vae. The checkpoint of a run that has begun holds it, so the file is no longer needed."""
    if begun:
        return unpack_vae(begun["vae"])
    vae = load_vae(args.vae)
    if args.published:
        published.check_vae(args.published, vae, args.vae)
    return vae


def initial_weights(args: argparse.Namespace) -> dict[str, Tensor]:
    """The weights of --init-from, under our names: from a published file or from a run of this project."""
    path = Path(args.init_from)
    try:
        checkpoint = load_checkpoint(path)
    except ValueError:
        if not args.published or path.is_dir():
            raise
        return published.read_network(args.published, args.init_from)
    if checkpoint["arch"] != args.arch:
        raise ValueError(f"--init-from {args.init_from}: is a {checkpoint['arch']}, not a {args.arch}")
    if args.published and checkpoint["objective"] != published.MODELS[args.published].objective:
        raise ValueError(f"--init-from {args.init_from}: was trained with {checkpoint['objective']}, not as "
                         f"--published {args.published}")
    return checkpoint["ema"]


def fit_weights(model: torch.nn.Module, state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """The state to load into this model. It must fit exactly, except that a table of embeddings for other
    classes is left out: the model keeps its own initial values for it."""
    own = model.state_dict()
    state = dict(state)
    for name in ("y_embedder.embedding_table.weight", "class_embedding.weight"):
        if name not in own:
            state.pop(name, None)
        elif name not in state or state[name].shape != own[name].shape:
            state[name] = own[name]
    check_weights(model, state, what)
    return state


def check_shapes(args: argparse.Namespace, vae_config: VAEConfig, condition: Conditioning,
                 initial: dict[str, Tensor] | None) -> None:
    """Build the networks on the meta device, which takes no memory, and check that the downsampling and the
    patches divide both sides of the pictures, so that errors appear before minutes are spent on the VAE."""
    factors = {"VAE": (2 ** (len(vae_config.widths) - 1),) * 2}
    with torch.device("meta"):
        build_model("vae", asdict(vae_config))
        if args.arch != "vae":
            config = settings.network_config(args, vae_config.latent_channels, condition)
            network = build_model(args.arch, config, condition.text)
            if initial is not None:
                fit_weights(network, initial, args.init_from)
            factors[args.arch] = (network.factor,) * 2 if args.arch == "unet" else network.config.patch
    need = [math.prod(pair[axis] for pair in factors.values()) for axis in (0, 1)]
    if any(side % multiple for side, multiple in zip(args.image_size, need)):
        why = ", ".join(f"{name} {h}x{w}" for name, (h, w) in factors.items())
        raise ValueError("--image-size {} {}: height must be a multiple of {} and width of {} ({})".format(
            *args.image_size, *need, why))


def show(path: str) -> None:
    """Print what a checkpoint holds."""
    checkpoint = load_checkpoint(path)
    with torch.device("meta"):
        model = build_model(checkpoint["arch"], checkpoint["config"], checkpoint["text"])
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{path}: {checkpoint['arch']} with {parameters / 1e6:.1f} M parameters, "
          f"step {checkpoint['step']:,}")
    for name in ("config", "objective", "text", "label_dropout", "data"):
        print(f"  {name}: {checkpoint[name]}")


def demo() -> None:
    """A run that is killed after its checkpoint of step 2, and continued."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "killed")
        with run.hold():
            try:
                with Run(run.folder).hold():
                    pass
            except ValueError as error:
                print(f"a second process: {str(error).replace(folder, '...')}")
            model = build_model("dit", {"width": 64, "depth": 2, "heads": 2})
            for step in (1, 2, 3):
                run.record({"step": step, "loss": 1 / step})
                if step == 2:
                    state = model.state_dict()
                    run.save({"arch": "dit", "config": asdict(model.config), "objective": {"name": "rf"},
                              "step": step, "data": {"size": [32, 32], "classes": []}, "label_dropout": 0.0,
                              "vae": None, "model": state, "ema": state})
        again = Run(run.folder)
        step = again.load()["step"]
        again.rewind_metrics(step)
        print(f"it logged step 3 and continues from step {step}: {again.records}")
        show(str(again.folder))


if __name__ == "__main__":
    try:
        if len(sys.argv) > 1:
            show(sys.argv[1])
        else:
            demo()
    except ValueError as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        sys.exit(2)
