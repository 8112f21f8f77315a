"""Nothing lost: several processes are killed, hang, or meet damaged files and a full disk. Each error is one
line, all processes end, and the run goes on from a whole checkpoint, bit for bit."""

import json
import os
import pickle
import random
import shutil
import signal
import time

import pytest
import torch
from conftest import damage

import checkpoints
import moments
import ranks
import run
from benchmarks import faults
from benchmarks.processes import Server

pytestmark = pytest.mark.long

# What a launch does to itself, by the variable FAULT of its environment: "kind:rank:call of the loss".
SETUP = faults.FEW + """
import os, time, resource
import torch
import train

original, calls = train.Denoising.loss, []

class Poison(torch.autograd.Function):
    forward = staticmethod(lambda context, loss: loss.clone())
    backward = staticmethod(lambda context, gradient: gradient * float("nan"))

def loss(self, model, indices):
    value, t = original(self, model, indices)
    kind, rank, call = os.environ.get("FAULT", "none:0:0").split(":")
    calls.append(1)
    if os.environ["RANK"] == rank and len(calls) == int(call):
        if kind == "hang":
            time.sleep(600)
        if kind == "stop":
            os.kill(os.getpid(), 19)
        if kind == "nan":
            value = Poison.apply(value)
        if kind == "term":
            os.kill(os.getpid(), 15)
        if kind == "full":          # no file may become longer than this
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    return value, t

train.Denoising.loss = loss
load_data = train.load_data

def load(*args, **more):
    data = load_data(*args, **more)
    if os.environ.get("FAULT") == "data:%s:0" % os.environ["RANK"]:
        data.fingerprint = "of other pictures"
    return data

train.load_data = load
"""
STEPS = ["--steps", "12", "--save-every", "4", "--warmup", "2"]
RUN = "runs/pictures-dit-rf"
LOSSES = f"{RUN}/metrics.jsonl"
LAYOUTS = {"data": [], "shard": ["--shard"]}


@pytest.fixture(scope="module")
def server():
    with Server(SETUP) as server:
        yield server


@pytest.fixture(scope="module")
def place(server, tmp_path_factory):
    """A folder with pictures, and in a folder by layout, a run that nothing has disturbed."""
    place = tmp_path_factory.mktemp("faults")
    faults.draw_pictures(place / "pictures")
    for name, flags in LAYOUTS.items():
        (place / name).mkdir()
        (place / name / "pictures").symlink_to(place / "pictures")
        if name == "shard":
            shutil.copytree(place / "data/runs/pictures-vae", place / "shard/runs/pictures-vae")
        statuses, printed = start(server, place / name, flags).end()
        assert statuses == [0, 0], printed
    return place


def words(flags, *more):
    return ["--arch", "dit", *faults.TINY, *STEPS, *flags, *more]


def start(server, folder, flags, *more, **environment):
    return server.launch(folder, [words(flags, *more)] * 2, **environment)


def begin(place, tmp_path, layout=None):
    """A folder with the VAE alone or, with a layout, a copy of its finished run."""
    (tmp_path / "pictures").symlink_to(place / "pictures")
    if layout is None:
        shutil.copytree(place / "data/runs/pictures-vae", tmp_path / "runs/pictures-vae")
    else:
        shutil.copytree(place / layout / "runs", tmp_path / "runs")
    return tmp_path


def goes_on(server, place, folder, layout, *more):
    """The same command ends in the bits of the run that nothing has disturbed."""
    statuses, printed = start(server, folder, LAYOUTS[layout], *more).end()
    assert statuses == [0, 0], printed
    assert faults.equal(folder / RUN, place / layout / RUN)


def one_line(launch, message, expected=(2, 2)):
    statuses, printed = launch.end()
    assert tuple(statuses) == expected, printed
    assert "Traceback" not in "".join(printed), printed
    assert len(launch.errors()) == 1 and message in launch.errors()[0], printed


