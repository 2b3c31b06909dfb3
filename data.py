"""Data sets: four 2D densities made in code, MNIST, and any images: a folder, a .zip, or parquet.

Every data set is an object with `shape` (of one sample), `size` (how many samples; None means
endless), `batch(n, draws)` -> (z0, y): z0 float32 (n, *shape), y int64 (n,) labels or None, and
`decode(z0)` -> images in [-1, 1] (points and MNIST: z0 itself).
"""

import io
import math
import zipfile
import zlib
from itertools import islice
from pathlib import Path

import torch

import parallel
from config import FACTOR, POINT_SETS, UserError, flag


def step_seed(seed, step, stream=0):
    """Seed of all random draws of one iteration: a run needs no other random state to resume."""
    return ((2 * seed + stream) * 1_000_003 + step) * 2_654_435_761 % 2**63


class Draws:
    """The random numbers of an iteration, functions of (seed, step) alone, made on the CPU.

    Neither the device nor the number of processes changes them: each process draws for the whole
    batch and keeps its own slice. `stream` keeps the teacher's draws and the student's apart.
    """

    def __init__(self, seed, stream=0, device="cpu", rank=parallel.RANK, world=parallel.WORLD):
        self.seed, self.stream, self.device = seed, stream, torch.device(device)
        self.rank, self.world, self.generator = rank, world, torch.Generator()
        self.at(0)

    def at(self, step):
        """Begins the draws of an iteration."""
        self.generator.manual_seed(step_seed(self.seed, step, self.stream))

    def mine(self, whole, device=None):
        """This process's slice of what was drawn for the whole batch, on its device."""
        part = whole.chunk(self.world)[self.rank]
        device = self.device if device is None else torch.device(device)
        if device.type == "cuda":                  # copied while the GPU is busy
            return part.pin_memory().to(device, non_blocking=True)
        return part.to(device)

    def normal(self, n, *shape, device=None):
        """N(0, 1), float32 (n, *shape)."""
        return self.mine(torch.randn(n * self.world, *shape, generator=self.generator), device)

    def uniform(self, n, device=None):
        """U(0, 1), float32 (n,)."""
        return self.mine(torch.rand(n * self.world, generator=self.generator), device)

    def integers(self, high, n, device=None):
        """Uniform in 0 ... high - 1, int64 (n,)."""
        return self.mine(torch.randint(high, (n * self.world,), generator=self.generator), device)


# ------------------------------------------------------------------------------------- points

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

    def batch(self, n, draws):
        return draws.mine(sample_points(self.name, n * draws.world, draws.generator)), None

    def decode(self, z0):
        return z0


# -------------------------------------------------------------------------------------- MNIST


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

    def batch(self, n, draws):
        return from_uint8(self.images[draws.integers(self.size, n)]), None

    def decode(self, z0):
        return z0


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


# --------------------------------------------------------------------------- images of any kind


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CELEBAHQ = dict(repo_id="korexyz/celeba-hq-256x256", repo_type="dataset",
                revision="42078a1fb27b6079eaab8cf453efd3d79a8b7bda")   # 7 parquet shards, 3 GB


