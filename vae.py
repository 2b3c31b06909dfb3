"""Frozen autoencoders between images and latents: Stable Diffusion's VAE, TAESD, TAEF2.

    vae = load("sd")                               # or load("taef2", ["enc.pth", "dec.pth"])
    mean, logvar = vae.encode(images)              # images float32 (B, 3, H, W) in [-1, 1]
    z0 = vae.sample(mean, logvar, noise)           # (B, C, H/8, W/8), the latents to train on
    images = vae.decode(z0)                        # in [-1, 1], not clamped

Published weights use torchvision's mechanism: a WeightsEnum whose members are downloaded by
torch.hub into its cache. On a machine without a network, put the files there by hand.
"""

import os
import re
import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.models import Weights, WeightsEnum

from harness import UserError, first_line
from harness.checkpoint import load_weights
from harness.hub import library, part
from harness.machine import FIRST, wait


def entry(url, file_name):
    """One published file; `file_name` is its name in torch.hub's cache."""
    return Weights(url=url, transforms=None, meta={"file_name": file_name})


HUB = "https://huggingface.co/stabilityai/sd-vae-ft-mse/resolve/main"
TINY = "https://github.com/madebyollin/taesd/raw/main"


class Autoencoder_Weights(WeightsEnum):
    """Published weights.

    A file name that ends in -<first 8 digits of its sha256> is checked against them. The authors of
    the tiny autoencoders publish no hashes.
    """

    SD_FT_MSE = entry(f"{HUB}/diffusion_pytorch_model.bin", "sd_vae_ft_mse-1b4889b6.pth")
    TAESD_ENCODER = entry(f"{TINY}/taesd_encoder.pth", "taesd_encoder.pth")
    TAESD_DECODER = entry(f"{TINY}/taesd_decoder.pth", "taesd_decoder.pth")
    TAEF2_ENCODER = entry(f"{TINY}/taef2_encoder.pth", "taef2_encoder.pth")
    TAEF2_DECODER = entry(f"{TINY}/taef2_decoder.pth", "taef2_decoder.pth")


# --------------------------------------------------------- Stable Diffusion's AutoencoderKL, f8


def conv(channels, out, **more):
    return nn.Conv2d(channels, out, 3, padding=1, **more)


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


def chain(**layers):
    """Layers one after another; their names are those of the published weights."""
    return nn.Sequential(OrderedDict(layers))


class Resnet(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.norm1, self.conv1 = norm(channels), conv(channels, out)
        self.norm2, self.conv2 = norm(out), conv(out, out)
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


def down(channels):
    # the one row and one column of padding are below and on the right
    return chain(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, 3, stride=2))


def up(channels):
    return chain(nearest=nn.Upsample(scale_factor=2.0), conv=conv(channels, channels))


def levels(widths, blocks, **change):
    """Residual blocks per resolution, and between two resolutions the change to the next."""
    parts = []
    for channels, out in zip((widths[0], *widths), widths):
        resnets = [Resnet(channels if i == 0 else out, out) for i in range(blocks)]
        last = len(parts) == len(widths) - 1
        changes = {} if last else {k: nn.Sequential(layer(out)) for k, layer in change.items()}
        parts.append(chain(resnets=nn.Sequential(*resnets), **changes))
    return nn.Sequential(*parts)


def encoder(widths, latent):
    return chain(conv_in=conv(3, widths[0]), down_blocks=levels(widths, 2, downsamplers=down),
                 mid_block=Middle(widths[-1]), conv_norm_out=norm(widths[-1]), act=nn.SiLU(),
                 conv_out=conv(widths[-1], 2 * latent))


def decoder(widths, latent):
    return chain(conv_in=conv(latent, widths[0]), mid_block=Middle(widths[0]),
                 up_blocks=levels(widths, 3, upsamplers=up), conv_norm_out=norm(widths[-1]),
                 act=nn.SiLU(), conv_out=conv(widths[-1], 3))


