"""The names and layouts of published files: the authors' modules, written here from their definitions,
against our networks, against diffusers' own conversion of single files, and at full size on the meta device.
"""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import dit
import mmdit
import names
import published
import unet
import weights


def randomize(model, std=0.1):
    generator = torch.Generator().manual_seed(0)
    for name, p in model.state_dict().items():
        p.copy_(std * torch.randn(p.shape, generator=generator))
        if p.ndim == 1 and "norm" in name and name.endswith(("weight", "scale", "_norm")):
            p.add_(1.0)
    return model.double().eval().requires_grad_(False)


def modules(**parts):
    """A module with these children; None is left out."""
    module = nn.Module()
    for name, part in parts.items():
        if part is not None:
            module.add_module(name, part)
    return module


def assert_close(a, b, tolerance=1e-10):
    assert a.shape == b.shape and b.std() > 1e-4
    assert (a - b).norm() / b.norm() < tolerance


# ---- the U-Net of CompVis and Stability: openaimodel.py, whose blocks are numbered as they are made

def compvis_resnet(c_in, c_out, c_emb, groups):
    return modules(
        in_layers=nn.Sequential(nn.GroupNorm(groups, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1)),
        emb_layers=nn.Sequential(nn.SiLU(), nn.Linear(c_emb, c_out)),
        out_layers=nn.Sequential(nn.GroupNorm(groups, c_out), nn.SiLU(), nn.Dropout(),
                                 nn.Conv2d(c_out, c_out, 3, padding=1)),
        skip_connection=nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1))


def compvis_transformer(c, width, depth):
    def attention(context):
        return modules(to_q=nn.Linear(width, width, bias=False), to_k=nn.Linear(context, width, bias=False),
                       to_v=nn.Linear(context, width, bias=False),
                       to_out=nn.Sequential(nn.Linear(width, width), nn.Dropout()))

    def project():
        return nn.Linear(width, width) if c.linear_projection else nn.Conv2d(width, width, 1)

    blocks = [modules(attn1=attention(width), attn2=attention(c.context_width),
                      norm1=nn.LayerNorm(width), norm2=nn.LayerNorm(width), norm3=nn.LayerNorm(width),
                      ff=modules(net=nn.Sequential(modules(proj=nn.Linear(width, 8 * width)), nn.Dropout(),
                                                   nn.Linear(4 * width, width)))) for _ in range(depth)]
    return modules(norm=nn.GroupNorm(c.groups, width), proj_in=project(),
                   transformer_blocks=nn.ModuleList(blocks), proj_out=project())


def compvis_unet(c):
    """The modules of UNetModel for one of our configurations."""
    depth = unet.per_level(c.depth, c)
    first, c_emb, last = c.widths[0], 4 * c.widths[0], len(c.widths) - 1
    down, widths, width = [nn.Sequential(nn.Conv2d(4, first, 3, padding=1))], [first], first
    for level, wide in enumerate(c.widths):
        for _ in range(c.layers):
            block = [compvis_resnet(width, wide, c_emb, c.groups)]
            width = wide
            if c.attention[level]:
                block.append(compvis_transformer(c, width, depth[level]))
            down.append(nn.Sequential(*block))
            widths.append(width)
        if level < last:
            down.append(nn.Sequential(modules(op=nn.Conv2d(width, width, 3, stride=2, padding=1))))
            widths.append(width)
    middle = nn.Sequential(compvis_resnet(width, width, c_emb, c.groups),
                           compvis_transformer(c, width, depth[-1]),
                           compvis_resnet(width, width, c_emb, c.groups))
    up = []
    for level in reversed(range(last + 1)):
        for i in range(c.layers + 1):
            block = [compvis_resnet(width + widths.pop(), c.widths[level], c_emb, c.groups)]
            width = c.widths[level]
            if c.attention[level]:
                block.append(compvis_transformer(c, width, depth[level]))
            if level and i == c.layers:
                block.append(modules(conv=nn.Conv2d(width, width, 3, padding=1)))
            up.append(nn.Sequential(*block))
    label = None
    if c.pooled_width:
        label = nn.Sequential(nn.Sequential(nn.Linear(c.pooled_width, c_emb), nn.SiLU(),
                                            nn.Linear(c_emb, c_emb)))
    return modules(
        time_embed=nn.Sequential(nn.Linear(first, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb)),
        label_emb=label, input_blocks=nn.ModuleList(down), middle_block=middle,
        output_blocks=nn.ModuleList(up),
        out=nn.Sequential(nn.GroupNorm(c.groups, first), nn.SiLU(), nn.Conv2d(first, 4, 3, padding=1)))


