"""sample.py as a user meets it: outputs, seeds, pictures to begin with, and what it refuses."""

import io
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ON_VAE, altered, closed_to_us, contents, draw_two
from PIL import Image
from tqdm import tqdm

import beginning
import checkpoints
import draw as draw_file
import files
import machine
import networks
import sample
import sample_settings
import samplers
import settings
import toys
import train
from pictures import to_tensor, to_uint8
from rectified_flow import RectifiedFlow


def draw(*flags, out):
    sample.main(["runs/done", "--steps", "3", *flags, "--out", out])
    return np.load(out)["arr_0"]


# What networks of one time are drawn with; `jump` is tested in test_few_steps.py.
OF_ONE_TIME = [name for name in samplers.SAMPLERS if name != "jump"]


# ---- pictures

def test_pictures_do_not_depend_on_the_batch(cwd):
    samplers = [["--sampler", name] for name in OF_ONE_TIME]
    for flags in (["--eta", "0.5"], ["--times", "karras"], *samplers):
        one = draw("--n", "7", "--batch-size", "1", *flags, out="one.npz").astype(int)
        three = draw("--n", "7", "--batch-size", "3", *flags, out="three.npz").astype(int)
        assert np.abs(one - three).max() <= 1 and np.abs(one[0] - one[1]).max() > 3
    a, b = (draw("--n", "2", "--label", "3", "--seed", seed, out="a.npz").astype(int) for seed in ("4", "5"))
    assert np.abs(a[1] - b[0]).max() <= 1 and np.abs(a[0] - b[0]).max() > 3     # picture i is seed + i


@pytest.mark.long
def test_the_length_of_the_average_is_chosen_afterwards(cwd):
    """A width that was kept draws the same; another is what a training with it would have had, the closer
    the more checkpoints are kept; and what is too far from all of them is refused."""
    flags = ["--arch", "dit", *ON_VAE, "--steps", "40", "--save-every", "10"]
    train.main([*flags, "--ema", "0.1", "--name", "widths", "--keep", "4"])
    train.main([*flags, "--ema", "0.13", "--name", "direct"])
    train.main(["--arch", "dit", *ON_VAE, "--ema", "0.998", "--name", "constant"])

    def drawn(run_or_file, *more):
        sample.main([run_or_file, "--n", "4", "--steps", "3", *more, "--out", "w.npz"])
        return np.load("w.npz")["arr_0"]

    plain = drawn("runs/widths")
    assert (drawn("runs/widths", "--ema", "0.1") == plain).all()
    assert (drawn("runs/widths", "--ema", "0.2") != plain).any()
    shutil.copy("runs/widths/checkpoint.pt", "alone.pt")
    saved, direct = checkpoints.load_checkpoint("alone.pt"), checkpoints.load_checkpoint("runs/direct")["ema"]
    # exact is what the running average gives; profiles are a continuous approximation to it
    errors = []
    for source in ("alone.pt", "runs/widths"):
        made = checkpoints.average_of_width(source, saved, 0.13)
        errors.append(max((made[name] - weight).abs().max() for name, weight in direct.items()))
    moved = max((saved["model"][name] - weight).abs().max() for name, weight in direct.items())
    assert errors[1] < errors[0] < 0.25 * moved
    assert (drawn("runs/widths", "--ema", "0.13") == drawn("runs/widths", "--ema", "0.13")).all()
    for source, width, message in (
            ("alone.pt", "0.01", r"--ema 0.01: the averages that alone.pt has kept make those between "
                                 r"0\.0\d+ and 0\.2\d*; give one of these, or train with --keep"),
            ("runs/widths", "0.29", "--ema 0.29: must be above 0 and at most 0.28"),
            ("runs/constant", "0.1", "--ema 0.1: runs/constant has no averages of which another can be")):
        with pytest.raises(ValueError, match=message):
            sample.main([source, "--ema", width])
    with pytest.raises(ValueError, match="--raw with --ema 0.1: the weights themselves, or an average"):
        sample.main(["runs/widths", "--ema", "0.1", "--raw"])


