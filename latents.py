"""Latents of images: every image is encoded once, then training reads a file of latents.

    python latents.py --data-dir MY_PHOTOS --vae taesd      encodes ahead, measures what is lost

Images come from a folder, a .zip, or Hugging Face's tables (.parquet, .arrow). The file of latents
is a plain .npy, float16 (N, 2, P, C, h, w), memory-mapped: N images, each as it is and mirrored;
P = 2 for mean and log-variance of the posterior, 1 if the autoencoder has no variance. Its name
ends in a key of the images, the autoencoder's weights and the size: other images, another file.
"""

import hashlib
import io
import json
import math
import os
import re
import warnings
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

import vae
from config import LATENT_DOWNSAMPLING, MACHINE, UNCAPTIONED_SETS, make_config
from harness import UserError, first_line
from harness.checkpoint import fingerprint, locked, no_room, write_text
from harness.hub import package
from harness.machine import FIRST, choose_device, moved, start, wait, wants_bf16
from harness.pictures import from_uint8
from harness.script import add_field_flags, given_flags, make_parser, run_script

AT_A_TIME = 16                     # images that are encoded or decoded together

# ------------------------------------------------------------------------ where images come from

# the suffixes that Pillow can open here, and those of other pictures
OTHER_PICTURES = ".heic .heif .jxl .psd .svg .tga .ppm .dng .cr2 .nef .arw".split()
SUFFIXES = ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .avif .jp2".split()
OTHER_PICTURES += [s for s in SUFFIXES if s not in Image.registered_extensions()]
SUFFIXES = [s for s in SUFFIXES if s not in OTHER_PICTURES]
TABLES = (".parquet", ".arrow")
ADVICE = "--data-dir names a folder of images, a .zip of them, or a folder of parquet files"
# the training split of CelebA-HQ at 256 x 256, on Hugging Face
CELEBAHQ, REVISION = "korexyz/celeba-hq-256x256", "42078a1fb27b6079eaab8cf453efd3d79a8b7bda"
CELEBAHQ_SIZE, OTHER_SIZES = 28_000, (27_000, 30_000)  # NVAE's training split, and all images


@dataclass
class ImageFiles:
    """Image files in order, from wherever they come."""

    files: list            # of (name, function that returns the bytes of the file)
    identity: object       # () -> lines that differ for other images; no times, no folder
    note: str = ""         # what was left out, in words that follow a sentence
    enlarge: bool = False  # whether images that are too small are enlarged, or skipped

    @property
    def size(self):
        return len(self.files)


def open_images(cfg):
    """The ImageFiles that --data-dir names, downloaded first with --download; UserError if none."""
    path = Path(cfg.data_dir)
    if not cfg.data_dir:
        raise UserError(f"--dataset {cfg.dataset} needs --data-dir; {ADVICE}")
    if cfg.download:
        if FIRST and not (path.exists() and of_suffix(TABLES, files_in(path))):
            download_celebahq(path)
        wait()
    if not path.exists():
        hint = "; --download downloads CelebA-HQ (3 GB)" if cfg.dataset == "celebahq" else ""
        raise UserError(f"there is no {path}{hint}; {ADVICE}")
    if path.is_file() and of_suffix((*SUFFIXES, *OTHER_PICTURES, *TABLES), [path.name]):
        raise UserError(f"{path} is one file; name its folder: {ADVICE}")

    images = images_of_zip(path) if path.is_file() else images_below(path)
    if cfg.dataset == "celebahq" and images.size != CELEBAHQ_SIZE:
        if cfg.download and images.size not in OTHER_SIZES:
            raise UserError(f"{path} holds {images.size:,} images, not the {CELEBAHQ_SIZE:,} of "
                            "CelebA-HQ: a download was not whole; remove the folder and try again")
        images.note += (f"; the public training split has {CELEBAHQ_SIZE:,}, that of the official "
                        "code 27,000")
    return images


def images_below(path):
    """The images of a folder and its subfolders: in tables, if there are any, else in files."""
    names, note = files_in(path), ""
    if tables := of_suffix(TABLES, names):
        try:
            return images_of_tables(path, tables)
        except UserError as e:
            if not of_suffix(SUFFIXES, names):
                raise
            note = f"; only the image files there are taken ({e})"
    return images_named(path, names, lambda name: (path / name).read_bytes(),
                        lambda name: checksum(path / name), note)


