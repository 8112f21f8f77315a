"""Sounds from train.py to sample.py: networks on latents one row high, lengths, files, and refusals."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import contents, same, weights
from PIL import Image

import checkpoints
import conditioning
import media
import networks
import output
import sample
import settings
import sound
import tones
import train
from audio_vae import AudioVAE
from data import load_data
from dit import DiT, DiTConfig, LengthEmbedder, TimestepEmbedder, position_angles, rope_tables
from tones import RATE, TONE_CLASSES, read_tone, seconds_of_tone
from unet import Resample, UNet, UNetConfig

ON_VAE = ["--data", "tones", "--preset", "tiny", "--steps", "3", "--batch-size", "8", "--precision", "fp32",
          "--preview-every", "1000", "--log-every", "1"]
QUICK = [*ON_VAE, "--vae-preset", "tiny", "--vae-steps", "4"]
DIT = ["--arch", "dit", *QUICK, "--name", "dit"]


def few_tones(monkeypatch):
    monkeypatch.setattr(train, "load_data", functools.partial(load_data, count=96))
    monkeypatch.setattr(train, "SAMPLE_ROWS", 1)
    for name, row in list(settings.OBJECTIVES.items()):
        monkeypatch.setitem(settings.OBJECTIVES, name, row._replace(steps=2))


@pytest.fixture(scope="module")
def tones_home(tmp_path_factory):
    """A tiny VAE of tones and a DiT on it."""
    folder = tmp_path_factory.mktemp("tones")
    with pytest.MonkeyPatch.context() as patch:
        few_tones(patch)
        patch.chdir(folder)
        train.main(DIT)
    return folder


@pytest.fixture
def place(tones_home, monkeypatch):
    few_tones(monkeypatch)
    monkeypatch.chdir(tones_home)
    return tones_home


# ---- networks on latents one row high

def test_positions_of_one_row_turn_with_time_alone():
    cos, sin = rope_tables(1, 7, 16, 100.0)
    assert (cos[:, :4] == 1).all() and (sin[:, :4] == 0).all()
    angles = position_angles(torch.arange(7, dtype=torch.float64), 4, 100.0)
    assert torch.allclose(cos[:, 4:].double(), angles.cos(), atol=1e-7)


def test_a_level_of_a_unet_halves_time_alone():
    x = torch.randn(2, 8, 1, 12)
    down, up = Resample(8, (1, 2), up=False), Resample(8, (1, 2), up=True)
    middle = down.conv.weight[:, :, 1]          # of the rows of a kernel, the two others see only padding
    assert torch.allclose(down(x)[:, :, 0], F.conv1d(x[:, :, 0], middle, down.conv.bias, 2, 1), atol=1e-6)
    twice = x[:, :, 0].repeat_interleave(2, -1)
    assert torch.allclose(up(x)[:, :, 0], F.conv1d(twice, up.conv.weight[:, :, 1], up.conv.bias, 1, 1),
                          atol=1e-6)


def test_a_unet_of_sounds_takes_what_its_levels_divide():
    model = UNet(UNetConfig(channels=3, widths=(8, 8, 8), attention=(False, False, True), groups=4,
                            strides=(1, 2)))
    assert model.factors == (1, 4)
    assert model(torch.randn(2, 3, 1, 8), torch.rand(2)).shape == (2, 3, 1, 8)
    with pytest.raises(ValueError, match="latent 1x6: both sides must be multiples of 1 and 4"):
        model(torch.randn(2, 3, 1, 6), torch.rand(2))


def test_a_length_is_embedded_as_a_time():
    lengths, times = LengthEmbedder(16, 2.5), TimestepEmbedder(16, 1000.0, 0.0)
    times.load_state_dict(lengths.state_dict())
    seconds = torch.tensor([0.1, 1.0, 2.5])
    assert torch.allclose(lengths(seconds), times(seconds / 2.5), atol=1e-5)


@pytest.mark.parametrize("arch", ["dit", "unet", "mmdit"])
def test_the_length_reaches_the_output(arch):
    row = settings.ARCHITECTURES[arch]
    options = {"strides": (1, 2)} if arch == "unet" else {"patch": (1, 2)}
    if arch == "mmdit":
        options |= {"context_width": 8, "pooled_width": None}
    model = row.model(row.config(**row.presets["tiny"] | options | {"channels": 4, "longest": 2.0}))
    with torch.no_grad():
        for weight in model.parameters():       # outputs begin at zero
            weight.add_(0.05 * torch.randn_like(weight))
    x, t = torch.randn(1, 4, 1, 8).expand(3, -1, -1, -1), torch.full((3,), 0.5)
    more = {"context": torch.randn(1, 2, 8).expand(3, -1, -1)} if arch == "mmdit" else {}
    out = model(x, t, seconds=torch.tensor([1.0, 1.0, 1.5]), **more)
    assert torch.equal(out[0], out[1]) and (out[0] - out[2]).abs().max() > 1e-3


def test_a_network_without_lengths_is_as_before():
    torch.manual_seed(0)
    plain = DiT(DiTConfig(width=32, depth=1, heads=2))
    assert not any("length" in name for name in plain.state_dict())


# ---- settings

def test_the_size_of_sounds_follows_from_seconds_and_rate():
    args = settings.parse(["--arch", "dit", "--data", "tones"])
    assert (args.rate, args.seconds, args.image_size, args.name) == (8000, 1.024, [1, 8192], "tones-dit-rf")
    args = settings.parse(["--arch", "unet", "--data", "tones", "--seconds", "2", "--objective", "ddpm"])
    assert args.image_size == [1, 16384] and args.name == "tones-2s-unet-ddpm"     # rounded up
    vae = settings.vae_settings(args, None)
    assert (vae.rate, vae.image_size, vae.latent_channels, vae.name) == (8000, [1, 16384], 16, "tones-2s-vae")


@pytest.mark.parametrize("words, message", [
    (["--data", "shapes", "--seconds", "1"], "--seconds 1.0: belongs to sounds, and --data shapes"),
    (["--data", "shapes", "--waveform-weight", "3"], "--waveform-weight 3.0: belongs to sounds, and --data"),
    (["--data", "nowhere", "--waveform-weight", "3"], "--waveform-weight 3: belongs to sounds; leave it out"),
    (["--data", "tones", "--rate", "16000"], "--rate 16000: the sounds of --data tones have 8000"),
    (["--data", "tones", "--image-size", "64"], "--image-size 64: is for pictures, .*; give --seconds"),
    (["--data", "tones", "--flip"], "--flip: is for pictures"),
    (["--data", "tones", "--aspect"], "--aspect: is for pictures"),
    (["--data", "tones", "--reflow", "runs/a"], "--reflow runs/a: is for pictures"),
    (["--data", "tones", "--vae-widths", "8", "16"], "--vae-widths 8 16: is for pictures"),
    (["--data", "tones", "--patch", "2", "4"], "--patch 2 4: latents of sounds are one row high; give "
                                               "--patch 4"),
    (["--data", "tones", "--vae-preset", "sd"], "--vae-preset sd: for sounds, audio_vae.py has"),
    (["--data", "shapes", "--vae-preset", "medium"], "--vae-preset medium: for pictures, vae.py has tiny, "),
    (["--data", "nowhere", "--rate", "8000"], "--rate 8000: belongs to a folder of sounds; give --seconds"),
    (["--data", "a/{0..1}.tar", "--seconds", "1"], "--seconds 1: tar shards hold pictures"),
])
def test_flags_of_the_other_medium_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        settings.parse(["--arch", "dit", *words])


def test_a_vae_of_the_other_medium_is_refused(place, capsys):
    with pytest.raises(ValueError, match="--vae runs/tones-vae: is for sounds of 8000 Hz, and --data shapes "
                                         "has pictures"):
        train.main(["--arch", "dit", "--vae", "runs/tones-vae", "--preset", "tiny", "--name", "other"])
    assert not (place / "runs/other").exists()


# ---- training

def test_a_training_on_tones_and_its_checkpoint(place):
    checkpoint = checkpoints.load_checkpoint("runs/dit")
    assert checkpoint["data"]["size"] == [1, 8192] and checkpoint["data"]["classes"] == TONE_CLASSES
    assert checkpoint["data"]["longest"] == 1.024 and checkpoint["config"]["patch"] == (1, 2)
    first = 10**9 - 10**9 % len(TONE_CLASSES)           # the first validation sound
    assert checkpoint["data"]["seconds"] == pytest.approx([seconds_of_tone(first + i) for i in range(8 * 24)])
    vae = networks.unpack_vae(checkpoint["vae"])
    assert vae.config.rate == RATE and (vae.latent_std != 1).all()          # measured
    for name in ("samples.png", "loss.png"):
        Image.open(place / "runs/dit" / name).verify()


def test_the_weight_of_the_waveform_reaches_the_loss(place, monkeypatch):
    args = settings.parse([*DIT, "--waveform-weight", "3"])
    assert settings.vae_settings(args, None).waveform_weight == 3
    asked = set()

    def loss(self, *args, **more):
        asked.add(more["waveform"])
        return AudioVAE.loss_of(self, *args, **more)

    monkeypatch.setattr(AudioVAE, "loss_of", AudioVAE.loss, raising=False)
    monkeypatch.setattr(AudioVAE, "loss", loss)
    train.main(["--arch", "vae", "--data", "tones", "--vae-preset", "tiny", "--steps", "2", "--precision",
                "fp32", "--waveform-weight", "3", "--name", "heard"])      # trains and validates
    assert asked == {3.0}


@pytest.mark.parametrize("more", [["--objective", "meanflow"],
                                  ["--objective", "ddpm", "--prediction", "v"]])
def test_a_run_goes_on_bit_for_bit(place, more):
    words = ["--arch", "dit", *QUICK, *more, "--cooldown", "0", "--save-every", "2"]
    name = more[1]
    train.main([*words, "--steps", "4", "--name", f"{name}-whole"])
    train.main([*words, "--steps", "2", "--name", f"{name}-parts"])
    train.main([*words, "--steps", "4", "--name", f"{name}-parts"])
    assert same(weights(f"runs/{name}-whole"), weights(f"runs/{name}-parts"))


@pytest.mark.parametrize("objective", ["rf", "ddpm"])
@pytest.mark.parametrize("arch", ["unet", "mmdit"])
def test_captions_of_sounds(place, arch, objective):
    name = f"{arch}-{objective}"
    train.main(["--arch", arch, "--objective", objective, "--cond", "text", *ON_VAE, "--vae",
                "runs/tones-vae", "--name", name])
    checkpoint = checkpoints.load_checkpoint(f"runs/{name}")
    assert checkpoint["objective"]["name"] == objective and checkpoint["text"] is not None
    sample.main([f"runs/{name}", "--prompt", "a low square tone, then a high sine", "--n", "1", "--seconds",
                 "0.8", "--out", f"{name}.wav"])
    assert len(sound.read_sound(f"{name}.wav", RATE)) == 6400


# ---- what sample.py writes

def draw(*flags):
    sample.main(["runs/dit", "--steps", "2", *flags])


def test_lengths_files_and_batches(place):
    lengths = checkpoints.load_checkpoint("runs/dit")["data"]["seconds"]
    draw("--n", "3", "--seed", "5", "--out", "all.npz")
    drawn = np.load("all.npz")["arr_0"]
    assert drawn.dtype == np.int16 and drawn.shape == (3, 8192)
    draw("--n", "3", "--seed", "5", "--out", "folder", "--batch-size", "1")     # one by one: the same
    names = sorted(contents(place / "folder"))
    assert names == [f"00000{5 + i}-{TONE_CLASSES[i]}.wav" for i in range(3)]
    ends = [round(seconds * RATE) for seconds in lengths[:3]]
    for i, name in enumerate(names):
        written = sound.read_sound(place / "folder" / name, RATE)
        assert len(written) == ends[i] < 8192
        assert np.abs(written.astype(int) - drawn[i, :ends[i]]).max() <= 1
    draw("--n", "3", "--seed", "5", "--out", "all.wav")
    pause = round(output.PAUSE * RATE)
    assert len(sound.read_sound("all.wav", RATE)) == sum(ends) + 2 * pause
    draw("--n", "2", "--label", "low-sine", "--seconds", "0.5", "--out", "short")
    assert all(len(sound.read_sound(file, RATE)) == 4000 for file in (place / "short").iterdir())


def test_a_length_beyond_the_training(place, capsys):
    draw("--n", "1", "--seconds", "1.5", "--out", "long.npz")
    assert np.load("long.npz")["arr_0"].shape == (1, 12032)                # a multiple of 256 samples
    assert "trained on sounds of at most 1.024 seconds" in capsys.readouterr().err


def test_an_interrupted_folder_goes_on(place, monkeypatch):
    draw("--n", "4", "--out", "whole", "--batch-size", "2")

    write_wav = sound.write_wav

    def write(*args, **more):
        if "000002" in str(args[0]):
            raise KeyboardInterrupt
        return write_wav(*args, **more)

    monkeypatch.setattr(sound, "write_wav", write)
    with pytest.raises(SystemExit):
        draw("--n", "4", "--out", "parts", "--batch-size", "2")
    monkeypatch.setattr(sound, "write_wav", write_wav)
    draw("--n", "4", "--out", "parts", "--batch-size", "2")
    assert contents(place / "parts") == contents(place / "whole")
    for name in contents(place / "whole"):
        assert (place / "parts" / name).read_bytes() == (place / "whole" / name).read_bytes()


def test_a_sound_is_redrawn_within_a_mask_alone(place):
    draw("--n", "1", "--seconds", "1", "--out", "given.wav", "--seed", "3")
    given = sound.read_sound("given.wav", RATE)
    draw("--n", "2", "--init-sound", "given.wav", "--mask", "0.25-0.5", "--out", "redrawn", "--seed", "9")
    for file in (place / "redrawn").iterdir():
        redrawn = sound.read_sound(file, RATE)
        assert redrawn.shape == given.shape                    # as long as the given one
        changed = np.flatnonzero(redrawn != given)
        assert 2000 <= changed.min() and changed.max() < 4000 and len(changed) > 1000


@pytest.mark.parametrize("mask, seconds, samples", [
    ("0.5-0.9", None, 7200),               # up to the end of the mask
    ("0.5-0.9", "1", 8000),                # as long as asked for
    ("0.1-0.2", None, 4000),
])
def test_a_sound_is_continued_beyond_its_end(place, mask, seconds, samples):
    given = tones.draw_tone(5)[:4000]
    sound.write_wav("half.wav", given, RATE)
    more = [] if seconds is None else ["--seconds", seconds]
    draw("--n", "1", "--init-sound", "half.wav", "--mask", mask, *more, "--out", "longer.wav")
    longer = sound.read_sound("longer.wav", RATE)
    assert longer.shape == (samples,)
    start, end = (round(float(part) * RATE) for part in mask.split("-"))
    assert (longer[:start] == given[:start]).all() and (longer[end:4000] == given[end:]).all()
    assert np.abs(longer[start:end]).mean() > 10               # not silent, as what follows the given sound
    assert not longer[max(end, 4000):].any()


def test_strength_nought_is_the_reconstruction(place):
    vae = checkpoints.load_vae("runs/tones-vae")
    draw("--n", "1", "--seconds", "1", "--out", "given.wav", "--seed", "3")
    draw("--n", "1", "--init-sound", "given.wav", "--strength", "0", "--out", "same.npz")
    given = np.pad(sound.read_sound("given.wav", RATE), (0, 192))[None]
    again = sound.to_int16(vae.decode(vae.encode(sound.to_tensor(given)).mean))
    assert np.abs(again - np.load("same.npz")["arr_0"].astype(int)).max() <= 1
    sample.main(["runs/tones-vae", "--init-sound", "given.wav", "given.wav", "--out", "pairs.wav"])
    pairs = sound.read_sound("pairs.wav", RATE).reshape(4, 8192)
    assert (pairs[0] == given[0]).all() and np.abs(pairs[1] - again[0].astype(int)).max() <= 1


@pytest.mark.parametrize("out", ["grid.png", "way.gif"])
def test_pictures_of_sounds(place, out, monkeypatch):
    labels = []
    spectrograms = sound.spectrograms

    def record(*args, captions=None, **more):
        labels.append(captions)
        return spectrograms(*args, captions=captions, **more)

    monkeypatch.setattr(sound, "spectrograms", record)
    draw("--n", "2", "--out", out)
    assert labels and all(each == TONE_CLASSES[:2] for each in labels)
    with Image.open(out) as picture:
        assert getattr(picture, "n_frames", 1) == (2 if out == "way.gif" else 1)


@pytest.mark.parametrize("words, message", [
    (["--size", "32", "32"], "--size 32 32: this run draws sounds; give --seconds"),
    (["--init-image", "a.png"], "--init-image a.png: this run draws sounds; give --init-sound"),
    (["--tile", "64"], "--tile 64: this run draws sounds; leave it out"),
    (["--mask", "0.1-0.2"], "--mask 0.1-0.2: needs --init-image"),
    (["--init-sound", "nothing.wav"], "--init-sound nothing.wav: cannot be read as a sound"),
    (["--init-sound", "text.wav"], "--init-sound text.wav: cannot be read as a sound"),
    (["--init-sound", "ok.wav", "--mask", "0.5-0.2"], "--mask 0.5-0.2: of sounds, two times in seconds"),
    (["--init-sound", "ok.wav", "--mask", "0.5-9"],
     "--mask 0.5-9: ends after the sound, of 1.024 seconds; for a longer one, give --seconds"),
    (["--init-sound", "ok.wav", "--mask", "white.png"], "--mask white.png: of sounds, two times"),
])
def test_what_sounds_do_not_take(place, words, message):
    (place / "text.wav").write_text("no sound")
    sound.write_wav("ok.wav", np.arange(4000, dtype=np.int16), RATE)
    with pytest.raises(ValueError, match=message):
        draw(*words, "--out", "no.wav")
    assert not (place / "no.wav").exists()


def test_pictures_are_no_wav(home, monkeypatch):
    monkeypatch.chdir(home)
    with pytest.raises(ValueError, match="--out a.wav: this run draws pictures; give .png"):
        sample.main(["runs/done", "--out", "a.wav"])
    with pytest.raises(ValueError, match="--seconds 1.0: this run draws pictures; give --size"):
        sample.main(["runs/done", "--seconds", "1", "--out", "a.png"])


# ---- both media

@pytest.mark.parametrize("medium, arrays", [
    (media.Pictures(), np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)),
    (media.Sounds(RATE), np.arange(-300, 300, dtype=np.int16).reshape(2, 300))])
def test_there_and_back(medium, arrays):
    x = medium.to_tensor(arrays)
    assert x.dtype == torch.float32 and x.abs().max() <= 1
    assert (medium.to_array(x) == arrays).all()


def test_a_mask_of_samples_and_of_latents():
    mask = torch.zeros(1, 1, 512, dtype=torch.bool)
    mask[..., 200:300] = True
    medium = media.Sounds(RATE)
    assert medium.of_latent(mask, 128)[0, 0, 0].tolist() == [False, True, True, False]
    weight = medium.border(mask, 20)[0, 0]
    assert (weight[:200] == 0).all() and (weight[300:] == 0).all() and (weight[210:290] == 1).all()
    assert (weight[200:210].diff() > 0).all()


def test_tones_are_read_from_a_run_as_they_are_drawn():
    """The reader sees the sounds that training sees, at the rate of the source."""
    data = load_data("tones", "val", (1, 8192), None, None, count=24)
    assert [read_tone(wave, RATE).label for wave in data.images[:48]] == data.labels[:48].tolist()


def test_lengths_are_those_of_the_class_that_is_asked_for():
    """Class c has the lengths c + 0.1 to c + 0.3 in validation, and class 2 in training alone."""
    def sounds(labels, lengths):
        return SimpleNamespace(seconds=np.array(lengths, np.float32), labels=np.array(labels))

    condition = conditioning.Labels({"data": {"classes": ["a", "b", "c"], "longest": 4.0}, "text": None,
                                     "label_dropout": 0.1}, torch.device("cpu"))
    condition.attach_lengths(sounds([2, 2], [2.1, 2.2]), sounds([1, 0, 0, 0, 1], [1.1, 0.1, 0.2, 0.3, 1.2]))
    assert len(condition.examples) == 24

    def lengths(turn, **more):
        asked = conditioning.Asked(torch.tensor(turn), {}, ["a", "b", "c"])
        return condition.with_lengths(asked, **more).each["seconds"].tolist()

    in_turn = [0.1, 1.1, 2.1, 0.2, 1.2, 2.2, 0.3, 1.1, 2.1, 0.1, 1.2, 2.2]
    assert lengths([0, 1, 2] * 4) == pytest.approx(in_turn)
    assert lengths([1, 1, 1]) == pytest.approx([1.1, 1.2, 1.1])
    assert lengths([2, 0, 2, 0]) == pytest.approx([2.1, 0.1, 2.2, 0.2])
    assert lengths([0] * 9)[8] == pytest.approx(0.1)        # after eight, again the first
    assert lengths([2, 0], seconds=0.5) == [0.5, 0.5]