class AutoencoderKL(nn.Module):
    """Stable Diffusion's VAE: 248 tensors, 83,653,863 parameters, named as in diffusers."""

    channels, scale, stochastic = 4, 0.18215, True

    def __init__(self, widths=(128, 256, 512, 512)):
        super().__init__()
        self.encoder, self.decoder = encoder(widths, 4), decoder(widths[::-1], 4)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 4, 1)

    def encode(self, x):
        """Images (B, 3, H, W) in [-1, 1] -> mean and log-variance of the posterior, unscaled."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def sample(self, mean, logvar=None, noise=None):
        """Latents z0: `scale` times a draw of the posterior, or its mean if there is no noise."""
        return self.scale * (mean if noise is None else mean + (logvar / 2).exp() * noise)

    def decode(self, z0):
        """Latents z0 (B, 4, H/8, W/8), as `sample` returns them -> images in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z0 / self.scale))


# ------------------------------------------------------------------------------- TAESD and TAEF2


class Block(nn.Module):
    """Three convolutions and a skip; with `pooled`, a bottleneck with a group norm before them."""

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


class TinyAutoencoder(nn.Module):
    """TAESD (the latents of Stable Diffusion, already scaled) or TAEF2 (32 channels, FLUX.2's).

    They predict the latent itself, without a variance. Inside, images lie in [0, 1].
    """

    scale, stochastic = 1.0, False

    def __init__(self, channels, pooled):
        super().__init__()
        self.channels = channels

        def blocks(n, pooled=False):
            return [Block(pooled) for _ in range(n)]

        def half(pooled=False):
            return [conv(64, 64, stride=2, bias=False), *blocks(3, pooled)]

        def double(pooled=False):
            return [*blocks(3, pooled), nn.Upsample(scale_factor=2), conv(64, 64, bias=False)]

        self.encoder = nn.Sequential(conv(3, 64), Block(), *half(), *half(), *half(pooled),
                                     conv(64, channels))
        self.decoder = nn.Sequential(Clamp(), conv(channels, 64), nn.ReLU(), *double(pooled),
                                     *double(), *double(), Block(), conv(64, 3))

    def encode(self, x):
        """Images (B, 3, H, W) in [-1, 1] -> latents (B, C, H/8, W/8), and None for the variance."""
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


class PipelineAutoencoder(nn.Module):
    """The autoencoder of a pipeline of Stable Diffusion, with the methods of those above."""

    stochastic = True

    def __init__(self, source):
        super().__init__()
        self.vae = part(library("diffusers").AutoencoderKL, source, "vae", low_cpu_mem_usage=False)
        self.channels, self.scale = self.vae.config.latent_channels, self.vae.config.scaling_factor
        self.shift = self.vae.config.shift_factor or 0.0

    def encode(self, x):
        posterior = self.vae.encode(x).latent_dist
        return posterior.mean, posterior.logvar

    def sample(self, mean, logvar=None, noise=None):
        z = mean if noise is None else mean + (logvar / 2).exp() * noise
        return self.scale * (z - self.shift)

    def decode(self, z0):
        return self.vae.decode(z0 / self.scale + self.shift).sample


# --------------------------------------------------------------------------- reading weight files


def of(cfg):
    """The frozen autoencoder that the settings name."""
    if cfg.vae == "pipeline":
        return PipelineAutoencoder(cfg.teacher_checkpoint)
    return load(cfg.vae, cfg.vae_weights)


def load(name="sd", files=()):
    """A frozen autoencoder of AUTOENCODERS, float32 on the CPU; without files it is downloaded.

    `files`: one for sd; encoder and decoder in any order for the tiny ones, or diffusers' one file
    of both. Raises UserError if a file is missing, damaged, not finite, or of another network.
    """
    build, published = AUTOENCODERS[name]
    originals = " and ".join(w.url for w in published)
    if len(files) > len(published):
        raise UserError(f"--vae {name} takes {len(published)} --vae-weights, not {len(files)}: "
                        f"{originals}")
    weights = {}
    for state in [read(f) for f in files] or [fetch(w) for w in published]:
        # what DistributedDataParallel and torch.compile put before a name
        state = {re.sub(r"^((module|_orig_mod)\.)+", "", key): value for key, value in state.items()
                 if isinstance(key, str) and torch.is_tensor(value)}
        weights |= (sd_names if name == "sd" else tiny_names)(state)

    vae = build()
    advice = (f"pass {originals}, or leave --vae-weights out to download it" if files else
              "delete what is there, and it is downloaded again")
    load_weights(vae, weights, ", ".join(map(str, files or map(cached, published))),
                 f"it is not the {name} autoencoder: {advice}")
    return vae.eval().requires_grad_(False)


