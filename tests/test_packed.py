"""Pictures of different sizes in one batch: sizes, ragged caches, the packing of an epoch, networks, runs."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import checkpoints
import conditioning
import data
import dit
import mixed
import mmdit
import moe
import networks
import plan
import sample
import sample_settings
import settings
import text
import toys
import train
from attention import attention_apart, pack
from cache import MixedLatentCache, TextCache
from conftest import DAMAGE, damage, same, weights
from ddpm import DDPM
from pictures import cover, read_image, to_tensor
from ragged import fitted, groups_of_equal, open_ragged, ragged, write_ragged
from rectified_flow import RectifiedFlow, shift_time
from state import State
from test_parallel import assert_close
from vae import VAE, VAEConfig

GRIDS = [(4, 8), (6, 6), (6, 6), (2, 12), (8, 4)]            # heights and widths of latents, with patch 2
LENGTHS = [3, 1, 5, 2, 2]                                    # of their texts
TEXT = dict(width=32, depth=2, heads=2, context_width=8, pooled_width=6, rope=(4, 6, 6))


def randomized(model, dtype=torch.float32):
    """Zero-initialised layers hide mistakes."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.15 if p.ndim > 1 else 0.3)
    return model.to(dtype)


def small_networks():
    plain = dit.DiTConfig(width=32, depth=2, heads=2, num_classes=3)
    yield "dit", dit.DiT(plain)
    yield "dit published", dit.DiT(dit.DiTConfig(width=32, depth=2, heads=2, num_classes=3,
                                                 **dit.PUBLISHED_BLOCK))
    for name, more in (("mmdit", {}), ("flux", dict(single_depth=2)), ("sd3.5", dict(dual_attention=1)),
                       ("sd3", dict(sincos=(8, 16), rope=None, pooled_width=None))):
        yield name, mmdit.MMDiT(mmdit.MMDiTConfig(**TEXT | more))


NETWORKS = dict(small_networks())


def inputs(name, dtype=torch.float32):
    """Latents, times and conditions of five pictures."""
    g = torch.Generator().manual_seed(1)
    x = [torch.randn(4, *grid, generator=g, dtype=torch.float64).to(dtype) for grid in GRIDS]
    t = torch.rand(5, generator=g, dtype=torch.float64).to(dtype)
    if name.startswith("dit"):
        return x, t, {"y": torch.tensor([0, 1, 2, 3, 0])}
    cond = {"context": [torch.randn(n, 8, generator=g, dtype=torch.float64).to(dtype) for n in LENGTHS]}
    if name != "sd3":
        cond["pooled"] = torch.randn(5, 6, generator=g, dtype=torch.float64).to(dtype)
    return x, t, cond


def row(cond, i):
    return {name: part[i][None] for name, part in cond.items()}


# ---- networks

@pytest.mark.parametrize("name", NETWORKS)
def test_packed_equals_each_picture_alone(name):
    """The loss of each picture, and the gradients of their sum, in fp32 against float64."""
    model = randomized(NETWORKS[name])
    x, t, cond = inputs(name)
    raws = model(x, t, **cond)
    for i, raw in enumerate(raws):
        alone = model(x[i][None], t[i:i + 1], **row(cond, i))[0]
        assert raw.shape == x[i].shape
        torch.testing.assert_close(raw, alone, atol=1e-5, rtol=1e-5)
    model.double()
    x, t, cond = inputs(name, torch.float64)
    targets = [torch.randn_like(part) for part in x]
    together = sum((raw * y).sum() for raw, y in zip(model(x, t, **cond), targets))
    apart = sum((model(x[i][None], t[i:i + 1], **row(cond, i))[0] * targets[i]).sum() for i in range(5))
    for a, b in zip(*(torch.autograd.grad(part, list(model.parameters()), allow_unused=True)
                      for part in (together, apart))):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NETWORKS)
def test_neighbours_and_order_change_nothing(name):
    model = randomized(NETWORKS[name], torch.float64)
    x, t, cond = inputs(name, torch.float64)
    want = model(x, t, **cond)
    order = [3, 0, 4, 2, 1]
    turned = {key: part[order] if isinstance(part, torch.Tensor) else [part[i] for i in order]
              for key, part in cond.items()}
    for i, raw in zip(order, model([x[i] for i in order], t[order], **turned)):
        torch.testing.assert_close(raw, want[i])
    other = [x[0], *(torch.randn_like(part) for part in x[1:])]
    torch.testing.assert_close(model(other, t, **cond)[0], want[0])


