"""Captioned images: a data set for text to image, read in several layouts and encoded once.

    *.tar                      shards of img2dataset: KEY.jpg, KEY.txt (and KEY.json)
    metadata.jsonl or .csv     with file_name and text, beside the images; also in a .zip
    0001.jpg and 0001.txt      images with captions of the same name
    *.parquet                  tables with a column of images and one of captions

The package datasets (optional) reads all of them as a stream, without a copy. A first pass lists
the samples and their captions in a .jsonl; then latents.py encodes the images, without mirror
images: a caption may say what is left of what. Captions are embedded anew for each batch.
"""

import json
import os
import tarfile
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

import latents
import text2image
from harness import UserError, first_line
from harness.checkpoint import replacing
from latents import SUFFIXES, checksum, files_in, of_suffix

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


# --------------------------------------------------------------------------------------- reading


def source_of(path):
    """(files, builder, arguments) of load_dataset for what --data-dir names; UserError if nothing.

    The builder is always named: if it is left to guess, it may take the tables that img2dataset
    writes beside its shards, or the .txt files alone, for the data.
    """
    if not path.exists():
        raise UserError(f"there is no {path}; {ADVICE}")
    files = [path / name for name in files_in(path)] if path.is_dir() else [path]
    images = of_suffix(SUFFIXES, files) if path.is_dir() else ()
    for suffix, kind in ((".tar", "webdataset"), (".zip", "imagefolder"), (".parquet", "parquet")):
        some = of_suffix((suffix,), files)
        if some and not (images and kind == "parquet"):
            more = {"drop_labels": True} if kind == "imagefolder" else {}
            return some, kind, {"data_files": [str(file) for file in some], **more}
    if not images:
        raise UserError(f"{path} holds no captioned images; {ADVICE}")
    used = of_suffix((*SUFFIXES, ".txt", ".jsonl", ".csv"), files)
    return used, "imagefolder", {"data_dir": str(path), "drop_labels": True}


def stream(path):
    """(datasets' IterableDataset, its column of images, that of captions or None, is it a folder).

    A folder without a column of captions has them in .txt files. Raises UserError if the files
    cannot be read, or a column is absent.
    """
    datasets = latents.hugging_face()
    _, kind, arguments = source_of(path)
    if kind == "webdataset":                       # or the first five samples decide on the columns
        with tarfile.open(arguments["data_files"][0], "r|*") as file:
            inside = [Path(m.name).name.partition(".")[2] for m in islice(file, 100)]
        image = next((s[1:] for s in SUFFIXES if s[1:] in inside), "jpg")
        text = datasets.Value("string")
        arguments["features"] = datasets.Features({
            image: datasets.Image(decode=False), "txt": text, "__key__": text, "__url__": text})
    rows = datasets.load_dataset(kind, split="train", streaming=True, **arguments)
    columns, is_folder = rows.features, "data_dir" in arguments
    image = next((name for name, kind in columns.items() if isinstance(kind, datasets.Image)
                  or isinstance(kind, dict) and "bytes" in kind), None)
    caption = next((name for name in CAPTIONS if name in columns), None)
    if image is None or caption is None and not (is_folder and len(columns) == 1):
        raise UserError(f"{path} has no column of {'captions' if image else 'images'} (it has "
                        f"{', '.join(columns)}; captions are in {', '.join(CAPTIONS)}); {ADVICE}")
    return rows.cast_column(image, datasets.Image(decode=False)), image, caption, is_folder


def samples(path):
    """Yields (name, caption or None, function that returns the image's bytes), in a fixed order.

    The function raises ValueError or OSError if the image or its caption is absent. Raises
    UserError if the files cannot be read.
    """
    place, seen, i = path, set(), -1
    try:
        rows, image, column, is_folder = stream(path)
        for i, row in enumerate(rows):
            file, place = row[image] or {}, row.get("__url__") or path
            name = row.get("__key__") or file.get("path") or path.name
            if is_folder:
                seen.add(os.path.realpath(name))
            yield sample(i, name, row[column] if column else beside(file["path"]), file)
        for name, text in left_over(path, seen, column is None) if is_folder else ():
            yield sample(i := i + 1, name, text, {})
    except (GeneratorExit, UserError):
        raise
    except Exception as e:                         # tarfile's, pyarrow's, the package's own
        raise UserError(f"{place} cannot be read as captioned images; it may be cut short or "
                        f"damaged ({first_line(e)}); {ADVICE}") from e


