"""Sound: from a file to an array, from arrays to files, and to labelled spectrograms.

    python sound.py                       # writes sound.wav and sound.png, and reads the former back

Resampling is by a windowed sinc, one filter for each phase (Smith, Digital Audio Resampling,
ccrma.stanford.edu/~jos/resample). Frequencies of spectrograms are on the mel scale (O'Shaughnessy, Speech
Communication, 1987).

Conventions: sounds are mono, int16 (N, T) as arrays and float32 (B, 1, T) in [-1, 1) for a model; `rate` is
in samples a second; 0 dB is a sine of full scale. Bad input raises ValueError with one line.
"""

from __future__ import annotations

import functools
import importlib
import io
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from files import write_atomically
from pictures import caption_font, wrap_caption, write_picture

FULL = 32768                # what 1.0 is in 16 bits
LOUDEST = (FULL - 1) / FULL             # the largest number that 16 bits hold


# ---- arrays and tensors

def to_tensor(sounds: np.ndarray) -> Tensor:
    """int16 (B, T), or (B, T, c) of c channels -> float32 (B, c, T) in [-1, 1)."""
    x = torch.from_numpy(np.asarray(sounds).astype(np.float32)).div_(FULL)
    return x.unsqueeze(1) if x.ndim == 2 else x.transpose(1, 2)


def to_int16(sounds: Tensor) -> np.ndarray:
    """(B, c, T) nominally in [-1, 1) -> int16 (B, T), or (B, T, c) of several channels. A sound that is
    louder is scaled as a whole, so that nothing is clipped."""
    x = sounds.float()
    x = x.div(_excess(x)).mul(FULL).round().short().cpu().numpy()
    return x[:, 0] if x.shape[1] == 1 else np.ascontiguousarray(x.transpose(0, 2, 1))


def _excess(x: Tensor) -> Tensor:
    """(B, 1, 1): what each sound (B, c, T) must be divided by to fit into 16 bits: 1 where it fits as it
    is."""
    if x.shape[-1] == 0:
        return x.new_ones(len(x), 1, 1)
    peak = x.abs().amax((1, 2), keepdim=True) / LOUDEST
    fits = (x.amax((1, 2), keepdim=True) <= LOUDEST) & (x.amin((1, 2), keepdim=True) >= -1)
    return torch.where(fits, 1.0, peak)


# ---- resampling

ZEROS = 64                  # zero crossings of the sinc on either side: with BETA, a stop band below -90 dB
BETA = 8.96                 # of the Kaiser window
ROLLOFF = 0.955             # of the lower Nyquist frequency: in the middle of the filter's transition
BLOCK = 2**20               # weights, or samples that are read, at a time: it bounds the memory

Read = Callable[[int, int], np.ndarray]     # samples from one number up to another, float64


