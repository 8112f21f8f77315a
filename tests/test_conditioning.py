"""conditioning.py: labels and text in training and in sampling, dropout, and the null condition."""

import argparse
import os
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ON_VAE, QUICK, Recorder, datasets, denoising, draw_two, in_precision
from PIL import Image

import checkpoints
import conditioning
import encoders
import plan
import sample
import sample_settings
import settings
import toys
import train
from cache import TextWidths
from conditioning import Asked, Labels, Nothing, Words
from data import Dataset
from text import TextConfig, TextEncoder

CPU = torch.device("cpu")
SMALL = {"encoder": "bytes", "config": dict(width=32, depth=1, heads=2, limit=3)}


def checkpoint(classes=(), text=None, prompts=(), dropout=0.1):
    """The entries of a checkpoint that decide the conditioning."""
    return {"data": {"classes": list(classes), "prompts": list(prompts)}, "text": text,
            "label_dropout": dropout}


def labels(dropout=0.1, of=(2, 0, 1, 2), names=("red", "light green", "blue")):
    images = np.zeros((len(of), 8, 8, 3), np.uint8)
    train_part = Dataset(images, np.array(of), list(names), "train")
    val = Dataset(images[:2], np.array([1, 2]), list(names), "val")
    kind = conditioning.of_settings("class", None, dropout, CPU)
    kind.attach(train_part, val, Path("."), resumed=False)
    return kind


def words(text=SMALL, captions=("a red square", "green", "blue", "red"), resumed=True, **fields):
    images = np.zeros((len(captions), 8, 8, 3), np.uint8)
    part = Dataset(images, None, [], "demo", captions=list(captions), **fields)
    kind = conditioning.of_settings("text", text, 0.1, CPU)
    kind.load_encoder("demo", None)
    kind.attach(part, part, Path("."), resumed=resumed)
    return kind


def none_dropped(n):
    return torch.zeros(n, dtype=torch.bool)


# ---- labels

def test_a_batch_has_each_pictures_own_label():
    kind = labels(of=np.arange(12) % 3)
    assert (kind.batch(None, np.array([4]), none_dropped(1))["y"] == torch.tensor([1])).all()
    indices = np.array([11, 0, 7, 7])
    assert kind.batch(None, indices, none_dropped(4))["y"].tolist() == [2, 0, 1, 1]
    # the null class exactly where dropped
    dropped = torch.tensor([False, True, False, True])
    assert kind.batch(None, indices, dropped)["y"].tolist() == [2, 3, 1, 3]
    assert kind.batch(None, indices, dropped)["y"].dtype == torch.int64


def test_labels_of_a_task_are_those_of_its_pictures(cwd):
    task = denoising()
    own = task.conditioning.batch(None, np.array([3]), none_dropped(1))["y"]
    assert (own == torch.tensor([3])).all()


def test_label_dropout_is_per_example_and_once(cwd):
    task, model = denoising("--label-dropout", "0.3"), Recorder()
    indices = np.arange(2400)
    task.loss(model, indices)
    y = model.seen[0][2]
    dropped = (y == 24).float().mean().item()
    assert abs(dropped - 0.3) < 5 * (0.3 * 0.7 / 2400) ** 0.5     # neither all-or-nothing nor 0.51
    assert (y[y < 24] == torch.arange(2400)[y < 24] % 24).all()
    task = denoising("--label-dropout", "0")
    task.loss(model, indices)
    assert (model.seen[1][2] < 24).all()


def test_labels_in_validation_previews_and_the_checkpoint():
    kind = labels()
    assert kind.validation(None)["y"].tolist() == [1, 2]
    asked = kind.preview(None, rows=2)
    assert asked.turn.tolist() == [0, 1, 2, 0, 1, 2] and asked.columns == 3 and asked.captions is None
    assert asked.every["y"].tolist() == [0, 1, 2, 3] and asked.names == ["red", "light green", "blue"]
    assert kind.stored() == checkpoint(["red", "light green", "blue"])
    assert kind.guidable and not labels(dropout=0.0).guidable
    many = labels(names=[str(i) for i in range(100)])
    assert many.preview(None, rows=1).turn.tolist() == list(range(24))


def test_labels_of_data_without_classes():
    """A flat folder of pictures makes an unconditional network."""
    images = np.zeros((4, 8, 8, 3), np.uint8)
    kind = conditioning.of_settings("class", None, 0.1, CPU)
    kind.attach(Dataset(images, None, [], "x"), Dataset(images, None, [], "y"), Path("."), resumed=False)
    assert kind.batch(None, np.arange(4), torch.ones(4, dtype=torch.bool)) == {} == kind.validation(None)
    assert kind.network_options("dit", {}) == {"num_classes": 0} and not kind.guidable and kind.hint() == ""
    assert kind.preview(None, rows=2).columns == 8 and len(kind.preview(None, rows=2).turn) == 16
    assert kind.stored() == checkpoint(dropout=0.0)


