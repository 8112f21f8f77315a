"""Stable Audio Open at tiny size with random weights: drawn by our pieces and by the pipeline of diffusers,
from the same prompts, seconds and noise; and from its authors' file. The network is in test_diffusers.py."""

import importlib
import inspect
import shutil
import sys
import types
import wave
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoints
import conditioning
import networks
import published
import sample
import settings
import sound
from conftest import tiny_t5
from draw import in_own_dtype
from samplers import SAMPLERS, guided, noise_like
from test_names import stable_audio_names
from times import TIMES

pytest.importorskip("diffusers", reason="pip install diffusers, for the comparison with its pipeline")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.optional,
              pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]   # theirs

NAME = "stable-audio-open-1.0"
ROW = published.MODELS[NAME]               # at full size
CONFIG = dict(channels=6, width=32, depth=2, heads=4, context_heads=2, context_width=40, pooled_width=80)
# two halvings and a quartering of 16 frames: 256 samples, 2.56 s
RATE, FRAMES, FACTOR, STEPS = 100, 16, 16, 6
PROMPTS = ["a red circle", "blue"]


def shake(model, seed):
    """Random weights everywhere, so large that a network draws something else for each prompt."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        with torch.no_grad():
            if "snake" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
            elif name.endswith("weight_g"):                # quiet enough for 16 bits
                p.fill_(0.05 if name == "decoder.conv2.weight_g" else 0.5)
            else:
                around = 1.0 if p.ndim == 1 and "norm" in name and name.endswith("weight") else 0.0
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(around + 0.5 * noise / max(1, p[0].numel()) ** 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model(published_encoders, tmp_path_factory):
    """The tiny pipeline and its folder. published.MODELS has a row of its size meanwhile."""
    from diffusers import AutoencoderOobleck, StableAudioDiTModel
    from diffusers.pipelines.stable_audio import StableAudioPipeline, StableAudioProjectionModel

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
        module = importlib.import_module("diffusers.schedulers.scheduling_cosine_dpmsolver_multistep")
        patch.setattr(module, "BrownianTreeNoiseSampler", SameNoise)
        c = CONFIG
        network = StableAudioDiTModel(
            sample_size=FRAMES, in_channels=6, out_channels=6, num_layers=2, attention_head_dim=8,
            num_attention_heads=4, num_key_value_attention_heads=2, cross_attention_dim=c["context_width"],
            global_states_input_dim=c["pooled_width"], cross_attention_input_dim=c["context_width"])
        autoencoder = AutoencoderOobleck(
            encoder_hidden_size=12, downsampling_ratios=[2, 2, 4], channel_multiples=[1, 2, 2],
            decoder_channels=12, decoder_input_channels=6, audio_channels=2, sampling_rate=RATE)
        tokenizer = transformers.AutoTokenizer.from_pretrained(published_encoders / "t5", model_max_length=12)
        pipe = StableAudioPipeline(
            vae=shake(autoencoder, 2), transformer=shake(network, 1),
            text_encoder=tiny_t5(3), tokenizer=tokenizer,
            projection_model=shake(StableAudioProjectionModel(40, 40, 0, 512), 4),
            scheduler=module.CosineDPMSolverMultistepScheduler())
        pipe.set_progress_bar_config(disable=True)
        folder = tmp_path_factory.mktemp("stable-audio") / "folder"
        for part in ("vae", "text_encoder", "tokenizer", "transformer", "projection_model", "scheduler"):
            getattr(pipe, part).save_pretrained(folder / part)
        row = published.MODELS[NAME]
        latents = row.latents._replace(channels=6, factor=FACTOR)
        patch.setitem(published.MODELS, NAME, row._replace(
            config=row.config | CONFIG, side=FRAMES * FACTOR, latents=latents, rate=RATE, steps=STEPS))
        yield SimpleNamespace(pipe=pipe, folder=folder)


published_encoders = pytest.fixture(scope="module")(lambda published: published)


class SameNoise:
    """In place of the pipeline's Brownian motion, the numbers that our samplers draw: after those of the
    first latents, from the same generators."""

    def __init__(self, x, sigma_min, sigma_max, seed):
        self.x, self.generators = x, [torch.Generator().manual_seed(s) for s in seed]
        noise_like(x, self.generators)

    def __call__(self, sigma, sigma_next):
        return noise_like(self.x, self.generators)


@torch.no_grad()
def drawn(weights, prompts, negative=None, seconds=None, scale=None, **places):
    """Latents and waveforms by our pieces, as sample.py puts them together."""
    checkpoint = checkpoints.load_published(NAME, weights, places.pop("vae", None))
    args = settings_of_sample(prompts, negative, seconds, **places)
    condition = conditioning.of_checkpoint(checkpoint, torch.device("cpu"))
    how = checkpoint["sampling"]
    network = networks.build_model(checkpoint["arch"], checkpoint["config"])
    network.load_state_dict(checkpoint["ema"])
    autoencoder = networks.unpack_vae(checkpoint["vae"])
    path = networks.build_path(checkpoint["objective"])
    cond, uncond = condition.ask(args, network.eval()).batch(0, len(prompts))
    times = TIMES[how["times"]](path, how["steps"])
    generators = [torch.Generator().manual_seed(7 + i) for i in range(len(prompts))]
    size = checkpoint["data"]["size"][1] // autoencoder.factor
    x = noise_like(torch.empty(len(prompts), autoencoder.config.latent_channels, 1, size), generators)
    denoise = guided(in_own_dtype(network, torch.float32), path, cond, uncond,
                     how["scale"] if scale is None else scale)
    x = SAMPLERS[how["sampler"]](denoise, path, x, times, generator=generators)
    return x, autoencoder.decode(autoencoder.denormalize(x))


def settings_of_sample(prompts, negative, seconds, text_encoder=None, tokenizer=None):
    return SimpleNamespace(n=len(prompts), prompt=prompts, prompts=None, negative_prompt=negative,
                           seconds=seconds, text_encoder=text_encoder and [text_encoder],
                           tokenizer=tokenizer, no_t5=False, precision="fp32", offload=None)


def theirs(pipe, prompts, negative=None, seconds=None, **how):
    generators = [torch.Generator().manual_seed(7 + i) for i in range(len(prompts))]
    how |= dict(num_inference_steps=STEPS, generator=generators, audio_end_in_s=seconds)
    if negative is not None:
        how["negative_prompt"] = [negative] * len(prompts)
    latents = pipe(prompts, output_type="latent", **how).audios
    how["generator"] = [torch.Generator().manual_seed(7 + i) for i in range(len(prompts))]
    return latents[:, :, None], pipe(prompts, **how).audios


def to_int16(waveform):
    return (waveform * 32767).round().clamp(-32768, 32767).to(torch.int16).int()


def assert_same(ours, wanted):
    (latents, waveforms), (their_latents, their_waveforms) = ours, wanted
    assert latents.shape == their_latents.shape and their_latents.std() > 0.1
    assert (latents - their_latents).abs().max() <= 1e-4 * their_latents.abs().max().clamp(min=1)
    waveforms = waveforms[..., :their_waveforms.shape[-1]]
    assert waveforms.shape == their_waveforms.shape and 0.01 < their_waveforms.std() < 1
    assert (to_int16(waveforms) - to_int16(their_waveforms)).abs().max() <= 1


@pytest.mark.parametrize("negative, seconds, scale", [
    (None, None, 7.0), (None, 1.5, 7.0), ("a square", 2.0, 3.0), ("", None, 7.0), (None, 2.0, 1.0)])
def test_what_the_pipeline_draws(model, negative, seconds, scale):
    """With the null condition and negative prompts, of the whole window and parts of it, and unguided."""
    ours = drawn(model.folder, PROMPTS, negative, seconds, scale)
    assert_same(ours, theirs(model.pipe, PROMPTS, negative, seconds, guidance_scale=scale))


def test_the_command_writes_what_is_drawn(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["--published", NAME, "--weights", str(model.folder), "--prompt", *PROMPTS, "--seed", "7",
               "--precision", "fp32", "--seconds", "1.5"]
    _, waveforms = drawn(model.folder, PROMPTS, seconds=1.5)
    sample.main([*command, "--out", "all.npz"])
    found = np.load("all.npz")["arr_0"].astype(int)                        # (2, T, 2), of the whole window
    assert np.abs(found - sound.to_int16(waveforms)).max() <= 1
    sample.main([*command, "--out", "each"])
    end = int(1.5 * RATE)
    for i, file in enumerate(sorted((tmp_path / "each").iterdir())):
        with wave.open(str(file)) as written:
            assert (written.getnchannels(), written.getframerate()) == (2, RATE)
            samples = np.frombuffer(written.readframes(2**20), "<i2").reshape(-1, 2)
        assert len(samples) == end and np.abs(samples - found[i, :end]).max() <= 1
    with pytest.raises(ValueError, match=f"--size 8 8: {NAME} draws sounds; give --seconds"):
        sample.main([*command, "--size", "8", "8", "--out", "no.wav"])
    sample.main([*command, "--n", "1", "--init-sound", f"each/{file.name}", "--strength", "0.5", "--out",
                 "again.wav"])
    assert (tmp_path / "again.wav").stat().st_size == 44 + 4 * end


def test_what_is_drawn_depends_on_prompt_and_seconds(model):
    whole, same, short = (drawn(model.folder, [prompt], None, seconds)[0] for prompt, seconds in (
        ("blue", None), ("blue", FRAMES * FACTOR / RATE), ("blue", 0.5)))
    other = drawn(model.folder, ["red"])[0]
    assert torch.equal(whole, same) and (whole - short).abs().max() > 1e-4
    assert (whole - other).abs().max() > 1e-2


def test_defaults_are_those_of_the_pipeline():
    from diffusers.pipelines.stable_audio import StableAudioPipeline

    defaults = inspect.signature(StableAudioPipeline.__call__).parameters
    assert ROW.steps == defaults["num_inference_steps"].default
    assert ROW.guidance == defaults["guidance_scale"].default
    assert ROW.size == (1, 2097152) and int(100 * ROW.side / ROW.rate) == 4755             # 47.55 s


# ---- the authors' file

def original(folder):
    """Network, seconds and VAE in one file, by stable-audio-tools' names: the way back from diffusers'."""
    from safetensors.torch import load_file

    read = lambda part: load_file(folder / part / "diffusion_pytorch_model.safetensors")
    network, projection, autoencoder = map(read, ("transformer", "projection_model", "vae"))
    found = {"timestep_features.weight": network["time_proj.weight"][:, None],
             "transformer.rotary_pos_emb.inv_freq": torch.ones(2)}
    for key in ("preprocess_conv", "postprocess_conv"):
        found[f"{key}.weight"] = network[f"{key}.weight"]
    for key, ours in (("in", "proj_in"), ("out", "proj_out")):
        found[f"transformer.project_{key}.weight"] = network[f"{ours}.weight"]
    for key, name in (("timestep", "timestep_proj"), ("cond", "cross_attention_proj"),
                      ("global", "global_proj")):
        found |= {f"to_{key}_embed.{rest}": weight for rest, weight in behind(network, f"{name}.").items()}
    for i in range(CONFIG["depth"]):
        block, layer = behind(network, f"transformer_blocks.{i}."), {}
        for norm, name in (("norm1", "pre_norm"), ("norm2", "cross_attend_norm"), ("norm3", "ff_norm")):
            layer |= {f"{name}.gamma": block[f"{norm}.weight"], f"{name}.beta": block[f"{norm}.bias"]}
        layer["self_attn.to_qkv.weight"] = torch.cat([block[f"attn1.to_{part}.weight"] for part in "qkv"])
        layer["cross_attn.to_kv.weight"] = torch.cat([block[f"attn2.to_{part}.weight"] for part in "kv"])
        layer["cross_attn.to_q.weight"] = block["attn2.to_q.weight"]
        for name, part in (("self_attn", "attn1"), ("cross_attn", "attn2")):
            layer[f"{name}.to_out.weight"] = block[f"{part}.to_out.0.weight"]
        layer |= {f"ff.ff.{rest}": weight for rest, weight in behind(block, "ff.net.").items()}
        found |= {f"transformer.layers.{i}.{key}": weight for key, weight in layer.items()}
    found = {f"model.model.{key}": weight for key, weight in found.items()}
    for number, name in (("start", "start"), ("total", "end")):
        embedding = behind(projection, f"{name}_number_conditioner.time_positional_embedding.")
        for rest, weight in embedding.items():
            found[f"conditioner.conditioners.seconds_{number}.embedder.embedding.{rest}"] = weight
    return found | {f"pretransform.model.{key}": weight for key, weight in numbered(autoencoder).items()}


def behind(state, prefix):
    return {key[len(prefix):]: weight for key, weight in state.items() if key.startswith(prefix)}


def numbered(autoencoder):
    """An AutoencoderOobleck's state with the layers of each part and block numbered."""
    last = len({key.split(".")[2] for key in autoencoder if key.startswith("encoder.block.")}) + 2
    unit = {"snake1": "layers.0", "conv1": "layers.1", "snake2": "layers.2", "conv2": "layers.3"}
    places = {"encoder": {"res_unit1": 0, "res_unit2": 1, "res_unit3": 2, "snake1": 3, "conv1": 4},
              "decoder": {"snake1": 0, "conv_t1": 1, "res_unit1": 2, "res_unit2": 3, "res_unit3": 4}}
    found = {}
    for key, weight in autoencoder.items():
        side, *rest = key.split(".")
        if rest[0] == "block":
            name = f"layers.{int(rest[1]) + 1}.layers.{places[side][rest[2]]}."
            name += ".".join([unit[rest[3]], *rest[4:]] if rest[2].startswith("res") else rest[3:])
        else:
            place = {"conv1": 0, "snake1": last - 1, "conv2": last}[rest[0]]
            name = ".".join(["layers", str(place), *rest[1:]])
        found[f"{side}.{name}"] = weight[0, :, 0] if key.endswith((".alpha", ".beta")) else weight
    return found


