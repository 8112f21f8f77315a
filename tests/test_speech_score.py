"""benchmarks/speech.py: a classifier that learns, figures with known answers, copies that are found, what is
published, and refusals."""

import json

import numpy as np
import pytest
import torch
from benchmarks import listen, speech
from PIL import Image

from audio_vae import PRESETS, AudioVAE, AudioVAEConfig
from sound import hertz_of, mel_of, read_sound
from speech import Speech

RATE, LENGTH = speech.RATE, speech.LENGTH
WORDS = ["low", "rising", "high", "falling"]


def say(word, number):
    """int16 (LENGTH,): one of WORDS, whose pitch and loudness are functions of the number."""
    random = np.random.default_rng([number, word])
    time = np.arange(4000) / RATE
    start, end = [(400, 400), (400, 1600), (1600, 1600), (1600, 400)][word]
    pitch = np.linspace(start, end, 4000) * random.uniform(0.9, 1.1)
    tone = np.sin(2 * np.pi * np.cumsum(pitch) / RATE + random.uniform(0, 6)) * np.minimum(1, 40 * time)
    sound = np.zeros(LENGTH)
    sound[200:4200] = random.uniform(0.05, 0.5) * tone
    return np.round(32767 * sound).astype(np.int16)


def saying(rounds, first=0):
    """Sounds of WORDS in turn, and their labels."""
    labels = np.arange(rounds * len(WORDS)) % len(WORDS)
    return np.stack([say(word, first + i) for i, word in enumerate(labels)]), labels


def as_speech(rounds, first, recorded=0):
    """What speech.open_speech returns; the first few count as recordings."""
    sounds, labels = saying(rounds, first)
    return Speech(sounds, labels.astype(np.int64), np.full(len(sounds), 0.525, np.float32),
                  np.arange(len(sounds)) < recorded, f"from {first}")


@pytest.fixture(scope="module")
def classifier():
    return speech.train_classifier(*saying(24), words=len(WORDS), steps=50, batch=16)


# ---- spectrograms and the classifier

def test_loudness_and_what_is_far_below_make_no_difference():
    x = torch.from_numpy(say(1, 0)[None] / 32768).float()
    levels = speech.spectra(x)
    assert levels.shape == (1, speech.BANDS, 65) and levels.max() == 0 and levels.min() == -speech.DEPTH
    assert torch.allclose(speech.spectra(0.1 * x), levels, atol=1e-3)
    hiss = 1e-5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(speech.spectra(x + hiss), levels, atol=0.5)
    assert (speech.spectra(torch.zeros(1, LENGTH)) == 0).all()      # silence has one level


def test_sounds_of_any_length_are_compared():
    sounds = np.arange(1, 10_001, dtype=np.int16)[None]
    assert (speech.fitted(sounds) == sounds[:, :LENGTH]).all()
    assert (speech.fitted(sounds[:, :100])[0] == [*range(1, 101), *[0] * (LENGTH - 100)]).all()


def test_variants_are_faster_and_slower_in_time_and_pitch():
    """Of a tone of 1,000 Hz, the highest band moves by up to 15 %, and its end by as much."""
    x = torch.zeros(64, LENGTH)
    x[:, 800:4800] = torch.sin(2 * torch.pi * 1000 / RATE * torch.arange(4000))
    levels = speech.augmented(x, torch.Generator().manual_seed(0))
    assert torch.equal(levels, speech.augmented(x, torch.Generator().manual_seed(0)))
    edges = hertz_of(np.linspace(0, mel_of(RATE / 2), speech.BANDS + 2))
    pitch = edges[1 + levels.mean(2).argmax(1).numpy()]             # the centre of the strongest band
    lasting = (levels.amax(1) > -12).sum(1).numpy() * speech.HOP * RATE
    assert 800 < pitch.min() < 920 and 1080 < pitch.max() < 1250
    assert np.corrcoef(pitch, lasting)[0, 1] < -0.8
    assert 3300 < lasting.min() and lasting.max() < 5200


def test_the_classifier_learns_and_recognises_sounds_that_are_new_to_it(classifier):
    sounds, labels = saying(20, first=1000)
    heard = speech.hear(classifier, sounds)
    assert (heard.words == labels).mean() >= 0.95
    assert heard.features.shape == (80, 64) and heard.features.dtype == np.float64
    assert speech.misheard(classifier, sounds[:4], np.array([1, 1, 1, 1]), 1) == "one 75%"


def test_the_classifier_is_kept_and_trained_anew_for_other_sounds(tmp_path, monkeypatch, classifier):
    trained = []

    def train(sounds, labels, words):
        trained.append(len(sounds))
        return classifier

    monkeypatch.setattr(speech, "FILE", tmp_path / "classifier.pt")
    monkeypatch.setattr(speech, "NAMES", WORDS)
    monkeypatch.setattr(speech, "train_classifier", train)
    some = as_speech(6, 0, recorded=3)
    speech.load_classifier(some)
    again = speech.load_classifier(some)
    assert trained == [21]                                          # without recordings, and once
    sounds, _ = saying(4)
    assert (speech.hear(again, sounds).features == speech.hear(classifier, sounds).features).all()
    speech.load_classifier(as_speech(6, 1))
    assert trained == [21, 24]
    with pytest.raises(ValueError, match="the voices of espeak-ng, of which there is none; apt install"):
        speech.load_classifier(as_speech(6, 2, recorded=24))