def cached(weights):
    """The path of a WeightsEnum member in torch.hub's cache."""
    return Path(torch.hub.get_dir()) / "checkpoints" / weights.meta["file_name"]


def fetch(weights):
    """State dict of a WeightsEnum member, from torch.hub's cache or else from its URL.

    All processes call this: rank 0 downloads, the others wait. Raises UserError, which names URL
    and place, if the download fails or is not what its hash promises, or if the file is damaged.
    """
    path = cached(weights)
    by_hand = f"download {weights.url} by hand to {path}"
    if FIRST and not path.exists():
        try:
            # until it is whole and readable, it is in a folder that no other process uses
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                weights.get_state_dict(model_dir=folder, file_name=path.name, progress=True,
                                       check_hash="-" in path.name, weights_only=True)
                os.replace(Path(folder) / path.name, path)
        except Exception as e:         # the network, the server, the hash, the disk, the unpickler
            raise UserError(f"could not download {weights.url} ({first_line(e)[:200]}); {by_hand}, "
                            "or name a local file by --vae-weights") from e
    wait()
    try:
        return read(path)
    except UserError as e:
        raise UserError(f"{e}; delete it, or {by_hand}") from e


def read(path):
    """The dict in a local file of weights, of any suffix; never runs code from it.

    Raises UserError if it is missing, damaged, or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no weights file {path}; --vae-weights names one (two for the "
                        "tiny autoencoders: encoder, decoder), without it they are downloaded")
    with open(path, "rb") as file:     # torch.load would look at the suffix of a path
        start = file.read(20)
        file.seek(0)
        if start.startswith(b"version https://git"):
            raise UserError(f"{path} is a Git LFS pointer, not the weights; run git lfs pull there")
        try:
            if start[8:9] == b"{":     # safetensors: eight bytes of length, then JSON
                from safetensors.torch import load_file
                return load_file(path)
            weights = torch.load(file, map_location="cpu", weights_only=True)
        except ImportError as e:
            raise UserError(f"reading {path} needs the package safetensors; install it by "
                            "pip install safetensors") from e
        except Exception as e:         # other bytes make the unpickler raise anything
            if start.startswith(b"PK") and "weights_only" in str(e):
                raise UserError(f"{path} holds Python objects besides tensors; reading them could "
                                "run code, so it is refused") from e
            raise UserError(f"{path} is cut short, damaged, or not a file of weights") from e
    if not isinstance(weights, dict):
        raise UserError(f"{path} holds a {type(weights).__name__}, not a dict of weights")
    return weights


OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def sd_names(weights):
    """diffusers' AutoencoderKL, with old or new names of the attention -> the names used here."""
    renamed = {}
    for key, value in weights.items():
        for old, new in OLD_NAMES.items():
            key = key.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
        if "attentions.0.to_" in key and value.ndim == 4:
            value = value.flatten(1)   # of a 1x1 convolution: (512, 512, 1, 1) -> (512, 512)
        renamed[key] = value
    return renamed


def tiny_names(weights):
    """A tiny encoder, decoder, or diffusers' AutoencoderTiny of both -> the names used here.

    diffusers counts the decoder's layers from its first convolution, not from the clamp before it.
    """
    if "encoder.layers.0.weight" in weights:
        return {re.sub(r"\.layers\.(\d+)", lambda m: f".{int(m[1]) + key.startswith('decoder')}",
                       key): value for key, value in weights.items()}
    first = weights.get("0.weight")                # an encoder's first layer takes 3 channels
    half = "encoder" if first is not None and first.shape[1:2] == (3,) else "decoder"
    return {f"{half}.{key}": value for key, value in weights.items()}
