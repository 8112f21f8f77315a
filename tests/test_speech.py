"""speech.py: words that are recorded or spoken, cut to their speech, made once and split by voice. The
program is a stand-in, except in the last test."""

import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import contents

import data
import files
import speech
from data import SOURCES, load_data
from sound import write_wav
from speech import (ALPHABET, DIGITS, WORDS, Kind, Speaker, cut_to_speech, even, find_speaker, open_speech,
                    phrases)

VOICES = tuple(f"v{i}" for i in range(16))
SPEAKER = Speaker("stand-in 1", ("en-us", "en-gb"), VOICES)
TEXTS = {"zero": ("digits/0",), "one": ("digits/1",), "two": ("digits/2",), "bye": ("bye", "vm-bye"),
         "never": ("never",)}
KIND = Kind(TEXTS, 6, 2)


def speak(command):
    """A tone whose pitch is the text's and whose length is the speed's, with silence around."""
    voice, speed, text = command[2], int(command[4]), command[-1]
    hertz = 300 + 200 * list(TEXTS).index(text)
    time = np.arange(40 * 8000 // speed) / 8000
    tone = (0.1 + 0.05 * VOICES.index(voice.partition("+")[2])) * np.sin(2 * np.pi * hertz * time)
    memory = io.BytesIO()
    write_wav(memory, np.concatenate([np.zeros(700), tone, np.zeros(1900)]).astype(np.float32), 8000)
    return memory.getvalue()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A system with recordings of all but one text, and the stand-in. Returns the folder of the data."""
    for i, name in enumerate(file for names in list(TEXTS.values())[:4] for file in names):
        path = tmp_path / "data/speech" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        tone = np.sin(2 * np.pi * 1000 * np.arange(2000) / 8000)
        write_wav(path, np.concatenate([np.zeros(800), (0.1 + 0.1 * i) * tone, np.zeros(800)]), 8000)
    monkeypatch.setitem(speech.KINDS, "words", KIND)
    monkeypatch.setattr(speech, "FOLDER", tmp_path / "nowhere")
    monkeypatch.setattr(speech, "find_speaker", lambda: SPEAKER)
    monkeypatch.setattr(speech, "_run", speak)
    monkeypatch.setattr(files, "_warned", set())
    return tmp_path / "data"


# ---- what is said

def test_the_vocabulary():
    assert len(DIGITS) == 10 and len(ALPHABET) == 26 and len(WORDS) == 40
    assert "".join(word[0] for word in ALPHABET) == "abcdefghijklmnopqrstuvwxyz"
    assert WORDS["seven"] == ("digits/7",) and WORDS["x-ray"] == ("phonetic/x_p",)
    assert WORDS["goodbye"] == ("goodbye", "vm-goodbye")


def test_phrases_are_file_names():
    found = phrases()
    assert len(found) == 208 and set(WORDS) < set(found)
    for text, names in {"eleven": "digits/11", "ninety": "digits/90", "ninetieth": "digits/h-90", "january":
                        "digits/mon-0", "saturday": "digits/day-6", "please try again": "please-try-again",
                        "first": "digits/h-1 vm-first", "less than": "queue-less-than", "b": "letters/b",
                        "minutes": "minutes queue-minutes vm-minutes", "friends": "vm-Friends",
                        "thank you": "auth-thankyou privacy-thankyou", "forty": "digits/40"}.items():
        assert sorted(found[text]) == sorted(names.split()), text
    every = [name for names in found.values() for name in names]
    assert len(every) == len(set(every))                        # none has two texts


def test_all_recordings_of_the_vocabulary_are_there():
    if not (speech.FOLDER / "digits").is_dir():
        pytest.skip(f"needs the package {speech.PACKAGE}")
    for names in phrases().values():
        for name in names:
            assert (speech.FOLDER / f"{name}.wav").is_file(), name


# ---- one sound

def test_cutting_keeps_the_speech_and_a_margin():
    tone = np.round(8000 * np.sin(2 * np.pi * 200 * np.arange(1600) / 8000)).astype(np.int16)
    hum = np.random.default_rng(0).integers(-20, 21, 8000).astype(np.int16)         # about -53 dB below
    sound = hum.copy()
    sound[2400:4000] += tone
    cut = cut_to_speech(sound, 8000)
    assert len(cut) == 160 + 1600 + 240
    assert (cut[40:-40] * 32768 == sound[2240:4240][40:-40]).all()                  # whose ends are faded
    assert cut[0] == 0 and cut[-1] == 0 and abs(cut[20] * 32768) <= abs(int(sound[2260]))
    whole = cut_to_speech(tone, 8000)
    assert (whole * 32768 == tone).all()                        # nothing is cut off, so nothing is faded
    assert len(cut_to_speech(np.zeros(800, np.int16), 8000)) == 0
    assert len(cut_to_speech(np.ones(50, np.int16), 8000)) == 0


def test_loudness_is_that_of_the_louder_parts():
    sine = np.sin(2 * np.pi * 200 * np.arange(4000) / 8000)
    for gain in (0.001, 0.3, 1.0):
        found = even(gain * np.concatenate([sine, 0.001 * sine]), 8000) / 32768
        assert abs(np.sqrt((found[:4000] ** 2).mean()) - 0.1) < 1e-3                # whatever the pause is
    clicks = np.zeros(4000)
    clicks[::160] = 0.5
    assert abs(np.abs(even(clicks, 16_000)).max() - 0.95 * 32768) < 1                 # bounded by its peak
    assert not even(np.zeros(100), 8000).any() and len(even(np.zeros(0), 8000)) == 0


# ---- all of them

def test_commands_are_functions_of_their_number():
    commands = [SPEAKER.command("zero", i, False) for i in range(300)]
    assert commands == [SPEAKER.command("zero", i, False) for i in range(300)]
    assert len({tuple(command) for command in commands}) == 300
    assert commands[:5] != [SPEAKER.command("one", i, False)[:-1] + ["zero"] for i in range(5)]
    voices = {command[2].partition("+")[2] for command in commands}
    held_out = {SPEAKER.command("zero", i, True)[2].partition("+")[2] for i in range(99)}
    assert held_out == {"v7", "v15"} and voices == set(VOICES) - held_out
    assert {command[2].partition("+")[0] for command in commands} == {"en-us", "en-gb"}
    speeds = [int(command[4]) for command in commands]
    pitches = [int(command[6]) for command in commands]
    assert 115 <= min(speeds) < 125 < 220 < max(speeds) <= 230 and 15 <= min(pitches) < max(pitches) <= 85


def test_words_are_made_once_and_split(here, capsys):
    train, val = (open_speech("words", split, 4096, here) for split in ("train", "val"))
    error = capsys.readouterr().err
    assert error.count("5 recordings (asterisk-core-sounds-en-wav: Allison Smith, CC BY-SA 3.0) and 40 "
                       "sounds of espeak-ng; left out are 0 longer than 0.512 s and 0 silent") == 1
    assert train.sounds.shape == (4 + 6 * 5, 4096) and val.sounds.shape == (1 + 2 * 5, 4096)
    assert train.recorded.sum() == 4 and val.recorded.sum() == 1
    assert val.texts[val.recorded].tolist() == [2]              # every fifth recording, from the third on
    assert np.bincount(train.texts).tolist() == [7, 7, 6, 8, 6]
    for part in (train, val):
        assert isinstance(part.sounds, np.memmap) and part.sounds.dtype == np.int16
        for sound, text, seconds, recorded in zip(part.sounds, part.texts, part.seconds, part.recorded):
            length = round(float(seconds) * 8000)
            assert not sound[length:].any() and sound[length - 320:length - 240].any()
            spectrum = np.abs(np.fft.rfft(sound / 32768.0))
            assert abs(spectrum.argmax() * 8000 / 4096 - (1000 if recorded else 300 + 200 * text)) < 4
            assert abs(np.sqrt(np.mean((sound[400:length - 500] / 32768.0) ** 2)) - 0.1) < 0.005
    calls = []
    speech._run, plain = lambda command: calls.append(command) or plain(command), speech._run
    again = open_speech("words", "train", 4096, here)
    assert not calls and again.fingerprint == train.fingerprint != val.fingerprint
    assert contents(here / "speech") >= {path.name for path in (here / "speech").glob("words-4096-*.*")}
    assert not list(here.rglob("*.part"))


def test_what_does_not_fit_is_left_out_and_counted(here, capsys):
    found = open_speech("words", "train", 2440, here)
    commands = [SPEAKER.command(text, i, held_out) for held_out, count in ((False, 6), (True, 2))
                for text in TEXTS for i in range(count)]
    lengths = np.array([40 * 8000 / int(command[4]) + 400 for command in commands])
    error = capsys.readouterr().err
    counts = re.search(r"and (\d+) sounds of espeak-ng; left out are (\d+) longer", error)
    kept, longer = int(counts[1]), int(counts[2])
    # to the 10 ms within which speech begins and ends
    assert (lengths > 2440 + 80).sum() <= longer <= (lengths > 2440 - 160).sum() and kept + longer == 40
    assert longer > 5 and kept > 5
    assert (found.seconds <= 2440 / 8000).all() and found.sounds[:, 0].shape == found.texts.shape
    with pytest.raises(ValueError, match="nothing of 'zero' fits into 0.125 s; take a longer window"):
        open_speech("words", "train", 1000, here)
    assert not list(here.rglob("words-1000-*.npy")) and not list(here.rglob("*.part"))


def test_a_damaged_or_other_cache_is_made_again(here):
    first = open_speech("words", "train", 4096, here)
    path = next((here / "speech").glob("words-4096-????????.npy"))
    kept = np.array(first.sounds)
    fingerprint = first.fingerprint
    del first
    for damaged in (path, path.with_suffix(".about.npy"), path.with_suffix(".json")):
        damaged.write_bytes(b"damaged")
        again = open_speech("words", "train", 4096, here)
        assert again.fingerprint == fingerprint and (again.sounds == kept).all()
        del again
    write_wav(here / "speech/digits/0.wav", np.full(2000, 0.5), 8000)        # another recording
    assert open_speech("words", "train", 4096, here).fingerprint != fingerprint


def test_without_the_program(here, monkeypatch, capsys):
    monkeypatch.setattr(speech, "find_speaker", lambda: None)
    del TEXTS["never"]
    try:
        train, val = (open_speech("words", split, 4096, here) for split in ("train", "val"))
    finally:
        TEXTS["never"] = ("never",)
    error = capsys.readouterr().err
    assert error.count("espeak-ng is not installed, so there are only recordings, about one of each text, "
                       "which is few; apt install espeak-ng") == 1
    assert train.recorded.all() and train.texts.tolist() == [0, 1, 2, 3, 3] and val.texts.tolist() == [2]


def test_without_recordings(here, capsys):
    shutil.rmtree(here / "speech")
    train, val = (open_speech("words", split, 4096, here) for split in ("train", "val"))
    assert "no recordings, so all voices are those of espeak-ng; apt install aster" in capsys.readouterr().err
    assert not train.recorded.any() and len(train.texts) == 30 and len(val.texts) == 10


def test_with_neither(here, monkeypatch):
    monkeypatch.setattr(speech, "find_speaker", lambda: None)
    shutil.rmtree(here / "speech")
    with pytest.raises(ValueError) as error:
        open_speech("words", "train", 4096, here)
    assert str(error.value) == ("--data speech: neither recordings nor espeak-ng are here; apt install "
                                "asterisk-core-sounds-en-wav espeak-ng, or name the folder with digits/1.wav "
                                "with --data-dir")
    assert not (here / "speech").exists()


@pytest.mark.parametrize("content, message", [(b"RIFF", "0.wav: neither a WAV"),
                                              (b"", "0.wav: an empty file")])
def test_a_damaged_recording_is_named(here, content, message):
    (here / "speech/digits/0.wav").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_speech("words", "train", 4096, here)
    assert not list(here.rglob("*.part"))


def test_a_program_that_fails_is_named(here, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(speech, "PROGRAM", "false")
    with pytest.raises(ValueError, match="^false --version: no reason given$"):
        find_speaker()
    monkeypatch.setattr(speech, "PROGRAM", "no-such-program")
    assert find_speaker() is None
    with pytest.raises(ValueError, match="^no-such-program --version: No such file"):
        speech._output("--version")


# ---- as a data set

def test_a_data_set_of_words(here, monkeypatch):
    found = load_data("speech", "train", (1, 4096), here, here / "cache")
    assert found.classes == list(TEXTS) and found.captions is None and found.rate == 8000
    assert found.images.shape == (34, 4096) and found.labels.dtype == np.int64
    assert found.seconds.dtype == np.float32 and len(found.seconds) == 34
    monkeypatch.setitem(speech.KINDS, "phrases", KIND)
    texts = list(TEXTS)
    worded = load_data("speech", "train", (1, 4096), here, here / "cache", words="captions")
    assert worded.labels is None and worded.classes == []
    assert worded.captions == [texts[label] for label in found.labels]
    assert SOURCES["speech"].rate == 8000 and data.KINDS is speech.KINDS
    with pytest.raises(ValueError, match="--data speech at a size of 32 x 32: the size of sounds is 1 x sam"):
        load_data("speech", "train", (32, 32), here, here / "cache")


def test_the_real_program(tmp_path, monkeypatch):
    """Three words by a few of its voices: each is speech of a likely length, and the same when it is spoken
    again."""
    speaker = find_speaker()
    if speaker is None:
        pytest.skip("needs the program espeak-ng")
    assert len(speaker.accents) >= 2 and len(speaker.voices) >= 16 and speaker.version
    monkeypatch.setitem(speech.KINDS, "words", Kind({"zero": (), "seven": (), "november": ()}, 3, 1))
    monkeypatch.setattr(speech, "FOLDER", Path("nowhere"))
    first = open_speech("words", "train", 8192, tmp_path / "a")
    again = open_speech("words", "train", 8192, tmp_path / "b")
    assert len(first.texts) == 9 and first.fingerprint == again.fingerprint
    assert (first.sounds == again.sounds).all()
    assert (first.seconds > 0.25).all() and (first.seconds < 1.03).all()
    long, short = first.seconds[first.texts == 2].mean(), first.seconds[first.texts == 0].mean()
    assert long > short                             # november takes longer than zero
