"""tones.py: sounds are read back as drawn, follow their captions, and nothing else is read as a tone."""

import os
import wave

import numpy as np
import pytest

import data
import tones
import toys
from data import load_data
from tones import (ALL_TONES, LENGTH, PITCHES, RATE, TIMBRES, TONE_CLASSES, UNSEEN_TONES, Events, Tone,
                   describe_events, draw_class, draw_events, draw_tone, follows, omit_details, parse_caption,
                   read_events, read_tone, seconds_of_events, seconds_of_tone, tone_of)

SOUNDS = int(os.environ.get("SOUNDS", 2000))      # SOUNDS=20000 for the long version


def pure(frequency, seconds=0.6, amplitudes=(1.0,), rate=RATE):
    """Partials with these amplitudes, faded in and out, as float (LENGTH,)."""
    t = np.arange(int(seconds * rate)) / rate
    sound = sum(a * np.sin(2 * np.pi * frequency * (k + 1) * t) for k, a in enumerate(amplitudes))
    sound *= 0.3 * np.minimum(1, np.minimum(t, t[::-1]) / 0.02)
    return np.pad(sound, (0, max(0, LENGTH - len(t))))


def noisy(sound, decibels, rng):
    """With white noise at this ratio of the sound's mean power, silence included, to the noise's."""
    sound = sound / 32768
    return sound + rng.normal(0, np.sqrt((sound**2).mean() / 10 ** (decibels / 10)), len(sound))


def muffled(sound, cutoff):
    """Through a first-order low-pass: 3 dB less at the cutoff, in Hz."""
    gain = 1 / np.sqrt(1 + (np.fft.rfftfreq(len(sound), 1 / RATE) / cutoff) ** 2)
    return np.fft.irfft(np.fft.rfft(sound / 32768) * gain, len(sound))


# ---- drawn and read back

def test_tones_are_read_back_exactly():
    assert len(TONE_CLASSES) == 24 and TONE_CLASSES[5] == "low-square" and ALL_TONES[5].label == 5
    for i in range(SOUNDS):
        assert read_tone(draw_tone(i)) == ALL_TONES[i % 24], i