@pytest.mark.parametrize("label, n, turn, columns", [
    (None, 5, [0, 1, 2, 0, 1], 3), (None, 2, [0, 1], None), ("light green", 3, [1, 1, 1], None),
    ("2", 2, [2, 2], None),
])
def test_labels_that_are_asked_for(label, n, turn, columns):
    asked = labels().ask(argparse.Namespace(label=label, n=n), None)
    assert asked.turn.tolist() == turn and asked.columns == columns
    assert asked.every["y"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("label", ["purple", "3", "-1", "1.0", " ", "²"])
def test_labels_that_there_are_not(label):
    with pytest.raises(ValueError, match="not a class of this run; it has 0 to 2: red, light green, blue"):
        labels().ask(argparse.Namespace(label=label, n=1), None)
    with pytest.raises(ValueError, match="--label is empty; give the name of a class"):
        labels().ask(argparse.Namespace(label="", n=1), None)


@pytest.mark.parametrize("names, label, expected, said", [
    (("1", "2", "10", "11"), "10", 2, ""), (("1", "2", "10", "11"), "2", 1, ""),     # a name wins
    (("red", "blue", "green"), "2", 2, "--label 2: draws green"),
    (("red", "blue", "green"), "blue", 1, ""),
    (("red", "v2", "3d"), "2", 2, "--label 2: draws 3d"),                 # no number, though digits are in it
    (("a", "b", "c" * 500), "2", 2, f"--label 2: draws {'c' * 80}..."),
    (tuple(str(i) for i in range(1000)), "207", 207, ""),                 # the published models' classes
])
def test_a_label_is_a_name_or_an_unambiguous_index(names, label, expected, said, capsys):
    kind = conditioning.of_checkpoint(checkpoint(names), CPU)
    assert kind.index(label) == expected and capsys.readouterr().err.strip() == said
    # what is offered is drawn, also after going through argparse
    args = sample_settings.parse_args(["runs/x", *shlex.split(kind.hint())])
    assert kind.index(args.label) == 0


@pytest.mark.parametrize("names, label", [
    (("1", "2", "10", "11"), "3"), (("1", "2", "10", "11"), "0"), (("007", "bond"), "1"),
    (("-1", "b"), "1"), (("1.5", "b"), "0"), (("cat", "3,5"), "1"), (("7", "red", "blue"), "2"),
])
def test_an_index_beside_classes_named_like_numbers_is_refused(names, label):
    why = "its classes are named like numbers, so give a name: "
    if not all(name.isdecimal() for name in names):
        why = "as .* is the name of one, give a name: "
    with pytest.raises(ValueError, match=f"--label {label}: not a class of this run; {why}{names[0]}, "):
        conditioning.of_checkpoint(checkpoint(names), CPU).index(label)


# ---- what is asked for, batch by batch

def test_asked_batch():
    every = {"y": torch.tensor([0, 1, 2, 3]), "context": torch.arange(8.0).view(4, 2)}
    asked = Asked(torch.tensor([2, 0, 1, 2, 0]), every, ["a", "b", "c"])
    cond, uncond = asked.batch(1, 3)
    assert cond["y"].tolist() == [0, 1, 2] and uncond["y"].tolist() == [3, 3, 3]
    assert cond["context"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert uncond["context"].tolist() == [[6, 7]] * 3
    cond, uncond = asked.batch(4, 1)                                   # the last, shorter batch
    assert cond["y"].tolist() == [0] and uncond["y"].tolist() == [3]
    assert Asked(torch.zeros(4, dtype=torch.long), {}, []).batch(0, 4) == ({}, {})


# ---- the kinds of conditioning

def test_conditioning_of_a_checkpoint():
    kind = conditioning.of_checkpoint(checkpoint(), CPU)
    assert type(kind) is Nothing and not kind.guidable and kind.use == "" and kind.accepted() == set()
    assert kind.hint() == "" and kind.described == "was trained without conditions"
    kind = conditioning.of_checkpoint(checkpoint(classes=["red", "blue"]), CPU)
    assert type(kind) is Labels and kind.guidable and kind.classes == ["red", "blue"]
    assert kind.use == "--label" and kind.accepted() == {"--label"}
    assert not conditioning.of_checkpoint(checkpoint(classes=["red"], dropout=0.0), CPU).guidable
    kind = conditioning.of_checkpoint(checkpoint(text=SMALL, prompts=["a red circle"]), CPU)
    assert type(kind) is Words and kind.guidable and kind.text == SMALL and kind.use == "--prompt"
    assert kind.prompts == ["a red circle"] and kind.accepted() == {"--prompt", "--prompts",
                                                                                   "--negative-prompt"}
    assert not conditioning.of_checkpoint(checkpoint(text=SMALL, dropout=0.0), CPU).guidable
    kind = conditioning.of_checkpoint(checkpoint(text={"encoder": "clip", "path": "x"}), CPU)
    assert kind.use == "--prompt" and kind.accepted() == {"--prompt", "--prompts", "--negative-prompt",
                                                          "--text-encoder"}
    kind = conditioning.of_checkpoint(checkpoint(text={"encoder": "none"}), CPU)
    assert kind.use == "--embedding" and kind.accepted() == {"--embedding"}
    # checkpoints written before there was text hold no prompts
    old = checkpoint(classes=["red"])
    del old["data"]["prompts"]
    assert type(conditioning.of_checkpoint(old, CPU)) is Labels


def test_what_is_stored_makes_the_same_conditioning_again():
    for kind in (labels(), words(), conditioning.of_settings("none", None, 0.1, CPU)):
        again = conditioning.of_checkpoint(kind.stored(), CPU)
        assert type(again) is type(kind) and again.guidable == kind.guidable and again.hint() == kind.hint()
        assert again.stored() == kind.stored()
    assert words().stored() == checkpoint(text=SMALL, prompts=["a red square", "green", "blue", "red"])


def test_the_hint_quotes_what_a_shell_would_split():
    for stored, expected in (
            (checkpoint(classes=["light green", "b"]), ["--label", "light green"]),
            (checkpoint(classes=["red-circle"]), ["--label", "red-circle"]),
            (checkpoint(text=SMALL, prompts=["a cat's $HOME " * 1000, "a cat's $HOME"]),
             ["--prompt", "a cat's $HOME"]),                      # the shortest
            (checkpoint(text=SMALL, prompts=["", "\x1b[31m", "a long one"]), ["--prompt", "a long one"]),
            (checkpoint(classes=["\udce9", "b"]), ["--label", "b"]),
            (checkpoint(text=SMALL, prompts=["-5 degrees"]), ["--prompt=-5 degrees"]),
            (checkpoint(classes=["-1", "b"]), ["--label=-1"]),
            (checkpoint(classes=["2", "10"]), ["--label", "2"]),
            (checkpoint(text={"encoder": "none"}, prompts=["a b/1.npz"]), ["--embedding", "a b/1.npz"])):
        hint = conditioning.of_checkpoint(stored, CPU).hint()
        assert hint.startswith(" ") and shlex.split(hint) == expected
    assert labels(names=["red", "b", "c"]).hint() == " --label red"
    assert conditioning.of_checkpoint(checkpoint(text=SMALL, prompts=["", "\x1b"]), CPU).hint() == ""
    with pytest.raises(ValueError, match=r"\\x1b\[2J: not a class .* has 0 to 1: \\x1b\[31m, b$"):
        conditioning.of_checkpoint(checkpoint(classes=["\x1b[31m", "b"]), CPU).index("\x1b[2J")


FLAGS = {flag.lstrip("-").replace("-", "_"): False if "type" in fields else None     # switches, and others
         for flag, fields in conditioning.FLAGS.items()} | {"run": "runs/x"}


@pytest.mark.parametrize("stored, given, message", [
    ({}, {"label": "0"}, "--label 0: this run was trained without conditions; leave it out"),
    ({}, {"prompt": ["a", "b"]}, "--prompt a: this run was trained without conditions; leave it out"),
    ({"classes": ["red"]}, {"prompt": ["a dog"]},
     "--prompt a dog: this run is conditioned on class labels; use --label"),
    ({"classes": ["red"]}, {"embedding": ["x.npz"]}, "--embedding x.npz: .* class labels; use --label"),
    ({"classes": ["red"]}, {"negative_prompt": "x"}, "--negative-prompt x: .* class labels; leave it out"),
    ({"classes": ["red"]}, {"text_encoder": ["clip:x"]}, "--text-encoder clip:x: .* class labels; leave it"),
    ({"text": SMALL}, {"label": "red"}, "--label red: this run is conditioned on text; use --prompt"),
    ({"text": SMALL}, {"embedding": ["x.npz"]}, "--embedding x.npz: .* on text; use --prompt"),
    ({"text": SMALL}, {"text_encoder": ["clip:x"]}, "--text-encoder clip:x: .* on text; leave it out"),
    ({"text": {"encoder": "none"}}, {"prompt": ["a"]},
     "--prompt a: this run is conditioned on precomputed text vectors; use --embedding"),
    ({"text": {"encoder": "none"}}, {"negative_prompt": ""}, "--negative-prompt : .* vectors; leave it out"),
])
def test_flags_that_a_run_does_not_take(stored, given, message):
    kind = conditioning.of_checkpoint(checkpoint(**stored), CPU)
    with pytest.raises(ValueError, match=message):
        conditioning.check_flags(kind, argparse.Namespace(**FLAGS | given))


@pytest.mark.parametrize("stored, given", [
    ({}, {}), ({"classes": ["red"]}, {}), ({"classes": ["red"]}, {"label": "red"}), ({"text": SMALL}, {}),
    ({"text": SMALL}, {"prompt": ["a"], "negative_prompt": "b"}),
    ({"text": {"encoder": "t5", "path": "x"}}, {"prompt": ["a"], "text_encoder": ["t5:y"]}),
    ({"text": {"encoder": "none"}}, {"embedding": ["x.npz"]}),
])
def test_flags_that_a_run_takes(stored, given):
    kind = conditioning.of_checkpoint(checkpoint(**stored), CPU)
    conditioning.check_flags(kind, argparse.Namespace(**FLAGS | given))


GUIDANCE = FLAGS | dict(cfg=None, interval=(0.0, 1.0), rescale=0.0, cfg_channels=None, guide=None)


@pytest.mark.parametrize("stored, given, expected", [
    ({}, {}, 1.0), ({"classes": ["red"]}, {}, 2.0), ({"classes": ["red"], "dropout": 0.0}, {}, 1.0),
    ({"text": SMALL}, {"cfg": 7.5, "rescale": 0.7, "interval": [0.1, 0.5], "negative_prompt": ""}, 7.5),
    ({"text": SMALL}, {"cfg": 0.0, "negative_prompt": "a"}, 0.0),          # what is drawn at scale 0
    ({"classes": ["red"]}, {"cfg": 1.0, "label": "red"}, 1.0),
    ({}, {"guide": "x.pt"}, 2.0), ({"classes": ["red"], "dropout": 0.0}, {"guide": "x.pt", "cfg": 3.0}, 3.0),
])
def test_guidance_scale(stored, given, expected):
    kind = conditioning.of_checkpoint(checkpoint(**stored), CPU)
    assert conditioning.guidance_scale(kind, argparse.Namespace(**GUIDANCE | given)) == expected


@pytest.mark.parametrize("stored, given, message", [
    ({}, {"cfg": 2.0}, "--cfg 2: this run was trained without conditions; use --cfg 1"),
    ({"classes": ["red"], "dropout": 0.0}, {"cfg": 0.0},
     "--cfg 0: this run is conditioned on class labels with label dropout 0, so it has no unconditional"),
    ({"text": SMALL}, {"cfg": 0.0, "prompt": ["a"]}, "--prompt with --cfg 0: scale 0 is unconditional"),
    ({"text": SMALL}, {"cfg": 1.0, "negative_prompt": "a"}, "--negative-prompt with guidance 1: "),
    ({"text": SMALL}, {"cfg": 0.0, "rescale": 0.5}, "--rescale 0.5 with guidance 0: "),
    ({}, {"interval": (0.0, 0.5)}, "--interval 0 0.5 with guidance 1: there is none for it to act on"),
    ({}, {"cfg": 1.0, "guide": "x.pt"}, "--guide x.pt with guidance 1: there is none for it to act on"),
    ({"classes": ["red"]}, {"cfg": 0.0, "guide": "x.pt"}, "--guide x.pt with guidance 0: "),
    ({"text": SMALL}, {"guide": "x.pt", "negative_prompt": "a"}, "--negative-prompt with --guide x.pt: "),
])
def test_guidance_that_a_run_cannot_have(stored, given, message):
    kind = conditioning.of_checkpoint(checkpoint(**stored), CPU)
    with pytest.raises(ValueError, match=message):
        conditioning.guidance_scale(kind, argparse.Namespace(**GUIDANCE | given))


def test_precomputed_vectors_must_be_given():
    kind = conditioning.of_checkpoint(checkpoint(text={"encoder": "none"}), CPU)
    with pytest.raises(ValueError, match="precomputed text vectors; give some by --embedding"):
        conditioning.check_flags(kind, argparse.Namespace(**FLAGS))


def test_every_flag_of_a_kind_is_one_of_sample_py():
    for kind in conditioning.KINDS.values():
        for flag, fields in kind.flags.items():
            assert flag[2:].replace("-", "_") in FLAGS and fields["help"]
    args = vars(sample_settings.parse_args(["runs/x"]))
    assert {name: args[name] for name in FLAGS} == FLAGS


# ---- text in training

class FakeEncoder:
    """Encoder outputs that show what was encoded: the length of each prompt."""

    def __init__(self):
        self.encoded = []

    def __call__(self, prompts):
        self.encoded += prompts
        size = torch.tensor([float(len(prompt)) for prompt in prompts])
        return {"context": size.view(-1, 1, 1).expand(-1, 2, 4), "pooled": size.view(-1, 1).expand(-1, 3),
                "mask": torch.ones(len(prompts), 2).bool()}

    def truncated(self, prompt):
        return {"the encoder": prompt[20:]} if prompt[20:] else {}


def test_a_batch_has_each_pictures_own_caption(monkeypatch):
    """An empty prompt, the null condition, exactly where dropped."""
    seen = []
    monkeypatch.setattr(conditioning, "network_inputs",
                        lambda model, encode, prompts, *more: seen.extend(prompts) or {})
    kind, model = words(), SimpleNamespace(text=None)
    kind.batch(model, np.array([2, 0, 1, 2]), torch.tensor([False, True, False, False]))
    assert seen == ["blue", "", "green", "blue"]
    # rewording draws one seed per caption that is kept
    seen.clear()
    kind = words(vary=lambda caption, rng: f"{caption} {rng.integers(1000)}")
    torch.manual_seed(3)
    kind.batch(model, np.array([2, 0, 1]), torch.tensor([False, True, False]))
    torch.manual_seed(3)
    numbers = [np.random.default_rng(torch.randint(2**31, ()).item()).integers(1000) for _ in range(2)]
    assert seen == [f"blue {numbers[0]}", "", f"green {numbers[1]}"]


def test_prompt_dropout_is_per_example_and_once(cwd, text_runs, monkeypatch, tmp_path):
    args = settings.parse(["--arch", "mmdit", "--data", "scenes", *ON_VAE, "--label-dropout", "0.3"])
    planned = plan.prepare(args)
    planned.vae = checkpoints.load_vae("runs/scenes-vae")
    parts = datasets(args, words="captions")
    planned.conditioning.attach(*parts, tmp_path, resumed=True)
    task = train.Denoising(args, *parts, planned, Path("runs/scenes-vae"))

    def model(xt, t):
        return torch.zeros_like(xt)

    model.text, seen = None, []
    monkeypatch.setattr(conditioning, "network_inputs",
                        lambda model, encode, prompts, *more: seen.extend(prompts) or {})
    indices = np.arange(len(parts[0])).repeat(20)
    task.loss(model, indices)
    assert abs(seen.count("") / len(seen) - 0.3) < 5 * (0.3 * 0.7 / len(seen)) ** 0.5
    assert all(prompt in ("", parts[0].captions[i]) for prompt, i in zip(seen, indices, strict=True))
    # a frozen encoder has encoded the captions as they are
    varied = replace(parts[0], vary=toys.omit_details)
    planned.conditioning.attach(varied, parts[1], tmp_path, resumed=True)
    assert planned.conditioning.vary is toys.omit_details
    frozen = conditioning.of_settings("text", {"encoder": "clip", "path": "x"}, 0.3, CPU)
    frozen.encoder, frozen.fingerprint = FakeEncoder(), "fake"
    encoder = frozen.encoder
    frozen.attach(varied, parts[1], tmp_path, resumed=True)
    assert frozen.vary is None and frozen.encoder is None
    assert set(encoder.encoded) == {"", *parts[0].captions, *parts[1].captions}


def test_outputs_of_a_frozen_encoder_are_cached_and_checked(tmp_path):
    model = SimpleNamespace(config=SimpleNamespace(context_width=4, pooled_width=3))
    kind = conditioning.of_settings("text", {"encoder": "clip", "path": "x"}, 0.1, CPU)
    kind.encoder, kind.fingerprint = FakeEncoder(), "fake"
    captions = ["red", "green", "yellow"]
    part = Dataset(np.zeros((3, 8, 8, 3), np.uint8), None, [], "demo", captions=captions)
    kind.attach(part, part, tmp_path, resumed=True)
    assert (tmp_path / "text-clip.bin").is_file()
    cond = kind.batch(model, np.array([1, 2, 0]), torch.tensor([False, False, True]))
    assert cond["pooled"][:, 0].tolist() == [5, 6, 0] and cond["context"].shape == (3, 2, 4)
    assert kind.validation(model)["pooled"][:, 0].tolist() == [3, 5, 6]
    asked = kind.preview(model, rows=1)
    assert asked.turn.tolist() == [0, 1, 2, 0, 1, 2, 0, 1] and asked.columns == 8
    assert asked.every["pooled"][:, 0].tolist() == [3, 5, 6, 0]                    # the null condition last
    assert asked.captions == ["red", "green", "yellow", "red", "green", "yellow", "red", "green"]
    # a network without a pooled vector gets none; another width is refused
    model.config.pooled_width = None
    assert set(kind.validation(model)) == {"context", "mask"}
    model.config.context_width = 5
    with pytest.raises(ValueError, match=r"text vectors \(context\) of width 4: this network takes 5"):
        kind.validation(model)


@pytest.mark.parametrize("arch, preset, expected", [
    ("mmdit", {}, {"context_width": 16, "pooled_width": 12, "guidance": False}),
    ("unet", {}, {"context_width": 16, "pooled_width": 12, "attention": (True, True), "positions": True}),
    ("unet", {"widths": (8, 8, 8)}, {"context_width": 16, "pooled_width": 12, "positions": True,
                                     "attention": (True, True, True)}),
    ("unet", {"context_width": 768}, {"context_width": 16}),
])
def test_options_of_a_network_with_text(arch, preset, expected):
    kind = conditioning.of_settings("text", {"encoder": "clip", "path": "x"}, 0.1, CPU)
    kind.widths = TextWidths(16, 12)
    found = kind.network_options(arch, preset)
    assert {name: found[name] for name in expected} == expected
    if preset.get("context_width"):
        assert not found.get("positions") and "attention" not in found


def test_captions_too_long_are_counted(capsys):
    words(captions=["one two three", "one two three four five"], resumed=False)
    assert "1 of 2 captions are longer than the encoder's limit and are truncated; the first of them loses " \
           "'four five'" in capsys.readouterr().err
    words(captions=["one two three"], resumed=False)
    assert capsys.readouterr().err == ""
    words(captions=["one two three four five"], resumed=True)                 # warned of when the run began
    assert capsys.readouterr().err == ""
    # for a frozen encoder, its own limit counts
    kind = conditioning.of_settings("text", {"encoder": "clip", "path": "x"}, 0.1, CPU)
    kind.encoder, kind.captions = FakeEncoder(), ["short", "exactly as long as this is"]
    kind.warn_of_truncation()
    assert "1 of 2 captions" in capsys.readouterr().err


def test_previews_of_prompts_of_ones_own(tmp_path):
    """In turn, a row or several; a frozen encoder encodes them once, and again where they have changed."""
    model = SimpleNamespace(config=SimpleNamespace(context_width=4, pooled_width=3))
    part = Dataset(np.zeros((2, 8, 8, 3), np.uint8), None, [], "demo", captions=["red", "green"])
    for prompts, encoded in ((["one", "three", "x" * 400], 4), (["three"], 2), (["three"], 0)):
        kind = conditioning.of_settings("text", {"encoder": "clip", "path": "x"}, 0.1, CPU)
        kind.encoder, kind.fingerprint, kind.preview_prompts = FakeEncoder(), "fake", prompts
        encoder = kind.encoder
        kind.attach(part, part, tmp_path, resumed=True)
        assert len(set(encoder.encoded) - {"red", "green"}) == encoded
        asked = kind.preview(model, rows=2)
        assert asked.columns == len(prompts) and asked.turn.tolist() == 2 * list(range(len(prompts)))
        assert asked.every["pooled"][:, 0].tolist() == [*map(len, prompts), 0]
        assert asked.names == prompts and max(map(len, asked.captions)) < 310
        assert kind.batch(model, np.array([1, 0]), none_dropped(2))["pooled"][:, 0].tolist() == [5, 3]
    many = words()
    many.preview_prompts = [f"{i} words" for i in range(20)]
    model = SimpleNamespace(config=SimpleNamespace(context_width=32, pooled_width=32),
                            text=TextEncoder(TextConfig(**SMALL["config"])).eval())
    asked = many.preview(model, rows=2)
    assert asked.columns == 8 and asked.turn.tolist() == list(range(16)) and len(asked.every["pooled"]) == 17


# ---- text in sampling

def test_prompts_that_are_asked_for(capsys):
    kind = conditioning.of_checkpoint(checkpoint(text=SMALL, prompts=["one", "two", "three"]), CPU)
    model = SimpleNamespace(config=SimpleNamespace(context_width=32, pooled_width=32),
                            text=TextEncoder(TextConfig(**SMALL["config"])).eval())

    def ask(n, **given):
        with torch.no_grad():
            return kind.ask(argparse.Namespace(n=n, **FLAGS | given), model)

    asked = ask(5, prompt=["a red  circle", "blue", "a red circle"])               # spaces do not matter
    assert asked.names == ["a red circle", "blue"] and asked.turn.tolist() == [0, 1, 0, 0, 1]
    assert asked.columns == 2 and asked.captions == ["a red circle", "blue", "a red circle", "a red circle",
                                                     "blue"]
    assert asked.every["context"].shape[0] == asked.every["mask"].shape[0] == 3     # and the null condition
    torch.testing.assert_close(asked.every["pooled"][2:], model.text([""])["pooled"])
    assert ask(2, prompt=["a", "b", "c"]).names == ["a", "b"]
    assert ask(2).names == ["one", "two"] and ask(1, prompt=["a"]).columns is None
    negative = ask(1, prompt=["a"], negative_prompt="blue").every["pooled"][1:]
    torch.testing.assert_close(negative, model.text(["blue"])["pooled"])
    assert capsys.readouterr().err == (
        "--prompt: the first 2 of 3 prompts are drawn; --n 3 draws each of them\n")
    ask(1, prompt=["one two three four"], negative_prompt="five six seven eight nine")
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and "loses 'four'" in err[0] and "loses 'eight nine'" in err[1]


def test_what_is_printed_is_short(capsys):
    """Whatever the length of a caption, a prompt or a name."""
    long = "one two three " + "four " * 5000
    words(captions=[long, "red"], resumed=False)
    kind = conditioning.of_checkpoint(checkpoint(text=SMALL, prompts=["one"]), CPU)
    model = SimpleNamespace(config=SimpleNamespace(context_width=32, pooled_width=32),
                            text=TextEncoder(TextConfig(**SMALL["config"])).eval())
    prompts = [f"{i} {long}" for i in range(9)]
    asked = kind.ask(argparse.Namespace(n=9, **FLAGS | {"prompt": prompts}), model)
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 5 and max(map(len, err)) < 250 and "so are 6 more prompts" in err[-1]
    assert max(map(len, asked.captions)) < 310 and [name.strip() for name in asked.names] == [
        prompt.strip() for prompt in prompts]
    preview = words(captions=[long, "red"]).preview(model, rows=1)
    assert max(map(len, preview.captions)) < 310
    for given in ({"label": "x" * 9999}, {"prompt": ["y" * 9999]}):
        stored = {"classes": ["red"]}
        kind = conditioning.of_checkpoint(checkpoint(**stored), CPU)
        with pytest.raises(ValueError) as refused:
            args = argparse.Namespace(n=1, **FLAGS | given)
            conditioning.check_flags(kind, args)
            kind.ask(args, None)
        assert len(str(refused.value)) < 250


@pytest.mark.parametrize("content, prompts", [
    (b"a red circle\nblue\n", ["a red circle", "blue"]),
    (b"\xef\xbb\xbfa\r\n\r\n  \r\nb\r\n", ["a", "b"]),                   # as Windows saves it
    ("緑の円\nun café\u2028au  lait".encode(), ["緑の円", "un café au lait"]),
    (b"\n".join(b"%d" % i for i in range(1000)), [str(i) for i in range(1000)]),
    (b"", None), (b" \n\n", None), (b"caf\xe9", None), (b"\xff\xfea\0", None),
])
def test_prompts_from_a_file(tmp_path, content, prompts):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    kind = conditioning.of_checkpoint(checkpoint(text=SMALL), CPU)
    args = argparse.Namespace(**FLAGS | {"prompts": str(file)})
    if prompts:
        conditioning.check_flags(kind, args)
        assert args.prompt == prompts
    else:
        with pytest.raises(ValueError, match=f"--prompts {file}: ") as refused:
            conditioning.check_flags(kind, args)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="give one of them"):
        conditioning.check_flags(kind, argparse.Namespace(**FLAGS | {"prompts": str(file), "prompt": ["a"]}))


@pytest.mark.skipif(os.name == "nt", reason="pipes")
def test_prompts_from_a_pipe(tmp_path):
    """A shell's <(...) is one. One that nobody writes to is not waited for."""
    reader, writer = os.pipe()
    os.write(writer, b"red\nblue")
    os.close(writer)
    assert conditioning.read_prompts("--prompts", f"/dev/fd/{reader}") == ["red", "blue"]
    os.close(reader)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="--prompts .*pipe: is empty"):
        conditioning.read_prompts("--prompts", str(tmp_path / "pipe"))


