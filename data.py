"""Data sets: 2D densities, MNIST, CIFAR-10, drawn captions (captions.py), latents (latents.py).

Every data set is an object with `shape` (of one sample), `size` (how many samples; None means
endless), `key` (a short text that differs if the data differ), `batch(n, draws)` -> (z0, y): z0
float32 (n, *shape), y None, int64 labels (n,) or words (n, L), `conditions(n, generator)`
-> y of samples that are still to be made, and `decode(z0)` -> images in [-1, 1] (of latents; else
z0 itself).
"""

import math
import zlib
from dataclasses import replace
from pathlib import Path

import torch

import captions
from config import (CAPTION_SETS, LATENT_CHANNELS, LATENT_DOWNSAMPLING, LATENT_SETS, POINT_SETS,
                    flag)
from harness import UserError, first_line
from harness.machine import FIRST, RANK, WORLD, moved, wait
from harness.pictures import from_uint8


def step_seed(seed, step, stream=0):
    """Seed of all random draws of one iteration: a run needs no other random state to resume."""
    return ((2 * seed + stream) * 1_000_003 + step) * 2_654_435_761 % 2**63


class Draws:
    """The random numbers of an iteration, made on the CPU from (seed, step) alone.

    Neither the device nor the number of processes changes them: each process draws for the whole
    batch and keeps its own slice. The teacher and the student draw from two different streams.
    """

    def __init__(self, seed, stream=0, device="cpu", rank=RANK, world=WORLD):
        self.seed, self.stream, self.device = seed, stream, torch.device(device)
        self.rank, self.world, self.generator = rank, world, torch.Generator()
        self.at(0)

    def at(self, step):
        """Starts the draws of iteration `step`."""
        self.step = step
        self.generator.manual_seed(step_seed(self.seed, step, self.stream))

    def next(self):
        """The draws of the next iteration, as an object of its own."""
        draws = Draws(self.seed, self.stream, self.device, self.rank, self.world)
        draws.at(self.step + 1)
        return draws

    def mine(self, whole, device=None):
        """This process's slice of what was drawn for the whole batch, on its device."""
        part = whole.chunk(self.world)[self.rank]
        return moved(part, self.device if device is None else torch.device(device))

    def normal(self, n, *shape, device=None):
        """N(0, 1), float32 (n, *shape)."""
        return self.mine(torch.randn(n * self.world, *shape, generator=self.generator), device)

    def uniform(self, n):
        """U(0, 1), float32 (n,)."""
        return self.mine(torch.rand(n * self.world, generator=self.generator))

    def integers(self, high, n, device=None):
        """Uniform in 0 ... high - 1, int64 (n,)."""
        return self.mine(torch.randint(high, (n * self.world,), generator=self.generator), device)


# ------------------------------------------------------------------------------------- points

def sample_points(name, n, generator=None):
    """n points of a 2D density, float32 (n, 2); see labelled_points."""
    return labelled_points(name, n, generator)[0]


