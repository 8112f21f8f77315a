"""The schedulers and models of diffusers (an independent implementation) against ours, in float64."""

import importlib
import re
import sys
import types

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="pip install diffusers, for the comparison with published code")
from diffusers import (AutoencoderKL, DiTTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel,
                       UNet2DConditionModel, schedulers)
from diffusers.models import attention_processor, normalization
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

import dit
import mmdit
import names
import published
import stable_audio
import unet
import vae
import weights
from ddpm import DDPM, Circle
from rectified_flow import RectifiedFlow
from samplers import (SAMPLERS, ddim, ddpm, dpm2_ancestral, dpm_solver_2, dpm_solver_3, dpmpp_2m,
                      dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde, dpmpp_sde, euler, gaussian_mixture, heun, lms,
                      plms)
from times import (beta_sigma_times, beta_times, karras_times, log_snr_times, sd3_times, sd_times, sdxl_times,
                   flux_shift, stable_audio_times, stretched)

pytestmark = [pytest.mark.optional,
              pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]   # theirs
SCHEDULES = {"linear": dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
             "scaled_linear": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
             "cosine": dict(beta_schedule="squaredcos_cap_v2")}
SD = SCHEDULES["scaled_linear"]
MEANS = torch.tensor([[1.1, 0.2, -0.4], [-0.9, 0.8, 0.1], [0.1, -1.2, 0.6]], dtype=torch.float64)
PATH = DDPM()
X = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Wide:
    """A module whose float32 is float64: diffusers rounds its tables and states to float32 by name."""

    def __init__(self, module, wide):
        self.module, self.float32 = module, wide

    def __getattr__(self, name):
        return getattr(self.module, name)


@pytest.fixture
def scheduler(monkeypatch):
    """A function: scheduler of that name, computing in float64."""
    def build(name, steps=None, **config):
        found = getattr(schedulers, name)
        module = __import__(found.__module__, fromlist=["torch"])
        monkeypatch.setattr(module, "torch", Wide(torch, torch.float64))
        if hasattr(module, "np"):
            monkeypatch.setattr(module, "np", Wide(np, np.float64))
        built = found(**config)
        if steps:
            built.set_timesteps(steps)
        return built
    return build


def mixture(path):
    return gaussian_mixture(path, MEANS, 0.4)


def follow(scheduler, x, path=PATH, prediction="eps", noise=None):
    """The scheduler's trajectory under the exact denoiser. Its sigmas are sigma / alpha, or t on the straight
    path; its states x, or x / alpha where it has a scale_model_input that divides."""
    states = []
    for i, timestep in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "sigmas"):
            if scheduler.step_index is None:
                scheduler._init_step_index(timestep)
            sigma = scheduler.sigmas[scheduler.step_index]
            t = sigma if isinstance(path, RectifiedFlow) else path.t_at(-sigma.log())
        else:
            t = (timestep.double() + 1) / 1000
        inside = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        x0, eps = mixture(path)(inside, t)
        options = {} if noise is None else {"variance_noise": noise[i]}
        x = scheduler.step(eps if prediction == "eps" else eps - x0, timestep, x, **options).prev_sample
        states.append(x)
    return states


def ours(sampler, path, x, times, **options):
    states = []
    sampler(mixture(path), path, x, times, on_step=lambda i, x, x0: states.append(x), **options)
    return states


def times_of(scheduler):
    return torch.cat([(scheduler.timesteps.double() + 1) / 1000, torch.zeros(1, dtype=torch.float64)])


def error(a, b):
    return max(((x - y).norm() / y.norm()).item() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", SCHEDULES)
def test_alphas_cumprod(scheduler, name):
    want = scheduler("DDPMScheduler", **SCHEDULES[name]).alphas_cumprod
    assert want.dtype == torch.float64
    torch.testing.assert_close(DDPM(schedule=name).table[0, 1:], want, rtol=1e-12, atol=0)


def test_zero_terminal_snr(scheduler):
    want = scheduler("DDIMScheduler", rescale_betas_zero_snr=True, **SD).alphas_cumprod
    torch.testing.assert_close(DDPM("v", zero_terminal_snr=True).table[0, 1:], want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 7, 50, 999])
def test_spacings(scheduler, spacing, steps):
    want = scheduler("DDPMScheduler", steps, timestep_spacing=spacing, **SD).timesteps.double()
    if (spacing, steps) == ("linspace", 1):
        want = want + 999          # numpy's linspace of one point is the clean end: nothing would be drawn
    torch.testing.assert_close(DDPM().times(steps, spacing) * 1000, torch.cat([want + 1, want.new_zeros(1)]))


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_ddpm(scheduler, variance):
    kind = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}[variance]
    # leading: the scheduler computes its previous step as floor(1000 / steps) back, not from its list
    theirs = scheduler("DDPMScheduler", 20, variance_type=kind, clip_sample=False, timestep_spacing="leading",
                       **SD)
    x = X[:, :, None, None]
    fraction = torch.rand(x.shape, dtype=x.dtype)

    def denoise(xt, t):
        x0, eps = (p[:, :, None, None] for p in mixture(PATH)(xt[:, :, 0, 0], t))
        return (x0, eps, fraction) if variance == "learned" else (x0, eps)

    want, generator = x, torch.Generator().manual_seed(1)
    for timestep in theirs.timesteps:
        raw = denoise(want, (timestep.double() + 1) / 1000)[1]
        raw = torch.cat([raw, 2 * fraction - 1], 1) if variance == "learned" else raw
        want = theirs.step(raw, timestep, want, generator=generator).prev_sample
    got = ddpm(denoise, PATH, x, PATH.times(20, "leading"), generator=torch.Generator().manual_seed(1),
               variance=variance)
    assert error([got], [want]) < 1e-6


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim(scheduler, eta):
    theirs = scheduler("DDIMScheduler", 20, clip_sample=False, timestep_spacing="leading", **SD)
    generator, want = torch.Generator().manual_seed(1), X
    for timestep in theirs.timesteps:
        raw = mixture(PATH)(want, (timestep.double() + 1) / 1000)[1]
        want = theirs.step(raw, timestep, want, eta=eta, generator=generator).prev_sample
    got = ddim(mixture(PATH), PATH, X, PATH.times(20, "leading"), eta=eta,
               generator=torch.Generator().manual_seed(1))
    assert error([got], [want]) < 1e-6


