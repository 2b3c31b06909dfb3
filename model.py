"""Networks: velocity models v(zt, t, y) for points and images, discriminators D(z, y), EMA.

Velocity networks are called `model(zt, t, y=None)`. zt is (B, 2) or (B, C, H, W), t is (B,) in
[0, 1] with t = 1 noise and t = 0 data, y is (B,) int64 labels; the answer has zt's shape.
"""

import copy
import math
import os
from itertools import repeat

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

import parallel
from config import POINT_SETS, UserError

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def time_features(t, dim, time_scale=1.0):
    """Sinusoidal features of time, (B,) -> (B, dim): cosines first, as in ADM (Dhariwal 2021).

    time_scale stretches t before the fixed frequencies 1 ... 1e-4: the published CelebA-HQ teacher
    takes raw t (scale 1), while small networks see time better through a larger scale.
    """
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = time_scale * t[:, None].float() * freqs                      # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Network(nn.Module):
    """A network that `prepare` may set to compute in bf16 or to save memory; it answers float32.

    With `pieces` > 1 a batch goes through in that many pieces, each computed a second time in the
    backward pass, so that only one piece's activations are in memory: gradient accumulation that
    leaves the method, and its result, as they are.
    """

    bf16, pieces, checkpointing = False, 1, False

    def __call__(self, z, *args):
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.bf16):
            whole = super().__call__
            if self.pieces == 1:
                return whole(z, *args).float()
            pieces = zip(*(repeat(x) if x is None else x.chunk(self.pieces) for x in (z, *args)))
            return torch.cat([self.again(whole, *piece).float() for piece in pieces])

    def again(self, function, *args):
        """function(*args), computed again in the backward pass instead of kept in memory."""
        if not torch.is_grad_enabled():
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class LabelEmbedding(nn.Embedding):
    """Class embedding with one extra row, the null condition of Eq. 2, which y = None selects."""

    def __init__(self, num_classes, dim):
        super().__init__(num_classes + 1, dim)

    def forward(self, y, batch):
        if y is None:
            y = torch.full((batch,), self.num_embeddings - 1, device=self.weight.device)
        return super().forward(y)                                         # (B, dim)


# ------------------------------------------------------------------------------------- points


def point_features(z):
    """Coordinates with their sines and cosines at four frequencies, (B, dim) -> (B, 9 dim).

    On bare coordinates an MLP learns smooth functions first and the edges of a density hardly at
    all (Tancik et al., 2020, "Fourier features").
    """
    angles = z[:, :, None] * 2.0 ** torch.arange(4, device=z.device)      # (B, dim, 4)
    return torch.cat([z, angles.sin().flatten(1), angles.cos().flatten(1)], dim=1)


class MLP(Network):
    """Velocity of points, (B, dim): SiLU layers on the features of the point and of its time."""

    def __init__(self, dim=2, channels=128, blocks=3, time_scale=10.0, num_classes=0):
        super().__init__()
        self.time_scale = time_scale
        self.first = nn.Linear(9 * dim + 32, channels)
        self.label_emb = LabelEmbedding(num_classes, channels) if num_classes else None
        self.hidden = nn.ModuleList(nn.Linear(channels, channels) for _ in range(blocks))
        self.last = nn.Linear(channels, dim)

    def forward(self, zt, t, y=None):
        features = point_features(zt), time_features(t, 32, self.time_scale)
        h = self.first(torch.cat(features, dim=1))
        if self.label_emb is not None:
            h = h + self.label_emb(y, len(zt))
        for layer in self.hidden:
            h = layer(F.silu(h))                                          # (B, channels)
        return self.last(F.silu(h))


class PointDiscriminator(Network):
    """D(z) of points, (B, dim) -> (B,) logits, large where z looks like data."""

    def __init__(self, dim=2, channels=128, num_classes=0):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(9 * dim, channels), nn.LeakyReLU(0.2),
            nn.Linear(channels, channels), nn.LeakyReLU(0.2),
            nn.Linear(channels, channels), nn.LeakyReLU(0.2),
        )
        self.head = Head(channels, num_classes)

    def forward(self, z, y=None):
        return self.head(self.body(point_features(z)), y)


