"""Latents of a data set: every image is encoded once, then training reads a file of latents.

The file is a plain .npy, float16 (N, 2, P, C, h, w), memory-mapped: N images, each as it is and
mirrored, P = 2 for mean and log-variance of the posterior (1 where the autoencoder has no
variance). Its name holds a key of the images, the autoencoder's weights and the size, so other
images or other weights make another file. A .json beside it says how far the encoding came.
"""

import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import parallel
import vae as autoencoders
from config import FACTOR, UserError
from model import wants_bf16

AT_A_TIME = 16                     # images that are encoded or decoded together


class Latents:
    """A data set of latents: `batch` draws images, mirrors half of them, samples the posterior."""

    def __init__(self, path, codec, device="cpu"):
        try:
            self.array = np.load(path, mmap_mode="r")
        except (ValueError, OSError, EOFError) as e:
            raise UserError(f"{path} is cut short or damaged ({data.first_line(e)}); delete it, "
                            "and the images are encoded anew") from e
        self.codec, self.device, self.key = codec, torch.device(device), Path(path).stem
        self.shape, self.size = tuple(self.array.shape[3:]), len(self.array)
        self.decode = codec.decode

    def batch(self, n, draws):
        image = draws.integers(self.size, n, device="cpu").numpy()
        mirrored = draws.integers(2, n, device="cpu").numpy()
        moments = torch.from_numpy(self.array[image, mirrored])            # (n, P, C, h, w)
        mean, *logvar = moments.to(self.device).float().unbind(1)
        noise = draws.normal(n, *self.shape) if logvar else None
        return self.codec.sample(mean, *logvar, noise=noise), None


class Codec:
    """An autoencoder on its device: images in batches, in bf16 and NHWC where that is faster."""

    def __init__(self, vae, cfg, device="cpu"):
        self.vae, self.device = vae, torch.device(device)
        self.sample, self.bf16 = vae.sample, wants_bf16(cfg, self.device)
        vae.to(device, memory_format=torch.channels_last)

    @torch.no_grad()
    def run(self, function, x):
        """What function gives for each of the batches of x, on the device, as a list."""
        parts = []
        for part in x.split(AT_A_TIME):
            part = part.to(self.device, memory_format=torch.channels_last)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                parts.append(function(part))
        return parts

    def encode(self, x):
        """Images (n, 3, H, W) in [-1, 1] -> moments float32 (n, P, C, h, w) on the CPU."""
        parts = self.run(self.vae.encode, x)
        return torch.cat([torch.stack([m for m in moments if m is not None], dim=1).float().cpu()
                          for moments in parts])

    def decode(self, z0):
        """Latents (n, C, h, w) -> images float32 (n, 3, H, W) in [-1, 1] on the CPU."""
        parts = self.run(self.vae.decode, z0)
        return torch.cat([images.float().clamp(-1, 1).cpu().contiguous() for images in parts])


def open_latents(cfg, device="cpu", images=None):
    """The Latents that the settings name; encodes them first where that was not done yet.

    Raises UserError where images, autoencoder or disk do not suffice.
    """
    images, vae = images or data.open_images(cfg), autoencoders.load(cfg.vae, cfg.vae_weights)
    lines = [*images.identity, autoencoders.fingerprint(vae), str(cfg.image_size)]
    codec = Codec(vae, cfg, device)
    key = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
    stem = f"{Path(cfg.data_dir).resolve().stem}-{cfg.vae}-{cfg.image_size}"
    path = Path(cfg.latents_dir) / f"{stem}-{key}.npy"
    if not path.exists():
        if parallel.FIRST:
            others = [str(p) for p in Path(cfg.latents_dir).glob(f"{stem}-*.npy")]
            if others:
                print(f"the images or the autoencoder are not those of {', '.join(others)}; "
                      f"encoding anew into {path}")
            encode(images, codec, path, cfg.image_size)
        parallel.wait()
    return Latents(path, codec, device)


def encode(images, codec, path, size):
    """Encodes all images and their mirror images into `path`; an interrupted encoding goes on.

    Images that cannot be read, or are too small, are skipped and named; UserError where they are
    more than 1 %, or where the disk has no room.
    """
    state, part = path.with_suffix(".json"), path.with_suffix(".part")
    side, moments = size // FACTOR, 2 if codec.vae.stochastic else 1
    shape = (2, moments, codec.vae.channels, side, side)
    row = 2 * int(np.prod(shape))                  # bytes of an image's latents
    done = {"images": images.size, "read": 0, "rows": 0, "skipped": []}
    start = len(header(0, shape))
    try:
        found = json.loads(state.read_text())
        if part.stat().st_size >= start + found["rows"] * row:
            done = found
    except (OSError, ValueError, KeyError, TypeError):
        pass                                       # nothing to go on with: encode from the start

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        need, free = (images.size - done["read"]) * row, shutil.disk_usage(path.parent).free
        print(f"encoding {images.size - done['read']:,} of {images.size:,} images into {path}: "
              f"{need / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free")
        if need > free:
            raise UserError(f"the latents need {need / 1e6:,.0f} MB in {path.parent}, which has "
                            f"{free / 1e6:,.0f} MB free; make room, or name another folder by "
                            "--latents-dir")
        with open(part, "r+b" if done["read"] else "wb") as file, tqdm(
                total=images.size, initial=done["read"], unit=" images", desc="encoding",
                smoothing=0.05) as bar:
            file.truncate(start + done["rows"] * row)
            file.seek(0, os.SEEK_END)
            batch = []
            for name, pixels, wrong in data.decoded(images, size, done["read"]):
                done["read"] += 1
                if wrong:
                    done["skipped"].append(f"{name} {wrong}")
                else:
                    batch.append(pixels)
                if len(done["skipped"]) > images.size / 100:
                    raise UserError("more than 1 % of the images cannot be used, so nothing was "
                                    f"made: {listed(done['skipped'])}; remove or replace them, or "
                                    "choose a smaller --image-size where they are too small")
                if len(batch) == AT_A_TIME or done["read"] == images.size:
                    append(file, batch, codec, done, state, start, shape)
                    bar.update(done["read"] - bar.n)
                    batch = []
        os.replace(part, path)
    except OSError as e:
        raise UserError(f"could not write {path} ({e.strerror or e}); what is encoded is kept, run "
                        "the same command again when there is room, or name another folder by "
                        "--latents-dir") from e
    if done["skipped"]:
        print(f"skipped {len(done['skipped'])} of {images.size} images: {listed(done['skipped'])}")


def append(file, batch, codec, done, state, start, shape):
    """Encodes a batch of pixels to the end of the file, then notes in `state` how far it came."""
    if batch:
        x = data.from_uint8(torch.stack(batch))
        both = [codec.encode(v) for v in (x, x.flip(-1))]
        rows = torch.stack(both, dim=1).half()     # (n, 2, P, C, h, w)
        file.write(rows.numpy().tobytes())
        done["rows"] += len(batch)
    file.flush()
    os.fsync(file.fileno())
    end = file.tell()
    file.seek(0)
    file.write(header(done["rows"], shape))
    file.seek(end)
    new = state.with_suffix(".json.new")
    new.write_text(json.dumps(done, indent=1) + "\n")
    os.replace(new, state)


def header(rows, shape):
    """The .npy header for so many rows; of one length, since numpy leaves room for the number."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f2", "fortran_order": False, "shape": (rows, *shape)})
    return file.getvalue()


def listed(names, shown=10):
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return "; ".join(names[:shown]) + more
