"""sample.py as a user meets it: outputs, seeds, pictures to begin with, and what it refuses."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK, files, pictures
from PIL import Image

import data
import run
import sample
import toys
import train


def draw(*flags, out):
    sample.main(["runs/done", "--steps", "3", *flags, "--out", out])
    return np.load(out)["arr_0"]


# ---- pictures

def test_pictures_do_not_depend_on_the_batch(cwd):
    samplers = [["--sampler", name] for name in sample.SAMPLERS]
    for flags in (["--eta", "0.5"], ["--times", "karras"], *samplers):
        one = draw("--n", "7", "--batch-size", "1", *flags, out="one.npz").astype(int)
        three = draw("--n", "7", "--batch-size", "3", *flags, out="three.npz").astype(int)
        assert np.abs(one - three).max() <= 1 and np.abs(one[0] - one[1]).max() > 3
    a, b = (draw("--n", "2", "--label", "3", "--seed", seed, out="a.npz").astype(int) for seed in ("4", "5"))
    assert np.abs(a[1] - b[0]).max() <= 1 and np.abs(a[0] - b[0]).max() > 3     # picture i is seed + i


def test_output_kinds(cwd):
    arrays = draw("--n", "24", "--seed", "0", out="e.npz")
    assert (zipfile.ZipFile("e.npz").namelist() == ["arr_0.npy"]
            and arrays.dtype == np.uint8 and arrays.shape == (24, 32, 32, 3))
    sample.main(["runs/done", "--steps", "3", "--n", "24", "--out", "grid.png"])
    picture = np.asarray(Image.open("grid.png"))
    assert (picture.shape == (36, 24 * 34 + 2, 3)
            and np.abs(picture[2:34, 36:68].astype(int) - arrays[1]).max() <= 1)
    sample.main(["runs/done", "--steps", "3", "--n", "3", "--out", "singles"])
    assert np.abs(np.asarray(Image.open("singles/000001-red-square.png")).astype(int) - arrays[1]).max() <= 1
    sample.main(["runs/done", "--steps", "3", "--n", "2", "--out", "way.gif"])
    assert Image.open("way.gif").n_frames == 3
    assert np.abs(draw("--n", "2", "--raw", out="r.npz").astype(int) - arrays[:2]).max() > 0
    by_name, by_number = (draw("--n", "1", "--label", "green-cross", out="n.npz"),
                          draw("--n", "1", "--label", "7", out="n.npz"))
    assert (by_name == by_number).all()


@pytest.mark.parametrize("which", [0, 1])
def test_pictures_to_begin_with(cwd, text_runs, which, monkeypatch):
    """Strength 0 is the VAE's reconstruction; more of it, more change; a mask keeps what is outside."""
    folder = text_runs[which]
    vae, picture = run.unpack_vae(run.load_checkpoint(folder)["vae"]), toys.draw_shape(3)
    Image.fromarray(picture).save("begin.png")
    x = data.to_tensor(picture[None])
    through = data.to_uint8(vae.decode(vae.encode(x).mean))[0].astype(int)
    begin = ["--prompt", "a red circle", "--init-image", "begin.png"]
    for sampler in sample.SAMPLERS:
        flags = [*begin, "--strength", "0", "--sampler", sampler]
        assert np.abs(pictures(folder, *flags) - through).max() <= 1
    change = [np.abs(pictures(folder, *begin, "--steps", "20", "--strength", s) - through).mean()
              for s in ("0.02", "0.3", "0.6", "1")]
    assert change == sorted(change) and 0 < change[0] < 0.5 * change[-1]
    default = pictures(folder, *begin, "--steps", "20")
    assert np.abs(default - pictures(folder, *begin, "--steps", "20", "--strength", "0.6")).max() == 0
    mask = np.zeros((32, 32), np.uint8)
    mask[5:14, 9:31] = 255
    Image.fromarray(mask).save("mask.png")
    out = pictures(folder, *begin, "--mask", "mask.png")
    assert (out[:, mask == 0] == picture[mask == 0]).all()
    assert (out[:, mask > 0] != picture[mask > 0]).mean() > 0.5
    sample.main([folder, *begin, "--strength", "0", "--n", "1", "--out", "still.gif"])
    assert Image.open("still.gif").n_frames == 1
    assert np.abs(pictures(folder, *begin, "--strength", "0", "--precision", "bf16") - through).max() <= 1
    # at strength 1 nothing of the picture is left
    assert (pictures(folder, *begin, "--strength", "1") == pictures(folder, "--prompt", "a red circle")).all()
    seen = []
    monkeypatch.setitem(sample.SAMPLERS, "euler",
                        lambda denoise, path, x, times, **_: seen.append(times) or x)
    for steps, strength in ((20, 0.55), (25, 0.56), (50, 0.68), (100, 0.81)):      # 0.55 is 0.55 and an ulp
        pictures(folder, *begin, "--sampler", "euler", "--steps", str(steps), "--strength", str(strength))
        assert seen[-1][0] == strength and (seen[-1][:-1] - seen[-1][1:]).min() > 5e-4


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_sampling_draws_the_same(cwd):
    for out, more in (("plain", []), ("compiled", ["--compile"])):
        sample.main(["runs/done", "--n", "2", "--steps", "4", "--out", f"{out}.npz", *more])
    plain, compiled = (np.load(f"{out}.npz")["arr_0"].astype(int) for out in ("plain", "compiled"))
    assert np.abs(plain - compiled).max() <= 1


# ---- flags

