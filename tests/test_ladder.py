"""benchmarks/ladder.py: rungs that share a VAE and trainings, measured once, and the table of their rows."""

import json
from pathlib import Path

import pytest
from benchmarks import candidates, compare, ladder
from test_compare import tiny  # noqa: F401  (a fixture: tiny pictures, programs in this process)

import sample_settings
import settings
import train

TINY = ("--preset", "tiny", "--batch-size", "8")


def test_every_command_is_one_that_the_programs_accept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, files = set(), {}
    for base in ladder.BASES:
        whole = ladder.Ladder(base, Path("runs"), Path("r.jsonl"), Path("data"), 2000)
        for name in ladder.rungs_of(base):
            rung = ladder.RUNGS[name]
            vae, network, drawn = whole.commands(rung, 3)
            vae = settings.parse(vae[1:])
            if rung.candidate:
                assert rung.candidate in candidates.CANDIDATES and network[0] == "benchmarks/candidates.py"
                assert drawn[:3] == ["benchmarks/candidates.py", rung.candidate, "sample.py"]
                network, drawn = network[2:], drawn[2:]
            args = settings.parse(network[1:])
            assert Path(args.vae) == Path(vae.runs_dir, vae.name)
            # The VAE trained apart is the one that the network's command would train without --vae, except
            # that in such a command --cooldown is the network's.
            flags = [*whole.base.train, *whole.shared_flags(rung), *whole.vae_flags(rung),
                     "--vae-steps", "4500"]
            own = settings.vae_settings(settings.parse(flags), None)
            differ = {key for key in settings.SAME_VAE if getattr(own, key) != getattr(vae, key)}
            assert differ == {"cooldown"} & {flag.removeprefix("--") for flag in whole.vae_flags(rung)}
            assert (own.runs_dir, own.name, own.steps) == (vae.runs_dir, vae.name, 4500)
            assert args.seed == 3 and args.steps == whole.steps(rung)
            whole.run(rung, 3).mkdir(parents=True, exist_ok=True)
            drawn = sample_settings.parse_args(drawn[1:])
            sample_settings.check_flags(drawn)
            if drawn.guide:                                        # a checkpoint that the run keeps
                assert int(Path(drawn.guide).stem.removeprefix("checkpoint-")) % args.save_every == 0
                assert args.keep * args.save_every >= args.steps - 8
            assert files.setdefault(drawn.out, (network, rung.sample)) == (network, rung.sample)
            assert Path(drawn.out).parent == Path(args.runs_dir, args.name)
            names.add((base, str(drawn.out)))
    # No two rungs of a base are the same commands.
    assert len(names) == sum(len(ladder.rungs_of(base)) for base in ladder.BASES)
    assert "smaller" in ladder.rungs_of("dit") and "smaller" not in ladder.rungs_of("dit-small")
    # What a base has already is no rung of it.
    together = set(ladder.rungs_of("dit-together"))
    assert {"noisy-2", "half-rate", "without-rate", "without-noise", "latent-noise"} <= together
    assert not together & {"smaller", "full-cooldown", "double-rate", "stronger-kl", "vae-full-cooldown",
                           "noisy-1.8", "full-cooldown-noisy-2", "guidance-2.1", "average-0.06"}
    assert not {"without-rate", "without-noise"} & set(ladder.rungs_of("dit"))
    assert {"guidance-2.5", "no-cooldown"} <= set(ladder.rungs_of("unet-together"))


def test_rungs_that_differ_in_training_have_runs_of_their_own():
    whole = ladder.Ladder("dit", Path("runs"), Path("r.jsonl"), Path("data"), 2000)
    runs = {}
    for rung in ladder.RUNGS.values():
        training = (rung.vae, rung.train, rung.candidate)
        assert runs.setdefault(whole.run(rung, 0), training) == training
    assert len({whole.run(ladder.RUNGS["default"], seed) for seed in range(3)}) == 3


