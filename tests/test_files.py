"""files.py: files replaced as a whole, locks, stamps, fingerprints, and outputs that are continued."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from conftest import contents

import files
from files import (continued, fingerprint_files, fingerprint_tensors, locked, new_array, read_stamp,
                   replacing, write_atomically, write_npz, write_stamp)


# ---- fingerprints

def test_fingerprints_of_weights_follow_names_and_values():
    a, b = torch.arange(6.0).view(2, 3), torch.ones(3)
    want = fingerprint_tensors({"a": a, "b": b})
    assert fingerprint_tensors({"b": b.clone(), "a": a.clone()}) == want and len(want) == 32
    # a view of other memory with the same values is the same tensor
    assert fingerprint_tensors({"a": a.t().contiguous().t(), "b": b}) == want
    for other in ({"a": b, "b": a}, {"a": a, "c": b}, {"a": a}, {"a": a + 1e-6, "b": b}):
        assert fingerprint_tensors(other) != want


def test_fingerprints_of_files_follow_names_sizes_and_ends(tmp_path):
    for place in ("one", "two"):
        (tmp_path / place / "deep").mkdir(parents=True)
        (tmp_path / place / "deep/a.bin").write_bytes(bytes(9000))
        (tmp_path / place / "b.bin").write_bytes(b"b")
        (tmp_path / place / "notes.txt").write_text(place)                     # does not match the pattern
    want = fingerprint_files(tmp_path / "one", "*.bin")
    assert fingerprint_files(tmp_path / "two", "*.bin") == want                # wherever the folder lies
    for content in (bytes(9001), bytes(8999) + b"x"):
        (tmp_path / "two/deep/a.bin").write_bytes(content)
        assert fingerprint_files(tmp_path / "two", "*.bin") != want
    (tmp_path / "one/b.bin").rename(tmp_path / "one/c.bin")
    assert fingerprint_files(tmp_path / "one", "*.bin") != want


# ---- files that are replaced as a whole, and stamps

def test_a_full_disk_keeps_the_old_file(tmp_path):
    target = tmp_path / "checkpoint.pt"
    target.write_bytes(b"old")

    def write(file):
        file.write(b"half of the new")
        raise error

    for error, message in ((OSError(28, "No space left on device"), "No space left on device"),
                           (RuntimeError("PytorchStreamWriter failed writing file"), "disk is full or the"),
                           (RuntimeError("[enforce fail at inline_container.cc:783] . at x"), "disk is full"),
                           (RuntimeError("CUDA error: of another kind"), "CUDA error")):
        with pytest.raises(OSError, match=rf"cannot write .*checkpoint.pt .*MiB left.*{message}"):
            write_atomically(target, write)
        assert target.read_bytes() == b"old" and contents(tmp_path) == {"checkpoint.pt"}


def test_an_interruption_keeps_the_old_file(tmp_path):
    write_atomically(tmp_path / "a.bin", lambda file: file.write(b"old"))
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.bin") as file:
        file.write(b"half of the new")
        raise KeyboardInterrupt
    assert (tmp_path / "a.bin").read_bytes() == b"old" and contents(tmp_path) == {"a.bin"}
    with pytest.raises(OSError, match=r"cannot write .*nowhere.*No such file"):
        write_atomically(tmp_path / "nowhere" / "a.bin", lambda file: file.write(b"new"))


def test_stamps(tmp_path):
    assert read_stamp(tmp_path / "a.json") == {}
    for stamp in ({"vae": "1"}, {"vae": "2", "shape": [1, 2]}):
        write_stamp(tmp_path / "a.json", stamp)
        assert read_stamp(tmp_path / "a.json") == stamp


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b'"text"', b"[" * 100_000, b"\xff\xfe", b"",
                                     b"{damaged"])
def test_a_stamp_that_is_none(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    assert read_stamp(tmp_path / "a.json") == {}
    (tmp_path / "a.json").unlink()
    os.mkfifo(tmp_path / "a.json")                              # would wait for ever if it was opened
    assert read_stamp(tmp_path / "a.json") == {}


@pytest.mark.parametrize("size, text", [(0, "0 KiB"), (2**20 - 1, "1,024 KiB"), (2**20, "1 MiB"),
                                        (2**30 - 2**20, "1,023 MiB"), (2**30, "1.0 GiB"),
                                        (3 * 2**40, "3,072.0 GiB")])
def test_amounts(size, text):
    assert files.amount(size) == text


@pytest.mark.parametrize("text, shown", [
    ("caf\u00e9 \u7dd1 \U0001f469\u200d\U0001f4bb", "caf\u00e9 \u7dd1 \U0001f469\u200d\U0001f4bb"),
    ("\x1b[31mred\x9b1m\n", "\\x1b[31mred\\x9b1m\\n"), ("a\u202eb\u2028", "a\\u202eb\\u2028"),
    ("caf\udce9", "caf\\udce9"), ("x" * 80, "x" * 80), ("x" * 81, "x" * 80 + "...")])
def test_what_a_terminal_would_obey_is_shown_as_an_escape(text, shown):
    assert files.shortened(text) == shown


# ---- a folder from elsewhere

WRITERS = {"bytes": lambda path: write_atomically(path, lambda file: file.write(b"new")),
           "stamp": lambda path: write_stamp(path, {"new": 1}),
           "array": lambda path: os.replace(new_array(path, np.uint8, (3, 3)).filename, path)}


@pytest.mark.parametrize("kind", WRITERS)
def test_no_link_is_followed(tmp_path, monkeypatch, kind):
    """Whatever a folder from elsewhere contains, only the named file in it is written."""
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.write_bytes(b"precious")
    run.mkdir()
    names = iter(["0" * 16, "1" * 16, "2" * 16])
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: next(names))
    links = [run / name for name in ("a.pt", "a.pt.part", "a.part", f".a.pt.{'0' * 16}.part")]
    dangling = run / f".a.pt.{'1' * 16}.part"
    for link in links:
        link.symlink_to(victim)
    dangling.symlink_to(tmp_path / "nothing-yet")
    WRITERS[kind](run / "a.pt")
    assert victim.read_bytes() == b"precious" and not (tmp_path / "nothing-yet").exists()
    assert (run / "a.pt").is_file() and not (run / "a.pt").is_symlink() and (run / "a.pt").stat().st_size > 2
    assert sorted(run.iterdir()) == sorted([*links, dangling])


def test_files_have_ordinary_permissions_and_long_names(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    for name in ("a.pt", "x" * 251 + ".npz", "\u7dd1" * 80):
        for write in WRITERS.values():
            write(tmp_path / name)
        assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode


# ---- locks, file systems without them, and what killed processes leave

def test_a_lock_is_held_by_one(tmp_path):
    with locked(tmp_path / "lock"), pytest.raises(BlockingIOError), locked(tmp_path / "lock"):
        pass
    with locked(tmp_path / "lock"):             # released with the block
        pass


def test_leftovers_of_a_kill_are_removed_under_the_lock(tmp_path, monkeypatch):
    mine = [tmp_path / f".latents.npy.{digits * 16}.part" for digits in "0f"]
    others = [tmp_path / name for name in (".latents.npy.part", f".other.npy.{'0' * 16}.part",
                                           f"latents.npy.{'0' * 16}.part", ".latents.npy.backup.part")]
    for path in mine + others:
        path.write_bytes(b"half")
    with locked(tmp_path / "lock", clean=(tmp_path / "[a]", tmp_path / "*")):
        assert all(path.exists() for path in mine)
    with locked(tmp_path / "lock"), pytest.raises(BlockingIOError):
        with locked(tmp_path / "lock", clean=(tmp_path / "latents.npy",)):
            pass
    assert all(path.exists() for path in mine)                  # whoever holds the lock may be writing them
    with locked(tmp_path / "lock", clean=(tmp_path / "latents.npy",)):
        assert not any(path.exists() for path in mine) and all(path.exists() for path in others)


@pytest.mark.skipif(os.name == "nt", reason="flock")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
@pytest.mark.parametrize("wait", [True, False])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, number, wait):
    import fcntl

    def flock(file, mode):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(files, "_warned", set())
    leftover = tmp_path / f".a.npy.{'0' * 16}.part"
    leftover.write_bytes(b"perhaps of a process that runs")
    with locked(tmp_path / "lock", wait, clean=(tmp_path / "a.npy",)):
        assert leftover.exists()
    with locked(tmp_path / "other", wait):                      # once per process
        pass
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path / "lock") in error and "without" in error


def test_a_folder_where_a_file_belongs_is_refused(tmp_path):
    """Before the file is computed, and before anything is created."""
    (tmp_path / "images.npy").mkdir()
    with pytest.raises(OSError, match="images.npy: a folder, where a file belongs"):
        with locked(tmp_path / "cache/lock", clean=(tmp_path / "a", tmp_path / "images.npy")):
            pass
    assert contents(tmp_path) == {"images.npy"}


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
def test_only_a_file_is_a_lock(tmp_path, kind):
    lock = tmp_path / "lock"
    if kind == "folder":
        lock.mkdir()
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to(tmp_path / "victim")
    if kind == "link":
        (tmp_path / "victim").write_bytes(b"")
    with pytest.raises(OSError, match=f"{lock}: .*cannot serve as a lock"), locked(lock):
        pass
    assert (tmp_path / "victim").exists() == (kind == "link")


# ---- outputs that are continued

def test_an_array_of_one_file_is_continued(tmp_path):
    """Written in parts by several processes, it has the bytes of one that was written at once."""
    want = np.arange(7 * 2 * 3, dtype=np.uint8).reshape(7, 2, 3)
    asked = []

    def batches(first, end=99):
        asked.append(first)
        for start in range(first, 7, 2):
            if start >= end:
                raise KeyboardInterrupt
            yield want[start:start + 2]

    for end, first in ((2, 0), (4, 2)):
        with pytest.raises(KeyboardInterrupt):
            write_npz(tmp_path / "a.npz", lambda first: batches(first, end), want.shape, {"seed": 1})
        assert contents(tmp_path) == {"a.npz.unfinished", "a.npz.unfinished.json"} and asked[-1] == first
    with pytest.raises(ValueError, match="4 pictures are there, drawn with seed 1, not 2; repeat"):
        write_npz(tmp_path / "a.npz", batches, want.shape, {"seed": 2})
    write_npz(tmp_path / "a.npz", batches, want.shape, {"seed": 1})
    assert asked[-1] == 4 and contents(tmp_path) == {"a.npz"}
    write_npz(tmp_path / "b.npz", batches, want.shape, {"seed": 2})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert (np.load(tmp_path / "a.npz")["arr_0"] == want).all()


@pytest.mark.parametrize("record", [
    {"done": "x"}, None, [], {"done": -5}, {"done": 1.5}, {"done": True}, {"done": 1, "settings": [1]},
    {"done": 1, "settings": None}, {"done": 1}, {"done": 9, "settings": {"seed": 1}}])
def test_a_damaged_record_is_none(tmp_path, record):
    """Nor is one of more pictures than there are to be."""
    (tmp_path / "a.npz.unfinished").write_bytes(bytes(20))
    (tmp_path / "a.npz.unfinished.json").write_text(json.dumps(record))
    write_npz(tmp_path / "a.npz", lambda first: [np.full((2, 1), 7, np.uint8)][first:], (2, 1), {"seed": 1})
    assert np.load(tmp_path / "a.npz")["arr_0"].tolist() == [[7], [7]]
    assert contents(tmp_path) == {"a.npz"}


def test_a_link_is_not_continued(tmp_path):
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "a.npz.unfinished").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="a.npz.unfinished: it is a link; remove it, or use another --out"):
        write_npz(tmp_path / "a.npz", None, (2, 1), {})
    assert (tmp_path / "victim").read_bytes() == b"precious"


@pytest.mark.skipif(os.name == "nt", reason="flock")
def test_only_one_process_continues_a_file(tmp_path):
    with continued(tmp_path / "a", 0) as file:
        file.write(b"12345")
        file.flush()
        with pytest.raises(OSError, match="cannot write .*a: another process is writing it"):
            with continued(tmp_path / "a", 0):
                pass
    with continued(tmp_path / "a", 3) as file:                                 # what follows is cut off
        file.write(b"x")
    assert (tmp_path / "a").read_bytes() == b"123x"