def images_of_zip(path):
    """The images of a .zip file; nothing is unpacked to disk."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as e:
        raise UserError(f"{path} cannot be read as a .zip ({e}); it may be cut short. "
                        f"{ADVICE}") from e
    entries = {e.filename: e for e in archive.infolist() if not e.is_dir()}
    if any(e.flag_bits & 1 for e in entries.values()):
        raise UserError(f"{path} is encrypted; unpack it, and name the folder by --data-dir")
    return images_named(path, visible(entries), archive.read,
                        lambda name: f"{entries[name].file_size} {entries[name].CRC}")


def images_named(path, names, read, check, note=""):
    """The images among files, which `read` reads and `check` sums up; UserError if there are none.

    Other pictures, which Pillow cannot open, are counted in the note.
    """
    images, others = of_suffix(SUFFIXES, names), of_suffix(OTHER_PICTURES, names)
    if others:
        counts = Counter(os.path.splitext(name)[1].lower() for name in others).most_common()
        note += f"; {len(others)} pictures are left out, convert them: " + ", ".join(
            f"{n} {suffix}" for suffix, n in counts)
    if not images:
        raise UserError(f"{path} holds no images ({', '.join(SUFFIXES)}){note}; {ADVICE}")
    return ImageFiles([(name, partial(read, name)) for name in images],
                      lambda: [f"{name} {check(name)}" for name in images], note)


def images_of_tables(path, names):
    """The images in .parquet or .arrow files, of the training split if their names tell the split.

    The column is `image` or `img`, or the first that holds files; UserError if no table has one.
    """
    datasets, tables = hugging_face(), {}
    names = [name for name in names if "train" in name] or names
    shards = [re.search(r"-of-(\d+)\.", name) for name in names]
    if all(shards) and len(names) < (number := int(shards[-1][1])):
        raise UserError(f"{path} holds {len(names)} of {number} files, as their names say; "
                        "download the others, too")
    for name in names:
        arrow = name.lower().endswith(".arrow")
        read = datasets.Dataset.from_file if arrow else datasets.Dataset.from_parquet
        try:
            rows = read(str(path / name))
        except Exception as e:         # pyarrow's errors, the package's own, OSError
            raise UserError(f"{path / name} cannot be read: it is damaged or empty "
                            f"({first_line(e.__cause__ or e)})") from e
        columns = [key for key, kind in rows.features.items()
                   if isinstance(kind, datasets.Image) or isinstance(kind, dict) and "bytes" in kind
                   or key in ("image", "img") and getattr(kind, "dtype", "").endswith("binary")]
        if columns:
            column = min(columns, key=lambda key: key not in ("image", "img"))
            rows = rows.select_columns(column).rename_columns({column: "image"})
            tables[name] = rows.cast_column("image", datasets.Image(decode=False))
    if not tables:
        raise UserError(f"{path / names[0]} has no column of images; {ADVICE}")
    files = [(f"{name}, row {i}", lambda rows=rows, i=i: (rows[i]["image"] or {}).get("bytes"))
             for name, rows in tables.items() for i in range(len(rows))]
    return ImageFiles(files, lambda: [f"{Path(n).name} {checksum(path / n)}" for n in tables])


def hugging_face():
    """The package datasets, without its own error messages and progress bars."""
    datasets = package("datasets")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    return datasets


def download_celebahq(path):
    """Downloads CelebA-HQ by the package datasets; .arrow files appear when they are whole."""
    datasets = hugging_face()
    print(f"downloading {CELEBAHQ} (3 GB) to {path}", flush=True)
    try:
        datasets.load_dataset(CELEBAHQ, revision=REVISION, split="train", cache_dir=str(path))
    except Exception as e:             # no network, no permission, a server's error
        raise UserError(f"could not download {CELEBAHQ} to {path} ({first_line(e)}); run the same "
                        "command again to continue, or put its parquet files there by hand") from e


def files_in(path):
    """Sorted names of the visible files below a folder; OSError if a subfolder cannot be read."""
    def refuse(error):
        raise error

    paths = (Path(folder, name) for folder, _, names in os.walk(path, onerror=refuse)
             for name in names)
    return visible(str(p.relative_to(path)) for p in paths if p.is_file())


def visible(names):
    """Sorted names without hidden files, macOS' extra entries, and unfinished downloads."""
    def hidden(part):
        return part.startswith(".") or part == "__MACOSX" or part.endswith(".incomplete")
    return sorted(name for name in names if not any(map(hidden, re.split(r"[/\\]", name))))