# ---- kills

@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_at_any_moment_and_in_a_save(server, tmp_path, layout):
    """The short form of benchmarks/faults.py."""
    faults.draw_pictures(tmp_path / "pictures")
    victim = faults.Victim(server, tmp_path, layout, LAYOUTS[layout], 12, 2)
    rng = random.Random(0)
    for rank, in_save in ((0, True), (None, False), (1, True)):
        assert victim.kill(rng, rank, in_save) == ""
    assert victim.finish() == ""


def test_killed_before_a_checkpoint_names_the_folder_of_its_optimizer(server, place, tmp_path):
    """The folder of a save that never came to its end is not used, and goes with the next one."""
    folder = begin(place, tmp_path)
    launch = start(server, folder, LAYOUTS["shard"], FAULT="stop:1:7")
    launch.wait_for(LOSSES, 6)
    for rank in (0, 1):
        launch.kill(rank)
    launch.end()
    assert checkpoints.load_checkpoint(folder / RUN)["step"] == 4
    assert checkpoints.damage(folder / RUN / "checkpoint.pt") is None
    torn = folder / RUN / "optimizer-000008"
    torn.mkdir()
    (torn / "__1_0.distcp").write_bytes(b"half of it")
    goes_on(server, place, folder, "shard")
    assert [path.name for path in (folder / RUN).glob("optimizer-*")] == ["optimizer-000012"]


# ---- a rank that does not come

@pytest.mark.parametrize("layout, kind, rank, message", [
    ("data", "hang", 1, "rank 1, which is at "), ("shard", "hang", 0, "rank 0, which is at "),
    ("data", "stop", 1, "rank 1, which does not answer"),
    ("shard", "stop", 0, "rank 0 has not come within 3 ")])
def test_a_rank_that_hangs_is_named(server, place, tmp_path, layout, kind, rank, message):
    folder = begin(place, tmp_path)
    launch = start(server, folder, LAYOUTS[layout], FAULT=f"{kind}:{rank}:6", RANK_PATIENCE="3")
    while launch.running() and launch.statuses[1 - rank] is None:
        time.sleep(0.05)
    launch.kill(rank)                                  # as torchrun ends what is left
    statuses, printed = launch.end()
    assert statuses[1 - rank] == 2 and statuses[rank] != 0
    assert len(launch.errors()) == 1 and message in launch.errors()[0], printed
    assert "Traceback" not in "".join(printed) and checkpoints.load_checkpoint(folder / RUN)["step"] == 4
    goes_on(server, place, folder, layout)


def test_a_process_that_hangs_ends_by_itself(server, place, tmp_path):
    folder = begin(place, tmp_path)
    launch = start(server, folder, [], FAULT="hang:1:6", RANK_PATIENCE="2")
    one_line(launch, "rank 1, which is at ")


@pytest.mark.parametrize("text", ["0", "soon", "-3", "nan"])
def test_a_patience_that_is_none(monkeypatch, text):
    monkeypatch.setenv("RANK_PATIENCE", text)
    with pytest.raises(ValueError, match=f"RANK_PATIENCE is {text}; give seconds"):
        ranks.patience_asked()


# ---- numbers that are none, signals, full disks, two launches

@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_in_the_gradient_of_one_rank(server, place, tmp_path, layout):
    folder = begin(place, tmp_path)
    launch = start(server, folder, LAYOUTS[layout], FAULT="nan:1:7")
    one_line(launch, "gradient norm nan at step 7")
    assert "it continues from step 4" in launch.errors()[0]
    goes_on(server, place, folder, layout)