@pytest.mark.parametrize("name, message", [
    (".", "is a folder, not a text file"), ("none.txt", "no such file"), ("/dev/zero", "is a device, not a"),
    ("latin.txt", "not in UTF-8; save it in that encoding"), ("long.txt", "is too long; at most 10 KiB are")])
def test_what_is_no_file_of_prompts(tmp_path, monkeypatch, name, message):
    monkeypatch.setattr(conditioning, "LONGEST_FILE", 10 * 2**10)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "long.txt").write_bytes(b"x" * (10 * 2**10 + 1))
    with pytest.raises(ValueError, match=f"--prompts .*: {message}"):
        conditioning.read_prompts("--prompts", str(tmp_path / name))


def test_many_prompts_are_encoded_batch_by_batch(monkeypatch, capsys):
    """Each batch has the conditions that it would have if all were encoded at once."""
    kind = conditioning.of_checkpoint(checkpoint(text=SMALL), CPU)
    model = SimpleNamespace(config=SimpleNamespace(context_width=32, pooled_width=32),
                            text=TextEncoder(TextConfig(**SMALL["config"])).eval())
    prompts = [f"{i % 40} words" for i in range(60)]
    args = argparse.Namespace(n=50, **FLAGS | {"prompt": prompts, "prompts": "x", "negative_prompt": "no"})
    at_once = kind.ask(args, model)
    assert "--prompts x: the first 50 of 60 prompts are drawn; --n 60" in capsys.readouterr().err
    monkeypatch.setattr(conditioning, "ENCODED_AT_ONCE", 8)
    later = kind.ask(args, model)
    assert later.every == {} and later.names == at_once.names and later.turn.equal(at_once.turn)
    for start, size in ((0, 7), (35, 15), (49, 1)):
        for found, wanted in zip(later.batch(start, size), at_once.batch(start, size)):
            assert found["pooled"].shape == (size, 32) and found["pooled"].requires_grad is False
            torch.testing.assert_close(found["pooled"], wanted["pooled"], rtol=1e-5, atol=1e-6)