def test_padded_text_is_taken_without_its_padding():
    model = randomized(NETWORKS["flux"], torch.float64)
    x, t, cond = inputs("flux", torch.float64)
    padded = nn.utils.rnn.pad_sequence(cond["context"], batch_first=True, padding_value=9)
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    for a, b in zip(model(x, t, **cond | {"context": padded, "mask": mask}), model(x, t, **cond)):
        torch.testing.assert_close(a, b)
        assert torch.isfinite(a).all()


def test_texts_packed_by_the_encoder_and_the_cache(tmp_path):
    encoder = text.TextEncoder(text.TextConfig(width=16, depth=2, heads=2)).double().requires_grad_(False)
    prompts = ["a red circle", "", "one two three four five", "x"]
    padded, packed = encoder(prompts), encoder.packed(prompts)
    for rows, context, mask in zip(packed["context"], padded["context"], padded["mask"]):
        torch.testing.assert_close(rows, context[mask])
    torch.testing.assert_close(packed["pooled"], padded["pooled"])
    table = TextCache(tmp_path / "text.bin", prompts, encoder.float(), "e")
    for rows, context, mask in zip(table.packed(prompts)["context"], *list(table(prompts).values())[:2]):
        assert torch.equal(rows, context[mask])
    model = nn.Module()
    model.config = mmdit.MMDiTConfig(context_width=16, pooled_width=16)
    cond = conditioning.network_inputs(model, encoder, prompts, torch.device("cpu"), packed=True)
    assert [len(rows) for rows in cond["context"]] == padded["mask"].sum(1).tolist() and "mask" not in cond


def test_attention_apart_by_runs():
    lengths = [3, 3, 1, 5, 5, 5]
    q, k, v = torch.randn(3, 1, 2, sum(lengths), 8, dtype=torch.float64)
    owner = pack(lengths).owner
    weights = (q @ k.mT / 8**0.5).masked_fill(owner[:, None] != owner, -math.inf).softmax(-1)
    torch.testing.assert_close(attention_apart(q, k, v, pack(lengths), False), weights @ v)


def test_a_convolution_is_refused():
    model = dit.DiT(dit.DiTConfig(width=32, depth=1, heads=2, conv=True))
    with pytest.raises(ValueError, match="conv: a convolution between tokens needs latents of one size"):
        model([torch.randn(4, 4, 4)], torch.rand(1))


# ---- paths

@pytest.mark.parametrize("path", [RectifiedFlow(), RectifiedFlow("x0", loss_space="velocity"), DDPM(),
                                  DDPM("v", min_snr=5.0)])
def test_loss_of_each_picture(path):
    model = randomized(NETWORKS["dit"], torch.float64)
    x, t, cond = inputs("dit", torch.float64)
    eps = [torch.randn_like(part) for part in x]
    got = path.loss(model, x, t=t, eps=eps, **cond)
    want = [path.loss(model, x[i][None], t=t[i:i + 1], eps=eps[i][None], **row(cond, i)) for i in range(5)]
    torch.testing.assert_close(got, torch.cat(want))


def test_the_shift_follows_the_tokens():
    """Esser et al.: sqrt(m / n), and no shift at n tokens."""
    path, plain = RectifiedFlow(shift_tokens=64), RectifiedFlow()
    tokens = torch.tensor([16, 64, 256, 1024])
    torch.manual_seed(3)
    got = path.training_times(4, tokens)["t"]
    torch.manual_seed(3)
    u = plain.training_times(4, tokens)["t"].double()
    want = torch.stack([shift_time(u[i], shift) for i, shift in enumerate((0.5, 1.0, 2.0, 4.0))])
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-5)
    args = sample_settings.parse_args(["RUN"])
    checkpoint = {"objective": {"name": "rf", "shift_tokens": 64}, "config": {}}
    assert sample_settings.sampling_path(args, checkpoint, 256) == {"name": "rf", "shift": 2.0}
    args.shift = 3.0
    assert sample_settings.sampling_path(args, checkpoint, 256) == {"name": "rf", "shift": 3.0}
    x0 = torch.zeros(2, 4, 8, 8)                           # without tokens: never a silent shift of 1
    for call in (lambda: path.loss(lambda xt, t: xt, x0), lambda: path.sample_t(3), lambda: path.times(3)):
        with pytest.raises(ValueError, match="shift_tokens 64: the shift follows each picture's tokens"):
            call()
    with pytest.raises(ValueError, match="shift_tokens 64: must be at least 1, and without a shift"):
        RectifiedFlow(shift=2.0, shift_tokens=64)


