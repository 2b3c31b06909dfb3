"""Measures for text to image: CLIP score, and samples that any tool wrote."""

import re
import zlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image

from harness import UserError, first_line
from harness.hub import library, part
from harness.pictures import from_uint8, to_uint8


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
    """Samples of a .npz (arr_0, uint8 (n, H, W, 3)) or a folder of images: uint8 (n, 3, H, W)."""
    import latents                                 # not above: points need no torchvision
    path = Path(path)
    try:
        if path.is_dir():
            # 10.png comes after 9.png, so that --prompts have the same order
            names = sorted(latents.of_suffix(latents.SUFFIXES, latents.files_in(path)),
                           key=lambda name: [int(part) if part.isdecimal() else part
                                             for part in re.split(r"(\d+)", name)])
            arrays = np.stack([np.asarray(Image.open(path / name).convert("RGB"))
                               for name in names])
        else:
            with np.load(path) as file:
                arrays = file["arr_0"]
        if arrays.dtype != np.uint8 or arrays.ndim != 4 or arrays.shape[3] != 3:
            raise ValueError(f"it holds {arrays.dtype} {arrays.shape}")
        if arrays.shape[1] != arrays.shape[2]:
            raise ValueError("its images are not square")
        if not len(arrays):
            raise ValueError("it is empty")
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, BadZipFile,
            zlib.error) as e:
        raise UserError(f"--samples {path} cannot be read ({first_line(e)}); name a .npz with "
                        "arr_0, uint8 (n, H, W, 3), or a folder of images of one size") from e
    return torch.from_numpy(arrays).permute(0, 3, 1, 2)


def in_blocks(samples, mine, size=100):
    """Yields (first index, float32 images in [-1, 1]) of the range `mine` of the samples."""
    for i in mine[::size]:
        yield i, from_uint8(samples[i : min(i + size, mine.stop)])