class Folder:
    """The images of a folder, nested folders included, in the order of their names.

    Like Zip and Parquet it has `size`, `identity` (what tells it from a changed one, as words) and
    `read(start)`, which yields (name, bytes of the image file) from the start-th image on.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.names = sorted(str(p.relative_to(path)) for p in self.path.rglob("*")
                            if wanted(p.relative_to(path)) and p.is_file())
        if not self.names:
            raise UserError(f"{path} holds no images ({', '.join(SUFFIXES)}); --data-dir names a "
                            "folder of images, a .zip of them, or a folder of parquet files")
        self.size = len(self.names)

    @property
    def identity(self):
        stats = [(name, (self.path / name).stat()) for name in self.names]
        return [f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in stats]

    def read(self, start=0):
        for name in self.names[start:]:
            yield name, (self.path / name).read_bytes


class Zip:
    """The images of a .zip file; nothing is unpacked to disk."""

    def __init__(self, path):
        try:
            self.file = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as e:
            raise UserError(f"{path} cannot be read as a .zip ({e}); it may be cut short, copy or "
                            "fetch it anew") from e
        self.entries = sorted((e for e in self.file.infolist()
                               if wanted(Path(e.filename)) and not e.is_dir()),
                              key=lambda e: e.filename)
        if not self.entries:
            raise UserError(f"{path} holds no images ({', '.join(SUFFIXES)}); --data-dir names "
                            "another .zip, or a folder of images")
        if any(e.flag_bits & 1 for e in self.entries):
            raise UserError(f"{path} is encrypted; unpack it, and name the folder by --data-dir")
        self.size = len(self.entries)

    @property
    def identity(self):
        return [f"{e.filename} {e.file_size} {e.CRC}" for e in self.entries]

    def read(self, start=0):
        for e in self.entries[start:]:
            yield e.filename, lambda e=e: self.file.read(e)


class Parquet:
    """Shards as Hugging Face publishes them: a column `image` of {bytes, path}; needs pyarrow.

    Of shards named train, validation and test, those of the training split alone.
    """

    def __init__(self, path):
        try:
            import pyarrow.parquet
        except ImportError as e:
            raise UserError("reading parquet files needs the package pyarrow; install it by "
                            "pip install pyarrow") from e
        self.paths = sorted(Path(path).rglob("*.parquet"))
        self.paths = [p for p in self.paths
                      if "train" in str(p.relative_to(path))] or self.paths
        self.files, self.errors = [], pyarrow.ArrowException
        for p in self.paths:
            try:
                self.files.append(pyarrow.parquet.ParquetFile(p))
            except (pyarrow.ArrowException, OSError) as e:
                raise UserError(f"{p} is not a whole parquet file ({first_line(e)}); fetch it "
                                "anew, --download does so for celebahq") from e
            if "image" not in self.files[-1].schema_arrow.names:
                raise UserError(f"{p} has no column 'image' but "
                                f"{', '.join(self.files[-1].schema_arrow.names)}; name a data set "
                                "of images by --data-dir")
        self.size = sum(f.metadata.num_rows for f in self.files)
        if not self.size:
            raise UserError(f"the parquet files in {path} have no rows; fetch them anew")

    @property
    def identity(self):
        stats = [(p.name, p.stat()) for p in self.paths]
        return [f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in stats]

    def read(self, start=0):
        for path, file in zip(self.paths, self.files):
            if start >= file.metadata.num_rows:
                start -= file.metadata.num_rows
                continue
            try:
                yield from self.rows(path, file, start)
            except (self.errors, OSError) as e:    # the footer was whole, a page is not
                raise UserError(f"{path} is damaged ({first_line(e)}); fetch it anew") from e
            start = 0

    def rows(self, path, file, start):
        row = 0
        for group in range(file.num_row_groups):       # one group in memory at a time
            rows = file.metadata.row_group(group).num_rows
            if start >= rows:
                start, row = start - rows, row + rows
                continue
            for batch in file.iter_batches(64, row_groups=[group], columns=["image"]):
                for image in batch.column(0).to_pylist():
                    if start:
                        start -= 1
                    else:
                        content = image["bytes"] if isinstance(image, dict) else image
                        yield f"{path.name}, row {row}", lambda content=content: content
                    row += 1


def wanted(path):
    """Whether a path names an image; hidden files and macOS' extra entries do not count."""
    return path.suffix.lower() in SUFFIXES and not any(
        part.startswith(".") or part == "__MACOSX" for part in path.parts)


def open_images(cfg):
    """The images that --data-dir names: a Folder, Zip or Parquet; UserError where there are none.

    Fetches CelebA-HQ first where `--download` says so.
    """
    path = Path(cfg.data_dir)
    if cfg.download:
        if cfg.dataset != "celebahq":
            raise UserError("--download fetches celebahq and nothing else; leave it out")
        if parallel.FIRST:
            download_celebahq(path)
        parallel.wait()
    if not cfg.data_dir:
        raise UserError("--dataset folder needs --data-dir: a folder of images, a .zip of them, or "
                        "a folder of parquet files")
    if not path.exists():
        how = "; --download fetches CelebA-HQ (3 GB)" if cfg.dataset == "celebahq" else ""
        raise UserError(f"there is no {path}{how}; --data-dir names a folder of images, a .zip of "
                        "them, or a folder of parquet files")
    if path.is_file() and path.suffix == ".parquet":
        raise UserError(f"{path} is one file; --data-dir takes the folder of the parquet files")
    if path.is_file():
        return Zip(path)
    return Parquet(path) if any(path.rglob("*.parquet")) else Folder(path)


