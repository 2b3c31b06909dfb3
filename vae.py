"""Frozen autoencoders between images and latents: Stable Diffusion's VAE, TAESD, TAEF2.

    vae = load("sd")                               # or load("taef2", ["enc.pth", "dec.pth"])
    mean, logvar = vae.encode(images)              # images float32 (B, 3, H, W) in [-1, 1]
    z0 = vae.sample(mean, logvar, noise)           # (B, C, H/8, W/8), the latents one trains on
    images = vae.decode(z0)                        # in [-1, 1], not clamped

Weights come through torchvision's mechanism: a WeightsEnum of Weights(url, transforms, meta), put
by torch.hub into its cache, where a machine without a network finds a file laid there by hand.
"""

import hashlib
import re
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.models import Weights, WeightsEnum

from config import UserError
from data import from_uint8


def entry(url, **meta):
    return Weights(url=url, transforms=lambda: from_uint8, meta=meta)


HUB = "https://huggingface.co/stabilityai/sd-vae-ft-mse/resolve/main"
TINY = "https://github.com/madebyollin/taesd/raw/main"


class Autoencoder_Weights(WeightsEnum):
    """Published weights; `file_name` in meta is the name in torch.hub's cache.

    A name that ends in -<first 8 digits of its sha256> is checked against them. The authors of the
    tiny ones publish no hashes.
    """

    SD_FT_MSE = entry(f"{HUB}/diffusion_pytorch_model.bin", file_name="sd_vae_ft_mse-1b4889b6.pth",
                      num_params=83_653_863, license="MIT")
    TAESD_ENCODER = entry(f"{TINY}/taesd_encoder.pth", file_name="taesd_encoder.pth", license="MIT")
    TAESD_DECODER = entry(f"{TINY}/taesd_decoder.pth", file_name="taesd_decoder.pth", license="MIT")
    TAEF2_ENCODER = entry(f"{TINY}/taef2_encoder.pth", file_name="taef2_encoder.pth", license="MIT")
    TAEF2_DECODER = entry(f"{TINY}/taef2_decoder.pth", file_name="taef2_decoder.pth", license="MIT")


# --------------------------------------------------------- Stable Diffusion's AutoencoderKL, f8


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class Resnet(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.norm1, self.conv1 = norm(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Self-attention over all positions, one head."""

    def __init__(self, channels):
        super().__init__()
        self.group_norm = norm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        h = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + rearrange(self.to_out[0](h), "b (h w) c -> b c h w", h=x.shape[2])


class Middle(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Down(nn.Module):
    """Strided convolution; the one row and column of padding lie below and to the right."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, then the way down or up to the next where there is one."""

    def __init__(self, channels, out, blocks, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList(
            Resnet(channels if i == 0 else out, out) for i in range(blocks))
        if down:
            self.downsamplers = nn.ModuleList([Down(out)])
        if up:
            self.upsamplers = nn.ModuleList([Up(out)])

    def forward(self, x):
        for layer in (layer for layers in self.children() for layer in layers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    def __init__(self, widths, latent):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        ins = (widths[0], *widths)
        self.down_blocks = nn.ModuleList(
            Level(ins[i], out, 2, down=i < len(widths) - 1) for i, out in enumerate(widths))
        self.mid_block = Middle(widths[-1])
        self.conv_norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, widths, latent):
        super().__init__()
        widths = widths[::-1]
        self.conv_in = nn.Conv2d(latent, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0])
        ins = (widths[0], *widths)
        self.up_blocks = nn.ModuleList(
            Level(ins[i], out, 3, up=i < len(widths) - 1) for i, out in enumerate(widths))
        self.conv_norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z):
        z = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            z = level(z)
        return self.conv_out(F.silu(self.conv_norm_out(z)))


class AutoencoderKL(nn.Module):
    """Stable Diffusion's VAE: 248 tensors, 83,653,863 parameters; names as in diffusers' files."""

    channels, scale, stochastic = 4, 0.18215, True

    def __init__(self, widths=(128, 256, 512, 512)):
        super().__init__()
        self.encoder, self.decoder = Encoder(widths, 4), Decoder(widths, 4)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)

    def encode(self, x):
        """Images (B, 3, H, W) in [-1, 1] -> mean and log-variance of the posterior, unscaled."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def sample(self, mean, logvar=None, noise=None):
        """Latents z0 of standard deviation about 1: a draw of the posterior, times `scale`."""
        return self.scale * (mean if noise is None else mean + (logvar / 2).exp() * noise)

    def decode(self, z0):
        """Latents as `sample` gives them -> images in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z0 / self.scale))


# ------------------------------------------------------------------------------- TAESD and TAEF2