SMALL = dict(groups=4, layers=2, context_width=24, time_offset=-1.0)
UNETS = {
    "sd1": dict(SMALL, widths=(8, 16, 16), attention=(True, True, False), heads=2),
    "sd2": dict(SMALL, widths=(8, 16, 16), attention=(True, True, False), heads=(1, 2, 2),
                linear_projection=True),
    "sdxl": dict(SMALL, widths=(8, 16, 16), attention=(False, True, True), heads=(1, 2, 2), depth=(1, 2, 3),
                 linear_projection=True, pooled_width=12 + 6 * 8)}


@pytest.mark.optional
@pytest.mark.parametrize("kind", UNETS)
def test_unet_of_a_single_file(kind):
    """diffusers converts the same file for its own network: the same names, the same numbers."""
    pytest.importorskip("diffusers")
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    c = unet.UNetConfig(**UNETS[kind])
    original = randomize(compvis_unet(c)).state_dict()
    whole = {names.NETWORK + name: weight for name, weight in original.items()}
    ours = unet.UNet(c).double().eval()
    ours.load_state_dict(names.unet_weights(names.network_part(whole | {"alphas_cumprod": torch.ones(1)}), c))

    xl = dict(addition_embed_type="text_time", addition_time_embed_dim=8,
              projection_class_embeddings_input_dim=60, transformer_layers_per_block=list(c.depth)
              ) if kind == "sdxl" else {}
    theirs = UNet2DConditionModel(
        block_out_channels=c.widths, cross_attention_dim=24, norm_num_groups=4, layers_per_block=2,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in c.attention],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(c.attention)],
        attention_head_dim=c.heads, use_linear_projection=c.linear_projection, **xl).double().eval()
    converted = convert_ldm_unet_checkpoint(dict(whole), theirs.config)
    assert set(converted) == set(ours.state_dict())
    theirs.load_state_dict(converted)

    x, context = torch.randn(2, 4, 8, 12).double(), torch.randn(2, 5, 24).double()
    steps = torch.tensor([3, 731])
    t = (steps.double() + 1) / 1000
    more, pooled = {}, None
    if kind == "sdxl":
        numbers, text = torch.tensor([[64, 48, 0, 4, 64, 64]] * 2).double(), torch.randn(2, 12).double()
        more = {"added_cond_kwargs": {"text_embeds": text, "time_ids": numbers}}
        sizes = unet.timestep_embedding(numbers.flatten(), 8, scale=1.0).view(2, 48).double()
        pooled = torch.cat([text, sizes], dim=1)
    # float32, as diffusers embeds its times in that
    assert_close(ours(x, t, context=context, pooled=pooled), theirs(x, steps, context, **more).sample, 1e-6)


def test_averaged_weights_of_a_whole_file():
    """CompVis stores them without the dots, beside the others; they are the ones to draw with."""
    c = unet.UNetConfig(**UNETS["sd1"])
    original = randomize(compvis_unet(c)).state_dict()
    whole = {names.NETWORK + name: torch.zeros_like(weight) for name, weight in original.items()}
    whole |= {"model_ema.diffusion_model" + name.replace(".", ""): weight
              for name, weight in original.items()}
    whole |= {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones(())}
    found = names.network_part(whole)
    assert set(found) == set(original) and all(torch.equal(found[name], original[name]) for name in original)


# ---- Stable Diffusion 3

def original_sd3(state, config):
    """The names of its repository, from ours: other names of the QK-norms, and a table of positions, here
    one that no formula of ours gives."""
    out = {}
    for name, weight in state.items():
        if name != "position_table":
            for part in "qk":
                name = name.replace(f".{part}_norm", f".ln_{part}.weight")
            out[name] = weight
    largest = config.sincos[1]
    line = state["position_table"]
    out["pos_embed"] = torch.cat([line.repeat(largest, 1), line.repeat_interleave(largest, 0)], 1)[None]
    return out