def test_the_authors_file_draws_what_its_folder_draws(model, tmp_path):
    """Bit for bit; T5 and its tokenizer come from a folder, as the file has neither."""
    from safetensors.torch import save_file

    file = tmp_path / "model.safetensors"
    state = {key: weight.contiguous() for key, weight in original(model.folder).items()}
    save_file(state, file)
    config = published.build_network(NAME).config
    shapes = {key: tuple(weight.shape) for key, weight in state.items()
              if not key.startswith("pretransform.")}
    assert shapes == stable_audio_names(config)
    wanted = drawn(model.folder, PROMPTS)
    for weights in (file, tmp_path):
        ours = drawn(weights, PROMPTS, text_encoder=str(model.folder))
        assert torch.equal(ours[0], wanted[0]) and torch.equal(ours[1], wanted[1])
    with pytest.raises(ValueError, match="--weights .*: the text encoder T5-base is not in this file; give"):
        drawn(file, PROMPTS)


# ---- refusals

def test_what_does_not_fit_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=f"--seconds 3: {NAME} draws more than 0 and at most 2.56"):
        drawn(model.folder, PROMPTS, None, 3.0)
    with pytest.raises(ValueError, match=f"--seconds 0: {NAME} draws more than 0"):
        drawn(model.folder, PROMPTS, None, 0.0)
    folder = shutil.copytree(model.folder, tmp_path / "folder")
    shutil.rmtree(folder / "projection_model")
    with pytest.raises(ValueError, match="has no embedding of seconds; give the whole folder"):
        drawn(folder, PROMPTS)
    with pytest.raises(ValueError, match=f"holds the network of {NAME}, not of sd1.5; give --pu"):
        published.read_network("sd1.5", model.folder)
    with pytest.raises(ValueError, match=f"--published {NAME}: can be drawn with, .* but not trained"):
        settings.parse(["--arch", "mmdit", "--published", NAME, "--init-from", str(folder)])
    row = published.MODELS[NAME]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(published.MODELS, NAME, row._replace(latents=row.latents._replace(factor=32)))
        with pytest.raises(ValueError, match="latents of 6 channels at 1/32, .* this one has 6 at 1/16"):
            drawn(model.folder, PROMPTS)


def test_rate_of_the_vae(model, tmp_path):
    """That of config.json, or without one, the model's; a damaged one is refused."""
    assert published.load_vae(model.folder).config.rate == RATE
    file = tmp_path / "vae.safetensors"
    shutil.copy(model.folder / "vae/diffusion_pytorch_model.safetensors", file)
    assert published.load_vae(file, NAME).config.rate == RATE
    assert published.load_vae(file).config.rate == 44100
    folder = shutil.copytree(model.folder / "vae", tmp_path / "vae")
    (folder / "config.json").write_text('{"sampling_rate": "fast"}')
    with pytest.raises(ValueError, match="config.json: damaged .sampling_rate 'fast'.; download it again"):
        published.load_vae(folder)
    with torch.no_grad():
        sound = 2 * torch.rand(1, 2, 256) - 1
        moments = model.pipe.vae.encode(sound).latent_dist
        ours = published.load_vae(model.folder).encode(sound)
    for a, b in ((ours.mean, moments.mean), (ours.std, moments.std)):
        assert (a[:, :, 0] - b).norm() < 1e-5 * b.norm()