class Ratio(NamedTuple):
    """Output n is at input n * down / up, a fraction in its lowest terms."""
    up: int
    down: int

    @classmethod
    def of(cls, source: int, target: int) -> Ratio:
        common = math.gcd(source, target)
        return cls(target // common, source // common)

    @property
    def half(self) -> int:
        """Input samples on either side that an output depends on."""
        return math.ceil(ZEROS * max(1.0, self.down / self.up))

    def kernels(self, phases: np.ndarray) -> np.ndarray:
        """(n, 2 half): the weights of the inputs around an output that lies phase / up after an input."""
        narrow = min(1.0, self.up / self.down)
        offsets = np.arange(1 - self.half, self.half + 1) - phases[:, None] / self.up
        window = np.clip(1 - (offsets * narrow / ZEROS) ** 2, 0, None)
        weights = np.sinc(offsets * narrow * ROLLOFF) * np.i0(BETA * np.sqrt(window))
        return weights / weights.sum(1, keepdims=True)      # a constant stays what it is


@functools.lru_cache(maxsize=8)             # a folder's sounds share a few rates
def _all_kernels(ratio: Ratio) -> np.ndarray:
    return ratio.kernels(np.arange(ratio.up))


def resample(sound: np.ndarray, source: int, target: int) -> np.ndarray:
    """float (T,) at `source` samples a second -> float32 (ceil(T * target / source),), band-limited to what
    both rates can hold."""
    count = -(-len(sound) * target // source)
    return _resampled(lambda a, b: sound[a:b], len(sound), source, target, 0, count)


def _resampled(read: Read, frames: int, source: int, target: int, first: int, count: int) -> np.ndarray:
    """(count,) float32: the outputs from number `first` on, of a sound of so many frames, of which only what
    they depend on is read, block by block."""
    out = np.zeros(count, np.float32)
    if source == target:
        for start in range(0, count, BLOCK):
            end = min(start + BLOCK, count)
            out[start:end] = read(first + start, first + end)
        return out
    ratio = Ratio.of(source, target)
    block = max(1, BLOCK // (2 * ratio.half))
    small = ratio.up * 2 * ratio.half <= BLOCK
    for start in range(0, count, block):
        numbers = np.arange(first + start, first + min(start + block, count))
        nearest, phases = np.divmod(numbers * ratio.down, ratio.up)
        low, high = int(nearest[0]) - ratio.half + 1, int(nearest[-1]) + ratio.half + 1
        inputs = np.zeros(high - low)                       # silence before the sound and after it
        begin, end = max(low, 0), min(high, frames)
        if begin < end:
            inputs[begin - low:end - low] = read(begin, end)
        windows = np.lib.stride_tricks.sliding_window_view(inputs, 2 * ratio.half)[nearest - nearest[0]]
        weights = _all_kernels(ratio)[phases] if small else ratio.kernels(phases)
        out[start:start + len(numbers)] = np.einsum("nk,nk->n", windows, weights)
    return out


# ---- reading a file

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE       # codecs of a WAV file
RATES = (100, 1_000_000)
CHANNELS = 256
MOST = 2**27                # samples that are read at once
ENDLESS = 0x7FFF0000        # sizes from here on are those of programs that do not know them in advance
# Marks at the start of files that the package soundfile reads. MP3 without a header begins with 11 set bits.
BY_PACKAGE = {b"fLaC": "FLAC", b"OggS": "Ogg", b"ID3": "MP3"}


class Wav:
    """An open WAV file of PCM in 8 to 32 bits, or of floats in 32 or 64, of which only the header is read."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        form = None
        end = file.seek(0, os.SEEK_END)
        position, large = 12, None
        for _ in range(1000):
            file.seek(position)
            head = file.read(8)
            if len(head) < 8:
                break
            name, size = struct.unpack("<4sI", head)
            if name == b"fmt ":
                form = file.read(min(size, 40))
            elif name == b"ds64":           # of files above 4 GiB: the size of RIFF, and that of the data
                large = struct.unpack("<8xQ", file.read(16).ljust(16, b"\0"))[0]
            elif name == b"data":
                self._check_format(form)
                self.start = position + 8
                self._measure(large if size == 0xFFFFFFFF and large else size, end)
                return
            position += 8 + size + size % 2
        raise ValueError("a WAV file without samples: damaged or cut off")

    def _check_format(self, form: bytes | None) -> None:
        if form is None or len(form) < 16:
            raise ValueError("a WAV file that names no format: damaged")
        self.codec, self.channels, self.rate, _, self.step, bits = struct.unpack("<HHIIHH", form[:16])
        if self.codec == EXTENSIBLE and len(form) >= 26:
            self.codec = struct.unpack("<H", form[24:26])[0]
        self.width = self.step // max(self.channels, 1)             # bytes of a sample
        known = {PCM: (1, 2, 3, 4), FLOAT: (4, 8)}
        if self.codec not in known:
            raise ValueError(f"a WAV file of codec {self.codec}; PCM and floats are read: convert it")
        consistent = self.width * self.channels == self.step and self.width * 8 - 8 < bits <= self.width * 8
        if not consistent or self.width not in known[self.codec] or self.channels > CHANNELS:
            raise ValueError(f"a WAV file of {self.channels} channels of {bits} bits in {self.step} bytes: "
                             "damaged, or unheard of")
        if not RATES[0] <= self.rate <= RATES[1]:
            raise ValueError(f"a WAV file of {self.rate:,} samples a second: damaged")

    def _measure(self, size: int, end: int) -> None:
        there = end - self.start
        if size >= ENDLESS:
            size = min(size, there)
        if size > there:
            raise ValueError(f"cut off: {there:,} of {size:,} bytes are there")
        self.frames = size // self.step

    def read(self, first: int, end: int) -> np.ndarray:
        """Frames from one up to another, (n,) float64, the mean of all channels."""
        self.file.seek(self.start + first * self.step)
        raw = self.file.read((end - first) * self.step)
        if len(raw) < (end - first) * self.step:
            raise ValueError("cut off while it was read")
        if self.codec == FLOAT:
            values = np.frombuffer(raw, f"<f{self.width}").astype(np.float64)
        elif self.width == 1:               # the only one without a sign
            values = (np.frombuffer(raw, np.uint8) - 128.0) / 128
        elif self.width == 3:
            padded = np.zeros((len(raw) // 3, 4), np.uint8)         # below their bits, those of 32 bits
            padded[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
            values = padded.view("<i4")[:, 0] / 2.0**31
        else:
            values = np.frombuffer(raw, f"<i{self.width}") / 2.0 ** (8 * self.width - 1)
        return values.reshape(-1, self.channels).mean(1)


class Packaged:
    """An open file that the package soundfile reads, with what a Wav has."""

    def __init__(self, file: IO[bytes], kind: str):
        try:
            import soundfile
        except (ImportError, OSError):      # the latter where the package lacks its library
            raise ValueError(f"{kind} is read by the package soundfile; pip install soundfile") from None
        file.seek(0)
        try:
            self.opened = soundfile.SoundFile(file)
        except RuntimeError as error:       # soundfile's own errors are of this type
            raise ValueError(f"a damaged {kind} file ({error})") from None
        self.rate = self.opened.samplerate
        self.frames = self.opened.frames
        self.first, self.held = 0, np.zeros(0, np.float32)

    def hold(self, first: int, end: int) -> None:
        """Decode all that will be read. Not piece by piece: soundfile seeks after every piece, and in an MP3
        that is not exact, so that pieces would not fit together."""
        if (end - first) * self.opened.channels > MOST:
            raise ValueError(f"{(end - first) / self.rate / 3600:,.1f} hours long; read a part of it")
        try:
            if first > 0:
                self.opened.seek(first)
            values = self.opened.read(end - first, dtype="float32", always_2d=True)
        except RuntimeError as error:
            raise ValueError(f"damaged ({error})") from None
        if len(values) < end - first:
            raise ValueError("cut off while it was read")
        self.first, self.held = first, values.mean(1)

    def read(self, first: int, end: int) -> np.ndarray:
        return self.held[first - self.first:end - self.first]


def open_sound(file: IO[bytes]) -> Wav | Packaged:
    """The sound in a file, of which only the header is read yet: its `rate`, its `frames`, and `read`. The
    content decides, not the ending. Raises ValueError for a file that is no sound, or an empty or broken
    one."""
    start = file.read(12)
    if not start:
        raise ValueError("an empty file")
    kinds = [kind for mark, kind in BY_PACKAGE.items() if start.startswith(mark)]
    if start[:4] in (b"RIFF", b"RF64", b"BW64") and start[8:] == b"WAVE":
        sound = Wav(file)
    elif kinds:
        sound = Packaged(file, kinds[0])
    elif len(start) > 2 and start[0] == 0xFF and start[1] & 0xE0 == 0xE0 and start[1] & 6:
        sound = Packaged(file, "MP3")
    else:
        raise ValueError("neither a WAV nor a FLAC, Ogg or MP3 file")
    if sound.frames < 1:
        raise ValueError("holds no samples")
    return sound


def package_found() -> bool:
    """Whether files other than WAV can be read."""
    try:
        importlib.import_module("soundfile")
    except (ImportError, OSError):          # the latter where the package lacks its library
        return False
    return True


@contextmanager
def _file_of(path: Path | IO[bytes]) -> Iterator[IO[bytes]]:
    if not isinstance(path, (str, os.PathLike)):
        yield path
        return
    if os.path.exists(path) and not os.path.isfile(path):           # opening a pipe would wait for ever
        raise ValueError(f"{path} is a folder, pipe, socket or device")
    with open(path, "rb") as file:
        yield file


def duration(path: Path | IO[bytes]) -> float:
    """Seconds, by the header alone. Raises as open_sound."""
    with _file_of(path) as file:
        sound = open_sound(file)
        return sound.frames / sound.rate


def read_sound(path: Path | IO[bytes], rate: int, seconds: float | None = None,
               start: float = 0.0) -> np.ndarray:
    """int16 (T,): a file's sound at `rate`, its channels mixed. seconds: at most so long a part, from `start`
    (in seconds) on, and no more than that is read. Raises OSError or ValueError for a file that cannot be
    decoded or, without `seconds`, is too long for the memory."""
    with _file_of(path) as file:
        sound = open_sound(file)
        first = round(start * rate)
        count = max(0, -(-sound.frames * rate // sound.rate) - first)
        if seconds is not None:
            count = min(count, round(seconds * rate))
        if count > MOST:
            raise ValueError(f"{sound.frames / sound.rate / 3600:,.1f} hours long; read a part of it")
        if isinstance(sound, Packaged) and count:
            margin = Ratio.of(sound.rate, rate).half + 1
            sound.hold(max(0, first * sound.rate // rate - margin),
                       min(sound.frames, (first + count) * sound.rate // rate + margin))
        with np.errstate(invalid="ignore", over="ignore"):          # of floats that are no numbers: see below
            values = _resampled(sound.read, sound.frames, sound.rate, rate, first, count)
    if not np.isfinite(values).all():
        raise ValueError("holds values that are no numbers")
    return to_int16(torch.from_numpy(values)[None, None])[0]


# ---- writing a file

def write_wav(out: Path | IO[bytes], sound: np.ndarray | Tensor, rate: int, sync: bool = True) -> None:
    """A WAV file of 16 bits. sound: int16 (T,), or (T, c) of several channels; or floats (T,) or (c, T),
    scaled where they are too loud as to_int16 does. sync: see files.replacing."""
    if isinstance(out, (str, os.PathLike)):
        write_atomically(Path(out), lambda file: write_wav(file, sound, rate), sync)
        return
    if isinstance(sound, np.ndarray) and sound.dtype == np.int16:
        samples = sound
    else:
        values = torch.as_tensor(sound)
        values = values[None, None] if values.ndim == 1 else values[None]
        if not values.is_floating_point():
            raise ValueError(f"a sound of type {values.dtype}; give int16 or floats")
        if not values.isfinite().all():
            raise ValueError("a sound with values that are no numbers")
        samples = to_int16(values)[0]
    raw = samples.astype("<i2").tobytes()
    if len(raw) > 2**32 - 64:
        raise ValueError(f"{len(samples):,} samples are more than a WAV file holds; write several")
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    form = struct.pack("<HHIIHH", PCM, channels, rate, 2 * channels * rate, 2 * channels, 16)
    out.write(struct.pack("<4sI8sI", b"RIFF", 36 + len(raw), b"WAVEfmt ", len(form)) + form)
    out.write(struct.pack("<4sI", b"data", len(raw)) + raw)


# ---- spectra

def mel_of(hertz):
    """Numbers or arrays of them, in hertz, on the mel scale."""
    return 2595 * np.log10(1 + np.asarray(hertz) / 700)


def hertz_of(mel):
    return 700 * (10 ** (np.asarray(mel) / 2595) - 1)


def mel_filters(bands: int, bins: int, rate: int, low: float = 0.0, high: float | None = None) -> np.ndarray:
    """(bands, bins) float64: triangles, whose corners are equally far apart on the mel scale between `low`
    and `high` Hz, by default half of the rate. bins: of the spectrum, from 0 to half of the rate. Between the
    first and the last centre, all bands of a bin add up to 1."""
    corners = hertz_of(np.linspace(mel_of(low), mel_of(high or rate / 2), bands + 2))
    hertz = np.linspace(0, rate / 2, bins)
    rising = (hertz - corners[:-2, None]) / np.diff(corners)[:-1, None]
    falling = (corners[2:, None] - hertz) / np.diff(corners)[1:, None]
    return np.clip(np.minimum(rising, falling), 0, None)


@functools.lru_cache(maxsize=8)
def _filters(bands: int, bins: int, rate: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):       # where training may use it too
        return torch.from_numpy(mel_filters(bands, bins, rate)).float().to(device)


def log_mel(x: Tensor, rate: int, bands: int = 64, window: float = 0.032, hop: float = 0.008,
            floor: float = -100.0) -> Tensor:
    """float (B, T) -> (B, bands, frames) in dB, at least `floor`: the power in each band of mel_filters.
    Frame i is centred at sample i * round(hop * rate), and there are 1 + T // round(hop * rate) of them.
    window: seconds of the Hann window. The bands of a frame add up to twice the mean square of the windowed
    sound (Parseval), apart from what lies below the first centre or above the last: a sine of full scale has
    0 dB in all."""
    length, step = max(2, round(window * rate)), max(1, round(hop * rate))
    size = 2 ** math.ceil(math.log2(4 * length))            # zeros around, for bands that are narrower
    hann = torch.hann_window(length, device=x.device)
    spectrum = torch.stft(x.float(), size, step, length, hann, center=True, pad_mode="constant",
                          return_complex=True)              # (B, bins, frames)
    # 2 for the negative frequencies, and 2 because a sine's mean square is 1/2
    power = spectrum.abs().square() * (4 / (size * hann.square().sum()))
    mel = _filters(bands, power.shape[1], rate, x.device) @ power
    return 10 * mel.clamp_min(10 ** (floor / 10)).log10()


# ---- a grid of spectrograms, with captions

CELL = (240, 120)           # width and height in pixels of one
RANGE = 70                  # dB from the darkest colour to the lightest
LINE = 13                   # pixels from a line of text to the next


@functools.cache
def colours() -> np.ndarray:
    """uint8 (256, 3): a colour map from black through blue, purple and orange to pale yellow. Its lightness
    in OKLab (Ottosson, bottosson.github.io/posts/oklab) rises evenly, so that order and distances are kept
    for any colour vision, and in grey."""
    x = np.linspace(0, 1, 256)
    lightness = 0.12 + 0.85 * x
    hue = np.radians(np.interp(x, [0, 0.25, 0.5, 0.75, 1], [-95, -60, 5, 55, 105]))
    chroma = np.interp(x, [0, 0.2, 0.45, 0.7, 0.9, 1], [0.03, 0.12, 0.165, 0.15, 0.12, 0.07])
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    cones = np.stack([lightness + 0.3963377774 * a + 0.2158037573 * b,
                      lightness - 0.1055613458 * a - 0.0638541728 * b,
                      lightness - 0.0894841775 * a - 1.2914855480 * b], -1) ** 3
    linear = cones @ np.array([[4.0767416621, -1.2684380046, -0.0041960863],
                               [-3.3077115913, 2.6097574011, -0.7034186147],
                               [0.2309699292, -0.3413193965, 1.7076147010]])
    linear = linear.clip(0, 1)
    curved = np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(255 * curved).astype(np.uint8)


def spectrograms(sounds: np.ndarray, rate: int, columns: int | None = None,
                 captions: Sequence[str] | None = None,
                 seconds: Sequence[float] | None = None) -> Image.Image:
    """int16 (N, T), or (N, T, c), whose channels are mixed -> one picture of log-mel spectrograms, row by
    row, on white, with axes in Hz and seconds. All have the same colours: the loudest band of all is the
    lightest. seconds: where each sound ends; what follows is grey."""
    width, height = CELL
    n, length = sounds.shape[:2]
    columns = columns or math.ceil(math.sqrt(n))
    rows = -(-n // columns)
    lines = [wrap_caption(caption, width // 6) for caption in captions or [""] * n]
    strip = LINE * max(map(len, lines)) + 2
    left, top, gap = 54, 8, 12
    down = height + LINE + 6 + strip + 6                    # from one row to the next
    canvas = Image.new("RGB", (left + columns * (width + gap) + 44, top + rows * down), "white")
    pen = ImageDraw.Draw(canvas)
    some = max(1, 2**19 // length)          # at a time, which bounds the memory
    levels = np.concatenate([_levels(sounds[i:i + some], rate) for i in range(0, n, some)])
    loudest = 5 * math.ceil(max(levels.max(), RANGE - 100) / 5)     # where all is silent, it is dark
    shades = np.clip((levels - loudest) / RANGE + 1, 0, 1) * 255
    for i in range(n):
        x, y = left + i % columns * (width + gap), top + i // columns * down
        cell = Image.fromarray(colours()[np.round(shades[i, ::-1]).astype(int)])
        canvas.paste(cell.resize(CELL, Image.Resampling.BILINEAR), (x, y))
        if seconds is not None and seconds[i] * rate < length:
            end = x + min(width - 1, round(width * seconds[i] * rate / length))
            pen.rectangle((end, y, x + width - 1, y + height - 1), fill="#dddddd")
        _axes(pen, x, y, rate, length, hertz=i % columns == 0)
        for number, line in enumerate(lines[i]):
            pen.text((x, y + height + LINE + 6 + LINE * number), line, "black", caption_font(line))
    _legend(canvas, left + columns * (width + gap), top, loudest)
    return canvas


def _levels(sounds: np.ndarray, rate: int) -> np.ndarray:
    """(N, bands, frames) in dB, with about as many of either as a cell has pixels."""
    hop = max(1, -(-sounds.shape[1] // CELL[0])) / rate
    parts = min(max(1, round(hop / 0.016)), 16)             # frames to a pixel, whose power is averaged
    levels = log_mel(to_tensor(sounds).mean(1), rate, CELL[1], max(0.032, 2 * hop / parts), hop / parts)
    if parts > 1:
        levels = 10 * torch.nn.functional.avg_pool1d(10 ** (levels / 10), parts, ceil_mode=True).log10()
    return levels.numpy()


def _step(whole: float, most: int) -> float:
    """The smallest of 1, 2, 5, 10, ... times a power of ten that divides `whole` into at most so many."""
    power = 10.0 ** math.floor(math.log10(whole / most))
    return next(step * power for step in (1, 2, 5, 10) if whole <= step * power * most * (1 + 1e-9))


def _axes(pen: ImageDraw.ImageDraw, x: int, y: int, rate: int, length: int, hertz: bool) -> None:
    """Ticks of the cell at (x, y) and their numbers: seconds below and, if asked for, hertz on the left."""
    width, height = CELL
    whole = length / rate
    step = _step(whole, 5)
    for number in range(int(whole / step + 1e-9) + 1):
        at = x + round(number * step / whole * (width - 1))
        pen.line((at, y + height, at, y + height + 2), "black")
        text = f"{number * step:g}"
        if number == 0:
            text += " s"
        shift = 0 if number == 0 else -pen.textlength(text, caption_font(text)) / 2
        pen.text((at + shift, y + height + 3), text, "#444444", caption_font(text))
    highest = mel_of(rate / 2)
    ticks = [tick for tick in (250, 500, 1000, 2000, 4000, 8000, 16000, 32000) if tick < 0.9 * rate / 2]
    ticks = ticks[-4:]
    for tick in (0, *ticks, rate // 2):
        at = y + round((1 - mel_of(tick) / highest) * (height - 1))
        pen.line((x - 3, at, x - 1, at), "black")
        if hertz:
            text = f"{tick} Hz" if tick == rate // 2 else str(tick)
            shift = pen.textlength(text, caption_font(text))
            pen.text((x - 5 - shift, at - 7), text, "#444444", caption_font(text))


def _legend(canvas: Image.Image, x: int, y: int, loudest: int) -> None:
    """What the colours mean, right of the first row."""
    height = CELL[1]
    bar = colours()[np.linspace(255, 0, height).round().astype(int)][:, None].repeat(8, 1)
    canvas.paste(Image.fromarray(bar), (x, y))
    pen = ImageDraw.Draw(canvas)
    for below in range(0, RANGE, 20):
        text = f"{loudest - below} dB" if below == 0 else str(loudest - below)
        at = y + round(below / RANGE * (height - 1))
        pen.text((x + 11, min(at, y + height - 8) - 6), text, "#444444", caption_font(text))


def demo() -> None:
    """Write a second of a rising tone as a WAV file at 44,100 Hz, read it back at 8,000 Hz, and draw both."""
    time = np.arange(44_100) / 44_100
    tone = np.sin(2 * np.pi * (200 * time + 1400 * time**2))            # from 200 to 3,000 Hz
    write_wav(Path("sound.wav"), 1.5 * tone * np.minimum(1, 20 * (1 - time)), 44_100)
    again = read_sound(Path("sound.wav"), 8000)
    time = np.arange(8000) / 8000
    wanted = np.sin(2 * np.pi * (200 * time + 1400 * time**2)) * np.minimum(1, 20 * (1 - time))
    off = np.abs(again / FULL - wanted)[200:-200].max()
    write_picture(Path("sound.png"), spectrograms(np.stack([again, again[::-1]]), 8000, 2,
                                                  ["a rising tone", "the same backwards"]))
    memory = io.BytesIO()
    write_wav(memory, again, 8000)
    memory.seek(0)
    same = int((read_sound(memory, 8000) == again).sum())
    print(f"sound.wav: read at 8,000 Hz, at most {off:.4f} off; of 8000 samples {same} read back; sound.png")


if __name__ == "__main__":
    demo()