def test_euler(scheduler):
    """In sigma / alpha and x / alpha, which is the same step."""
    theirs = scheduler("EulerDiscreteScheduler", 12, timestep_spacing="trailing", **SD)
    times = PATH.times(12)
    alpha = PATH.alpha_sigma(times)[0]
    want = follow(theirs, X / alpha[0])
    assert error([x / a for x, a in zip(ours(euler, PATH, X, times), alpha[1:])], want) < 1e-6


class Exploding:
    """The path of alpha = 1 and sigma = t, in which diffusers' Heun averages eps."""

    def alpha_sigma(self, t):
        return torch.ones_like(t), t


def test_heun(scheduler):
    """Ours averages x0 and eps in alpha and sigma; diffusers' averages eps in sigma / alpha, which is ours on
    the variance-exploding path. On the diffusion path the two differ within their second order."""
    theirs = scheduler("HeunDiscreteScheduler", 12, timestep_spacing="trailing", **SD)
    times = PATH.times(12)
    alpha, sigma = PATH.alpha_sigma(times)
    want = follow(theirs, X / alpha[0])[-1]
    exploding = heun(mixture(Exploding()), Exploding(), X / alpha[0], sigma / alpha)
    assert error([exploding], [want]) < 1e-6
    differs = error([heun(mixture(PATH), PATH, X, times)], [want])
    assert 1e-4 < differs < 0.1


def with_intermediate(path, nodes, fractions):
    """nodes and, between each two, the points at these fractions of the way in log(alpha / sigma)."""
    alpha, sigma = path.alpha_sigma(nodes)
    lam = (alpha / sigma).log()
    inner = [torch.lerp(lam[:-1], lam[1:], f) for f in fractions]
    return torch.cat([torch.stack([lam[:-1], *inner], 1).flatten(), lam[-1:]])


@pytest.mark.parametrize("order", [2, 3])
def test_dpm_solver_singlestep(scheduler, order):
    """diffusers' grid lists the intermediate points as separate steps. For the second of them at order 3 it
    has (e^h - 1) / 2 where the paper (algorithm 2) has (e^h - 1) / h - 1, which diffusers calls "heun": both
    are compared."""
    nodes = torch.tensor([1.0, 0.8, 0.55, 0.3, 0.1, 0.02], dtype=torch.float64)
    lam = with_intermediate(PATH, nodes, [i / order for i in range(1, order)])

    def their_end(second="midpoint"):
        theirs = scheduler("DPMSolverSinglestepScheduler", len(lam) - 1, solver_order=order,
                           algorithm_type="dpmsolver", final_sigmas_type="sigma_min", **SD)
        theirs.sigmas, states, x = (-lam).exp(), [], X
        theirs.timesteps = torch.arange(len(lam) - 1, 0, -1)
        for i, timestep in enumerate(theirs.timesteps):
            theirs.register_to_config(solver_type=second if i % order == 1 else "midpoint")
            _, eps = mixture(PATH)(x, PATH.t_at(lam[i]))
            x = theirs.step(eps, timestep, x).prev_sample
            if i % order == order - 1:
                states.append(x)
        return states

    got = ours({2: dpm_solver_2, 3: dpm_solver_3}[order], PATH, X,
               torch.cat([nodes, nodes.new_zeros(1)]))[:-1]
    if order == 2:
        assert error(got, their_end()) < 1e-6
    else:
        assert error(got, their_end("heun")) < 1e-6
        assert 1e-4 < error(got, their_end()) < 0.1


def test_dpmpp_2m(scheduler):
    theirs = scheduler("DPMSolverMultistepScheduler", 12, solver_order=2, **SD)
    assert error(ours(SAMPLERS["dpmpp_2m"], PATH, X, times_of(theirs)), follow(theirs, X)) < 1e-6


def test_dpmpp_3m(scheduler):
    """diffusers, as the authors' code, lacks a factor 2 (see test_samplers.py for the order it costs)."""
    build = lambda: scheduler("DPMSolverMultistepScheduler", 12, solver_order=3, lower_order_final=False,
                              **SD)
    times = times_of(build())
    assert error(ours(dpmpp_3m, PATH, X, times, as_published=True), follow(build(), X)) < 1e-6
    assert error(ours(dpmpp_3m, PATH, X, times), follow(build(), X)) > 1e-3


def test_dpmpp_2m_sde(scheduler):
    theirs = scheduler("DPMSolverMultistepScheduler", 12, solver_order=2, algorithm_type="sde-dpmsolver++",
                       **SD)
    generator = torch.Generator().manual_seed(2)
    noise = [torch.randn(X.shape, dtype=X.dtype, generator=generator) for _ in range(12)]
    got = ours(dpmpp_2m_sde, PATH, X, times_of(theirs), generator=torch.Generator().manual_seed(2))
    assert error(got, follow(theirs, X, noise=noise)) < 1e-6


class Corrected:
    """diffusers' SDE-DPM-Solver++ of order 3, whose weight of the curvature has -1/2 where the integral has
    +1/2: the difference is alpha_s times its D2."""

    def multistep_dpm_solver_third_order_update(self, outputs, *args, sample, noise):
        x = super().multistep_dpm_solver_third_order_update(outputs, *args, sample=sample, noise=noise)
        s, t, t_1, t_2 = (-self.sigmas[self.step_index + 1 - k].log() for k in range(4))
        h, h_0, h_1 = s - t, t - t_1, t_1 - t_2
        slopes = (outputs[-1] - outputs[-2]) * h / h_0, (outputs[-2] - outputs[-3]) * h / h_1
        alpha_s = (1 + (-2 * s).exp()) ** -0.5
        return x + alpha_s * (slopes[0] - slopes[1]) * h / (h_0 + h_1)


def test_dpmpp_3m_sde(scheduler, monkeypatch):
    """With the sign of one coefficient corrected; the factor 2 is lacking as in 3M (see test_samplers.py)."""
    def build(corrected, **more):
        name, bases = "DPMSolverMultistepScheduler", (schedulers.DPMSolverMultistepScheduler,)
        if corrected:
            bases = (Corrected, *bases)
        with monkeypatch.context() as patch:
            patch.setattr(schedulers, name, type(name, bases, {"__module__": bases[-1].__module__}))
            return scheduler(name, 12, solver_order=3, algorithm_type="sde-dpmsolver++",
                             solver_type="heun", **more, **SD)

    generator = torch.Generator().manual_seed(2)
    noise = [torch.randn(X.shape, dtype=X.dtype, generator=generator) for _ in range(12)]
    times = times_of(build(True))
    run = lambda **options: ours(dpmpp_3m_sde, PATH, X, times, generator=torch.Generator().manual_seed(2),
                                 **options)
    for lower in (False, True):
        got = run(as_published=True, lower_order_final=lower)
        assert error(got, follow(build(True, lower_order_final=lower), X, noise=noise)) < 1e-6
    assert error(run(as_published=True), follow(build(False, lower_order_final=False), X, noise=noise)) > 1e-2