@pytest.mark.optional
@pytest.mark.parametrize("qk_norm, dual", [(False, 0), (True, 2), (True, 0)])        # 3, 3.5 medium and large
def test_sd3_of_a_single_file(qk_norm, dual):
    pytest.importorskip("diffusers")
    from diffusers import SD3Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    c = mmdit.MMDiTConfig(**mmdit.PUBLISHED_BLOCK, width=32, depth=3, heads=2, context_width=24,
                          pooled_width=12, qk_norm=qk_norm, dual_attention=dual, rope=None, sincos=(8, 12),
                          position_table=True)
    original = original_sd3(randomize(mmdit.MMDiT(c)).state_dict(), c)
    ours = mmdit.MMDiT(c).double().eval()
    ours.load_state_dict(names.mmdit_weights(original, c))
    theirs = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=12,
        pos_embed_max_size=12, dual_attention_layers=tuple(range(dual)),
        qk_norm="rms_norm" if qk_norm else None).double().eval()
    converted = convert_sd3_transformer_checkpoint_to_diffusers(dict(original))
    theirs.load_state_dict(converted)
    x, context, pooled = (torch.randn(size).double() for size in ((2, 4, 8, 12), (2, 5, 24), (2, 12)))
    t = torch.tensor([0.25, 1.0])
    got = ours(x, t, context, pooled=pooled)
    assert_close(got, theirs(x, context, pooled, 1000 * t).sample, 2e-6)       # its norms are in float32
    # and by diffusers' names
    again = mmdit.MMDiT(c).double().eval()
    again.load_state_dict(names.mmdit_weights(converted, c))
    assert torch.equal(again(x, t, context, pooled=pooled), got)


def test_the_table_of_positions_is_that_of_the_file():
    """Cropped about its centre, never computed; of rows and columns alone, or refused."""
    c = mmdit.MMDiTConfig(**mmdit.PUBLISHED_BLOCK, width=32, depth=1, heads=2, context_width=24,
                          pooled_width=12, rope=None, sincos=(8, 12), position_table=True)
    model = mmdit.MMDiT(c)
    formula = dit.sincos_positions(3, 5, 32, crop=(8, 12))
    torch.testing.assert_close(model.positions(2, 3, 5, torch.device("cpu"))[0], formula)
    line = torch.randn(12, 16)
    table = torch.cat([line.repeat(12, 1), line.repeat_interleave(12, 0)], 1)[None]
    state = model.state_dict()
    del state["position_table"]
    model.load_state_dict(names.mmdit_weights(state | {"pos_embed": table}, c))
    want = table.view(12, 12, 32)[4:7, 3:8].flatten(0, 1)
    model._positions.clear()
    assert torch.equal(model.positions(2, 3, 5, torch.device("cpu"))[0], want)
    with pytest.raises(ValueError, match="13x4 patches: .* has 12x12; draw a smaller"):
        model.positions(2, 13, 4, torch.device("cpu"))
    table[0, 5] += 1
    with pytest.raises(ValueError, match="not one of rows and columns"):
        names.mmdit_weights(state | {"pos_embed": table}, c)


# ---- FLUX: the forward pass of its repository (model.py, layers.py), for weights by its names

def flux_names(c):
    """(name, shape) of its modules."""
    width, head = c.width, c.width // c.heads
    shapes = {"img_in": (width, 4 * c.channels), "txt_in": (width, c.context_width)}
    for part, c_in in (("time_in", 256), ("vector_in", c.pooled_width), ("guidance_in", 256)):
        if part != "guidance_in" or c.guidance:
            shapes |= {f"{part}.in_layer": (width, c_in), f"{part}.out_layer": (width, width)}
    for i in range(c.depth):
        for part in ("img", "txt"):
            block = f"double_blocks.{i}.{part}"
            shapes |= {f"{block}_mod.lin": (6 * width, width), f"{block}_attn.qkv": (3 * width, width),
                       f"{block}_attn.norm.query_norm.scale": (head,),
                       f"{block}_attn.norm.key_norm.scale": (head,), f"{block}_attn.proj": (width, width),
                       f"{block}_mlp.0": (4 * width, width), f"{block}_mlp.2": (width, 4 * width)}
    for i in range(c.single_depth):
        block = f"single_blocks.{i}"
        shapes |= {f"{block}.linear1": (7 * width, width), f"{block}.linear2": (width, 5 * width),
                   f"{block}.norm.query_norm.scale": (head,), f"{block}.norm.key_norm.scale": (head,),
                   f"{block}.modulation.lin": (3 * width, width)}
    shapes |= {"final_layer.linear": (4 * c.channels, width),
               "final_layer.adaLN_modulation.1": (2 * width, width)}
    out = {}
    for name, shape in shapes.items():
        if name.endswith("scale"):
            out[name] = shape
        else:
            out |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return out


