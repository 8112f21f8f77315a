"""benchmarks/tones.py: shares of samples that are right, with some spoiled on purpose."""

import numpy as np
import pytest
from benchmarks import tones as benchmark

from tones import PITCHES, TIMBRES, TONE_CLASSES, describe_events, draw_events, draw_tone


@pytest.fixture
def score(monkeypatch, capsys):
    """Runs the program on a run that draws these sounds. Returns the lines that it prints, and the flags by
    which it asks for the sounds."""
    def run(sounds, *flags, text=None):
        asked = []
        checkpoint = {"objective": {"name": "rf"}, "text": text}
        monkeypatch.setattr(benchmark, "load_checkpoint", lambda run: checkpoint)
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
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[1:]}
    expected = {name: f"{40 - wrong.get(name, 0)} of 40" for name in PITCHES}
    expected |= {name: f"{60 - wrong.get(name, 0)} of 60" for name in TIMBRES}
    assert rows == expected
    assert asked == ["a-run", "--n", "240", "--sampler", "heun", "--steps", "7", "--cfg", "3.0"]


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
