"""shards.py, ahead.py and encode.py: tar shards of pictures and of latents, their order, and what may be
wrong."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ON_VAE, QUICK_VAE, ROOT, contents, same, weights
from PIL import Image

import cache
import encode
import plan
import settings
import shards
import train
from ahead import Ahead, in_processes
from cache import LatentCache
from data import load_data, order_of
from decoded import open_pictures
from folder import list_folder
from ranks import Ranks
from shards import (ShardCaptions, ShardLabels, ShardOrder, ShardPictures, TrainingRows, find_shards,
                    open_index, read_manifest, scan_shard, validation_samples, write_shard)
from test_parallel import assert_close


def png(i, size=(10, 12), **options):
    rng = np.random.default_rng(i)
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(out, "PNG", **options)
    return out.getvalue()


def make(folder, counts=(30, 20, 25), words=None, change=None):
    """Shards of noise; picture i is png(i), of class i % 3."""
    folder.mkdir(parents=True, exist_ok=True)
    number = itertools.count()
    for shard, count in enumerate(counts):
        samples = []
        for i in itertools.islice(number, count):
            members = {"png": png(i), "cls": str(i % 3).encode()}
            if words:
                members |= words(i)
            samples.append((f"{i:04d}", members))
        if change:
            change(shard, samples)
        write_shard(folder / f"{shard:03d}.tar", samples)
    return str(folder / f"{{000..{len(counts) - 1:03d}}}.tar")


def opened(source, cache_dir, words=None, workers=0):
    return open_index(find_shards(str(source), words)._replace(workers=workers), cache_dir)


def tar_of(path, *members):
    """A shard of members (name, content), or of a TarInfo as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                shards.add_member(tar, *member)
    return path


# ---- names of shards

@pytest.mark.parametrize("pattern, names", [
    ("a{00..02}b", ["a00b", "a01b", "a02b"]), ("{8..11}", ["8", "9", "10", "11"]), ("plain", ["plain"]),
    ("{x,y}-{1..2}", ["x-1", "x-2", "y-1", "y-2"]), ("{000..1}", ["000", "001"]), ("{2..1}", [])])
def test_braces(pattern, names):
    assert list(shards.expand(pattern)) == names


def test_which_shards_are_found(tmp_path):
    make(tmp_path / "s", [1] * 3)
    three = tuple(str(tmp_path / f"s/{i:03d}.tar") for i in range(3))
    for source in ("s/{000..002}.tar", "s", "s/*.tar", "s/00[0-2].tar", "s/{000,001}.tar"):
        assert find_shards(str(tmp_path / source)).files == three[:2 if "," in source else 3]
    with pytest.raises(ValueError, match="2 of 5 shards are not there, such as .*003.tar; fetch"):
        find_shards(str(tmp_path / "s/{000..004}.tar"))
    with pytest.raises(ValueError, match="more than a million"):
        find_shards("{0..99999999}.tar")
    Image.new("RGB", (8, 8)).save(tmp_path / "s/a.png")         # an archive beside pictures is no shard
    assert find_shards(str(tmp_path / "s")) is None and find_shards(str(tmp_path)) is None
    assert find_shards("shapes") is None


# ---- values

def test_the_same_pictures_as_in_a_folder(tmp_path):
    """Rotated, with transparency, in grey, of other formats and sizes: pixel by pixel."""
    folder = tmp_path / "p"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pictures = {}
    for i, (mode, kind) in enumerate([("RGB", "png"), ("RGBA", "png"), ("L", "png"), ("RGB", "jpg"), ("RGB",
                                                                                                      "webp"),
                                      ("P", "png"), ("RGB", "jpeg")]):
        image = Image.fromarray(rng.integers(0, 256, (20 + i, 31 - i, 4), dtype=np.uint8),
                                "RGBA").convert(mode)
        exif = image.getexif()
        exif[0x0112] = 6 if i in (0, 3) else 1                  # rotated by a quarter
        image.save(folder / f"{i}.{kind}", exif=exif)
        pictures[f"{i}"] = {kind: (folder / f"{i}.{kind}").read_bytes()}
    write_shard(tmp_path / "0.tar", pictures.items())
    index = opened(tmp_path / "0.tar", tmp_path / "c")
    for crops in (1, 3):
        want = open_pictures(list_folder(folder), (16, 16), tmp_path / "cache", crops).images
        found = ShardPictures(index, (16, 16), shards.Chosen(np.arange(7)), crops)
        assert found.shape == (7 * crops, 16, 16, 3) and (found[:] == want).all()
        assert (found[np.array([5, 0, 5])] == want[[5, 0, 5]]).all()