def follow_middles(scheduler, x, level, **options):
    """As `follow`, for schedulers that list the middles of the steps too: final states of whole steps."""
    states = []
    for i, timestep in enumerate(scheduler.timesteps):
        inside = scheduler.scale_model_input(x, timestep)
        _, eps = mixture(PATH)(inside, PATH.t_at(-level(scheduler).log()))
        x = scheduler.step(eps, timestep, x, **options).prev_sample
        if scheduler.state_in_first_order:
            states.append(x)
    return states


def test_dpmpp_sde(scheduler, monkeypatch):
    """Given noises with our correlation. Those of diffusers, by torchsde, are of a Brownian motion over
    sigma / alpha."""
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    monkeypatch.setattr(schedulers, "DPMSolverSDEScheduler", module.DPMSolverSDEScheduler)
    theirs = scheduler("DPMSolverSDEScheduler", 12, timestep_spacing="trailing", **SD)
    generator, halves = torch.Generator().manual_seed(2), []

    def noise(level_t, level_s):                           # to the middle, then to the end of each step
        fresh = torch.randn(X.shape, dtype=X.dtype, generator=generator)
        if len(halves) % 2 == 0:
            halves.append(fresh)
            return fresh
        half = 1 / (1 + level_t / level_s)
        halves.append(half.sqrt() * halves[-1] + (1 - half).sqrt() * fresh)
        return halves[-1]

    theirs.noise_sampler = noise
    times = PATH.times(12)
    alpha = PATH.alpha_sigma(times)[0]
    want = follow_middles(theirs, X / alpha[0], lambda theirs: theirs.sigmas[theirs.step_index]
                          if theirs.state_in_first_order else theirs.mid_point_sigma)
    got = ours(dpmpp_sde, PATH, X, times, generator=torch.Generator().manual_seed(2))
    assert error([x / a for x, a in zip(got, alpha[1:])], want) < 1e-6


@pytest.mark.parametrize("steps", [4, 12, 100])
def test_solver_of_stable_audio(scheduler, monkeypatch, steps):
    """A whole trajectory from the same noises. diffusers' states are x / alpha, begun at sigma / alpha = 500,
    where alpha is 1 / sqrt(500^2 + 1); its times are rounded to float32."""
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    module = importlib.import_module("diffusers.schedulers.scheduling_cosine_dpmsolver_multistep")
    name = "CosineDPMSolverMultistepScheduler"
    monkeypatch.setattr(schedulers, name, getattr(module, name))
    theirs, path = scheduler(name, steps), Circle()
    generator = torch.Generator().manual_seed(2)
    noises = [torch.randn(X.shape, dtype=X.dtype, generator=generator) for _ in range(steps)]
    theirs.noise_sampler = lambda level_t, level_s: noises[theirs.step_index]
    x, states = X * theirs.init_noise_sigma, []
    for t in theirs.timesteps:
        inside = theirs.scale_model_input(x, t)
        alpha, sigma = path.alpha_sigma(t)
        x0, eps = mixture(path)(inside, t)
        x = theirs.step(alpha * eps - sigma * x0, t, x).prev_sample
        states.append(x)
    times = stable_audio_times(path, steps)
    assert error([times[:-1]], [theirs.timesteps]) < 1e-6
    got = ours(dpmpp_2m_sde, path, X, times, generator=torch.Generator().manual_seed(2))
    alphas = path.alpha_sigma(times[1:])[0]
    assert error([x / alpha for x, alpha in zip(got, alphas)], states) < 1e-5


def test_dpm2_ancestral(scheduler):
    theirs = scheduler("KDPM2AncestralDiscreteScheduler", 12, timestep_spacing="trailing", **SD)
    times = PATH.times(12)
    alpha = PATH.alpha_sigma(times)[0]
    want = follow_middles(theirs, X / alpha[0], lambda theirs: theirs.sigmas[theirs.step_index]
                          if theirs.state_in_first_order else theirs.sigmas_interpol[theirs.step_index - 1],
                          generator=torch.Generator().manual_seed(2))
    got = ours(dpm2_ancestral, PATH, X, times, generator=torch.Generator().manual_seed(2))
    # theirs ends one call early: the last step has no middle, and so leaves the scheduler within a step
    last = got.pop()
    assert error([x / a for x, a in zip(got, alpha[1:])], want) < 1e-6
    x0, _ = mixture(PATH)(got[-1], times[-2])
    torch.testing.assert_close(last, x0)


def test_euler_ancestral_is_ddim(scheduler):
    """At eta = 1, and so `ddpm`, between any two times."""
    theirs = scheduler("EulerAncestralDiscreteScheduler", 12, timestep_spacing="trailing", **SD)
    times, generator = PATH.times(12), torch.Generator().manual_seed(2)
    alpha = PATH.alpha_sigma(times)[0]
    want = X / alpha[0]
    for i, timestep in enumerate(theirs.timesteps):
        _, eps = mixture(PATH)(theirs.scale_model_input(want, timestep), times[i])
        want = theirs.step(eps, timestep, want, generator=generator).prev_sample
    for sampler, options in ((ddim, {"eta": 1.0}), (ddpm, {})):
        got = sampler(mixture(PATH), PATH, X, times, generator=torch.Generator().manual_seed(2), **options)
        assert error([got], [want]) < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20, 50])
def test_plms(scheduler, steps):
    """As Stable Diffusion 1 is configured, with the times of its own, which end above 0."""
    theirs = scheduler("PNDMScheduler", steps, skip_prk_steps=True, steps_offset=1, **SD)
    times, want = sd_times(PATH, steps), X
    listed = [(step.item() + 1) / 1000 for step in theirs.timesteps]
    assert times[:-1].tolist() == pytest.approx(sorted(set(listed), reverse=True))
    assert len(listed) == steps + (steps > 1)
    torch.testing.assert_close(PATH.alpha_sigma(times[-1])[0] ** 2, theirs.final_alpha_cumprod)
    for timestep in theirs.timesteps:
        _, eps = mixture(PATH)(want, (timestep.double() + 1) / 1000)
        want = theirs.step(eps, timestep, want).prev_sample
    assert error(ours(plms, PATH, X, times)[-1:], [want]) < 1e-6


