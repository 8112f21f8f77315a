"""What the test modules share: one thread, tiny trained runs, and files of every kind that a test needs."""

import builtins
import functools
import gzip
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

# One thread, here and in every process that a test starts: results then depend on no machine, and several
# test runs side by side do not slow each other down. Set before torch is imported, which reads it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TQDM_MININTERVAL", "10")

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")     # read when attention.py is imported

import checkpoints
import decoded
import plan
import run
import sample
import settings
import toys
import train
from benchmarks.processes import Server
from data import load_data

# Flags of trainings that take seconds; of a flag given twice, the last value counts.
QUICK_VAE = ["--steps", "3", "--precision", "fp32", "--preview-every", "1000"]
QUICK = [*QUICK_VAE, "--preset", "tiny", "--batch-size", "32"]
# The VAE of `home`, which a network's command trains or finds, and a training on it.
VAE = ["--vae-preset", "tiny", "--vae-steps", "40"]
ON_VAE = [*QUICK, *VAE]
DONE = ["--arch", "dit", *ON_VAE, "--steps", "60", "--name", "done", "--log-every", "5", "--val-every", "20",
        "--warmup", "5"]
SHAPES = 4800           # how many shapes there are to train on


def pytest_configure(config):
    config.addinivalue_line("markers", "optional: needs a package beyond requirements.txt")
    config.addinivalue_line("markers", "long: takes more than ten seconds, often in several processes")