# ---- sizes, and arrays of different shapes

def test_fitted_sizes():
    rng = np.random.default_rng(0)
    for _ in range(500):
        size = tuple(int(side) for side in rng.integers(1, 3000, 2))
        height, width = fitted(size, 256 * 256, (16, 32))
        assert height % 16 == width % 32 == 0 < height * width <= 256 * 256
        ratio = min(max(size[0] / size[1], 0.25), 4)
        if min(size) > 256:                                  # little is cropped, and the budget is used
            assert abs(math.log(height / width / ratio)) < 0.3 and height * width > 0.75 * 256 * 256
        # no larger than the picture, but for the multiples
        assert height * width <= max(1.0, (1 + 16 / size[0]) * (1 + 32 / size[1])) * 4 * max(
            math.prod(size), 512)
    assert fitted((500, 500), 32 * 32, (8, 8)) == (32, 32)
    assert fitted((24, 40), 10**6, (8, 8)) == (24, 40)       # as it is: never enlarged
    assert fitted((1, 10**6), 64 * 64, (8, 8)) == (32, 128)
    with pytest.raises(ValueError, match="48 pixels are less than one token of 8x8"):
        fitted((10, 10), 48, (8, 8))


def test_ragged_arrays(tmp_path):
    arrays = [np.arange(math.prod(shape), dtype=np.uint8).reshape(shape) for shape in
              ((2, 3, 3), (4, 1, 3), (2, 3, 3), (1, 1, 3))]
    shapes = write_ragged(tmp_path / "a.bin", iter(arrays))
    again = open_ragged(tmp_path / "a.bin", np.uint8, shapes)
    assert isinstance(again.flat, np.memmap) and again.shape[-1] == 3
    for part in (again, ragged(arrays), again[:], again[np.arange(4)]):
        assert len(part) == 4 and all(np.array_equal(part[i], array) for i, array in enumerate(arrays))
    assert np.array_equal(again[np.array([3, 1])][1], arrays[1])
    assert np.array_equal(again[1:].stack(np.array([1])), arrays[2][None])
    groups = groups_of_equal(again.shapes, 18)
    assert sorted(map(tuple, groups)) == [(0,), (1,), (2,), (3,)]
    assert sorted(map(tuple, groups_of_equal(again.shapes, 36))) == [(0, 2), (1,), (3,)]
    for wrong in ([], None, [[2, 3, 3]], [[0, 3]], "x", [[2.5, "y"]]):
        assert open_ragged(tmp_path / "a.bin", np.uint8, wrong) is None
    assert open_ragged(tmp_path / "none.bin", np.uint8, shapes) is None


def write_pictures(folder, count=9):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        size = ((30, 20), (64, 64), (20, 90))[i % 3]
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def test_a_folder_at_its_own_aspect_ratios(tmp_path, capsys):
    folder = tmp_path / "pictures"
    write_pictures(folder)
    (folder / "broken.png").write_bytes(b"no picture")

    def load(split="train", pixels=(32, 32)):
        return data.load_data(str(folder), split, pixels, tmp_path, tmp_path, multiple=(8, 8))

    first, val = load(), load("val")
    for part, names in ((first, range(1, 9)), (val, [0])):
        for i, name in enumerate(names):
            image = read_image(folder / f"{name}.png")
            size = fitted(image.size[::-1], 1024, (8, 8))
            assert np.array_equal(part.images[i], cover(image, size))
    assert {tuple(shape) for shape in first.images.shapes.tolist()} == {(32, 32, 3), (32, 24, 3), (16, 64, 3)}
    cache = tmp_path / "images-8x8.bin"
    written = cache.stat().st_mtime_ns
    assert load().fingerprint == first.fingerprint and cache.stat().st_mtime_ns == written
    want = first.images[4].copy()
    for how in DAMAGE[:3]:
        damage(cache, how)
        assert np.array_equal(load().images[4], want)
        assert "images-8x8.bin is damaged: rebuilding it" in capsys.readouterr().out
    damage(tmp_path / "images-8x8.json", "text")
    assert np.array_equal(load().images[4], want)
    Image.new("RGB", (50, 50), (1, 2, 3)).save(folder / "3.png")            # another content and size
    changed = load()
    assert changed.fingerprint != first.fingerprint and tuple(changed.images[2][0, 0]) == (1, 2, 3)
    assert load(pixels=(24, 24)).fingerprint != changed.fingerprint