def test_lms(scheduler):
    pytest.importorskip("scipy", reason="pip install scipy, with which diffusers integrates")
    theirs = scheduler("LMSDiscreteScheduler", 12, timestep_spacing="trailing", **SD)
    times = PATH.times(12)
    alpha = PATH.alpha_sigma(times)[0]
    want = follow(theirs, X / alpha[0])
    assert error([x / a for x, a in zip(ours(lms, PATH, X, times), alpha[1:])], want) < 1e-6


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_of_stable_diffusion(scheduler, eta):
    """Its times, in fresh noise up to the last step, which does not go to 0."""
    theirs = scheduler("DDIMScheduler", 20, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **SD)
    generator, want = torch.Generator().manual_seed(1), X
    for timestep in theirs.timesteps:
        raw = mixture(PATH)(want, (timestep.double() + 1) / 1000)[1]
        want = theirs.step(raw, timestep, want, eta=eta, generator=generator).prev_sample
    got = ddim(mixture(PATH), PATH, X, sd_times(PATH, 20), eta=eta,
               generator=torch.Generator().manual_seed(1))
    assert error([got], [want]) < 1e-6


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("sampler, order", [(dpmpp_2m, 2), (dpmpp_3m, 3)])
@pytest.mark.parametrize("lower", [False, True])
def test_lower_order_final(scheduler, sampler, order, final, lower):
    """Below 15 steps, to 0 and to the first noisy step."""
    build = lambda: scheduler("DPMSolverMultistepScheduler", 12, solver_order=order, lower_order_final=lower,
                              final_sigmas_type=final, **SD)
    end = torch.tensor([0.001 if final == "sigma_min" else 0.0], dtype=torch.float64)
    times = torch.cat([times_of(build())[:-1], end])
    options = {"as_published": True} if order == 3 else {}
    got = ours(sampler, PATH, X, times, lower_order_final=lower, **options)
    assert error(got, follow(build(), X)) < 1e-6
    changed = error(got, ours(sampler, PATH, X, times, lower_order_final=not lower, **options)) > 1e-9
    assert changed == (order == 3 or final == "sigma_min")


def test_churn(scheduler):
    """EDM's algorithm 2, in diffusers' deprecated scheduler, on the path of alpha = 1 (see test_heun)."""
    from diffusers.schedulers.deprecated.scheduling_karras_ve import KarrasVeScheduler

    class Raised(Exploding):
        def t_at(self, lam):
            return (-lam).exp()

    levels = torch.cat([torch.linspace(5, 0.1, 10, dtype=torch.float64), torch.zeros(1).double()])
    theirs = KarrasVeScheduler(s_churn=3.0, s_min=0.5, s_max=3.5, s_noise=1.05)
    theirs.num_inference_steps = 10
    generator, want = torch.Generator().manual_seed(2), 5 * X
    raw = lambda x, level: -mixture(Raised())(x, level)[1]          # their output points to the data
    for level, following in zip(levels, levels[1:]):
        kept = generator.get_state()
        raised, level_hat = theirs.add_noise_to_input(want.double(), level, generator)
        generator.set_state(kept)
        if level_hat > level:              # the same noise in float64, which theirs draws in float32
            noise = torch.randn(X.shape, dtype=X.dtype, generator=generator)
            raised = want + (level_hat**2 - level**2) ** 0.5 * 1.05 * noise
        first = theirs.step(raw(raised, level_hat), level_hat, following, raised)
        want = first.prev_sample
        if following > 0:
            want = theirs.step_correct(raw(want, following), level_hat, following, raised, want,
                                       first.derivative).prev_sample
    got = heun(mixture(Raised()), Raised(), 5 * X, levels, generator=torch.Generator().manual_seed(2),
               churn=3.0, churn_min=0.5, churn_max=3.5, churn_noise=1.05)
    assert error([got], [want]) < 1e-9
    assert error([heun(mixture(Raised()), Raised(), 5 * X, levels)], [want]) > 1e-2


@pytest.mark.parametrize("order", [2, 3])
def test_unipc(scheduler, order):
    """Ours reports corrected states, diffusers' only predicted ones, so the final states are compared.
    diffusers' lowers its order step by step towards the end (3, 2, 1), ours only in the last step, where it
    must: at order 3 the last step but one differs, and agrees once diffusers' is kept from lowering it."""
    build = lambda **more: scheduler("UniPCMultistepScheduler", 12, solver_order=order, **more, **SD)
    times = times_of(build())
    got = SAMPLERS[f"unipc_{order}"](mixture(PATH), PATH, X, times)
    if order == 3:
        assert 1e-5 < error([got], follow(build(), X)[-1:]) < 0.1
        lower = SAMPLERS["unipc_3"](mixture(PATH), PATH, X, times, lower_order_final=True)
        assert error([lower], follow(build(), X)[-1:]) < 1e-6
        theirs, keep, x = build(), build(lower_order_final=False), X
        for i, timestep in enumerate(theirs.timesteps):
            keep.register_to_config(lower_order_final=i == 11)
            if keep.step_index is None:
                keep._init_step_index(timestep)
            x = keep.step(mixture(PATH)(x, times[i])[1], timestep, x).prev_sample
        assert error([got], [x]) < 1e-6
    else:
        assert error([got], follow(build(), X)[-1:]) < 1e-6


def test_flow_match_euler(scheduler):
    """Given the unshifted list, diffusers shifts it once, as ours does. By default it builds the list from an
    end that was shifted before, and shifts again, so its last step differs from ours."""
    path = RectifiedFlow(shift=3.0)
    theirs = scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8))
    torch.testing.assert_close(theirs.sigmas, path.times(8))
    got = ours(euler, path, X, path.times(8))
    assert error(got, follow(theirs, X, path, "velocity")) < 1e-6
    theirs.set_timesteps(8)
    once, twice = theirs.sigmas[-2].item(), RectifiedFlow(shift=3.0).times(1000)[-2].item()
    assert abs(once - 3 * twice / (1 + 2 * twice)) < 1e-9 and once != pytest.approx(path.times(8)[-2].item())