class Block(nn.Module):
    """Three convolutions and a skip; with `pooled`, first a bottleneck with a group norm."""

    def __init__(self, pooled=False):
        super().__init__()
        self.conv = nn.Sequential(conv(64, 64), nn.ReLU(), conv(64, 64), nn.ReLU(), conv(64, 64))
        self.pool = nn.Sequential(
            nn.Conv2d(64, 256, 1, bias=False), nn.GroupNorm(4, 256), nn.ReLU(inplace=True),
            nn.Conv2d(256, 64, 1, bias=False)) if pooled else None

    def forward(self, x):
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, z):
        return 3 * torch.tanh(z / 3)


def conv(channels, out, **more):
    return nn.Conv2d(channels, out, 3, padding=1, **more)


def up():
    return [nn.Upsample(scale_factor=2), conv(64, 64, bias=False)]


class TinyAutoencoder(nn.Module):
    """TAESD (the latents of Stable Diffusion, already scaled) or TAEF2 (32 channels, FLUX.2's).

    They predict the latent itself, without a variance; their own images lie in [0, 1].
    """

    scale, stochastic = 1.0, False

    def __init__(self, channels, pooled):
        super().__init__()
        self.channels = channels

        def down(pooled=False):
            return [conv(64, 64, stride=2, bias=False), *(Block(pooled) for _ in range(3))]

        def blocks(n, pooled=False):
            return [Block(pooled) for _ in range(n)]

        self.encoder = nn.Sequential(conv(3, 64), Block(), *down(), *down(), *down(pooled),
                                     conv(64, channels))
        self.decoder = nn.Sequential(
            Clamp(), conv(channels, 64), nn.ReLU(), *blocks(3, pooled), *up(), *blocks(3), *up(),
            *blocks(3), *up(), *blocks(1), conv(64, 3))

    def encode(self, x):
        """Images (B, 3, H, W) in [-1, 1] -> (latents, None): there is no variance."""
        return self.encoder((x + 1) / 2), None

    def sample(self, mean, logvar=None, noise=None):
        return mean

    def decode(self, z0):
        """Latents (B, C, H/8, W/8) -> images in [-1, 1], not clamped."""
        return 2 * self.decoder(z0) - 1


AUTOENCODERS = {                   # name: (how to build it, its published files)
    "sd": (AutoencoderKL, [Autoencoder_Weights.SD_FT_MSE]),
    "taesd": (lambda: TinyAutoencoder(4, pooled=False),
              [Autoencoder_Weights.TAESD_ENCODER, Autoencoder_Weights.TAESD_DECODER]),
    "taef2": (lambda: TinyAutoencoder(32, pooled=True),
              [Autoencoder_Weights.TAEF2_ENCODER, Autoencoder_Weights.TAEF2_DECODER]),
}


# --------------------------------------------------------------------------- reading weight files


def cached(name):
    """Where torch.hub keeps a file of weights of that name."""
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def fetch(weights, file_name=None, instead="a local file by --vae-weights"):
    """State dict of a WeightsEnum member, from torch.hub's cache or else from its URL.

    Raises UserError, naming the URL and the place for a file fetched by hand, where the server or
    the network fails, or where what came is not the file that its hash promises.
    """
    name = file_name or weights.meta["file_name"]
    path = cached(name)
    by_hand = f"fetch {weights.url} by hand and put it at {path}"
    before = path.exists()
    try:
        return weights.get_state_dict(progress=True, check_hash="-" in name, file_name=name,
                                      weights_only=True)
    except Exception as e:             # the network, the server, the hash, the disk, the unpickler
        if path.exists() and not before:
            path.unlink()            # an error page must not be taken for weights next time
        if before:
            raise UserError(f"{path} cannot be read as weights: it is damaged or not what its "
                            f"name says; delete it, or {by_hand}") from e
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"could not download {weights.url} ({reason[:200]}); {by_hand}, or name "
                        f"{instead}") from e


