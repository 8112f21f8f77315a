"""Few steps: MeanFlow, its networks of two times and its sampler, and reflow."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import ON_VAE, draw_two, same, weights

import checkpoints
import dit
import draw
import networks
import sample
import settings
import tasks
import train
import unet
from attention import attention
from cache import PairCache
from conditioning import VALIDATED
from dit import DiT, DiTConfig
from rectified_flow import MeanFlow, RectifiedFlow, ToyNet, like
from samplers import SAMPLERS, gaussian_mixture, guided, inpainting, jump
from unet import UNet, UNetConfig

VARIANCE = 0.3                          # of the Gaussian data whose flow is known


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def variance(t):
    return (1 - t) ** 2 * VARIANCE + t**2


def mean_velocity(xt, t, s=None):
    """Exact for x0 ~ N(0, VARIANCE): the flow scales x by the root of the variance, so u is xt times
    (1 - root) / (t - s), here without the division by zero at s = t."""
    s = t if s is None else s
    slope = -2 * VARIANCE + (VARIANCE + 1) * (t + s)         # (variance(t) - variance(s)) / (t - s)
    return like(slope / (variance(t) + (variance(t) * variance(s)).sqrt()), xt) * xt


def network(cls, double=True, **config):
    """A small network of two times, each parameter of which has a value."""
    if cls is DiT:
        model = DiT(DiTConfig(width=32, depth=2, heads=2, num_classes=3, second_time=True, **config))
    else:
        model = UNet(UNetConfig(widths=(16, 32), groups=8, layers=1, num_classes=3, second_time=True))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2 if p.ndim > 1 else 0.5)
    return model.double().eval() if double else model.eval()


@pytest.fixture
def double_times(monkeypatch):
    """The networks embed times in float32, which is too coarse for finite differences."""
    for module in (dit, unet):
        def embed(t, dim, scale=1000.0, offset=0.0, blur=None):
            frequencies = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
            angles = (scale * t + offset)[:, None] * frequencies
            damping = 1.0 if blur is None else torch.exp(-(scale * blur[:, None] * frequencies) ** 2 / 2)
            return torch.cat([damping * angles.cos(), damping * angles.sin()], 1)
        monkeypatch.setattr(module, "timestep_embedding", embed)


def batch(n=4):
    x0, eps = torch.randn(2, n, 4, 4, 4, dtype=torch.float64)
    return x0, eps, f64(0.9, 0.6, 0.5, 1.0), f64(0.2, 0.6, 0.0, 0.0), torch.tensor([0, 1, 2, 3])


def at(x0, eps, t):
    return (1 - like(t, x0)) * x0 + like(t, x0) * eps


def slope_along(f, x, t, v, h=1e-5):
    """d f(x + h v, t + h) / dh at 0, by a central difference of fourth order."""
    def ahead(step):
        return f(x + step * v, t + step)
    return (8 * (ahead(h) - ahead(-h)) - (ahead(2 * h) - ahead(-2 * h))) / (12 * h)


# ---- the objective

def test_the_identity_on_a_flow_that_is_known():
    """With the exact mean velocity, the right-hand side is the exact velocity, whatever s."""
    x0, eps, t, s, _ = batch()
    velocity = mean_velocity(at(x0, eps, t), t)
    torch.testing.assert_close(velocity, like((t - (1 - t) * VARIANCE) / variance(t), x0) * at(x0, eps, t))
    # the line above: E[eps - x0 | xt], by linear regression
    want = (velocity - (eps - x0)).square().flatten(1).mean(1)
    for second in (s, torch.zeros_like(t), t):
        loss = MeanFlow().loss(mean_velocity, x0, t=t, s=second, eps=eps)
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)           # the output is read in float32
    wrong = MeanFlow().loss(lambda *args, **times: 1.1 * mean_velocity(*args, **times), x0, t=t, s=s, eps=eps)
    assert (wrong - want).abs().min() > 1e-3


@pytest.mark.parametrize("cls", [DiT, UNet])
def test_without_a_jump_it_is_flow_matching(cls):
    """At s = t, in value and in gradient, to the bit."""
    model = network(cls, double=False)
    x0, eps, t, _, y = batch()
    x0, eps, t = x0.float(), eps.float(), t.float()
    gradients = []
    for path, more in ((RectifiedFlow(), {}), (MeanFlow(adaptive=0.0), {"s": t})):
        loss = path.loss(model, x0, t=t, eps=eps, y=y, **more)
        model.zero_grad()
        loss.sum().backward()
        # what only the second time has is not part of the comparison: its gradient is that of a constant
        gradients.append([loss.detach()] + [p.grad.clone() for name, p in model.named_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("cls", [DiT, UNet])
def test_derivative_against_finite_differences(cls, double_times):
    """In float64, through the whole network: embeddings of both times, attention, norms."""
    model = network(cls)
    x0, eps, t, s, y = batch()
    xt = at(x0, eps, t)
    with torch.no_grad():
        rate = MeanFlow.total_derivative(model, xt, t, s, {"y": y})
        velocity = model(xt, t, s=t, y=y)
        want = slope_along(lambda x, time: model(x, time, s=s, y=y), xt, t, velocity)
    jumps = s < t
    assert not rate[~jumps].any() and rate[jumps].abs().min() > 0
    torch.testing.assert_close(rate[jumps], want[jumps], rtol=1e-6, atol=1e-6 * want.abs().max().item())


def test_no_gradient_flows_through_the_derivative(double_times):
    """The gradient is that of |u - target|^2 with a target that is computed apart, by finite differences, and
    weighted by the error as adaptive = 1 does."""
    model = network(DiT)
    x0, eps, t, s, y = batch()
    xt = at(x0, eps, t)
    model.zero_grad()
    MeanFlow().loss(model, x0, t=t, s=s, eps=eps, y=y).sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        rate = slope_along(lambda x, time: model(x, time, s=s, y=y), xt, t, model(xt, t, s=t, y=y))
        target = eps - x0 - like(t - s, x0) * rate
    model.zero_grad()
    error = (model(xt, t, s=s, y=y) - target).square().flatten(1).mean(1)
    (error / (error.detach() + 1e-3)).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-5, atol=1e-7)
    loss = MeanFlow().loss(model, x0, t=t, s=s, eps=eps, y=y)
    torch.testing.assert_close(loss, error, rtol=1e-6, atol=0)          # its value is not weighted


def test_guidance_is_part_of_the_target():
    """A condition y shifts the prediction by y, the null condition, 9, by 9: the guided velocity replaces
    eps - x0, except where the condition is dropped."""
    x0, eps, t, s, y = batch()

    def model(xt, t, s=None, y=None):
        return like(y.double(), xt).expand_as(xt)

    null, dropped = torch.full((4,), 9), torch.tensor([False, True, False, False])
    loss = MeanFlow(guidance=3.0).loss(model, x0, t=t, s=s, eps=eps, uncond={"y": null}, dropped=dropped, y=y)
    target = torch.where(like(dropped, x0), eps - x0, 9 + 3 * (eps - x0 - 9))
    torch.testing.assert_close(loss, (like(y, x0) - target).square().flatten(1).mean(1))
    plain = MeanFlow(guidance=3.0).loss(model, x0, t=t, s=s, eps=eps, y=y)
    torch.testing.assert_close(plain, (like(y, x0) - (eps - x0)).square().flatten(1).mean(1))


def test_training_times():
    """t and s are the later and the earlier of two draws: P(t < a) = P(draw < a)^2; half of them jump."""
    n = 40_000
    times = MeanFlow(density="uniform", jumps=0.25).training_times(n)
    t, s = times["t"], times["s"]
    assert ((s < t).float().mean() - 0.25).abs() < 5 * (0.25 * 0.75 / n) ** 0.5 and (s <= t).all()
    for a in (0.3, 0.7):
        assert abs((t < a).float().mean() - a**2) < 5 * 0.5 / n**0.5
        assert abs((s[s < t] < a).float().mean() - (1 - (1 - a) ** 2)) < 5 * 0.5 / (n / 4) ** 0.5
    assert set(RectifiedFlow().training_times(3)) == {"t"}


@pytest.mark.parametrize("options, message", [
    (dict(prediction="x0"), "prediction x0: a mean is taken of velocities"),
    (dict(loss_space="v"), "loss_space v: a mean is taken"), (dict(jumps=1.5), "jumps 1.5"),
    (dict(guidance=math.nan), "guidance nan")])
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MeanFlow(**options)


# ---- networks of two times

@pytest.mark.parametrize("rows", [5, 150])              # the formula, and what would be a fused kernel
def test_attention_has_a_derivative_in_forward_mode(rows):
    q, k, v, dq, dk, dv = torch.randn(6, 2, 2, rows, 8, dtype=torch.float64)
    angles = torch.randn(rows, 4, dtype=torch.float64)
    norm, mask = torch.rand(8, dtype=torch.float64) + 0.5, torch.rand(2, rows) < 0.7
    mask[:, 0] = True

    def attend(q, k, v):
        return attention(q, k, v, q_norm=norm, k_norm=norm, rope=(angles.cos(), angles.sin()), mask=mask)

    out, rate = torch.func.jvp(attend, (q, k, v), (dq, dk, dv))
    h = 1e-5
    want = (attend(q + h * dq, k + h * dk, v + h * dv) - attend(q - h * dq, k - h * dk, v - h * dv)) / (2 * h)
    torch.testing.assert_close(out, attend(q, k, v))
    torch.testing.assert_close(rate, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("module", [dit, unet])
def test_blur_is_a_mean_over_times(module):
    """A blurred embedding against a sum over a fine grid of Gaussian weights."""
    t, width = torch.tensor([0.5]), 0.01
    offsets = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    weight = (-offsets**2 / 2).softmax(0)
    spread = module.timestep_embedding((t + width * offsets), 16, 1000.0).double()
    got = module.timestep_embedding(t, 16, 1000.0, blur=torch.tensor([width]))[0].double()
    torch.testing.assert_close(got, weight @ spread, rtol=0, atol=1e-4)
    plain = module.timestep_embedding(t, 16)
    assert torch.equal(module.timestep_embedding(t, 16, blur=torch.zeros(1)), plain)


@pytest.mark.parametrize("cls", [DiT, UNet])
def test_a_second_time_begins_without_effect(cls):
    """With the weights of a network of one time, u(xt, t, t) is its velocity to the bit."""
    one, two = [cls(kind(num_classes=3, second_time=second, **small)) for second in (False, True)
                for kind, small in [(DiTConfig, dict(width=32, depth=2, heads=2)) if cls is DiT else
                                    (UNetConfig, dict(widths=(16, 32), groups=8, layers=1))]]
    for p in one.parameters():
        torch.nn.init.normal_(p, std=0.1)
    lacking = two.load_state_dict(one.state_dict(), strict=False)
    assert lacking.missing_keys and all(name.startswith("gap_embed") for name in lacking.missing_keys)
    xt, t, y = torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([0, 1, 3])
    assert torch.equal(one(xt, t, y=y), two(xt, t, y=y, s=t))
    assert torch.equal(one(xt, t, y=y), two(xt, t, y=y))
    assert two(xt, t, y=y, s=0 * t).isfinite().all()


# ---- its sampler

def test_a_jump_is_exact_with_the_exact_mean_velocity():
    """One step, two and four end where the flow does: x shrinks by the root of the variance."""
    path = MeanFlow()
    x = torch.randn(50, 1, 2, 2, dtype=torch.float64)
    denoise = guided(lambda xt, t, s=None: mean_velocity(xt, t.double(), None if s is None else s.double()),
                     path, {})
    for steps in (1, 2, 4):
        torch.testing.assert_close(jump(denoise, path, x, path.times(steps)), VARIANCE**0.5 * x,
                                   rtol=1e-6, atol=0)
    # the other samplers follow the velocity, so they only converge to it
    errors = [(SAMPLERS["heun"](denoise, path, x, path.times(n)) - VARIANCE**0.5 * x).abs().max()
              for n in (1, 64)]
    assert errors[0] > 0.1 > 1e-3 > errors[1]


def test_both_branches_take_the_second_time():
    seen = []

    def model(xt, t, s, y):
        seen.append((t.tolist(), s.tolist(), y.tolist()))
        return like(y.float(), xt).expand_as(xt)

    path, x = MeanFlow(), torch.zeros(2, 1, 1, 1)
    cond, null = {"y": torch.tensor([1, 2])}, {"y": torch.tensor([5, 5])}
    x0, eps = guided(model, path, cond, null, 2.0)(x, torch.tensor(0.75), torch.tensor(0.25))
    assert seen == [([0.75] * 4, [0.25] * 4, [1, 2, 5, 5])]
    assert (eps - x0).flatten().tolist() == [-3.0, -1.0]           # 5 + 2 (y - 5)
    for scale, y in ((1.0, [1, 2]), (0.0, [5, 5])):
        seen.clear()
        guided(model, path, cond, null, scale)(x, torch.tensor(0.75), torch.tensor(0.25))
        assert seen == [([0.75] * 2, [0.25] * 2, y)]


def test_a_jump_keeps_what_is_known_of_a_picture():
    path = MeanFlow()
    known, repaint = torch.randn(1, 1, 2, 2), torch.tensor([[[[True, False], [False, False]]]])
    denoise = guided(lambda xt, t, s=None: mean_velocity(xt, t, s), path, {})
    x = jump(inpainting(denoise, path, known, repaint), path, torch.randn(3, 1, 2, 2), path.times(2))
    torch.testing.assert_close(x[:, 0, 1], known[0, 0, 1].expand(3, 2), rtol=1e-5, atol=1e-5)
    assert (x[:, 0, 0, 0] - known[0, 0, 0, 0]).abs().min() > 1e-3


# ---- runs

MEAN = ["--arch", "dit", *ON_VAE, "--objective", "meanflow", "--init-from", "runs/done"]


def test_a_run_begins_with_the_velocity_of_its_parent(cwd):
    train.main([*MEAN, "--steps", "1", "--lr", "1e-12", "--name", "begun"])
    parent, child = [checkpoints.load_checkpoint(f"runs/{name}") for name in ("done", "begun")]
    before, after = [networks.build_model(c["arch"], c["config"]) for c in (parent, child)]
    before.load_state_dict(parent["ema"])
    after.load_state_dict(child["model"])
    xt, t, y = torch.randn(5, 4, 8, 8), torch.rand(5), torch.arange(5)
    torch.testing.assert_close(after(xt, t, y=y), before(xt, t, y=y), rtol=1e-5, atol=1e-6)
    assert child["objective"] == {"name": "meanflow", "guidance": 1.5}


def test_a_mean_flow_resumes_and_draws(cwd, monkeypatch):
    """A run of 6 steps, and one that ends after 3 and goes on, are the same to the bit. It is drawn in one
    step without --cfg, and in 2 and 4, which are other pictures."""
    flags = [*MEAN, "--cooldown", "0", "--save-every", "3", "--val-every", "2"]
    train.main([*flags, "--steps", "6", "--name", "mean"])
    train.main([*flags, "--steps", "3", "--name", "mean-again"])
    train.main([*flags, "--steps", "6", "--name", "mean-again"])
    for key in ("model", "ema"):
        assert same(weights("runs/mean", key), weights("runs/mean-again", key))
    called = []
    plain = draw.guided
    monkeypatch.setattr(draw, "guided", lambda *args, **options: called.append(args[4]) or
                        plain(*args, **options))
    monkeypatch.setitem(settings.OBJECTIVES, "meanflow", settings.OBJECTIVES["meanflow"]._replace(steps=1))
    drawn = {}
    for steps in (None, 1, 2, 4):
        sample.main(["runs/mean", "--n", "2", "--out", "x.npz", *(["--steps", str(steps)] if steps else [])])
        drawn[steps] = np.load("x.npz")["arr_0"].astype(int)
    assert called == [1.0] * 4 and (drawn[None] == drawn[1]).all()
    assert (drawn[1] != drawn[2]).any() and (drawn[2] != drawn[4]).any()
    for steps in ("1", "3"):                             # whatever the batch size, as with every sampler
        sizes = []
        for size in ("1", "3"):
            sample.main(["runs/mean", "--n", "4", "--steps", steps, "--batch-size", size, "--out", "x.npz"])
            sizes.append(np.load("x.npz")["arr_0"].astype(int))
        assert np.abs(sizes[0] - sizes[1]).max() <= 1
    with pytest.raises(ValueError, match="--sampler jump: needs a run of --objective meanflow"):
        sample.main(["runs/done", "--sampler", "jump", "--out", "y.png"])


@pytest.mark.parametrize("flags, message", [
    (["--arch", "mmdit", "--objective", "meanflow"], "--arch mmdit has no second time; use dit or unet"),
    (["--arch", "dit", "--guidance", "2"], "--guidance 2.0: belongs to --objective meanflow, not rf"),
    (["--arch", "dit", "--objective", "ddpm", "--shift", "2"], "belongs to --objective rf or meanflow"),
    (["--arch", "dit", "--reflow-pairs", "9"], "--reflow-pairs 9: belongs to --reflow RUN"),
    (["--arch", "dit", "--fresh"], "--fresh: belongs to --reflow RUN"),
    (["--arch", "dit", "--reflow", "x", "--objective", "ddpm"], "--reflow x: belongs to --objective rf"),
    (["--arch", "mmdit", "--reflow", "x"], "--reflow x: belongs to --cond class or none, not text"),
    (["--arch", "dit", "--reflow", "x", "--flip"], "--flip: not with --reflow"),
])
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(ValueError, match=message):
        settings.parse(flags)


# ---- reflow

class Uneven(torch.nn.Module):
    """A network whose flow is that of the mixture below, exactly."""

    def __init__(self):
        super().__init__()
        self.denoise = gaussian_mixture(RectifiedFlow(), f64([1.5, 0.0], [-0.8, 1.0], [-0.8, -1.0]), 0.2)

    def forward(self, xt, t):
        x0, eps = self.denoise(xt.double(), t.double()[:, None, None].flatten()[0])
        return (eps - x0).float()


def follow(model, x, steps):
    times = torch.linspace(1, 0, steps + 1)
    with torch.no_grad():
        for t, s in zip(times, times[1:]):
            x = x + (s - t) * model(x, t.expand(len(x)))
    return x


def curvature(model, x1, steps=40):
    """Liu et al.'s straightness: the mean over times and samples of |x1 - x0 - velocity|^2."""
    times = torch.linspace(1, 0, steps + 1)
    x, velocities = x1, []
    with torch.no_grad():
        for t, s in zip(times, times[1:]):
            velocities.append(model(x, t.expand(len(x))))
            x = x + (s - t) * velocities[-1]
    return torch.stack([(x1 - x - v).square().sum(1).mean() for v in velocities]).mean().item()