# ---- figures

def test_labels_in_turn():
    labels = np.array([2, 0, 1, 0, 2, 1, 0, 0])
    chosen = speech.in_turn(labels, 7)
    assert labels[chosen].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert len(set(chosen)) == 7 and (chosen == speech.in_turn(labels, 7)).all()
    many = speech.in_turn(labels, 12)
    assert labels[many].tolist() == [0, 1, 2] * 4 and sorted(many[1::3]) == [2, 2, 5, 5]


def test_agreement_and_distance_of_known_features(monkeypatch):
    """Features that are those of the reference, moved by 3 in one direction, are at a distance of 9; words
    that are heard wrongly in one of four cases agree in three."""
    random = np.random.default_rng(0)
    reference = random.normal(size=(400, 64))
    moved = reference + 3 * np.eye(64)[5]
    asked = np.arange(400) % 4
    heard = np.where(asked == 2, 0, asked)
    monkeypatch.setattr(speech, "hear", lambda model, sounds: speech.Heard(moved, heard))
    row = speech.score(None, None, asked, reference)
    assert row["agreement"] == 0.75 and row["frechet"] == pytest.approx(9, abs=1e-6)
    fresh = random.normal(size=(400, 64))
    monkeypatch.setattr(speech, "hear", lambda model, sounds: speech.Heard(fresh, heard))
    reference = random.normal(size=(100_000, 64))
    row = speech.score(None, None, asked, reference)
    assert row["frechet"] > 2 and abs(row["limit"]) < 0.8           # the limit is that of infinitely many
    assert row["limit"] == speech.frechet_limit(fresh, reference, group=4)      # halved in whole rounds


def test_copies_are_found_in_both_spaces():
    torch.manual_seed(0)
    vae = AudioVAE(AudioVAEConfig(**PRESETS["tiny"])).eval()
    train, _ = saying(12)
    held_out, _ = saying(4, first=5000)
    random = np.random.default_rng(0)
    copied = (train[[3, 17, 40]] + random.integers(-3, 4, (3, LENGTH))).astype(np.int16)
    samples = np.concatenate([copied, held_out[:9]])
    copies = speech.find_copies(vae, samples, held_out, train)
    for space in ("latents", "spectrograms (dB)"):
        row = copies.figures[space]["samples"]
        first = sorted((found["query"], found["picture"]) for found in row["worst"][:3])
        assert first == [(0, 3), (1, 17), (2, 40)], space
        assert row["worst"][2]["ratio"] < 0.3 < row["worst"][3]["ratio"]
        assert row["count"] == 12 and copies.figures[space]["held-out sounds"]["count"] == 16
    assert [pair[:2] for pair in sorted(copies.pairs[:3])] == [(0, 3), (1, 17), (2, 40)]


def test_pairs_are_drawn_sample_above_neighbour(monkeypatch):
    monkeypatch.setattr(speech, "NAMES", WORDS)
    train = as_speech(4, 0, recorded=1)
    asked = {}
    monkeypatch.setattr(speech, "spectrograms", lambda sounds, rate, columns, captions:
                        asked.update(sounds=sounds, columns=columns, captions=captions))
    samples, _ = saying(3, first=100)
    speech.draw_pairs([(i, (7 * i) % 16, i / 10) for i in range(8)], samples, train)
    assert asked["columns"] == 6 and asked["captions"][0] == "sample, asked for: low"
    assert asked["captions"][6:8] == ["nearest: low, recorded; ratio 0.00",
                                      "nearest: falling, spoken; ratio 0.10"]
    wanted = [*samples[:6], *train.sounds[[0, 7, 14, 5, 12, 3]], *samples[6:8], *train.sounds[[10, 1]]]
    assert (asked["sounds"] == np.stack(wanted)).all()


# ---- what is published

def test_words_are_joined_up_to_a_limit():
    pause = round(listen.PAUSE * RATE)
    words = [np.full(1000, i, np.int16) for i in (1, 2, 3)]
    whole = listen.joined(words, RATE)
    assert len(whole) == 3000 + 2 * pause and whole.tolist().count(2) == 1000
    assert (whole[1000:1000 + pause] == 0).all() and whole[1000 + pause] == 2
    long = [np.ones(20_000, np.int16)] * 4
    assert len(listen.joined(long, RATE)) == 40_000 + pause               # a third would be more than 100 kB