def test_flow_match_heun(scheduler):
    """As for Euler: on the same list of times, set by hand, the trajectories agree."""
    path = RectifiedFlow(shift=3.0)
    theirs = scheduler("FlowMatchHeunDiscreteScheduler", 8, shift=3.0)
    assert theirs.sigmas[-2].item() != pytest.approx(path.times(8)[-2].item())
    times = path.times(8)
    theirs.sigmas = torch.cat([times[:1], times[1:-1].repeat_interleave(2), times[-1:]])
    theirs.timesteps = torch.cat([times[:1], times[1:-1].repeat_interleave(2)]) * 1000
    x = X
    for i, timestep in enumerate(theirs.timesteps):
        t = times[(i + 1) // 2]
        x0, eps = mixture(path)(x, t)
        x = theirs.step(eps - x0, timestep, x).prev_sample
    assert error(ours(heun, path, X, times)[-1:], [x]) < 1e-6


def test_log_snr_and_karras_grids(scheduler):
    """Those of DPMSolverMultistepScheduler (use_lu_lambdas, use_karras_sigmas) over the same range."""
    for flag, grid in (("use_lu_lambdas", log_snr_times), ("use_karras_sigmas", karras_times)):
        theirs = scheduler("DPMSolverMultistepScheduler", 12, **{flag: True}, **SD)
        alpha, sigma = PATH.alpha_sigma(grid(PATH, 12))
        torch.testing.assert_close(sigma / alpha, theirs.sigmas, rtol=1e-9, atol=1e-12)


def assert_same_times(times, scheduler, within=1e-6):
    """The sigma / alpha of every time, and the steps that the network is given, to a share of 1/1000."""
    alpha, sigma = PATH.alpha_sigma(times)
    torch.testing.assert_close(sigma / alpha, scheduler.sigmas, rtol=1e-9, atol=1e-12)
    assert (times[:-1] * 1000 - 1 - scheduler.timesteps).abs().max() < within


@pytest.mark.parametrize("steps", [2, 30, 50, 200, 400, 501, 900, 999])
def test_times_of_stable_diffusion_1_and_2(scheduler, steps):
    """Also where a stride that is rounded down leaves out the noisy end: 400 steps begin at 0.8."""
    times, more = sd_times(PATH, steps), dict(steps_offset=1, set_alpha_to_one=False)
    plms = scheduler("PNDMScheduler", steps, skip_prk_steps=True, **more, **SD)
    ddim = scheduler("DDIMScheduler", steps, clip_sample=False, **more, **SD)
    visited = (times[:-1] * 1000 - 1).round().long()
    assert torch.equal(visited, ddim.timesteps)
    assert visited[0] == plms.timesteps[0] and torch.equal(visited[1:], plms.timesteps[2:])
    assert times[0] == (1000 // steps * (steps - 1) + 2) / 1000 and times[-1] == 1 / 1000


@pytest.mark.parametrize("steps", [1, 7, 20, 30, 50, 200, 400, 900, 999])
def test_times_of_stable_diffusion_xl(scheduler, steps):
    theirs = scheduler("EulerDiscreteScheduler", steps, timestep_spacing="leading", steps_offset=1, **SD)
    assert_same_times(sdxl_times(PATH, steps), theirs)
    times = sdxl_times(PATH, steps)
    want = follow(theirs, X / PATH.alpha_sigma(times)[0][0])
    assert error(ours(euler, PATH, X, times)[-1:], want[-1:]) < 1e-6


@pytest.mark.parametrize("steps", [2, 7, 20, 50])
def test_euler_trailing_times(scheduler, steps):
    theirs = scheduler("EulerDiscreteScheduler", steps, timestep_spacing="trailing", **SD)
    assert_same_times(PATH.times(steps), theirs)


@pytest.mark.parametrize("flag, grid", [("use_karras_sigmas", karras_times),
                                        ("use_exponential_sigmas", log_snr_times),
                                        ("use_beta_sigmas", beta_sigma_times)])
@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@pytest.mark.parametrize("steps", [7, 30])
def test_times_in_other_variables(scheduler, flag, grid, spacing, steps):
    """From the first to the last time of a spacing. Between two steps of the table, diffusers interpolates
    log sigma and we alpha^2, so the network is given a time that differs by up to 0.15 of a step."""
    if flag == "use_beta_sigmas":
        pytest.importorskip("scipy", reason="pip install scipy, for the quantiles of diffusers")
    theirs = scheduler("EulerDiscreteScheduler", steps, timestep_spacing=spacing, steps_offset=1,
                       **{flag: True}, **SD)
    ends = {} if spacing == "linspace" else {"start": sdxl_times(PATH, steps)[0].item(), "end": 0.002}
    assert_same_times(grid(PATH, steps, **ends), theirs, within=0.15)


@pytest.mark.parametrize("steps", [1, 4, 28, 50])
def test_times_of_stable_diffusion_3(scheduler, steps):
    theirs = scheduler("FlowMatchEulerDiscreteScheduler", steps, shift=3.0)
    torch.testing.assert_close(sd3_times(RectifiedFlow(shift=3.0), steps), theirs.sigmas, rtol=1e-9, atol=0)
    torch.testing.assert_close(theirs.timesteps, theirs.sigmas[:-1] * 1000)


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 6000])
def test_times_of_flux(scheduler, tokens):
    """As its pipeline asks for them: mu is written here as there, by slope and intercept."""
    theirs = scheduler("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True, base_shift=0.5,
                       max_shift=1.15)
    slope = (1.15 - 0.5) / (4096 - 256)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 28, 28), mu=tokens * slope + 0.5 - slope * 256)
    path = RectifiedFlow(shift=flux_shift(tokens))
    torch.testing.assert_close(path.times(28), theirs.sigmas, rtol=1e-9, atol=0)


def test_shift_terminal_and_beta_of_flow(scheduler):
    theirs = scheduler("FlowMatchEulerDiscreteScheduler", shift=2.0, shift_terminal=0.1)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 9, 9))
    torch.testing.assert_close(stretched(RectifiedFlow(shift=2.0).times(9), 0.1), theirs.sigmas)
    pytest.importorskip("scipy", reason="pip install scipy, for the quantiles of diffusers")
    theirs = scheduler("FlowMatchEulerDiscreteScheduler", 9, use_beta_sigmas=True)
    torch.testing.assert_close(beta_times(RectifiedFlow(), 9), theirs.sigmas, rtol=1e-9, atol=0)


# ---- models: the same weights, the same numbers

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
both_precisions = pytest.mark.parametrize("dtype", TOLERANCE)