def flux_forward(s, c, x, t, context, pooled, guidance):
    """x (B, C, H, W) -> its velocity."""
    def linear(name, x):
        return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])

    def embedder(name, x):
        return linear(f"{name}.out_layer", F.silu(linear(f"{name}.in_layer", x)))

    def sinusoids(t):
        angles = 1000 * t[:, None] * torch.exp(-torch.log(torch.tensor(1e4)) * torch.arange(128) / 128)
        return torch.cat([angles.cos(), angles.sin()], 1).double()

    def norm(x):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    def heads(name, qkv):                     # "B L (K H D) -> K B H L D", then its QK-norms
        q, k, v = qkv.unflatten(-1, (3, c.heads, -1)).permute(2, 0, 3, 1, 4)
        def rms(x, scale):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * scale
        return rms(q, s[f"{name}.query_norm.scale"]), rms(k, s[f"{name}.key_norm.scale"]), v

    def rotate(x, angles):                    # neighbouring pairs
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()],
                           -1).flatten(-2)

    def attend(q, k, v):
        weights = F.softmax(rotate(q, angles) @ rotate(k, angles).mT / q.shape[-1] ** 0.5, -1)
        return (weights @ v).transpose(1, 2).flatten(2)

    h, w = x.shape[2] // 2, x.shape[3] // 2
    # rearrange(x, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)
    img = x.unflatten(3, (w, 2)).unflatten(2, (h, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    ids = torch.stack(torch.meshgrid(torch.arange(1), torch.arange(h), torch.arange(w), indexing="ij"), -1)
    ids = torch.cat([torch.zeros(context.shape[1], 3), ids.view(-1, 3)]).double()
    angles = torch.cat([ids[:, i, None] * 1e4 ** -(torch.arange(0, n, 2).double() / n)
                        for i, n in enumerate(c.rope)], 1)
    img, txt = linear("img_in", img), linear("txt_in", context)
    vec = embedder("time_in", sinusoids(t)) + embedder("vector_in", pooled)
    if c.guidance:
        vec = vec + embedder("guidance_in", sinusoids(guidance))
    for i in range(c.depth):
        block, streams = f"double_blocks.{i}", {"txt": txt, "img": img}
        mods = {part: linear(f"{block}.{part}_mod.lin", F.silu(vec))[:, None].chunk(6, -1)
                for part in streams}
        parts = [heads(f"{block}.{part}_attn.norm",
                       linear(f"{block}.{part}_attn.qkv", (1 + mods[part][1]) * norm(x) + mods[part][0]))
                 for part, x in streams.items()]
        both = attend(*(torch.cat(pair, 2) for pair in zip(*parts)))
        attended = dict(zip(streams, both.split([txt.shape[1], img.shape[1]], 1)))
        for part, x in streams.items():
            _, _, gate, shift, scale, gate2 = mods[part]
            x = x + gate * linear(f"{block}.{part}_attn.proj", attended[part])
            inner = F.gelu(linear(f"{block}.{part}_mlp.0", (1 + scale) * norm(x) + shift), approximate="tanh")
            streams[part] = x + gate2 * linear(f"{block}.{part}_mlp.2", inner)
        txt, img = streams.values()
    x = torch.cat([txt, img], 1)
    for i in range(c.single_depth):
        block = f"single_blocks.{i}"
        shift, scale, gate = linear(f"{block}.modulation.lin", F.silu(vec))[:, None].chunk(3, -1)
        qkv, mlp = linear(f"{block}.linear1", (1 + scale) * norm(x) + shift).split(
            [3 * c.width, 4 * c.width], -1)
        both = torch.cat([attend(*heads(f"{block}.norm", qkv)), F.gelu(mlp, approximate="tanh")], -1)
        x = x + gate * linear(f"{block}.linear2", both)
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(vec))[:, None].chunk(2, -1)
    x = linear("final_layer.linear", (1 + scale) * norm(x[:, context.shape[1]:]) + shift)
    # rearrange(x, "b (h w) (c ph pw) -> b c (h ph) (w pw)")
    return x.view(len(x), h, w, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


@pytest.mark.parametrize("guidance", [True, False])                                  # dev, schnell
def test_flux_of_a_single_file(guidance):
    c = mmdit.MMDiTConfig(**mmdit.PUBLISHED_BLOCK, width=32, depth=2, single_depth=2, heads=2, rope=(4, 6, 6),
                          context_width=24, pooled_width=12, rope_theta=10000.0, guidance=guidance)
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.2 * torch.randn(shape, generator=generator).double()
             for name, shape in flux_names(c).items()}
    ours = mmdit.MMDiT(c).double().eval()
    ours.load_state_dict(names.mmdit_weights(
        names.network_part({names.NETWORK + name: weight for name, weight in state.items()}), c))
    x, context, pooled = (torch.randn(size, generator=generator).double()
                          for size in ((2, 4, 6, 8), (2, 5, 24), (2, 12)))
    t, scale = torch.tensor([0.25, 1.0]), torch.tensor([3.5, 1.0])
    got = ours(x, t, context, pooled=pooled, guidance=scale)
    assert_close(got, flux_forward(state, c, x, t, context, pooled, scale), 1e-6)    # our tables are float32
    wrong = dict(state)
    wrong["final_layer.linear.weight"] = state["final_layer.linear.weight"].flip(0)
    assert (got - flux_forward(wrong, c, x, t, context, pooled, scale)).norm() > 0.1 * got.norm()


# ---- text encoders in whole files

class OpenCLIP(nn.Module):
    """open_clip's text transformer: fused attention, and a projection that is multiplied from the right."""

    def __init__(self, vocabulary, width, layers, heads, projected):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(16, width))
        blocks = [modules(attn=nn.MultiheadAttention(width, heads, batch_first=True),
                          ln_1=nn.LayerNorm(width), ln_2=nn.LayerNorm(width),
                          mlp=modules(c_fc=nn.Linear(width, 4 * width), c_proj=nn.Linear(4 * width, width)))
                  for _ in range(layers)]
        self.transformer = modules(resblocks=nn.ModuleList(blocks))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, projected))
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.register_buffer("attn_mask", torch.full((16, 16), -torch.inf).triu(1))

    def forward(self, ids, skip=0):
        """The output after the final norm, without the last `skip` blocks; and the projected one."""
        x = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]
        mask = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1)
        for block in self.transformer.resblocks[:len(self.transformer.resblocks) - skip]:
            h = block.ln_1(x)
            x = x + block.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x))))
        x = self.ln_final(x)
        return x, x[torch.arange(len(x)), ids.argmax(1)] @ self.text_projection


