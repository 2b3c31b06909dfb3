"""Measures for text to image: CLIP score, and samples that any tool wrote."""

import math
import os
import zipfile
import zlib
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from harness import UserError, first_line
from harness.hub import library, part
from harness.pictures import from_uint8, to_uint8

AT_A_TIME = 100                    # samples of a file in memory


class Score:
    """CLIP score: the inner product of CLIP's normalised embeddings of an image and its prompt.

    `source` is a folder or an id on the hub with CLIPModel and CLIPProcessor, which crops and
    resizes. The score depends on it, so the name of the measure holds it.
    """

    def __init__(self, source, device="cpu"):
        transformers = library("transformers")
        self.model = part(transformers.CLIPModel, source, None).to(device)
        self.processor = part(transformers.CLIPProcessor, source, None)
        self.name, self.device = f"CLIP score ({source})", device

    @torch.no_grad()
    def __call__(self, images, features, prompts):
        """Images (n, 3, H, W) in [-1, 1] and n prompts -> {name: scores in -1 ... 1, (n,)}."""
        texts = list(getattr(prompts, "texts", prompts))       # Prompts, or a list
        inputs = self.processor(text=texts, images=list(to_uint8(images)), return_tensors="pt",
                                padding=True, truncation=True).to(self.device)
        answer = self.model(**inputs)              # its embeddings are normalised
        return {self.name: (answer.image_embeds * answer.text_embeds).sum(1).float().cpu()}


def read_samples(path):
    """(n, side, blocks) of a .npz (arr_0, uint8 (n, side, side, 3)) or of a folder of images.

    blocks(part) yields (first index, float32 images (b, 3, side, side) in [-1, 1]) of a range of
    them. They are read one block after the other, so that memory does not grow with n.
    """
    path = Path(path)
    shape_and_images = images_in_folder if path.is_dir() else images_in_npz
    with readable(path):
        (n, *size), images = shape_and_images(path)
        if size != [size[0], size[0], 3]:
            raise ValueError(f"its images are {size}, not square with 3 colours")

    def blocks(part):
        with readable(path):
            some = images(part)
            for i in part[::AT_A_TIME]:
                block = np.stack(list(islice(some, min(AT_A_TIME, part.stop - i))))
                yield i, from_uint8(torch.from_numpy(block).permute(0, 3, 1, 2))
    return n, size[0], blocks


@contextmanager
def readable(path):
    """Turns the errors of reading samples into a UserError."""
    try:
        yield
    except (OSError, EOFError, ValueError, LookupError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"--samples {path} cannot be read ({first_line(e)}); name a .npz with "
                        "arr_0, uint8 (n, H, W, 3), or a folder of images of one size") from e


def images_in_folder(path):
    """(shape, function: range -> images uint8 (H, W, 3)) of a folder, in the order of the names."""
    import latents                                 # not above: points need no torchvision
    names = latents.of_suffix(latents.SUFFIXES, latents.files_in(path))
    if not names:
        raise ValueError("it has no images")

    def images(part):
        for i in part:
            yield np.asarray(Image.open(path / names[i]).convert("RGB"))
    return (len(names), *next(images(range(1))).shape), images


def images_in_npz(path):
    """The same of arr_0 in a .npz."""
    @contextmanager
    def opened():
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            np.lib.format.read_magic(file)
            yield (file, *np.lib.format.read_array_header_1_0(file))

    def images(part):
        with opened() as (file, shape, *_):
            row = math.prod(shape[1:])
            file.seek(part.start * row, os.SEEK_CUR)
            for _ in part:
                yield np.frombuffer(file.read(row), np.uint8).reshape(shape[1:])

    with opened() as (_, shape, by_columns, dtype):
        if dtype != np.uint8 or by_columns or len(shape) != 4 or not shape[0]:
            raise ValueError(f"it holds {dtype} {shape}")
        return shape, images
