"""The rules of the house: what may import what, pieces that stand alone, demonstrations that run,
a README that is true."""

import ast
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import sample
import train

PIECES = {"vae": set(), "unet": set(), "dit": {"attention"}, "attention": set(), "ddpm": set(),
          "rectified_flow": set(), "samplers": set(), "data": set()}
OUTSIDE = {name: {"torch"} for name in PIECES} | {"data": {"torch", "numpy", "PIL", "tqdm"}}


@pytest.mark.parametrize("name", PIECES)
def test_imports(name):
    """At module level a piece imports torch, the standard library, and no other piece."""
    found = set()
    for node in ast.parse((ROOT / f"{name}.py").read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    assert found - set(sys.stdlib_module_names) <= OUTSIDE[name] | PIECES[name]


def test_copied_out_pieces_import(tmp_path):
    lines = ["import sys"]
    for name, company in PIECES.items():
        folder = tmp_path / name
        folder.mkdir()
        for file in {name} | company:
            shutil.copy(ROOT / f"{file}.py", folder)
        lines += [f"sys.path[0] = {str(folder)!r}", f"import {name}",
                  f"assert {name}.__file__.startswith({str(folder)!r})",
                  f"[sys.modules.pop(m, None) for m in {sorted(PIECES)!r}]"]
    script = tmp_path / "run.py"
    script.write_text("\n".join(lines))
    subprocess.run([sys.executable, str(script)], check=True, cwd=tmp_path)


@pytest.mark.parametrize("name, expected", [
    ("vae", "PSNR"), ("unet", "859.5 M"), ("dit", "674.8 M"), ("attention", "relative error"),
    ("ddpm", "ddpm.png"), ("rectified_flow", "rectified_flow.png"), ("samplers", "order"),
    ("data", "2400 of 2400"),
])
def test_demonstrations(tmp_path, name, expected):
    result = subprocess.run([sys.executable, str(ROOT / f"{name}.py")], capture_output=True, text=True,
                            cwd=tmp_path, timeout=120)
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout
    if name == "samplers":
        orders = {"euler": 1, "heun": 2, "dpm_solver_2": 2, "dpmpp_2m": 2, "dpm_solver_3": 3, "dpmpp_3m": 3,
                  "unipc_2": 3, "unipc_3": 4}
        for line in result.stdout.splitlines()[1:]:
            assert -0.1 < float(line.split()[-1]) - orders[line.split()[1]] < 0.4, line
    if name in ("ddpm", "rectified_flow"):   # samples lie on the data, not only near it
        samples, fresh, noise = map(float, re.findall(r"0\.\d+", result.stdout.splitlines()[-2]))
        assert fresh < samples < 0.08 < 0.3 < noise and (tmp_path / f"{name}.png").is_file()


def test_every_flag_has_a_help_text():
    for module in (train, sample):
        with pytest.raises(SystemExit):
            module.parse_args(["--help"])
        source = (ROOT / f"{module.__name__}.py").read_text()
        calls = [node for node in ast.walk(ast.parse(source))
                 if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"]
        assert len(calls) > 10 and all(any(k.arg == "help" for k in call.keywords) for call in calls)


def readme_commands():
    text = (ROOT / "README.md").read_text()
    for block in (re.findall(r"```(?:sh|bash)?\n(.*?)```", text, re.S)
                  + re.findall(r"(?:^    .*\n)+", text, re.M)):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("#")[0].split("&&"):
                if match := re.match(r"\s*python (train|sample)\.py (.*)", part):
                    yield match.group(1), shlex.split(match.group(2))


def test_readme_commands_are_accepted():
    commands = list(readme_commands())
    assert len(commands) >= 8
    for script, flags in commands:
        if script == "train":
            train.resolve(train.parse_args(flags))
        else:
            sample.parse_args(flags)


def test_files_are_readable():
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")):
        assert all(len(line) <= 110 for line in path.read_text().splitlines()), path