def test_vectors_of_differing_widths_are_refused_at_the_start(tmp_path, monkeypatch):
    """In training before the VAE is trained; in sampling before the first picture."""
    def write(name, width, pooled):
        arrays = {"context": np.ones((2, width), np.float32)}
        if pooled:
            arrays["pooled"] = np.ones(pooled, np.float32)
        np.savez(tmp_path / name, **arrays)
        return str(tmp_path / name)

    same = [write(f"{i}.npz", 5, 3) for i in range(4)]
    folder = SimpleNamespace(words=same)
    kind = conditioning.of_settings("text", {"encoder": "none"}, 0.1, CPU)
    kind.load_encoder(str(tmp_path), folder)
    assert kind.widths == (5, 3)
    (tmp_path / "broken.npz").write_bytes(b"PK")
    model = SimpleNamespace(config=SimpleNamespace(context_width=5, pooled_width=3))
    monkeypatch.setattr(conditioning, "ENCODED_AT_ONCE", 2)
    for other, message in ((write("wide.npz", 6, 3), "wide.npz: context 6 wide"),
                           (write("pooled.npz", 5, 4), "pooled.npz: context 5 wide, pooled 4"),
                           (write("lacking.npz", 5, None), "lacking.npz: context 5 wide, no pooled"),
                           (str(tmp_path / "broken.npz"), "broken.npz: not an .npz with context")):
        folder.words = [*same, other]
        with pytest.raises(ValueError, match=message):
            kind.load_encoder(str(tmp_path), folder)
        with pytest.raises(ValueError, match="of width|need the same widths|not an .npz"):
            kind.ask(argparse.Namespace(n=5, **FLAGS | {"embedding": [*same, other]}), model)