def shake(model):
    """Random weights everywhere: zero-initialised layers would hide differences behind them."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        with torch.no_grad():
            around = 1.0 if p.ndim == 1 and "norm" in name and name.endswith("weight") else 0.0
            p.copy_(around + 0.2 * torch.randn(p.shape, generator=generator) / max(1, p[0].numel()) ** 0.25)
    return model.eval()


def assert_same(ours, theirs, x, dtype):
    """Forward and input gradient."""
    results = []
    for function in (ours, theirs):
        point = x.clone().requires_grad_()
        out = function(point)
        (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)).sum().backward()
        results.append((out.detach(), point.grad))
    for a, b in zip(*results):
        assert (a - b).norm() / b.norm() < TOLERANCE[dtype]
        assert b.std() > 1e-4                              # the comparison is not one of zeros


def shapes(model):
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


VAES = {  # SD 1, 2 and XL; SD 3 and FLUX
    "sd": dict(latent_channels=4),
    "sd3": dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)}
FULL_VAE = dict(in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512),
                layers_per_block=2)


@both_precisions
@pytest.mark.parametrize("kind", VAES)
def test_autoencoder(kind, dtype):
    torch.manual_seed(0)
    theirs = shake(AutoencoderKL(**FULL_VAE | VAES[kind] | dict(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8))).to(dtype)
    ours = published.vae_from_weights(theirs.state_dict(), scale=0.5, shift=0.1, groups=8).to(dtype)
    x = torch.randn(2, 3, 16, 24, dtype=dtype)
    moments = lambda posterior: torch.cat([posterior.mean, posterior.logvar], 1)
    # float32 in Posterior: autocast may hand it less
    assert_same(lambda x: moments(ours.encode(x)), lambda x: moments(theirs.encode(x).latent_dist), x, dtype)
    z = torch.randn(2, VAES[kind]["latent_channels"], 8, 12, dtype=dtype)
    assert_same(ours.decode, lambda z: theirs.decode(z).sample, z, dtype)
    torch.testing.assert_close(ours.normalize(z), (z - 0.1) * 0.5)       # (z - shift_factor) * scaling_factor


@both_precisions
@pytest.mark.parametrize("original", [False, True])
def test_autoencoder_with_attention_inside_levels(original, dtype):
    """As CompVis' f16 and f32 have it: at the lowest levels, after each block."""
    torch.manual_seed(0)
    theirs = shake(AutoencoderKL(
        latent_channels=8, block_out_channels=(8, 16, 24), norm_num_groups=8, layers_per_block=2,
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"))).to(dtype)
    state = theirs.state_dict()
    ours = published.vae_from_weights(compvis(state, 3) if original else state, scale=1.0, groups=8).to(dtype)
    assert ours.config.attention_levels == (1, 2)
    x, z = torch.randn(2, 3, 16, 24, dtype=dtype), torch.randn(2, 8, 4, 6, dtype=dtype)
    assert_same(lambda x: ours.encode(x).mean, lambda x: theirs.encode(x).latent_dist.mean, x, dtype)
    assert_same(ours.decode, lambda z: theirs.decode(z).sample, z, dtype)


@pytest.mark.parametrize("kind", VAES)
def test_full_size_autoencoder_has_the_published_keys(kind):
    with torch.device("meta"):
        theirs = AutoencoderKL(**FULL_VAE | VAES[kind])
        more = {"latent_channels": VAES[kind]["latent_channels"], "quant_conv": kind == "sd"}
        ours = shapes(vae.VAE(vae.VAEConfig(**vae.PRESETS["sd"] | more)))
        loaded = published.vae_from_weights(theirs.state_dict(), scale=1.0)
    assert {name: shape for name, shape in ours.items() if not name.startswith("latent_")} == shapes(theirs)
    assert shapes(loaded) == ours


def compvis(state, levels):
    """diffusers' names -> those of CompVis and FLUX, written here from those repositories' modules."""
    out = {}
    for name, weight in state.items():
        name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
        for theirs, original in (
                ("down_blocks.", "down."), (".resnets.", ".block."), ("conv_norm_out", "norm_out"),
                ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
                ("mid_block.block.0", "mid.block_1"), ("mid_block.block.1", "mid.block_2"),
                ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
                ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
                ("mid_block.attentions.0.to_", "mid.attn_1."), ("conv_shortcut", "nin_shortcut")):
            name = name.replace(theirs, original)
        name = re.sub(r"\.attentions\.(\d+)\.(group_|to_)", r".attn.\1.", name)
        name = name.replace(".out.0.", ".proj_out.")
        is_1x1 = ".attn" in name and weight.ndim == 2
        out[name] = weight[:, :, None, None] if is_1x1 else weight
    return out


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize("quant_conv", [True, False])
def test_compvis_names(prefix, quant_conv):
    """The original layout, which diffusers' own converter reads in the same way."""
    config = vae.VAEConfig(widths=(8, 16, 24), layers=2, groups=8, quant_conv=quant_conv)
    model = shake(vae.VAE(config))
    state = {name: weight for name, weight in model.state_dict().items() if not name.startswith("latent_")}
    original = {prefix + name: weight for name, weight in compvis(state, 3).items()}
    if prefix:                                                            # other parts of the whole file
        original |= {"model.diffusion_model.out.2.weight": torch.ones(1), "alphas_cumprod": torch.ones(1),
                     "conditioner.embedders.0.weight": torch.ones(1)}
    loaded = published.vae_from_weights(original, scale=1.0, groups=8)
    assert loaded.config == config
    for name, weight in state.items():
        torch.testing.assert_close(loaded.state_dict()[name], weight, rtol=0, atol=0)
    levels = {"down_block_types": [0] * 3, "up_block_types": [0] * 3}
    theirs = convert_ldm_vae_checkpoint(dict(original), levels)
    assert {name for name in theirs if "quant" not in name} == {name for name in state if "quant" not in name}
    for name in theirs:
        torch.testing.assert_close(theirs[name], state[name], rtol=0, atol=0)


def test_other_weights_than_an_autoencoder_are_refused():
    state = {name: w for name, w in vae.VAE(vae.VAEConfig()).state_dict().items() if "latent" not in name}
    del state["encoder.conv_out.bias"]
    with pytest.raises(ValueError, match="missing encoder.conv_out.bias; surplus odd"):
        published.vae_from_weights(state | {"odd": torch.ones(1)}, scale=1.0, groups=4)
    state["encoder.conv_out.bias"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"encoder.conv_out.bias of shape \(3,\), not \(8,\)"):
        published.vae_from_weights(state, scale=1.0, groups=4)
    state["encoder.conv_out.bias"] = torch.ones(8)
    half = published.vae_from_weights({name: w.half() for name, w in state.items()}, scale=1.0, groups=4)
    assert {w.dtype for w in half.state_dict().values()} == {torch.float32}
    with pytest.raises(ValueError, match="not the weights of an AutoencoderKL"):
        published.vae_from_weights({"blocks.0.weight": torch.ones(1)}, scale=1.0)


SD15 = dict(block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8)
SD21 = dict(SD15, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)


@both_precisions
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_unet(kind, dtype):
    torch.manual_seed(0)
    small = dict(block_out_channels=(16, 32), cross_attention_dim=24, norm_num_groups=8, layers_per_block=2,
                 down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                 up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                 attention_head_dim=4 if kind == "sd1" else (2, 4), use_linear_projection=kind == "sd2")
    theirs = shake(UNet2DConditionModel(**small)).to(dtype)
    ours = unet.UNet(unet.UNetConfig(
        widths=(16, 32), layers=2, attention=(True, False), groups=8, context_width=24, time_offset=-1.0,
        heads=4 if kind == "sd1" else (2, 4), linear_projection=kind == "sd2")).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())                        # strict, by name
    x, context = torch.randn(2, 4, 8, 12, dtype=dtype), torch.randn(2, 5, 24, dtype=dtype)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    steps = torch.tensor([0, 731])
    t = (steps.double() + 1) / 1000
    assert_same(lambda x: ours(x, t, context=context, mask=mask),
                lambda x: theirs(x, steps, context, encoder_attention_mask=mask).sample, x, dtype)


@pytest.mark.parametrize("kind, config", [("sd1", SD15), ("sd2", SD21)])
def test_full_size_unet_has_the_published_keys(kind, config):
    with torch.device("meta"):
        ours = unet.UNet(unet.UNetConfig(**unet.PRESETS[kind]))
        assert shapes(ours) == shapes(UNet2DConditionModel(**config))


def diffusers_dit(config, **more):
    return DiTTransformer2DModel(**dict(
        num_attention_heads=config.heads, attention_head_dim=config.width // config.heads, in_channels=4,
        out_channels=8, num_layers=config.depth, sample_size=8, patch_size=config.patch[0],
        num_embeds_ada_norm=config.num_classes, norm_eps=1e-6) | more)      # 1e-6: the original's, everywhere


@both_precisions
def test_dit(dtype):
    """With learned variance, so 8 channels out. diffusers spaces the frequencies of the time embedding over
    127, the original DiT, whose weights it loads, over 128: the two agree once that is corrected, and only
    then."""
    config = dit.DiTConfig(width=32, depth=2, heads=2, num_classes=10, learn_sigma=True, time_offset=-1.0,
                           **dit.PUBLISHED_BLOCK)
    torch.manual_seed(0)
    theirs = shake(diffusers_dit(config)).to(dtype)
    for block in theirs.transformer_blocks[1:]:            # converted checkpoints hold copies of one embedder
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    ours = dit.DiT(config).to(dtype).eval()
    ours.load_state_dict(names.dit_weights(theirs.state_dict(), config))
    x, steps, y = torch.randn(3, 4, 8, 8, dtype=dtype), torch.tensor([0, 500, 999]), torch.tensor([1, 9, 10])
    with torch.no_grad():
        as_is = theirs(x, steps, class_labels=y).sample
        assert (ours(x, (steps.double() + 1) / 1000, y) - as_is).norm() / as_is.norm() > 1e-3
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    assert_same(lambda x: ours(x, (steps.double() + 1) / 1000, y),
                lambda x: theirs(x, steps, class_labels=y).sample, x, dtype)


def test_full_size_dit_has_the_published_keys():
    config = dit.DiTConfig(**dit.PRESETS["XL/2"] | dit.PUBLISHED_BLOCK, num_classes=1000, learn_sigma=True)
    with torch.device("meta"):
        state = diffusers_dit(config, sample_size=32).state_dict()
        ours = shapes(dit.DiT(config))
        assert {name: tuple(w.shape) for name, w in names.dit_weights(state, config).items()} == ours
    # the original's names, of which pos_embed is a fixed table
    original = {"x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table",
                "final_layer.linear", "final_layer.adaLN_modulation.1"}
    for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"):
        original |= {f"blocks.{i}.{part}" for i in range(28)}
    assert {name.rsplit(".", 1)[0] for name in ours} == original


# ---- text and image together

@pytest.fixture
def unrounded(monkeypatch, dtype):
    """In float64, keep both implementations from rounding tables of positions and norms to float32."""
    if dtype == torch.float64:
        monkeypatch.setattr(normalization, "torch", Wide(torch, torch.float64))
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def load_mmdit(config, theirs, dtype):
    ours = mmdit.MMDiT(config).to(dtype).eval()
    ours.load_state_dict(names.mmdit_weights(theirs.state_dict(), config))             # strict, by name
    return ours


@both_precisions
@pytest.mark.parametrize("qk_norm, dual", [(None, ()), ("rms_norm", (0, 1))])            # SD 3, SD 3.5
def test_sd3(qk_norm, dual, dtype, unrounded):
    theirs = shake(SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=12,
        pos_embed_max_size=12, dual_attention_layers=dual, qk_norm=qk_norm)).to(dtype)
    table = dit.sincos_positions(12, 12, 32, crop=(8, 12)).to(dtype)[None]
    torch.testing.assert_close(theirs.pos_embed.pos_embed, table, atol=2e-6, rtol=0)
    theirs.pos_embed.pos_embed = table                        # theirs is computed in float32
    ours = load_mmdit(mmdit.MMDiTConfig(
        width=32, depth=3, heads=2, context_width=24, pooled_width=12, qk_norm=qk_norm is not None, rope=None,
        dual_attention=len(dual), sincos=(8, 12), **mmdit.PUBLISHED_BLOCK), theirs, dtype)
    x, context, pooled = (torch.randn(size, dtype=dtype) for size in ((2, 4, 8, 12), (2, 5, 24), (2, 12)))
    t = torch.tensor([0.25, 1.0])
    assert_same(lambda x: ours(x, t, context, pooled=pooled),
                lambda x: theirs(x, context, pooled, 1000 * t).sample, x, dtype)


