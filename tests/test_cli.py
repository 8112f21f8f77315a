"""cli.py: what flags accept, refusals of one line, exit statuses, signals, output that cannot be written."""

import argparse
import io
import math
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, contents
from tqdm import _monitor as tqdm_monitor
from tqdm import std as tqdm_std
from tqdm import tqdm

import sample
import train
from cli import (Flag, Output, folder_name, given, integer, make_parser, nonempty, number, one_of, program,
                 quiet_imports, shown, signals)


# ---- what a flag accepts

@pytest.mark.parametrize("accept, string, expected", [
    (number(0, 1), "0", 0.0), (number(0, 1), "1", 1.0), (number(0, 1), "1e-3", 0.001),
    (number(0, 1), "-0.0", 0.0), (number(-1, 2), "-1", -1.0), (number(-1, 2), "2", 2.0),
    (number(1e-12), "1e-12", 1e-12), (number(1e-12), "1e300", 1e300), (number(1e-12), "inf", math.inf),
    (number(0, 1e9), "1e9", 1e9), (number(0, 1, above=True), "1e-300", 1e-300),
    (number(0, 1, above=True), "1", 1.0),
    (integer(1), "1", 1), (integer(1), "1000000000", 10**9), (integer(0, 2**62), "0", 0),
    (integer(0, 2**62), str(2**62), 2**62), (integer(-5, 5), "-5", -5),
    (one_of(("a", "b")), "b", "b"),
    (nonempty, "a b/c", "a b/c"),
    (folder_name, "a b-1.x", "a b-1.x"), (folder_name, "\u732b" * 66, "\u732b" * 66),
])
def test_accepted(accept, string, expected):
    value = accept(string)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("accept, string, message", [
    (number(0, 1), "nan", "nan: must be between 0 and 1"),
    (number(0, 1), "inf", "inf: must be between 0 and 1"),
    (number(0, 1), "-inf", "-inf: must be between 0 and 1"),
    (number(0, 1), "1.0000001", "must be between 0 and 1"),
    (number(0, 1), "-1e-9", "must be between 0 and 1"),
    (number(0, 1), "", ": must be a number between 0 and 1"),
    (number(0, 1), "1,5", "1,5: must be a number between 0 and 1"),
    (number(2), "1", "1: must be at least 2"),
    (number(2), "nan", "nan: must be at least 2"),
    (number(2), "x", "x: must be a number at least 2"),
    (integer(1), "0", "0: must be between 1 and 1,000,000,000"),
    (integer(1), "1000000001", "must be between 1 and 1,000,000,000"),
    (integer(1), "1e3", "1e3: must be a whole number between 1 and 1,000,000,000"),
    (integer(1), "1.0", "1.0: must be a whole number"),
    (integer(1), "nan", "nan: must be a whole number"),
    (integer(1), "", ": must be a whole number"),
    (integer(0, 5), "-1", "-1: must be between 0 and 5"),
    (one_of(("a", "b")), "c", "c: must be one of a, b"),
    (one_of(("a", "b")), "", "^is empty; give a value"),
    (nonempty, "", "is empty; give a value, or leave it out"),
    (number(0, 1, above=True), "0", "0: must be above 0 and at most 1"),
    (number(0, 1, above=True), "-0.0", "-0.0: must be above 0 and at most 1"),
    (number(0, 1, above=True), "nan", "nan: must be above 0"),
    (folder_name, "", "'': must be the name of one folder, without / or "),
    (folder_name, "a/b", "'a/b': must be"), (folder_name, ".", "'.': must be"),
    (folder_name, "..", "'..': must be"),
    (folder_name, "a\\b", "must be the name of one folder"),
    (folder_name, "a\nb", "^'a.nb': has characters that cannot be printed; give letters"),
    (folder_name, "n" * 300, "^n{40}[.]{3}: a name of 300 letters is too long"),
    (folder_name, "\u732b" * 80, "a name of 80 letters is too long"),
])
def test_not_accepted(accept, string, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message) as refused:
        accept(string)
    assert "\n" not in str(refused.value)


# ---- flags