def download_celebahq(path):
    """CelebA-HQ at 256 x 256 as parquet shards; resumes, retries and checks (huggingface_hub)."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise UserError("--download needs the package huggingface_hub; install it by "
                        "pip install huggingface_hub pyarrow") from e
    try:
        snapshot_download(**CELEBAHQ, local_dir=path, allow_patterns=["*.parquet"])
    except Exception as e:                         # no network, no right to write, a server's error
        raise UserError(f"could not download {CELEBAHQ['repo_id']} from huggingface.co "
                        f"({first_line(e)}); run the same command again, what is there is kept, or "
                        f"put its parquet files into {path} by hand") from e


def decode_image(content, size):
    """Bytes of an image file -> pixels uint8 (3, size, size): centre crop, Lanczos resize.

    Turned as its EXIF says; grey, palette, CMYK and 16 bit become RGB, transparency becomes white.
    Raises ValueError where it cannot be read or is smaller than `size`.
    """
    import numpy as np
    from PIL import Image, ImageOps

    try:
        image = Image.open(io.BytesIO(content))
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):             # 16-bit grey, which convert() would cut at 255
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255)
                                    .astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except Exception as e:                         # Pillow's decoders raise anything on bad bytes
        raise ValueError(f"cannot be read ({first_line(e)})") from e
    side = min(image.size)
    if side < size:
        raise ValueError(f"is {image.width} x {image.height}, smaller than {size} x {size}")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((size, size), Image.Resampling.LANCZOS,
                         box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def decoded(images, size, start=0, workers=8):
    """Yields (name, pixels uint8 (3, size, size) or None, what is wrong or None), in order.

    Threads read and decode ahead of the consumer; Pillow lets go of Python's lock while it works.
    """
    from concurrent.futures import ThreadPoolExecutor

    def one(item):
        name, read = item
        try:
            return name, decode_image(read(), size), None
        except (ValueError, OSError, RuntimeError, EOFError, TypeError, zipfile.BadZipFile,
                zlib.error) as e:
            return name, None, first_line(e)

    source = images.read(start)
    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(one, item) for item in islice(source, 8 * workers)]
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(one, item) for item in islice(source, 1)]


# ----------------------------------------------------------------------------- from the settings


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
        from latents import open_latents           # torchvision and the autoencoder only here
        images = open_images(cfg)
        check_batches(cfg, images.size)            # before hours of encoding, not after
        data = open_latents(cfg, device, images)
    check_batches(cfg, data.size)
    return data


def check_batches(cfg, size):
    """UserError where a batch is larger than the data set or cannot be shared by the processes."""
    for name in ("batch_size", "teacher_batch_size"):
        if size is not None and getattr(cfg, name) > size:
            raise UserError(f"{flag(name)} {getattr(cfg, name)} is larger than the "
                            f"data set, which has {size} samples; choose a smaller one")
        if getattr(cfg, name) % parallel.WORLD:
            raise UserError(f"{flag(name)} {getattr(cfg, name)} does not divide by "
                            f"the {parallel.WORLD} processes; choose a multiple of their number")


def sample_shape(cfg):
    """Shape of a sample of the data set that the settings name, known without opening it."""
    if cfg.dataset in POINT_SETS:
        return (2,)
    if cfg.dataset == "mnist":
        return (1, 28, 28)
    from vae import AUTOENCODERS
    with torch.device("meta"):                     # the layers alone, without weights
        channels = AUTOENCODERS[cfg.vae][0]().channels
    return (channels, *[cfg.image_size // FACTOR] * 2)
