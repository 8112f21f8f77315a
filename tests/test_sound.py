"""sound.py: files of every kind to arrays, resampling, writing without clipping, spectra and spectrograms."""

import io
import math
import os
import struct
import sys
import types
import wave

import numpy as np
import pytest
import torch
from PIL import Image

import sound
from sound import (colours, hertz_of, log_mel, mel_filters, mel_of, open_sound, read_sound, resample,
                   spectrograms, to_int16, to_tensor, write_wav)


def sine(hertz, rate, seconds=0.5, amplitude=0.5, phase=0.3):
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate + phase)


def wav(values, rate=8000, codec=1, bits=16, extensible=False, chunks=(), size=None, **fields):
    """The bytes of a WAV file of (T,) or (T, channels) values in [-1, 1), packed here independently of what
    is tested. chunks: names and contents that stand before the samples; size: what the header claims."""
    values = np.asarray(values, np.float64)
    values = values.reshape(len(values), -1 if values.size else 1)
    width = bits // 8
    if codec == 3:
        raw = values.astype(f"<f{width}").tobytes()
    elif width == 1:
        raw = bytes(int(round(value * 128)) + 128 for value in values.ravel())
    else:
        whole = [int(round(value * 2 ** (bits - 1))) for value in values.ravel()]
        raw = b"".join(number.to_bytes(width, "little", signed=True) for number in whole)
    channels, step = values.shape[1], values.shape[1] * width
    form = struct.pack("<HHIIHH", fields.get("codec_word", 0xFFFE if extensible else codec),
                       fields.get("channels", channels), rate, rate * step % 2**32,
                       fields.get("step", step), bits)
    if extensible:
        guid = struct.pack("<H", codec) + bytes.fromhex("000000001000800000aa00389b71")
        form += struct.pack("<HHI", 22, bits, 4) + guid
    parts = [(b"fmt ", form, None), *((name, content, None) for name, content in chunks)]
    body = b""
    for name, content, claimed in (*parts, (b"data", raw, size)):
        body += name + struct.pack("<I", len(content) if claimed is None else claimed) + content
        body += b"\0" * (len(content) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def read(content, rate=8000, **options):
    return read_sound(io.BytesIO(content), rate, **options)


# ---- arrays and tensors

def test_int16_round_trip():
    every = np.arange(-32768, 32768, dtype=np.int16).reshape(16, -1)
    x = to_tensor(every)
    assert x.shape == (16, 1, 4096) and x.dtype == torch.float32
    assert x.min() == -1 and x.max() == 32767 / 32768
    assert (to_int16(x) == every).all() and to_int16(x).dtype == np.int16


def test_a_loud_sound_is_scaled_as_a_whole_and_only_it():
    x = torch.tensor([[[0.5, -3.0, 1.5]], [[0.5, -1.0, 0.25]], [[1.0, 0.5, 0.0]], [[0.0, 0.0, 0.0]]])
    found = to_int16(x)
    assert found[0].tolist() == [5461, -32767, 16384]                   # of 1/6, -1 and 1/2 of 32767
    assert found[1].tolist() == [16384, -32768, 8192]
    assert found[2].tolist() == [32767, 16384, 0] and not found[3].any()
    assert to_int16(torch.zeros(2, 1, 0)).shape == (2, 0)


# ---- resampling

@pytest.mark.parametrize("source, target", [(8000, 16000), (16000, 8000), (44100, 8000), (22050, 8000),
                                            (8000, 44100), (48000, 44100), (11025, 8000), (8001, 8000)])
def test_a_sine_keeps_amplitude_and_phase(source, target):
    for hertz in (0, 100, 0.4 * min(source, target)):
        found = resample(sine(hertz, source, phase=0.7), source, target)
        assert found.dtype == np.float32 and len(found) == math.ceil(round(source / 2) * target / source)
        want = sine(hertz, target, len(found) / target, phase=0.7)
        edge = 100 * target // min(source, target)                      # where silence around is heard
        assert np.abs(found - want)[edge:-edge].max() < 5e-5, hertz


@pytest.mark.parametrize("source, target", [(16000, 8000), (44100, 8000), (48000, 44100), (22050, 8000)])
def test_a_sine_above_half_of_the_rate_vanishes(source, target):
    for hertz in (0.5 * target, 0.5 * target + 0.4 * (source - target) / 2, 0.49 * source):
        found = resample(sine(hertz, source, amplitude=1.0), source, target)
        assert np.abs(found[100:-100]).max() < 1e-4, hertz              # -80 dB


def test_an_impulse_is_the_band_limited_one():
    """It stays at its place, and its samples add up to the ratio of the rates."""
    impulse = np.zeros(4410)
    impulse[2205] = 1.0
    found = resample(impulse, 44100, 8000)
    assert found.argmax() == 400 and abs(found.sum() - 8000 / 44100) < 1e-5
    assert np.allclose(found[400 - 90:400], found[401:400 + 91][::-1], atol=1e-6)


def test_resampling_in_blocks_and_parts_gives_the_same(monkeypatch):
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 9000)
    content = wav(noise, 22050, 3, 64)
    for rate in (8000, 22050):
        whole = read(content, rate)
        assert len(whole) == math.ceil(9000 * rate / 22050)
        part = read(content, rate, seconds=0.05, start=0.1)
        assert (part == whole[round(0.1 * rate):][:round(0.05 * rate)]).all()
        assert (read(content, rate, seconds=9.0, start=0.3) == whole[round(0.3 * rate):]).all()
        assert read(content, rate, seconds=1.0, start=5.0).shape == (0,)
        monkeypatch.setattr(sound, "BLOCK", 1500)
        assert (read(content, rate) == whole).all()
        monkeypatch.undo()


