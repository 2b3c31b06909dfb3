"""Captioned images: a data set for text to image, read in several layouts and encoded once.

    *.tar                      shards of img2dataset: KEY.jpg, KEY.txt (and KEY.json)
    metadata.jsonl or .csv     with file_name and text, beside the images; also in a .zip
    0001.jpg and 0001.txt      images with captions of the same name
    *.parquet                  tables with a column of images and one of captions

The package datasets (optional) reads all of them as a stream, without a copy. Latents are kept as
in latents.py, but without mirror images: a caption may say what is left of what. Captions are kept
beside them as text, one JSON line per image; they are embedded anew for each batch.
"""

import hashlib
import json
import os
import tarfile
from collections import deque
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import latents
import text2image
import vae
from harness import UserError, first_line
from harness.checkpoint import fingerprint, locked
from harness.machine import FIRST, wait
from latents import AT_A_TIME, SUFFIXES, TABLES, checksum, files_in, listed, of_suffix, printable

ADVICE = ("--data-dir names .tar shards, a folder with metadata.jsonl, metadata.csv or a .txt for "
          "each image, a .zip of such a folder, or parquet files with images and captions")
CAPTIONS = ("text", "caption", "txt", "TEXT", "prompt", "file.txt")
EXAMPLES = ("a red bicycle against a brick wall", "a bowl of soup on a wooden table",
            "a lighthouse on a cliff at sunset", "a black cat on a green sofa")


class Prompts:
    """Texts in the place of conditions (n, ...): they become tensors when moved to a device."""

    def __init__(self, source, texts):
        self.source, self.texts = source, texts    # the pipeline that has the text encoder

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, chosen):
        some = self.texts[chosen] if isinstance(chosen, slice) else [self.texts[i] for i in chosen]
        return Prompts(self.source, some)

    def to(self, device):
        """Their embeddings on the device, float32 (n, L, D)."""
        return text2image.texts_of(self.source)(self.texts, device)


class Captioned(latents.Latents):
    """Latents in a file, without mirror images, and the captions in the .jsonl beside it."""

    def __init__(self, path, codec, device, key, source):
        super().__init__(path, codec, device, key)
        file = path.with_suffix(".jsonl")
        try:
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            self.captions = Prompts(source, [line["text"] for line in lines if "text" in line])
            if len(self.captions) != self.size:
                raise ValueError(f"{len(self.captions)} captions for {self.size} images")
        except (OSError, ValueError, TypeError) as e:
            raise UserError(f"{file} is damaged ({first_line(e)}); delete it and {path}, and the "
                            "images are encoded again") from e

    def batch(self, n, draws):
        """(z0, y): draws of the posterior, float32 (n, C, h, w), and embeddings (n, L, D)."""
        image = draws.integers(self.size, n, device="cpu")
        mean, *logvar = torch.from_numpy(self.array[image.numpy(), 0]).to(
            self.device).float().unbind(1)
        noise = draws.normal(n, *self.shape) if logvar else None
        y = self.captions[image].to(self.device)
        return self.codec.sample(mean, *logvar, noise=noise), y

    def conditions(self, n, generator):
        """Captions of n samples that are still to be made."""
        return self.captions[torch.randint(self.size, (n,), generator=generator)]


# --------------------------------------------------------------------------------------- reading


def source_of(path):
    """(files, builder, arguments) of load_dataset for what --data-dir names; UserError if nothing.

    The builder is always named: if it is left to guess, it may take the tables that img2dataset
    writes beside its shards, or the .txt files alone, for the data.
    """
    if not path.exists():
        raise UserError(f"there is no {path}; {ADVICE}")
    folder, names = (path, files_in(path)) if path.is_dir() else (path.parent, [path.name])
    for suffixes, kind in (((".tar",), "webdataset"), ((".zip",), "imagefolder")):
        if some := of_suffix(suffixes, names):
            return some, kind, {"data_files": [str(folder / name) for name in some]}
    if images := of_suffix(SUFFIXES, names) if path.is_dir() else ():
        texts = of_suffix((".txt", ".jsonl", ".csv"), names)
        return sorted([*images, *texts]), "imagefolder", {"data_dir": str(path),
                                                          "drop_labels": True}
    if some := of_suffix(TABLES[:1], names):
        return some, "parquet", {"data_files": [str(folder / name) for name in some]}
    raise UserError(f"{path} holds no captioned images; {ADVICE}")


