"""Networks: velocity models v(zt, t, y) for points and images, discriminators D(z, y), EMA.

Velocity networks are called `model(zt, t, y=None)`. zt is (B, 2) or (B, C, H, W), t is (B,) in
[0, 1] with t = 1 noise and t = 0 data. y is (B,) int64 labels, (B, L) int64 words of captions,
(B, L, D) embeddings of text (Stable Diffusion), or None. The answer has the shape of zt.
"""

import copy
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from config import LATENT_DOWNSAMPLING, LATENT_SETS
from harness import UserError
from harness.machine import Network, VelocityNetwork

WORD = 64                          # numbers per word of a caption, from Text


def time_features(t, dim, time_scale=1.0):
    """Sinusoidal features of time, (B,) -> (B, dim): cosines first, as in ADM (Dhariwal 2021).

    t is multiplied by time_scale before the fixed frequencies 1 ... 1e-4. The published CelebA-HQ
    teacher takes raw t (scale 1); small networks learn better with a larger scale.
    """
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = time_scale * t[:, None].float() * freqs                      # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Float32(nn.Sequential):
    """Layers that compute in float32 even under autocast: bf16 confuses neighbouring times."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class LabelEmbedding(nn.Embedding):
    """Class embedding with one extra row, the null condition of Eq. 3, which y = None selects."""

    def __init__(self, num_classes, dim):
        super().__init__(num_classes + 1, dim)

    def forward(self, y, batch):
        if y is None:
            y = torch.full((batch,), self.num_embeddings - 1, device=self.weight.device)
        return super().forward(y)                                         # (B, dim)


class Text(nn.Module):
    """A small text encoder: embedding, positions, one transformer block; (B, L) -> (B, L, dim).

    y = None is the null condition, the empty caption: all tokens are 0.
    """

    def __init__(self, words, length=8, dim=WORD):
        super().__init__()
        self.length = length
        self.words = nn.Embedding(words, dim)
        self.positions = nn.Parameter(torch.randn(length, dim))   # N(0, 1), as nn.Embedding
        self.block = nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.0, batch_first=True,
                                                norm_first=True)

    def forward(self, y, batch):
        if y is None:
            y = torch.zeros(batch, self.length, dtype=torch.long, device=self.positions.device)
        return self.block(self.words(y) + self.positions)


# ------------------------------------------------------------------------------------- points


def point_features(z):
    """Coordinates with their sines and cosines at four frequencies, (B, dim) -> (B, 9 dim).

    From the coordinates alone an MLP learns smooth functions, but not the sharp edges of a density
    (Tancik et al., 2020, "Fourier features").
    """
    angles = z[:, :, None] * 2.0 ** torch.arange(4, device=z.device)      # (B, dim, 4)
    return torch.cat([z, angles.sin().flatten(1), angles.cos().flatten(1)], dim=1)


class MLP(VelocityNetwork):
    """Velocity of points, (B, dim): SiLU layers on the features of the point and of its time."""

    def __init__(self, dim=2, channels=128, blocks=3, time_scale=10.0, num_classes=0):
        super().__init__()
        self.time_scale = time_scale
        self.first = nn.Linear(9 * dim + 32, channels)
        self.label_emb = LabelEmbedding(num_classes, channels) if num_classes else None
        self.span_emb = None                       # see flow_map
        self.hidden = nn.ModuleList(nn.Linear(channels, channels) for _ in range(blocks))
        self.last = nn.Linear(channels, dim)

    def forward(self, zt, t, y=None, r=None):
        features = point_features(zt), time_features(t, 32, self.time_scale)
        h = self.first(torch.cat(features, dim=1))
        if self.span_emb is not None:
            h = h + self.span_emb(span_features(t, r, self.time_scale))
        if self.label_emb is not None:
            h = h + self.label_emb(y, len(zt))
        for layer in self.hidden:
            h = layer(F.silu(h))                                          # (B, channels)
        return self.last(F.silu(h))


class PointDiscriminator(Network):
    """D(z) of points, (B, dim) -> (B,) logits, large if z looks like data."""

    def __init__(self, dim=2, channels=128, num_classes=0):
        super().__init__()
        widths = [9 * dim, channels, channels, channels]
        self.body = nn.Sequential(*[layer for a, b in zip(widths, widths[1:])
                                    for layer in (nn.Linear(a, b), nn.LeakyReLU(0.2))])
        self.head = Head(channels, num_classes)

    def forward(self, z, y=None):
        return self.head(self.body(point_features(z)), y)


class Head(nn.Module):
    """Last layer of a discriminator; conditions enter by projection (Miyato and Koyama, 2018)."""

    def __init__(self, channels, num_classes=0, num_words=0):
        super().__init__()
        self.linear = nn.Linear(channels, 1)
        self.label_emb = LabelEmbedding(num_classes, channels) if num_classes else None
        self.text = Text(num_words) if num_words else None
        self.words_emb = nn.Linear(WORD, channels) if num_words else None

    def forward(self, h, y=None):
        logits = self.linear(h).squeeze(1)                                # (B,)
        if self.label_emb is not None:
            logits = logits + (h * self.label_emb(y, len(h))).sum(1) / math.sqrt(h.shape[1])
        if self.text is not None:
            c = self.words_emb(self.text(y, len(h)).sum(1))               # (B, channels)
            logits = logits + (h * c).sum(1) / math.sqrt(h.shape[1])
        return logits


# --------------------------------------------------------------------------- images and latents


def norm(channels):
    """GroupNorm as in ADM: 32 groups, or fewer so that each group has at least four channels."""
    return nn.GroupNorm(math.gcd(32, max(channels // 4, 1)), channels)


def zeroed(layer):
    """The layer, with weights and bias set to zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """Residual block of ADM: time scales and shifts the second norm; the last conv starts at 0."""

    def __init__(self, channels, emb_channels, out_channels):
        super().__init__()
        self.in_layers = nn.Sequential(
            norm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = Float32(nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels))
        # ADM has dropout in place of the identity; with it, the keys of its checkpoints fit
        self.out_layers = nn.Sequential(
            norm(out_channels), nn.SiLU(), nn.Identity(),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, emb):
        h = self.in_layers(x)
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        return self.skip_connection(x) + self.out_layers[1:](h)