# ---- reading a file

@pytest.mark.parametrize("codec, bits", [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
@pytest.mark.parametrize("extensible", [False, True])
def test_every_width(codec, bits, extensible):
    values = np.array([0.0, 0.5, -0.5, 0.25, -1.0, 0.75, 1 / 128, -1 / 128, 0.125])
    content = wav(values, codec=codec, bits=bits, extensible=extensible, chunks=[(b"LIST", b"odd")])
    assert read(content).tolist() == (values * 32768).astype(int).tolist()
    stereo = np.stack([values, np.roll(values, 1), np.zeros(9)], 1)
    want = np.round(stereo.mean(1) * 32768).astype(int)
    assert read(wav(stereo, codec=codec, bits=bits, extensible=extensible)).tolist() == want.tolist()


def test_fine_samples_are_rounded_not_cut():
    assert read(wav([(1000 + 0.75) / 32768, -(1000 + 0.75) / 32768], bits=24)).tolist() == [1001, -1001]


def test_loud_floats_are_scaled_not_clipped():
    assert read(wav([0.5, 2.0, -1.0], codec=3, bits=32)).tolist() == [8192, 32767, -16384]


def test_it_reads_what_python_writes(tmp_path):
    values = np.random.default_rng(0).integers(-32768, 32768, 5000).astype(np.int16)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(values.astype("<i2").tobytes())
    assert (read_sound(tmp_path / "a.wav", 8000) == values).all()


@pytest.mark.parametrize("claimed", [0x7FFFF000, 0xFFFFFFFF])
def test_sizes_of_streams_are_not_believed(claimed):
    """As espeak-ng and ffmpeg write them where they cannot go back to the header."""
    assert read(wav([0.5, 0.25], size=claimed)).tolist() == [16384, 8192]


def test_the_size_of_large_files():
    """RF64, of more than 4 GiB: what follows the samples is none of them."""
    large = (b"ds64", struct.pack("<QQQI", 0, 4, 0, 0))
    content = wav([0.5, 0.25], size=0xFFFFFFFF, chunks=[large]) + b"LIST" + struct.pack("<I", 4) + b"xxxx"
    assert read(b"RF64" + content[4:]).tolist() == [16384, 8192]


GOOD = wav(np.full(100, 0.5))


@pytest.mark.parametrize("content, message", [
    (b"", "an empty file"), (b"RI", "neither a WAV nor a FLAC, Ogg or MP3 file"),
    (b"\x89PNG\r\n\x1a\n" + bytes(99), "neither a WAV nor a FLAC, Ogg or MP3 file"),
    (b"words, no sound", "neither a WAV"), (bytes(1000), "neither a WAV"),
    (GOOD[:12], "without samples: damaged or cut off"), (GOOD[:30], "without samples"),
    (GOOD[:-1], "cut off: 199 of 200 bytes are there"), (GOOD[:44], "cut off: 0 of 200 bytes are there"),
    (GOOD[:12] + GOOD[36:], "names no format"), (wav([]), "holds no samples"),
    (wav([0.5], codec_word=7), "of codec 7; PCM and floats are read: convert it"),
    (wav([0.5], rate=0), "of 0 samples a second"), (wav([0.5], rate=2**31), "samples a second: damaged"),
    (wav([0.5], channels=0), "damaged, or unheard of"), (wav([0.5], channels=2), "damaged, or unheard of"),
    (wav([0.5], step=0), "damaged, or unheard of"), (wav([0.5], codec_word=3), "damaged, or unheard of"),
    (wav(np.zeros((1, 300))), "300 channels"), (GOOD[:36] + b"junk" + bytes(40_000), "without samples"),
    (wav([0.5, np.nan], codec=3, bits=32), "values that are no numbers"),
    (wav([0.5, np.inf], codec=3, bits=64, rate=22050), "values that are no numbers")])
def test_bad_files_are_one_line(content, message):
    with pytest.raises(ValueError) as error:
        read(content)
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


def test_no_byte_of_a_header_stops_the_program():
    """Every byte of it in turn with other values: read, or one line."""
    content = wav(np.full(20, 0.5), 22050)
    for place in range(44):
        for value in (0, 1, 2, 127, 255):
            damaged = bytearray(content)
            damaged[place] = value
            try:
                assert read(bytes(damaged), seconds=0.01).dtype == np.int16
            except ValueError as error:
                assert len(str(error).splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="no such files")
def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    with pytest.raises(ValueError, match="a.wav is a folder, pipe, socket or device"):
        read_sound(tmp_path / "a.wav", 8000)
    with pytest.raises(FileNotFoundError):
        read_sound(tmp_path / "b.wav", 8000)


class Counted(io.BytesIO):
    """It counts the bytes that are read."""
    total = 0

    def read(self, size=-1):
        found = super().read(size)
        self.total += len(found)
        return found


def test_no_more_is_read_than_is_needed(tmp_path):
    for rate in (8000, 44100):
        file = Counted(wav(np.zeros(120_000), rate))
        assert len(read_sound(file, 8000, seconds=0.5, start=1.0)) == 4000
        assert file.total < 1.2 * rate + 4000            # of 240,000
    path = tmp_path / "long.wav"
    path.write_bytes(wav([0.5], size=2**31 - 2**20))
    with open(path, "r+b") as file:
        file.truncate(2**31)                            # a file with a hole: two gigabytes of silence
    assert len(read_sound(path, 8000, seconds=1.0, start=90_000.0)) == 8000
    with pytest.raises(ValueError, match="^37.3 hours long; read a part of it$"):
        read_sound(path, 8000)
    with open(path, "rb") as file:
        assert open_sound(file).frames == 2**30 - 2**19


KINDS = [(b"fLaC", "FLAC"), (b"OggS", "Ogg"), (b"ID3\x03", "MP3"), (b"\xff\xfb\x90\x00", "MP3")]


@pytest.mark.parametrize("mark, kind", KINDS)
def test_the_package_for_other_formats_is_named(monkeypatch, mark, kind):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ValueError, match=f"^{kind} is read by the package soundfile; pip install soundfile$"):
        read(mark + bytes(100))


class LibsndfileError(RuntimeError):
    """As soundfile raises."""


def package(samples, rate, broken=False):
    """What is used of soundfile: a file of stereo samples."""
    class SoundFile:
        samplerate, frames, channels, place = rate, len(samples), 2, 0

        def __init__(self, file):
            assert file.tell() == 0
            if broken:
                raise LibsndfileError("Error opening: unknown format.")

        def seek(self, place):
            self.place = place

        def read(self, count, dtype, always_2d):
            assert dtype == "float32" and always_2d
            self.place += count
            return np.stack([samples, np.zeros(len(samples))], 1)[self.place - count:self.place].astype(dtype)

    return types.SimpleNamespace(SoundFile=SoundFile)


def test_other_formats_by_the_package(monkeypatch):
    samples = sine(440, 44100)
    monkeypatch.setitem(sys.modules, "soundfile", package(samples, 44100))
    want = read(wav(samples / 2, 44100, 3, 64))
    assert (read(b"fLaC" + bytes(100)) == want).all()
    assert (read(b"OggS" + bytes(100), seconds=0.1, start=0.1) == want[800:1600]).all()
    assert read(b"OggS" + bytes(100), seconds=0.1, start=9.0).shape == (0,)
    monkeypatch.setattr(sound, "MOST", 20_000)                  # numbers of both channels
    with pytest.raises(ValueError, match="^0.0 hours long; read a part of it$"):
        read(b"fLaC" + bytes(100))
    assert (read(b"fLaC" + bytes(100), seconds=0.1) == want[:800]).all()
    monkeypatch.setitem(sys.modules, "soundfile", package(samples, 44100, broken=True))
    with pytest.raises(ValueError, match="^a damaged FLAC file .Error opening: unknown format..$"):
        read(b"fLaC" + bytes(100))


@pytest.mark.optional
def test_flac_by_the_real_package(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    samples = np.random.default_rng(0).integers(-20000, 20000, 8000).astype(np.int16)
    for ending in ("flac", "ogg", "mp3"):
        soundfile.write(tmp_path / f"a.{ending}", samples, 8000)
    assert (read_sound(tmp_path / "a.flac", 8000) == samples).all()
    assert (read_sound(tmp_path / "a.flac", 8000, 0.25, 0.5) == samples[4000:6000]).all()
    music = sine(440, 44100, 3.0)
    for ending in ("ogg", "mp3"):                   # in blocks, as at once
        soundfile.write(tmp_path / f"a.{ending}", music, 44100)
        whole = soundfile.read(tmp_path / f"a.{ending}")[0]
        found = read_sound(tmp_path / f"a.{ending}", 8000)
        assert np.abs(found / 32768 - resample(whole, 44100, 8000)).max() < 1e-4, ending
    (tmp_path / "cut.flac").write_bytes((tmp_path / "a.flac").read_bytes()[:60])
    with pytest.raises(ValueError, match="damaged|cut off"):
        read_sound(tmp_path / "cut.flac", 8000)


# ---- writing a file

def test_write_wav(tmp_path):
    values = np.random.default_rng(0).integers(-32768, 32768, 5001).astype(np.int16)
    write_wav(tmp_path / "a.wav", values, 11025)
    with wave.open(str(tmp_path / "a.wav")) as file:            # the standard library's reader
        assert file.getparams()[:4] == (1, 2, 11025, 5001)
        assert (np.frombuffer(file.readframes(5001), "<i2") == values).all()
    memory = io.BytesIO()
    write_wav(memory, to_tensor(values[None])[0], 11025)
    assert memory.getvalue() == (tmp_path / "a.wav").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]          # no temporary file is left


def test_loud_sounds_are_written_without_clipping(tmp_path):
    loud = sine(100, 8000, amplitude=4.0).astype(np.float32)
    write_wav(tmp_path / "a.wav", loud, 8000)
    found = read_sound(tmp_path / "a.wav", 8000)
    assert np.abs(found).max() == 32767
    assert np.abs(found / 32767 - loud / np.abs(loud).max()).max() < 1e-4   # the same wave
    write_wav(tmp_path / "a.wav", torch.full((1, 4), 0.5, dtype=torch.bfloat16), 8000)
    assert read_sound(tmp_path / "a.wav", 8000).tolist() == [16384] * 4
    for bad, message in ((np.array([0.0, np.nan]), "no numbers"), (np.array([1, 2]), "give int16 or floats")):
        with pytest.raises(ValueError, match=message):
            write_wav(tmp_path / "b.wav", bad, 8000)
    assert not (tmp_path / "b.wav").exists()


# ---- spectra

def test_mel_scale():
    assert abs(mel_of(1000) - 1000) < 0.02 and mel_of(0) == 0               # by its definition
    assert np.allclose(mel_of([700, 4000]), [2595 * math.log10(2), 2146.0646], atol=1e-3)
    assert np.allclose(hertz_of(mel_of(np.arange(0, 8000, 7.0))), np.arange(0, 8000, 7.0))


def test_mel_filters():
    """Triangles: 1 at their own centre, 0 at their neighbours', and in all 1 between the outer centres."""
    filters = mel_filters(20, 4001, 8000)                                   # a bin a hertz
    centres = hertz_of(np.arange(1, 21) * mel_of(4000) / 21)
    for band, centre in enumerate(centres):
        at = filters[:, round(centre)]
        assert at.argmax() == band and at[band] > 0.98 and abs(filters[band].argmax() - centre) <= 1
    inner = slice(math.ceil(centres[0]), int(centres[-1]))
    assert np.allclose(filters.sum(0)[inner], 1) and filters[:, 0].sum() == 0
    narrow = mel_filters(10, 4001, 8000, low=1000, high=2000)
    assert not narrow[:, :1000].any() and not narrow[:, 2001:].any() and narrow[:, 1500].sum() > 0.99


def by_hand(x, rate, bands, window, hop):
    """log_mel by NumPy, frame by frame, with a plain Fourier sum."""
    length, step = round(window * rate), round(hop * rate)
    size = 1
    while size < 4 * length:
        size *= 2
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
    padded = np.concatenate([np.zeros(length // 2), x, np.zeros(length)])
    frames = np.stack([hann * padded[i:i + length] for i in range(0, len(x) + 1, step)])
    angle = 2 * np.pi * np.outer(np.arange(size // 2 + 1), np.arange(length)) / size
    power = np.abs(frames @ np.exp(-1j * angle).T) ** 2 * 4 / (size * (hann**2).sum())
    return 10 * np.log10(np.maximum(power @ mel_filters(bands, size // 2 + 1, rate).T, 1e-10)).T


def test_log_mel_is_what_its_definition_gives():
    noise = np.random.default_rng(0).normal(0, 0.1, (2, 1500))
    found = log_mel(torch.from_numpy(noise), 8000, bands=30, window=0.016, hop=0.01)
    assert found.shape == (2, 30, 1 + 1500 // 80) and found.dtype == torch.float32
    for row, values in zip(found.numpy(), noise):
        assert np.abs(row - by_hand(values, 8000, 30, 0.016, 0.01)).max() < 0.01
    assert (log_mel(torch.zeros(1, 800), 8000) == -100).all()


def test_a_sine_of_full_scale_has_0_db():
    for hertz in (300, 1000, 2500):
        level = log_mel(torch.from_numpy(sine(hertz, 8000, amplitude=1.0))[None], 8000)[0, :, 20:40].double()
        assert abs(10 * math.log10((10 ** (level / 10)).sum(0).mean())) < 0.02
        centre = hertz_of((1 + level.mean(1).argmax()) * mel_of(4000) / 65)
        assert abs(centre - hertz) < 40


def test_log_mel_can_be_trained_through_after_inference():
    sound._filters.cache_clear()
    with torch.inference_mode():
        log_mel(torch.randn(1, 800), 8000)
    x = torch.randn(1, 800, requires_grad=True)
    log_mel(x, 8000).sum().backward()
    assert x.grad.abs().sum() > 0


# ---- a grid of spectrograms

def oklab(rgb):
    """Björn Ottosson's other direction, from sRGB."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    cones = np.cbrt(linear @ np.array([[0.4122214708, 0.2119034982, 0.0883024619],
                                       [0.5363325363, 0.6806995451, 0.2817188376],
                                       [0.0514459929, 0.1073969566, 0.6299787005]]))
    return cones @ np.array([[0.2104542553, 1.9779984951, 0.0259040371],
                             [0.7936177850, -2.4285922050, 0.7827717662],
                             [-0.0040720468, 0.4505937099, -0.8086757660]])


def test_the_colours_are_perceptually_uniform():
    lab = oklab(colours() / 255)
    assert np.abs(lab[:, 0] - np.linspace(0.12, 0.97, 256)).max() < 0.005
    steps = np.linalg.norm(lab[16:] - lab[:-16], axis=1)
    assert steps.max() / steps.min() < 1.3
    grey = (colours() @ [0.299, 0.587, 0.114]).astype(int)
    assert (np.diff(grey[::4]) > 0).all()


def cell(picture, index, columns, rows_of_text=1):
    """The pixels of one spectrogram."""
    width, height = sound.CELL
    x = 54 + index % columns * (width + 12)
    y = 8 + index // columns * (height + 13 + 6 + 13 * rows_of_text + 2 + 6)
    return np.asarray(picture)[y:y + height, x:x + width].astype(int)


def test_spectrograms_show_time_and_frequency():
    """A sine is a light line at its place on the mel axis, loud ones lighter than quiet ones by the same
    scale in the whole grid."""
    quiet = sine(1000, 8000, 1.0, amplitude=0.01)
    late = sine(3000, 8000, 1.0, amplitude=0.9) * (np.arange(8000) >= 4000)
    sounds = np.round(32767 * np.stack([sine(1000, 8000, 1.0, 0.9), late, quiet])).astype(np.int16)
    picture = spectrograms(sounds, 8000, 2, ["one", "two", "three"], seconds=[1.0, 1.0, 0.5])
    assert picture.mode == "RGB"
    width, height = sound.CELL
    for index, hertz in ((0, 1000), (1, 3000)):
        line = cell(picture, index, 2).sum(-1)[:, 3 * width // 4].argmax()
        assert abs(line - (1 - mel_of(hertz) / mel_of(4000)) * (height - 1)) < 2
    assert cell(picture, 1, 2)[:, :width // 2 - 10].max() < 40               # silence
    brightest = [cell(picture, index, 2)[:, 60].sum(-1).max() for index in (0, 2)]
    lightness = [oklab(cell(picture, i, 2)[:, 60] / 255)[:, 0].max() for i in (0, 2)]
    assert brightest[0] > brightest[1] > 100
    # 0.85 of lightness for the whole range
    assert abs(lightness[0] - lightness[1] - 0.85 * 20 * math.log10(90) / sound.RANGE) < 0.02
    assert (cell(picture, 2, 2)[5:-5, width // 2 + 2:-2] == 0xDD).all()      # after its end


def test_spectrograms_have_captions():
    silence = np.zeros((2, 4000), np.int16)
    plain = spectrograms(silence, 8000, 2)
    short = spectrograms(silence, 8000, 2, ["a", "b"])
    long = spectrograms(silence, 8000, 2, ["a word " * 20, "b"])
    assert plain.height + 13 == short.height < long.height
    assert (np.asarray(short)[-16:] < 128).any() and cell(plain, 0, 2).max() < 40


@pytest.mark.parametrize("length, rate", [(100, 8000), (8192, 8000), (44100, 44100), (441_000, 44100)])
def test_spectrograms_of_any_length(length, rate):
    """A sine has the same level and place, however many frames a pixel stands for."""
    tone = np.round(32767 * sine(1000, rate, length / rate, 0.9)).astype(np.int16)
    picture = spectrograms(tone[None], rate, seconds=[length / rate])
    assert isinstance(picture, Image.Image) and picture.width == 54 + 240 + 12 + 44
    line = cell(picture, 0, 1, rows_of_text=0).sum(-1)[:, 120]
    assert abs(line.argmax() - (1 - mel_of(1000) / mel_of(rate / 2)) * 119) < 2 and line.max() > 600


def test_a_sound_that_nearly_fills_its_window_has_an_end():
    sounds = (1000 * np.sin(np.arange(8192)[None] / 3)).astype(np.int16)
    nearly, whole = (np.asarray(spectrograms(sounds, 8000, 1, seconds=[end])) for end in (1.0238, 1.024))
    column = (nearly != whole).any((0, 2)).nonzero()[0]
    assert len(column) == 1                         # grey: the last column of pixels
