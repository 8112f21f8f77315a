"""benchmarks/sharpness.py and gallery.py: energies and errors of closed forms, nearest pictures, prompts."""

import sys

import numpy as np
import pytest
import torch
from benchmarks import gallery, sharpness
from data import Dataset


def wave(cycles, size=32, amplitude=60.0, axis=1):
    """(1, size, size, 3): a cosine of so many half-cycles per picture, which continues when mirrored."""
    x = np.cos(np.pi * cycles * (np.arange(size) + 0.5) / size)
    picture = np.broadcast_to(x if axis else x[:, None], (size, size))
    return np.round(128 + amplitude * picture)[None, ..., None].repeat(3, -1).astype(np.uint8)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("half_cycles, share", [(4, 0), (15, 0), (17, 1), (30, 1)])
def test_high_frequencies_of_a_wave(half_cycles, share, axis):
    """A cosine of amplitude a has the energy a^2 / 2, all of it at its frequency, half_cycles / 64."""
    found = sharpness.high_frequencies(wave(half_cycles, axis=axis))
    assert found == pytest.approx(share * 60**2 / 2, abs=0.5, rel=0.01)


def test_high_frequencies_do_not_see_brightness_or_borders():
    assert sharpness.high_frequencies(np.full((2, 32, 48, 3), 200, np.uint8)) == pytest.approx(0, abs=1e-9)
    ramp = np.broadcast_to(np.arange(0, 240, 5, dtype=np.uint8)[None, None, :, None], (1, 32, 48, 3))
    assert sharpness.high_frequencies(ramp) < 0.5             # its two borders differ by 235 levels
    both = np.concatenate([wave(4), wave(30)])
    assert sharpness.high_frequencies(both) == pytest.approx(900, rel=0.01)     # the mean


def test_flat_places_are_two_pixels_from_every_step():
    image = np.full((1, 16, 16, 3), 255, np.uint8)
    image[:, :, 8:, 1] = 100
    found = sharpness.flat(image)[0]
    assert (found == np.array([[True] * 6 + [False] * 4 + [True] * 6] * 16)).all()
    image[0, 3, 3] -= 4
    assert (sharpness.flat(image)[0] == found).all()                            # four levels are flat
    image[0, 3, 3, 0] -= 1
    assert not sharpness.flat(image)[0][1:6, 1:6].any()


def test_blotches_count_flat_places_alone():
    image = np.full((1, 16, 16, 3), 200, np.uint8)
    image[:, :, 8:] = 100
    other = image.copy()
    other[:, :, 6:10] = 0                                     # wrong only beside the step
    assert sharpness.blotches(other, image) == 0
    other[:, :8, :6] += 6                                     # 48 of 16 * 12 flat pixels
    assert sharpness.blotches(other, image) == pytest.approx(6 * (48 / 192) ** 0.5)
    rough = np.random.default_rng(0).integers(0, 255, image.shape, np.uint8)
    assert np.isnan(sharpness.blotches(image, rough))


def test_psnr():
    a = np.full((2, 8, 8, 3), 100, np.uint8)
    b = a + np.array([1, 10], np.uint8)[:, None, None, None]
    assert sharpness.psnr(b, a) == pytest.approx(20 * np.log10(255) - 10)       # of 0 and 20 dB, the mean


class Linear(torch.nn.Module):
    """An autoencoder whose latent is the picture itself, with a scale of 0.5."""

    def encode(self, x):
        return type("Posterior", (), {"mean": x})

    def decode(self, z):
        return z

    def normalize(self, z):
        return z / 0.5

    def denormalize(self, x0):
        return x0 * 0.5


def test_noise_is_a_share_of_the_latents_deviation():
    images = np.full((40, 8, 8, 3), 128, np.uint8)
    assert (sharpness.decoded(Linear(), images, 0.0) == images).all()
    noisy = sharpness.decoded(Linear(), images, 0.2).astype(float)
    assert (noisy - 128).std() == pytest.approx(0.2 * 0.5 * 127.5, rel=0.03)
    assert (noisy == sharpness.decoded(Linear(), images, 0.2)).all()


def test_below_each_sample_is_the_nearest_picture():
    rng = np.random.default_rng(1)
    images = rng.integers(0, 255, (50, 8, 8, 3), np.uint8)
    wanted = np.array([7, 30, 2])
    samples = np.clip(images[wanted].astype(int) + 3, 0, 255).astype(np.uint8)
    tiles, index, distance = gallery.with_nearest(samples, images)
    assert (index == wanted).all() and (tiles[:, :8] == samples).all()
    assert (tiles[:, 8:] == images[wanted]).all()
    error = samples.astype(float) - images[wanted]
    assert distance == pytest.approx(np.sqrt(np.square(error).mean((1, 2, 3))))


def test_prompts_are_of_three_origins():
    train, val = (Dataset(np.zeros((1, 8, 8, 3), np.uint8), None, [], "", [caption])
                  for caption in ("red apple", "blue heart"))
    found = [gallery.origin(prompt, train, val) for prompt in ("red apple", "blue heart", "blue apple")]
    assert found == ["trained", "held out", "NEW"]


def test_half_of_the_prompts_are_new_rows():
    for prompts in gallery.PROMPTS.values():
        assert len(prompts) == 4 * gallery.COLUMNS and len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("index, other, wrong", [
    (2, "house", "NEW, not trained"), (17, "held out 1", "held out, not trained"),
    (9, "known 8", "trained, not NEW"), (30, "held out 0", "held out, not NEW"),
])
def test_prompts_in_a_wrong_row_are_refused(tmp_path, monkeypatch, index, other, wrong):
    pictures = np.random.default_rng(0).integers(0, 255, (16, 8, 8, 3), np.uint8)
    train = Dataset(pictures, None, [], "", [f"known {i}" for i in range(16)])
    val = Dataset(255 - pictures[:4], None, [], "", [f"held out {i}" for i in range(4)])
    row = gallery.COLUMNS
    prompts = [caption for start in (0, row) for kind in ("known", "new")
               for caption in [f"{kind} {start + i}" for i in range(row)]]
    calls = []

    def draw(flags):
        calls.append(flags[flags.index("--prompt") + 1:])
        return np.full((32, 8, 8, 3), 90, np.uint8)

    monkeypatch.setattr(gallery, "pictures_of", lambda run, data_dir: ("things", train, val))
    monkeypatch.setattr(gallery, "drawn", draw)
    monkeypatch.setitem(gallery.PROMPTS, "things", prompts)
    monkeypatch.setattr("sys.argv", ["gallery.py", "run", str(tmp_path / "a.png")])
    gallery.main()
    assert calls == [prompts] and (tmp_path / "a.png").exists()
    changed = prompts[:index] + [other] + prompts[index + 1:]
    (tmp_path / "prompts.txt").write_text("\n".join(changed))
    monkeypatch.setattr("sys.argv", ["gallery.py", "run", str(tmp_path / "b.png")])
    monkeypatch.setitem(gallery.PROMPTS, "things", changed)
    with pytest.raises(ValueError, match=f"^PROMPTS of things: .*: {other} .{wrong}.$"):
        gallery.main()
    assert len(calls) == 1 and not (tmp_path / "b.png").exists()
    monkeypatch.setattr("sys.argv", [*sys.argv, "--prompts", str(tmp_path / "prompts.txt")])
    gallery.main()                                              # any that the caller chooses
    assert calls[1] == changed