def clip_config(layers, act):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(vocab_size=50, hidden_size=16, intermediate_size=64, num_hidden_layers=layers,
                          num_attention_heads=2, max_position_embeddings=16, hidden_act=act,
                          projection_dim=12, eos_token_id=49, bos_token_id=48, pad_token_id=0,
                          attn_implementation="eager")


def load_transformers(model, state):
    """transformers from 5.6 on leaves out the prefix in CLIPTextModel."""
    if not hasattr(model, "text_model"):
        state = {name.removeprefix("text_model."): weight for name, weight in state.items()}
    model.double().eval().load_state_dict(state)
    return model


IDS = torch.tensor([[48, 3, 7, 9, 49, 0], [48, 49, 0, 0, 0, 0]])


@pytest.mark.optional
@torch.no_grad()
def test_openclip_of_whole_files():
    """Of XL with its projection; of Stable Diffusion 2 without its last layer, after the final norm."""
    transformers = pytest.importorskip("transformers")
    original = OpenCLIP(50, 16, 3, 2, 12)
    original.attn_mask = None
    randomize(original)
    original.register_buffer("attn_mask", torch.ones(2, 2))
    state = original.state_dict()
    xl = names.text_weights({f"conditioner.embedders.1.model.{k}": w for k, w in state.items()}, "openclip-g")
    model = load_transformers(transformers.CLIPTextModelWithProjection(clip_config(3, "gelu")), xl)
    out = model(IDS)
    last, pooled = original(IDS)
    assert_close(out.last_hidden_state, last, 1e-6)        # its softmax is in float32
    assert_close(out.text_embeds, pooled, 1e-6)
    sd2 = names.text_weights({f"cond_stage_model.model.{k}": w for k, w in state.items()}, "openclip-h")
    model = load_transformers(transformers.CLIPTextModel(clip_config(2, "gelu")), sd2)
    assert_close(model(IDS).last_hidden_state, original(IDS, skip=1)[0], 1e-6)