def read(path):
    """State dict of a local .bin, .pth, .pt, .ckpt or .safetensors; never runs code from it.

    Raises UserError where the file is missing, damaged, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no weights file {path}; --vae-weights names one (two for the "
                        "tiny autoencoders: encoder, decoder), without it they are downloaded")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as e:
            raise UserError(f"reading {path} needs the package safetensors; install it by "
                            "pip install safetensors") from e
        try:
            return load_file(path)
        except Exception as e:         # the library raises its own error, or OSError
            raise UserError(f"{path} is not a whole .safetensors file ({e}); fetch it anew") from e
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:             # other bytes make the unpickler raise anything
        if zipfile.is_zipfile(path) and "weights_only" in str(e):
            raise UserError(f"{path} holds Python objects besides tensors, and reading those could "
                            "run code, so it is refused; pass the .safetensors or "
                            "diffusion_pytorch_model.bin of the same autoencoder") from e
        raise UserError(f"{path} is cut short, damaged, or no file of weights; fetch it anew, or "
                        "leave --vae-weights out to download it") from e


# CompVis' names on the left, diffusers' on the right
RENAMED = [
    (r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.down\.(\d)\.block\.(\d)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.down\.(\d)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d)\.block\.(\d)\.", lambda m: f".up_blocks.{3 - int(m[1])}.resnets.{m[2]}."),
    (r"\.up\.(\d)\.upsample\.", lambda m: f".up_blocks.{3 - int(m[1])}.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(attentions\.0)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.0)\.(?:q|query)\.", r"\1.to_q."),
    (r"(attentions\.0)\.(?:k|key)\.", r"\1.to_k."),
    (r"(attentions\.0)\.(?:v|value)\.", r"\1.to_v."),
    (r"(attentions\.0)\.(?:proj_out|proj_attn)\.", r"\1.to_out.0."),
]


def named_tensors(weights):
    """The tensors of a dictionary, whatever else a file may have put into it."""
    return {k: v for k, v in weights.items()
            if isinstance(k, str) and isinstance(v, torch.Tensor)}


def diffusers_names(weights):
    """AutoencoderKL weights in any published naming -> the naming of this file (diffusers').

    Takes CompVis' {"state_dict": ...}, whole Stable Diffusion checkpoints ("first_stage_model."),
    old and new names of the attention, and its weights as 1x1 convolutions.
    """
    inner = weights.get("state_dict")
    weights = named_tensors(inner if isinstance(inner, dict) else weights)
    for prefix in ("first_stage_model.", "module.", "vae."):
        own = {k[len(prefix):]: v for k, v in weights.items() if k.startswith(prefix)}
        weights = own or weights
    found = {}
    for key, value in weights.items():
        if key.startswith(("loss.", "model_ema.")):
            continue
        for old, new in RENAMED:
            key = re.sub(old, new, key)
        if re.search(r"attentions\.0\.to_\w+(\.0)?\.weight", key):
            value = value.flatten(1)   # (512, 512, 1, 1) -> (512, 512)
        found[key] = value
    return found


def tiny_names(weights):
    """One half of a tiny autoencoder: {"encoder" or "decoder": its state dict}, by its shapes."""
    first = weights.get("0.weight")
    return {"encoder" if first is not None and first.shape[1:2] == (3,) else "decoder": weights}


def load(name="sd", files=()):
    """A frozen autoencoder of AUTOENCODERS, float32 on the CPU; downloads what is not given.

    `files`: one for sd, encoder and decoder in any order for the tiny ones. Raises UserError where
    a file is missing, damaged, or of another network; the sentence says which keys are wrong.
    """
    build, published = AUTOENCODERS[name]
    if files and len(files) != len(published):
        raise UserError(f"--vae {name} takes {len(published)} --vae-weights, not {len(files)}: " + (
            "its one file" if len(published) == 1 else "its encoder and its decoder"))
    vae, weights, sources = build(), {}, files or [cached(w.meta["file_name"]) for w in published]
    for source in (files or published):
        part = read(source) if files else fetch(source)
        if not isinstance(part, dict):
            raise UserError(f"{source} holds no dictionary of weights; " + advice(name))
        if name == "sd":
            weights = diffusers_names(part)
        else:
            weights |= {f"{half}.{k}": v for half, p in tiny_names(named_tensors(part)).items()
                        for k, v in p.items()}

    own = vae.state_dict()
    missing = [k for k in own if k not in weights]
    extra = [k for k in weights if k not in own]
    other = [k for k in own if k in weights and tuple(own[k].shape) != tuple(
        getattr(weights[k], "shape", ()))]
    if missing or extra or other:
        raise UserError(
            f"{', '.join(map(str, sources))} is not the {name} autoencoder: {len(missing)} of "
            f"{len(own)} tensors are missing, {len(extra)} unexpected, {len(other)} of another "
            f"shape (first: {', '.join([*missing, *other, *extra][:3])}); "
            + (advice(name) if files else "delete what is there, and it is downloaded anew"))
    vae.load_state_dict(weights)
    return vae.float().eval().requires_grad_(False)


def advice(name):
    wanted = {"sd": "diffusion_pytorch_model.bin or .safetensors of sd-vae-ft-mse"}.get(
        name, f"{name}_encoder.pth and {name}_decoder.pth")
    return f"pass {wanted}, or leave --vae-weights out to download it"


def fingerprint(vae):
    """12 hexadecimal digits that change with any weight: the key of cached latents."""
    digest = hashlib.sha256()
    for key, value in sorted(vae.state_dict().items()):
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
