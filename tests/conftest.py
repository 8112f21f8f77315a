"""What the test modules share: one thread, tiny trained runs, and a few short helpers."""

import json
import os
import sys
from pathlib import Path

# One thread, here and in every process that a test starts: results then depend on no machine, and several
# test runs side by side do not slow each other down. Set before torch is imported, which reads it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TQDM_MININTERVAL", "10")

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")     # read when attention.py is imported

import run
import sample
import settings
import toys
import train
from data import load_data

# Flags of a training that takes seconds.
QUICK = ["--batch-size", "8", "--steps", "3", "--preset", "tiny", "--precision", "fp32",
         "--preview-every", "1000"]
DONE = ["--arch", "dit", "--steps", "60", *QUICK[:2], *QUICK[4:], "--name", "done", "--log-every", "5",
        "--val-every", "20", "--warmup", "5"]


def pytest_configure(config):
    config.addinivalue_line("markers", "optional: needs a package beyond requirements.txt")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---- tiny runs

def few_samples(monkeypatch, steps=3):
    """The tests need neither 240 samples of each run nor good ones."""
    monkeypatch.setattr(train, "SAMPLE_ROWS", 1)
    for name, row in list(settings.OBJECTIVES.items()):
        monkeypatch.setitem(settings.OBJECTIVES, name, row._replace(steps=steps))


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
        train.main(["--arch", "vae", "--vae-preset", "tiny", "--steps", "40", "--batch-size", "16",
                    "--precision", "fp32", "--preview-every", "40"])
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
    shared = ["--data", "scenes", "--cond", "text", *QUICK[:2], *QUICK[4:], "--steps", "40", "--warmup", "5"]
    with pytest.MonkeyPatch.context() as patch:
        few_samples(patch)
        patch.chdir(home)
        train.main(["--arch", "mmdit", *shared, "--vae-preset", "tiny", "--vae-steps", "60", "--name",
                    "mmdit"])
        train.main(["--arch", "unet", "--objective", "ddpm", *shared, "--name", "unet-text"])
    return ["runs/mmdit", "runs/unet-text"]


# ---- helpers

def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def weights(folder, key="model"):
    return run.load_checkpoint(folder)[key]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def pictures(folder, *flags, out="pictures.npz"):
    """Two pictures of a run, as integers that can be subtracted."""
    sample.main([folder, "--steps", "3", "--n", "2", "--out", out, *flags])
    return np.load(out)["arr_0"].astype(int)


def datasets(args, words=None):
    """Training and validation part of args.data, their cache beside the VAE of that data."""
    cache_dir = Path("runs") / settings.vae_name(args)
    return [load_data(args.data, split, (32, 32), Path("data"), cache_dir, words)
            for split in ("train", "val")]


def denoising(*flags):
    """The task of a DiT on shapes, and the VAE of `home`."""
    args = settings.parse(["--arch", "dit", *QUICK, *flags])
    plan = run.prepare(args)
    plan.vae = run.load_vae("runs/shapes-vae")
    data, val = datasets(args)
    plan.conditioning.attach(data, val, Path("runs/shapes-vae"), resumed=False)
    return train.Denoising(args, data, val, plan, Path("runs/shapes-vae"))


class Recorder(torch.nn.Module):
    """A network that keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, xt, t, y=None):
        self.seen.append((xt, t, y))
        return torch.zeros_like(xt)


# ---- text encoders as they are published

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