def labelled_points(name, n, generator=None):
    """n points of a 2D density, float32 (n, 2), on the generator's device, and their classes.

    Only 8gaussians has classes, its modes, int64 (n,); for the others they are None. Each density
    has mean 0, and variance 1 averaged over both coordinates, both in closed form. Raises UserError
    if there is no density of that name.
    """
    y = None
    if name not in POINT_SETS:
        raise UserError(f"there is no 2D data set {name!r}; there are {', '.join(POINT_SETS)}")
    device = generator.device if generator is not None else None

    def uniform():
        return torch.rand(n, generator=generator, device=device)

    def normal():
        return torch.randn(n, 2, generator=generator, device=device)

    if name == "8gaussians":                       # centres at radius 2, every 45 degrees
        y = (uniform() * 8).long()
        angle = y * (math.pi / 4)
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
        a = 4 * uniform() - 2
        b = uniform() - 2 * (uniform() < 0.5) + a.floor() % 2
        x = torch.stack([a, b], dim=1)
        mean, variance = (0.0, 0.0), 4 / 3
    else:                                          # spirals: two arms, one and a half turns each
        angle = 3 * math.pi * uniform().sqrt()
        arm = torch.where(uniform() < 0.5, 1.0, -1.0)
        x = (arm * angle)[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
        x = x + 0.3 * normal()
        mean, variance = (0.0, 0.0), 9 * math.pi**2 / 4 + 0.3**2
    return (x - torch.tensor(mean, device=x.device)) / math.sqrt(variance), y


class Points:
    """An endless 2D data set: every batch is drawn anew from the density."""

    size, key, shape = None, "", (2,)

    def __init__(self, name, classes=0):
        self.name, self.classes = name, classes

    def batch(self, n, draws):
        z0, y = labelled_points(self.name, n * draws.world, draws.generator)
        return draws.mine(z0), draws.mine(y) if self.classes else None

    def conditions(self, n, generator):
        """Conditions of n samples that are still to be made, int64 (n,), or None."""
        return torch.randint(self.classes, (n,), generator=generator) if self.classes else None

    def decode(self, z0):
        return z0


# ---------------------------------------------------------------------------- MNIST, CIFAR-10


class Images:
    """Images in memory, uint8 (N, C, H, W); batches are float32 in [-1, 1]."""

    def __init__(self, images, device="cpu", labels=None):
        self.key = key_of(images, labels)
        self.images = images.to(device)
        self.labels = None if labels is None else labels.to(device)
        self.shape, self.size = tuple(images.shape[1:]), len(images)

    def batch(self, n, draws):
        i = draws.integers(self.size, n)
        return from_uint8(self.images[i]), None if self.labels is None else self.labels[i]

    def conditions(self, n, generator):
        """Conditions of n samples that are still to be made, int64 (n,), or None."""
        if self.labels is None:
            return None
        return self.labels.cpu()[torch.randint(self.size, (n,), generator=generator)]

    def decode(self, z0):
        return z0


def key_of(images, labels=None):
    """The number of images (N, C, H, W), and a checksum of their pixels and labels, as a text."""
    checksum = zlib.crc32(images.contiguous().numpy())
    if labels is not None:
        checksum = zlib.crc32(labels.contiguous().numpy(), checksum)
    return f"{len(images)}-{checksum:08x}"


def mnist(data_dir, train=True):
    """MNIST's images, uint8 (N, 1, 28, 28), and labels, int64 (N,), from DATA_DIR/MNIST/raw.

    Downloaded through torchvision if they are not there yet. Raises UserError if that fails or a
    file is damaged.
    """
    raw = Path(data_dir) / "MNIST" / "raw"
    advice = f"put its four files into {raw}, or name their folder by --data-dir"
    files = of_torchvision("MNIST", data_dir, raw, train, advice)
    expected = 60_000 if train else 10_000
    if files.data.shape != (expected, 28, 28) or len(files.targets) != expected:
        raise UserError(f"{raw} has {len(files.data)} images of {files.data.shape[1]} x "
                        f"{files.data.shape[2]} and {len(files.targets)} labels, not {expected} "
                        f"of 28 x 28; {advice}")
    if not 0 <= files.targets.min() <= files.targets.max() <= 9:
        raise UserError(f"{raw} has labels from {files.targets.min()} to {files.targets.max()}, "
                        f"not from 0 to 9; {advice}")
    return files.data[:, None], files.targets


def cifar10(data_dir, train=True):
    """CIFAR-10's images, uint8 (N, 3, 32, 32), and labels, int64 (N,), N = 50,000 or 10,000.

    Downloaded through torchvision into DATA_DIR/cifar-10-batches-py if they are not there yet.
    torchvision compares their MD5 sums. Raises UserError if a file cannot be had or is damaged.
    """
    folder = Path(data_dir) / "cifar-10-batches-py"
    files = of_torchvision("CIFAR10", data_dir, folder, train, f"unpack cifar-10-python.tar.gz so "
                           f"that {folder} holds its files, or name another folder by --data-dir")
    images = torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(files.targets)


def of_torchvision(name, data_dir, folder, train, advice):
    """A data set of torchvision whose files are in `folder`, downloaded into data_dir if absent."""
    from torchvision import datasets

    if data_dir != "data" and not Path(data_dir).is_dir():
        raise UserError(f"there is no data folder {data_dir}; --data-dir names the folder that "
                        f"has {folder.relative_to(data_dir)}, or where it is downloaded to")
    action = "read" if folder.is_dir() and any(folder.iterdir()) else "download"
    make = getattr(datasets, name)
    try:
        if FIRST:                                  # the other processes read what rank 0 downloads
            make(data_dir, train=train, download=True)
        wait()
        return make(data_dir, train=train)
    except Exception as e:                         # network, permissions, a server's error, damage
        raise UserError(f"could not {action} {name} ({first_line(e)}); {advice}") from e


# ----------------------------------------------------------------------------- from the settings


def load(cfg, device="cpu", train=True):
    """The data set that the settings name; raises UserError if it is missing or damaged."""
    if cfg.dataset in POINT_SETS:
        dataset = Points(cfg.dataset, cfg.num_classes)
    elif cfg.dataset == "captions":
        dataset = captions.Captions(cfg.condition == "text")
    elif cfg.dataset == "captions-digits":
        images, labels = mnist(cfg.data_dir, train)
        dataset = captions.CaptionedDigits(images, labels, key_of(images, labels),
                                           cfg.condition == "text")
    elif cfg.dataset in ("mnist", "cifar10"):
        images, labels = images_of(cfg, train)
        dataset = Images(images, device, labels)
    elif cfg.dataset == "captioned":
        import captioned                           # not above: points need no torchvision
        dataset = captioned.open_latents(cfg, device)
    else:
        import latents
        images = latents.open_images(cfg)
        check_batches(cfg, images.size)            # before hours of encoding, not after
        dataset = latents.open_latents(cfg, device, images)
    if train:
        check_batches(cfg, dataset.size)
    return dataset


def images_of(cfg, train=True):
    """(images, labels, or None without conditions) of MNIST, or of CIFAR-10 with mirror images."""
    if cfg.dataset == "mnist":
        images, labels = mnist(cfg.data_dir, train)
    else:
        images, labels = cifar10(cfg.data_dir, train)
        images, labels = torch.cat([images, images.flip(3)]), labels.repeat(2)
    return images, labels if cfg.condition == "class" else None


def with_classes(cfg):
    """cfg with the number of classes of a folder, or of words, if it is to be conditional."""
    if cfg.condition == "none" or cfg.num_classes:
        return cfg
    if cfg.dataset == "captioned":
        return cfg
    if cfg.condition == "text":
        words = (*captions.WORDS, *captions.OBJECTS[cfg.dataset])
        return replace(cfg, num_classes=len(words))
    import latents
    names = latents.class_names(latents.open_images(cfg))
    if len(names) < 2:
        raise UserError("--condition class takes the sub-folders of --data-dir as classes, and all "
                        f"images lie in {latents.printable(names[0])}; name that folder, or leave "
                        "--condition out")
    print("classes: " + ", ".join(f"{i} {latents.printable(name)}" for i, name in enumerate(names)))
    return replace(cfg, num_classes=len(names))


def check_batches(cfg, size):
    """UserError if a batch is larger than the data set or cannot be split over the processes."""
    pretrained = cfg.dataset == "captioned"        # its teacher is a pipeline
    for name in ("batch_size", *["teacher_batch_size"] * (not pretrained)):
        if size is not None and getattr(cfg, name) > size:
            raise UserError(f"{flag(name)} {getattr(cfg, name)} is larger than the "
                            f"data set, which has {size} samples; choose a smaller one")
        if getattr(cfg, name) % WORLD:
            raise UserError(f"{flag(name)} {getattr(cfg, name)} is not a multiple of the "
                            f"{WORLD} processes; choose one that is")


def sample_shape(cfg):
    """Shape of a sample of the data set that the settings name, known without opening it."""
    if cfg.dataset in POINT_SETS:
        return (2,)
    if cfg.dataset in ("mnist", "cifar10"):
        return (1, 28, 28) if cfg.dataset == "mnist" else (3, 32, 32)
    if cfg.dataset in CAPTION_SETS:
        return captions.Captions.shape
    if cfg.vae == "pipeline":
        import text2image
        channels = text2image.found(cfg.teacher_checkpoint).shape[0]
    else:
        channels = LATENT_CHANNELS[cfg.vae]
    return (channels, *[cfg.image_size // LATENT_DOWNSAMPLING] * 2)


def key(cfg):
    """The key of the data set that the settings name; equal keys mean equal data."""
    if cfg.dataset in LATENT_SETS:
        import captioned
        import latents
        return latents.data_key(cfg, captioned.open_images(cfg) if (
            cfg.dataset == "captioned") else None)
    if cfg.dataset in CAPTION_SETS:
        return load(cfg).key
    if cfg.dataset in ("mnist", "cifar10"):
        return key_of(*images_of(cfg))
    return ""
