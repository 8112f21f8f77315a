"""cache.py: latents encoded once, stamps, and files that are replaced as a whole."""

import json

import numpy as np
import pytest
import torch

import cache as cache_file
from cache import LatentCache, locked, pieces, read_stamp, replacing, write_atomically, write_stamp
from data import load_shapes, to_tensor
from vae import VAE, VAEConfig


def make_cache(tmp_path, vae, flip=False, stamp="v1", count=48):
    shapes = load_shapes("train", (32, 32), count=count)

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
    x = to_tensor(load_shapes("train", (32, 32), count=48).images[:5])
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
    # an incomplete copy
    (tmp_path / "latents.npy").write_bytes((tmp_path / "latents.npy").read_bytes()[:1000])
    assert make_cache(tmp_path, vae, **change).latents.shape[0] == 72


def test_no_space_for_a_cache(tmp_path, monkeypatch):
    """A memory map would only fail when its pages are written, and then by killing the process."""
    vae = VAE(VAEConfig(widths=(8, 16), groups=4)).eval()
    monkeypatch.setattr(cache_file.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"cannot write .*latents.part of 0 MiB: No space left"):
        make_cache(tmp_path, vae)
    assert {p.name for p in tmp_path.glob("latents*")} == {"latents.lock"}


def test_pieces_cover_every_picture_once():
    for shape in ((600, 32, 32, 3), (5, 512, 512, 3), (3, 4096, 4096, 1)):
        parts = pieces(shape)
        assert [i for part in parts for i in part] == list(range(shape[0]))
        assert max(map(len, parts)) <= max(1, 256 * 32 * 32 // (shape[1] * shape[2]))


def test_a_full_disk_keeps_the_old_file(tmp_path):
    target = tmp_path / "checkpoint.pt"
    target.write_bytes(b"old")

    def write(file):
        file.write(b"half of the new")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"cannot write .*checkpoint.pt .*MiB left.*No space left"):
        write_atomically(target, write)
    assert target.read_bytes() == b"old" and [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    with pytest.raises(OSError, match="cannot write"):
        write_atomically(target, lambda f: (_ for _ in ()).throw(
            RuntimeError("PytorchStreamWriter failed writing file")))


def test_an_interruption_keeps_the_old_file(tmp_path):
    write_atomically(tmp_path / "a.bin", lambda file: file.write(b"old"))
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.bin") as file:
        file.write(b"half of the new")
        raise KeyboardInterrupt
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    with pytest.raises(OSError, match=r"cannot write .*nowhere.*No such file"):
        write_atomically(tmp_path / "nowhere" / "a.bin", lambda file: file.write(b"new"))


def test_stamps(tmp_path):
    assert read_stamp(tmp_path / "a.json") == {}
    write_stamp(tmp_path / "a.json", {"vae": "1"})
    assert read_stamp(tmp_path / "a.json") == {"vae": "1"}
    (tmp_path / "a.json").write_text("{damaged")
    assert read_stamp(tmp_path / "a.json") == {}


def test_a_lock_is_held_by_one(tmp_path):
    with locked(tmp_path / "lock"), pytest.raises(BlockingIOError), locked(tmp_path / "lock"):
        pass
    with locked(tmp_path / "lock"):             # released with the block
        pass
