"""mmdit.py with a third stream, and pairs.py: what is drawn at which time, what is given, runs that go on."""

import dataclasses
import math
import signal

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import checkpoints
import export
import mmdit
import networks
import pairs
import run
import sample
import sound
import tones
from attention import rotate
from audio_vae import AudioVAE, AudioVAEConfig
from conftest import same
from pairs import Draws, Pair
from rectified_flow import RectifiedFlow
from vae import VAE, VAEConfig

SMALL = dict(width=32, depth=2, heads=2, context_width=24, pooled_width=12, rope=(4, 6, 6), channels=4,
             sound_channels=3)
SHAPES = {"picture": (4, 8, 8), "sound": (3, 1, 12)}


def randomize(model):
    """Zero-initialised layers hide mistakes: give every parameter a value."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.2 if p.ndim > 1 else 0.5)
    return model.double().eval()


def network(**options):
    return randomize(mmdit.MMDiT(mmdit.MMDiTConfig(**SMALL | options)))


def inputs(n=3, **options):
    found = dict(xt=torch.randn(n, 4, 8, 8), t=torch.rand(n), context=torch.randn(n, 5, 24),
                 mask=torch.arange(5) < torch.tensor([3, 5, 1])[:n, None], pooled=torch.randn(n, 12),
                 sound=torch.randn(n, 3, 1, 12), sound_t=torch.rand(n))
    return {name: part.double() if part.is_floating_point() else part
            for name, part in (found | options).items()}


# ---- the third stream

def test_block_of_three_streams_written_out():
    """Against the equations, with a mask and rotary positions; each stream has a condition of its own."""
    config = mmdit.MMDiTConfig(**SMALL)
    block = randomize(mmdit.JointBlock(config, last=False, dual=False))
    parts = {name: torch.randn(2, n, 32).double() for name, n in (("text", 5), ("x", 6), ("sound", 7))}
    conditions = {name: torch.randn(2, 32).double() for name in parts}
    streams = {"text": block.context_block, "x": block.x_block, "sound": block.sound_block}
    rope = [table.double() for table in mmdit.rope_3d(5, 2, 3, (4, 6, 6), 100.0, frames=7)]
    mask = torch.ones(2, 18, dtype=torch.bool)
    mask[0, 3:5] = False
    m = {name: streams[name].adaLN_modulation(conditions[name])[:, None].chunk(6, -1) for name in parts}

    def rms(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    qkv = []
    for name, part in parts.items():
        attn = streams[name].attn
        h = rms(part) * (1 + m[name][1]) + m[name][0]
        q, k, v = (x.unflatten(-1, (2, 16)).transpose(1, 2) for x in attn.qkv(h).chunk(3, -1))
        qkv.append((rms(q) * attn.q_norm, rms(k) * attn.k_norm, v))
    q, k, v = (torch.cat(each, 2) for each in zip(*qkv))
    logits = rotate(q, rope) @ rotate(k, rope).mT / 4
    joint = F.softmax(logits.masked_fill(~mask[:, None, None], -math.inf), -1) @ v
    joint = dict(zip(parts, joint.transpose(1, 2).flatten(2).split([5, 6, 7], 1)))
    wanted = {}
    for name, part in parts.items():
        out = part + m[name][2] * streams[name].attn.proj(joint[name])
        wanted[name] = out + m[name][5] * streams[name].mlp(rms(out) * (1 + m[name][4]) + m[name][3])

    third = mmdit.Sound(parts["sound"], conditions["sound"], conditions["text"])
    found = block(parts["x"], parts["text"], conditions["x"], rope, mask, (2, 3), sound=third)
    for got, name in zip(found, ("x", "text", "sound")):
        torch.testing.assert_close(got, wanted[name], atol=1e-6, rtol=1e-6)


def test_whole_network_against_its_parts():
    """Embedders, conditions and output layers, with blocks that leave all tokens as they are."""
    model = network()
    for block in model.joint_blocks:
        for stream in (block.context_block, block.x_block, block.sound_block):
            nn.init.zeros_(stream.adaLN_modulation[1].weight)
            nn.init.zeros_(stream.adaLN_modulation[1].bias)
    given = inputs()
    conditions = []
    model.joint_blocks[0].context_block.adaLN_modulation.register_forward_hook(
        lambda module, inputs, output: conditions.append(inputs[0]))
    found = model(**given)
    pooled = model.y_embedder(given["pooled"])
    both = model.t_embedder(given["t"]) + model.sound_t_embedder(given["sound_t"])        # of the text
    torch.testing.assert_close(conditions[0], both + pooled)
    for raw, x, t, embedder, times, final, patch in (
            (found[0], given["xt"], given["t"], model.x_embedder, model.t_embedder, model.final_layer,
             (2, 2)),
            (found[1], given["sound"], given["sound_t"], model.sound_embedder, model.sound_t_embedder,
             model.sound_final_layer, (1, 2))):
        grid = x.shape[2] // patch[0], x.shape[3] // patch[1]
        wanted = mmdit.unpatchify(final(embedder(x), times(t) + pooled), grid, patch)
        torch.testing.assert_close(raw, wanted)
        assert raw.shape == x.shape


def cut(model, *names):
    """Nobody learns anything from these streams: their values are zero."""
    for block in model.joint_blocks:
        for name in names:
            stream = getattr(block, name)
            nn.init.zeros_(stream.attn.qkv.weight[64:])
            nn.init.zeros_(stream.attn.qkv.bias[64:])


@torch.no_grad()
def test_what_reads_what():
    """The picture depends on the sound and on its time, unless the values of sound and text are cut off; then
    it depends on them only by how much attention they take, which a mask would remove."""
    model, given = network(), inputs()
    picture, tune = model(**given)
    for change in (dict(sound=given["sound"] + 1), dict(sound_t=given["sound_t"] * 0.5)):
        assert (model(**given | change)[0] - picture).abs().max() > 1e-6
    for change in (dict(xt=given["xt"] + 1), dict(t=given["t"] * 0.5), dict(context=given["context"] + 1)):
        assert (model(**given | change)[1] - tune).abs().max() > 1e-6

    # Without the sound's values and with its keys made equal, its time no longer matters to the picture, nor
    # does the sound itself; the text must not carry its time on.
    cut(model, "sound_block", "context_block")
    for block in model.joint_blocks:
        for stream in (block.sound_block, block.context_block):
            nn.init.zeros_(stream.attn.k_norm)
    picture, tune = model(**given)
    for change in (dict(sound=given["sound"] + 1), dict(sound_t=given["sound_t"] * 0.5)):
        changed = model(**given | change)
        torch.testing.assert_close(changed[0], picture, atol=1e-12, rtol=0)
        assert (changed[1] - tune).abs().max() > 1e-6


def test_without_third_stream_a_plain_network():
    """A network of pairs whose sound is cut off draws the pictures of the network without: the same weights,
    the same names."""
    model = network()
    plain = network(sound_channels=None)
    names = set(plain.state_dict())
    assert names == {name for name in model.state_dict() if "sound" not in name}
    plain.load_state_dict({name: weight for name, weight in model.state_dict().items() if name in names})
    # The text is modulated by both times: that of the sound is taken away.
    nn.init.zeros_(model.sound_t_embedder.mlp[2].weight)
    nn.init.zeros_(model.sound_t_embedder.mlp[2].bias)
    given = inputs()
    only = {name: part for name, part in given.items() if "sound" not in name}
    mask = torch.cat([given["mask"], torch.arange(22).expand(3, -1) < 16], 1)             # not the sound
    for block in model.joint_blocks:
        forward = block.forward
        block.forward = lambda *args, forward=forward, **more: forward(*args[:4], mask, *args[5:], **more)
    torch.testing.assert_close(model(**given)[0], plain(**only), atol=1e-6, rtol=1e-6)


def test_positions_of_a_sound():
    """Its own axis, from 1 on; those of text and picture are as without it."""
    cos, sin = mmdit.rope_3d(3, 2, 4, (4, 6, 6), 100.0, frames=5)
    without = mmdit.rope_3d(3, 2, 4, (4, 6, 6), 100.0)
    assert torch.equal(cos[:11], without[0]) and torch.equal(sin[:11], without[1])
    angles = torch.tensor([4 * 100 ** (-i / 2) for i in range(2)] + [0.0] * 6)
    torch.testing.assert_close(cos[11 + 3], angles.cos())
    torch.testing.assert_close(sin[11 + 3], angles.sin())
    assert len({tuple(row) for row in torch.cat([cos[2:], sin[2:]], 1).tolist()}) == 8 + 5   # (0, 0, 0) twice


def test_samples_are_independent_of_their_batch():
    model, given = network(), inputs()
    order = torch.tensor([2, 0, 1])
    for found, wanted in zip(model(**{name: part[order] for name, part in given.items()}), model(**given)):
        torch.testing.assert_close(found, wanted[order])


def test_starts_at_zero_and_every_weight_learns():
    torch.manual_seed(0)
    model = mmdit.MMDiT(mmdit.MMDiTConfig(**SMALL))
    given = {name: part.float() if part.is_floating_point() else part for name, part in inputs().items()}
    assert all((raw == 0).all() for raw in model(**given))
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    sum(raw.square().sum() for raw in model(**given)).backward()
    # The last block's text is not updated, so what it asks for does not matter.
    still = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert still == ["joint_blocks.1.context_block.attn.q_norm"]


def test_refused_networks_and_inputs():
    for options in (dict(single_depth=1), dict(rope=None, sincos=(8, 12))):
        with pytest.raises(ValueError, match="a sound has a stream in joint blocks only"):
            mmdit.MMDiT(mmdit.MMDiTConfig(**SMALL | options))
    model, given = network(), inputs()
    with pytest.raises(ValueError, match="draw with pairs.py"):
        model(**given | {"sound": None})
    with pytest.raises(ValueError, match="of different sizes"):
        model(**given | {"xt": list(given["xt"])})
    with pytest.raises(ValueError, match="1x11: not a multiple of the patch 1x2"):
        model(**given | {"sound": given["sound"][..., :11]})
    with pytest.raises(ValueError, match="without a stream for sounds"):
        network(sound_channels=None)(**given)


# ---- what is drawn

def test_directions_are_drawn_in_their_shares():
    n = 40_000
    draws = pairs.draw_times(RectifiedFlow(), n)
    times, drawn = draws.times, draws.drawn
    assert torch.equal(times.picture[drawn.picture & drawn.sound], times.sound[drawn.picture & drawn.sound])
    cases = {"both": drawn.picture & drawn.sound, "picture": drawn.picture & ~drawn.sound,
             "sound": drawn.sound & ~drawn.picture}
    assert sum(case.sum() for case in cases.values()) == n
    for name, case in cases.items():
        assert case.float().mean() == pytest.approx(pairs.SHARES[name], abs=0.01)
        assert draws.silent[case].float().mean() == pytest.approx(pairs.NO_TEXT[name], abs=0.015)
    for name, given, other in (("picture", times.sound, times.picture),
                               ("sound", times.picture, times.sound)):
        case = cases[name]
        assert set(given[case].tolist()) == {0.0, 1.0}
        assert given[case].mean() == pytest.approx(pairs.UNKNOWN, abs=0.015)
        assert ((other[case] > 0) & (other[case] < 1)).all()
        # a side is unknown independently of the text
        both = (given[case] == 1) & draws.silent[case]
        assert both.float().mean() == pytest.approx(pairs.UNKNOWN * pairs.NO_TEXT[name], abs=0.015)


class Recorder(nn.Module):
    """In the place of a network: returns zeros, and keeps what it was called with."""

    def text(self, prompts):
        self.prompts = prompts
        codes = torch.tensor([[len(prompt)] for prompt in prompts]).float()
        return {"pooled": codes}

    def forward(self, xt, t, *, pooled, sound, sound_t):
        self.seen = dict(xt=xt, t=t, pooled=pooled, sound=sound, sound_t=sound_t)
        return torch.zeros_like(xt), torch.zeros_like(sound)


def test_loss_only_on_what_is_drawn():
    """With a network that returns 0, the loss of a side is the mean square of its velocity, eps - x0."""
    model, path = Recorder(), RectifiedFlow()
    pair = Pair(torch.randn(4, 4, 8, 8), torch.randn(4, 3, 1, 12))
    draws = Draws(Pair(torch.tensor([0.3, 0.6, 0.0, 1.0]), torch.tensor([0.3, 0.0, 0.7, 0.2])),
                  Pair(torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 0, 1, 1]).bool()),
                  torch.tensor([0, 1, 0, 1]).bool())
    loss = pairs.pair_loss(model, path, pair, ["a", "bb", "ccc", "dddd"], draws)
    torch.manual_seed(0)
    seen = model.seen
    assert seen["pooled"].flatten().tolist() == [1, 0, 3, 0]
    assert torch.equal(seen["sound"][1], pair.sound[1]) and torch.equal(seen["xt"][2], pair.picture[2])
    velocity = Pair((seen["xt"] - pair.picture) / seen["t"].view(-1, 1, 1, 1),
                    (seen["sound"] - pair.sound) / seen["sound_t"].view(-1, 1, 1, 1))      # from xt
    square = Pair(*(v.square().flatten(1).mean(1) for v in velocity))
    wanted = [square.picture[0] + square.sound[0], square.picture[1], square.sound[2], square.sound[3]]
    torch.testing.assert_close(loss, torch.stack(wanted))


def tiny_network():
    config = mmdit.MMDiTConfig(**SMALL | dict(context_width=16, pooled_width=16))
    model = networks.build_model("mmdit", dataclasses.asdict(config),
                                 {"encoder": "bytes", "config": dict(width=16, depth=1, heads=2)})
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "reverse_sde"])
def test_the_given_side_stays_as_it_is(sampler):
    model = tiny_network()
    for side in pairs.SIDES:
        given = {side: torch.randn(3, *SHAPES[side])}
        kept = given[side].clone()
        draw = dict(sampler=sampler, steps=3)
        found = pairs.draw(model, RectifiedFlow(), SHAPES, ["a", "b", ""], range(3), given, **draw)
        assert torch.equal(getattr(found, side), kept)
        # Sample i does not depend on the others, but does on what is given and on its prompt.
        alone = pairs.draw(model, RectifiedFlow(), SHAPES, ["b"], range(1, 2), {side: kept[1:2]}, **draw)
        for got, wanted in zip(alone, found):
            torch.testing.assert_close(got[0], wanted[1], atol=1e-5, rtol=1e-5)
        other = pairs.draw(model, RectifiedFlow(), SHAPES, ["a", "b", ""], range(3), {side: kept + 1}, **draw)
        drawn = 1 - pairs.SIDES.index(side)
        assert (other[drawn] - found[drawn]).abs().amax(tuple(range(1, 4))).min() > 1e-4


def test_euler_on_both_sides_written_out():
    """Guidance away from no text and, where a side is given, from noise in its place at time 1."""
    model, path, times = tiny_network(), RectifiedFlow(), RectifiedFlow().times(4).float()

    def velocities(x, t, known=None, known_t=None, prompt=""):
        text = model.text([prompt])
        if known is None:
            return model(x[0], t, sound=x[1], sound_t=t, **text)
        return model(known, known_t, sound=x[1], sound_t=t, **text)[1:]

    def noise(*numbers):
        return torch.randn(*numbers, generator=generator)

    with torch.no_grad():
        for given in (None, torch.randn(1, *SHAPES["picture"])):
            generator = torch.Generator().manual_seed(7)
            flat = noise(1, 4 * 64 + 36) if given is None else noise(1, 36)
            if given is None:
                x = [flat[:, :256].view(1, 4, 8, 8), flat[:, 256:].view(1, 3, 1, 12)]
            else:
                x = [None, flat.view(1, 3, 1, 12)]
            unknown = None if given is None else noise(1, *SHAPES["picture"])
            for t, s in zip(times, times[1:]):
                with_text = velocities(x, t[None], given, torch.zeros(1), "a red circle")
                without = velocities(x, t[None], unknown, torch.ones(1))
                guided = [b + 1.5 * (a - b) for a, b in zip(with_text, without)]
                if given is None:
                    x = [part + (s - t) * v for part, v in zip(x, guided)]
                else:
                    x = [None, x[1] + (s - t) * guided[0]]
            sides = {} if given is None else {"picture": given}
            found = pairs.draw(model, path, SHAPES, ["a red circle"], range(7, 8), sides, sampler="euler",
                               steps=4, scale=1.5)
            torch.testing.assert_close(found.sound, x[1], atol=1e-4, rtol=1e-4)
            if given is None:
                torch.testing.assert_close(found.picture, x[0], atol=1e-4, rtol=1e-4)


# ---- the data, and reading it back

def test_examples_belong_together_and_are_read_back():
    vae = AudioVAE(AudioVAEConfig(latent_channels=8, widths=(4,) * 5)).eval()
    vae.set_latent_statistics(torch.arange(8.0), torch.full((8,), 4.0))
    sides = {"picture": pairs.Side(VAE(VAEConfig(widths=(8, 16))), (32, 32)),
             "sound": pairs.Side(vae, (1, 4096))}
    images, sounds = (np.stack([side.example(i) for i in range(48)]) for side in sides.values())
    assert pairs.read_pairs(images, sounds, tones.RATE) == (48, 48, 48)
    # one picture and another sound are wrong: neither pair counts
    images[3], sounds[5] = images[4], sounds[6]
    assert pairs.read_pairs(images, sounds, tones.RATE) == (47, 47, 46)
    assert pairs.read_pairs(images, np.zeros_like(sounds), tones.RATE).sounds == 0
    assert not np.array_equal(sounds[0], sides["sound"].example(24))          # the same class, other details
    # Latents are normalised by the statistics of the autoencoder, and come back through it.
    waves = torch.from_numpy(sounds / 32768.0).float()[:, None]
    with torch.no_grad():
        z = vae.encode(waves).mean
        again = vae.decode(z)
    torch.testing.assert_close(sides["sound"].encode(sounds), (z - torch.arange(8.0).view(8, 1, 1)) / 2)
    found = sides["sound"].decode(sides["sound"].encode(sounds))
    np.testing.assert_allclose(found, sound.to_int16(again), atol=2)


# ---- runs

@pytest.fixture(scope="module")
def vaes(tmp_path_factory):
    """Two finished runs of train.py --arch vae, whose steps are not needed here."""
    folder = tmp_path_factory.mktemp("vaes")
    torch.manual_seed(0)
    for name, model, size in (
            ("shapes", VAE(VAEConfig(widths=(8, 16), groups=2)), [16, 16]),
            ("tones", AudioVAE(AudioVAEConfig(latent_channels=8, widths=(4,) * 5)), [1, 4096])):
        state = model.state_dict()
        torch.save({"arch": "vae", "config": dataclasses.asdict(model.config), "objective": None, "step": 1,
                    "data": {"source": name, "size": size, "classes": []}, "label_dropout": 0.0, "vae": None,
                    "model": state, "ema": state,
                    "training": {"optimizer": {}, "rng": None, "data": "", "finished": True}},
                   folder / f"{name}.pt")
    return folder


def train(folder, vaes, *flags):
    return pairs.main(["train", "--picture-vae", str(vaes / "shapes.pt"), "--sound-vae",
                       str(vaes / "tones.pt"), "--runs-dir", str(folder), "--preset", "tiny", "--pairs", "48",
                       "--batch-size", "6", "--steps", "6", "--warmup", "2", "--device", "cpu", *flags])


@pytest.fixture(scope="module")
def trained(vaes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert train(folder, vaes) == 0
    return folder / "pairs"


class Stop(Exception):
    pass


@pytest.mark.parametrize("signalled", [True, False])
def test_resumes_bit_for_bit(trained, vaes, tmp_path, monkeypatch, signalled, capsys):
    """Ended by a signal, which saves; or killed in a later step than the one saved."""
    loss = pairs.pair_loss
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            if not signalled:
                raise Stop
            signal.raise_signal(signal.SIGTERM)
        return loss(*args)

    monkeypatch.setattr(pairs, "pair_loss", interrupted)
    if signalled:
        assert train(tmp_path, vaes) == 128 + 15
        assert "stopped at step 4 of 6" in capsys.readouterr().out
    else:
        with pytest.raises(Stop):
            train(tmp_path, vaes, "--save-every", "2")
    monkeypatch.undo()
    (tmp_path / "moved").mkdir()
    # It goes on with the autoencoders that it began with.
    assert train(tmp_path, tmp_path / "moved") == 0
    found, wanted = (checkpoints.load_checkpoint(folder) for folder in (tmp_path / "pairs", trained))
    assert found["step"] == 6 and found["training"]["finished"]
    for part in ("model", "ema", "sound_vae"):
        a, b = (checkpoint[part].get("state", checkpoint[part]) for checkpoint in (found, wanted))
        assert same(a, b)
    assert torch.equal(found["training"]["rng"], wanted["training"]["rng"])
    assert train(tmp_path, vaes) == 0
    assert "is finished: 6 steps" in capsys.readouterr().out


def test_samples_are_drawn_along_the_path_of_the_training(vaes, tmp_path, monkeypatch):
    shifts = []

    def recorded(function):
        def call(model, path, *args, **kwargs):
            shifts.append(path.shift)
            return function(model, path, *args, **kwargs)
        return call

    monkeypatch.setattr(pairs, "pair_loss", recorded(pairs.pair_loss))
    monkeypatch.setattr(pairs, "draw", recorded(pairs.draw))
    assert train(tmp_path, vaes, "--steps", "2", "--shift", "2.5") == 0
    pairs.main(["sample", str(tmp_path / "pairs"), "--prompt", "a red circle", "--steps", "2", "--out",
                str(tmp_path / "out")])
    assert shifts == [2.5, 2.5, 2.5]
    with pytest.raises(ValueError, match="holds a run with --shift 2.5, not 3"):
        train(tmp_path, vaes, "--steps", "2")


def test_caches_are_used_again(trained, vaes, tmp_path, monkeypatch):
    for name in ("pictures", "sounds"):
        for suffix in (".npy", ".json"):
            (tmp_path / "pairs").mkdir(exist_ok=True)
            (tmp_path / "pairs" / (name + suffix)).write_bytes((trained / (name + suffix)).read_bytes())
    monkeypatch.setattr(pairs, "posteriors", lambda *args: None)              # fails where it is called
    assert train(tmp_path, vaes) == 0
    again = checkpoints.load_checkpoint(tmp_path / "pairs")
    assert same(again["model"], checkpoints.load_checkpoint(trained)["model"])


def test_sample_writes_pairs(trained, tmp_path, capsys):
    out = tmp_path / "both"
    flags = [str(trained), "--steps", "2", "--sampler", "euler"]
    pairs.main(["sample", *flags, "--prompt", "a red circle", "a cyan cross", "--n", "3", "--out", str(out)])
    assert sorted(file.name for file in out.iterdir()) == [f"{i:06d}.{kind}" for i in range(3)
                                                           for kind in ("png", "wav")]
    assert Image.open(out / "000002.png").size == (16, 16)
    assert len(sound.read_sound(out / "000002.wav", tones.RATE)) == 4096
    # What is given is written as it was read, beside what is drawn to it.
    for given, flag in (("000001.png", "--picture"), ("000001.wav", "--sound")):
        pairs.main(["sample", *flags, flag, str(out / given), "--n", "2", "--out", str(tmp_path / flag)])
        suffix = given[-4:]
        for i in range(2):
            assert (tmp_path / flag / f"00000{i}{suffix}").read_bytes() == (out / given).read_bytes()
        other = ".wav" if suffix == ".png" else ".png"
        files = [(tmp_path / flag / f"00000{i}{other}").read_bytes() for i in range(2)]
        assert files[0] != files[1]
    pairs.main(["score", *flags, "--n", "24"])
    printed = capsys.readouterr().out
    assert all(f"{name} " in printed for name in ("autoencoders alone", "text -> both", "picture -> sound",
                                                  "sound -> picture"))


def test_score_counts_what_agrees(trained, monkeypatch, capsys):
    """With perfect drawings, all; the given side is the original, not its reconstruction."""
    def perfect(args, loaded, prompts, seed, given=None):
        sides = {name: np.stack([side.example(10**6 * 24 + i) for i in range(len(prompts))])
                 for name, side in loaded.sides.items()}
        return tuple((sides | (given or {})).values())

    monkeypatch.setattr(pairs, "draw_all", perfect)
    pairs.main(["score", str(trained), "--n", "24"])
    lines = capsys.readouterr().out.splitlines()
    assert all("100.0% of pairs agree; right pictures 24, sounds 24" in line for line in lines[2:])
    assert len(lines) == 5


def test_refused_in_one_line(trained, vaes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shapes, tunes = str(vaes / "shapes.pt"), str(vaes / "tones.pt")
    sample_flags = ["sample", str(trained), "--out", "out"]
    for command, message in (
            (["paint"], "paint: must be one of train, sample, score"),
            (["train"], "--picture-vae is missing: give a run of python train.py --arch vae --data shapes"),
            (["train", "--picture-vae", shapes], "--sound-vae is missing"),
            (["train", "--picture-vae", tunes, "--sound-vae", tunes], "--picture-vae .*of sounds; give"),
            (["train", "--picture-vae", shapes, "--sound-vae", tunes, "--sound-patch", "5"],
             "--sound-patch 5: does not divide the 32 frames"),
            (["train", "--picture-vae", shapes, "--sound-vae", shapes], "--sound-vae .*of pictures; give"),
            (["train", "--picture-vae", "none", "--sound-vae", tunes], "none: no checkpoint there"),
            (["train", "--steps", "0"], "--steps 0: must be"),
            (["train", "--preset", "huge"], "--preset huge: must be one of tiny, small"),
            (["train", "--step", "1"], "did you mean --steps"),
            (["sample", shapes, "--prompt", "a"], "not a run of pairs.py"),
            (sample_flags, "nothing to draw from; give --prompt, --picture or --sound"),
            ([*sample_flags, "--picture", "a.png", "--sound", "b.wav"], "nothing is left to draw"),
            ([*sample_flags, "--picture", "a.png"], "--picture a.png: cannot be read as a picture"),
            ([*sample_flags, "--sound", shapes], "--sound .*shapes.pt: cannot be read as a sound"),
            (["sample", str(trained), "--prompt", "a", "--out", shapes], "--out .*shapes.pt: is a file"),
            (["score", str(tmp_path / "gone")], "no checkpoint there")):
        with pytest.raises((ValueError, OSError), match=message) as raised:
            pairs.main(command)
        assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())
    before = (trained / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="holds a run with --lr 0.0015, not 0.01; repeat its settings"):
        train(trained.parent, vaes, "--lr", "0.01")
    with pytest.raises(ValueError, match="another process is training in this folder"):
        with run.Run(trained).hold():
            train(trained.parent, vaes)
    with pytest.raises(ValueError, match="draws pairs of a picture and a sound, .*; use the run as it is"):
        export.export(str(trained), "out.pt")
    # sample.py knows that this is not its kind of run.
    with pytest.raises(ValueError, match="draw with pairs.py"):
        sample.main([str(trained), "--prompt", "a red circle", "--steps", "1", "--n", "1", "--out", "a.png"])
    assert (trained / "checkpoint.pt").read_bytes() == before and not (tmp_path / "a.png").exists()