def left_over(path, seen, texts):
    """(name, caption) of images of a folder that are not in `seen`, and of texts without image."""
    stems = {os.path.splitext(file)[0] for file in seen}
    for file in map(os.path.realpath, source_of(path)[0]):
        if of_suffix(SUFFIXES, [file]) and file not in seen:
            yield file, None
        elif texts and file.lower().endswith(".txt") and os.path.splitext(file)[0] not in stems:
            yield file, "text"


def beside(image):
    """The text in the .txt file of an image's name; bytes if it is not UTF-8; None if absent."""
    file = Path(image).with_suffix(".txt")
    content = file.read_bytes() if file.exists() else None
    with suppress(UnicodeDecodeError, AttributeError):
        return content.decode("utf-8-sig")
    return content


def sample(i, name, caption, file):
    """Sample i as `samples` yields it; file is {"bytes": ...} or {"path": ...} of its image."""
    text = caption.strip() if isinstance(caption, str) else None
    wrong = "" if text else "has a caption that is no text in UTF-8" if (
        caption and text is None) else "has no caption"

    def read():
        if wrong or not (file.get("bytes") or file.get("path")):
            raise ValueError(wrong or "has no image")
        if file.get("bytes"):
            return file["bytes"]
        import fsspec                              # paths may lie in a .zip
        with fsspec.open(file["path"], "rb") as opened:
            return opened.read()
    return f"sample {i}, {name},", text or None, read


# -------------------------------------------------------------------------------------- encoding


def open_images(cfg):
    """What --data-dir names: its path, and the identity of an ImageFiles. UserError if nothing."""
    if not cfg.data_dir:
        raise UserError(f"--dataset captioned needs --data-dir; {ADVICE}")
    path = Path(cfg.data_dir)
    return SimpleNamespace(path=path, identity=lambda: ["captioned", *(
        f"{file.name} {checksum(file)}" for file in source_of(path)[0])])


def open_latents(cfg, device="cpu"):
    """The Latents that the settings name, with Prompts as labels; encoded first if need be."""
    path, *others = latents.encoded(cfg, device, open_images(cfg), encode)
    return latents.Latents(path, *others, Prompts(cfg.teacher_checkpoint, captions_of(path)))


def encode(images, codec, file, size):
    """Lists all samples in the .jsonl beside `file`, unless it exists; then encodes the images.

    A line has a sample's name and its caption, or null if there is none.
    """
    captions = file.with_suffix(".jsonl")
    if not captions.exists():
        print(f"listing the captions of {images.path}", flush=True)
        with replacing(captions, "w") as to:
            for name, text, _ in tqdm(samples(images.path), "listing", unit=" images"):
                to.write(json.dumps({"name": name, "text": text}) + "\n")
    with open(captions, "rb") as lines:
        n = sum(1 for _ in lines)
    if not n:
        raise UserError(f"{images.path} holds no captioned images; {ADVICE}")
    files = ((name, read) for name, _, read in samples(images.path))
    latents.encode(SimpleNamespace(files=files, size=n, note="", enlarge=True), codec, file, size)


def captions_of(path):
    """The caption of each row of a file of latents, a list of texts; UserError if damaged."""
    file, skipped = path.with_suffix(".jsonl"), latents.skipped_in(path)
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return [line["text"] for line in lines if line["name"] not in skipped]
    except (OSError, ValueError, TypeError, LookupError) as e:
        raise UserError(f"{file} is damaged ({first_line(e)}); delete it and {path}, and the "
                        "images are encoded again") from e