@pytest.mark.optional
@torch.no_grad()
def test_clip_and_t5_of_whole_files():
    """They have the names of transformers behind a prefix; Stable Diffusion 3 does not project CLIP-L."""
    transformers = pytest.importorskip("transformers")
    state = {name: torch.randn_like(weight) for name, weight in
             transformers.CLIPTextModelWithProjection(clip_config(2, "quick_gelu")).state_dict().items()}
    inner = {name: weight for name, weight in state.items() if name != "text_projection.weight"}
    inner["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    for prefix in ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."):
        found = names.text_weights({prefix + name: weight for name, weight in inner.items()}, "clip-l")
        assert set(found) == set(state) - {"text_projection.weight"}
        assert all(torch.equal(found[name], state[name]) for name in found)
        load_transformers(transformers.CLIPTextModel(clip_config(2, "quick_gelu")), found)
    sd3 = {f"text_encoders.clip_l.transformer.{name}": weight for name, weight in inner.items()}
    sd3 |= {f"text_encoders.clip_g.transformer.{name}": weight for name, weight in state.items()}
    sd3 |= {"text_encoders.clip_l.logit_scale": torch.ones(())}
    found = names.text_weights(sd3, "clip-l")
    assert torch.equal(found.pop("text_projection.weight"), torch.eye(16))
    assert set(found) == set(state) - {"text_projection.weight"}
    found = names.text_weights(sd3, "openclip-g")
    assert set(found) == set(state) and torch.equal(found["text_projection.weight"],
                                                    state["text_projection.weight"])
    assert names.text_weights(sd3, "t5-xxl") == {}

    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    t5 = transformers.T5EncoderModel(config).state_dict()
    prefix = "text_encoders.t5xxl.transformer."
    found = names.text_weights(sd3 | {prefix + name: weight for name, weight in t5.items()}, "t5-xxl")
    assert set(found) == set(t5) and all(torch.equal(found[name], t5[name]) for name in t5)


def test_eight_bits_with_scales():
    weight = torch.tensor([[1.0, -2.0], [0.5, 448.0]]).to(torch.float8_e4m3fn)
    state = {"a.weight": weight, "a.scale_weight": torch.tensor(0.25), "a.scale_input": torch.tensor(1.0),
             "b.weight": weight, "scaled_fp8": torch.empty(0)}
    found = names.scaled_weights(state)
    assert set(found) == {"a.weight", "b.weight"} and found["b.weight"] is weight
    assert found["a.weight"].dtype == torch.bfloat16
    assert found["a.weight"].tolist() == [[0.25, -0.5], [0.125, 112.0]]


# ---- Stable Audio's own file