def stream(path):
    """(datasets' IterableDataset, its column of images, that of captions or None, is it a folder).

    Raises UserError if the files cannot be read, or a column is absent.
    """
    datasets = latents.hugging_face()
    _, kind, arguments = source_of(path)
    try:
        if kind == "webdataset":                   # or the first five samples decide on the columns
            with tarfile.open(arguments["data_files"][0], "r|*") as file:
                inside = [Path(m.name).name.partition(".")[2] for m in islice(file, 100)]
            image = next((s[1:] for s in SUFFIXES if s[1:] in inside), "jpg")
            text = datasets.Value("string")
            arguments["features"] = datasets.Features({
                image: datasets.Image(decode=False), "txt": text, "__key__": text, "__url__": text})
        rows = datasets.load_dataset(kind, split="train", streaming=True, **arguments)
        columns = rows.features
    except Exception as e:                         # tarfile's, pyarrow's, the package's own
        raise UserError(f"{path} cannot be read as captioned images; it may be cut short or "
                        f"damaged ({first_line(e)}); {ADVICE}") from e
    image = next((name for name, kind in columns.items() if isinstance(kind, datasets.Image)
                  or isinstance(kind, dict) and "bytes" in kind), None)
    if image is None:
        raise UserError(f"{path} has no column of images ({', '.join(columns)}); {ADVICE}")
    caption = next((name for name in CAPTIONS if name in columns), None)
    if caption is None and kind != "imagefolder":
        raise UserError(f"{path} has no column of captions ({', '.join(columns)}), one of "
                        f"{', '.join(CAPTIONS)}; {ADVICE}")
    rows = rows.cast_column(image, datasets.Image(decode=False))
    return rows, image, caption, kind == "imagefolder" and path.is_dir()


def samples(path, start=0):
    """Yields (name, caption or None, function that returns the image's bytes), from row `start`.

    The function raises ValueError or OSError if the sample lacks one of the two. Raises UserError
    if the files cannot be read.
    """
    place, seen, i = path, set(), -1
    rows, image, column, is_folder = stream(path)
    first = 0 if is_folder else start              # of a folder all names must have been seen
    try:
        for i, row in enumerate(rows.skip(first), first):
            file = row[image] or {}
            place = row.get("__url__") or path
            name = row.get("__key__") or file.get("path") or f"row {i}"
            seen.add(os.path.realpath(name))
            if i >= start:
                caption = row[column] if column else beside(file["path"])
                yield name, caption, reader(file, caption)
    except GeneratorExit:
        raise
    except Exception as e:                         # tarfile's, pyarrow's, the package's own
        raise UserError(f"{place} cannot be read as captioned images; it may be cut short or "
                        f"damaged ({first_line(e)}); {ADVICE}") from e
    others = left_over(path, seen, column is None) if is_folder else ()
    yield from islice(others, max(start - i - 1, 0), None)


def left_over(path, seen, texts):
    """Samples of a folder with an image alone, or a text alone, given the images that were seen."""
    stems = {os.path.splitext(file)[0] for file in seen}
    for name in source_of(path)[0]:
        file = os.path.realpath(path / name)
        if of_suffix(SUFFIXES, [name]) and file not in seen:
            yield name, None, reader({}, None)
        elif texts and of_suffix((".txt",), [name]) and os.path.splitext(file)[0] not in stems:
            yield name, "text", reader({}, "text")


def beside(image):
    """The caption in the .txt file of an image's name, or None."""
    text = Path(image).with_suffix(".txt")
    return text.read_text("utf-8", "replace").strip() if text.exists() else None


def reader(file, caption):
    """A function that returns the bytes of an image; it raises ValueError without a caption."""
    def read():
        if not (caption or "").strip():
            raise ValueError("has no caption")
        if file.get("bytes") is not None:
            return file["bytes"]
        if not file.get("path"):
            raise ValueError("has no image")
        import fsspec                              # paths may lie in a .zip
        with fsspec.open(file["path"], "rb") as opened:
            return opened.read()
    return read


# -------------------------------------------------------------------------------------- encoding


def data_key(cfg, autoencoder=None):
    """The key of images, captions, autoencoder and size; nothing is encoded."""
    path = data_path(cfg)
    folder = path if path.is_dir() else path.parent
    lines = [f"{Path(name).name} {checksum(folder / name)}" for name in source_of(path)[0]]
    lines += [fingerprint(autoencoder or vae.of(cfg)), str(cfg.image_size), "captioned"]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogatepass")).hexdigest()[:12]


def data_path(cfg):
    if not cfg.data_dir:
        raise UserError(f"--dataset captioned needs --data-dir; {ADVICE}")
    return Path(cfg.data_dir)