def test_events_are_read_back_exactly():
    for i in range(SOUNDS // 2):
        events = describe_events(i)
        sound = draw_events(events, i)
        assert read_events(sound) == list(events.tones), (i, events.caption)
        if i < 100:
            assert follows(events.caption, sound)
            assert (read_tone(sound) is None) == (len(events.tones) == 2)


@pytest.mark.parametrize("length, rate", [(1366, 8000), (2048, 8000), (65536, 8000), (6144, 6000),
                                          (22050, 22050), (44100, 44100)])
def test_any_window_that_holds_the_pitches(length, rate):
    """One tone in any; two are told apart in half a second and more."""
    for i in range(72):
        sound = draw_tone(i, length, rate)
        assert sound.shape == (length,) and read_tone(sound, rate) == ALL_TONES[i % 24], i
        events = describe_events(i)
        if length >= rate / 2:
            assert read_events(draw_events(events, i, length, rate), rate) == list(events.tones), i


@pytest.mark.parametrize("spoil", [lambda sound, rng: noisy(sound, 20, rng),
                                   lambda sound, rng: noisy(sound, 15, rng),
                                   lambda sound, rng: muffled(sound, 2500),
                                   lambda sound, rng: noisy(32768 * muffled(sound, 3000), 20, rng),
                                   lambda sound, rng: sound / 32768 * 0.5 + 0.005])
def test_tones_survive_a_decoder(spoil):
    rng = np.random.default_rng(0)
    for i in range(144):
        assert read_tone(spoil(draw_tone(i), rng)) == ALL_TONES[i % 24], i
        events = describe_events(i)
        assert read_events(spoil(draw_events(events, i), rng)) == list(events.tones), i


def test_int16_and_float_are_read_alike():
    sound = draw_tone(7)
    assert read_tone(sound) == read_tone((sound / 32768).astype(np.float32)) == ALL_TONES[7]
    assert read_tone(sound[:int(seconds_of_tone(7) * RATE)]) == ALL_TONES[7]       # trimmed, as when written
    with pytest.raises(ValueError, match=r"a sound of shape \(1, 8192\): must be \(T,\)"):
        read_tone(sound[None])


# ---- nothing else is a tone

def test_silence_and_noise_are_no_tone():
    rng = np.random.default_rng(0)
    for silence in (np.zeros(LENGTH, np.int16), np.full(LENGTH, 1e-3), np.zeros(3), np.full(LENGTH, np.nan),
                    np.full(LENGTH, np.inf)):
        assert read_events(silence) == [] and read_tone(silence) is None
    for i in range(100):
        assert read_events(rng.normal(0, 0.2, LENGTH)) == [None]               # white
        brown = np.cumsum(rng.normal(0, 0.02, LENGTH))
        assert read_tone(brown - brown.mean()) is None
        # as loud as the tone: half of the power is the tone's
        assert read_tone(noisy(draw_tone(i)[:4096], 0, rng)) is None
    click = np.zeros(LENGTH)
    click[1000:1200] = 0.5
    assert read_tone(click) is None


def test_two_tones_at_once_are_no_tone():
    """All pairs of different pitches, equally loud and long: the same index places them alike."""
    for a in range(24):
        for b in range(a + 1, 24):
            if a // 4 != b // 4:
                both = draw_class(a, a * 24 + b) / 65536 + draw_class(b, a * 24 + b) / 65536
                assert read_tone(both) is None, (TONE_CLASSES[a], TONE_CLASSES[b])
    # a second, quieter one for a fifth of the time, with 7 % of the energy
    assert read_tone(pure(230, 0.95)) == ("middle", "sine")
    assert read_tone(pure(230, 0.95) + 0.6 * pure(350, 0.2)) is None
    one_after_the_other = np.concatenate([draw_tone(0)[1800:4000], draw_tone(12)[1800:4000]])
    assert read_tone(one_after_the_other) is None                               # without a pause


def test_a_pitch_between_two_classes_is_no_tone():
    pitches = list(PITCHES.values())
    between = np.sqrt(np.multiply(pitches[1:], pitches[:-1]))
    for frequency in [70, *between, 1000, 2000]:
        for amplitudes in ((1,), (1, 0, 1 / 3), (1, 1 / 2, 1 / 3)):
            assert read_tone(pure(frequency, amplitudes=amplitudes)) is None
    for pitch, frequency in PITCHES.items():
        for off in (-0.1, -0.05, 0.05, 0.1):
            expected = Tone(pitch, "sine") if abs(off) < 0.06 else None
            assert read_tone(pure(frequency * (1 + off))) == expected
    t = np.arange(LENGTH) / RATE
    glide = 0.3 * np.sin(2 * np.pi * (150 * t + 100 * t**2))                    # from 150 to 350 Hz
    assert read_tone(glide) is None


def test_other_timbres_are_no_tone():
    for amplitudes in ((1, 1, 0, 0.5), (1, 0, 0, 0.5), (0.2, 1), (1, 0.3, 0, 0.3), (1, 0, 1)):
        assert read_tone(pure(230, amplitudes=amplitudes)) is None, amplitudes
    expected = {(1,): "sine", (1, 0, 1 / 3, 0, 1 / 5, 0, 1 / 7): "square",
                (1, 0.7): "organ",
                (1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6, 1 / 7): "sawtooth"}
    for amplitudes, timbre in expected.items():
        assert read_tone(pure(230, amplitudes=amplitudes)) == ("middle", timbre)


# ---- what is drawn

def test_a_sound_is_a_function_of_its_index():
    assert (draw_tone(5) == draw_tone(5)).all() and draw_tone(5).dtype == np.int16
    assert (draw_tone(29) == draw_class(5, 29)).all()
    # All but the class follows from the index: the same times and, up to rounding, loudness.
    sine, square = draw_class(0, 29) / 32768, draw_class(1, 29) / 32768
    assert np.flatnonzero(sine)[-1] == np.flatnonzero(square)[-1]
    assert np.sqrt((sine**2).mean()) == pytest.approx(np.sqrt((square**2).mean()), rel=0.02)
    assert len({draw_tone(i).tobytes() for i in range(0, 240, 24)}) == 10
    events = describe_events(3)
    assert events == describe_events(3) and (draw_events(events, 3) == draw_events(events, 3)).all()


def test_drawn_sounds_have_not_changed():
    """A run goes on with the sounds that it began with. The last bit may depend on the machine."""
    some = draw_tone(7)[3000:3300:60].tolist()
    assert some == pytest.approx([11942, 6623, 2060, -2375, -7390], abs=2)
    events = describe_events(4)
    assert events.caption == "a deep sine tone, then a deep square"
    some = draw_events(events, 4)[1000:1300:60].tolist()
    assert some == pytest.approx([-11611, 2272, 11234, -3081, -10756], abs=2)


def test_seconds_loudness_and_pitch_are_in_their_ranges():
    lengths, pitches = [], []
    for i in range(0, 480):
        sound, seconds = draw_tone(i), seconds_of_tone(i)
        assert not sound[round(seconds * RATE):].any() and 0.3 <= seconds <= 1
        assert sound[round(seconds * RATE) - 200:].any()
        assert np.abs(sound).max() < 0.78 * 32768                               # far from clipping
        lengths.append(seconds)
        if i % 24 == 20:                    # a piercing sine: its pitch from its spectrum
            spectrum = np.abs(np.fft.rfft(sound / 32768, 2**17))
            pitches.append(spectrum.argmax() * RATE / 2**17)
    assert min(lengths) < 0.35 and max(lengths) > 0.95 and 0.6 < np.mean(lengths) < 0.75
    assert 783 < min(pitches) < 795 and 805 < max(pitches) < 817
    assert seconds_of_tone(9, 2 * LENGTH) == pytest.approx(2 * seconds_of_tone(9), abs=1e-3)
    assert seconds_of_tone(9, 2 * LENGTH, 2 * RATE) == pytest.approx(seconds_of_tone(9), abs=1e-3)
    for i in range(100):
        events = describe_events(i)
        sound, seconds = draw_events(events, i), seconds_of_events(events, i)
        assert not sound[round(seconds * RATE):].any() and sound[round(seconds * RATE) - 200:].any()
        assert 0.3 <= seconds <= 1


@pytest.mark.parametrize("pitch", PITCHES)
def test_waveforms_are_band_limited(pitch):
    """No energy between the partials or above the band: nothing is aliased. And the partials are those of
    the series: a sawtooth is its odd partials, a square, and its even ones, a sawtooth of twice the pitch."""
    count = int(tones.BAND * RATE / PITCHES[pitch])
    for timbre in TIMBRES:
        period = tones._period(timbre, count)[:-1]
        assert (period**2).mean() == pytest.approx(1)
        amplitudes = np.abs(np.fft.rfft(period))[1:]
        assert amplitudes[count:].max() < 1e-10 * amplitudes[0]
        assert amplitudes[:count] / amplitudes[0] == pytest.approx(np.abs(tones.partials(timbre, count)))
        # drawn at another rate than the period's, it stays so
        sound = draw_class(Tone(pitch, timbre).label, 3) / 32768
        power = np.abs(np.fft.rfft(sound * np.hanning(LENGTH))) ** 2
        frequency = np.fft.rfftfreq(LENGTH, 1 / RATE)
        above = power[frequency > tones.BAND * RATE * 1.03].sum()
        assert above < 1e-4 * power.sum()
    k = np.arange(1, 9)
    assert tones.partials("sawtooth", 8) == pytest.approx(1 / k)
    assert tones.partials("square", 8) == pytest.approx(np.where(k % 2, 1 / k, 0))


def test_a_waveform_is_the_one_of_its_name():
    """With many partials: a square has two levels, a sawtooth one slope and a jump; an organ has two
    sines."""
    square, organ, saw = (tones._period(timbre, 2000)[:-1] for timbre in TIMBRES[1:])
    quarter = len(square) // 4
    assert square[quarter // 2:2 * quarter - quarter // 2] == pytest.approx(square[quarter], rel=0.01)
    assert square[3 * quarter] == pytest.approx(-square[quarter], rel=1e-6)
    turn = 2 * np.pi * np.arange(len(organ)) / len(organ)
    sines = (np.sin(turn) + 0.7 * np.sin(2 * turn)) / np.sqrt(1.49 / 2)
    assert organ == pytest.approx(sines, abs=1e-9)
    line = np.sqrt(3) * (1 - 2 * np.arange(len(saw)) / len(saw))
    assert saw[400:-400] == pytest.approx(line[400:-400], abs=0.03)


@pytest.mark.parametrize("length, rate, words", [
    (8192, 4000, "a rate of 4000 samples a second: .* of 800 Hz, need at least 5440"),
    (1024, 8000, "a sound of 1024 samples at 8000 a second: .* of 100 Hz, need at least 1093"),
])
def test_windows_that_do_not_hold_the_pitches(length, rate, words):
    for draw in (lambda: draw_tone(0, length, rate),
                 lambda: draw_events(describe_events(0), 0, length, rate)):
        with pytest.raises(ValueError, match=words) as error:
            draw()
        assert len(str(error.value).splitlines()) == 1


# ---- captions

def test_captions():
    low, high = Tone("low", "square"), Tone("high", "sine")
    assert Events((low,)).caption == "a low square tone"
    assert Events((low, high)).caption == "a low square tone, then a high sine"
    assert parse_caption("a low square tone, then a high sine") == [low, high]
    assert parse_caption("a tone, then a high tone") == [(None, None), ("high", None)]
    assert parse_caption("a square, then a sine tone") == [(None, "square"), (None, "sine")]
    for words in ("", "a", "a loud tone", "a low", "a square low tone", "a low tone then a high tone"):
        with pytest.raises(ValueError, match="caption .*: not of the form"):
            parse_caption(words)


def test_follows_sees_each_mistake():
    events = Events((Tone("low", "square"), Tone("high", "sine")))
    sound = draw_events(events, 0)
    for right in (events.caption, "a tone, then a tone", "a low tone, then a sine"):
        assert follows(right, sound)
    for wrong in ("a low square tone", "a high sine tone, then a low square",
                  "a tone, then a tone, then a tone",
                  "a low sine tone, then a high sine", "a low square tone, then a shrill sine",
                  "a low organ tone, then a high tone"):
        assert not follows(wrong, sound)
    noise = np.random.default_rng(0).normal(0, 0.2, LENGTH)
    assert not follows("a tone", noise) and not follows("a tone", np.zeros(LENGTH))


def test_omitted_details():
    """Each detail is omitted independently, and what remains is true."""
    rng, caption = np.random.default_rng(0), "a low square tone, then a high sine"
    made = [omit_details(caption, rng) for _ in range(4000)]
    firsts = {"a low square tone", "a square tone", "a low tone", "a tone"}
    seconds = {"a high sine", "a sine", "a high tone", "a tone"}
    assert {*made} == {f"{first}, then {second}" for first in firsts for second in seconds}
    assert abs(np.mean([m == caption for m in made]) - (6 / 7) ** 4) < 0.03
    for word in ("low", "square", "high", "sine"):
        assert abs(np.mean([word in m for m in made]) - 6 / 7) < 0.03
    events = Events(tuple(Tone(*words) for words in parse_caption(caption)))
    sound = draw_events(events, 1)
    assert all(follows(m, sound) for m in {*made})


def test_events_keep_what_is_unseen_apart():
    seen = [describe_events(i) for i in range(4000)]
    assert {len(events.tones) for events in seen} == {1, 2}
    heard = {tone for events in seen for tone in events.tones}
    assert heard == set(ALL_TONES) - UNSEEN_TONES and len(heard) == 20
    assert {pitch for pitch, _ in heard} == set(PITCHES) and {timbre for _, timbre in heard} == set(TIMBRES)
    asked = [describe_events(i, unseen=True) for i in range(1000)]
    assert {tone for events in asked for tone in events.tones} == set(ALL_TONES)
    assert all(set(events.tones) & UNSEEN_TONES for events in asked)
    for count in (1, 2):
        assert {len(describe_events(i, count).tones) for i in range(50)} == {count}


# ---- shapes and their tones; the sources

def test_every_shape_has_a_tone_of_its_own():
    classes = [tone_of(colour, kind) for colour in toys.COLOURS for kind in toys.KINDS]
    assert classes == list(range(24)) and len(toys.SHAPE_CLASSES) == len(TONE_CLASSES)
    assert TONE_CLASSES[tone_of("green", "square")] == "low-square"
    assert tones.PITCH_OF.keys() == toys.COLOURS.keys() and [*tones.TIMBRE_OF] == toys.KINDS


def test_the_source_of_tones(tmp_path):
    def load(split, size=(1, 2048), **options):
        return load_data("tones", split, size, tmp_path, tmp_path, **options)

    assert data.SOURCES["tones"].rate == RATE
    train, val = load("train", count=48), load("val")
    assert train.images.shape == (48, 2048) and val.images.shape == (480, 2048)
    assert train.images.dtype == np.int16 and train.rate == RATE and train.classes == TONE_CLASSES
    assert train.identity == train.fingerprint != val.fingerprint and train.captions is None
    data.load_tones.cache_clear()
    assert load("train", count=48).fingerprint == train.fingerprint
    for part, first in ((train, 0), (val, 10**9 - 16)):
        assert (part.labels == np.arange(len(part)) % 24).all()
        assert part.seconds.dtype == np.float32 and part.seconds.shape == (len(part),)
        for i in (0, 1, 30, 47):
            assert (part.images[i] == draw_tone(first + i, 2048)).all()
            assert read_tone(part.images[i]) == ALL_TONES[part.labels[i]]
            assert not part.images[i, round(float(part.seconds[i]) * RATE):].any()
    for size, options, words in (((32, 32), {}, "a size of 32 x 32: the"), ((1, 512), {}, "at least 1093"),
                                 ((1, 2048), {"multiple": (8, 8)}, "--aspect")):
        with pytest.raises(ValueError, match=words):
            load("val", size, **options)


def test_the_source_of_captioned_tones(tmp_path):
    train, val = (load_data("tones", split, (1, 4096), tmp_path, tmp_path, words="captions", count=60)
                  for split in ("train", "val"))
    assert len(train) == 60 and len(val) == 480 and train.labels is None and train.rate == RATE
    assert train.fingerprint != val.fingerprint and train.identity != train.fingerprint
    for i, (sound, caption) in enumerate(zip(train.images, train.captions)):
        assert caption == describe_events(i).caption and follows(caption, sound)
        assert not sound[round(float(train.seconds[i]) * RATE):].any()
    rng = np.random.default_rng(0)
    varied = [train.vary(caption, rng) for caption in train.captions]
    assert varied != train.captions and all(map(follows, varied, train.images))
    assert follows(val.captions[7], val.images[7])


def test_the_demonstration_writes_one_of_each_class(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tones.demo()
    assert "240 of 240 tones" in capsys.readouterr().out
    with wave.open("tones.wav") as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, RATE)
        sounds = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(24, LENGTH)
    assert [read_tone(sound).label for sound in sounds] == list(range(24))