@pytest.mark.parametrize("flags, objective, expected", [
    ([], {"name": "rf"}, ("heun", {})),
    ([], {"name": "ddpm"}, ("ddim", {})),
    (["--sampler", "euler"], {"name": "ddpm"}, ("euler", {})),
    (["--eta", "0.5"], {"name": "rf"}, ("ddim", {"eta": 0.5})),              # an option brings its sampler
    (["--eta", "0", "--sampler", "ddim"], {"name": "ddpm"}, ("ddim", {"eta": 0.0})),
    (["--variance", "large"], {"name": "ddpm"}, ("ddpm", {"variance": "large"})),
    (["--variance", "learned"], {"name": "ddpm", "learned_variance": True},
     ("ddpm", {"variance": "learned"})),
    (["--noise", "0"], {"name": "rf"}, ("reverse_sde", {"noise": 0.0})),
])
def test_choice_of_the_sampler(flags, objective, expected):
    assert sample.choose_sampler(sample.parse_args(["runs/x", *flags]), objective) == expected


@pytest.mark.parametrize("flags, message", [
    (["runs/done", "--label", "purple"], "--label purple: not a class"),
    (["runs/done", "--label", "24"], "0 to 23"),
    (["runs/done", "--label", "-1"], "--label -1"),
    (["runs/done", "--steps", "0"], "--steps 0"),
    (["runs/done", "--n", "0"], "--n 0"),
    (["runs/done", "--n", "999999999999"], "--n 999999999999: must be between 1 and 100,000,000"),
    (["runs/done", "--cfg", "nan"], "--cfg nan: must be between"),
    ([""], "no checkpoint"),
    (["runs/done", "--eta", "0.5", "--sampler", "heun"], "--eta 0.5: belongs to --sampler ddim, not heun"),
    (["runs/done", "--eta", "2"], "between 0 and 1"),
    (["runs/done", "--noise", "1", "--sampler", "ddpm"],
     "--noise 1.0: belongs to --sampler reverse_sde, not ddpm"),
    (["runs/done", "--noise", "-1"], "--noise -1"),
    (["runs/done", "--strength", "0.5"], "--strength 0.5: needs --init-image"),
    (["runs/done", "--strength", "1.5", "--init-image", "x.png"], "--strength 1.5: must be between 0 and 1"),
    (["runs/done", "--mask", "x.png"], "--mask x.png: needs --init-image"),
    (["runs/done", "--init-image", ""], "--init-image is empty"),
    (["runs/done", "--init-image", "none.png"], "--init-image none.png: cannot be read"),
    (["runs/done", "--init-image", "runs/done/samples.png", "--mask", "black.png"], "no white pixel"),
    (["runs/done", "--prompt", "a dog"],
     "--prompt a dog: this run is conditioned on class labels; use --label"),
    (["runs/done", "--embedding", "x.npz"], "--embedding x.npz"),
    (["runs/done", "--text-encoder", "clip:x"], "--text-encoder clip:x"),
    (["runs/done", "--rescale", "0.5", "--cfg", "1"], "--rescale 0.5 with guidance 1"),
    (["runs/done", "--rescale", "-1"], "--rescale -1: must be between 0 and 1"),
    (["runs/done", "--eta", "1", "--variance", "small"], "belongs to"),
    (["runs/done", "--variance", "learned"], "not trained to predict a variance"),
    (["runs/done", "--times", "leading"], "a spacing of the ddpm path"),
    (["runs/done", "--interval", "0.8", "0.2"], "--interval 0.8 0.2"),
    (["runs/done", "--interval", "0", "1.5"], "--interval 1.5: must be between 0 and 1"),
    (["runs/done", "--interval", "0.1", "0.5", "--cfg", "1"], "--interval 0.1 0.5 with guidance 1"),
    (["runs/done", "--cfg", "0", "--label", "1"], "unconditional"),
    (["runs/done", "--out", "x.jpg"], "must end in"),
    (["runs/done", "--out", ""], "--out is empty"),
    (["runs/done", "--out", "no/such/x.png"], "does not exist"),
    (["runs/done", "--out", "folder.png"], "there is a folder of that name"),
    (["runs/done", "--out", "file"], "there is a file of that name"),
    (["runs/done", "--device", "tpu"], "--device tpu"),
    (["runs/shapes-vae"], "this run is a VAE"),
    (["runs/nothing"], "no checkpoint"),
])
def test_sample_refuses(cwd, flags, message):
    (cwd / "folder.png").mkdir(exist_ok=True)
    (cwd / "file").write_bytes(b"")
    Image.new("RGB", (32, 32)).save("black.png")
    before = files(cwd)
    with pytest.raises(ValueError, match=message):
        sample.main(flags)
    assert files(cwd) == before


def test_guidance_needs_dropout(cwd):
    train.main(["--arch", "dit", *QUICK, "--label-dropout", "0", "--name", "nodrop"])
    for scale in ("2", "0"):
        with pytest.raises(ValueError, match="label dropout 0"):
            sample.main(["runs/nodrop", "--cfg", scale])
    sample.main(["runs/nodrop", "--n", "1", "--steps", "1", "--out", "nodrop.png"])


# ---- files

@pytest.mark.parametrize("kind", ["png", "gif", "npz"])
def test_a_failed_write_keeps_the_old_picture(cwd, monkeypatch, kind):
    old = Path(f"old.{kind}")
    old.write_bytes(b"precious")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr(sample, "npz_writer", full)
    with pytest.raises(OSError, match=f"cannot write old.{kind}.*: .*No space left"):
        sample.main(["runs/done", "--steps", "2", "--n", "2", "--out", str(old)])
    assert old.read_bytes() == b"precious" and not Path(f"old.{kind}.part").exists()