def of_suffix(suffixes, names):
    return [name for name in names if os.path.splitext(name)[1].lower() in suffixes]


def checksum(path):
    """A file's size, and the CRC of its first and last 64 KB, as a short text."""
    with open(path, "rb") as file:
        crc = zlib.crc32(file.read(2**16))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 2**16, 0))
        return f"{size} {zlib.crc32(file.read(), crc):08x}"


# --------------------------------------------------------------------------- from file to pixels


def decode_image(content, size, enlarge=False):
    """Bytes of an image file -> pixels uint8 (3, size, size): centre crop, Lanczos resize.

    It is turned as its EXIF says. Grey, palette, CMYK, 16 bit and float become RGB; transparency
    becomes white. Raises ValueError if it cannot be read, or is smaller than `size` and must not
    be enlarged.
    """
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
        with suppress(Exception):                  # an EXIF block that is damaged: not turned
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            image = Image.fromarray(eight_bits(np.asarray(image)))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except UnidentifiedImageError as e:
        raise ValueError("cannot be read (not an image that Pillow knows)") from e
    except Exception as e:                         # Pillow's decoders raise anything on bad bytes
        raise ValueError(f"cannot be read ({first_line(e)})") from e
    side = min(image.size)
    if side < size and not enlarge:
        raise ValueError(f"is {image.width} x {image.height}, smaller than {size} x {size}")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((size, size), Image.Resampling.LANCZOS,
                         box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def eight_bits(grey):
    """Grey values, float in 0 ... 1 or integers of at most 16 bits, -> uint8; else ValueError."""
    limit = 1 if grey.dtype.kind == "f" else 2**16 - 1
    if not (grey.min() >= 0 and grey.max() <= limit):
        raise ValueError(f"grey from {grey.min():g} to {grey.max():g}, not within 0 ... {limit}")
    if limit == 1:
        return (grey * 255).round().astype(np.uint8)
    # the largest value tells how many bits they have
    bits = next(bits for bits in (8, 12, 16) if grey.max() < 2**bits)
    return (grey.astype(np.int64) >> (bits - 8)).astype(np.uint8)


def decoded(images, size, enlarge=False):
    """Yields (name, pixels uint8 (3, size, size) or None, what is wrong or None), in order."""
    warnings.filterwarnings("ignore", module="PIL")    # on damaged EXIF, or very large pictures

    def one(item):
        name, read = item
        try:
            return name, decode_image(read(), size, enlarge), None
        except (ValueError, OSError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as e:
            return name, None, first_line(e)

    source = iter(images.files)
    # threads decode ahead: Pillow releases Python's lock while it works
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(one, item) for item in islice(source, 64)]
        while waiting:
            yield waiting.pop(0).result()
            waiting += [pool.submit(one, item) for item in islice(source, 1)]


# ------------------------------------------------------------------------------- latents as data


class Codec:
    """An autoencoder on its device. It encodes in float32, and decodes in the run's precision."""

    def __init__(self, autoencoder, cfg, device="cpu"):
        self.vae, self.device = autoencoder, torch.device(device)
        self.sample, self.bf16 = autoencoder.sample, wants_bf16(cfg, self.device)
        side = cfg.image_size // LATENT_DOWNSAMPLING
        planes = 2 if autoencoder.stochastic else 1
        views = 1 if cfg.dataset == "captioned" else 2             # captions tell left from right
        self.row = (views, planes, autoencoder.channels, side, side)   # of each image
        autoencoder.to(device, memory_format=torch.channels_last)

    @torch.no_grad()
    def encode(self, pixels):
        """Pixels uint8 (n, 3, H, W) -> moments of images and mirror images, (n, 2, P, C, h, w).

        They are half, on the CPU. captioned: of the images alone. Raises UserError if they are not
        finite.
        """
        x, rows = from_uint8(pixels), []
        for image in (x, x.flip(-1))[:self.row[0]]:
            moments = self.vae.encode(image.to(self.device, memory_format=torch.channels_last))
            rows.append(torch.stack([m for m in moments if m is not None], dim=1).float().cpu())
        rows = torch.stack(rows, dim=1).half()
        if not rows.isfinite().all():
            raise UserError("the autoencoder gives latents of nan or inf; its weights are damaged "
                            "or not its own, name others by --vae-weights")
        return rows

    @torch.no_grad()
    def decode(self, z0):
        """Latents (n, C, h, w) -> images float32 (n, 3, H, W) in [-1, 1] on the CPU."""
        images = []
        for part in z0.split(AT_A_TIME):
            part = part.to(self.device, memory_format=torch.channels_last)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                decoded = self.vae.decode(part)
            images.append(decoded.float().clamp(-1, 1).cpu().contiguous())
        return torch.cat(images)


class Latents:
    """A data set of latents in a file; UserError if it is damaged or not of the codec's shape.

    labels: int64 (N,), captioned.Prompts, or None.
    """

    def __init__(self, path, codec, device="cpu", key="", labels=None):
        try:
            self.array = rows_in(path, codec.row)
        except ValueError as e:
            raise UserError(f"{path} is cut short or damaged ({first_line(e)}); delete it, and the "
                            "images are encoded again") from e
        self.path, self.key, self.codec, self.device = path, key, codec, torch.device(device)
        self.shape, self.size, self.decode = codec.row[2:], len(self.array), codec.decode
        self.labels, self.ahead = labels, None
        # a GPU need not wait for the next batch; on a CPU a thread would only take its time
        self.thread = ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(
            self.device.index or 0,)) if self.device.type == "cuda" else None
        if labels is not None and len(labels) != self.size:
            raise UserError(f"{path} does not fit the .json or .jsonl beside it, which say what "
                            "was skipped; delete them all, and the images are encoded again")

    def batch(self, n, draws):
        """(z0, y): latents float32 (n, C, h, w) on the device, and labels int64 (n,) or None.

        Draws images, mirrors half of them, and samples the posterior. captioned: no mirror images,
        and y are the captions' embeddings (n, L, D).
        """
        image, moments, noise = self.prefetched(n, draws) if self.thread else self.drawn(n, draws)
        mean, *logvar = moved(moments, self.device).float().unbind(1)
        noise = None if noise is None else moved(noise, self.device)
        y = None if self.labels is None else self.labels[image].to(self.device)
        return self.codec.sample(mean, *logvar, noise=noise), y

    def drawn(self, n, draws):
        """A batch on the CPU: the images' numbers, their moments (n, P, C, h, w), and noise."""
        image = draws.integers(self.size, n, device="cpu").numpy()
        mirrored = draws.integers(self.codec.row[0], n, device="cpu").numpy()
        moments = torch.from_numpy(self.array[image, mirrored])
        noise = draws.normal(n, *self.shape, device="cpu") if moments.shape[1] > 1 else None
        if self.device.type == "cuda":
            moments, noise = moments.pin_memory(), None if noise is None else noise.pin_memory()
        return image, moments, noise

    def prefetched(self, n, draws):
        """drawn(n, draws), made by a thread during the last iteration if this is the next one.

        It is the same batch: the thread's generator began in the state in which this one is.
        """
        key, state = (n, draws.rank, draws.world), draws.generator.get_state()
        if self.ahead and self.ahead[0] == key and torch.equal(self.ahead[1], state):
            batch = self.ahead[2].result()
            draws.generator.set_state(self.ahead[3].generator.get_state())
        else:
            batch = self.drawn(n, draws)
        following = draws.next()
        state = following.generator.get_state()    # before the thread draws
        self.ahead = key, state, self.thread.submit(self.drawn, n, following), following
        return batch

    def conditions(self, n, generator):
        """Conditions of n samples that are still to be made, int64 (n,), or None."""
        if self.labels is None:
            return None
        return self.labels[torch.randint(self.size, (n,), generator=generator)]