def test_options_reach_sampler_and_guidance(cwd, text_runs, monkeypatch):
    """Each flag is one argument of its sampler or of `guided`, and is left out where it is not given."""
    seen = {}

    def watched(name, real):
        def called(*args, **more):
            seen[name] = more
            return real(*args, **more)
        return called

    for name in ("heun", "unipc_3", "dpmpp_3m", "dpm2_ancestral"):
        monkeypatch.setitem(samplers.SAMPLERS, name, watched(name, samplers.SAMPLERS[name]))
    monkeypatch.setattr(draw_file, "guided", watched("guided", draw_file.guided))
    always = {"generator", "on_step"}
    for flags, name, options in (
            (["--churn", "4", "--churn-min", "0.1", "--churn-max", "9", "--churn-noise", "1.1"], "heun",
             {"churn": 4.0, "churn_min": 0.1, "churn_max": 9.0, "churn_noise": 1.1}),
            (["--sampler", "unipc_3", "--lower-order-final"], "unipc_3", {"lower_order_final": True}),
            (["--as-published"], "dpmpp_3m", {"as_published": True}),
            (["--sampler", "dpm2_ancestral", "--eta", "0.5"], "dpm2_ancestral", {"eta": 0.5}),
            (["--sampler", "heun"], "heun", {})):
        draw_two("runs/done", *flags)
        assert {k: v for k, v in seen[name].items() if k not in always} == options
    plain = draw_two("runs/done", "--cfg", "3")
    assert (draw_two("runs/done", "--cfg", "3", "--cfg-channels", "3") != plain).any()
    assert seen["guided"]["channels"] == 3 and "skipped" not in seen["guided"]
    assert (draw_two("runs/done", "--cfg", "3", "--cfg-channels", "4") == plain).all()
    # skip-layer guidance: of ten steps, those that begin with 0.2 < i / 10 < 0.5
    words = ["--prompt", "a small red circle", "--cfg", "2", "--steps", "10"]
    plain = draw_two(text_runs[0], *words)
    skips = ["--skip-layers", "1", "--skip-steps", "0.2", "0.5", "--skip-scale"]
    assert (draw_two(text_runs[0], *words, *skips, "3") != plain).any()
    assert seen["guided"]["skip_interval"] == pytest.approx((0.5, 0.7)) and seen["guided"]["skip_scale"] == 3
    assert (draw_two(text_runs[0], *words, *skips, "0") == plain).all()
    with pytest.raises(ValueError, match="--skip-layers 0 9: this network has joint blocks 0 to 1"):
        draw_two(text_runs[0], *words, "--skip-layers", "0", "9")


def test_the_times_of_sampling_are_shifted_alone(cwd, tmp_path, monkeypatch):
    """As by a path of that shift, while the network and what it predicts stay those of the run."""
    seen, euler = [], samplers.SAMPLERS["euler"]
    monkeypatch.setitem(samplers.SAMPLERS, "euler", lambda denoise, path, x, times, **more:
                        (seen.append(times), euler(denoise, path, x, times, **more))[1])
    plain = draw_two("runs/done", "--sampler", "euler")
    for shift in ("1", "3", "0.5"):
        drawn = draw_two("runs/done", "--sampler", "euler", "--shift", shift)
        expected = float(shift) * seen[0] / (1 + (float(shift) - 1) * seen[0])
        torch.testing.assert_close(seen[-1], expected)
        assert (drawn == plain).all() == (shift == "1")
    trained = altered(tmp_path, lambda checkpoint: checkpoint["objective"].update(shift=3.0))
    assert (draw_two(str(trained.folder), "--sampler", "euler")
            == draw_two("runs/done", "--sampler", "euler", "--shift", "3")).all()
    assert (draw_two(str(trained.folder), "--sampler", "euler", "--shift", "1") == plain).all()   # not twice
    altered(tmp_path, lambda checkpoint: checkpoint.update(objective={"name": "ddpm", "prediction": "eps"}))
    with pytest.raises(ValueError, match="--shift 2: of the times of rf; this run is on the path of ddpm"):
        sample.main([str(trained.folder), "--shift", "2"])