class Head(nn.Module):
    """Last layer of a discriminator; labels enter by projection (Miyato and Koyama, 2018)."""

    def __init__(self, channels, num_classes=0):
        super().__init__()
        self.linear = nn.Linear(channels, 1)
        self.label_emb = LabelEmbedding(num_classes, channels) if num_classes else None

    def forward(self, h, y=None):
        logits = self.linear(h).squeeze(1)                                # (B,)
        if self.label_emb is not None:
            logits = logits + (h * self.label_emb(y, len(h))).sum(1) / math.sqrt(h.shape[1])
        return logits


# --------------------------------------------------------------------------- images and latents


def norm(channels):
    """GroupNorm as in ADM: 32 groups, fewer where a group would have less than four channels."""
    return nn.GroupNorm(math.gcd(32, max(channels // 4, 1)), channels)


class ResBlock(nn.Module):
    """Residual block of ADM: time scales and shifts the second norm; the last conv starts at 0."""

    def __init__(self, channels, emb_channels, out_channels):
        super().__init__()
        self.in_layers = nn.Sequential(
            norm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels))
        # the identity stands where ADM has dropout, so that the keys of its checkpoints fit
        self.out_layers = nn.Sequential(
            norm(out_channels), nn.SiLU(), nn.Identity(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        nn.init.zeros_(self.out_layers[3].weight)
        nn.init.zeros_(self.out_layers[3].bias)
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, emb):
        h = self.in_layers(x)
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        return self.skip_connection(x) + self.out_layers[1:](h)


class Attention(nn.Module):
    """Self-attention over all positions; channels lie as [head 0: q k v | head 1: q k v | ...]."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x, emb):
        height, width = x.shape[2:]
        qkv = self.qkv(rearrange(self.norm(x), "b c h w -> b c (h w)"))
        q, k, v = rearrange(qkv, "b (n three c) l -> three b n l c", three=3, n=self.heads)
        h = F.scaled_dot_product_attention(q, k, v)                       # scaled by c ** -0.5
        h = self.proj_out(rearrange(h, "b n l c -> b (n c) l"))
        return x + rearrange(h, "b c (h w) -> b c h w", h=height, w=width)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, emb):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, emb):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stem(nn.Conv2d):
    def forward(self, x, emb):
        return super().forward(x)


class Stage(nn.ModuleList):
    """Layers run one after another, each given the time embedding."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb)
        return x


class UNet(Network):
    """Velocity of images or latents, (B, C, H, W): the UNet of ADM, in any size.

    With in_channels=4, channels=256, mult=(1, 2, 2, 2), blocks=2, attention=(3,), heads=4,
    time_scale=1 it is the network of the published CelebA-HQ teacher, key for key: 304 tensors,
    153,099,524 parameters. `mult` holds a channel multiplier a level, each level at half the
    resolution of the one before; `attention` the levels (0 is the finest) that have attention; the
    middle always has. patch_size > 1 folds p x p pixels into channels before the first layer.
    """

    def __init__(self, in_channels=4, channels=256, mult=(1, 2, 2, 2), blocks=2, attention=(3,),
                 heads=4, time_scale=1.0, patch_size=1, num_classes=0):
        super().__init__()
        self.channels, self.time_scale, self.patch_size = channels, time_scale, patch_size
        self.divisor = patch_size * 2 ** (len(mult) - 1)                  # H and W must divide by
        emb_channels = 4 * channels
        self.time_embed = nn.Sequential(
            nn.Linear(channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        self.label_emb = LabelEmbedding(num_classes, emb_channels) if num_classes else None

        def attend(level, ch):
            return [Attention(ch, heads)] if level in attention else []

        # down: every stage's output is kept for the way up
        folded, ch = in_channels * patch_size**2, channels
        self.input_blocks = nn.ModuleList([Stage([Stem(folded, ch, 3, padding=1)])])
        kept = [ch]
        for level, m in enumerate(mult):
            for _ in range(blocks):
                out = m * channels
                layers = [ResBlock(ch, emb_channels, out), *attend(level, out)]
                self.input_blocks.append(Stage(layers))
                ch = out
                kept.append(ch)
            if level < len(mult) - 1:
                self.input_blocks.append(Stage([Downsample(ch)]))
                kept.append(ch)

        self.middle_block = Stage([
            ResBlock(ch, emb_channels, ch), Attention(ch, heads), ResBlock(ch, emb_channels, ch)
        ])

        # up: one block more a level than on the way down, each joined by a kept output
        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for i in range(blocks + 1):
                out = m * channels
                layers = [ResBlock(ch + kept.pop(), emb_channels, out), *attend(level, out)]
                if level > 0 and i == blocks:
                    layers.append(Upsample(out))
                self.output_blocks.append(Stage(layers))
                ch = out

        self.out = nn.Sequential(norm(ch), nn.SiLU(), nn.Conv2d(ch, folded, 3, padding=1))
        nn.init.zeros_(self.out[2].weight)
        nn.init.zeros_(self.out[2].bias)

    def forward(self, zt, t, y=None):
        if zt.shape[2] % self.divisor or zt.shape[3] % self.divisor:
            raise ValueError(f"this UNet takes heights and widths that divide by {self.divisor}, "
                             f"not {zt.shape[2]} x {zt.shape[3]}")
        p = self.patch_size
        h = rearrange(zt, "b c (h p) (w q) -> b (c p q) h w", p=p, q=p)
        emb = self.time_embed(time_features(t, self.channels, self.time_scale))
        if self.label_emb is not None:
            emb = emb + self.label_emb(y, len(zt))

        kept = []
        for stage in self.input_blocks:
            h = self.run(stage, h, emb)
            kept.append(h)
        h = self.run(self.middle_block, h, emb)
        for stage in self.output_blocks:
            h = self.run(stage, torch.cat([h, kept.pop()], dim=1), emb)
        return rearrange(self.out(h), "b (c p q) h w -> b c (h p) (w q)", p=p, q=p)


    def run(self, stage, h, emb):
        return self.again(stage, h, emb) if self.checkpointing else stage(h, emb)


class DownBlock(nn.Module):
    """Residual block of the discriminator that halves the resolution; no norm, so R1 acts on it."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, out_channels, 1, bias=False)

    def forward(self, x):
        h = F.leaky_relu(self.conv1(F.leaky_relu(x, 0.2)), 0.2)
        # pooling before the 1x1 and after the 3x3 is the cheap order of the same two results
        h = F.avg_pool2d(self.conv2(h), 2, ceil_mode=True)
        return (h + self.skip(F.avg_pool2d(x, 2, ceil_mode=True))) / math.sqrt(2)


class ImageDiscriminator(Network):
    """D(z) of images or latents, (B, C, H, W) -> (B,) logits: residual blocks down to 4 x 4."""

    def __init__(self, shape, channels=64, patch_size=1, num_classes=0):
        super().__init__()
        self.patch_size = patch_size
        c, size = shape[0] * patch_size**2, shape[1] // patch_size
        self.stem = nn.Conv2d(c, channels, 3, padding=1)
        blocks, ch = [], channels
        while size > 4:
            out = min(2 * ch, 8 * channels)
            blocks.append(DownBlock(ch, out))
            ch, size = out, (size + 1) // 2
        self.blocks = nn.Sequential(*blocks)
        self.dense = nn.Linear(ch * size * size, ch)
        self.head = Head(ch, num_classes)

    def forward(self, z, y=None):
        p = self.patch_size
        h = self.stem(rearrange(z, "b c (h p) (w q) -> b (c p q) h w", p=p, q=p))
        h = F.leaky_relu(self.blocks(h), 0.2).flatten(1)
        return self.head(F.leaky_relu(self.dense(h), 0.2), y)


def kaiming(discriminator):
    """Weights that keep the size of activations through LeakyReLUs: without norms they must."""
    for module in discriminator.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, a=0.2)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return discriminator


# ----------------------------------------------------------------------------------------- EMA


@torch.no_grad()
def ema_update(ema, model, decay):
    """ema <- decay ema + (1 - decay) model, all tensors in one fused call."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ------------------------------------------------------------------------------ from the settings


def velocity_network(cfg, shape):
    """The velocity network for samples of `shape`: an MLP for (dim,), a UNet for (C, H, W)."""
    if len(shape) == 1:
        return MLP(shape[0], cfg.channels, cfg.blocks, cfg.time_scale, cfg.num_classes)
    divisor = cfg.patch_size * 2 ** (len(cfg.mult) - 1)
    widths = [m * cfg.channels for m in cfg.mult]
    attended = {w for level, w in enumerate(widths) if level in cfg.attention} | {*widths[-1:]}
    if not widths or min(widths) < 4 or any(w % 4 for w in widths) or any(
            w % cfg.heads for w in attended):
        raise UserError(f"--channels {cfg.channels} times each --mult must divide by 4, and by "
                        f"--heads {cfg.heads} where there is attention")
    if any(not 0 <= level < len(widths) for level in cfg.attention):
        raise UserError(f"--attention {' '.join(map(str, cfg.attention))} names a level that is "
                        f"not there; --mult makes the levels 0 to {len(widths) - 1}")
    if shape[1] % divisor or shape[2] % divisor:
        raise UserError(f"images of {shape[1]} x {shape[2]} do not divide by {divisor}; choose "
                        "another --patch-size, or fewer levels by --mult")
    return UNet(shape[0], cfg.channels, cfg.mult, cfg.blocks, cfg.attention, cfg.heads,
                cfg.time_scale, cfg.patch_size, cfg.num_classes)


def discriminator(cfg, shape):
    """The discriminator for samples of `shape`."""
    if len(shape) == 1:
        return kaiming(PointDiscriminator(shape[0], cfg.disc_channels, cfg.num_classes))
    return kaiming(ImageDiscriminator(shape, cfg.disc_channels, cfg.patch_size, cfg.num_classes))


def choose_device(cfg):
    """The device of the settings, with the CPU's thread count set; UserError where it is absent."""
    name = cfg.device
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and parallel.WORLD > 1:
        name = f"cuda:{parallel.LOCAL_RANK}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:   # each device its own
        raise UserError(f"this machine has no device {name!r}; --device cpu always works") from e
    if device.type == "cuda":
        torch.cuda.set_device(device)
    points = cfg.dataset in POINT_SETS
    # a small MLP gains nothing from many threads: handing out the work costs more than it
    torch.set_num_threads(cfg.threads or (min(2, CORES) if points else CORES))
    return device


def prepare(network, cfg, device):
    """The network on its device, in its memory format and precision, maybe compiled.

    All of this stays inside the network's call, so that no line of the method knows of it.
    """
    points = cfg.dataset in POINT_SETS
    network.to(device)
    if cfg.channels_last and not points:
        network.to(memory_format=torch.channels_last)
    if isinstance(network, UNet):
        network.pieces, network.checkpointing = cfg.grad_accum, cfg.checkpointing
    if cfg.compile and isinstance(network, (MLP, UNet)):
        network.compile()
    network.bf16 = wants_bf16(cfg, device)
    return network


def wants_bf16(cfg, device):
    """Whether the settings ask for bf16; `auto` does for images, where the device is fast at it."""
    points = cfg.dataset in POINT_SETS
    return cfg.precision == "bf16" or (
        cfg.precision == "auto" and not points and fast_bf16(device))


def fast_bf16(device):
    """Whether the device multiplies bf16 matrices in hardware: NVIDIA from Ampere on, CPUs with AMX
    or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(getattr(torch.cpu, f"_is_{name}_supported", bool)()
                                        for name in ("amx_tile", "avx512_bf16"))


@torch.no_grad()
def copy_of(network):
    """A frozen copy of a network: same weights, no gradients, evaluation mode."""
    return copy.deepcopy(network).eval().requires_grad_(False)