FLAGS = {"some": [Flag("--steps", "how many", integer(1), 10), Flag("--fast", "a switch"),
                  Flag("--side-lengths", "sides", integer(1), nargs="+", metavar="N")]}


def test_flags_and_their_values():
    parse = make_parser("A program.", FLAGS).parse_args
    args = parse([])
    assert vars(args) == {"steps": 10, "fast": False, "side_lengths": None}
    steps, fast, sides = FLAGS["some"]
    assert sides.key == "side_lengths"
    assert given(steps, args) and not given(fast, args) and not given(sides, args)
    args = parse(["--steps", "2", "--fast", "--side-lengths", "3", "4"])
    assert vars(args) == {"steps": 2, "fast": True, "side_lengths": [3, 4]}
    assert [shown(flag, args) for flag in FLAGS["some"]] == ["--steps 2", "--fast", "--side-lengths 3 4"]
    assert given(Flag("--least", "", integer(0)), argparse.Namespace(least=0))      # which equals False


@pytest.mark.parametrize("flags, message", [
    (["--steps", "0"], "^--steps 0: must be between 1 and"), (["--steps"], "^--steps expected one argument"),
    (["--wings", "2"], "^unrecognized arguments: --wings 2$"),
    (["--step", "2"], "^unrecognized arguments: --step 2; did you mean --steps[?]$"),
    (["--side=3"], "^unrecognized arguments: --side=3; did you mean --side-lengths[?]$"),
    (["--side-lengths"], "^--side-lengths expected at least one argument"),
])
def test_a_slip_is_one_line(capsys, flags, message):
    with pytest.raises(ValueError, match=message) as refused:
        make_parser("", FLAGS).parse_args(flags)
    assert "\n" not in str(refused.value) and capsys.readouterr() == ("", "")


# ---- exit statuses

@pytest.fixture
def handlers():
    """Put the handlers of signals back that a program installs."""
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    clocks = [(module, module.time) for module in (tqdm_std, tqdm_monitor)]
    yield before
    for module, clock in clocks:
        module.time = clock
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.mark.parametrize("outcome, status, line", [
    (None, 0, ""), (143, 143, ""),
    (ValueError("a: bad\nreally"), 2, "x.py: error: a: bad really\n"),
    (OSError("disk full"), 2, "x.py: error: disk full\n"),
    (FloatingPointError("nan"), 2, "x.py: error: nan\n"),
    (MemoryError(), 2, "x.py: error: out of memory; lower"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "x.py: error: out of memory; lower"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "x.py: error: out of memory; lower"),
    (KeyboardInterrupt(), 130, "x.py: interrupted"),
])
def test_exit_statuses(monkeypatch, handlers, outcome, status, line):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def main():
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert program("x.py", main) == status
    with pytest.raises(SystemExit) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143 and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN    # after nohup
    assert err.getvalue().startswith(line) and err.getvalue().count("\n") == bool(line) and not out.getvalue()


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_a_signal_is_one_line(monkeypatch, handlers, number):
    err = io.StringIO()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", err)
    number = signal.Signals[number]
    signal.signal(number, signal.SIG_DFL)
    with pytest.raises(SystemExit) as caught:
        program("x.py", lambda: os.kill(os.getpid(), number) or next(iter(int, 1)))
    assert caught.value.code == 128 + number
    assert err.getvalue() == f"x.py: stopped by {number.name}; the same command begins or continues it\n"


