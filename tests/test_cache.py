"""cache.py: latents and text vectors, encoded once, and vectors that another program computed."""

import functools
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import DAMAGE, damage

import encoders
from cache import LatentCache, TextCache, check_embeddings, pieces, read_embeddings
from data import load_drawn
from files import read_stamp
from pictures import to_tensor
from vae import VAE, VAEConfig


# ---- latents

def make_cache(tmp_path, vae, flip=False, stamp="v1", count=48):
    shapes = load_drawn("shapes", "train", (32, 32), count=count)

    def encode(images, mirrored):
        assert not torch.is_grad_enabled()
        x = to_tensor(images)
        posterior = vae.encode(x.flip(-1) if mirrored else x)
        return posterior.mean, posterior.std

    shape = (vae.config.latent_channels, 32 // vae.factor, 32 // vae.factor)
    return LatentCache(tmp_path / "latents.npy", shapes.images, encode, shape,
                       {"vae": stamp, "data": shapes.fingerprint}, flip)


def test_latent_cache(tmp_path):
    vae = VAE(VAEConfig(widths=(8, 16), groups=4)).eval()
    cache = make_cache(tmp_path, vae, flip=True)
    x = to_tensor(load_drawn("shapes", "train", (32, 32), count=48).images[:5])
    with torch.no_grad():
        posterior, mirrored = vae.encode(x), vae.encode(x.flip(-1))
    assert cache.latents.shape == (48, 2, 2, 4, 16, 16) and isinstance(cache.latents, np.memmap)
    assert len(cache) == 48
    for f, q in enumerate((posterior, mirrored)):   # the mirrored picture's latent, not a mirrored latent
        np.testing.assert_allclose(cache.latents[:5, f, 0], q.mean, atol=2e-3)
        np.testing.assert_allclose(cache.latents[:5, f, 1], q.std, atol=2e-3)
    draws = torch.stack([cache.batch(np.arange(5)) for _ in range(400)])
    want = torch.stack([torch.stack([q.mean, q.mean**2 + q.std**2]) for q in (posterior, mirrored)]).mean(0)
    error = (draws.mean(0) - want[0]).abs() / draws.std(0)
    assert error.max() < 5.5 / 400**0.5 and draws.std(0).min() > 0.1  # resampled, both flips equally often
    mean, var = cache.statistics()
    latents = torch.from_numpy(cache.latents.astype(np.float64))
    total = latents[:, :, 0].mean((0, 1, 3, 4))
    torch.testing.assert_close(mean, total)
    torch.testing.assert_close(
        var, (latents[:, :, 0] ** 2 + latents[:, :, 1] ** 2).mean((0, 1, 3, 4)) - total**2)


def test_stale_latents_are_rebuilt(tmp_path, capsys):
    vae = VAE(VAEConfig(widths=(8, 16), groups=4)).eval()
    make_cache(tmp_path, vae)
    first = (tmp_path / "latents.npy").stat().st_mtime_ns
    make_cache(tmp_path, vae)
    assert ((tmp_path / "latents.npy").stat().st_mtime_ns == first
            and "rebuilding" not in capsys.readouterr().out)
    for change in (dict(stamp="v2"), dict(stamp="v2", flip=True), dict(stamp="v2", flip=True, count=72)):
        cache = make_cache(tmp_path, vae, **change)
        assert "rebuilding" in capsys.readouterr().out
        assert json.loads((tmp_path / "latents.json").read_text())["shape"] == list(cache.latents.shape)


def test_no_space_for_a_cache(tmp_path, monkeypatch):
    """A memory map would only fail when its pages are written, and then by killing the process."""
    vae = VAE(VAEConfig(widths=(8, 16), groups=4)).eval()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"cannot write .*latents.npy of 192 KiB: No space left"):
        make_cache(tmp_path, vae)
    assert {p.name for p in tmp_path.glob("latents*")} == {"latents.lock"}


