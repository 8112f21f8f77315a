"""Procedural sounds with captions: tones of six pitches and four timbres, read back from the samples.

    python tones.py                       # writes tones.wav, and reads 240 tones and 240 pairs of tones back

The twin of toys.py. Because `read_tone` and `read_events` recover exactly what was drawn, a model trained on
these sounds can be scored without a classifier: a sample is right if one hears what was asked for.

Conventions: sounds are int16 (T,), mono; where they are read, also float in [-1, 1]. Sound `index` of a
sequence is a pure function of its index, and every sequence is infinite. All times scale with the window of
T samples, as shapes do with their picture; those given here in seconds are of a window of 1.024 s.
"""

from __future__ import annotations

import functools
import math
import re
import wave
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

RATE, LENGTH = 8000, 8192           # samples a second, samples
# In Hz, so far apart that no partial of one lies near one of the first six partials of another.
PITCHES = {"deep": 100.0, "low": 150.0, "middle": 230.0, "high": 350.0, "shrill": 530.0, "piercing": 800.0}
TIMBRES = ["sine", "square", "organ", "sawtooth"]
TONE_CLASSES = [f"{pitch}-{timbre}" for pitch in PITCHES for timbre in TIMBRES]
DETUNED = 0.02                      # a drawn pitch differs from its class's by at most this share of it
BAND = 0.45                         # partials lie below this share of the rate, so that nothing is aliased
LOUDNESS = (0.15, 0.35)             # root mean square of a tone; its peak is at most 2.1 times as high
# Training never contains these, alone or as one of two; see describe_events.
UNSEEN_TONES = {("deep", "sawtooth"), ("middle", "sine"), ("high", "square"), ("piercing", "organ")}


class Tone(NamedTuple):
    pitch: str
    timbre: str

    @property
    def label(self) -> int:
        """Its class, an index of TONE_CLASSES."""
        return TONE_CLASSES.index(f"{self.pitch}-{self.timbre}")


ALL_TONES = [Tone(*name.split("-")) for name in TONE_CLASSES]


# ---- one tone

def partials(timbre: str, count: int) -> np.ndarray:
    """(count,) amplitudes of the partials 1, 2, ... of a timbre: those of the Fourier series of a square and
    a sawtooth; of an organ, a pipe and one an octave higher."""
    k = np.arange(1, count + 1)
    if timbre == "sine":
        return np.where(k == 1, 1.0, 0.0)
    if timbre == "organ":
        return np.where(k == 1, 1.0, np.where(k == 2, 0.7, 0.0))
    if timbre == "square":
        return (k % 2) / k
    return 1 / k