def test_sigterm_to_all_saves_a_sharded_run(server, place, tmp_path):
    folder = begin(place, tmp_path)
    launch = start(server, folder, LAYOUTS["shard"])
    launch.wait_for(LOSSES, 5)
    for rank in (0, 1):
        launch.kill(rank, signal.SIGTERM)
    statuses, printed = launch.end()
    assert statuses == [143, 143] and "Traceback" not in "".join(printed)
    step = checkpoints.load_checkpoint(folder / RUN)["step"]
    logged = max(json.loads(line)["step"] for line in open(folder / RUN / "metrics.jsonl"))
    assert 5 <= step == logged < 12 and f"stopped at step {step} of 12, saved" in printed[0]
    goes_on(server, place, folder, "shard")


@pytest.mark.parametrize("layout, rank", [("data", 1), ("shard", 0)])
def test_sigterm_to_one_rank_ends_all_with_the_step_that_it_comes_in(server, place, tmp_path, layout, rank):
    folder = begin(place, tmp_path)
    launch = start(server, folder, LAYOUTS[layout], FAULT=f"term:{rank}:6")
    statuses, printed = launch.end()
    assert statuses == [143, 143] and "Traceback" not in "".join(printed)
    assert checkpoints.load_checkpoint(folder / RUN)["step"] == 6
    goes_on(server, place, folder, layout)


def test_ranks_that_see_other_data_are_refused(server, place, tmp_path):
    folder = begin(place, tmp_path)
    launch = start(server, folder, [], FAULT="data:1:0")
    one_line(launch, "the data: ")
    assert "on rank 1; start all processes with the same command" in launch.errors()[0]
    assert not (folder / RUN / "settings.json").exists()


@pytest.mark.parametrize("layout, rank", [("data", 0), ("shard", 0), ("shard", 1)])
def test_a_full_disk_ends_all_and_keeps_the_checkpoint(server, place, tmp_path, layout, rank):
    folder = begin(place, tmp_path)
    launch = start(server, folder, LAYOUTS[layout], FAULT=f"full:{rank}:6")
    one_line(launch, "cannot write ")
    assert checkpoints.load_checkpoint(folder / RUN)["step"] == 4
    goes_on(server, place, folder, layout)


def test_a_second_launch_in_a_folder_is_refused(server, place, tmp_path):
    folder = begin(place, tmp_path)
    first = start(server, folder, LAYOUTS["shard"])
    first.wait_for(LOSSES, 1)
    other = tmp_path / "other"                         # for what it prints
    other.mkdir()
    for name in ("pictures", "runs"):
        (other / name).symlink_to(tmp_path / name)
    second = start(server, other, LAYOUTS["shard"])
    one_line(second, "another process is training in this folder")
    assert first.end()[0] == [0, 0] and faults.equal(folder / RUN, place / "shard" / RUN)


# ---- damaged and hostile files

def step_of(folder):
    return folder / RUN / "checkpoint.pt"


@pytest.mark.parametrize("how", ["cut", "text", "bit"])
def test_a_damaged_checkpoint_is_one_line(server, place, tmp_path, how):
    folder = begin(place, tmp_path, "data")
    content = bytearray(step_of(folder).read_bytes())
    content[len(content) // 2] ^= 1
    step_of(folder).write_bytes(content)
    if how != "bit":
        damage(step_of(folder), how)
    launch = start(server, folder, [], "--steps", "14")
    one_line(launch, "checkpoint.pt: ")


@pytest.mark.parametrize("how", ["cut", "bit", "missing"])
@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata"])
def test_a_damaged_folder_of_the_optimizer_is_one_line(server, place, tmp_path, name, how):
    folder = begin(place, tmp_path, "shard")
    file = folder / RUN / "optimizer-000012" / name
    if how == "bit":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        damage(file, how)
    launch = start(server, folder, ["--shard"], "--steps", "14")
    one_line(launch, "checkpoint.pt: damaged: ")
    assert "optimizer-000012" in launch.errors()[0]


class Program:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_the_optimizers_folder_starts_no_program(tmp_path):
    folder = tmp_path / "optimizer-000001"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Program(tmp_path / "started")))
    with pytest.raises(ValueError, match="metadata: damaged, or changed by .*mkdir is no part"):
        moments.read_metadata(folder)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("change", [{"folder": "../other"}, {"folder": 3}, {"tensor": 10**12}, {"sha256": 3},
                                    {"sha256": {"../x": ""}}, {"tensor": "1"}])
