"""benchmarks/tones.py: shares of samples that are right, with some spoiled on purpose, and their ends."""

import re

import numpy as np
import pytest
from benchmarks import tones as benchmark

from tones import (PITCHES, RATE, TIMBRES, TONE_CLASSES, describe_events, draw_events, draw_tone,
                   seconds_of_tone)

LENGTHS = [seconds_of_tone(i) for i in range(240)]


@pytest.fixture
def score(monkeypatch, capsys):
    """Runs the program on a run that draws these sounds. Returns the lines that it prints, and the flags by
    which it asks for the sounds."""
    def run(sounds, *flags, text=None, lengths=LENGTHS):
        asked = []
        checkpoint = {"objective": {"name": "rf"}, "text": text, "label_dropout": 0.1,
                      "vae": {"config": {"rate": RATE}},
                      "data": {"classes": TONE_CLASSES, "longest": 1.024, "seconds": lengths}}
        monkeypatch.setattr(benchmark, "network_run", lambda run, source: checkpoint)
        monkeypatch.setattr(benchmark, "drawn", lambda flags: asked.extend(flags) or sounds)
        monkeypatch.setattr("sys.argv", ["tones.py", "a-run", "--n", str(len(sounds)), *flags])
        benchmark.main()
        return capsys.readouterr().out.splitlines(), asked
    return run


def test_samples_of_classes_are_counted(score):
    """Of 240, one is silent, one has another pitch, one another timbre, and one is two tones at once."""
    sounds = np.stack([draw_tone(i) for i in range(240)])
    sounds[24] = 0                                              # asked for: deep, sine
    sounds[25] = draw_tone(TONE_CLASSES.index("low-square"))    # deep, square
    sounds[54] = draw_tone(TONE_CLASSES.index("low-sine"))      # low, organ
    sounds[100] = sounds[100] // 2 + draw_tone(0) // 2          # low, sine
    lines, asked = score(sounds, "--steps", "7", "--cfg", "3")
    assert lines[0] == "a-run: 236 of 240 (98.3%) have the pitch and timbre asked for; heun x 7, guidance 3"
    # Number 25 has the timbre that was asked for, and 54 the pitch.
    wrong = {"deep": 2, "low": 1, "sine": 2, "organ": 1}
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[1:-1]}
    expected = {name: f"{40 - wrong.get(name, 0)} of 40" for name in PITCHES}
    expected |= {name: f"{60 - wrong.get(name, 0)} of 60" for name in TIMBRES}
    assert rows == expected
    assert asked == ["a-run", "--n", "240", "--sampler", "heun", "--steps", "7", "--cfg", "3.0"]


def test_samples_that_end_in_time_are_counted(score):
    """Of 240, one is silent, twenty go on for 90 ms too long and thirty end 70 ms too early; all others end
    at most 30 ms early, as a tone fades before its end. Behind sixty there is a hiss."""
    sounds = np.stack([draw_tone(i) for i in range(240)])
    asked = np.array(LENGTHS)
    asked[120:140] -= 0.09
    rng = np.random.default_rng(0)
    for i, length in enumerate(asked):
        tone, rest = np.split(sounds[i], [round(length * RATE)])
        if 140 <= i < 170:
            tone[-560:] = 0
        elif i < 60:                                            # 40 dB below the tone
            rest[:] = np.round(0.01 * np.std(tone) * rng.standard_normal(len(rest)))
    sounds[100] = 0
    line = score(sounds, lengths=asked.tolist())[0][-1]
    found = re.fullmatch(r"  189 of 240 \(78.8%\) end within 50 ms of the length asked for; the level after "
                         r"it is (-\d+) dB in the median, and -40 dB or more in a tenth of them", line)
    assert found and -90 < int(found[1]) < -80                  # digital silence


def test_ends_and_levels_of_known_sounds():
    sounds = np.zeros((4, 8192), np.int16)
    sounds[0, 400:4000] = 10000
    sounds[1, 400:4000], sounds[1, 4000:6000] = 10000, 200      # below 3 %
    sounds[2, 400:4000], sounds[2, 4000:6000] = 10000, 400      # above
    assert benchmark.ends(sounds).tolist() == [0.5, 0.5, 0.75, 0]
    sound = np.repeat([10000, 1000], 4000)
    assert benchmark.level_after(sound, 0.5) == pytest.approx(-20, abs=1e-4)
    assert benchmark.level_after(sound, 0.25) == pytest.approx(10 * np.log10((2 + 0.01 * 4) / 6), abs=1e-4)
    assert benchmark.level_after(sound * 0, 0.5) == 0


def test_the_lengths_are_those_that_each_class_is_asked_for():
    """The first class has the lengths 0, 24, 48, ... of the checkpoint; after the last, the first again."""
    checkpoint = {"text": None, "label_dropout": 0.1,
                  "data": {"classes": TONE_CLASSES, "longest": 1.024, "seconds": LENGTHS[:48]}}
    lengths = benchmark.lengths_asked(checkpoint, 60)
    assert lengths == pytest.approx(LENGTHS[:48] + LENGTHS[:12])


def test_samples_of_captions_are_counted(score):
    """The prompts are those of the validation part; a sound follows them if it has these events alone."""
    events = [describe_events(10**9 + i) for i in range(60)]
    sounds = np.stack([draw_events(each, i) for i, each in enumerate(events)])
    one, two = ([i for i, each in enumerate(events) if len(each.tones) == count] for count in (1, 2))
    sounds[one[3]] = sounds[two[0]]
    sounds[two[1]] = sounds[two[1]][::-1]                       # the other way round
    sounds[two[4], :4096] = 0
    assert events[two[1]].tones[0] != events[two[1]].tones[1]
    lines, asked = score(sounds, text={"kind": "bytes"})
    assert len(one) > 20 and len(two) > 20 and len(lines) == 2
    assert f"{len(one) - 1} of {len(one)} prompts with one event are followed" in lines[0]
    assert f"{len(two) - 2} of {len(two)} prompts with two events are followed" in lines[1]
    assert asked[asked.index("--prompt") + 1:] == [each.caption for each in events]