@pytest.fixture
def small(tiny, monkeypatch):                                      # noqa: F811
    rungs = {"default": ladder.Rung("the defaults"),
             "weaker": ladder.Rung("less guidance", sample=("--cfg", "1.5")),
             "average": ladder.Rung("a short average", train=("--ema", "0.03")),
             "guided": ladder.Rung("autoguidance", sample=("--guide", "RUN/checkpoint-QUARTER.pt")),
             "noise": ladder.Rung("noise on the latent", vae=("--latent-noise", "0.5"))}
    monkeypatch.setattr(ladder, "RUNGS", rungs)
    monkeypatch.setattr(ladder, "call", compare.call)
    plain = ladder.Ladder.__init__

    def init(self, *args):
        plain(self, *args, extra=TINY, vae_steps=3, steps=8)

    monkeypatch.setattr(ladder.Ladder, "__init__", init)
    vae_command = ladder.Ladder.vae_command
    monkeypatch.setattr(ladder.Ladder, "vae_command",
                        lambda self, rung: [*vae_command(self, rung), "--vae-preset", "tiny"])
    return tiny


FLAGS = ["--results", "results/l.jsonl", "--runs-dir", "runs", "--n", "20"]


def lines():
    return [json.loads(line) for line in open("results/l.jsonl")]