def pytest_collection_modifyitems(config, items):
    """Long tests run where they are asked for: by -m long, by their file, or by a part of their name."""
    named = any(".py" in word for word in config.invocation_params.args)
    if named or config.option.markexpr or config.option.keyword:
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """A shell starts its background jobs with SIGINT ignored, and nohup with SIGHUP ignored, which the
    programs respect."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):                      # Windows has none
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


# ---- tiny runs

def few_samples(monkeypatch, steps=3):
    """The tests need neither 20,000 shapes nor 240 samples of each run, nor good ones."""
    monkeypatch.setattr(train, "load_data", functools.partial(load_data, count=SHAPES))
    monkeypatch.setattr(train, "SAMPLE_ROWS", 1)
    for name, row in list(settings.OBJECTIVES.items()):
        monkeypatch.setitem(settings.OBJECTIVES, name, row._replace(steps=steps))


# The same in another process, which has all that it imports from `server`.
IMPORTS = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; import conftest, pytest"
FEW = IMPORTS + """
conftest.SHAPES = 480
conftest.few_samples(pytest.MonkeyPatch())
"""


@pytest.fixture(scope="session")
def server():
    """Starts programs in processes of their own."""
    with Server(IMPORTS) as server:
        yield server


@pytest.fixture(scope="session")
def launch(server):
    """Start as many processes, all with the same flags, which train on few shapes."""
    def start(folder, count, *flags, program="train.py", setup=""):
        return server.launch(folder, [list(flags)] * count, program, FEW + setup)
    return start


@pytest.fixture
def quick(monkeypatch):
    few_samples(monkeypatch)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with a VAE, trained for seconds, and one finished run on it."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        few_samples(patch)
        patch.chdir(folder)
        train.main(["--arch", "vae", *QUICK_VAE, "--vae-preset", "tiny", "--steps", "40", "--preview-every",
                    "40"])
        train.main(DONE)
    return folder


@pytest.fixture
def cwd(home, quick, monkeypatch):
    monkeypatch.chdir(home)
    return home


@pytest.fixture(scope="session")
def text_runs(home):
    """Two runs on captioned pictures, one of each family."""
    folder = home / "scenes"
    folder.mkdir()
    for i in range(200):
        scene = toys.describe_scene(i)
        Image.fromarray(toys.draw_scene(scene, i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(scene.caption)
    shared = ["--data", "scenes", "--cond", "text", *ON_VAE, "--batch-size", "8", "--steps", "40", "--warmup",
              "5"]
    with pytest.MonkeyPatch.context() as patch:
        few_samples(patch)
        patch.chdir(home)
        train.main(["--arch", "mmdit", *shared, "--name", "mmdit"])
        train.main(["--arch", "unet", "--objective", "ddpm", *shared, "--name", "unet-text"])
    return ["runs/mmdit", "runs/unet-text"]


# ---- runs, read and drawn from

def contents(folder: Path) -> set[str]:
    """The names of everything in a folder, at any depth."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def weights(folder, key="model"):
    return checkpoints.load_checkpoint(folder)[key]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def altered(tmp_path, change):
    """The finished run of `home`, with a changed checkpoint."""
    checkpoint = torch.load("runs/done/checkpoint.pt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    return run.Run(tmp_path)


def draw_two(folder, *flags, out="pictures.npz"):
    """Two pictures of a run, as integers that can be subtracted."""
    sample.main([folder, "--steps", "3", "--n", "2", "--out", out, *flags])
    return np.load(out)["arr_0"].astype(int)


def datasets(args, words=None):
    """Training and validation part of args.data, their cache beside the VAE of that data."""
    cache_dir = Path("runs") / settings.vae_name(args)
    return [load_data(args.data, split, (32, 32), Path("data"), cache_dir, words, count=SHAPES)
            for split in ("train", "val")]


def denoising(*flags):
    """The task of a DiT on shapes, and the VAE of `home`."""
    args = settings.parse(["--arch", "dit", *ON_VAE, *flags])
    planned = plan.prepare(args)
    planned.vae = checkpoints.load_vae("runs/shapes-vae")
    data, val = datasets(args)
    planned.conditioning.attach(data, val, Path("runs/shapes-vae"), resumed=False)
    return train.Denoising(args, data, val, planned, Path("runs/shapes-vae"))


class Recorder(torch.nn.Module):
    """A network that keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, xt, t, y=None):
        self.seen.append((xt, t, y))
        return torch.zeros_like(xt)


# ---- pictures and captions as people have them

RED = (250, 10, 20)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n{} loop\n"


def picture(path, colour=RED, size=(8, 8), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def captioned(folder, captions):
    """Picture i is 40 i everywhere. A caption that is None is not written."""
    for i, caption in enumerate(captions):
        picture(folder / f"{i}.png", (40 * i,) * 3)
        if caption is not None:
            (folder / f"{i}.txt").write_text(caption, "utf-8")


def colours(images):
    """The colour in the middle of every picture of 8 x 8."""
    return [tuple(int(value) for value in image[4, 4]) for image in images[:]]


def count_reads(monkeypatch):
    """A list that grows with every file of a folder that is hashed and every picture that is decoded."""
    calls = []
    for name in ("_hash_content", "read_image"):
        plain = getattr(decoded, name)
        monkeypatch.setattr(decoded, name, lambda path, *more, plain=plain, **options:
                            calls.append(path) or plain(path, *more, **options))
    return calls


def other_profile(gamma=1.0):
    """sRGB with its curves replaced by a gamma: a matrix profile, of version 2."""
    raw = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(raw[128:132], "big")
    for i in range(count):
        tag = 132 + 12 * i
        if raw[tag:tag + 4] in (b"rTRC", b"gTRC", b"bTRC"):
            start = int.from_bytes(raw[tag + 4:tag + 8], "big")
            raw[start:start + 4] = b"curv"
            raw[start + 8:start + 12] = (1).to_bytes(4, "big")
            raw[start + 12:start + 14] = int(gamma * 256).to_bytes(2, "big")
            raw[tag + 8:tag + 12] = (14).to_bytes(4, "big")
    return bytes(raw)


def write_idx(path, array):
    """MNIST's format, compressed where the name says so."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    raw = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


# ---- damaged files

DAMAGE = ("cut", "cut in the header", "empty", "zeros", "text", "missing")


def damage(path, how):
    """Damage a file in one of the ways above."""
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": whole[:len(whole) // 2], "cut in the header": whole[:20], "empty": b"",
                          "zeros": bytes(len(whole)), "text": b"x" * len(whole)}[how])


# ---- files of weights

def closed_to_us(monkeypatch, place):
    """Have the system refuse to read a file, or to list or enter a folder, as it would for another user: the
    tests may run as one to whom nothing is closed."""
    place = os.path.abspath(place)

    def guarded(call, only_within=False):
        def guard(path, *inputs, **options):
            name = os.path.abspath(path) if isinstance(path, (str, os.PathLike)) else ""
            if name.startswith(f"{place}{os.sep}") or (name == place and not only_within):
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *inputs, **options)
        return guard

    for module, name in ((builtins, "open"), (io, "open"), (os, "listdir"), (os, "scandir")):
        monkeypatch.setattr(module, name, guarded(getattr(module, name)))
    monkeypatch.setattr(os, "stat", guarded(os.stat, only_within=True))


def write_safetensors(file, state):
    """By hand, without the package."""
    header, parts, start = {}, [], 0
    for name, weight in state.items():
        parts.append(weight.detach().contiguous().numpy().tobytes())
        header[name] = {"dtype": {torch.float32: "F32", torch.float16: "F16"}[weight.dtype],
                        "shape": list(weight.shape), "data_offsets": [start, start + len(parts[-1])]}
        start += len(parts[-1])
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    Path(file).write_bytes(len(content).to_bytes(8, "little") + content + b"".join(parts))