@functools.lru_cache(maxsize=256)
def _period(timbre: str, count: int) -> np.ndarray:
    """One period with `count` partials and a root mean square of 1, its first sample repeated at the end."""
    points = max(4096, 2 ** math.ceil(math.log2(32 * count)))    # enough to interpolate linearly between them
    spectrum = np.zeros(points // 2 + 1, complex)
    spectrum[1:count + 1] = -1j * partials(timbre, count)
    period = np.fft.irfft(spectrum)
    period /= np.sqrt((period**2).mean())
    return np.append(period, period[0])


def _envelope(position: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Loudness at positions in [0, 1) of a tone: an attack, a slow decay and a release."""
    attack, release = rng.uniform(0.02, 0.1), rng.uniform(0.05, 0.25)
    fading = rng.uniform(0, 0.5)                    # 0.5: by exp(-0.5) from the beginning to the end
    rise, fall = np.minimum(position / attack, 1), np.minimum((1 - position) / release, 1)
    # Both ends are smooth: 3 x^2 - 2 x^3 has no slope at 0 and 1.
    return np.exp(-fading * position) * (rise * rise * (3 - 2 * rise)) * (fall * fall * (3 - 2 * fall))


class _Place(NamedTuple):
    """When a tone sounds, as shares of the window."""
    start: float
    duration: float


def _places(rng: np.random.Generator, count: int) -> list[_Place]:
    """Random times of one tone, or of two with a pause between them. In a window of 1.024 s a tone lasts 0.3
    to 1 s, one of two at most 0.4 s, and all is over after 1 s."""
    if count == 1:
        duration = rng.uniform(0.3, 1)
        start = rng.uniform(0, min(0.2, 1 - duration))
        return [_Place(start / 1.024, duration / 1.024)]
    places = []
    start = rng.uniform(0, 0.06)
    for _ in range(count):
        duration = rng.uniform(0.3, 0.4)
        places.append(_Place(start / 1.024, duration / 1.024))
        start += duration + rng.uniform(0.08, 0.14)
    return places


def check_window(length: int, rate: int) -> None:
    """Raises ValueError where a window of `length` samples at `rate` a second does not hold the pitches."""
    highest, lowest = max(PITCHES.values()), min(PITCHES.values())
    least = math.ceil(3 * highest * (1 + DETUNED) / BAND)      # the third partial sets a square apart
    if rate < least:
        raise ValueError(f"a rate of {rate} samples a second: the timbres of the highest tones, of "
                         f"{highest:.0f} Hz, need at least {least}")
    least = math.ceil(4 * rate / lowest * 1.024 / 0.3)         # four periods in the shortest tone
    if length < least:
        raise ValueError(f"a sound of {length} samples at {rate} a second: the shortest of the lowest tones, "
                         f"of {lowest:.0f} Hz, need at least {least}")


def _draw(tones: tuple[Tone, ...], rng: np.random.Generator, length: int, rate: int) -> np.ndarray:
    check_window(length, rate)
    places = _places(rng, len(tones))               # drawn first: `seconds_of_tone` needs nothing else
    sound = np.zeros(length)
    for tone, (start, duration) in zip(tones, places):
        pitch = PITCHES[tone.pitch] * (1 + rng.uniform(-DETUNED, DETUNED))
        phase, loudness = rng.random(), rng.uniform(*LOUDNESS)
        samples = np.arange(math.ceil(start * length), math.floor((start + duration) * length))
        period = _period(tone.timbre, int(BAND * rate / pitch))
        turns = samples * (pitch / rate) + phase
        point = (turns - np.floor(turns)) * (len(period) - 1)
        before = point.astype(np.intp)              # the value lies between two points, interpolated linearly
        value = period[before] + (point - before) * np.diff(period)[before]
        position = (samples / length - start) / duration
        sound[samples[0]:samples[-1] + 1] = loudness * _envelope(position, rng) * value
    # A faint hiss, as every recording has, until all is over.
    end = round((start + duration) * length)
    sound[:end] += rng.uniform(0, 0.002) * rng.standard_normal(end, np.float32)
    return np.round(sound * 32767).astype(np.int16)


def draw_class(label: int, index: int, length: int = LENGTH, rate: int = RATE) -> np.ndarray:
    """int16 (length,), a tone of class `label`. The index determines everything else: exact pitch, phase,
    loudness, attack, decay, times and hiss. Raises ValueError where the window does not hold it."""
    return _draw((ALL_TONES[label],), np.random.default_rng([51, index]), length, rate)


def draw_tone(index: int, length: int = LENGTH, rate: int = RATE) -> np.ndarray:
    """Sound `index`, int16 (length,), of class index % 24 = pitch * 4 + timbre."""
    return draw_class(index % len(TONE_CLASSES), index, length, rate)


def seconds_of_tone(index: int, length: int = LENGTH, rate: int = RATE) -> float:
    """How long sound `index` is, of whichever class: from then on it is silent."""
    return _end(_places(np.random.default_rng([51, index]), 1), length, rate)


def _end(places: list[_Place], length: int, rate: int) -> float:
    start, duration = places[-1]
    return round((start + duration) * length) / rate


# ---- events: one or two tones, with a caption

@dataclass(frozen=True)
class Events:
    tones: tuple[Tone, ...]         # in order of time

    @property
    def unseen(self) -> bool:
        """Whether one of them is a tone that training never contains."""
        return any(tone in UNSEEN_TONES for tone in self.tones)

    @property
    def caption(self) -> str:
        first, *others = [f"a {tone.pitch} {tone.timbre}" for tone in self.tones]
        return ", then ".join([f"{first} tone", *others])


def describe_events(index: int, count: int | None = None, unseen: bool = False) -> Events:
    """Events `index`, `count` tones (default: one or two). unseen: whether one of them is a tone that
    training never contains."""
    rng = np.random.default_rng([52, index])
    while True:                                      # draws until they are of the kind asked for
        number = count or int(rng.integers(1, 3))
        events = Events(tuple(ALL_TONES[i] for i in rng.integers(len(ALL_TONES), size=number)))
        if events.unseen == unseen:
            return events


def draw_events(events: Events, index: int, length: int = LENGTH, rate: int = RATE) -> np.ndarray:
    """int16 (length,), one or two tones. The index determines everything that the events do not name."""
    return _draw(events.tones, np.random.default_rng([53, index]), length, rate)


def seconds_of_events(events: Events, index: int, length: int = LENGTH, rate: int = RATE) -> float:
    """How long they are together: from then on there is silence."""
    return _end(_places(np.random.default_rng([53, index]), len(events.tones)), length, rate)


def omit_details(caption: str, rng: np.random.Generator) -> str:
    """The caption of events with each detail (pitch, timbre) omitted one time in seven. A model thus learns
    each word separately, not only in combinations from training."""
    names = []
    for pitch, timbre in parse_caption(caption):
        words = [word for word in (pitch, timbre) if word and rng.random() >= 1 / 7]
        # The first is always called a tone, another only where there is no other word for it.
        if not names or not set(words) & set(TIMBRES):
            words.append("tone")
        names.append(" ".join(["a", *words]))
    return ", then ".join(names)


def parse_caption(caption: str) -> list[tuple[str | None, str | None]]:
    """The pitch and the timbre of each event that a caption names, None where it names none. Raises
    ValueError for words that `Events.caption` and `omit_details` do not use."""
    found = []
    for name in caption.split(", then "):
        match = re.fullmatch(rf"a(?: ({'|'.join(PITCHES)}))?(?: ({'|'.join(TIMBRES)}))?( tone)?", name)
        if match is None or not (match[2] or match[3]):
            raise ValueError(f"caption {caption!r}: not of the form \"a low square tone, then a high sine\", "
                             f"with {', '.join(PITCHES)} and {', '.join(TIMBRES)}")
        found.append((match[1], match[2]))
    return found


# ---- read back

def read_events(sound: np.ndarray, rate: int = RATE) -> list[Tone | None]:
    """The tones of a sound (T,), int16 or float in [-1, 1], in order of time; None for whatever sounds but is
    none of them. Exact for windows of at least half a second by `draw_tone` and `draw_events`."""
    if sound.ndim != 1:
        raise ValueError(f"a sound of shape {sound.shape}: must be (T,), one channel")
    if np.issubdtype(sound.dtype, np.integer):
        sound = sound / 32768
    sound = sound.astype(np.float64)
    return [_read_part(sound[part], rate) for part in _parts(sound, rate)]


def read_tone(sound: np.ndarray, rate: int = RATE) -> Tone | None:
    """The tone of a sound; None for silence, for more than one tone, and for anything else."""
    found = read_events(sound, rate)
    return found[0] if len(found) == 1 else None


def follows(caption: str, sound: np.ndarray, rate: int = RATE) -> bool:
    """Whether a sound has the events of its caption, in their order and no others. What the caption leaves
    out may be anything."""
    asked, found = parse_caption(caption), read_events(sound, rate)
    if len(asked) != len(found) or None in found:
        return False
    return all(word in (None, heard) for words, tone in zip(asked, found) for word, heard in zip(words, tone))


def _parts(sound: np.ndarray, rate: int) -> list[slice]:
    """Where something sounds, between pauses."""
    width = round(0.016 * rate)                     # over one and a half periods of the lowest tone
    if len(sound) <= width or not np.isfinite(sound).all():     # NaN, of a model that has diverged
        return []
    total = np.cumsum(np.pad(sound**2, (width // 2 + 1, width - width // 2 - 1)))
    loudness = np.sqrt(np.maximum(total[width:] - total[:-width], 0) / width)
    if loudness.max() < 0.01:
        return []
    # An autoencoder leaves a rest of noise where there was silence, far below the tones.
    edges = np.flatnonzero(np.diff(loudness > 0.2 * loudness.max(), prepend=False, append=False))
    parts = []
    for start, end in edges.reshape(-1, 2).tolist():
        if parts and start - parts[-1].stop < 0.03 * rate:     # a ripple, not a pause
            parts[-1] = slice(parts[-1].start, end)
        else:
            parts.append(slice(start, end))
    return [part for part in parts if part.stop - part.start > 0.04 * rate]        # others are clicks


def _read_part(sound: np.ndarray, rate: int) -> Tone | None:
    """The tone that a part of a sound consists of. The strongest partial is the first in all timbres, which
    differ in the strength of the second and the third."""
    frame = min(len(sound), round(0.128 * rate))
    frames = np.lib.stride_tricks.sliding_window_view(sound, frame)[::frame // 2]
    size = 4 * 2 ** math.ceil(math.log2(frame))
    powers = np.abs(np.fft.rfft(frames * np.hanning(frame), size)) ** 2            # (frames, bins)
    frequency = np.arange(size // 2 + 1) * (rate / size)
    powers[:, frequency < 40] = 0                   # an offset is not heard
    power = powers.sum(0)
    peak = int(power.argmax())
    if not 1 <= peak < len(power) - 1:
        return None
    # the vertex of the parabola through the logarithms around the peak
    left, middle, right = np.log(power[peak - 1:peak + 2] + 1e-30).tolist()
    first = (peak + 0.5 * (left - right) / (left - 2 * middle + right)) * rate / size
    pitch = min(PITCHES, key=lambda name: abs(math.log(PITCHES[name] / first)))
    if abs(first / PITCHES[pitch] - 1) > 3 * DETUNED:
        return None

    # Each bin belongs to the partial whose main lobe, of the Hann window, it lies in, or to none.
    number = np.round(frequency / first).astype(int)
    inside = (number > 0) & (np.abs(frequency - number * first) <= 2 * rate / frame)
    shares, loudness = powers[:, inside].sum(1), powers.sum(1)
    loud = loudness > 0.25 * loudness.max()         # in others the noise counts for more
    # The rest is noise, or a second tone, which may last for some of the time only.
    if shares.sum() < 0.9 * loudness.sum() or (shares < 0.8 * loudness)[loud].any():
        return None
    energy = np.bincount(number[inside], power[inside])[1:]
    strength = np.sqrt(energy[:max(4, min(8, int(BAND * rate / first)))] / energy[0])
    timbre = _timbre(*strength[1:3])
    expected = np.abs(partials(timbre, len(strength)))
    similarity = strength @ expected / np.linalg.norm(strength) / np.linalg.norm(expected)
    return Tone(pitch, timbre) if similarity > 0.97 else None


def _timbre(second: float, third: float) -> str:
    """The timbre with these amplitudes of partials 2 and 3, relative to the first: (1/2, 1/3) of a sawtooth,
    (0, 1/3) of a square, (0.7, 0) of an organ, (0, 0) of a sine."""
    if third > 0.15:                                # not quite in the middle, as whatever is lost of a
        return "sawtooth" if second > 0.2 else "square"         # partial makes it weaker
    return "organ" if second > 0.3 else "sine"


# ---- pairs: a shape and a tone

PITCH_OF = {"red": "deep", "green": "low", "blue": "middle", "yellow": "high", "magenta": "shrill",
            "cyan": "piercing"}
TIMBRE_OF = {"circle": "sine", "square": "square", "triangle": "organ", "cross": "sawtooth"}


def tone_of(colour: str, kind: str) -> int:
    """The class of the tone that belongs to a shape of toys.py, one to one: the pitch follows from the
    colour, the timbre from the kind, and the class has the number of the shape's."""
    return Tone(PITCH_OF[colour], TIMBRE_OF[kind]).label


# ---- demonstration

def demo() -> None:
    """Draw tones and pairs of tones, read them back, and write one of each class to tones.wav."""
    sounds = [draw_tone(i) for i in range(240)]
    right = sum(read_tone(sound) == ALL_TONES[i % 24] for i, sound in enumerate(sounds))
    print(f"{right} of {len(sounds)} tones read back as drawn")
    for i in range(4):
        events = describe_events(i)
        found = [" ".join(tone) for tone in read_events(draw_events(events, i))]
        print(f"  {events.caption}: {seconds_of_events(events, i):.2f} s, read as {found}")
    pairs = [describe_events(i, count=2) for i in range(240)]
    right = sum(follows(pair.caption, draw_events(pair, i)) for i, pair in enumerate(pairs))
    print(f"{right} of {len(pairs)} pairs of tones read back as drawn")
    with wave.open("tones.wav", "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(np.concatenate(sounds[:24]).astype("<i2").tobytes())
    print("tones.wav written: one of each class")


if __name__ == "__main__":
    demo()