class Attention(nn.Module):
    """Self-attention over all positions; channels are [head 0: q k v | head 1: q k v | ...]."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x, emb):
        height, width = x.shape[2:]
        qkv = self.qkv(rearrange(self.norm(x), "b c h w -> b c (h w)"))
        q, k, v = rearrange(qkv, "b (n three c) l -> three b n l c", three=3, n=self.heads)
        h = F.scaled_dot_product_attention(q, k, v)                       # scaled by c ** -0.5
        h = self.proj_out(rearrange(h, "b n l c -> b (n c) l"))
        return x + rearrange(h, "b c (h w) -> b c h w", h=height, w=width)


class CrossAttention(nn.Module):
    """Attention of all positions to the words of a text; its answer starts at 0."""

    def __init__(self, channels, heads, text_channels=WORD):
        super().__init__()
        self.heads = heads
        self.norm = norm(channels)
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(text_channels, 2 * channels)
        self.proj_out = zeroed(nn.Linear(channels, channels))

    def forward(self, x, words):
        height, width = x.shape[2:]
        q = self.q(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        q = rearrange(q, "b l (n c) -> b n l c", n=self.heads)
        k, v = rearrange(self.kv(words), "b l (two n c) -> two b n l c", two=2, n=self.heads)
        h = F.scaled_dot_product_attention(q, k, v)
        h = self.proj_out(rearrange(h, "b n l c -> b l (n c)"))
        return x + rearrange(h, "b (h w) c -> b c h w", h=height, w=width)


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
    """Layers run one after another, each given the time embedding, or the words of the text."""

    def forward(self, x, emb, words=None):
        for layer in self:
            x = layer(x, words if isinstance(layer, CrossAttention) else emb)
        return x


class UNet(VelocityNetwork):
    """Velocity of images or latents, (B, C, H, W): the UNet of ADM, in any size.

    With in_channels=4, channels=256, mult=(1, 2, 2, 2), blocks=2, attention=(3,), heads=4,
    time_scale=1 it is the network of the published CelebA-HQ teacher, key for key: 304 tensors,
    153,099,524 parameters. `mult` holds one channel multiplier per level; each level has half the
    resolution of the one before. `attention` names the levels with attention (0 is the finest); the
    middle always has it. patch_size > 1 folds p x p pixels into channels before the first layer.
    """

    def __init__(self, in_channels=4, channels=256, mult=(1, 2, 2, 2), blocks=2, attention=(3,),
                 heads=4, time_scale=1.0, patch_size=1, num_classes=0, num_words=0):
        super().__init__()
        self.channels, self.time_scale, self.patch_size = channels, time_scale, patch_size
        self.divisor = patch_size * 2 ** (len(mult) - 1)                  # of height and width
        emb_channels, self.span_emb = 4 * channels, None                  # see flow_map
        self.time_embed = Float32(
            nn.Linear(channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        self.label_emb = LabelEmbedding(num_classes, emb_channels) if num_classes else None
        self.text = Text(num_words) if num_words else None
        self.words_emb = Float32(nn.Linear(WORD, emb_channels)) if num_words else None

        def attend(ch, level, always=False):
            layers = [Attention(ch, heads)] if always or level in attention else []
            reads = num_words and level == len(mult) - 1
            return layers + ([CrossAttention(ch, heads)] if reads else [])

        # down: the output of every stage is kept for the way up
        folded, ch = in_channels * patch_size**2, channels
        self.input_blocks = nn.ModuleList([Stage([Stem(folded, ch, 3, padding=1)])])
        kept = [ch]
        for level, m in enumerate(mult):
            for _ in range(blocks):
                out = m * channels
                layers = [ResBlock(ch, emb_channels, out), *attend(out, level)]
                self.input_blocks.append(Stage(layers))
                ch = out
                kept.append(ch)
            if level < len(mult) - 1:
                self.input_blocks.append(Stage([Downsample(ch)]))
                kept.append(ch)

        self.middle_block = Stage([
            ResBlock(ch, emb_channels, ch), *attend(ch, level, always=True),
            ResBlock(ch, emb_channels, ch)
        ])

        # up: one block more per level than on the way down; each also takes a kept output
        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for i in range(blocks + 1):
                out = m * channels
                layers = [ResBlock(ch + kept.pop(), emb_channels, out), *attend(out, level)]
                if level > 0 and i == blocks:
                    layers.append(Upsample(out))
                self.output_blocks.append(Stage(layers))
                ch = out

        self.out = nn.Sequential(norm(ch), nn.SiLU(), zeroed(nn.Conv2d(ch, folded, 3, padding=1)))

    def forward(self, zt, t, y=None, r=None):
        if zt.shape[2] % self.divisor or zt.shape[3] % self.divisor:
            raise ValueError(f"this UNet takes heights and widths that divide by {self.divisor}, "
                             f"not {zt.shape[2]} x {zt.shape[3]}")
        p = self.patch_size
        h = rearrange(zt, "b c (h p) (w q) -> b (c p q) h w", p=p, q=p)
        emb = self.time_embed(time_features(t, self.channels, self.time_scale))
        if self.span_emb is not None:
            emb = emb + self.span_emb(span_features(t, r, self.time_scale))
        words = None
        if self.label_emb is not None:
            emb = emb + self.label_emb(y, len(zt))
        if self.text is not None:
            words = self.text(y, len(zt))
            # the sum: with the mean, which is much smaller, digits are learnt slowly
            emb = emb + self.words_emb(words.sum(1))

        kept = []
        for stage in self.input_blocks:
            h = self.run(stage, h, emb, words)
            kept.append(h)
        h = self.run(self.middle_block, h, emb, words)
        for stage in self.output_blocks:
            h = self.run(stage, torch.cat([h, kept.pop()], dim=1), emb, words)
        return rearrange(self.out(h), "b (c p q) h w -> b c (h p) (w q)", p=p, q=p)

    def run(self, stage, *inputs):
        return self.again(stage, *inputs) if self.checkpointing else stage(*inputs)


def span_features(t, r, time_scale):
    """Features of the span t - r of a step from t to r, (B,) -> (B, 32); r = None is r = 0."""
    return time_features(t if r is None else t - r, 32, time_scale)


def flow_map(network):
    """A copy of an MLP or UNet that is also told r (B,), the time at which a step ends.

    It is called u(zt, t, y, r). The layer for t - r starts at 0, so at first u = v for every r.
    """
    network = copy_of(network)
    channels = 4 * network.channels if isinstance(network, UNet) else network.first.out_features
    network.span_emb = Float32(zeroed(nn.Linear(32, channels)))
    return network.requires_grad_(False)


class DownBlock(nn.Module):
    """Residual block of the discriminator: halves the resolution, without a norm."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, out_channels, 1, bias=False)

    def forward(self, x):
        h = F.leaky_relu(self.conv1(F.leaky_relu(x, 0.2)), 0.2)
        h = F.avg_pool2d(self.conv2(h), 2, ceil_mode=True)
        # skip, a 1x1 convolution, and average pooling commute; pooling first is cheaper
        return (h + self.skip(F.avg_pool2d(x, 2, ceil_mode=True))) / math.sqrt(2)