def test_mixed_latents(tmp_path, capsys):
    pictures = data.load_drawn("shapes", "train", (32, 32), count=48, multiple=(8, 8))
    vae = VAE(VAEConfig(widths=(8, 16), groups=4)).eval()

    def encode(images, mirrored):
        x = to_tensor(images)
        posterior = vae.encode(x.flip(-1) if mirrored else x)
        return posterior.mean, posterior.std

    def cached(stamp="v1"):
        return MixedLatentCache(tmp_path / "latents.npy", pictures.images, encode, 4, 2,
                                {"vae": stamp, "data": pictures.fingerprint}, flip=True)

    cache = cached()
    sums, count = torch.zeros(2, 4, dtype=torch.float64), 0
    for i in range(48):
        x = to_tensor(pictures.images[i][None])
        for f in range(2):
            with torch.no_grad():
                q = vae.encode(x.flip(-1) if f else x)
            np.testing.assert_allclose(cache.latents[i][f, 0], q.mean[0], atol=2e-3)
            np.testing.assert_allclose(cache.latents[i][f, 1], q.std[0], atol=2e-3)
            mean, std = torch.from_numpy(cache.latents[i][f].astype(np.float64)).flatten(2)
            sums += torch.stack([mean.sum(1), (mean**2 + std**2).sum(1)])
            count += mean.shape[1]
    mean, var = cache.statistics()
    torch.testing.assert_close(mean, sums[0] / count)                       # every pixel counts the same
    torch.testing.assert_close(var, sums[1] / count - (sums[0] / count) ** 2)

    chosen = np.array([5, 0, 7])
    z = cache.split(cache.batch(chosen, generator=torch.Generator().manual_seed(4)), chosen)
    g = torch.Generator().manual_seed(4)
    flip = torch.randint(2, (3,), generator=g)
    parts = [torch.from_numpy(cache.latents[i][f].astype(np.float32)) for i, f in zip(chosen, flip)]
    sizes = [part[0].shape for part in parts]
    noise = torch.randn(sum(map(math.prod, sizes)), generator=g).split([math.prod(size) for size in sizes])
    for got, part, eps in zip(z, parts, noise):
        torch.testing.assert_close(got, part[0] + part[1] * eps.view(part[0].shape))
    want = np.array(cache.latents.flat)
    for how in ("cut", "missing"):
        damage(tmp_path / "latents.npy", how)
        assert np.array_equal(cached().latents.flat, want)
        assert "rebuilding it" in capsys.readouterr().out
    cached("v2")
    assert "another VAE, other data" in capsys.readouterr().out


# ---- the order of the data

TOKENS = np.random.default_rng(7).integers(1, 17, 101)