def test_classes_and_captions(tmp_path):
    def words(i):
        if i % 2:
            return {"json": json.dumps({"caption": f"no  {i}", "label": 7}).encode()}
        return {"txt": f"\ufeffcaption\n {i}".encode()}

    source = make(tmp_path / "s", words=words)
    train_part, val = (load_data(source, split, (8, 8), tmp_path, tmp_path / "c", "captions",
                                 find_shards(source, "captions")) for split in ("train", "val"))
    held_out = [0, 20, 40, 60]
    rest = [i for i in range(75) if i not in held_out]
    want = [f"no {i}" if i % 2 else f"caption {i}" for i in range(75)]
    assert val.captions == [want[i] for i in held_out] and train_part.captions[:] == [want[i] for i in rest]
    assert train_part.captions[3] == want[rest[3]] and train_part.classes == ["0", "1", "2"]
    assert train_part.labels[:].tolist() == [i % 3 for i in rest]       # .cls goes before .json
    assert len(train_part) == 71 and train_part.shard_counts.tolist() == [28, 19, 24]
    assert train_part.identity == train_part.fingerprint != val.fingerprint
    named = make(tmp_path / "n", words=lambda i: {"cls": f"class-{10 - i % 3}".encode()})
    part = load_data(named, "train", (8, 8), tmp_path, tmp_path / "c2", "captions", find_shards(named,
                                                                                                "captions"))
    assert part.classes == ["class-8", "class-9", "class-10"]           # numbers by their value
    assert part.captions[0] == "class 9" and part.labels[np.array([0])].tolist() == [1]


def test_captions_that_are_missing_are_named(tmp_path):
    source = make(tmp_path / "s", [4], lambda i: {"txt": b"x"} if i != 2 else {})
    with pytest.raises(ValueError, match="only 3 of 4 samples have a caption, not .*000.tar: 0002.png; put "
                                         "KEY.txt"):
        load_data(source, "train", (8, 8), tmp_path, tmp_path / "c", "captions", find_shards(source,
                                                                                             "captions"))
    tar_of(tmp_path / "t.tar", ("a.png", png(0)), ("b.png", png(1)), ("b.cls", b"3"))
    for words, match in (("captions", "pictures without words"), ("embeddings", "no .npz files of vectors")):
        with pytest.raises(ValueError, match=match):
            from data import find_folder
            found = find_folder(str(tmp_path / "t.tar"), words)
            load_data("t", "train", (8, 8), tmp_path, tmp_path / "c", words, found)


def test_keys(tmp_path):
    """As WebDataset splits names: up to the first dot of the last part. Members of a key follow each
    other."""
    tar_of(tmp_path / "a.tar", ("x/a.b/1.png", png(1)), ("x/a.b/1.cls", b"1"), ("x/a.b/2.cls", b"2"),
           ("x/a.b/2.PNG", png(2)), ("y/2.png", png(3)), ("y/2.cls", b"0"), ("3.seg.png", png(4)), ("3.png",
                                                                                                    png(5)),
           ("3.cls", b"1"), ("__MACOSX/3.png", png(6)), ("z/._3.png", png(6)), (".hid/3.png", png(6)))
    index = opened(tmp_path / "a.tar", tmp_path / "c")
    assert len(index) == 4 and [index.name(i) for i in range(4)] == ["x/a.b/1.png", "x/a.b/2.PNG", "y/2.png",
                                                                     "3.png"]
    assert index.order[index.rows["label"]].tolist() == [1, 2, 0, 1] and index.payload(3) == png(5)


# ---- the order