class ImageDiscriminator(Network):
    """D(z) of images or latents, (B, C, H, W) -> (B,) logits: residual blocks down to 4 x 4."""

    def __init__(self, shape, channels=64, patch_size=1, num_classes=0, num_words=0):
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
        self.head = Head(ch, num_classes, num_words)

    def forward(self, z, y=None):
        p = self.patch_size
        h = self.stem(rearrange(z, "b c (h p) (w q) -> b (c p q) h w", p=p, q=p))
        h = F.leaky_relu(self.blocks(h), 0.2).flatten(1)
        return self.head(F.leaky_relu(self.dense(h), 0.2), y)


class UNetEncoder(nn.Module):
    """The encoder half of Stable Diffusion's UNet, at t = 0: latents and text -> (B, C, h, w)."""

    def __init__(self, unet):
        super().__init__()
        self.conv_in, self.time_proj, self.time_embedding, self.down_blocks, self.mid_block = (
            unet.conv_in, unet.time_proj, unet.time_embedding, unet.down_blocks, unet.mid_block)

    def forward(self, z, y):
        emb, h = self.time_proj(z.new_zeros(len(z))).to(z.dtype), self.conv_in(z)
        emb = self.time_embedding(emb)
        for block in self.down_blocks:
            text = {"encoder_hidden_states": y} if hasattr(block, "attentions") else {}
            h, _ = block(h, emb, **text)
        return self.mid_block(h, emb, encoder_hidden_states=y)