def test_packing_is_a_pure_function_and_loses_nothing():
    budget, length = 50, int(TOKENS.sum())
    steps = [data.packed_indices(TOKENS, budget, step, 3) for step in range(4 * length // budget + 1)]
    stream = np.concatenate(steps)
    for epoch in range(4):                                   # each picture once, none dropped or repeated
        assert sorted(stream[epoch * 101:(epoch + 1) * 101]) == list(range(101))
    assert not np.array_equal(stream[:101], stream[101:202])
    used = [TOKENS[step].sum() for step in steps]
    assert all(budget - 16 < tokens < budget + 16 for tokens in used) and min(map(len, steps)) > 0
    assert abs(np.cumsum(used) - budget * np.arange(1, len(used) + 1)).max() < 16
    for step in (17, 3, 40):                                 # whatever was asked for before
        assert np.array_equal(data.packed_indices(TOKENS, budget, step, 3), steps[step])
    assert not np.array_equal(data.packed_indices(TOKENS, budget, 0, 4), steps[0])
    # A step of several epochs.
    counts = np.bincount(data.packed_indices(TOKENS, 3 * length, 5, 0), minlength=101)
    assert (counts == 3).all()
    with pytest.raises(ValueError, match="a budget of 15 tokens is less than the largest picture's 16"):
        data.packed_indices(TOKENS, 15, 0, 0)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_are_contiguous_and_nearly_equal(count):
    for step in range(20):
        tokens = TOKENS[data.packed_indices(TOKENS, 160, step, 0)]
        parts = data.shares(tokens, count)
        assert parts[0].start == 0 and parts[-1].stop == len(tokens)
        assert all(a.stop == b.start for a, b in zip(parts, parts[1:]))
        sums = [tokens[part].sum() for part in parts]
        assert min(sums) > 0 and max(abs(total - tokens.sum() / count) for total in sums) <= 16
    with pytest.raises(ValueError, match="3 pictures in a step cannot be cut into 4 parts"):
        data.shares(np.ones(3), 4)
    assert data.shares(np.array([100, 1, 1]), 3) == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_grouped_batches_have_few_sizes_and_every_picture_once():
    shapes = np.random.default_rng(0).choice([16, 24, 32], (300, 2))
    steps = [data.grouped_indices(shapes, 8, step, 1) for step in range(75)]
    stream = np.concatenate(steps)
    assert sorted(stream[:300]) == list(range(300)) and sorted(stream[300:]) == list(range(300))
    sizes = [len(np.unique(shapes[step], axis=0)) for step in steps]
    assert np.mean(sizes) < 2 and np.array_equal(data.grouped_indices(shapes, 8, 9, 1), steps[9])
    # Sizes do not come in their order.
    assert len({tuple(shapes[step[0]]) for step in steps[:8]}) > 3


# ---- runs

FLAGS = ["--aspect", "--preset", "tiny", "--vae-preset", "tiny", "--precision", "fp32", "--steps", "6",
         "--vae-steps", "5", "--save-every", "2", "--warmup", "2", "--preview-every", "3", "--val-every", "3"]


@pytest.fixture
def folder(tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "SAMPLE_ROWS", 3)
    (tmp_path / "pictures").mkdir()
    for i in range(60):
        size = ((32, 32), (24, 40), (48, 16), (20, 20))[i % 4]
        Image.new("RGB", size, (4 * i, 255 - 4 * i, 90)).save(f"pictures/{i:02d}.png")
        (tmp_path / f"pictures/{i:02d}.txt").write_text(" ".join(["word"] * (i % 7)) or "none")
    return tmp_path


def interrupted(monkeypatch, command, after):
    """Train with a signal's effect after so many steps, then go on."""
    real, done = train.update, []

    def update(*args):
        done.append(1)
        if len(done) > after:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train, "update", update)
    with pytest.raises(KeyboardInterrupt):
        train.main(command)
    monkeypatch.setattr(train, "update", real)
    train.main(command)


@pytest.mark.parametrize("arch, more", [
    ("dit", ["--tokens", "96", "--flip", "--shift-tokens", "16", "--experts", "4"]),
    ("mmdit", ["--batch-size", "8", "--accumulate", "2", "--objective", "ddpm", "--grad-checkpoint"])])
def test_a_run_resumes_bit_for_bit(folder, monkeypatch, arch, more):
    command = ["--arch", arch, "--data", "pictures", *FLAGS, *more]
    train.main([*command, "--name", "whole"])
    interrupted(monkeypatch, [*command, "--name", "cut"], 3)
    assert same(weights("runs/whole"), weights("runs/cut"))
    checkpoint = checkpoints.load_checkpoint("runs/cut")
    assert checkpoint["data"]["size"] == [32, 32]
    assert checkpoint["data"]["aspect"] == {"pixels": 1024, "multiple": [8, 8], "smallest": [16, 24],
                                            "largest": [40, 48]}
    written = {path.name for path in (folder / "runs/cut").iterdir()}
    assert {"samples.png", "preview-000003-ema.png"} <= written
    last = json.loads(open("runs/whole/metrics.jsonl").readlines()[-1])
    assert ("experts.png" in written) == ("expert_load" in last) == ("--experts" in more)


def test_a_vae_of_mixed_sizes_resumes_bit_for_bit(folder, monkeypatch):
    command = ["--arch", "vae", "--aspect", "--data", "pictures", "--vae-preset", "tiny", "--steps", "6",
               "--save-every", "2", "--precision", "fp32", "--batch-size", "5", "--flip"]
    train.main([*command, "--name", "whole"])
    interrupted(monkeypatch, [*command, "--name", "cut"], 3)
    assert same(weights("runs/whole"), weights("runs/cut"))
    sample.main(["runs/cut", "--init-image", "pictures/02.png", "--size", "48", "16", "--out", "both.png"])
    assert Image.open("both.png").size[1] > 48


@pytest.mark.long
@pytest.mark.parametrize("arch, more, layout", [
    ("dit", ["--tokens", "128", "--flip", "--shift-tokens", "16"], []),
    ("dit", ["--batch-size", "12"], ["--shard", "--tensor-parallel", "2"]),
    ("mmdit", ["--batch-size", "8", "--accumulate", "2"], ["--shard"])])
def test_two_processes_train_mixed_sizes_as_one(launch, folder, arch, more, layout):
    """The VAE too, which the same command trains first."""
    command = ["--arch", arch, "--data", "pictures", *FLAGS, "--clip", "1e9", *more]
    for count, flags in ((1, []), (2, layout)):
        statuses, printed = launch(folder, count, *command, *flags, "--runs-dir", f"runs-{count}").end()
        assert statuses == [0] * count, printed
    for name in ("pictures-aspect-vae", f"pictures-aspect-{arch}-rf"):
        assert_close(weights(f"runs-2/{name}"), weights(f"runs-1/{name}"), name, most=1e-5)
        two, one = [json.loads(open(f"runs-{count}/{name}/metrics.jsonl").readline()) for count in (2, 1)]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)         # each picture counts the same