def test_pieces_cover_every_picture_once():
    for shape in ((600, 32, 32, 3), (5, 512, 512, 3), (3, 4096, 4096, 1)):
        parts = pieces(shape)
        assert [i for part in parts for i in part] == list(range(shape[0]))
        assert max(map(len, parts)) <= max(1, 256 * 32 * 32 // (shape[1] * shape[2]))


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_latents_are_rebuilt(tmp_path, capsys, how):
    vae = VAE(VAEConfig(widths=(8, 16), groups=4)).eval()
    want = np.array(make_cache(tmp_path, vae).latents)
    damage(tmp_path / "latents.npy", how)
    assert (make_cache(tmp_path, vae).latents == want).all()
    state = "missing" if how == "missing" else "damaged"
    assert f"latents.npy is {state}: rebuilding it" in capsys.readouterr().out
    damage(tmp_path / "latents.json", how)
    assert (make_cache(tmp_path, vae).latents == want).all()
    np.save(tmp_path / "latents.npy", want.astype(np.float32))           # readable, but something else
    assert make_cache(tmp_path, vae).latents.dtype == np.float16
    np.save(tmp_path / "latents.npy", want[:, :, :1].repeat(2, 0))
    assert (make_cache(tmp_path, vae).latents == want).all()


def test_latents_under_a_former_fingerprint_are_kept(tmp_path):
    """Those of the same data: the stamp is renewed, and nothing is encoded again."""
    images, calls = np.zeros((3, 4, 4, 3), np.uint8), []

    def encode(pictures, mirrored):
        calls.append(len(pictures))
        return torch.ones(len(pictures), 1, 2, 2), torch.ones(len(pictures), 1, 2, 2)

    for data, former, count in (("old", (), 1), ("new", ("older", "old"), 1), ("new", (), 1),
                                ("newer", ("other",), 2), ("other vae", ("newer",), 3)):
        vae = "v2" if data == "other vae" else "v1"
        LatentCache(tmp_path / "latents.npy", images, encode, (1, 2, 2), {"vae": vae, "data": data},
                    former=former)
        assert len(calls) == count and read_stamp(tmp_path / "latents.json")["data"] == data


# ---- text

@pytest.mark.optional
@torch.no_grad()
def test_text_cache_of_a_recipe(pipelines, tmp_path):
    """No mask, as networks read the padding of these: context and pooled vectors as encoded, in float16."""
    for name, length in (("sdxl", 24), ("sd3", 24 + 256)):
        encoder = encoders.from_folder(name, pipelines[name][1], empty_is_null=True)
        prompts = ["a red circle", "blue"]
        for _ in range(2):
            table = TextCache(tmp_path / f"{name}.bin", prompts, encoder, "1")
            got, want = table(["blue", ""]), encoder(["blue", ""])
            assert set(got) == {"context", "pooled"} == set(want) and got["context"].shape == (2, length, 40)
            torch.testing.assert_close(got["context"], want["context"], atol=2e-3, rtol=2e-3)
            torch.testing.assert_close(got["pooled"], want["pooled"])
        assert got["context"][1].any() == (name == "sd3")          # XL's null condition is zeros


@pytest.mark.optional
def test_text_cache(published, tmp_path, capsys):
    """It returns the encoder's output, in float16; it is built once, and anew for other prompts."""
    encoder = encoders.from_folder("clip", str(published / "clip"))
    prompts = ["a red circle", "blue", "blue"]
    first = TextCache(tmp_path / "text.bin", prompts, encoder, "clip 1")
    with torch.no_grad():
        got, want = first(["blue", "", "a red circle"]), encoder(["blue", "", "a red circle"])
    assert first.widths == (16, 12) and torch.equal(got["mask"], want["mask"])
    torch.testing.assert_close(got["context"], want["context"], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(got["pooled"], want["pooled"])

    def never(prompts):
        raise AssertionError("encoded again")

    again = TextCache(tmp_path / "text.bin", prompts, never, "clip 1")
    assert torch.equal(again(["blue"])["context"], first(["blue"])["context"])
    for changed in ((["a square"], "clip 1"), (prompts, "clip 2")):
        with pytest.raises(AssertionError, match="encoded again"):
            TextCache(tmp_path / "text.bin", changed[0], never, changed[1])
    many = [f"{i:03d}" for i in range(100)]                      # two batches

    def uneven(prompts, width=3):
        width += "099" in prompts
        return {"context": torch.ones(len(prompts), 1, width),
                "mask": torch.ones(len(prompts), 1).bool()}

    def damaged(prompts, part, prompt, value):
        cond = {"context": torch.ones(len(prompts), 2, 3), "mask": torch.ones(len(prompts), 2).bool(),
                "pooled": torch.ones(len(prompts), 3)}
        if prompt in prompts:
            cond[part][prompts.index(prompt)] = value
        return cond

    with pytest.raises(ValueError, match=r"^063: .* widths \[4\], not \[3\]"):
        TextCache(tmp_path / "other.bin", many, uneven, "")
    for part, prompt, value, message in (("context", "070", 1e5, r"^070: .*\(context\).* below 65504"),
                                         ("context", "", np.nan, r"^the empty prompt: .*\(context\)"),
                                         ("pooled", "007", np.nan, r"^007: .*\(pooled\)"),
                                         ("pooled", "007", -np.inf, r"^007: .*\(pooled\)")):
        encode = functools.partial(damaged, part=part, prompt=prompt, value=value)
        with pytest.raises(ValueError, match=message):
            TextCache(tmp_path / "other.bin", many, encode, "")
    assert not (tmp_path / "other.json").exists()


# text.bin has no header, so only its size can be checked.
@pytest.mark.parametrize("name, how", [("text.bin", how) for how in DAMAGE if how not in ("zeros", "text")]
                         + [(name, how) for name in ("text.npz", "text.json") for how in DAMAGE]
                         + [("text.npz", "one pooled vector"), ("text.npz", "square ends")])
def test_a_damaged_text_cache_is_rebuilt(tmp_path, capsys, name, how):
    def encode(prompts):
        calls.append(len(prompts))
        context = torch.stack([torch.full((2, 3), float(len(prompt))) for prompt in prompts])
        return {"context": context, "mask": torch.ones(len(prompts), 2, dtype=torch.bool),
                "pooled": context[:, 0]}

    calls = []
    for times in (1, 1):
        found = TextCache(tmp_path / "text.bin", ["one", "three"], encode, "v1")(["three", ""])
        assert len(calls) == times
    del found                                   # else the arrays would be mapped to a file that is truncated
    with np.load(tmp_path / "text.npz") as arrays:
        ends, pooled = arrays["ends"], arrays["pooled"]
    if how == "one pooled vector":
        np.savez(tmp_path / name, ends=ends, pooled=pooled[:, 0])
    elif how == "square ends":
        np.savez(tmp_path / name, ends=ends[:, None], pooled=pooled)
    else:
        damage(tmp_path / name, how)
    assert not capsys.readouterr().out
    found = TextCache(tmp_path / "text.bin", ["one", "three"], encode, "v1")(["three", ""])
    if name != "text.json":
        state = "missing" if how == "missing" else "damaged"
        assert f"text.bin is {state}: rebuilding it" in capsys.readouterr().out
    assert found["pooled"].tolist() == [[5, 5, 5], [0, 0, 0]] and found["context"][0, 1].tolist() == [5, 5, 5]
    assert len(calls) == 2


# ---- vectors that another program computed

def test_precomputed_vectors(tmp_path):
    context, pooled = torch.randn(5, 6), torch.randn(4)
    for name, mask in (("all.npz", [1] * 5), ("part.npz", [1, 1, 0, 0, 0])):
        np.savez(tmp_path / name, context=context, mask=np.array(mask, bool), pooled=pooled)
    cond = read_embeddings([str(tmp_path / "part.npz"), "", str(tmp_path / "all.npz")])
    assert cond["mask"].sum(1).tolist() == [2, 1, 5]
    assert not cond["context"][1].any() and not cond["pooled"][1].any()
    torch.testing.assert_close(cond["context"][0, :2], context[:2])
    torch.testing.assert_close(cond["context"][2], context)
    torch.testing.assert_close(cond["pooled"][2], pooled)


def test_vectors_of_differing_widths_name_the_file(tmp_path):
    for name, arrays in {"a": dict(context=np.ones((2, 3))), "wide": dict(context=np.ones((2, 4))),
                         "pooled": dict(context=np.ones((2, 3)), pooled=np.ones(5)),
                         "flat": dict(context=np.ones(3)),
                         "square": dict(context=np.ones((2, 3)), pooled=np.ones((5, 5)))}.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    good = str(tmp_path / "a.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:50])
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_bytes(b"no")
    assert read_embeddings([good, ""])["context"].shape == (2, 2, 3)
    for name in ("wide", "pooled"):
        files = [good, str(tmp_path / f"{name}.npz"), good]
        found = {"wide": "context 4 wide, no pooled", "pooled": "context 3 wide, pooled 5"}[name]
        for check in (read_embeddings, check_embeddings):
            with pytest.raises(ValueError, match=rf"{name}.npz: {found}; in .*a.npz: context 3 wide, no poo"):
                check(files)
    for name in ("cut", "empty", "text", "missing"):
        with pytest.raises(ValueError, match=rf"{name}.npz: not an .npz"):
            read_embeddings([good, str(tmp_path / f"{name}.npz")])
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(ValueError, match="pipe.npz: not an .npz"):
        read_embeddings([str(tmp_path / "pipe.npz")])


@pytest.mark.parametrize("changes, message", [
    (dict(context=np.zeros((0, 16))), r"its context is empty, of shape \(0, 16\)"),
    (dict(context=np.zeros((3, 0))), r"its context is empty, of shape \(3, 0\)"),
    (dict(context=np.zeros(3)), r"its context is of shape \(3,\), not \(L, D\)"),
    (dict(mask=np.zeros(3, bool)), "its mask leaves no row of its context"),
    (dict(mask=np.ones(5, bool)), "its mask has 5 entries for 3 rows"),
    (dict(mask=np.ones((3, 1), bool)), r"its mask is of shape \(3, 1\), not \(N,\)"),
    (dict(context=np.array([["a"]])), "its context is of type <U1, not of real numbers"),
    (dict(context=np.array([[None]])), "its context is of type object, not"),
    (dict(context=np.ones((3, 4), complex)), "its context is of type complex128, not"),
    (dict(mask=np.array(["x"] * 3)), "its mask is of type <U1, not"),
    (dict(pooled=np.ones((5, 5))), r"its pooled is of shape \(5, 5\), not \(N,\)"),
    (dict(pooled=np.ones(4, complex)), "its pooled is of type complex128, not"),
    (dict(context=np.full((3, 4), np.nan)), "its context has values that are not finite numbers below 65504"),
    (dict(context=np.full((3, 4), -1e9)), "its context has values that are not finite numbers below 65504"),
    (dict(context=np.full((3, 4), 1e300)), "its context has values that are not finite numbers below 65504"),
    (dict(pooled=np.array([1, np.nan])), "its pooled has values that are not finite"),
    (dict(pooled=np.array([1, 1e300])), "its pooled has values that are not finite"),
    (dict(context=np.broadcast_to(np.int8(0), (2**14, 2**14 + 1))), "its context takes 256 MiB; at most"),
])
def test_vectors_that_are_no_use_are_refused_by_file_and_part(tmp_path, changes, message):
    """At the start of a run, and where they are read."""
    arrays = dict(context=np.ones((3, 4)), mask=np.ones(3, bool), pooled=np.ones(2))
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez_compressed(tmp_path / "b.npz", **arrays | changes)
    files = [str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]
    for check in (read_embeddings, check_embeddings):
        with pytest.raises(ValueError, match=f"b.npz: {message}"):
            check(files)
    assert check_embeddings(files[:1]) == (4, 2)


def test_padding_of_vectors_may_hold_anything(tmp_path):
    np.savez(tmp_path / "a.npz", context=np.array([[1.0], [np.nan]]), mask=np.array([1.0, 0.0]))
    assert read_embeddings([str(tmp_path / "a.npz")])["context"].tolist() == [[[1.0]]]
