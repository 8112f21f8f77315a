"""Spoken words and phrases: recordings of one real voice, and as many voices of espeak-ng as are asked for.

    python speech.py                      # what there is on this system, and speech.png of some of it

The recordings are those of Debian's asterisk-core-sounds-en-wav (Allison Smith, CC BY-SA 3.0), whose file
names are the words; the program is Debian's espeak-ng, with voices, accents, speeds and pitches that are
functions of a number. Every sound is cut to its speech and made equally loud. For validation are every fifth
recording, and voices of which nothing is in training. Sounds are int16, made once and memory-mapped.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from decoded import write_rows
from files import digest, locked, open_array, read_stamp, warn_once, write_atomically, write_stamp
from sound import FULL, read_sound, spectrograms

RATE = 8000                 # of the recordings
PACKAGE, PROGRAM = "asterisk-core-sounds-en-wav", "espeak-ng"
FOLDER = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
RECIPE = 1                  # to be counted up where the same number gives another sound
MOST_AT_ONCE = 8            # processes


# ---- what is said, and where it is recorded

DIGITS = "zero one two three four five six seven eight nine".split()
# The alphabet of radio operators, made to be told apart on bad lines.
ALPHABET = ("alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar "
            "papa quebec romeo sierra tango uniform victor whiskey x-ray yankee zulu").split()
# A text and the files, without .wav, in which it is recorded.
WORDS = {
    **{word: (f"digits/{i}",) for i, word in enumerate(DIGITS)},
    **{word: (f"phonetic/{word[0]}_p",) for word in ALPHABET},
    "hello": ("hello",), "goodbye": ("goodbye", "vm-goodbye"), "today": ("digits/today",),
    "tomorrow": ("digits/tomorrow",),
}
TEENS = ("ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen").split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = ("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth "
            "fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth").split()
DAYS = "sunday monday tuesday wednesday thursday friday saturday".split()
MONTHS = ("january february march april may june july august september october november december").split()
# Files whose text is their name, apart from its folder, and with spaces for hyphens.
NAMED = ("digits/hundred digits/thousand digits/million digits/billion digits/minus digits/dollars digits/at "
         "digits/oh digits/pound digits/star digits/yesterday letters/asterisk letters/at letters/dash "
         "letters/dollar letters/dot letters/equals letters/plus letters/slash letters/space letters/zed "
         "dictate/pause dictate/paused dictate/playback dictate/record activated added calling call-waiting "
         "cancelled de-activated disabled enabled extension for hours is is-in-use is-set-to location "
         "lowercase minute minutes number please-try-again removed second seconds sorry speed-dial time "
         "uppercase with you-entered your").split()
# Files whose text is their name without what stands before the first hyphen.
AFTER_HYPHEN = ("queue-less-than queue-minute queue-minutes vm-and vm-extension vm-Family vm-first vm-for "
                "vm-Friends vm-from vm-last vm-message vm-messages vm-minutes vm-no vm-Old vm-password "
                "vm-press vm-received vm-saved vm-Urgent vm-Work").split()
OTHERS = {"thank you": ("auth-thankyou", "privacy-thankyou"), "you have": ("vm-youhave",),
          "I'm sorry": ("im-sorry",), "o'clock": ("digits/oclock",), "a.m.": ("digits/a-m",),
          "p.m.": ("digits/p-m",), "niner": ("phonetic/9_p",), "hundredth": ("digits/h-hundred",),
          "thousandth": ("digits/h-thousand",), "millionth": ("digits/h-million",)}


def phrases() -> dict[str, tuple[str, ...]]:
    """WORDS, and all other texts of short recordings."""
    pairs = [(text, file) for table in (WORDS, OTHERS) for text, files in table.items() for file in files]
    pairs += [(text, f"digits/{i}") for i, text in enumerate(TEENS, 10)]
    pairs += [(text, f"digits/{10 * i}") for i, text in enumerate(TENS, 2)]
    pairs += [(text, f"digits/h-{i}") for i, text in enumerate(ORDINALS, 1)]
    pairs += [(f"{text[:-1]}ieth", f"digits/h-{10 * i}") for i, text in enumerate(TENS, 2)]
    pairs += [(text, f"digits/day-{i}") for i, text in enumerate(DAYS)]
    pairs += [(text, f"digits/mon-{i}") for i, text in enumerate(MONTHS)]
    pairs += [(letter, f"letters/{letter}") for letter in "abcdefghijklmnopqrstuvwxyz"]
    pairs += [(file.rpartition("/")[2].replace("-", " "), file) for file in NAMED]
    pairs += [(file.partition("-")[2].replace("-", " ").lower(), file) for file in AFTER_HYPHEN]
    found: dict[str, tuple[str, ...]] = {}
    for text, file in pairs:
        found[text] = (*found.get(text, ()), file)
    return found


class Kind(NamedTuple):
    """Texts, and how often each is spoken by the program."""
    texts: dict[str, tuple[str, ...]]
    spoken: int             # for training
    held_out: int           # for validation


KINDS = {"words": Kind(WORDS, 160, 10), "phrases": Kind(phrases(), 24, 2)}


# ---- the two sources

def find_recordings(data_dir: Path) -> Path | None:
    """The folder of the recordings: data_dir or one in it, or where Debian puts it."""
    for folder in (data_dir, data_dir / "speech", data_dir / FOLDER.name, FOLDER):
        if os.path.isfile(folder / "digits" / "1.wav"):
            return folder
    return None


ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029",
           "en-us-nyc")
# The voices of espeak-ng that are meant to be those of people, neither whispering nor caricatures.
VOICES = ("f1 f2 f3 f4 f5 m1 m2 m3 m4 m5 m6 m7 m8 Alex Alicia Andrea Andy Annie antonio aunty belinda "
          "benjamin boris caleb croak Denis Diogo ed edward Gene Gene2 grandma grandpa Henrique Jacky john "
          "Lee linda max Michael michel miguel Mike norbert pablo pedro sandro shelby steph Tweaky zac "
          "anika").split()


class Speaker(NamedTuple):
    """The program, and those of ACCENTS and VOICES that it has, by which alone its sounds are determined."""
    version: str
    accents: tuple[str, ...]
    voices: tuple[str, ...]

    def command(self, text: str, number: int, held_out: bool) -> list[str]:
        """How the program is asked for a text with a number. Every eighth voice is held out."""
        rng = np.random.default_rng([number, int(held_out), *text.encode()])
        voices = [voice for i, voice in enumerate(self.voices) if (i % 8 == 7) == held_out]
        voice = f"{rng.choice(self.accents)}+{rng.choice(voices or self.voices)}"
        speed, pitch = rng.integers(115, 231), rng.integers(15, 86)
        return [PROGRAM, "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", "--", text]


def find_speaker() -> Speaker | None:
    """None where the program is not installed, or has no voice."""
    if shutil.which(PROGRAM) is None:
        return None
    version = _output("--version").partition("Data at")[0].strip()
    # A line has the language in its second column, and the file "!v/NAME" of a voice that can be put on it.
    accents = {line.split()[1] for line in _output("--voices=en").splitlines()[1:] if " gmw/" in line}
    listed = [line.partition("!v/")[2].partition("(")[0].strip()
              for line in _output("--voices=variant").splitlines()]
    found = Speaker(version, tuple(name for name in ACCENTS if name in accents),
                    tuple(name for name in VOICES if name in listed))
    return found if found.accents and found.voices else None


def _output(*flags: str) -> str:
    return _run([PROGRAM, *flags]).decode("utf-8", "replace")


def _run(command: list[str]) -> bytes:
    try:
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or "no answer for a minute"
        raise ValueError(f"{' '.join(command)}: {reason}") from None
    if result.returncode:
        reason = (result.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"{' '.join(command)}: {reason}")
    return result.stdout


# ---- one sound

LEVEL = 0.1                 # root mean square of speech, -20 dB
PEAK = 0.95
QUIET = 45                  # dB below the loudest 10 ms: silence, in recordings and around a spoken word


def cut_to_speech(sound: np.ndarray, rate: int) -> np.ndarray:
    """int16 (T,) -> float64 (t,) from 20 ms before the first part of 10 ms that is not QUIET to 30 ms after
    the last, faded in and out over 5 ms where something is cut off. Empty for silence."""
    step = rate // 100
    whole = len(sound) // step * step
    x = sound / FULL
    power = np.square(x[:whole]).reshape(-1, step).mean(1)
    if not power.any():
        return x[:0]
    loud = np.flatnonzero(power > power.max() * 10 ** (-QUIET / 10))
    start, end = max(0, (loud[0] - 2) * step), min(len(x), (loud[-1] + 4) * step)
    x = x[start:end].copy()
    ramp = np.linspace(0, 1, min(step // 2, len(x)))
    if start > 0:
        x[:len(ramp)] *= ramp
    if end < len(sound):
        x[len(x) - len(ramp):] *= ramp[::-1]
    return x


def even(x: np.ndarray, rate: int) -> np.ndarray:
    """float (t,) -> int16 (t,): scaled so that the mean square of its louder parts is that of LEVEL, but its
    peak at most PEAK."""
    if not x.any():
        return np.zeros(len(x), np.int16)
    step = max(1, min(rate // 100, len(x)))
    power = np.square(x[:len(x) // step * step]).reshape(-1, step).mean(1)
    loud = power[power >= power.max() / 100]                # within 20 dB of the loudest
    gain = min(LEVEL / np.sqrt(loud.mean()), PEAK / np.abs(x).max()) if loud.any() else 1.0
    return np.round(x * gain * FULL).astype(np.int16)


# ---- all of them, made once

class Job(NamedTuple):
    """One sound to be made."""
    text: int               # its number among the texts
    command: list[str]      # that speaks it; empty for a recording
    file: Path | None       # of a recording
    held_out: bool


class Speech(NamedTuple):
    """Part of a kind: training or validation."""
    sounds: np.ndarray      # int16 (N, T), memory-mapped; silence follows each
    texts: np.ndarray       # (N,) int64, numbers of texts, in the order of the kind's
    seconds: np.ndarray     # (N,) float32, before the silence
    recorded: np.ndarray    # (N,) bool, by a real voice
    fingerprint: str        # changes whenever a sound may have changed


ABOUT = np.dtype([("text", "<i4"), ("length", "<i4"), ("held_out", "?"), ("recorded", "?")])


def open_speech(kind: str, split: str, length: int, data_dir: Path, rate: int = RATE) -> Speech:
    """The sounds of KINDS[kind] that are at most `length` samples long at `rate`, from data_dir/speech, where
    they are put when they are first asked for. Raises ValueError where neither recordings nor the program are
    there, or where nothing of a text is short enough."""
    folder, speaker = find_recordings(data_dir), find_speaker()
    if folder is None and speaker is None:
        raise ValueError(f"--data speech: neither recordings nor {PROGRAM} are here; apt install {PACKAGE} "
                         f"{PROGRAM}, or name the folder with digits/1.wav with --data-dir")
    if speaker is None:
        warn_once("speech", f"--data speech: {PROGRAM} is not installed, so there are only recordings, about "
                  f"one of each text, which is few; apt install {PROGRAM}")
    if folder is None:
        warn_once("speech", f"--data speech: no recordings, so all voices are those of {PROGRAM}; apt "
                  f"install {PACKAGE}")
    jobs = _jobs(KINDS[kind], folder, speaker)
    contents = [digest(job.file.read_bytes()) for job in jobs if job.file]
    key = digest(RECIPE, list(KINDS[kind].texts), speaker, contents, [job[:2] for job in jobs], length, rate)
    path = data_dir / "speech" / f"{kind}-{length}-{key[:8]}.npy"
    about_path, stamp_path = path.with_suffix(".about.npy"), path.with_suffix(".json")
    with locked(path.with_suffix(".lock"), wait=True, clean=(path, about_path, stamp_path)):
        stamp = read_stamp(stamp_path)
        about = open_array(about_path, ABOUT, (stamp.get("count"),))
        sounds = open_array(path, np.int16, (len(jobs), length))
        if about is None or sounds is None or stamp.get("key") != key:
            about, fingerprint = _make(kind, jobs, length, rate, path)
            write_atomically(about_path, lambda file: np.save(file, about))
            stamp = {"key": key, "count": len(about), "fingerprint": fingerprint}
            write_stamp(stamp_path, stamp)
            sounds = open_array(path, np.int16, (len(jobs), length))
    first = int(np.count_nonzero(~about["held_out"]))       # training comes first
    part = slice(0, first) if split == "train" else slice(first, len(about))
    about = np.array(about[part])
    return Speech(sounds[part], about["text"].astype(np.int64), about["length"].astype(np.float32) / rate,
                  about["recorded"], digest(stamp["fingerprint"], split))


def _jobs(kind: Kind, folder: Path | None, speaker: Speaker | None) -> list[Job]:
    """First all for training, then those for validation."""
    jobs = []
    files = [(text, folder / f"{name}.wav") for text, names in enumerate(kind.texts.values())
             for name in names] if folder else []
    files = [(text, file) for text, file in files if os.path.isfile(file)]
    for held_out in (False, True):
        # Without the program, one that is held out would be the only one of its text: it serves for both.
        jobs += [Job(text, [], file, held_out) for i, (text, file) in enumerate(files)
                 if (i % 5 == 2) == held_out or (speaker is None and not held_out)]
        if speaker is not None:
            jobs += [Job(number, speaker.command(text, i, held_out), None, held_out)
                     for i in range(kind.held_out if held_out else kind.spoken)
                     for number, text in enumerate(kind.texts)]
    return jobs


def _make(kind: str, jobs: list[Job], length: int, rate: int, path: Path) -> tuple[np.ndarray, str]:
    """Write the sounds of all jobs that are short enough, and return what is known of each, and their
    fingerprint."""
    about = np.zeros(len(jobs), ABOUT)
    lengths, contents = [], []

    def rows() -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_AT_ONCE)) as pool, \
                tqdm(total=len(jobs), desc=f"speak {kind}", unit="sound") as bar:
            for start in range(0, len(jobs), 64):           # bounded: a map of all would keep all
                some = jobs[start:start + 64]
                for job, sound in zip(some, pool.map(lambda job: _sound_of(job, rate), some)):
                    bar.update()
                    lengths.append(len(sound))
                    if 0 < len(sound) <= length:
                        about[len(contents)] = (job.text, len(sound), job.held_out, job.file is not None)
                        contents.append(digest(sound))
                        yield sound

    write_rows(path, np.int16, (len(jobs), length), rows())
    about = about[:len(contents)]
    texts = list(KINDS[kind].texts)
    missing = sorted(set(range(len(texts))) - set(about["text"][~about["held_out"]].tolist()))
    if kind == "words" and missing:
        path.unlink()
        raise ValueError(f"--data speech: nothing of '{texts[missing[0]]}' fits into {length / rate:.3g} s; "
                         "take a longer window")
    longer = sum(number > length for number in lengths)
    print(f"--data speech: {about['recorded'].sum():,} recordings ({PACKAGE}: Allison Smith, CC BY-SA 3.0) "
          f"and {(~about['recorded']).sum():,} sounds of {PROGRAM}; left out are {longer:,} longer than "
          f"{length / rate:.3g} s and {lengths.count(0):,} silent", file=sys.stderr)
    return about, digest(contents, about)


def _sound_of(job: Job, rate: int) -> np.ndarray:
    source = job.file if job.file else io.BytesIO(_run(job.command))
    try:
        sound = read_sound(source, rate, seconds=30.0)
    except (OSError, ValueError) as error:
        raise ValueError(f"--data speech: {job.file or ' '.join(job.command)}: {error}") from None
    return even(cut_to_speech(sound, rate), rate)


def demo() -> None:
    """A few words by a few voices, and recorded where the recordings are here."""
    folder, speaker = find_recordings(Path("data")), find_speaker()
    print(f"recordings: {folder}; {PROGRAM}: {speaker and speaker.version}")
    print(f"{len(WORDS)} words; {len(phrases())} phrases")
    if folder is None and speaker is None:
        return
    with tempfile.TemporaryDirectory() as temporary:
        KINDS["demo"] = Kind({text: WORDS[text] for text in ("zero", "seven", "x-ray", "hello")}, 2, 1)
        found = open_speech("demo", "train", 8192, Path(temporary))
        captions = [f"{list(KINDS['demo'].texts)[text]}, {'recorded' if real else 'spoken'}"
                    for text, real in zip(found.texts, found.recorded)]
        spectrograms(found.sounds, RATE, 4, captions, found.seconds).save("speech.png")
        print(f"speech.png: {len(found.sounds)} sounds, of {found.seconds.min():.2f} s and more")
        del found                               # Windows does not delete a file that is still mapped


if __name__ == "__main__":
    demo()