@pytest.mark.parametrize("layers", [(1,), (0, 2)])
def test_sd3_without_layers(layers):
    """diffusers' skip_layers, which skip-layer guidance compares with; the whole network stays as it is."""
    theirs = shake(SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=12,
        pos_embed_max_size=12, qk_norm="rms_norm"))
    ours = load_mmdit(mmdit.MMDiTConfig(
        width=32, depth=3, heads=2, context_width=24, pooled_width=12, rope=None, sincos=(8, 12),
        **mmdit.PUBLISHED_BLOCK), theirs, torch.float32)
    x, context, pooled = (torch.randn(size) for size in ((2, 4, 8, 12), (2, 5, 24), (2, 12)))
    t = torch.tensor([0.25, 1.0])
    skipped = ours.without(layers)
    with torch.no_grad():
        for network, skip in ((skipped, list(layers)), (ours, None)):
            want = theirs(x, context, pooled, 1000 * t, skip_layers=skip).sample
            found = network(x, t, context, pooled=pooled)
            assert (found - want).norm() / want.norm() < 1e-5
        assert (skipped(x, t, context, pooled=pooled) - ours(x, t, context, pooled=pooled)).norm() > 0.1
    assert all(p is q for p, q in zip(skipped.final_layer.parameters(), ours.final_layer.parameters()))
    with pytest.raises(ValueError, match="layer 3: this network has joint blocks 0 to 2"):
        ours.without((3,))