def test_reflow_straightens_and_keeps_the_pairs():
    """On a mixture of Gaussians: the paper's measure falls, and few steps reach the sample that the noise had
    been paired with, as one step of the first flow does not."""
    first = Uneven()
    noise = torch.randn(4096, 2)
    samples = follow(first, noise, 50)
    model, path = ToyNet(), RectifiedFlow()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 700)
    for _ in range(700):
        i = torch.randint(len(noise), (256,))
        loss = path.loss(model, samples[i], eps=noise[i]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    fresh = torch.randn(1000, 2)
    assert curvature(model, fresh) < 0.25 * curvature(first, fresh)
    paired = follow(first, fresh, 50)
    errors = [(follow(net, fresh, 2) - paired).square().sum(1).mean().item() for net in (first, model)]
    assert errors[1] < 0.25 * errors[0]


def test_pairs_are_drawn_once_and_go_on(tmp_path):
    """An interrupted cache goes on where it was; the result is that of one drawing, to the bit."""
    calls = []

    def draw(part, fail_at=None):
        if part.start == fail_at:
            raise KeyboardInterrupt
        calls.append(list(part))
        return torch.stack([torch.full((1, 2, 2), float(i)) for i in part])

    with pytest.raises(KeyboardInterrupt):
        PairCache(tmp_path / "a.npy", 10, (1, 2, 2), lambda part: draw(part, fail_at=8), {"run": 1},
                  at_once=4)
    assert calls == [[0, 1, 2, 3], [4, 5, 6, 7]]
    pairs = PairCache(tmp_path / "a.npy", 10, (1, 2, 2), draw, {"run": 1}, at_once=4)
    assert calls[2:] == [[8, 9]] and pairs.samples[:, 0, 0, 0].tolist() == list(range(10))
    again = PairCache(tmp_path / "a.npy", 10, (1, 2, 2), None, {"run": 1})            # nothing is drawn
    samples, noise = again.batch(np.array([7, 2]))
    assert samples[:, 0, 0, 0].tolist() == [7, 2] and samples.dtype == torch.float32
    for i, row in zip((7, 2), noise):
        assert torch.equal(row, torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(i)))
    with pytest.raises(ValueError, match="0 of 10 are there"):
        PairCache(tmp_path / "a.npy", 10, (1, 2, 2), None, {"run": 2})
    PairCache(tmp_path / "a.npy", 10, (1, 2, 2), draw, {"run": 2})
    assert calls[3:] == [list(range(10))]
    (tmp_path / "a.npy").write_bytes(b"damaged")
    PairCache(tmp_path / "a.npy", 10, (1, 2, 2), draw, {"run": 2})
    assert len(calls) == 5