def open_latents(cfg, device="cpu"):
    """The data set that the settings name; rank 0 encodes it first if that was not done yet."""
    path, autoencoder = data_path(cfg), vae.of(cfg)
    key, codec = data_key(cfg, autoencoder), latents.Codec(autoencoder, cfg, device)
    folder = Path(cfg.latents_dir)
    file = next(folder.glob(f"*-{key}.npy"),
                folder / f"{printable(path.stem)}-{cfg.vae}-{cfg.image_size}-{key}.npy")
    if FIRST and not file.exists():
        with locked(f"{file}.lock", "is encoding these images"):
            if not file.exists():
                encode(path, codec, file, cfg.image_size)
    wait()
    return Captioned(file, codec, device, key, cfg.teacher_checkpoint)


def encode(path, codec, file, size):
    """Encodes all images into `file` and their captions into the .jsonl beside it.

    Their number is not known before the end, so rows are appended. Until then both files are named
    .part, and an interrupted encoding continues. Each sample has a line: its name, and its text or
    what is wrong. Raises UserError if more than 1 % are wrong.
    """
    rows, lines = file.with_suffix(".part"), file.with_suffix(".jsonl.part")
    start, done, skipped = written(rows, lines, codec.row)
    print(f"encoding the images of {path}, from number {start} on, into {file}", flush=True)
    waiting, pixels, texts = deque(), [], []

    def files():
        for name, caption, read in samples(path, start):
            waiting.append(caption)
            yield name, read

    with open(rows, "r+b") as to, open(lines, "a") as log:
        def flush():
            nonlocal done
            if pixels:
                encoded = codec.encode(torch.stack(pixels))
                if not done:
                    latents.describe(codec.sample(encoded[:, 0, 0].float()), codec.vae.scale)
                to.seek(0, 2)
                to.write(encoded.numpy().tobytes())
            to.flush(), os.fsync(to.fileno())      # before their lines: only these count
            log.writelines(json.dumps(text) + "\n" for text in texts)
            log.flush()
            done += len(pixels)
            pixels.clear(), texts.clear()

        images = latents.decoded(SimpleNamespace(files=files()), size, enlarge=True)
        bar = tqdm(images, "encoding", initial=start, unit=" images")
        for name, image, wrong in bar:
            caption = waiting.popleft()
            texts.append({"name": name, "wrong": wrong} if wrong else
                         {"name": name, "text": caption})
            skipped |= {name: wrong} if wrong else {}
            pixels += [] if wrong else [image]
            if len(pixels) == AT_A_TIME:
                flush()
            check(skipped, done + len(pixels), path, at_least=100)
        flush()
        check(skipped, done, path)
        header(to, done, codec.row)
    if skipped:
        print(f"skipped {len(skipped)} of {done + len(skipped)} images: {listed(skipped)}")
    lines.replace(file.with_suffix(".jsonl"))
    rows.replace(file)


def check(skipped, good, path, at_least=0):
    """UserError if more than 1 % of the samples so far are wrong, or all; one is always allowed."""
    seen = good + len(skipped)
    if seen > at_least and (len(skipped) > max(1, seen // 100) or not good):
        raise UserError(f"{len(skipped)} of {seen} samples of {path} cannot be used, more than "
                        f"1 %: {listed(skipped)}; repair or remove them")


def header(file, n, row):
    """Writes the header of a .npy file of n rows; it has the same length for every n."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f2", "fortran_order": False, "shape": (n, *row)})
    return file.tell()


def written(rows, lines, row):
    """(samples, images, {name: what is wrong}) of an earlier encoding; cuts off what is torn."""
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.touch(), lines.touch()
    with open(rows, "r+b") as file:
        begin, each = header(file, 0, row), 2 * int(np.prod(row))
        whole = (file.seek(0, 2) - begin) // each // AT_A_TIME * AT_A_TIME
        texts = lines.read_bytes().split(b"\n")[:-1]
        entries = [json.loads(text) for text in texts]
        good = np.cumsum(["text" in entry for entry in entries])
        whole = min(whole, int(good[-1]) // AT_A_TIME * AT_A_TIME) if entries else 0
        keep = int(np.searchsorted(good, whole)) + 1 if whole else 0
        file.truncate(begin + whole * each)
    lines.write_bytes(b"".join(text + b"\n" for text in texts[:keep]))
    return keep, whole, {e["name"]: e["wrong"] for e in entries[:keep] if "wrong" in e}