def mixed_task(folder, *flags):
    args = settings.parse(["--arch", "dit", "--aspect", "--data", "pictures", "--preset", "tiny",
                           "--vae-preset", "tiny", *flags])
    planned = plan.prepare(args)
    planned.vae = networks.build_model("vae", settings.vae_config(planned.vae_args, 3)).eval()
    parts = [data.load_data("pictures", split, (32, 32), folder, folder, multiple=planned.multiple)
             for split in ("train", "val")]
    planned.conditioning.attach(*parts, folder, resumed=False)
    return mixed.MixedDenoising(args, *parts, planned, folder), planned


def test_a_step_and_its_pieces(folder):
    """Every picture counts the same, whatever the pieces; neighbours of equal tokens."""
    task, planned = mixed_task(folder, "--tokens", "128", "--accumulate", "3", "--label-dropout", "0")
    assert planned.tokens == 128 and planned.multiple == (8, 8)
    batch = task.order(4)
    assert (np.diff(task.tokens[batch]) >= 0).all()
    parts = task.split(batch)
    assert len(parts) == 3 and np.array_equal(np.concatenate(parts), batch)
    model = randomized(task.build())
    args = settings.parse(["--arch", "dit", "--accumulate", "4"])
    state = State(model, {}, torch.device("cpu"), torch.optim.SGD(model.parameters(), 0.0))
    norms = []
    for pieces in (parts, [batch]):
        def loss(model, indices):
            return torch.stack([model.final_layer.linear.weight.sum() * (float(i) + 1) for i in indices]), (
                torch.zeros(len(indices)))

        stub = type("Stub", (), {"loss": staticmethod(loss), "split": staticmethod(lambda batch: pieces)})
        args.clip = 1e9
        norms.append(train.update(args, planned, stub, state, batch, 0.0)[1])
    torch.testing.assert_close(norms[0], norms[1])


def test_validation_equals_every_picture_alone(folder):
    task, planned = mixed_task(folder, "--tokens", "16")
    model = randomized(task.build())
    with torch.no_grad():
        got = task.validate(model, [])
        want = [task.path.loss(model, x0[None], t=task.t[i:i + 1], eps=task.eps[i][None])
                for i, x0 in enumerate(task.x0)]
    assert got["val_loss"] == pytest.approx(torch.cat(want).mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["dit", "mmdit"])