REFLOW = ["--arch", "dit", *ON_VAE[:-4], "--reflow", "runs/done", "--reflow-pairs", "44", "--steps", "4",
          "--reflow-steps", "3", "--save-every", "2"]


def test_reflow_from_pairs_that_sample_draws(cwd, monkeypatch):
    """The pairs are the pictures of sample.py; the loss gets each with its own noise and class; a run that is
    interrupted goes on to the bit, also without the run that drew; and it may be reflowed again."""
    seen = []
    plain = RectifiedFlow.loss

    def loss(self, model, x0, **more):
        seen.append((x0, more))
        return plain(self, model, x0, **more)

    monkeypatch.setattr(RectifiedFlow, "loss", loss)
    train.main([*REFLOW, "--reflow-cfg", "1.5", "--name", "reflowed"])
    stamp = json.loads(open("runs/reflowed/pairs.json").read())
    assert stamp["guidance"] == 1.5 and stamp["shape"][0] == 44 + VALIDATED and "done" not in stamp
    pairs = PairCache(cwd / "runs/reflowed/pairs.npy", 44 + VALIDATED, (4, 8, 8), None,
                      {name: value for name, value in stamp.items() if name != "shape"})
    vae = checkpoints.load_vae("runs/done")
    decoded = vae.decode(vae.denormalize(torch.from_numpy(pairs.samples[:12].astype(np.float32))))
    sample.main(["runs/done", "--n", "12", "--cfg", "1.5", "--steps", "3", "--out", "drawn.npz"])
    drawn = torch.from_numpy(np.load("drawn.npz")["arr_0"]).permute(0, 3, 1, 2) / 127.5 - 1
    assert (decoded.clamp(-1, 1) - drawn).abs().max() < 0.02           # float16, and rounding to 8 bits

    everything, noise = pairs.batch(np.arange(44 + VALIDATED))
    classes = len(checkpoints.load_checkpoint("runs/done")["data"]["classes"])
    for x0, more in seen:
        numbers = [(everything == row).flatten(1).all(1).nonzero().item() for row in x0]
        assert torch.equal(more["eps"], noise[numbers])
        assert more["y"].tolist() == [i % classes for i in numbers]    # no label is dropped
    trained = [i for x0, _ in seen if len(x0) == 32 for i in range(len(x0))]
    assert trained and checkpoints.load_checkpoint("runs/reflowed")["label_dropout"] == 0

    # the parent's averaged weights are where it began
    train.main([*REFLOW, "--steps", "1", "--lr", "1e-12", "--name", "reflow-begun"])
    begun, parent = weights("runs/reflow-begun"), weights("runs/done", "ema")
    assert all(torch.allclose(begun[name], parent[name], atol=1e-7) for name in parent)

    # twice: without guidance, which a reflowed run has no branch for
    again = [*REFLOW[:REFLOW.index("runs/done")], "runs/reflowed", *REFLOW[REFLOW.index("runs/done") + 1:]]
    train.main([*again, "--name", "twice"])
    assert json.loads(open("runs/twice/pairs.json").read())["guidance"] == 1
    with pytest.raises(ValueError, match="--reflow-cfg 2: runs/reflowed has no unconditional branch"):
        train.main([*again, "--reflow-cfg", "2", "--name", "guided-twice"])