def test_what_is_published(tmp_path, monkeypatch):
    monkeypatch.setattr(speech, "NAMES", WORDS * 10)
    samples, _ = saying(10)
    monkeypatch.setattr(speech, "FOLDER", tmp_path)
    wav, picture = speech.publish(samples)
    assert wav == tmp_path / "speech.wav" and wav.stat().st_size <= listen.LARGEST
    words = [np.round(32768 * speech.cut_to_speech(sound, RATE)).astype(np.int16) for sound in samples[:10]]
    assert (read_sound(wav, RATE) == listen.joined(words, RATE)).all()
    with Image.open(picture) as image:
        assert image.size[0] == 54 + 4 * 252 + 44 and picture == tmp_path / "pictures/speech.png"


# ---- the program

@pytest.fixture
def home(tmp_path, monkeypatch, classifier):
    """A run whose samples are the right word in three of four cases, and copies of training sounds."""
    torch.manual_seed(0)
    vae = AudioVAE(AudioVAEConfig(**PRESETS["tiny"])).eval()
    parts = {"train": as_speech(10, 0, recorded=4), "val": as_speech(6, 5000, recorded=4)}

    def draw(run, scale, args):
        sounds = parts["train"].sounds[np.arange(args.n) % 40].copy()
        sounds[2::4] = parts["train"].sounds[0]
        return (sounds + np.random.default_rng(0).integers(-3, 4, sounds.shape)).astype(np.int16)

    checkpoint = {"arch": "dit", "data": {"source": "speech", "classes": WORDS, "size": [1, LENGTH]}}
    monkeypatch.setattr(speech, "NAMES", WORDS)
    monkeypatch.setattr(speech, "FILE", tmp_path / "classifier.pt")
    monkeypatch.setattr(speech, "FOLDER", tmp_path)
    monkeypatch.setattr(speech, "train_classifier", lambda *args: classifier)
    monkeypatch.setattr(speech, "open_speech", lambda kind, split, length, folder: parts[split])
    monkeypatch.setattr(speech, "load_vae", lambda run: vae)
    monkeypatch.setattr(speech, "draw_samples", draw)
    monkeypatch.setattr(speech, "load_checkpoint", lambda run: checkpoint)
    monkeypatch.chdir(tmp_path)
    return checkpoint


def test_a_run_is_scored(home, tmp_path, capsys):
    speech.main(["run", "--cfg", "1", "2", "--n", "43", "--neighbours", "pairs.png", "--listen", "--json",
                 "rows.json"])
    rows = {row["what"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    sample = rows["run: 40 samples, default sampler, default steps, guidance 1"]
    assert sample["agreement"] == 0.75 and sample["neighbours"]["latents"]["samples"]["close"] > 0.9
    assert sample["neighbours"]["latents"]["held-out sounds"]["close"] < 0.9
    assert "neighbours" not in rows["run: 40 samples, default sampler, default steps, guidance 2"]
    assert rows["classifier: 20 sounds of held-out voices of espeak-ng"]["agreement"] >= 0.9
    assert rows["classifier: 8 recordings, a voice that is new to it"]["agreement"] >= 0.75
    ideal = rows["40 training sounds (the ideal)"]
    floor = rows["run: the ideal through the autoencoder (the floor)"]
    assert ideal["agreement"] >= 0.95 and floor["frechet"] != ideal["frechet"]
    assert "most often heard as other words: high 100%" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"rows.json", "pairs.png", "speech.wav", "pictures",
                                                          "classifier.pt"}


def test_of_an_autoencoder_only_the_floor_is_measured(home, tmp_path, capsys):
    home |= {"arch": "vae", "config": {"rate": 8000}}
    speech.main(["run", "--n", "40"])
    printed = capsys.readouterr().out
    assert "run: the 24 validation sounds through the autoencoder" in printed and "samples" not in printed


@pytest.mark.parametrize("checkpoint, words", [
    ({"data": {"source": "tones", "classes": WORDS}}, "run: was trained on tones; give a run of --data"),
    ({"data": {"source": "speech", "classes": []}}, "run: was trained on speech; .* with --cond class"),
    ({"arch": "vae", "config": {"widths": [8, 8]}}, "run: is no autoencoder of sounds at 8000 Hz"),
    ({"arch": "vae", "config": {"rate": 44100}}, "run: is no autoencoder of sounds at 8000 Hz"),
])
def test_runs_of_other_data_are_refused_before_anything_is_written(home, tmp_path, checkpoint, words):
    home |= checkpoint
    with pytest.raises(ValueError, match=words) as refusal:
        speech.main(["run", "--listen"])
    assert "\n" not in str(refusal.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, words", [
    (["--neighbours", "nowhere/pairs.png"], "--neighbours nowhere/pairs.png: the folder nowhere does"),
    (["--neighbours", "pairs.txt"], "--neighbours pairs.txt: must end in .png"),
    (["--json", "nowhere/rows.json"], "--json nowhere/rows.json: the folder nowhere does not exist; create"),
])
def test_bad_flags_are_refused(home, tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        speech.main(["run", *flags])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--n", "12"], ["--cfg", "high"]])
def test_bad_numbers_are_refused(home, flags):
    with pytest.raises(ValueError, match=f"^{flags[0]} {flags[1]}: must be"):
        speech.main(["run", *flags])