class UNetDiscriminator(VelocityNetwork):          # which can save memory
    """D(z, y) -> (B,) logits: the encoder half of Stable Diffusion's UNet, and a small head.

    The text y (B, L, D) enters by cross-attention; null (L, D) is the empty one. The head has no
    sigmoid, since the losses have one. At least 4 x 4 positions must be left in the middle of the
    UNet. A frozen encoder is kept in a list: so it is no parameter of D, and in no checkpoint.
    """

    def __init__(self, unet, null, trained=True):
        super().__init__()
        encoder = UNetEncoder(unet).requires_grad_(trained)
        self.encoder, self.frozen = (encoder, []) if trained else (None, [encoder])
        self.register_buffer("null", null)
        side = unet.config.sample_size // 2 ** (len(unet.down_blocks) - 1)
        self.head = nn.Sequential(
            nn.Conv2d(unet.config.block_out_channels[-1], 256, 4, stride=2), nn.GroupNorm(32, 256),
            nn.SiLU(), nn.Flatten(), nn.Linear(256 * (side // 2 - 1) ** 2, 1))

    def compile(self, *args, **more):              # of nn.Module: discriminators never are
        pass

    def _apply(self, fn, recurse=True):            # of nn.Module, for .to(device) and the like
        for encoder in self.frozen:
            encoder._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, z, y=None):
        y = self.null.expand(len(z), -1, -1) if y is None else y
        encoder = self.encoder or self.frozen[0]
        return self.head(encoder(z, y)).squeeze(1)


def kaiming(discriminator):
    """Weights that keep the size of activations through LeakyReLUs, since there are no norms."""
    for module in discriminator.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, a=0.2)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return discriminator


# ------------------------------------------------------------------- conditions and guidance


def guided(model, zt, t, y, w):
    """v(null) + w (v(y) - v(null)), classifier-free guidance (Eq. 3); w = 1 is the plain call.

    y = None is the null condition itself. Any other w costs a second call.
    """
    if w == 1 or y is None:
        return model(zt, t, y)
    null = model(zt, t)
    return null + w * (model(zt, t, y) - null)


class Guided(nn.Module):
    """A velocity network whose calls are guided with one fixed w."""

    def __init__(self, network, w):
        super().__init__()
        self.network, self.w = network, w

    def forward(self, zt, t, y=None):
        return guided(self.network, zt, t, y, self.w)


def with_nulls(y, drop, num_classes):
    """Labels y (B,) or tokens (B, L), some replaced by the null condition (for Eq. 3).

    drop (B,) marks them. The null condition is one class more, or the empty text.
    """
    if y.ndim == 1:
        return torch.where(drop, num_classes, y)
    return torch.where(drop[:, None], 0, y)


# --------------------------------------------------------------- averages and learning rates


@torch.no_grad()
def ema_update(ema, model, decay):
    """ema <- decay ema + (1 - decay) model, all tensors in one fused call."""
    averages = list(ema.parameters())
    weights = [p.to(a.device) for p, a in zip(model.parameters(), averages)]
    get_ema_multi_avg_fn(decay)(averages, weights, None)


def copy_of(network):
    """A frozen copy of a network: same weights, no gradients, evaluation mode."""
    return copy.deepcopy(network).eval().requires_grad_(False)


def set_rates(cfg, step, steps, *pairs, final=None):
    """Sets the learning rates of (optimiser, peak rate) pairs for iteration `step` of `steps`.

    They rise from zero in cfg.lr_warmup steps and fall along a cosine to `final` (cfg.lr_final) of
    the peak.
    """
    final = cfg.lr_final if final is None else final
    fall = final + (1 - final) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    for opt, lr in pairs:
        for group in opt.param_groups:
            group["lr"] = lr * fall * min(1.0, (step + 1) / max(cfg.lr_warmup, 1))


# ------------------------------------------------------------------------------ from the settings


def velocity_network(cfg, shape):
    """The velocity network for samples of `shape`: an MLP for (dim,), a UNet for (C, H, W).

    Raises UserError if the settings make no network for this shape.
    """
    check_network(cfg, shape)
    if cfg.dataset == "captioned":
        import text2image                          # not above: it needs optional packages
        return text2image.velocity(cfg.teacher_checkpoint, weights=False)
    if len(shape) == 1:
        return MLP(shape[0], cfg.channels, cfg.blocks, cfg.time_scale, cfg.num_classes)
    return UNet(shape[0], cfg.channels, cfg.mult, cfg.blocks, cfg.attention, cfg.heads,
                cfg.time_scale, cfg.patch_size, *classes_and_words(cfg))


def check_network(cfg, shape):
    """UserError if the settings make no network for samples of `shape`; nothing is built."""
    if cfg.dataset == "captioned":
        import text2image
        wanted = text2image.found(cfg.teacher_checkpoint).shape
        if tuple(shape) != wanted:
            raise UserError(f"{cfg.teacher_checkpoint} takes latents of shape {wanted}, and "
                            f"--vae {cfg.vae} --image-size {cfg.image_size} make {tuple(shape)}; "
                            f"use --image-size {LATENT_DOWNSAMPLING * wanted[1]}")
    if len(shape) == 1 or cfg.dataset == "captioned":
        return
    divisor = cfg.patch_size * 2 ** (len(cfg.mult) - 1)
    widths = [m * cfg.channels for m in cfg.mult]
    attended = {w for level, w in enumerate(widths) if level in cfg.attention} | {*widths[-1:]}
    if not widths or min(widths) < 4 or any(w % 4 for w in widths) or any(
            w % cfg.heads for w in attended):
        raise UserError(f"--channels {cfg.channels} times each --mult must be a multiple of 4, and "
                        f"of --heads {cfg.heads} at the levels with attention")
    if any(not 0 <= level < len(widths) for level in cfg.attention):
        raise UserError(f"--attention {' '.join(map(str, cfg.attention))} names a level that does "
                        f"not exist; --mult makes the levels 0 to {len(widths) - 1}")
    if shape[1] % divisor or shape[2] % divisor:
        size = f"{shape[1]} x {shape[2]}"
        if cfg.dataset in LATENT_SETS:
            size = f"--image-size {cfg.image_size}"
            divisor *= LATENT_DOWNSAMPLING
        raise UserError(f"this network needs image sizes that are multiples of {divisor}, which "
                        f"{size} is not; choose another size or --patch-size, or fewer levels by "
                        "--mult")


def discriminator(cfg, shape):
    """The discriminator for samples of `shape`.

    captioned: made of the pipeline's UNet; a transformer has no encoder half, so the plain one.
    """
    if cfg.dataset == "captioned":
        import text2image
        network = text2image.velocity(cfg.teacher_checkpoint)
        if network.is_unet:
            if cfg.checkpointing:
                network.inner.enable_gradient_checkpointing()
            return UNetDiscriminator(network.inner, network.null, cfg.disc_trunk == "trained")
    if len(shape) == 1:
        return kaiming(PointDiscriminator(shape[0], cfg.disc_channels, cfg.num_classes))
    return kaiming(ImageDiscriminator(shape, cfg.disc_channels, cfg.patch_size,
                                      *classes_and_words(cfg)))


def classes_and_words(cfg):
    """(number of classes, number of words): what the networks are told, and 0 for the other."""
    return (0, cfg.num_classes) if cfg.condition == "text" else (cfg.num_classes, 0)
