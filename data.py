"""Data sets: four 2D densities made in code, MNIST through torchvision.

Every data set is an object with `shape` (of one sample), `size` (how many samples; None means
endless) and `batch(n, generator)` -> (z0, y): z0 float32 (n, *shape), y int64 (n,) labels or None.
"""

import math
from pathlib import Path

import torch

from config import POINT_SETS, UserError


def sample_points(name, n, generator=None):
    """n points of a 2D density, float32 (n, 2), on the generator's device.

    Each density has mean 0 and one common standard deviation of 1 over both coordinates, by its
    closed form rather than by the sample. Raises UserError where there is no density of that name.
    """
    if name not in POINT_SETS:
        raise UserError(f"there is no 2D data set {name!r}; there are {', '.join(POINT_SETS)}")
    device = generator.device if generator is not None else None

    def uniform():
        return torch.rand(n, generator=generator, device=device)

    def normal():
        return torch.randn(n, 2, generator=generator, device=device)

    if name == "8gaussians":                       # centres at radius 2, every 45 degrees
        angle = (uniform() * 8).floor() * (math.pi / 4)
        x = 2 * torch.stack([angle.cos(), angle.sin()], dim=1) + 0.15 * normal()
        mean, variance = (0.0, 0.0), 2 + 0.15**2
    elif name == "moons":                          # two interleaved half circles
        angle, lower = math.pi * uniform(), uniform() < 0.5
        x = torch.stack([
            torch.where(lower, 1 - angle.cos(), angle.cos()),
            torch.where(lower, 0.5 - angle.sin(), angle.sin()),
        ], dim=1) + 0.08 * normal()
        mean, variance = (0.5, 0.25), (0.75 + 0.5625 - 1 / math.pi) / 2 + 0.08**2
    elif name == "checkerboard":                   # 8 of the 16 unit squares of [-2, 2]^2
        x1 = 4 * uniform() - 2
        x2 = uniform() - 2 * (uniform() < 0.5) + x1.floor() % 2
        x = torch.stack([x1, x2], dim=1)
        mean, variance = (0.0, 0.0), 4 / 3
    else:                                          # spirals: two arms, one and a half turns each
        angle = 3 * math.pi * uniform().sqrt()
        arm = torch.where(uniform() < 0.5, 1.0, -1.0)
        x = (arm * angle)[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
        x = x + 0.3 * normal()
        mean, variance = (0.0, 0.0), 9 * math.pi**2 / 4 + 0.3**2
    return (x - torch.tensor(mean, device=x.device)) / math.sqrt(variance)


class Points:
    """An endless 2D data set: every batch is drawn afresh from the density."""

    def __init__(self, name):
        self.name, self.shape, self.size = name, (2,), None

    def batch(self, n, generator):
        return sample_points(self.name, n, generator), None


def from_uint8(images):
    """Pixels 0 ... 255 -> float32 in [-1, 1], of any shape."""
    return images.float() / 127.5 - 1


def to_uint8(z):
    """float32 in [-1, 1], cut off beyond, -> pixels 0 ... 255, of any shape."""
    return ((z + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Images:
    """Images held in memory as uint8 (N, C, H, W), given out as float32 in [-1, 1]."""

    def __init__(self, images, device="cpu"):
        self.images = images.to(device)
        self.shape, self.size = tuple(images.shape[1:]), len(images)

    def batch(self, n, generator):
        i = torch.randint(self.size, (n,), generator=generator, device=self.images.device)
        return from_uint8(self.images[i]), None


def mnist(data_dir, train=True):
    """MNIST's images, uint8 (N, 1, 28, 28), and labels, int64 (N,), from DATA_DIR/MNIST/raw.

    Downloaded through torchvision where they are not there yet. Raises UserError where that fails
    or a file is damaged.
    """
    from torchvision import datasets

    root = Path(data_dir)
    where = f"put its four files into {root / 'MNIST' / 'raw'}, or name their folder by --data-dir"
    there = (root / "MNIST" / "raw").is_dir()
    try:
        found = datasets.MNIST(root, train=train, download=True)
    except Exception as e:                         # no network, no right to write, a server's error
        what = "read" if there else "download"
        raise UserError(f"could not {what} MNIST ({first_line(e)}); {where}") from e
    if len(found.data) != (60000 if train else 10000):
        raise UserError(f"MNIST in {root} has {len(found.data)} images; {where}")
    return found.data[:, None], found.targets


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load(cfg, device="cpu", train=True):
    """The data set that the settings name; raises UserError where it cannot be had."""
    if cfg.dataset in POINT_SETS:
        data = Points(cfg.dataset)
    elif cfg.dataset == "mnist":
        if cfg.data_dir != "data" and not Path(cfg.data_dir).is_dir():
            raise UserError(f"there is no data folder {cfg.data_dir}; --data-dir names the folder "
                            "that holds (or shall hold) MNIST/raw")
        data = Images(mnist(cfg.data_dir, train)[0], device)
    else:
        raise UserError("celebahq needs the autoencoder and its latents, which are not built yet; "
                        f"choose one of {', '.join([*POINT_SETS, 'mnist'])}")
    for name in ("batch_size", "teacher_batch_size"):
        if data.size is not None and getattr(cfg, name) > data.size:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)} is larger than the "
                            f"data set, which has {data.size} samples; choose a smaller one")
    return data
