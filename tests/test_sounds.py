"""sounds.py: folders of sounds as people have them, listed with their captions, and decoded once."""

import json
import os
import struct
import sys

import numpy as np
import pytest
from conftest import contents, picture

import decoded
import sounds
from data import load_sound_folder
from folder import PICTURES, RANDOM_CROPS, crop_places, list_folder
from sound import write_wav
from sounds import SOUNDS, list_sounds, wanted_in, open_sounds

RATE = 8000


def tone(path, level=0.5, seconds=0.05, rate=RATE):
    """A file of one value everywhere, which resampling keeps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_wav(path, np.full(round(seconds * rate), level, np.float32), rate)
    return path


def levels(found):
    return [round(float(row[100]) / 32768, 3) for row in found.images]


def opened(path, cache, length=800, crops=1):
    return open_sounds(list_sounds(path), (1, length), RATE, cache, crops)


# ---- the listing

def test_classes_and_captions(tmp_path):
    for name in ("dogs/2.wav", "dogs/10.WAV", "cats/deep/1.wave"):
        tone(tmp_path / "p" / name).with_suffix(".txt").write_text(f"of  {name}")
    folder = list_sounds(tmp_path / "p", "captions")
    assert folder.classes == ["cats", "dogs"] and folder.labels.tolist() == [0, 1, 1]
    assert folder.words == ["of cats/deep/1.wave", "of dogs/10.WAV", "of dogs/2.wav"]
    assert folder.wanted is SOUNDS
    row = json.dumps({"file_name": "2.wav", "text": "a bark"})
    (tmp_path / "p/dogs/metadata.jsonl").write_text(row)
    assert list_sounds(tmp_path / "p", "captions").words[2] == "a bark"
    (tmp_path / "p/dogs/10.txt").unlink()
    with pytest.raises(ValueError, match="1 of 3 sounds have no caption, such as .*10.WAV; write one "):
        list_sounds(tmp_path / "p", "captions")


def test_messages_speak_of_sounds(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    (tmp_path / "p").mkdir()
    with pytest.raises(ValueError, match="no sounds in this folder .looked for .wav and, with the package "
                                         "soundfile, .flac, .ogg, .mp3.$"):
        list_sounds(tmp_path / "p")
    tone(tmp_path / "p/1.wav")
    with pytest.raises(ValueError, match="sounds without words; put NAME.txt beside each"):
        list_sounds(tmp_path / "p", "captions")
    for name in ("a.flac", "b.aiff", ".c.wav", ".d/1.wav", "e.txt", "f.png", "g.mid"):
        (tmp_path / "p" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "p" / name).write_bytes(b"x")
    capsys.readouterr()
    assert len(list_sounds(tmp_path / "p").pictures) == 1
    error = capsys.readouterr().err
    assert "a.flac: FLAC is read by the package soundfile; pip install soundfile" in error
    assert "b.aiff: AIFF is not among the formats that are opened" in error
    assert "ignored as hidden or left by a system" in error and "p/.c.wav" in error and "p/.d" in error
    assert error.count("\n") == 2 and "e.txt" not in error and "f.png" not in error


def test_pictures_win_unless_sounds_are_asked_for(tmp_path):
    assert wanted_in(tmp_path) is PICTURES                      # where list_folder names what it looks for
    tone(tmp_path / "a/deep/1.wav")
    for name in (".hidden.png", "__MACOSX/1.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a/around").symlink_to(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    assert wanted_in(tmp_path) is SOUNDS
    picture(tmp_path / "b/1.png")
    assert wanted_in(tmp_path) is PICTURES
    assert [path.name for path in list_folder(tmp_path).pictures] == ["1.png"]
    assert [path.name for path in list_sounds(tmp_path).pictures] == ["1.wav"]


@pytest.mark.skipif(os.name == "nt", reason="no such files")
def test_links_and_pipes(tmp_path, capsys):
    tone(tmp_path / "store/1.wav", 0.25)
    (tmp_path / "p").mkdir()
    (tmp_path / "p/linked").symlink_to(tmp_path / "store")
    os.mkfifo(tmp_path / "p/linked/2.wav")
    assert levels(opened(tmp_path / "p", tmp_path / "cache")) == [0.25]
    assert "2.wav: a pipe, socket or device, not a file" in capsys.readouterr().err


# ---- decoded once

def test_sounds_are_kept_in_a_window(tmp_path):
    """Shorter ones are followed by silence, of longer ones the start is kept, at one rate and mono."""
    tone(tmp_path / "p/1.wav", 0.5, 0.05, 44_100)
    tone(tmp_path / "p/2.wav", -0.25, 0.05)
    write_wav(tmp_path / "p/3.wav", np.linspace(0.0, 0.5, 8000, dtype=np.float32), RATE)
    found = opened(tmp_path / "p", tmp_path / "cache")
    assert found.images.shape == (3, 800) and found.images.dtype == np.int16
    assert isinstance(found.images, np.memmap)
    assert found.sizes.tolist() == [[1, 400], [1, 400], [1, 800]]
    assert levels(found)[:2] == [0.5, -0.25] and not found.images[:2, 400:].any()
    assert found.images[2, 0] == 0 and abs(found.images[2, 799] - 32768 * 0.05) < 2


def bad(path):
    """One file of each kind that is skipped, and a part of the reason."""
    path.mkdir(parents=True)
    whole = tone(path / "whole.wav").read_bytes()
    (path / "cut.wav").write_bytes(whole[:-100])
    (path / "empty.wav").write_bytes(b"")
    (path / "none.wav").write_bytes(whole[:40] + bytes(4))
    (path / "picture.wav").write_bytes(picture(path.parent / "x.png").read_bytes())
    write_wav(path / "silent.wav", np.zeros(4000, np.int16), RATE)
    write_wav(path / "hiss.wav", np.tile(np.array([3, -7], np.int16), 2000), RATE)
    long = bytearray(whole[:44])
    long[40:44] = struct.pack("<I", 2 * RATE * 3000)
    (path / "long.wav").write_bytes(long)
    with open(path / "long.wav", "r+b") as file:
        file.truncate(44 + 2 * RATE * 3000)
    (path / "whole.wav").unlink()
    return {"cut": "cut off: 700 of 800 bytes are there", "empty": "an empty file",
            "none": "holds no samples", "silent": "silent", "hiss": "silent",
            "picture": "neither a WAV nor a FLAC, Ogg or MP3 file",
            "long": "50 minutes long, of at most 10: cut it into sounds first"}


def test_bad_sounds_are_skipped_and_named_once(tmp_path, capsys):
    reasons = bad(tmp_path / "p")
    with pytest.raises(ValueError, match="none of its 7 sounds can be used"):
        opened(tmp_path / "p", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()                    # nothing is created for nothing
    capsys.readouterr()
    tone(tmp_path / "p/good.wav", 0.25)
    found = opened(tmp_path / "p", tmp_path / "cache")
    error = capsys.readouterr().err
    assert levels(found) == [0.25] and found.keep.tolist() == [2]
    for name, reason in reasons.items():
        assert error.count(f"skipped {tmp_path}/p/{name}.wav: {reason}") == 1, name
    again = opened(tmp_path / "p", tmp_path / "cache")
    assert "skipped" not in capsys.readouterr().err             # from the cache
    assert (again.images == found.images).all() and again.fingerprint == found.fingerprint


def test_the_cache_is_rebuilt_only_where_needed(tmp_path, monkeypatch, capsys):
    for i in range(3):
        tone(tmp_path / f"p/{i}.wav", 0.1 * (i + 1))
    reads = []
    plain = sounds.read_sound
    monkeypatch.setattr(sounds, "read_sound", lambda path, *more: reads.append(path) or plain(path, *more))
    first = opened(tmp_path / "p", tmp_path / "cache")
    assert len(reads) == 4                      # the first one also before anything is created
    assert opened(tmp_path / "p", tmp_path / "cache").fingerprint == first.fingerprint and len(reads) == 4
    assert contents(tmp_path / "cache") == {"sounds.npy", "sounds.json", "sounds.about.npy", "sounds.lock"}
    prints = {first.fingerprint}
    tone(tmp_path / "p/1.wav", 0.7)
    found = opened(tmp_path / "p", tmp_path / "cache")
    assert levels(found) == [0.1, 0.7, 0.3] and found.sizes[:, 1].tolist() == [400] * 3
    prints.add(found.fingerprint)
    del first, found
    prints.add(opened(tmp_path / "p", tmp_path / "cache", length=400).fingerprint)
    prints.add(opened(tmp_path / "p", tmp_path / "cache", crops=2).fingerprint)
    prints.add(open_sounds(list_sounds(tmp_path / "p"), (1, 800), 4000, tmp_path / "cache").fingerprint)
    assert len(prints) == 5
    opened(tmp_path / "p", tmp_path / "cache")
    (tmp_path / "cache/sounds.npy").write_bytes(b"damaged")
    assert levels(opened(tmp_path / "p", tmp_path / "cache")) == [0.1, 0.7, 0.3]
    assert "sounds.npy is damaged: rebuilding it" in capsys.readouterr().out


def test_other_crops_are_other_parts(tmp_path):
    """The first from the start; the others at places that depend on the name alone."""
    ramp = np.arange(8000, dtype=np.int16)
    tone(tmp_path / "p/0.wav", 0.5, 0.05)
    write_wav(tmp_path / "p/1.wav", ramp, RATE)
    found = opened(tmp_path / "p", tmp_path / "cache", crops=4)
    assert found.images.shape == (8, 800) and found.sizes.tolist() == [[1, 400], [1, 800]]
    assert (found.images[:4] == found.images[0]).all()
    assert found.images[4].tolist() == ramp[:800].tolist()
    for row, place in zip(found.images[5:], crop_places("1.wav", 4)[1:], strict=True):
        start = round(place * 7200)
        assert abs(int(row[0]) - start) <= 1 and (np.diff(row) == 1).all()


def test_decoding_holds_one_sound_at_a_time(tmp_path, monkeypatch):
    """Rows are written as they are read."""
    for i in range(4):
        tone(tmp_path / f"p/{i}.wav")
    order = []
    plain = sounds.Recorded.read
    monkeypatch.setattr(sounds.Recorded, "read", lambda *args: order.append("read") or plain(*args))
    whole = decoded.write_rows

    def noted(path, dtype, shape, rows):
        def between():
            for row in rows:
                order.append("row")
                yield row
        whole(path, dtype, shape, between())

    monkeypatch.setattr(sounds, "write_rows", noted)
    opened(tmp_path / "p", tmp_path / "cache")
    assert order == ["read"] + ["read", "row"] * 4


# ---- as a data set

def test_a_data_set_of_sounds(tmp_path):
    for i in range(41):
        name = f"{'ab'[i % 2]}-thing/{i}.wav"
        tone(tmp_path / "p" / name, 0.01 * (i + 1), 0.05 + 0.001 * i).with_suffix(".txt").write_text(f"n{i}")
    folder = list_sounds(tmp_path / "p", "captions")
    train = load_sound_folder(folder, "train", (1, 600), RATE, tmp_path / "cache")
    val = load_sound_folder(folder, "val", (1, 600), RATE, tmp_path / "cache")
    assert train.classes == ["a-thing", "b-thing"] and train.rate == val.rate == RATE
    assert len(train) == 38 and len(val) == 3 and train.images.shape == (38, 600)
    assert train.fingerprint != val.fingerprint and train.seconds.dtype == np.float32
    for data in (train, val):
        for i in range(len(data)):
            number = int(data.captions[i][1:])
            assert abs(data.images[np.array([i])][0, 100] - 327.68 * (number + 1)) < 1
            assert data.labels[i] == number % 2
            assert abs(data.seconds[i] - min(0.05 + 0.001 * number, 0.075)) < 1e-4
            assert not data.images[np.array([i])][0, round(data.seconds[i] * RATE):].any()
    for size in ((32, 32), (1, 0)):
        with pytest.raises(ValueError, match="the size of sounds is 1 x samples"):
            load_sound_folder(folder, "train", size, RATE, tmp_path / "cache")


def test_random_crops_of_a_data_set(tmp_path):
    for i in range(4):
        (tmp_path / "p").mkdir(exist_ok=True)
        write_wav(tmp_path / f"p/{i}.wav", np.arange(4000, dtype=np.int16) + 1000 * i, RATE)
    folder = list_sounds(tmp_path / "p")
    train = load_sound_folder(folder, "train", (1, 800), RATE, tmp_path / "cache", crop="random")
    val = load_sound_folder(folder, "val", (1, 800), RATE, tmp_path / "cache", crop="random")
    assert len(train) == 3 * RANDOM_CROPS and train.seconds.shape == (12,) and (train.seconds == 0.1).all()
    assert val.images[:, 0].tolist() == [0] and len(val.seconds) == 1
    assert train.images[np.arange(0, 12, 4)][:, 0].tolist() == [1000, 2000, 3000]