@pytest.mark.long
def test_rungs_are_measured_once_and_share_what_they_can(small, capsys):
    assert ladder.main(FLAGS) == 0
    trained = [command for command in small if command[0] == "train.py"]
    # two VAEs; the default's network, which "weaker" shares, that of the average, and that of the noise
    kinds = [command[command.index("--arch") + 1] for command in trained]
    assert kinds == ["vae", "dit", "dit", "vae", "dit"]
    assert [command[0] for command in small].count("sample.py") == 5
    records = lines()
    assert [record["cell"] for record in records] == ["default", "weaker", "average", "guided", "noise"]
    for record in records:
        assert record["vae"]["processor_seconds"] == record["network"]["processor_seconds"] == 12
        assert 0 <= record["agreement"] <= 1 and record["frechet"] >= 0 and record["n"] == 20
        assert record["floor"]["psnr"] > 0 and {"device", "date", "versions", "commit"} <= set(record)
        assert {"device", "commit"} <= set(record["network"])
        assert len(record["commands"]) == 3
    assert records[0]["network"] == records[1]["network"] and records[0]["floor"] != records[4]["floor"]
    assert not [*Path("runs").rglob("*.npz")]

    before = open("results/l.jsonl").read()
    small.clear()
    assert ladder.main(FLAGS) == 0 and not small and open("results/l.jsonl").read() == before
    capsys.readouterr()
    assert ladder.main([*FLAGS, "--list", "--seeds", "0", "1"]) == 0
    printed = capsys.readouterr().out
    assert "---- noise, seed 0: done" in printed and "---- noise, seed 1: not done" in printed
    assert "    python sample.py runs/default/dit-1 --cfg 1.5" in printed
    assert ladder.main([*FLAGS, "--table"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 5


def test_minutes_of_another_training_are_not_made_up(small, capsys):
    whole = ladder.Ladder("dit", Path("runs"), Path("results/l.jsonl"), Path("data"), 20)
    rung = ladder.RUNGS["default"]
    train.main(whole.vae_command(rung)[1:])
    assert ladder.main([*FLAGS, "--rungs", "default"]) == 1
    assert "was trained by another program, so its minutes are not known" in capsys.readouterr().err
    assert not Path("results/l.jsonl").exists()


def record(cell, agreement, frechet, seed=0, threads="1 thread"):
    spent = [{"processor_seconds": seconds, "wall_seconds": 2 * seconds, "device": f"a, {threads}",
              "commit": "abc"} for seconds in (60, 540)]
    return {"study": "dit", "cell": cell, "seed": seed, "agreement": agreement, "frechet": frechet,
            "vae": spent[0], "network": spent[1], "floor": {"frechet": 1.25}, "commit": "def"}


def test_a_cpu_without_bf16_has_rows_of_its_own(monkeypatch):
    for name, study in (("a, 1 thread", "dit"), (f"a{compare.WITHOUT_BF16}, 1 thread", "dit without bf16"),
                        ("NVIDIA X1", "dit")):
        monkeypatch.setattr(ladder, "device_name", lambda name=name: name)
        whole = ladder.Ladder("dit", Path("runs"), Path("r.jsonl"), Path("data"), 20)
        assert whole.study == study and ladder.base_of(study) is ladder.BASES["dit"]


def test_the_table():
    rows = [record("default", 0.95, 6.0), record("default", 0.97, 5.0, seed=1),
            record("constant-average", 0.966, 4.2, threads="2 threads"),
            record("default", 0.1, 99.0) | {"study": "unet"}]
    head, _, default, average = ladder.table(rows, "dit").splitlines()
    figures = "| 10 | 0.960 (0.950 to 0.970) | 5.50 (5.00 to 6.00) |  | yes | 1.25 | 1 of 2 | abc |"
    assert default.endswith(figures)                               # 0.97 with 5.0 meets both, 0.95 neither
    assert average.startswith("| the weights are averaged with a constant decay, the former default "
                              "(`--ema 0.998`) |")
    assert "| 20.0 on two cores | 0.966 (one seed) | 4.20 (one seed) | +0.016, -1.80 " in average
    assert "| no, its opposite | 1.25 | 1 of 1 |" in average
    other = record("muon", 0.99, 3.0, seed=7)                      # no default of this seed
    other["network"] = other["network"] | {"device": "NVIDIA X1"}
    mixed = record("default", 0.9, 9.0)
    mixed["vae"] = mixed["vae"] | {"device": "a, 2 threads"}
    assert ladder.took([mixed]) == "9, and the VAE's" and ladder.took([mixed, rows[0]]) == "10"
    lacking = f"dit{compare.WITHOUT_BF16}"                          # has a default of its own
    slower = [row | {"study": lacking} for row in (record("default", 0.93, 7.0), rows[2])]
    assert ladder.table([*rows, *slower], "dit") == ladder.table(rows, "dit")
    assert "| +0.036, -2.80 |" in ladder.table([*rows, *slower], lacking)
    assert ladder.table([], "dit") == ""
    for base, is_default in (("dit-small", "no"), ("dit-one-core", "yes")):
        first = ladder.table([rows[0] | {"study": base}], base).splitlines()[-1]
        assert f"| {ladder.BASES[base].what} | 10 |" in first and f"|  | {is_default} | 1.25 |" in first
    later = record("default", 0.97, 5.0, seed=1)
    later["network"]["commit"] = "ghi"
    assert ladder.table([rows[0], later], "dit").endswith("| abc, ghi |")
    assert ladder.table([*rows, other], "dit").splitlines()[-1].startswith(
        "| Muon for the matrices, whose steps take longer (`benchmarks/candidates.py muon`) | on NVIDIA X1 "
        "| 0.990 (one seed) | 3.00 (one seed) |  | no |")
    assert ladder.against_targets(rows, "dit") == (
        "The first row against the targets: agreement 0.960, missed by 0.005 (target 0.965); distance 5.50, "
        "missed by 0.50 (target 5); floor 1.25, missed by 0.05 (target 1.2); minutes on two cores not "
        "measured (target 15).")
    timed = [*rows, record("default", 0.97, 5.0, seed=2, threads="2 threads")]
    assert ladder.against_targets(timed, "dit").endswith(
        "; minutes on two cores 20.0, missed by 5.0 (target 15).")
    assert "| 10, 20.0 on two cores | 0.963" in ladder.table(timed, "dit")
    assert ladder.against_targets(rows[1:2], "dit").startswith(
        "The first row against the targets: agreement 0.970, met (target 0.965); distance 5.00, met "
        "(target 5);")
    narrow = [record("default", agreement, 5.0) for agreement in (0.965, 0.9648)]
    assert "agreement 0.9649, missed by 0.0001 (target 0.965)" in ladder.against_targets(narrow, "dit")
    assert ladder.against_targets([row | {"study": "dit-short"} for row in rows], "dit-short") == ""
    assert ladder.against_targets(rows, "dit-small") == ""