def rows_in(path, row):
    """A .npy file as a memory map, float16 (N, *row); ValueError if it is anything else."""
    array = np.lib.format.open_memmap(path, "r")
    if array.dtype != np.float16 or array.shape[1:] != row or not len(array):
        raise ValueError(f"it holds {array.dtype} {array.shape}, not float16 (N, {row})")
    return array


def class_of(name):
    """The class of an image: its sub-folder; UserError if it lies in none."""
    folder, *inside = re.split(r"[/\\]", name)
    if not inside:
        raise UserError(f"--condition class takes the sub-folders of --data-dir as classes, and "
                        f"{printable(name)} lies in none")
    return folder


def class_names(images):
    """The classes of images, sorted, as torchvision's ImageFolder has them."""
    return sorted({class_of(name) for name, _ in images.files})


def labels_of(images, skipped=()):
    """The class of each image, int64 (N,), without those that were skipped."""
    number = {name: i for i, name in enumerate(class_names(images))}
    return torch.tensor([number[class_of(name)] for name, _ in images.files
                         if name not in skipped])


def skipped_in(path):
    """The names of the images that a file of latents left out, from the .json beside it."""
    skips = path.with_suffix(".json")
    try:
        return set(json.loads(skips.read_text())) if skips.exists() else set()
    except (ValueError, TypeError) as e:
        raise UserError(f"{skips} is damaged; delete it and {path}, and the images are encoded "
                        "again") from e