def test_ctrl_c_while_a_program_is_imported(monkeypatch, handlers):
    """SIG_DFL ends the process at once; `program` takes over; what the shell ignores stays ignored."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for module, before, during, after in (
            ("__main__", signal.default_int_handler, signal.SIG_DFL, signal.default_int_handler),
            ("train", signal.default_int_handler, signal.default_int_handler, signal.default_int_handler),
            ("__main__", signal.SIG_IGN, signal.SIG_IGN, signal.SIG_IGN)):
        signal.signal(signal.SIGINT, before)
        quiet_imports(module)
        assert signal.getsignal(signal.SIGINT) is during
        program("x.py", lambda: None)
        assert signal.getsignal(signal.SIGINT) is after
    with signals() as received:                                          # still ignored
        os.kill(os.getpid(), signal.SIGINT)
    assert received == []


def test_a_clock_that_is_set_back_does_not_concern_bars(monkeypatch, handlers):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    program("x.py", lambda: None)
    bar = tqdm(range(2), file=io.StringIO())
    assert bar._time is tqdm_monitor.time is time.monotonic
    bar.close()


@pytest.mark.parametrize("fault", [RuntimeError("shape"), KeyError("x"), AssertionError()])
def test_faults_of_ours_are_not_hidden(monkeypatch, handlers, fault):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())

    def main():
        raise fault

    with pytest.raises(type(fault)):
        program("x.py", main)


REFUSED = [
    ("train.py", train.main, ["--arch", "dit", "--image-size", "30"]),                    # by the run's plan
    ("train.py", train.main, ["--arch", "dit", "--lr", "fast"]),                          # by the flag's type
    ("train.py", train.main, ["--arch", "dit", "--shift", "3", "--objective", "ddpm"]),   # by another flag
    ("train.py", train.main, ["--arch", "dit", "--wings", "2"]),                          # by argparse
    ("train.py", train.main, []),
    ("sample.py", sample.main, ["runs/nothing"]),
    ("sample.py", sample.main, ["runs/nothing", "--n", "1e3"]),
]


@pytest.mark.parametrize("script, main, flags", REFUSED)
def test_bad_input_is_one_line_and_exit_status_2(tmp_path, monkeypatch, handlers, script, main, flags):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.chdir(tmp_path)
    assert program(script, lambda: main(flags)) == 2 and out.getvalue() == ""
    assert err.getvalue().startswith(f"{script}: error: ") and err.getvalue().count("\n") == 1
    assert not contents(tmp_path)


# ---- signals

def test_nohup_keeps_its_meaning():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- output that cannot be written

class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, string):
        raise self.error

    flush = write


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "full"), OSError(5, "terminal gone"),
                                   ValueError("I/O operation on closed file")])
def test_output_that_cannot_be_written_is_dropped(error):
    out = Output(Broken(error), 1)
    bar = tqdm(range(3), file=out, mininterval=0)
    assert list(bar) == [0, 1, 2]
    print("text", file=out, flush=True)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp437", "utf-8"])
def test_characters_that_a_console_lacks_are_escaped(encoding):
    raw = io.BytesIO()
    out = Output(io.TextIOWrapper(raw, encoding=encoding), 1)
    print("\u732b \udcff", file=out, flush=True)                    # a Chinese name, a byte that is no UTF-8
    for _ in tqdm(range(2), desc="\u732b", file=out):
        pass
    out.flush()
    first = raw.getvalue().split(b"\n")[0]
    assert first == (b"\xe7\x8c\xab" if encoding == "utf-8" else b"\\u732b") + b" \\udcff"


def test_no_stream_at_all():
    out = Output(None, 1)
    print("text", file=out, flush=True)


# ---- the programs, in processes of their own

@pytest.mark.parametrize("script, flags", [(script, flags) for script, _, flags in (REFUSED[0], REFUSED[5])])
def test_a_program_passes_its_status_on(tmp_path, script, flags):
    result = subprocess.run([sys.executable, str(ROOT / script), *flags], capture_output=True, text=True,
                            cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == "" and not contents(tmp_path)
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith(f"{script}: error: ")


def shell(command, cwd, encoding="utf-8"):
    python = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT))}"
    return subprocess.run(["bash", "-c", command.replace("PYTHON", python)], cwd=cwd, capture_output=True,
                          text=True, env=os.environ | {"PYTHONIOENCODING": encoding}).stdout


@pytest.mark.skipif(os.name == "nt", reason="a shell of Unix")
def test_programs_in_a_shell(tmp_path):
    """Closed streams and pipes, and an exit status that stops `&&`."""
    command = "PYTHON/settings.py --arch dit --data \u732b"
    head = shell(f"{command} 2>&- | head -1; echo ${{PIPESTATUS[0]}}", tmp_path, "cp1252")
    assert head == "what to train\n0\n"
    assert shell("PYTHON/settings.py --arch cnn 2>&- && echo next; echo $?", tmp_path) == "2\n"
    assert not contents(tmp_path)