def test_an_interrupted_reflow_goes_on(cwd, monkeypatch):
    flags = [*REFLOW, "--cooldown", "0"]
    train.main([*flags, "--name", "reflow-whole"])
    plain, calls = tasks.noise_of, []

    def interrupted(part, shape):
        calls.append(part)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(part, shape)

    monkeypatch.setattr(tasks, "noise_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main([*flags, "--steps", "2", "--name", "reflow-parts"])
    assert not open("runs/reflow-parts/pairs.json").read() == open("runs/reflow-whole/pairs.json").read()
    train.main([*flags, "--steps", "2", "--name", "reflow-parts"])
    pairs = [open(f"runs/reflow-{name}/pairs.npy", "rb").read() for name in ("parts", "whole")]
    assert pairs[0] == pairs[1]
    (cwd / "runs/done").rename(cwd / "runs/moved")                     # the run that drew is not needed now
    try:
        train.main([*flags, "--name", "reflow-parts"])
    finally:
        (cwd / "runs/moved").rename(cwd / "runs/done")
    assert same(weights("runs/reflow-parts"), weights("runs/reflow-whole"))


@pytest.mark.parametrize("change, message", [
    (["--reflow", "nowhere"], "--reflow nowhere: no checkpoint there"),
    (["--reflow", "runs/shapes-vae"], "--reflow runs/shapes-vae: is a run of vae; give one of --objective"),
    (["--image-size", "64"], "--reflow runs/done: draws pictures of 32x32; give --image-size 32 32"),
    (["--preset", "small"], "its weights were trained with width 64, not 256"),
    (["--cond", "none"], "--reflow runs/done: its classes are not those of --data shapes"),
])
def test_runs_that_cannot_be_reflowed(cwd, change, message):
    with pytest.raises(ValueError, match=message):
        train.main([*REFLOW, *change, "--name", "refused"])
    draw_two("runs/done")                                              # which is as it was