def data_key(cfg, images=None, autoencoder=None):
    """The key of the images, autoencoder and size that the settings name; nothing is encoded."""
    images = images or open_images(cfg)
    autoencoder = autoencoder or vae.of(cfg)
    lines = "\n".join([*images.identity(), fingerprint(autoencoder), str(cfg.image_size)])
    return hashlib.sha256(lines.encode(errors="surrogatepass")).hexdigest()[:12]


def open_latents(cfg, device="cpu", images=None):
    """The Latents that the settings name, encoded first if that was not done yet."""
    images = images or open_images(cfg)
    path, *others = encoded(cfg, device, images, encode)
    labels = labels_of(images, skipped_in(path)) if cfg.condition == "class" else None
    return Latents(path, *others, labels)


def encoded(cfg, device, images, encode):
    """(path, codec, device, key) of the latents; rank 0 calls `encode` if there is no file yet."""
    autoencoder = vae.of(cfg)
    key, codec = data_key(cfg, images, autoencoder), Codec(autoencoder, cfg, device)
    folder, source = Path(cfg.latents_dir), printable(Path(cfg.data_dir).stem)
    # images keep their key when their folder is renamed
    path = next(folder.glob(f"*-{key}.npy"),
                folder / f"{source}-{cfg.vae}-{cfg.image_size}-{key}.npy")
    if FIRST and not path.exists():
        with locked(f"{path}.lock", "is encoding these images"):
            if not path.exists():                  # another process may have made it just now
                encode(images, codec, path, cfg.image_size)
    wait()
    return path, codec, device, key


# -------------------------------------------------------------------------------------- encoding