def test_loads_of_experts_equal_those_of_each_picture_alone(name):
    experts = dict(experts=4, moe_blocks="all")
    if name == "dit":
        model = dit.DiT(dit.DiTConfig(width=32, depth=2, heads=2, num_classes=3, **experts))
    else:
        model = mmdit.MMDiT(mmdit.MMDiTConfig(**TEXT, **experts))
    randomized(model)
    x, _, cond = inputs(name)
    t = torch.tensor([0.1, 0.9, 0.2, 0.3, 1.0])
    with torch.no_grad():
        with moe.counted(model) as packed:
            model(x, t, **cond)
        with moe.counted(model) as alone:
            for i, picture in enumerate(x):
                model(picture[None], t[i:i + 1], **row(cond, i))
    assert len(alone.counts) == 2 and alone.record() == packed.record()
    for counts in packed.counts.values():                    # of the grids of 8, 9, 9, 6 and 8 patches
        assert counts[:, -1].tolist() == [8 + 9, 6, 0, 9 + 8]



def test_sizes_of_sample(cwd, capsys):
    """A run of one size draws others, the same way; picture i keeps its seed."""
    sample.main(["runs/done", "--size", "16", "48", "--n", "2", "--steps", "2", "--out", "wide.npz"])
    assert np.load("wide.npz")["arr_0"].shape == (2, 16, 48, 3)
    assert "--size 16 48: this run was trained on 32x32 only" in capsys.readouterr().err
    for out, more in (("a.npz", []), ("b.npz", ["--size", "32", "32"])):
        sample.main(["runs/done", "--n", "2", "--steps", "2", "--out", out, *more])
    assert np.array_equal(np.load("a.npz")["arr_0"], np.load("b.npz")["arr_0"])
    with pytest.raises(ValueError, match="--size 20 32: height must be a multiple of 8 and width of 8"):
        sample.main(["runs/done", "--size", "20", "32"])


@pytest.mark.parametrize("flags, message", [
    (["--arch", "unet"], "--aspect: belongs to --arch dit or mmdit or vae, not unet"),
    (["--arch", "dit", "--batch-size", "4", "--tokens", "99"],
     "--batch-size 4 with --tokens 99: both say how much a step takes; give one of them"),
    (["--arch", "dit", "--objective", "meanflow"], "--objective meanflow with --aspect: .*; use rf or ddpm"),
    (["--arch", "dit", "--reflow", "RUN"], "--reflow RUN with --aspect: its pairs are of one size"),
    (["--arch", "dit", "--conv"], "--conv with --aspect: a convolution needs tokens of one grid"),
    (["--arch", "dit", "--data", "mnist"], "--aspect: the pictures of --data mnist all have one size"),
    (["--arch", "dit", "--crop", "random", "--data", "pictures"], "--crop random with --aspect"),
    (["--arch", "dit", "--shift", "2", "--shift-tokens", "16"], "--shift 2 with --shift-tokens 16"),
    (["--arch", "dit", "--tokens", "15"],
     "--tokens 15: 15 tokens a step are too few for pictures of up to 16; give --tokens 16 or more"),
    (["--arch", "dit", "--tokens", "40", "--accumulate", "2"], "in 2 pieces are too few .* --tokens 64"),
    (["--arch", "dit", "--image-size", "6"], "--image-size 6 6 with --aspect: 36 pixels are less than one "
                                             "token of 8x8; give a larger one")])
def test_bad_input(folder, flags, message):
    with pytest.raises(ValueError, match=message):
        plan.prepare(settings.parse(["--aspect", *flags]))
    assert not (folder / "runs").exists()


def test_flags_that_need_aspect():
    for flag in ("--tokens", "--shift-tokens"):
        with pytest.raises(ValueError, match=f"{flag} 64: belongs to --aspect"):
            settings.parse(["--arch", "dit", flag, "64"])


def test_endless_pictures_of_any_size():
    shapes = data.load_drawn("shapes", "val", (32, 32), count=48, multiple=(8, 8))
    sizes = {tuple(shape[:2]) for shape in shapes.images.shapes.tolist()}
    assert len(sizes) > 5 and max(map(math.prod, sizes)) <= 1024
    assert shapes.classes == data.SHAPE_CLASSES
    names = ["-".join(toys.read_shape(shapes.images[i])) for i in range(96)]
    assert names == [shapes.classes[label] for label in shapes.labels[:96]]
    again = data.load_drawn.__wrapped__("shapes", "val", (32, 32), count=48, multiple=(8, 8))
    assert again.fingerprint == shapes.fingerprint
    scenes = data.load_drawn("scenes", "train", (32, 32), count=20, multiple=(8, 8))
    assert scenes.captions[3] == data.describe_scene(3).caption and scenes.vary is not None