@pytest.mark.parametrize("which", [0, 1])
def test_prompts(cwd, text_runs, which, capsys):
    folder = text_runs[which]
    stored = checkpoints.load_checkpoint(folder)
    assert stored["text"]["encoder"] == "bytes" and len(stored["data"]["prompts"]) == 10
    assert stored["label_dropout"] == 0.1 and any(name.startswith("text.") for name in stored["ema"])
    losses = [line["loss"] for line in map(json.loads, open(f"{folder}/metrics.jsonl")) if "loss" in line]
    assert losses[-1] < 0.97 * losses[0]                                                       # it learns
    red, blue = (draw_two(folder, "--prompt", prompt, "--cfg", "3") for prompt in ("a red circle", "blue"))
    assert np.abs(red - blue).max() > 2                                                 # the prompt matters
    # several in turn; neither the batch nor the length of a neighbour's prompt changes a picture
    both = draw_two(folder, "--prompt", "a red circle", "blue and of many more words", "--cfg", "3")
    assert np.abs(both[0] - red[0]).max() <= 1 and np.abs(both[1] - red[1]).max() > 2
    thrice = draw_two(folder, "--prompt", "blue", "blue", "a red circle", "--n", "5", "--cfg", "3")
    assert np.abs(thrice[:2] - blue).max() <= 1
    again = draw_two(folder, "--prompt", "blue", "blue", "a red circle", "blue", "blue", "--n", "5",
                     "--cfg", "3")
    assert (thrice == again).all()
    # an empty prompt is the unconditional branch, whatever the scale
    empty = [draw_two(folder, "--prompt", "", "--cfg", scale) for scale in ("1", "4")]
    assert np.abs(empty[0] - empty[1]).max() <= 1
    assert np.abs(draw_two(folder, "--cfg", "0") - empty[0]).max() <= 1
    # a negative prompt takes its place: guidance from a prompt to itself is no guidance
    same_twice = draw_two(folder, "--prompt", "a red circle", "--negative-prompt", "a red circle",
                          "--cfg", "5")
    assert np.abs(same_twice - draw_two(folder, "--prompt", "a red circle", "--cfg", "1")).max() <= 1
    assert np.abs(red - draw_two(folder, "--prompt", "a red circle", "--cfg", "3", "--negative-prompt",
                                 "blue")).max() > 0
    assert np.abs(red - draw_two(folder, "--prompt", "a red circle", "--cfg", "3", "--rescale",
                                 "1")).max() > 0
    capsys.readouterr()
    draw_two(folder, "--prompt", "緑の円 🟢 " + "very " * 80 + "long")
    assert "loses 'very very" in capsys.readouterr().err
    sample.main([folder, "--steps", "3", "--n", "3", "--out", "named", "--prompt", "a/b: c"])
    assert {path.name for path in Path("named").iterdir()} >= {"000000-a-b-c.png"}