def encode(images, codec, path, size):
    """Encodes all images and their mirror images into `path`; an interrupted encoding continues.

    Until it is whole the file is named .part. To continue, all images are decoded again, which
    takes little of the time. Images that cannot be used are skipped and named. captioned has no
    mirror images.
    """
    part, skipped = path.with_suffix(".part"), {}
    done, row_bytes = rows_done(part, images.size, codec.row), 2 * math.prod(codec.row)
    left = images.size - done
    print(f"encoding {left:,} of {images.size:,} images into {path}{images.note}", flush=True)
    no_room(path.parent, left * row_bytes, "encoding", "name another folder by --latents-dir")
    try:
        with open(part, "r+b") as file, tqdm(total=images.size, initial=done, unit=" images",
                                             desc="encoding", smoothing=0.05) as bar:
            file.seek(rows_in(part, codec.row).offset + done * row_bytes)
            for pixels in islice(batches(images, size, skipped), done // AT_A_TIME, None):
                rows = codec.encode(pixels)
                if bar.n == done:
                    describe(codec.sample(rows[:, :, 0].float()), codec.vae.scale)
                file.write(rows.numpy().tobytes())
                file.flush()
                os.fsync(file.fileno())            # before the next: only the last may be torn
                bar.update(len(pixels))
    except OSError as e:                           # errors of writing do not name their file
        raise UserError(f"could not write {path} ({e.strerror or e}); what is encoded is kept. Run "
                        "the same command again when there is room, or name another folder by "
                        "--latents-dir") from e
    if skipped:                                    # the last rows were for these
        print(f"skipped {len(skipped)} of {images.size} images: {listed(skipped)}")
        write_text(path.with_suffix(".json"), json.dumps([*skipped]))
        with open(part, "r+b") as file:            # NumPy's header is as long for any number
            n = images.size - len(skipped)
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<f2", "fortran_order": False, "shape": (n, *codec.row)})
            file.truncate(file.tell() + n * row_bytes)
    os.replace(part, path)


def rows_done(part, images, row):
    """Number of rows that an earlier encoding left in `part`; makes the file if there is none.

    Rows that were not written are zeros. The last batch before them may be torn: it does not count.
    """
    with suppress(OSError, ValueError):            # there is none, or it is of another shape
        array = rows_in(part, row)
        if len(array) == images:
            written = (array[i : i + AT_A_TIME].any() for i in range(0, images, AT_A_TIME))
            return AT_A_TIME * max(sum(takewhile(bool, written)) - 1, 0)
    np.lib.format.open_memmap(part, "w+", np.float16, (images, *row))
    return 0


def batches(images, size, skipped):
    """Yields pixels uint8 (n, 3, size, size) of AT_A_TIME images; unusable ones go to `skipped`.

    Raises UserError if these are more than 1 % (of fewer than 100 images: more than one).
    """
    batch = []
    for name, pixels, wrong in decoded(images, size, images.enlarge):
        if not wrong:
            batch.append(pixels)
        else:
            skipped[name] = wrong
            if len(skipped) > max(1, images.size // 100) or len(skipped) == images.size:
                small = ", or choose a smaller --image-size if they are too small"
                raise UserError("more than 1 % of the images cannot be used, at least "
                                f"{len(skipped)} of {images.size}: {listed(skipped)}; remove or "
                                "replace them" + small * (not images.enlarge))
        if len(batch) == AT_A_TIME:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


def describe(z0, scale):
    """Prints mean and standard deviation of latents, and a warning if the scale may be wrong."""
    print(f"the first latents have mean {z0.mean():.2f}, standard deviation {z0.std():.2f}")
    if not 0.7 <= z0.std() <= 1.4:
        print(f"about 1 is expected: is this autoencoder's scale another than {scale}? (Stable "
              "Diffusion 1 and 2: 0.18215, SDXL: 0.13025)")


def listed(skipped):
    """The first ten images of {name: what is wrong}, and how many there are beside them."""
    names = [f"{name} {wrong}" for name, wrong in skipped.items()]
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return printable("; ".join(names[:10]) + more)


def printable(name):
    """A name without the bytes that are not UTF-8, which print() refuses."""
    return name.encode(errors="backslashreplace").decode()


@torch.no_grad()
def fidelity(images, latents, size, n):
    """PSNR in dB of the first n images against what is decoded of their latents, float32 (n,).

    10 log10(peak^2 / mean squared error), of the posterior's mean, with peak 2 for [-1, 1].
    """
    means, n, psnr = latents.array[:, 0, 0], min(n, latents.size), []
    starts = tqdm(range(0, n, AT_A_TIME), desc="decoding", unit="batch")
    for first, pixels in zip(starts, batches(images, size, {})):
        x = from_uint8(pixels[:n - first])
        mean = torch.from_numpy(means[first : first + len(x)].astype(np.float32))
        error = latents.decode(latents.codec.sample(mean.to(latents.device))) - x
        psnr.append(10 * (4 / error.square().flatten(1).mean(1)).log10())
    return torch.cat(psnr)


def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--dataset", choices=UNCAPTIONED_SETS, default="folder",
                        help="[%(default)s]")
    parser.add_argument("--n", type=int, default=100, help="how many images are decoded again "
                        "[%(default)s]")
    add_field_flags(parser, (*MACHINE, "data_dir", "download", "image_size", "vae", "vae_weights",
                             "latents_dir"))
    given = given_flags(parser.parse_args(argv))
    if (n := given.pop("n")) < 1:
        raise UserError(f"--n {n} makes no sense; it must be at least 1")
    cfg = make_config(**given)
    device = choose_device(cfg)
    start(device)
    images = open_images(cfg)
    latents = open_latents(cfg, device, images)
    if not FIRST:
        return

    psnr = fidelity(images, latents, cfg.image_size, n)
    if not psnr.isfinite().all():
        raise UserError(f"{(~psnr.isfinite()).sum()} of {len(psnr)} images come back at inf or nan "
                        "dB PSNR: images of a single colour, or damaged weights; look at them")
    print(f"{latents.size:,} images in {latents.path}; {cfg.vae} gives the first {len(psnr):,} "
          f"back at {psnr.mean():.2f} dB PSNR on average, {psnr.min():.2f} dB at worst")


if __name__ == "__main__":
    run_script(main)
