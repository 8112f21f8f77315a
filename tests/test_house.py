"""The rules of the house: which room may import which, pieces that can be copied out alone, demonstrations
that run, a README whose commands are accepted."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from torch.distributed import run as torchrun

import encode
import pairs
import sample_settings
import settings

# Each room and the rooms that it imports at module level. A room may only import rooms above it in this
# table, so that there are no cycles; what a room takes along when it is copied out follows from it.
ROOMS = {
    "rectified_flow": set(),
    "ddpm": set(),
    "samplers": set(),
    "times": {"rectified_flow", "samplers"},
    "attention": set(),
    "vae": set(),
    "audio_vae": set(),
    "ema": set(),
    "moe": set(),
    "toys": set(),
    "tones": set(),
    "files": set(),
    "weights": set(),
    "offload": {"vae"},
    "cli": set(),
    "ranks": {"cli"},
    "deferred": set(),
    "cuts": set(),
    "parallel": set(),
    "ahead": set(),
    "moments": {"cuts", "parallel"},
    "pictures": {"files"},
    "charts": {"pictures"},
    "sound": {"files", "pictures"},
    "media": {"pictures", "samplers", "sound"},
    "ragged": {"files"},
    "folder": {"files", "pictures", "ragged"},
    "decoded": {"files", "folder", "pictures", "ragged"},
    "drawings": {"decoded", "files", "folder", "pictures", "ragged"},
    "sounds": {"decoded", "files", "folder", "sound"},
    "speech": {"decoded", "files", "sound"},
    "shards": {"ahead", "files", "folder", "pictures"},
    "cache": {"files", "ragged"},
    "dit": {"attention"},
    "mmdit": {"attention", "dit"},
    "stable_audio": {"attention", "dit"},
    "unet": {"attention"},
    "text": {"attention", "dit"},
    "encoders": {"unet"},
    "names": {"dit", "mmdit", "stable_audio", "unet"},
    "published": {"audio_vae", "dit", "encoders", "mmdit", "names", "stable_audio", "unet", "vae",
                  "weights"},
    "data": {"decoded", "drawings", "files", "folder", "pictures", "ragged", "shards", "sounds", "speech",
             "tones", "toys"},
    "conditioning": {"cache", "data", "encoders", "files", "folder", "offload", "published", "shards",
                     "text", "unet", "weights"},
    "draw": {"conditioning", "media", "offload", "ranks", "samplers", "times", "vae"},
    "output": {"conditioning", "files", "media", "pictures", "sound"},
    "beginning": {"media", "pictures", "sound", "vae"},
    "machine": set(),
    "settings": {"audio_vae", "cli", "data", "ddpm", "dit", "ema", "encoders", "mmdit", "moe", "published",
                 "rectified_flow", "sounds", "stable_audio", "text", "times", "unet", "vae"},
    "networks": {"attention", "audio_vae", "files", "settings", "text", "vae", "weights"},
    "checkpoints": {"ema", "encoders", "moments", "networks", "published", "settings", "vae", "weights"},
    "run": {"charts", "checkpoints", "cli", "files", "networks", "settings"},
    "state": {"checkpoints", "cuts", "ema", "moe", "moments", "networks", "parallel", "run", "settings",
              "weights"},
    "export": {"checkpoints", "cli", "ddpm", "dit", "files", "media", "mmdit", "names", "networks",
               "published", "unet", "vae", "weights"},
    "plan": {"ahead", "attention", "cache", "checkpoints", "cli", "conditioning", "cuts", "data", "ema",
             "files", "folder", "machine", "media", "moe", "networks", "published", "ragged", "ranks", "run",
             "settings", "shards", "vae", "weights"},
    "guidance": {"checkpoints", "conditioning", "draw", "networks", "times", "vae", "weights"},
    "sample_settings": {"beginning", "cli", "conditioning", "ema", "files", "media", "networks", "output",
                        "pictures", "ranks", "samplers", "settings", "times", "vae"},
    "sample": {"attention", "beginning", "checkpoints", "cli", "conditioning", "draw", "files", "guidance",
               "machine", "media", "networks", "offload", "output", "pictures", "published", "ranks",
               "sample_settings", "settings", "sound", "times", "vae", "weights"},
    "tasks": {"cache", "cli", "conditioning", "data", "draw", "files", "media", "moe", "networks", "plan",
              "ranks", "samplers", "settings", "shards", "vae"},
    "mixed": {"cache", "cli", "conditioning", "data", "draw", "media", "moe", "networks", "pictures", "plan",
              "ragged", "settings", "tasks", "vae"},
    "encode": {"ahead", "cache", "checkpoints", "cli", "files", "machine", "media", "networks", "pictures",
               "shards", "vae"},
    "train": {"checkpoints", "cli", "conditioning", "data", "deferred", "ema", "machine", "mixed", "networks",
              "parallel", "plan", "ranks", "run", "settings", "state", "tasks", "weights"},
    "pairs": {"beginning", "cache", "checkpoints", "cli", "data", "ema", "files", "machine", "media", "mmdit",
              "networks", "pictures", "rectified_flow", "run", "samplers", "sound", "state", "tasks", "text",
              "tones", "toys", "train"},
}
PACKAGES = {name: {"torch"} for name in ROOMS} | {
    "toys": {"numpy", "PIL"},
    "tones": {"numpy"},
    "files": {"torch", "numpy"},
    "pictures": {"torch", "numpy", "PIL"},
    "charts": {"numpy", "PIL"},
    "sound": {"torch", "numpy", "PIL"},
    "media": {"torch", "numpy", "PIL"},
    "ragged": {"numpy"},
    "folder": {"numpy", "PIL"},
    "decoded": {"numpy", "PIL", "tqdm"},
    "drawings": {"numpy", "PIL"},
    "sounds": {"numpy"},
    "speech": {"numpy", "tqdm"},
    "cache": {"torch", "numpy", "tqdm"},
    "ahead": {"torch", "numpy"},
    "shards": {"torch", "numpy", "tqdm"},
    "encode": {"torch", "numpy", "tqdm"},
    "data": {"torch", "numpy", "PIL", "tqdm"},
    "conditioning": {"torch", "numpy"},
    "run": {"torch", "PIL"},
    "draw": {"torch", "numpy", "tqdm"},
    "output": {"torch", "numpy", "PIL"},
    "beginning": {"torch", "numpy"},
    "sample": {"torch", "numpy", "tqdm"},
    "tasks": {"torch", "numpy", "PIL", "tqdm"},
    "mixed": {"torch", "numpy", "PIL"},
    "train": {"torch", "numpy", "tqdm"},
    "pairs": {"torch", "numpy", "PIL", "tqdm"},
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}      # on a busy machine, threads wait for each other


def module_level_imports(name):
    found = set()
    for node in ast.parse((ROOT / f"{name}.py").read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


def company(name):
    """All rooms that come along when one is copied out."""
    rooms = {name}
    for other in ROOMS[name]:
        rooms |= company(other)
    return rooms


def test_nothing_but_the_rooms_stands_at_the_top_level():
    assert {path.stem for path in ROOT.glob("*.py")} == set(ROOMS)
    assert not [path for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()]


@pytest.mark.parametrize("name", ROOMS)
def test_imports(name):
    """Exactly the rooms that the table names, and no package beyond those that it allows."""
    found = module_level_imports(name)
    assert found & set(ROOMS) == ROOMS[name]
    assert found - set(ROOMS) <= PACKAGES[name]


def test_imports_have_no_cycles():
    above = set()
    for name, imported in ROOMS.items():
        assert imported <= above, name
        above.add(name)


def test_copied_out_pieces_import(tmp_path):
    lines = ["import sys"]
    for name in ROOMS:
        folder = tmp_path / name
        folder.mkdir()
        for file in company(name):
            shutil.copy(ROOT / f"{file}.py", folder)
        lines += [f"sys.path[0] = {str(folder)!r}", f"import {name}",
                  f"assert {name}.__file__.startswith({str(folder)!r})",
                  f"[sys.modules.pop(m, None) for m in {sorted(ROOMS)!r}]"]
    script = tmp_path / "run.py"
    script.write_text("\n".join(lines))
    subprocess.run([sys.executable, str(script)], check=True, cwd=tmp_path, env=ENVIRONMENT)


@pytest.mark.parametrize("name, expected", [
    ("vae", "PSNR"), ("audio_vae", "spectral distance"), ("unet", "859.5 M"), ("dit", "674.8 M"),
    ("mmdit", "2028.3 M"), ("stable_audio", "1057.3 M"), ("media", "True"),
    ("attention", "relative error"), ("ddpm", "ddpm.png"), ("rectified_flow", "rectified_flow.png"),
    ("samplers", "order"), ("times", "circle stable-audio"), ("draw", "in tiles of 16 x 16"),
    ("toys", "2400 of 2400"), ("tones", "240 of 240 pairs"), ("data", "batch.png written"),
    ("cache", "second: 0 pictures encoded"), ("text", "antidisestablis"), ("published", "2028.3 M"),
    ("encoders", "size and crop: 2816"), ("names", "joint_blocks.7.x_block.attn2.q_norm"),
    ("weights", "refused: .../weights.safetensors"), ("offload", "block by block: 0 apart"),
    ("output", "minus-000001-low.wav"),
    ("conditioning", "conditioned on text"), ("run", "continues from step 2"),
    ("machine", "cpu: "), ("settings", "--lr                 0.004"),
    ("sample_settings", "this run is on the path of rf"),
    ("plan", "first, the VAE of runs/shapes-vae: 2,000 steps"),
    ("export", "read back, its latents differ by 0"), ("cli", "--steps 0: refused, --steps 0: must be"),
    ("tasks", "validation {'val_loss'"), ("files", "new, ['file']"), ("folder", "22 for training"),
    ("decoded", "24 decoded"), ("drawings", "35 for training, 4 for validation"),
    ("pictures", "of which 0 differ when read back"), ("sound", "of 8000 samples 8000 read back"),
    ("sounds", "3 decoded, of 0.25 and 0.5 and 0.5 seconds"), ("speech", "208 phrases"),
    ("moe", "0.0% of the tokens without an expert"),
    ("deferred", "on meta: all equal"), ("moments", "__0_0.distcp, __1_0.distcp: read by one process"),
    ("cuts", "a rank holds 464 of 1,368 weights"),
    ("ragged", "6 of 6 read back"), ("mixed", "tokens; validation {'val_loss'"),
    ("pairs", "sound -> picture: 32 of 32 pairs agree"),
    ("ahead", "[7] -> [49], here"), ("shards", "an epoch has each once: True"),
    ("charts", "chart.png written"), ("ema", "the profiles differ by 5.1%"),
    pytest.param("parallel", "sharded, tensor parallel: rank 0 holds", marks=pytest.mark.long),
    pytest.param("ranks", "refused: --seed: 0 on rank 0", marks=pytest.mark.long),
])
def test_demonstrations(server, tmp_path, name, expected):
    statuses, [printed] = server.launch(tmp_path, [[]], str(ROOT / f"{name}.py")).end()
    assert statuses == [0] and expected in printed, printed
    if name == "samplers":
        orders = {"euler": 1, "heun": 2, "plms": 2, "dpm_solver_2": 2, "dpmpp_2m": 2, "dpm_solver_3": 3,
                  "dpmpp_3m": 3, "unipc_2": 3, "unipc_3": 4}
        for line in printed.splitlines()[1:]:
            assert -0.1 < float(line.split()[-1]) - orders[line.split()[1]] < 0.4, line
    if name == "parallel":                   # one loss and one gradient, whatever the layout
        assert len({line.partition(";")[2] for line in printed.splitlines()}) == 1, printed
    if name in ("ddpm", "rectified_flow"):   # samples lie on the data, not only near it
        samples, fresh, noise = map(float, re.findall(r"0\.\d+", printed.splitlines()[-2]))
        assert fresh < samples < 0.08 < 0.3 < noise and (tmp_path / f"{name}.png").is_file()


@pytest.mark.parametrize("module", [settings, sample_settings])
def test_every_flag_has_a_help_text(module, capsys):
    flags = [flag for group in module.FLAGS.values() for flag in group]
    assert len(flags) > 20 and all(len(flag.help) > 10 for flag in flags)
    parse = settings.parse if module is settings else sample_settings.parse_args
    with pytest.raises(SystemExit):
        parse(["--help"])
    printed = capsys.readouterr().out
    assert all(flag.name in printed for flag in flags)


def documents():
    names = ("README.md", "GUIDE.md", "benchmarks/RESULTS.md", "benchmarks/NOTES.md")
    return [ROOT / name for name in names]


def documented_commands():
    text = "\n".join(document.read_text() for document in documents())
    for block in (re.findall(r"```(?:sh|bash)?\n(.*?)```", text, re.S)
                  + re.findall(r"(?:^    .*\n)+", text, re.M)):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("#")[0].split("&&"):
                match = re.match(r"\s*(?:python|.*torchrun .*) (train|sample|encode|pairs)\.py (.*)", part)
                if match:
                    yield match.group(1), shlex.split(match.group(2))
    inline = re.findall(r"`(?:python|torchrun[^`]*) (train|sample|encode|pairs)\.py ([^`]*)`", text)
    for script, flags in inline:
        if "..." not in flags and "--help" not in flags:         # a command as a whole
            yield script, shlex.split(flags)


def test_documented_commands_are_accepted():
    commands = list(documented_commands())
    assert len(commands) >= 8
    for script, flags in commands:
        if script == "train":
            settings.parse(flags)
        elif script == "encode":
            encode.parse_args(flags)
        elif script == "pairs":
            pairs.parse_args(flags)
        else:
            sample_settings.check_flags(sample_settings.parse_args(flags))


def test_documented_commands_of_torchrun_are_accepted():
    """torchrun looks for its own flags, abbreviated too, also among those of the program."""
    text = (ROOT / "GUIDE.md").read_text()
    commands = re.findall(r"^    .*?torchrun (.*)", text, re.M)
    assert len(commands) >= 6
    for command in commands:
        found = torchrun.parse_args(shlex.split(command))
        assert found.training_script in ("train.py", "sample.py") and found.training_script_args


def anchors_of(document):
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", documents(), ids=lambda document: document.name)
def test_links_between_documents_lead_somewhere(document):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()) if "://" not in link]
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        target = document.parent / file if file else document
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def source_files():
    return [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")]


def test_files_are_readable():
    """Lines fit a page, functions a screen or two, and no expression needs to be read twice."""
    for path in source_files():
        text = path.read_text()
        assert all(len(line) <= 110 for line in text.splitlines()), path
        if path.parent == ROOT / "tests":
            continue
        for node in ast.walk(ast.parse(text)):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 90, f"{where} {node.name} is long"
            if isinstance(node, ast.IfExp):
                inner = [n for n in ast.walk(node) if isinstance(n, ast.IfExp) and n is not node]
                assert not inner, f"{where}: nested conditional expressions"
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.GeneratorExp):
                names = getattr(node.targets[0], "elts", [])
                assert len(names) < 4, f"{where}: unpacks a generator into {len(names)} names"