def test_precomputed_vectors_train_and_draw(cwd, text_runs):
    for i in range(24):
        folder = Path("vectors")
        folder.mkdir(exist_ok=True)
        Image.fromarray(toys.draw_shape(i)).save(folder / f"{i}.png")
        np.savez(folder / f"{i}.npz", context=np.full((2 + i % 3, 5), i / 24), pooled=np.full(3, i / 24))
    flags = ["--data", "vectors", "--cond", "text", "--text-encoder", "none", *QUICK, "--batch-size", "8",
             "--vae", "runs/shapes-vae"]
    for arch in ("mmdit", "unet"):
        train.main(["--arch", arch, *flags, "--name", f"vectors-{arch}"])
        config = checkpoints.load_checkpoint(f"runs/vectors-{arch}")["config"]
        assert config["context_width"] == 5 and config.get("pooled_width", 3) == 3
        a = draw_two(f"runs/vectors-{arch}", "--embedding", "vectors/1.npz")
        assert a.shape == (2, 32, 32, 3)
        with pytest.raises(ValueError, match="give some by --embedding"):
            sample.main([f"runs/vectors-{arch}"])
        np.savez("lacking.npz", context=np.ones((2, 5)))
        with pytest.raises(ValueError, match=r"text vectors \(pooled\) of width None: .* takes 3"):
            sample.main([f"runs/vectors-{arch}", "--embedding", "lacking.npz"])
        with pytest.raises(ValueError, match="--prompt hello: .* use --embedding"):
            sample.main([f"runs/vectors-{arch}", "--prompt", "hello"])
    train.main(["--arch", "mmdit", *flags, "--init-from", "runs/vectors-mmdit", "--name", "vectors-further"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_network_inputs_are_float32(dtype):
    """Whatever an encoder returns: networks have float32 weights, in training and in sampling."""
    model = SimpleNamespace(config=SimpleNamespace(context_width=4, pooled_width=3))

    def encode(prompts):
        return {"context": torch.ones(1, 2, 4, dtype=dtype), "mask": torch.ones(1, 2).bool(),
                "pooled": torch.ones(1, 3, dtype=dtype)}

    inputs = conditioning.network_inputs(model, encode, ["a"], CPU)
    assert inputs["context"].dtype == inputs["pooled"].dtype == torch.float32
    assert inputs["mask"].dtype == torch.bool


@pytest.mark.optional
@pytest.mark.parametrize("kind, arch, dtype, precision", [
    ("clip", "mmdit", torch.float16, "fp32"), ("clip", "unet", torch.bfloat16, "fp32"),
    ("t5", "mmdit", torch.bfloat16, "bf16"), ("t5", "unet", torch.float16, "bf16"),
])
def test_encoders_in_half_precision_train_and_draw(cwd, text_runs, published, tmp_path, kind, arch, dtype,
                                                   precision):
    encoder = in_precision(published / kind, tmp_path / "half", dtype)
    name = f"half-{kind}-{arch}"
    flags = [*ON_VAE, "--batch-size", "8", "--precision", precision]
    train.main(["--arch", arch, "--data", "scenes", "--cond", "text", *flags, "--text-encoder",
                f"{kind}:{encoder}", "--name", name, "--cache-dir", str(tmp_path / "cache")])
    red = draw_two(f"runs/{name}", "--prompt", "a red circle", "--precision", precision)
    assert red.shape == (2, 32, 32, 3)


@pytest.mark.optional
def test_frozen_encoder_trains_and_draws(cwd, text_runs, published, capsys):
    flags = ["--data", "scenes", "--cond", "text", *ON_VAE, "--batch-size", "8"]
    for kind, arch, pooled in (("clip", "mmdit", 12), ("t5", "mmdit", None), ("clip", "unet", 12)):
        name = f"{kind}-{arch}"
        train.main(["--arch", arch, *flags, "--text-encoder", f"{kind}:{published / kind}", "--name", name])
        stored = checkpoints.load_checkpoint(f"runs/{name}")
        assert stored["text"] == {"encoder": kind, "path": str(published / kind)}
        config = stored["config"]
        assert config["context_width"] == 16 and config.get("pooled_width", pooled) == pooled
        assert not any(weight.startswith("text.") for weight in stored["ema"])     # it stays where it was
        red, blue = (draw_two(f"runs/{name}", "--prompt", prompt) for prompt in ("a red circle", "blue"))
        assert red.shape == (2, 32, 32, 3)
    moved = published / "elsewhere"
    moved.symlink_to(published / "clip")
    again = draw_two("runs/clip-unet", "--prompt", "blue", "--text-encoder", f"clip:{moved}")
    assert (again == blue).all()
    # it may move, but its outputs must be the same when a run goes on
    train.main(["--arch", "unet", *flags, "--text-encoder", f"clip:{moved}", "--name", "clip-unet"])
    stored = torch.load("runs/clip-unet/checkpoint.pt", weights_only=True)
    stored["training"] |= {"finished": False, "encoder": "another"}
    shutil.copytree("runs/clip-unet", "runs/clip-other")
    torch.save(stored, "runs/clip-other/checkpoint.pt")
    with pytest.raises(ValueError, match="not the files that runs/clip-other began with"):
        train.main(["--arch", "unet", *flags, "--text-encoder", f"clip:{moved}", "--name", "clip-other"])
    with pytest.raises(ValueError, match="this run was trained with clip:PATH"):
        sample.main(["runs/clip-unet", "--prompt", "blue", "--text-encoder", f"t5:{published / 't5'}"])


@pytest.mark.optional
def test_recipes_train_and_draw(cwd, text_runs, pipelines, capsys):
    """The encoders of a published model, joined as it joins them, condition a network of our own."""
    flags = ["--data", "scenes", "--cond", "text", *ON_VAE, "--batch-size", "8"]
    for kind, arch, width, pooled, more in (
            ("sd3", "mmdit", 40, 40, []), ("sd3", "mmdit", 4096, 40, ["--no-t5"]),
            ("sdxl", "unet", 40, 24, []), ("flux-schnell", "mmdit", 40, 16, [])):
        folder = pipelines[kind][1]
        name = "-".join([kind, *more])
        command = ["--arch", arch, *flags, "--text-encoder", f"{kind}:{folder}", *more, "--name", name]
        train.main(command)
        stored = checkpoints.load_checkpoint(f"runs/{name}")
        assert stored["text"] == {"encoder": kind, "path": folder} | ({"no_t5": True} if more else {})
        assert stored["config"]["context_width"] == width and stored["config"]["pooled_width"] == pooled
        asked = argparse.Namespace(text_encoder=None)
        encode = conditioning.of_checkpoint(stored, CPU).sampling_encoder(None, asked)
        torch.testing.assert_close(encode(["blue"]),
                                   encoders.from_folder(kind, folder, no_t5=bool(more))(["blue"]))
        assert (encode([""])["context"].any() == (kind != "sdxl")).all()     # its null condition is zeros
        assert draw_two(f"runs/{name}", "--prompt", "blue").shape == (2, 32, 32, 3)
        capsys.readouterr()
        train.main(command)                                                  # with the cache that it has left
        assert "is finished" in capsys.readouterr().out
    assert len(list(Path("runs/scenes-vae").glob("text-sd3*.bin"))) == 2
    with pytest.raises(ValueError, match="this run was trained with sdxl:PATH"):
        sample.main(["runs/sdxl", "--prompt", "blue", "--text-encoder", f"sd3:{folder}"])
    empty = [draw_two("runs/sdxl", *asked) for asked in (["--prompt", "", "--cfg", "1"], ["--cfg", "0"])]
    assert np.abs(empty[0] - empty[1]).max() <= 1