def stable_audio_names(c):
    """Names and shapes in the authors' file, model.safetensors: network and embedding of seconds."""
    width, inner, features = c.width, c.width // c.heads * c.context_heads, c.features
    found = {"timestep_features.weight": (features // 2, 1), "to_timestep_embed.0.bias": (width,),
             "to_timestep_embed.0.weight": (width, features), "to_timestep_embed.2.bias": (width,),
             "to_timestep_embed.2.weight": (width, width), "to_cond_embed.0.weight": (c.context_width,) * 2,
             "to_cond_embed.2.weight": (c.context_width,) * 2,
             "to_global_embed.0.weight": (width, c.pooled_width),
             "to_global_embed.2.weight": (width, width), "transformer.project_in.weight": (width, c.channels),
             "transformer.project_out.weight": (c.channels, width),
             "preprocess_conv.weight": (c.channels, c.channels, 1),
             "postprocess_conv.weight": (c.channels, c.channels, 1),
             "transformer.rotary_pos_emb.inv_freq": (width // c.heads // 4,)}
    for i in range(c.depth):
        layer = {f"{norm}.{part}": (width,) for norm in ("pre_norm", "cross_attend_norm", "ff_norm")
                 for part in ("gamma", "beta")}
        layer |= {"self_attn.to_qkv.weight": (3 * width, width), "self_attn.to_out.weight": (width, width),
                  "cross_attn.to_q.weight": (width, width),
                  "cross_attn.to_kv.weight": (2 * inner, c.context_width),
                  "cross_attn.to_out.weight": (width, width), "ff.ff.0.proj.weight": (8 * width, width),
                  "ff.ff.0.proj.bias": (8 * width,), "ff.ff.2.weight": (width, 4 * width),
                  "ff.ff.2.bias": (width,)}
        found |= {f"transformer.layers.{i}.{key}": shape for key, shape in layer.items()}
    found = {f"model.model.{key}": shape for key, shape in found.items()}
    for number in ("start", "total"):
        embedding = f"conditioner.conditioners.seconds_{number}.embedder.embedding."
        found |= {f"{embedding}0.weights": (features // 2,), f"{embedding}1.bias": (c.context_width,),
                  f"{embedding}1.weight": (c.context_width, features + 1)}
    return found


# ---- at full size, on the meta device

def diffusers_network(name):
    from diffusers import (FluxTransformer2DModel, SD3Transformer2DModel, StableAudioDiTModel,
                           UNet2DConditionModel)

    sd3 = dict(sample_size=128, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
               num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
               pooled_projection_dim=2048, pos_embed_max_size=192)
    sd2 = dict(block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=1024,
               attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
    return {
        "sd1.5": lambda: UNet2DConditionModel(block_out_channels=(320, 640, 1280, 1280),
                                              cross_attention_dim=768, attention_head_dim=8),
        "sd2.1-base": lambda: UNet2DConditionModel(**sd2), "sd2.1": lambda: UNet2DConditionModel(**sd2),
        "sdxl": lambda: UNet2DConditionModel(
            block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816),
        "sd3-medium": lambda: SD3Transformer2DModel(**sd3),
        "sd3.5-medium": lambda: SD3Transformer2DModel(
            **sd3 | dict(pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm")),
        "sd3.5-large": lambda: SD3Transformer2DModel(
            **sd3 | dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432,
                         qk_norm="rms_norm")),
        "flux-dev": lambda: FluxTransformer2DModel(guidance_embeds=True),
        "flux-schnell": lambda: FluxTransformer2DModel(guidance_embeds=False),
        "stable-audio-open-1.0": lambda: StableAudioDiTModel()}[name]()


def projection_of_seconds():
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    return StableAudioProjectionModel(text_encoder_dim=768, conditioning_dim=768, min_value=0, max_value=512)


def original_shapes(name):
    """Names and shapes in the authors' file, behind its prefix where it is a whole one."""
    row, network = published.MODELS[name], published.build_network(name)
    if row.arch == "stable-audio":
        return stable_audio_names(network.config)
    with torch.device("meta"):
        if row.arch == "unet":
            state = compvis_unet(network.config).state_dict()
        elif network.config.single_depth:
            return flux_names(network.config)
        else:
            state = original_sd3(network.state_dict(), network.config)
    return {names.NETWORK + name: tuple(weight.shape) for name, weight in state.items()}


TEXT_MODELS = [name for name, row in published.MODELS.items() if row.text]
SIZES = {"sd1.5": 859_520_964, "sd2.1-base": 865_910_724, "sd2.1": 865_910_724, "sdxl": 2_567_463_684,
         "sd3-medium": 2_028_328_000, "sd3.5-medium": 2_243_171_520, "sd3.5-large": 8_056_627_520,
         "flux-dev": 11_901_408_320, "flux-schnell": 11_891_178_560,
         "stable-audio-open-1.0": 1_057_335_680}
SAME = {"sd2.1-base": ("sd2.1-base", "sd2.1"), "sd2.1": ("sd2.1-base", "sd2.1")}      # eps and v


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_full_size_by_the_authors_names(name):
    shapes = original_shapes(name)
    assert published.recognise(shapes) == SAME.get(name, (name,))
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    published.our_weights(name, names.network_part(state))
    network = published.build_network(name)
    assert sum(p.numel() for p in network.parameters()) == SIZES[name]


@pytest.mark.optional
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_full_size_by_the_names_of_diffusers(name):
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = [diffusers_network(name)]
        if name == "stable-audio-open-1.0":
            theirs.append(projection_of_seconds())
    assert sum(p.numel() for part in theirs for p in part.parameters()) == SIZES[name]
    shapes = {key: weight.shape for part in theirs for key, weight in part.state_dict().items()}
    assert published.recognise(shapes) == SAME.get(name, (name,))


@pytest.mark.optional
@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell"])
def test_flux_by_diffusers_conversion(name):
    """At its full size, for which alone that conversion is written: the same names and shapes."""
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    state = {key: torch.empty(shape, device="meta") for key, shape in original_shapes(name).items()}
    with torch.device("meta"):
        theirs = diffusers_network(name)
    weights.check_weights(theirs, convert_flux_transformer_checkpoint_to_diffusers(state), name)


def test_models_that_weights_cannot_tell_and_others():
    network = published.build_network("dit-b-4-256")
    shapes = {key: tuple(weight.shape) for key, weight in network.state_dict().items()}
    four = tuple(f"{family}-b-4-{side}" for family in ("dit", "sit") for side in (256, 512))
    assert published.recognise(shapes) == four
    assert published.recognise(shapes | {"pos_embed": (1, 256, 768)}) == (four[1], four[3])
    assert published.recognise(shapes | {"pos_embed": (1, 255, 768)}) == ()
    single = {key: (shape[0] // 2, *shape[1:]) if key.startswith("final_layer.linear") else shape
              for key, shape in shapes.items()}
    assert published.recognise(single) == four[2:]                         # only SiT's authors write it
    assert published.recognise({}) == published.recognise({"encoder.conv_in.weight": (4, 3, 3, 3)}) == ()


# ---- folders that diffusers writes

@pytest.mark.optional
@pytest.mark.parametrize("options", [
    dict(), dict(variant="fp16"), dict(safe_serialization=False), dict(max_shard_size="60KB"),
    dict(max_shard_size="60KB", variant="fp16")])
def test_folders_as_diffusers_writes_them(tmp_path, monkeypatch, options):
    """In one file or many, with and without a variant: the same weights as in its network."""
    pytest.importorskip("diffusers")
    from diffusers import SD3Transformer2DModel

    small = dict(width=32, depth=2, heads=2, context_width=24, pooled_width=12, dual_attention=1,
                 sincos=(8, 12))
    row = published.MODELS["sd3.5-medium"]
    monkeypatch.setitem(published.MODELS, "sd3.5-medium", row._replace(config=row.config | small))
    theirs = randomize(SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=12,
        pos_embed_max_size=12, dual_attention_layers=(0,), qk_norm="rms_norm"))
    theirs.pos_embed.pos_embed.copy_(dit.sincos_positions(12, 12, 32, crop=(4, 12)))   # as if trained longer
    if "variant" in options:
        theirs = theirs.half()
    theirs.save_pretrained(tmp_path / "transformer", **options)
    assert ("max_shard_size" in options) == bool(list(tmp_path.glob("transformer/*-of-*")))
    ours = published.load_network("sd3.5-medium", tmp_path)
    assert {p.dtype for p in ours.parameters()} == {next(theirs.parameters()).dtype}
    x, context, pooled = (torch.randn(size).double() for size in ((1, 16, 8, 12), (1, 5, 24), (1, 12)))
    t = torch.tensor([0.25])
    assert_close(ours.double()(x, t, context, pooled=pooled),
                 theirs.double()(x, context, pooled, 1000 * t).sample, 2e-6)