@pytest.mark.parametrize("has_bf16, precision", [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_only_where_the_hardware_multiplies_it(cwd, monkeypatch, has_bf16, precision):
    other = draw_two("runs/done", "--precision", "fp32" if has_bf16 else "bf16")
    monkeypatch.setattr(machine, "has_bf16", lambda device: has_bf16)
    auto = draw_two("runs/done", "--precision", "auto")
    assert (auto == draw_two("runs/done", "--precision", precision)).all() and (auto != other).any()


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


@pytest.mark.long
@pytest.mark.parametrize("which", [0, 1])
def test_pictures_to_begin_with(cwd, text_runs, which, monkeypatch):
    """Strength 0 is the VAE's reconstruction; more of it, more change; a mask keeps what is outside."""
    folder = text_runs[which]
    vae, picture = networks.unpack_vae(checkpoints.load_checkpoint(folder)["vae"]), toys.draw_shape(3)
    Image.fromarray(picture).save("begin.png")
    x = to_tensor(picture[None])
    through = to_uint8(vae.decode(vae.encode(x).mean))[0].astype(int)
    begin = ["--prompt", "a red circle", "--init-image", "begin.png"]
    # no step is left at strength 0, so the network does not matter: all samplers on the smaller one
    for sampler in OF_ONE_TIME if which == 0 else ["ddim"]:
        flags = [*begin, "--strength", "0", "--sampler", sampler]
        assert np.abs(draw_two(folder, *flags) - through).max() <= 1
    change = [np.abs(draw_two(folder, *begin, "--steps", "10", "--strength", s) - through).mean()
              for s in ("0.02", "0.3", "0.6", "1")]
    assert change == sorted(change) and 0 < change[0] < 0.5 * change[-1]
    default = draw_two(folder, *begin, "--steps", "10")
    assert np.abs(default - draw_two(folder, *begin, "--steps", "10", "--strength", "0.8")).max() == 0
    mask = np.zeros((32, 32), np.uint8)
    mask[5:14, 9:31] = 255
    Image.fromarray(mask).save("mask.png")
    out = draw_two(folder, *begin, "--mask", "mask.png")
    assert (out[:, mask == 0] == picture[mask == 0]).all()
    assert (out[:, mask > 0] != picture[mask > 0]).mean() > 0.5
    sample.main([folder, *begin, "--strength", "0", "--n", "1", "--out", "still.gif"])
    assert Image.open("still.gif").n_frames == 1
    assert np.abs(draw_two(folder, *begin, "--strength", "0", "--precision", "bf16") - through).max() <= 1
    # at strength 1 nothing of the picture is left
    assert (draw_two(folder, *begin, "--strength", "1") == draw_two(folder, "--prompt", "a red circle")).all()
    seen = []
    monkeypatch.setitem(samplers.SAMPLERS, "euler",
                        lambda denoise, path, x, times, **_: seen.append(times) or x)
    for steps, strength in ((20, 0.55), (25, 0.56), (50, 0.68), (100, 0.81)):      # 0.55 is 0.55 and an ulp
        draw_two(folder, *begin, "--sampler", "euler", "--steps", str(steps), "--strength", str(strength))
        assert seen[-1][0] == strength and (seen[-1][:-1] - seen[-1][1:]).min() > 5e-4


def paint(name, alpha=True):
    """White paint on transparent black, in the middle of a file of each kind; and where the paint is."""
    where = np.zeros((32, 32), bool)
    where[8:20, 4:28] = True
    white = Image.fromarray(np.where(where, 255, 0).astype(np.uint8))
    # What is transparent may have any colour: black, or white itself.
    hidden = Image.fromarray(np.full((32, 32), 255, np.uint8)) if "hidden" in name else white
    if "LA" in name:
        Image.merge("LA", (hidden, white)).save(name)
    elif "palette" in name:
        picture = Image.fromarray(where.astype(np.uint8)).convert("P")
        picture.putpalette([255, 255, 255] * 256 if "hidden" in name else [0, 0, 0, 255, 255, 255])
        picture.save(name, transparency=0)
    elif "opaque" in name:
        white.save(name)
    else:
        Image.merge("RGBA", (hidden, hidden, hidden, white)).save(name, **(
            {"lossless": True, "exact": True} if name.endswith("webp") else {}))
    return where


@pytest.mark.parametrize("name", [
    "RGBA.png", "RGBA.tiff", "RGBA.webp", "LA.png", "LA.tiff", "palette.png", "palette.gif",
    "hidden-RGBA.png", "hidden-RGBA.tiff", "hidden-RGBA.webp", "hidden-LA.png", "hidden-palette.png",
    "opaque.png",
])
def test_what_is_transparent_in_a_mask_is_kept(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    where = paint(name)
    Image.new("RGB", (32, 32), "red").save("begin.png")
    args = sample_settings.parse_args(["runs/x", "--init-image", "begin.png", "--mask", name])
    _, mask = beginning.read_image_and_mask(args, (32, 32), 3)
    assert (mask[0, 0].numpy() == where).all()
    # of a picture, transparency is white as before
    assert (beginning.read_picture("--init-image", name, (32, 32))[0, 0] == 255).all() or name == "opaque.png"


def test_the_border_of_a_patch_is_blended():
    """0 outside to the last pixel; 1 well inside, and in the middle of strokes that are narrower."""
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    mask[..., 4:12, 4:] = True                             # reaches the right border, where nothing is kept
    weight = samplers.soft_border(mask, 2)[0, 0]
    assert (weight[~mask[0, 0]] == 0).all() and (weight[6:10, 6:] == 1).all()
    torch.testing.assert_close(weight[8, 3:8], torch.tensor([0, 1 / 3, 2 / 3, 1, 1]))
    stroke = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    stroke[..., 5, :] = True
    assert samplers.soft_border(stroke, 2)[0, 0, 5].tolist() == [1] * 16
    assert (samplers.soft_border(torch.ones_like(mask), 4) == 1).all()
    assert (samplers.soft_border(mask, 0) == mask).all()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_sampling_draws_the_same(cwd):
    for out, more in (("plain", []), ("compiled", ["--compile"])):
        sample.main(["runs/done", "--n", "2", "--steps", "4", "--out", f"{out}.npz", *more])
    plain, compiled = (np.load(f"{out}.npz")["arr_0"].astype(int) for out in ("plain", "compiled"))
    assert np.abs(plain - compiled).max() <= 1


@pytest.mark.parametrize("name, error", [("x.jpg", 12), ("x.jpeg", 12), ("x.webp", 0), ("X.PNG", 0)])
def test_endings_of_a_picture(cwd, name, error):
    sample.main(["runs/done", "--steps", "1", "--n", "2", "--out", "plain.png"])
    sample.main(["runs/done", "--steps", "1", "--n", "2", "--out", name])
    plain, found = (np.asarray(Image.open(file)).astype(float) for file in ("plain.png", name))
    assert Image.open(name).format == {"g": "JPEG", "p": "WEBP", "G": "PNG"}[name[-1]] and (
        np.abs(plain - found).mean() <= error)


def test_the_default_output_is_checked_before_drawing(cwd, tmp_path, monkeypatch):
    (tmp_path / "samples.png").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "draw_batches", None)
    with pytest.raises(ValueError, match="--out samples.png: there is a folder of that name; choose another"):
        sample.main([str(cwd / "runs/done")])


def test_a_vae_reconstructs(cwd):
    picture = toys.draw_shape(3)
    Image.fromarray(picture).save("given.png")
    sample.main(["runs/shapes-vae", "--init-image", "given.png", "--out", "pair.png"])
    pair = np.asarray(Image.open("pair.png"))
    vae = checkpoints.load_vae("runs/shapes-vae")
    again = to_uint8(vae.decode(vae.encode(to_tensor(picture[None])).mean))[0]
    assert pair.shape == (132, 262, 3)                     # enlarged, as pictures with captions are
    assert (pair[2:130, 2:130] == picture.repeat(4, 0).repeat(4, 1)).all()
    assert np.abs(pair[2:130:4, 132:260:4].astype(int) - again).max() <= 1
    Image.fromarray(toys.draw_shape(4)).save("other.png")
    sample.main(["runs/shapes-vae", "--init-image", "other.png", "given.png", "--out", "pairs.png"])
    pairs = np.asarray(Image.open("pairs.png"))
    assert pairs.shape == (262, 262, 3) and (pairs[130:] == pair).all() and (pairs[:132] != pair).any()
    for more in (["--label", "3"], ["--n", "2"], ["--mask", "given.png"], ["--seed", "1"], ["--cfg", "1"],
                 ["--cfg", "0"], ["--strength", "0"], ["--interval", "0", "0.5"], ["--compile"]):
        with pytest.raises(ValueError, match=f"{more[0]}: this run is a VAE, .*; leave it out"):
            sample.main(["runs/shapes-vae", "--init-image", "given.png", "--out", "no.png", *more])
    for out in ("no.npz", "no.gif", "no"):
        with pytest.raises(ValueError, match=f"--out {out}: a VAE's reconstruction is a .png, .jpg or .webp"):
            sample.main(["runs/shapes-vae", "--init-image", "given.png", "--out", out])
    with pytest.raises(ValueError, match="--out a.webp: 200 pictures and .* more than .webp .*; give fewer"):
        sample.main(["runs/shapes-vae", "--init-image", *["given.png"] * 200, "--out", "a.webp"])


# ---- long outputs

class Killed(BaseException):
    pass


@pytest.mark.parametrize("out", ["many.npz", "many"])
def test_an_interrupted_output_is_continued(cwd, monkeypatch, out, capsys):
    """Bit-identical to one go, whether the process ended within a batch, between two or while writing."""
    command = ["runs/done", "--steps", "1", "--n", "10", "--batch-size", "3", "--out"]
    whole = f"whole-{out}"
    sample.main([*command, whole])

    def content(name):
        if name.endswith(".npz"):
            return Path(name).read_bytes()
        return {file.name: file.read_bytes() for file in Path(name).iterdir()}

    drawn, draw_batch, end_after = [], draw_file.draw, None

    def counting(*inputs, **options):
        if len(drawn) == end_after:
            raise Killed
        drawn.append(inputs[4])                            # the seeds
        return draw_batch(*inputs, **options)

    monkeypatch.setattr(draw_file, "draw", counting)
    for end_after in (2, 3):
        with pytest.raises(Killed):
            sample.main([*command, out])
        assert not Path(out).is_file()
    # other settings are not mixed
    before = contents(cwd)
    for more, what in ((["--seed", "1"], "seed 0, not 1"), (["--label", "3"], "conditions"),
                       (["--raw"], "weights"), (["--steps", "2"], "steps 1, not 2"),
                       (["--n", "11"], "n 10, not 11"), (["--batch-size", "4"], "batch_size 3, not 4"),
                       (["--cfg", "3"], "scale 2.0, not 3.0"), (["--shift", "3"], "shift None, not 3.0")):
        with pytest.raises(ValueError, match=f"9 pictures are there, drawn with {what}"):
            sample.main([*command, out, *more])
    assert contents(cwd) == before
    if out == "many":                                      # a picture that was removed is drawn again
        next(Path(out).glob("000007*")).unlink()
    else:                                                  # what was cut short, too
        Path(f"{out}.unfinished").write_bytes(Path(f"{out}.unfinished").read_bytes() + b"half a batch")
    end_after = None
    sample.main([*command, out])
    assert content(out) == content(whole)
    assert [list(seeds)[0] for seeds in drawn] == ([0, 3, 6, 6, 9] if out == "many" else [0, 3, 6, 9])
    assert not list(cwd.glob("many.npz.unf*")) and not list(cwd.glob("many/unf*"))
    drawn.clear()
    sample.main([*command, out, "--seed", "5"])            # a finished output may be drawn anew
    assert len(drawn) == 4


def test_an_output_in_a_folder_that_may_not_be_entered(cwd, monkeypatch):
    (cwd / "closed/inner").mkdir(parents=True)
    closed_to_us(monkeypatch, cwd / "closed")
    for out, place in (("closed/x.png", "closed/x.png"), ("closed/inner/x.png", "closed/inner"),
                       ("closed/inner/x", "closed/inner")):
        with pytest.raises(ValueError, match=f"--out {out}: {place} cannot be reached .permission denied"):
            sample.main(["runs/done", "--n", "1", "--out", out])


def test_names_of_negative_seeds(cwd, monkeypatch):
    """No program takes them for flags, and those of other seeds are as ever. A folder begun when they began
    with a dash goes on so."""
    command = ["runs/done", "--steps", "1", "--n", "4", "--seed", "-2", "--label", "3", "--batch-size", "2"]
    sample.main([*command, "--out", "signed"])
    whole = {file.name: file.read_bytes() for file in Path("signed").iterdir()}
    assert [re.match(r"(minus-)?\d{6}", name)[0] for name in sorted(whole)] == [
        "000000", "000001", "minus-000001", "minus-000002"]
    draw_batch = draw_file.draw

    def once(*inputs, **options):
        if list(inputs[4])[0] == 0:
            raise Killed
        return draw_batch(*inputs, **options)

    for old in (False, True):
        out = Path(f"signed-{old}")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(draw_file, "draw", once)
            sample.main([*command, "--out", str(out)])
        for file in list(out.glob("minus-*")):
            if old:
                file.rename(out / file.name.replace("minus-", "-").replace("-0", "-", 1))
        assert len(list(out.glob("*.png"))) == 2
        sample.main([*command, "--out", str(out)])
        found = sorted(file.read_bytes() for file in out.iterdir())
        assert found == sorted(whole.values()) and not list(out.glob("minus-*")) == old


@pytest.mark.parametrize("out, line", [
    ("cut.npz", "sample.py: interrupted after 6 of 10 pictures; the same command continues"),
    ("cut", "sample.py: interrupted after 6 of 10 pictures; the same command continues"),
    ("cut.png", "sample.py: interrupted: nothing was written"),
    ("cut.gif", "sample.py: interrupted: nothing was written"),
])
def test_an_interruption_says_how_far_it_came(cwd, monkeypatch, capsys, out, line):
    drawn, draw_batch = [], draw_file.draw

    def interrupted(*inputs, **options):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(1)
        return draw_batch(*inputs, **options)

    monkeypatch.setattr(draw_file, "draw", interrupted)
    with pytest.raises(SystemExit) as ended:
        sample.main(["runs/done", "--steps", "1", "--n", "10", "--batch-size", "3", "--out", out])
    assert ended.value.code == 130 and capsys.readouterr().err.splitlines()[-1] == line


def test_the_bar_moves_with_every_step(cwd, monkeypatch):
    """In whole pictures, of which the batch in work counts in part; the decoder is a step of its own."""
    seen, text = [], io.StringIO()

    class Bar(tqdm):
        def update(self, n=1):
            super().update(n)
            seen.append(self.n)

    monkeypatch.setattr(draw_file, "tqdm", lambda **options: Bar(file=text, mininterval=0, **options))
    sample.main(["runs/done", "--steps", "3", "--n", "5", "--batch-size", "4", "--out", "bar.npz"])
    np.testing.assert_allclose(seen, [1, 2, 3, 4, 4.25, 4.5, 4.75, 5])
    counts = re.findall(r"\| ([\d.]+/[\d.]+) \[", text.getvalue())
    assert counts[-1] == "5/5" and "." not in "".join(counts) and len(set(counts)) == 6


@pytest.mark.parametrize("name", OF_ONE_TIME)
def test_a_share_is_told_after_each_step(cwd, name):
    shares = []
    checkpoint = checkpoints.load_checkpoint("runs/done")
    model = networks.build_model("dit", checkpoint["config"]).eval()
    cond = {"y": torch.tensor([0])}
    how = dict(sampler=name, steps=4)
    inputs = (model, networks.unpack_vae(checkpoint["vae"]), networks.build_path(checkpoint["objective"]),
              (4, 8, 8), range(1), cond)
    told = draw_file.draw(*inputs, progress=shares.append, **how)
    assert shares == [0.2, 0.4, 0.6, 0.8] and (told == draw_file.draw(*inputs, **how)).all()


def test_links_at_an_output_are_not_followed(cwd):
    Path("precious").write_bytes(b"precious")
    for name in ("link.npz.unfinished", "link.npz.unfinished.json", "linked/000000-red-circle.png",
                 "linked/unfinished.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).symlink_to(cwd / "precious")
    with pytest.raises(OSError, match="cannot write link.npz.unfinished: "):
        sample.main(["runs/done", "--steps", "1", "--n", "1", "--out", "link.npz"])
    sample.main(["runs/done", "--steps", "1", "--n", "1", "--out", "linked"])
    assert Path("precious").read_bytes() == b"precious"


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
    args = sample_settings.parse_args(["runs/x", *flags])
    assert sample_settings.choose_sampler(args, {"objective": objective, "config": {}}) == expected


@pytest.mark.parametrize("flags, message", [
    (["runs/done", "--label", "purple"], "--label purple: not a class"),
    (["runs/done", "--label", "24"], "0 to 23"),
    (["runs/done", "--label", "-1"], "--label -1"),
    (["runs/done", "--steps", "0"], "--steps 0"),
    (["runs/done", "--n", "0"], "--n 0"),
    (["runs/done", "--n", "999999999999"], "--n 999999999999: must be between 1 and 100,000,000"),
    (["runs/done", "--cfg", "nan"], "--cfg nan: must be between"),
    ([""], "run is empty; give a value"),
    (["--weights", ""], "--weights is empty"), (["--vae", ""], "--vae is empty"),
    (["runs/done", "--device", ""], "--device is empty"),
    (["runs/done", "--init-image", "a.png", "b.png"], "--init-image a.png b.png: a network begins with one"),
    (["--init-image", "a.png", "runs/done"], "give a run, .*; --init-image takes all names behind it, so"),
    (["runs/done", "--eta", "0.5", "--sampler", "heun"],
     "--eta 0.5: belongs to --sampler ddim or .*, not heun"),
    (["runs/done", "--churn", "5", "--sampler", "euler"],
     "--churn 5.0: belongs to --sampler heun, not euler"),
    (["runs/done", "--churn-max", "5"], "--churn-max 5: says how --churn acts; give that too"),
    (["runs/done", "--lower-order-final", "--sampler", "heun"],
     "--lower-order-final: belongs to --sampler dpmpp_2m or .*, not heun"),
    (["runs/done", "--cfg-channels", "5"], "--cfg-channels 5: the latent of this run has 4"),
    (["runs/done", "--cfg-channels", "3", "--cfg", "1"], "--cfg-channels 3 with guidance 1"),
    (["runs/done", "--skip-layers", "1"],
     "--skip-layers 1: only mmdit has blocks to skip; this run is a dit"),
    (["runs/done", "--skip-scale", "1"], "--skip-scale: says how --skip-layers acts; give that too"),
    (["runs/done", "--skip-steps", "0", "2"], "--skip-steps 2: must be between 0 and 1"),
    (["runs/done", "--times", "sd"], "--times sd: a spacing of the ddpm path; this run is on the path of rf"),
    (["runs/done", "--eta", "2"], "between 0 and 1"),
    (["runs/done", "--noise", "1", "--sampler", "ddpm"],
     "--noise 1.0: belongs to --sampler reverse_sde, not ddpm"),
    (["runs/done", "--noise", "-1"], "--noise -1"),
    (["runs/done", "--strength", "0.5"], "--strength 0.5: needs --init-image"),
    (["runs/done", "--strength", "1.5", "--init-image", "x.png"], "--strength 1.5: must be between 0 and 1"),
    (["runs/done", "--mask", "x.png"], "--mask x.png: needs --init-image"),
    (["runs/done", "--init-image", ""], "--init-image is empty"),
    (["runs/done", "--init-image", "none.png"], "--init-image none.png: cannot be read"),
    (["runs/done", "--init-image", "runs/done/samples.png", "--mask", "black.png"],
     r"--mask black.png: is nowhere lighter than middle grey \(its brightest pixel is 1 of 255\), so there"),
    (["runs/done", "--prompt", "a dog"],
     "--prompt a dog: this run is conditioned on class labels; use --label"),
    (["runs/done", "--embedding", "x.npz"], "--embedding x.npz"),
    (["runs/done", "--text-encoder", "clip:x"], "--text-encoder clip:x"),
    (["runs/done", "--rescale", "0.5", "--cfg", "1"], "--rescale 0.5 with guidance 1"),
    (["runs/done", "--rescale", "-1"], "--rescale -1: must be between 0 and 1"),
    (["runs/done", "--eta", "1", "--variance", "small"], "belongs to"),
    (["runs/done", "--variance", "learned"], "not trained to predict a variance"),
    (["runs/done", "--shift", "0"], "--shift 0: must be above 0"),
    (["runs/done", "--times", "leading"], "a spacing of the ddpm path"),
    (["runs/done", "--interval", "0.8", "0.2"], "--interval 0.8 0.2"),
    (["runs/done", "--interval", "0", "1.5"], "--interval 1.5: must be between 0 and 1"),
    (["runs/done", "--interval", "0.1", "0.5", "--cfg", "1"], "--interval 0.1 0.5 with guidance 1"),
    (["runs/done", "--cfg", "0", "--label", "1"], "unconditional"),
    (["runs/done", "--out", "x.bmp"], "must end in"),
    (["runs/done", "--out", "no/such/x.png"], "does not exist"),
    (["runs/done", "--out", ""], "--out is empty"),
    (["runs/done", "--out", "file/within"], "--out file/within: file is a file, not a folder; choose"),
    (["runs/done", "--out", "file/x.png"], "--out file/x.png: file is a file, not a folder; choose another"),
    (["runs/done", "--out", "file/a/b/x.png"], "--out file/a/b/x.png: file is a file, not a folder"),
    (["runs/done", "--out", "broken/x.png"], "broken is a link to a folder that does not exist; make that"),
    (["runs/done", "--out", "broken/a/x.npz"], "broken is a link to a folder that does not exist; make that"),
    (["runs/done", "--out", "broken/a"], "--out broken/a: broken is a link to a folder that does not exist"),
    (["runs/done", "--out", "broken"], "--out broken: broken is a link to a folder that does not exist"),
    (["runs/done", "--out", "/proc/x.png"], "/proc/x.png: cannot be written"),
    (["runs/done", "--out", "/proc/x"], "/proc/x: cannot be written"),
    (["runs/done", "--out", "x" * 300 + ".png"], "a name of 304 bytes"),
    (["runs/done", "--out", "ü" * 120], "a name of 240 bytes"),
    (["runs/done", "--n", "90000000", "--out", "x.png"], "--n 90000000 --out x.png: a grid of .* pixels"),
    (["runs/done", "--n", "200000", "--out", "x.png"], "a grid of"),
    (["runs/done", "--n", "50000", "--out", "x.jpg"], "a grid of 816 x 70,856 pixels is more than .jpg"),
    (["runs/done", "--n", "20000", "--out", "x.webp"], "more than .webp"),
    (["runs/done", "--n", "20000", "--out", "x.gif", "--steps", "100"],
     "--n 20000 --steps 100 --out x.gif: 100 frames, each a grid of .* .gif or the memory .* fewer --steps"),
    (["runs/done", "--out", "folder.png"], "there is a folder of that name"),
    (["runs/done", "--out", "file"], "there is a file of that name"),
    (["runs/done", "--device", "tpu"], "--device tpu"),
    (["runs/shapes-vae"], "this run is a VAE"),
    (["runs/nothing"], "no checkpoint"),
])
def test_sample_refuses(cwd, flags, message):
    (cwd / "folder.png").mkdir(exist_ok=True)
    (cwd / "file").write_bytes(b"")
    if not (cwd / "broken").is_symlink():
        (cwd / "broken").symlink_to("no-such-folder")
    Image.new("RGB", (32, 32), (1, 1, 1)).save("black.png")
    before = contents(cwd)
    with pytest.raises(ValueError, match=message):
        sample.main(flags)
    assert contents(cwd) == before


@pytest.mark.parametrize("flags, message", [
    (["--n", "100000000", "--out", "x.npz"], "--n 100000000 --out x.npz: takes 572.2 GiB, and 100.0 GiB are"),
    (["--n", "100000000", "--out", "y"], "--n 100000000 --out y: takes 381.5 GiB"),
    (["--n", "1000000", "--batch-size", "1000000", "--out", "x.npz"],
     "--batch-size 1000000 needs at least 61.0 GiB of memory .*; give a smaller one"),
])
def test_more_than_the_machine_has_is_refused(cwd, monkeypatch, flags, message):
    """A disk with 100 GiB left, and 4 GiB of memory."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 * 2**30))
    monkeypatch.setattr(settings.os, "sysconf", lambda name: 2**16)
    before = contents(cwd)
    with pytest.raises(ValueError, match=message):
        sample.main(["runs/done", "--device", "cpu", *flags])
    assert contents(cwd) == before


def test_guidance_needs_dropout(cwd):
    train.main(["--arch", "dit", *ON_VAE, "--label-dropout", "0", "--name", "nodrop"])
    for scale in ("2", "0"):
        with pytest.raises(ValueError, match="label dropout 0"):
            sample.main(["runs/nodrop", "--cfg", scale])
    sample.main(["runs/nodrop", "--n", "1", "--steps", "1", "--out", "nodrop.png"])


# ---- autoguidance

@pytest.fixture
def weaker(cwd, tmp_path):
    """An earlier checkpoint of the run in `home`, whose network returns half of what the run's returns."""
    checkpoint = checkpoints.load_checkpoint("runs/done")
    last = [name for name in checkpoint["ema"] if name.startswith("final_layer.linear")]
    assert last
    checkpoint["ema"] = checkpoint["ema"] | {name: checkpoint["ema"][name] / 2 for name in last}
    torch.save(checkpoint, tmp_path / "checkpoint-000020.pt")
    return str(tmp_path / "checkpoint-000020.pt")


def test_a_run_guides_itself(cwd, weaker):
    """By half of its output: half + 3 (whole - half) is twice the whole, at every step."""
    flags = ["--n", "3", "--label", "red-circle"]
    plain = draw(*flags, "--cfg", "1", out="plain.npz")
    itself = draw(*flags, "--guide", "runs/done", "--cfg", "3", out="self.npz")
    assert np.abs(itself.astype(int) - plain).max() <= 1

    checkpoint = checkpoints.load_checkpoint("runs/done")
    model = networks.build_model("dit", checkpoint["config"]).eval()
    model.load_state_dict(checkpoint["ema"])
    vae, path = networks.unpack_vae(checkpoint["vae"]), networks.build_path(checkpoint["objective"])
    expected = draw_file.draw(lambda *inputs, **cond: 2 * model(*inputs, **cond), vae, path, (4, 8, 8),
                              range(3), {"y": torch.zeros(3, dtype=torch.long)}, sampler="heun", steps=3)
    found = draw(*flags, "--guide", weaker, "--cfg", "3", out="guided.npz")
    assert np.abs(found.astype(int) - expected).max() <= 1 and np.abs(expected.astype(int) - plain).max() > 3


def test_guidance_of_text_runs_has_its_own_encoder(cwd, text_runs, tmp_path):
    """Each network is given the prompt as its own encoder reads it, for few prompts and for many."""
    for folder in text_runs:
        checkpoint = checkpoints.load_checkpoint(folder)
        shuffled = {name: weight.flip(0) if name.startswith("text.") else weight
                    for name, weight in checkpoint["ema"].items()}
        torch.save(checkpoint | {"ema": shuffled}, tmp_path / "other.pt")
        prompts = ["--prompt", "a red circle", "a blue square", "--steps", "2"]
        other = draw_two(str(tmp_path / "other.pt"), *prompts, "--cfg", "1")
        assert np.abs(other - draw_two(folder, *prompts, "--cfg", "1")).max() > 0
        # scale 0 is refused as a flag; close to it, the guide alone draws
        guided = ["--guide", str(tmp_path / "other.pt"), "--cfg", "1e-6"]
        assert np.abs(draw_two(folder, *prompts, *guided) - other).max() <= 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sample.conditioning, "ENCODED_AT_ONCE", 1)
            assert np.abs(draw_two(folder, *prompts, *guided) - other).max() <= 1


def test_pictures_of_another_guide_are_not_mixed(cwd, weaker, monkeypatch):
    command = ["runs/done", "--steps", "1", "--n", "4", "--batch-size", "2", "--cfg", "3", "--out",
               "guides.npz"]
    draw_batch, drawn = draw_file.draw, []

    def killed(*inputs, **options):
        if len(drawn) == 1:
            raise Killed
        drawn.append(1)
        return draw_batch(*inputs, **options)

    monkeypatch.setattr(draw_file, "draw", killed)
    with pytest.raises(Killed):
        sample.main([*command, "--guide", weaker])
    for other in ([], ["--guide", "runs/done"]):
        with pytest.raises(ValueError, match="2 pictures are there, drawn with guide"):
            sample.main([*command, *other])
    monkeypatch.setattr(draw_file, "draw", draw_batch)
    sample.main([*command, "--guide", weaker])
    continued = np.load("guides.npz")["arr_0"]
    sample.main([*command, "--guide", weaker])
    assert (np.load("guides.npz")["arr_0"] == continued).all()


def changed(name, value):
    return lambda checkpoint: checkpoint["objective"].update({name: value})


@pytest.mark.parametrize("change, message", [
    (changed("prediction", "x0"), "its prediction is x0, where the run has velocity; give an earlier"),
    (lambda c: c.update(objective={"name": "ddpm"}), "--objective ddpm, where the run has rf"),
    (lambda c: c["data"].update(size=[64, 32]), "draws pictures of 64x32, where the run has 32x32"),
    (lambda c: c["data"]["classes"].reverse(), "its classes are .*, where the run has red-circle"),
    (lambda c: c["vae"]["state"]["latent_mean"].add_(1), "on the latents of another VAE"),
])
def test_a_guide_that_does_not_fit_is_refused(cwd, tmp_path, change, message):
    checkpoint = checkpoints.load_checkpoint("runs/done")
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "guide.pt")
    before = contents(cwd)
    with pytest.raises(ValueError, match=message) as refusal:
        sample.main(["runs/done", "--guide", str(tmp_path / "guide.pt"), "--out", "refused.png"])
    assert contents(cwd) == before and "\n" not in str(refusal.value)


def test_guides_of_other_kinds_are_refused(cwd, text_runs):
    for flags, message in ((["runs/done", "--guide", text_runs[0]], "its text encoder is bytes, where the"),
                           (["runs/done", "--guide", "runs/shapes-vae"], "is a VAE alone"),
                           (["runs/done", "--guide", "runs/nothing"], "--guide runs/nothing: no checkpoint"),
                           (["runs/done", "--guide", "runs/done", "--cfg", "1"], "--guide runs/done with"),
                           (["runs/done", "--guide", ""], "--guide is empty")):
        with pytest.raises(ValueError, match=message):
            sample.main([*flags, "--out", "refused.png"])


# ---- files

@pytest.mark.parametrize("kind", ["png", "gif", "npz"])
def test_a_failed_write_keeps_the_old_picture(cwd, monkeypatch, kind):
    old = Path(f"old.{kind}")
    old.write_bytes(b"precious")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr(files, "npz_writer", full)
    with pytest.raises(OSError, match=f"cannot write old.{kind}.*: .*No space left"):
        sample.main(["runs/done", "--steps", "2", "--n", "2", "--out", str(old)])
    assert old.read_bytes() == b"precious" and not list(Path().glob("*.part"))


@pytest.mark.parametrize("prediction", ["velocity", "x0", "eps"])
def test_sampling_begins_with_the_deviation_that_xt_has_there(prediction, monkeypatch):
    """With eps prediction, the straight path begins before t = 1, where xt varies less than noise does. From
    the exact denoiser of data of deviation 1, samples have that deviation."""
    def network(xt, t, **cond):
        alpha, sigma = (part.view(-1, 1, 1, 1) for part in path.alpha_sigma(t))
        x0, eps = alpha * xt / (alpha**2 + sigma**2), sigma * xt / (alpha**2 + sigma**2)     # E[x0 | xt], ...
        return {"velocity": eps - x0, "x0": x0, "eps": eps}[prediction]

    path = RectifiedFlow(prediction)
    vae = networks.build_model("vae", {"widths": (8, 16), "groups": 4})
    latents, decode = [], vae.decode
    monkeypatch.setattr(vae, "decode", lambda x0: latents.append(x0) or decode(x0))
    draw_file.draw(network, vae, path, (4, 32, 32), range(8), {}, sampler="heun", steps=40)
    generators = [torch.Generator().manual_seed(i) for i in range(8)]
    noise = samplers.noise_like(torch.empty(8, 4, 32, 32), generators)
    assert abs(latents[0].std() / noise.std() - 1) < 2e-3