# ---- text encoders as they are published

def change_json(file, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(content))


def in_precision(source, folder, dtype):
    """A copy of an encoder's folder, its weights saved in another precision, as they are published."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    state = {name: weight.to(dtype) for name, weight in load_file(source / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    change_json(folder / "config.json", dtype=str(dtype).removeprefix("torch."))
    return folder


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Folders of a tiny CLIP (with and without projection) and T5, with tokenizers of the published kinds."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    root, words = tmp_path_factory.mktemp("encoders"), ["a", "red", "circle", "blue", "square"]
    # CLIP: byte pairs, begin and end marks
    folder = root / "clip"
    folder.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"),
                               model_max_length=24).save_pretrained(folder)
    config = transformers.CLIPTextConfig(vocab_size=len(vocab), hidden_size=16, intermediate_size=32,
                                         num_hidden_layers=3, num_attention_heads=2, projection_dim=12,
                                         max_position_embeddings=24, bos_token_id=0, eos_token_id=1,
                                         pad_token_id=1)
    transformers.CLIPTextModelWithProjection(config).save_pretrained(folder)
    transformers.CLIPTextModel(config).save_pretrained(root / "sd1/text_encoder")
    transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(root / "sd1/tokenizer")
    # T5: here whole words, and an end mark
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}, "<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>",
                                         unk_token="<unk>").save_pretrained(root / "t5")
    transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=8, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=0)).save_pretrained(root / "t5")
    return root


def tiny_clip(seed, width, projection, depth=3, **more):
    import transformers

    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        vocab_size=54, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=depth,
        num_attention_heads=2, projection_dim=width, max_position_embeddings=24, bos_token_id=0,
        eos_token_id=1, pad_token_id=1, **more)
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return shaken(kind(config))


def tiny_t5(seed):
    import transformers

    torch.manual_seed(seed)
    return shaken(transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=8, d_model=40, d_kv=8, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False)))


def shaken(model):
    """Larger weights than the initial ones, with which all prompts are nearly the same."""
    for name, weight in model.named_parameters():
        with torch.no_grad():
            weight.add_(0.2 * torch.randn(weight.shape))
    return model.eval()


@pytest.fixture(scope="session")
def pipelines(published, tmp_path_factory):
    """By recipe: the pipeline, and the folder that it was saved in."""
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers, for the comparison")
    import transformers

    def tokenizer(kind, **more):
        return transformers.AutoTokenizer.from_pretrained(published / kind, **more)

    large, giant = tokenizer("clip"), tokenizer("clip", pad_token="x")
    small = dict(vae=None, scheduler=None)
    checker = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=1,
        joint_attention_dim=40, caption_projection_dim=8, pooled_projection_dim=40)
    built = {
        "sd1": diffusers.StableDiffusionPipeline(
            unet=None, text_encoder=tiny_clip(1, 16, False), tokenizer=large, **small, **checker),
        "sd2": diffusers.StableDiffusionPipeline(
            unet=None, text_encoder=tiny_clip(2, 16, False, hidden_act="gelu"), tokenizer=giant, **small,
            **checker),
        "sdxl": diffusers.StableDiffusionXLPipeline(
            unet=None, text_encoder=tiny_clip(3, 16, False), tokenizer=large,
            text_encoder_2=tiny_clip(4, 24, True, 2, hidden_act="gelu"), tokenizer_2=giant, **small),
        "sd3": diffusers.StableDiffusion3Pipeline(
            transformer=transformer, text_encoder=tiny_clip(5, 16, True), tokenizer=large,
            text_encoder_2=tiny_clip(6, 24, True, hidden_act="gelu"), tokenizer_2=giant,
            text_encoder_3=tiny_t5(7), tokenizer_3=tokenizer("t5"), **small),
        "flux-dev": diffusers.FluxPipeline(
            transformer=None, text_encoder=tiny_clip(8, 16, False), tokenizer=large,
            text_encoder_2=tiny_t5(9), tokenizer_2=tokenizer("t5"), **small),
    }
    diffusers.utils.logging.set_verbosity_error()            # of truncated prompts
    root = tmp_path_factory.mktemp("pipelines")
    for name, pipe in built.items():
        for key, component in pipe.components.items():
            if key.startswith(("text_encoder", "tokenizer")):
                component.save_pretrained(root / name / key)
    built["flux-schnell"] = built["flux-dev"]
    (root / "flux-schnell").symlink_to(root / "flux-dev")
    return {name: (pipe, str(root / name)) for name, pipe in built.items()}