def test_an_entry_of_the_optimizer_that_was_changed(tmp_path, change):
    entry = {"folder": "optimizer-000001", "tensor": 1, "sha256": {}}
    assert "is missing or not complete" in moments.damage_of(tmp_path, entry)
    assert moments.damage_of(tmp_path, entry | change).startswith("its optimizer is ")


@pytest.mark.parametrize("name, expected", [("3.png", [0, 0]), ("3.txt", [2, 2])])
def test_a_damaged_picture_or_caption_is_one_line(server, place, tmp_path, name, expected):
    """A picture is passed over with a warning, a caption that is no text is an error; either once."""
    folder = tmp_path / "own"
    folder.mkdir()
    shutil.copytree(place / "pictures", folder / "pictures")
    for i in range(24):
        (folder / f"pictures/{i}.txt").write_text(f"shape {i}")
    (folder / "pictures" / name).write_bytes(b"\xff\xfe\x00broken")
    flags = ["--cond", "text", "--arch", "mmdit", "--steps", "2"]
    launch = server.launch(folder, [words([], *flags)] * 2)
    statuses, printed = launch.end()
    assert statuses == expected and "Traceback" not in "".join(printed), printed
    assert printed[1] == "" and printed[0].count(name) == 1, printed
    assert len(launch.errors()) == int(name == "3.txt")


# ---- checkpoints that are kept

def test_kept_checkpoints_have_their_optimizer_and_one_can_be_copied_back(server, place, tmp_path):
    folder = begin(place, tmp_path)
    goes_on(server, place, folder, "shard", "--keep", "2")
    found = {path.name for path in (folder / RUN).glob("*-0*") if path.suffix != ".png"}
    assert found == {"checkpoint-000008.pt", "checkpoint-000012.pt", "optimizer-000008", "optimizer-000012"}
    step_of(folder).write_bytes(step_of(folder).read_bytes()[:5000])       # of both names of that file
    launch = start(server, folder, ["--shard"], "--keep", "2")
    one_line(launch, "; checkpoint-000008.pt beside it is whole: copy it to checkpoint.pt to "
                                   "continue from step 8")
    shutil.copy(folder / RUN / "checkpoint-000008.pt", step_of(folder))
    goes_on(server, place, folder, "shard", "--keep", "2")


def test_no_kept_checkpoint_goes_before_the_new_one_is_read_back(tmp_path, capsys, monkeypatch):
    folder = run.Run(tmp_path)
    for step in (1, 2):
        folder.save({"step": step, "weights": torch.ones(1000)})
        folder.keep_latest(step, 1)
    assert list(folder.kept()) == [2]
    keep = run.Run.keep

    def rot(self, name):
        keep(self, name)
        content = bytearray((tmp_path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / name).write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "keep", rot)
        folder.save({"step": 3, "weights": torch.ones(1000)})
        folder.keep_latest(3, 1)
    assert list(folder.kept()) == [2, 3]
    assert "checkpoint-000003.pt: damaged" in capsys.readouterr().err
    folder.save({"step": 4, "weights": torch.ones(1000)})
    folder.keep_latest(4, 1)
    assert list(folder.kept()) == [4]


def test_a_checkpoint_that_is_missing_is_not_begun_anew(place, tmp_path):
    shutil.copytree(place / "data" / RUN, tmp_path / "run")
    folder = run.Run(tmp_path / "run")
    folder.keep_latest(12, 1)
    folder.checkpoint.unlink()
    with pytest.raises(ValueError, match="checkpoint.pt is missing; checkpoint-000012.pt beside it is whole: "
                       "copy it to checkpoint.pt to continue from step 12"):
        folder.load()