@pytest.mark.parametrize("batch_size", [1, 7, 32, 100])
@pytest.mark.parametrize("group", [1, 2, 3, 100])
def test_every_example_once_in_every_epoch(batch_size, group):
    counts = [5, 0, 11, 3, 8, 1]
    order = ShardOrder(counts, batch_size, seed=3, group=group)
    epochs = np.concatenate([order(step) for step in range(-(-4 * 28 // batch_size))])[:4 * 28].reshape(4, 28)
    assert (np.sort(epochs) == np.arange(28)).all() and len(np.unique(epochs, axis=0)) == 4
    again = ShardOrder(counts, batch_size, seed=3, group=group)             # a pure function of the step
    assert (again(3) == order(3)).all() and (again(0) == order(0)).all()
    assert not np.array_equal(ShardOrder(counts, 28, 4, group)(0), ShardOrder(counts, 28, 3, group)(0))
    shard = np.searchsorted(np.cumsum(counts), epochs, "right")             # reading stays within a group
    for epoch in shard:
        groups = [list(part) for _, part in itertools.groupby(epoch)]
        if group == 1:
            assert len(groups) == 5


def test_a_group_is_shuffled_as_a_whole():
    order = ShardOrder([100] * 8, 400, seed=0, group=4)
    first, second = (set((order(step) // 100).tolist()) for step in (0, 1))
    assert len(first) == len(second) == 4 and not first & second
    assert 0.2 < np.mean(np.diff(order(0) // 100) == 0) < 0.3             # neighbours are of any of the four


def test_a_limit_takes_its_share_of_every_shard():
    counts = [40, 7, 0, 53]
    order = ShardOrder(counts, 30, seed=0, limit=30)
    chosen = order(0)
    assert len(order) == 30 and sorted(chosen) == sorted(order(1)) and len(set(chosen.tolist())) == 30
    per_shard = np.bincount(np.searchsorted(np.cumsum(counts), chosen, "right"), minlength=4)
    assert per_shard.tolist() == [12, 2, 0, 16]
    assert set(ShardOrder(counts, 30, seed=9, limit=30)(0).tolist()) == set(chosen.tolist())
    with pytest.raises(ValueError, match="--limit 101: there are 100 pictures"):
        ShardOrder(counts, 1, 0, limit=101)


def test_a_billion_examples_take_no_array_of_them():
    import tracemalloc
    tracemalloc.start()
    order = ShardOrder(np.full(100_000, 10_000), 1024, seed=0)
    assert len(order) == 10**9 and len(np.unique(order(976_562))) == 1024   # across the end of the epoch
    rows = TrainingRows(10**9, validation_samples(10**9))
    assert len(rows) == 10**9 - 256 and rows[np.array([0, 10**9 - 257])].tolist() == [1, 10**9 - 1]
    assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("count", [1, 2, 20, 21, 75, 5119, 5121, 70_001])
def test_split(count):
    held_out = validation_samples(count)
    rows = TrainingRows(count, held_out)
    found = rows[np.arange(len(rows))]
    assert 0 < len(held_out) <= 256
    assert sorted([*found, *held_out]) == list(range(count)) if count > 1 else found.tolist() == [0]


# ---- processes

def test_reading_ahead_changes_no_result(tmp_path):
    source = make(tmp_path / "s")
    index = opened(source, tmp_path / "c", workers=2)
    rows = TrainingRows(75, validation_samples(75))
    order = ShardOrder(rows.per_shard(index), 8, seed=0, group=2)
    state = torch.get_rng_state()
    results = []
    for workers in (0, 1, 3):
        images = ShardPictures(index, (8, 8), rows, workers=workers)
        images.expect(map(order, range(2, 12)))
        got = [images[order(2)], images[np.array([70])], *(images[order(step)] for step in range(3, 12))]
        results.append(np.concatenate(got))
        images.expect(())
    assert (results[0] == results[1]).all() and (results[0] == results[2]).all()
    assert torch.equal(state, torch.get_rng_state())
    assert (results[0][8] == ShardPictures(index, (8, 8), rows)[np.array([70])][0]).all()


def fail_at_three(number):
    if number == 3:
        raise ValueError("three: is no good")
    if number == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2


def test_errors_of_processes_are_one_line():
    results = in_processes(fail_at_three, range(10), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    with pytest.raises(ValueError, match="^three: is no good$"):
        next(results)
    with pytest.raises(OSError, match="^a process that reads ahead was killed; .*--workers$") as error:
        list(in_processes(fail_at_three, [1, 9, 2], 1))
    assert "\n" not in str(error.value)


def test_requests_are_taken_as_they_are_needed():
    taken = []
    ahead = Ahead(lambda x: x, 2)
    ahead.expect(np.array([taken.append(i) or i]) for i in itertools.count())
    assert [int(ahead(np.array([i]))[0]) for i in range(5)] == list(range(5)) and len(taken) < 12
    ahead.close()


# ---- trainings

RUN = ["--arch", "dit", *ON_VAE, "--steps", "8", "--batch-size", "16", "--vae-steps", "6",
       "--shuffle-shards", "2"]


def test_a_run_on_shards_resumes_bit_for_bit(tmp_path, monkeypatch, quick):
    """In one go without processes, and in three parts, with some; the VAE too."""
    monkeypatch.chdir(tmp_path)
    source = make(tmp_path / "s")
    train.main([*RUN, "--data", source, "--workers", "0", "--name", "one", "--runs-dir", "a"])
    plain = train.update
    left = [4]

    def stops(*args):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(train, "update", stops)
    for _ in range(6):
        left[0] = 4
        status = train.main([*RUN, "--data", source, "--workers", "2", "--name", "one", "--runs-dir", "b"])
        if status == 0:
            break
        assert status == 128 + signal.SIGTERM
    assert left[0] == 2 or status == 0
    for name in ("one", "s-vae"):
        assert same(weights(f"a/{name}"), weights(f"b/{name}"))
    assert not {name for name in contents(tmp_path) if name.endswith(".part")}


def test_other_shards_than_those_of_the_run_are_refused(tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    source = make(tmp_path / "s", [30])
    flags = ["--arch", "vae", *QUICK_VAE, "--vae-preset", "tiny", "--steps", "2", "--data", source,
             "--workers", "0"]
    train.main([*flags, "--name", "v"])
    os.utime(tmp_path / "s/000.tar", (1, 1))                    # another time: the same data
    assert train.main([*flags, "--name", "v", "--steps", "3"]) == 0
    with tarfile.open(tmp_path / "s/000.tar", "a") as tar:
        shards.add_member(tar, "new.png", png(99))
    with pytest.raises(ValueError, match="its pictures are not those that runs/v began with"):
        train.main([*flags, "--name", "v", "--steps", "4"])


@pytest.mark.parametrize("flags, message", [
    (["--workers", "2"], "--workers 2: is for tar shards, not --data shapes"),
    (["--shuffle-shards", "2"], "--shuffle-shards 2: is for tar shards"),
    (["--data", "s", "--aspect"], "--aspect: is for pictures of a folder; those of the shards --data s are"),
    (["--data", "no/{0..3}.tar"], "4 of 4 shards are not there"),
    (["--data", "cut.tar"], "cut.tar: truncated: it ends within 0003.png; write or copy it again, or leave "
                            "it out")])
def test_bad_input_of_a_training(tmp_path, monkeypatch, quick, flags, message):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "s", [8])
    with tarfile.open("s/000.tar") as tar:
        end = tar.getmember("0003.png").offset_data + 9
    Path("cut.tar").write_bytes(Path("s/000.tar").read_bytes()[:end])
    with pytest.raises(ValueError, match=message):
        train.main(["--arch", "vae", *QUICK_VAE, *flags])
    assert not list(tmp_path.glob("runs/*/*.pt"))


# ---- latents

@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """Shards of pictures with a broken one, a VAE that was trained on them, and their latents."""
    place = tmp_path_factory.mktemp("encoded")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        make(place / "s", [30, 20, 25], change=lambda shard, samples: samples[3][1].update(png=b"broken"))
        train.main(["--arch", "vae", *QUICK_VAE, "--vae-preset", "tiny", "--steps", "3", "--data", "s",
                    "--name", "v", "--workers", "0"])
        encode.main(["s", "latents", "--vae", "runs/v", "--flip", "--workers", "2"])
    return place


def test_latents_are_those_of_the_pictures(encoded, monkeypatch):
    monkeypatch.chdir(encoded)
    found = find_shards("latents")._replace(flip=True)
    part = load_data("latents", "train", (32, 32), encoded, encoded / "c", None, found)
    index = opened("s", encoded / "c2")
    kept = [i for i in range(75) if i not in (3, 33, 53)]
    rows = [kept[i] for i in range(72) if i % 20]
    assert len(part) == 68 and part.labels[:].tolist() == [i % 3 for i in rows]
    vae = train.load_vae("latents/vae.pt")
    pictures = ShardPictures(index, (32, 32), shards.Chosen(np.array(rows)))[:]
    x = cache.torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    read = part.latents.read(np.arange(68))
    with torch.no_grad():
        for flip, posterior in enumerate((vae.encode(x), vae.encode(x.flip(-1)))):
            np.testing.assert_allclose(read[:, flip, 0], posterior.mean, atol=4e-3, rtol=2e-3)
            np.testing.assert_allclose(read[:, flip, 1], posterior.std, atol=4e-3, rtol=2e-3)
    # drawn as LatentCache draws
    other = LatentCache.__new__(LatentCache)
    other.latents = read
    draws = [source.batch(np.arange(9), generator=torch.Generator().manual_seed(1))
             for source in (part.latents, other)]
    assert torch.equal(*draws)


def test_a_training_on_latents(encoded, monkeypatch, quick):
    """Without pictures and without --vae; bit for bit the same with processes."""
    monkeypatch.chdir(encoded)
    flags = ["--arch", "dit", "--data", "latents", "--precision", "fp32", "--preset", "tiny", "--steps", "4",
             "--batch-size", "16", "--preview-every", "1000", "--flip"]
    for workers in "02":
        train.main([*flags, "--workers", workers, "--name", f"w{workers}"])
    assert same(weights("runs/w0"), weights("runs/w2"))
    checkpoint = train.load_checkpoint("runs/w0")
    assert checkpoint["data"]["classes"] == ["0", "1", "2"]
    assert same(checkpoint["vae"]["state"], train.load_vae("runs/v").state_dict())
    for more, message in ((["--vae", "other"], "no checkpoint there"), (["--crop", "random"], "cropped in "
                                                                                              "the centre"),
                          (["--image-size", "64"], "of pictures of 32x32; give --image-size 32 32"),
                          (["--arch", "vae"], "--preset tiny: belongs to"),
                          (["--vae-steps", "3"], "of a VAE that is trained already")):
        with pytest.raises(ValueError, match=message):
            train.main([*flags, *more, "--name", "x"])
    torch.manual_seed(1)
    other = train.load_checkpoint("runs/v")
    other["ema"] = {name: weight + 1 for name, weight in other["ema"].items()}
    torch.save(other, "other.pt")
    with pytest.raises(ValueError, match="--vae other.pt: is not the VAE that made the latents of --data "
                                         "latents"):
        train.main([*flags, "--vae", "other.pt", "--name", "x"])
    assert not Path("runs/x").exists()


SHORT = ["--precision", "fp32", "--steps", "4", "--batch-size", "16", "--preview-every", "1000", "--flip"]
ON_SHARDS = {"vae": ["--arch", "vae", "--vae-preset", "tiny", "--data", "s"],
             "pictures": ["--arch", "dit", "--preset", "tiny", "--data", "s", "--vae", "runs/v"],
             "latents": ["--arch", "dit", "--preset", "tiny", "--data", "latents"]}


@pytest.mark.long
@pytest.mark.parametrize("name", ON_SHARDS)
def test_two_processes_train_on_shards_as_one(launch, encoded, name):
    flags = [*ON_SHARDS[name], *SHORT, "--workers", "2"]
    statuses, printed = launch(encoded, 2, *flags, "--name", f"two-{name}").end()
    assert statuses == [0, 0], printed
    alone, _ = launch(encoded, 1, *flags, "--name", f"alone-{name}").end()
    assert alone == [0]
    assert_close(weights(encoded / f"runs/two-{name}"), weights(encoded / f"runs/alone-{name}"))


@pytest.mark.long
def test_a_truncated_shard_ends_two_processes_with_one_line(launch, tmp_path):
    source = make(tmp_path / "s", [20, 20])
    file = tmp_path / "s/001.tar"
    file.write_bytes(file.read_bytes()[:5000])
    launched = launch(tmp_path, 2, "--arch", "vae", "--data", source)
    statuses, printed = launched.end()
    assert statuses == [2, 2] and printed[1] == ""
    assert len(launched.errors()) == 1 and "001.tar: truncated" in launched.errors()[0]
    assert not [*tmp_path.rglob("settings.json")]


def test_each_process_reads_its_own_part_ahead(encoded, monkeypatch):
    monkeypatch.chdir(encoded)
    args = settings.parse([*ON_SHARDS["latents"], *SHORT, "--accumulate", "2", "--workers", "1"])
    planned = plan.prepare(args)
    data, val = [load_data(args.data, split, (32, 32), Path("."), planned.cache_dir, folder=planned.folder)
                 for split in ("train", "val")]
    planned.conditioning.attach(data, val, planned.cache_dir, resumed=False)
    planned.ranks = Ranks(1, 2)
    task = train.Denoising(args, data, val, planned, planned.cache_dir)
    model = task.build()
    pieces = [piece for step in range(3) for piece in task.split(task.order(step))]
    task.expect(pieces)
    read = []
    monkeypatch.setattr(task.cache.ahead, "read", read.append)      # what was not read ahead, in this process
    assert [len(task.loss(model, piece)[0]) for piece in pieces] == [4] * 6 and read == []


def encode_process(*flags, hook=""):
    script = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import encode, shards, os, time\n{hook}\n"
              f"sys.exit(encode.main({list(flags)!r}))")
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


@pytest.mark.long
def test_an_encoding_that_is_killed_goes_on(encoded, monkeypatch, tmp_path):
    """kill -9 within the second shard; then two processes at once. The shards are the same to the byte."""
    monkeypatch.chdir(encoded)
    out = str(tmp_path / "l")
    flags = ["s", out, "--vae", "runs/v", "--flip", "--workers", "0"]
    hook = ("plain = encode.Encoder.latents\ncalls = []\n"
            "def slow(self, images):\n    calls.append(1)\n    if len(calls) == 2:\n"
            "        os.kill(os.getpid(), 9)\n"
            "    return plain(self, images)\nencode.Encoder.latents = slow")
    assert encode_process(*flags, hook=hook).wait() == -signal.SIGKILL
    assert (tmp_path / "l/000.tar").is_file() and not (tmp_path / "l/001.tar").exists()
    time_of_first = (tmp_path / "l/000.tar").stat().st_mtime_ns
    with pytest.raises(ValueError, match="2 of 3 shards are not encoded yet, such as 001.tar; repeat"):
        find_shards(out)
    pair = [encode_process(*flags) for _ in range(2)]
    assert [process.wait() for process in pair] == [0, 0]
    assert read_manifest(Path(out))["samples"] > 0              # by whichever ended last
    assert (tmp_path / "l/000.tar").stat().st_mtime_ns == time_of_first
    for name in ("000.tar", "001.tar", "002.tar"):
        assert (tmp_path / "l" / name).read_bytes() == Path("latents", name).read_bytes()
    assert contents(tmp_path / "l") == {"000.tar", "001.tar", "002.tar", "manifest.json", "vae.pt",
                                        ".encode.lock"}
    with pytest.raises(ValueError, match="holds latents of another --flip; repeat that command"):
        encode.main([*flags[:4], "--workers", "0"])


def test_latents_of_a_run_go_on_after_a_kill(tmp_path, monkeypatch):
    """Of LatentCache, with pictures of which one is broken: what stands in for it is remembered."""
    source = make(tmp_path / "s", [40, 30], change=lambda shard, samples: samples[5][1].update(png=b"broken"))
    index = opened(source, tmp_path / "c")
    monkeypatch.setattr(cache, "SAVE_SECONDS", 0)
    parts = [range(start, min(start + 8, 70)) for start in range(0, 70, 8)]
    monkeypatch.setattr(cache, "pieces", lambda shape: parts)
    calls = []

    def build(index, fails=None, workers=0):
        def encoder(images, mirrored):
            calls.append(len(images))
            if len(calls) == fails:
                os._exit(9)
            mean = torch.from_numpy(images).float().mean((1, 2))[:, :, None, None]
            return mean, torch.ones_like(mean)

        images = ShardPictures(index, (8, 8), shards.Chosen(np.arange(70)), workers=workers)
        return LatentCache(tmp_path / "latents.npy", images, encoder, (3, 1, 1), {"vae": "v", "data": "d"})

    child = os.fork()
    if child == 0:
        build(index, fails=4)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    stamp = json.loads((tmp_path / "latents.json").read_text())
    assert stamp["done"] == 24 and stamp["replaced"] == [[5, 6]]
    again = opened(source, tmp_path / "c")
    found = build(again, workers=2)
    assert sum(calls) == 46 and again.replaced == {5: 6, 45: 46}
    want = ShardPictures(index, (8, 8), shards.Chosen(np.arange(70)))[:].astype(np.float32).mean((1, 2))
    np.testing.assert_allclose(found.latents[:, 0, 0, :, 0, 0], want, rtol=2e-3)
    assert (found.latents[5] == found.latents[6]).all()
    third = opened(source, tmp_path / "c")
    build(third)
    assert sum(calls) == 46 and third.replaced == again.replaced
    rows = shards.Chosen(np.arange(70))
    assert ShardLabels(third, rows)[np.array([5, 45, 7])].tolist() == [0, 1, 1]   # of 6, 46 and itself


# ---- memory

LIMITED = """
import resource, sys
sys.path.insert(0, {root!r})
import numpy as np, torch, shards
from pathlib import Path
def used():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmData")) * 1024
allowed = used() + {room}
resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
index = shards.open_index(shards.find_shards({source!r}), Path({cache!r}))
rows = shards.TrainingRows(len(index), shards.validation_samples(len(index)))
images = shards.ShardPictures(index, (256, 256), rows)
labels, captions = shards.ShardLabels(index, rows), shards.ShardCaptions(index, rows)
order = shards.ShardOrder(rows.per_shard(index), 32, seed=0, group=2)
peaks = []
for step in range(-(-len(order) // 32)):
    batch = order(step)
    images[batch], labels[batch], captions[batch]
    peaks.append(used())
print(len(index), max(peaks[-8:]) - max(peaks[:8]))
try:
    np.ones({total})
except MemoryError:
    print("all of it does not fit")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is that of Linux")
def test_a_set_that_is_larger_than_the_memory(tmp_path):
    """1,600 pictures, 315 MB decoded as bytes, with 31 MB of memory more than the imports take."""
    out = io.BytesIO()
    Image.new("RGB", (256, 256), "teal").save(out, "PNG")
    (tmp_path / "s").mkdir()
    for shard in range(8):
        write_shard(tmp_path / f"s/{shard}.tar",
                    ((f"{i}", {"png": out.getvalue(), "cls": b"1", "txt": b"words"}) for i in range(200)))
    total = 1600 * 256 * 256 * 3
    script = LIMITED.format(root=str(ROOT), room=total // 10, source=str(tmp_path / "s"),
                            cache=str(tmp_path / "c"), total=total // 8)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    first, last = result.stdout.splitlines()
    assert first.split()[0] == "1600" and int(first.split()[1]) < 2**20 and last == "all of it does not fit"


# ---- hostile and damaged shards

def link(name, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


def bomb():
    """A PNG of 60,000 x 60,000 pixels in a few hundred bytes, as far as its header goes."""
    raw = bytearray(png(0))
    raw[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib
    raw[29:33] = zlib.crc32(bytes(raw[12:29])).to_bytes(4, "big")
    return bytes(raw)


@pytest.mark.parametrize("members, told", [
    ([("/abs.png", png(1))], "/abs.png has a name that leads out"),
    ([("../up.png", png(1))], "../up.png has a name that leads out"),
    ([link("l.png")], "l.png is a link"), ([link("h.png", tarfile.LNKTYPE)], "h.png is a link"),
    ([link("dev.png", tarfile.CHRTYPE)], "dev.png is a link, a device"),
    ([("k.txt", b"words")], "k has no picture"), ([("ok.jpg", png(9))], "ok.jpg is a second picture of its "
                                                                        "key"),
    ([("k.json", b"[" * 99_999)], "k.json cannot be read as a JSON object"),
    ([("k.cls", b"\xff")], "k.cls cannot be read as a class"), ([("k.png", b"")], "k.png has 0 KiB"),
    ([("k.json", b"3")], "k.json cannot be read"), ([("k.txt", bytes(2**20 + 1))], "k.txt has 1 MiB, where "
                                                                                   "at most")])
def test_members_that_are_left_out(tmp_path, capsys, members, told):
    tar_of(tmp_path / "a.tar", ("ok.png", png(0)), *members, ("z.png", png(2)))
    index = opened(tmp_path / "a.tar", tmp_path / "c")
    assert len(index) == 2 and index.payload(1) == png(2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and told in error
    assert contents(tmp_path) == {"a.tar", "c", "c/shards.index", "c/shards.json", "c/shards.lock"}


@pytest.mark.parametrize("content", [b"broken", png(3)[:-40], bomb(), b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_a_broken_picture_is_replaced_by_the_next(tmp_path, capsys, content):
    source = make(tmp_path / "s", [22], change=lambda shard, samples: [samples[i][1].update(png=content)
                                                                     for i in (1, 19, 21)])
    index = opened(source, tmp_path / "c")
    rows = TrainingRows(22, validation_samples(22))
    images = ShardPictures(index, (8, 8), rows)
    whole = ShardPictures(opened(make(tmp_path / "w", [22]), tmp_path / "c2"), (8, 8),
                          shards.Chosen(np.arange(22)))
    # 20 is held out, so 19 takes 2 (as 21 and 1 are broken too), and so does 21, beyond the end.
    assert (images[:][[0, 18, 19]] == whole[np.array([2, 2, 2])]).all() and index.replaced == {1: 2, 19: 2,
                                                                                               21: 2}
    assert (images[:][1:18] == whole[np.arange(2, 19)]).all()
    assert capsys.readouterr().err.count("skipped") == 3                    # each once
    assert ShardCaptions(index, rows, names=["a", "b", "c"])[0] == "c"      # of the one in its place


def test_a_shard_of_broken_pictures_is_refused(tmp_path):
    source = make(tmp_path / "s", [5], change=lambda shard, samples: [part[1].update(png=b"x") for part
                                                                      in samples])
    with pytest.raises(ValueError, match="0002.png: neither it nor the 64 pictures after it can be decoded"):
        ShardPictures(opened(source, tmp_path / "c"), (8, 8), shards.Chosen(np.arange(5)))[np.array([2])]


@pytest.mark.parametrize("change, message", [
    (lambda raw: raw[:-1024], "truncated"), (lambda raw: raw[:700], "truncated: it ends within"),
    (lambda raw: raw[:100], "damaged|truncated"), (lambda raw: b"", "damaged|truncated"),
    (lambda raw: b"x" * len(raw), "damaged, or not an uncompressed .tar"),
    (lambda raw: raw[:2048] + b"x" * 512 + raw[2560:], "damaged at byte 2,048"),
    (lambda raw: __import__("gzip").compress(raw), "damaged, or not an uncompressed .tar")])
def test_damaged_shards_are_named(tmp_path, change, message):
    path = tar_of(tmp_path / "a.tar", ("a.png", png(0)), ("b.txt", b"x"), ("c.txt", b"x"))
    raw = path.read_bytes()
    path.write_bytes(change(raw[:raw.rindex(b"c.txt") + 1024 + 1024]))
    with pytest.raises(ValueError, match=rf"a.tar: ({message}).*leave it out of --data$") as error:
        opened(path, tmp_path / "c")
    assert "\n" not in str(error.value) and not list((tmp_path / "c").glob("*.part"))


def test_headers_that_claim_too_much(tmp_path):
    """A pax header of gigabytes is not read, and one that points backwards ends no loop."""
    huge = tarfile.TarInfo("x")
    huge.type, huge.size = tarfile.XHDTYPE, 2**33
    member = tarfile.TarInfo("a.png")
    member.size = 2**34
    backwards = bytearray(tarfile.TarInfo("b.png").tobuf(tarfile.GNU_FORMAT))
    backwards[124:136] = b"\xff" * 10 + b"\xfc\x00"                         # a size of -1024
    backwards[148:156] = b" " * 8
    backwards[148:156] = b"%06o\0 " % sum(backwards)
    for raw, message in ((huge.tobuf(tarfile.GNU_FORMAT), "a header of"), (member.tobuf(tarfile.GNU_FORMAT),
                                                                           "truncated"),
                         (bytes(backwards), "")):
        (tmp_path / "a.tar").write_bytes(raw + bytes(1024))
        found = scan_shard(str(tmp_path / "a.tar"))
        assert message in found.error and found.error and len(found.rows) == 0


def test_a_shard_that_changes_under_a_training(tmp_path):
    source = make(tmp_path / "s", [5, 5])
    index = opened(source, tmp_path / "c")
    make(tmp_path / "s", [6, 5])
    with pytest.raises(ValueError, match="000.tar: changed since this program began; start it again"):
        index.payload(0)
    assert len(opened(source, tmp_path / "c")) == 11                        # the index is made anew


@pytest.mark.parametrize("name", ["shards.json", "shards.index"])
@pytest.mark.parametrize("how", ["cut", "empty", "zeros", "missing"])
def test_a_damaged_index_is_rebuilt(tmp_path, name, how):
    from conftest import damage
    source = make(tmp_path / "s", [5, 5])
    opened(source, tmp_path / "c")
    damage(tmp_path / "c" / name, how)
    if (name, how) != ("shards.index", "zeros"):                # of the right size: nothing tells
        assert opened(source, tmp_path / "c").payload(7) == png(7)


def test_order_of_the_plain_sources_is_as_ever():
    from data import Dataset, batch_indices, some_pictures
    data = Dataset(np.zeros((50, 1, 1, 1), np.uint8), None, [], "x")
    order = order_of(data, 50, 8, seed=3, limit=20)
    chosen = some_pictures(50, 20)
    assert len(order) == 20 and all((order(s) == chosen[batch_indices(20, 8, s, 3)]).all() for s in range(9))