@both_precisions
def test_flux(dtype, unrounded):
    theirs = shake(FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=12, guidance_embeds=True,
        axes_dims_rope=(4, 6, 6))).to(dtype)
    ours = load_mmdit(mmdit.MMDiTConfig(
        width=32, depth=2, single_depth=2, heads=2, context_width=24, pooled_width=12, rope=(4, 6, 6),
        rope_theta=10000.0, guidance=True, **mmdit.PUBLISHED_BLOCK), theirs, dtype)
    x, context, pooled = (torch.randn(size, dtype=dtype) for size in ((2, 4, 8, 12), (2, 5, 24), (2, 12)))
    t, guidance = torch.tensor([0.25, 1.0]), torch.tensor([3.5, 1.0])
    y, x_ids = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    ids = torch.stack([torch.zeros(24, dtype=torch.long), y.flatten(), x_ids.flatten()], 1).to(dtype)

    def call(x):
        patches = x.unflatten(2, (4, 2)).unflatten(4, (6, 2)).permute(0, 2, 4, 1, 3, 5)   # (B, h, w, C, p, q)
        tokens = patches.flatten(3).flatten(1, 2)
        out = theirs(tokens, context, pooled, t.to(dtype), ids, torch.zeros(5, 3, dtype=dtype),
                     guidance.to(dtype)).sample
        return out.view(2, 4, 6, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)

    assert_same(lambda x: ours(x, t, context, pooled=pooled, guidance=guidance), call, x, dtype)


FULL_MMDIT = {
    "sd3-medium": lambda: SD3Transformer2DModel(
        sample_size=128, in_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24,
        joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16,
        pos_embed_max_size=192),
    "sd3.5-medium": lambda: SD3Transformer2DModel(
        sample_size=128, in_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24,
        joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16,
        pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
    "flux-dev": lambda: FluxTransformer2DModel(guidance_embeds=True)}


@pytest.mark.parametrize("name", FULL_MMDIT)
def test_full_size_mmdit_has_the_published_keys(name):
    config = mmdit.MMDiTConfig(**mmdit.PRESETS[name])
    with torch.device("meta"):
        theirs = FULL_MMDIT[name]()
        state = names.mmdit_weights(theirs.state_dict(), config)
        assert {key: tuple(w.shape) for key, w in state.items()} == shapes(mmdit.MMDiT(config))


# ---- sound

STABLE_AUDIO = dict(channels=6, width=48, depth=2, heads=4, context_heads=2, context_width=24,
                    pooled_width=48)


def diffusers_stable_audio(c):
    """The network, and the embedding of seconds, which is apart."""
    from diffusers import StableAudioDiTModel, StableAudioProjectionModel

    return (StableAudioDiTModel(
        in_channels=c.channels, out_channels=c.channels, num_layers=c.depth, time_proj_dim=c.features,
        attention_head_dim=c.width // c.heads, num_attention_heads=c.heads,
        num_key_value_attention_heads=c.context_heads, cross_attention_dim=c.context_width,
        global_states_input_dim=c.pooled_width, cross_attention_input_dim=c.context_width),
        StableAudioProjectionModel(c.context_width, c.context_width, 0, c.longest))


@pytest.mark.parametrize("masked", [False, True])
@both_precisions
def test_stable_audio(dtype, masked, unrounded, monkeypatch):
    """Network and seconds, with padding read and hidden."""
    if dtype == torch.float64:             # it rotates in float32
        monkeypatch.setattr(attention_processor, "torch", Wide(torch, torch.float64))
    config = stable_audio.StableAudioConfig(**STABLE_AUDIO)
    torch.manual_seed(0)
    network, projection = (shake(part).to(dtype) for part in diffusers_stable_audio(config))
    with torch.device("meta"):
        ours = stable_audio.StableAudio(config).eval()
    state = names.stable_audio_weights(network.state_dict() | projection.state_dict(), config)
    weights.assign_weights(ours, state, "test")
    x, t = torch.randn(3, 6, 1, 21, dtype=dtype), torch.tensor([0.02, 0.5, 0.998])
    start, total = torch.tensor([0.0, 3.0, 30.0]), torch.tensor([1.0, 47.0, 600.0])
    text = torch.randn(3, 5, 24, dtype=dtype)
    with torch.no_grad():
        tokens, pooled = ours.embed_seconds(start, total)
        wanted = projection(start_seconds=start, end_seconds=total)
    wanted = [wanted.seconds_start_hidden_states, wanted.seconds_end_hidden_states]
    torch.testing.assert_close(tokens, torch.cat(wanted, 1), atol=2e-6, rtol=0)
    torch.testing.assert_close(pooled, torch.cat(wanted, 2)[:, 0], atol=2e-6, rtol=0)
    mask = torch.arange(7) < torch.tensor([[7], [3], [5]]) if masked else None
    context = torch.cat([text, tokens], dim=1)
    table = get_1d_rotary_pos_embed(6, 22, use_real=True, repeat_interleave_real=False,
                                    freqs_dtype=torch.float64)
    assert_same(lambda x: ours(x, t, context, pooled, mask),
                lambda x: network(x[:, :, 0], t, context, pooled[:, None], rotary_embedding=table,
                                  encoder_attention_mask=mask).sample.unsqueeze(2), x, dtype)
    with pytest.raises(ValueError, match="latent 2x21: must have one row"):
        ours(torch.randn(1, 6, 2, 21), t[:1], context[:1], pooled[:1])
