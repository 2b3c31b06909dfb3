"""Latents of a data set: every image is encoded once, then training reads a file of latents.

    python latents.py --data-dir MY_PHOTOS --vae taesd      encodes ahead, tells what is lost

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
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import parallel
import vae as autoencoders
from config import (FACTOR, LATENT_SETS, MACHINE, Parser, UserError, add_field_flags, make_config,
                    run_script)
from model import choose_device, wants_bf16

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
    start, begun = len(header(0, shape)), time.perf_counter()
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
            batch, before = [], done["read"]
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
        print(f"encoded {(done['read'] - before) / (time.perf_counter() - begun):.3g} images a "
              "second, each with its mirror image")
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


@torch.no_grad()
def fidelity(images, latents, size, n):
    """PSNR in dB of the first n images against what comes back of their latents, float32 (n,).

    10 log10(peak^2 / mean squared error), of the posterior's mean, with peak 2 for [-1, 1].
    """
    pixels = (pixels for _, pixels, wrong in data.decoded(images, size) if not wrong)
    means, found, n = latents.array[:, 0, 0], [], min(n, latents.size)
    for start in tqdm(range(0, n, AT_A_TIME), desc="decoding", unit="batch"):
        x = data.from_uint8(torch.stack(list(islice(pixels, min(AT_A_TIME, n - start)))))
        mean = torch.from_numpy(means[start : start + len(x)].astype(np.float32))
        error = latents.decode(latents.codec.sample(mean.to(latents.device))) - x
        found.append(10 * (4 / error.square().flatten(1).mean(1)).log10())
    return torch.cat(found)


def main(argv=None):
    parser = Parser(description="Encodes the images of a data set ahead of training, and tells how "
                    "well the autoencoder gives them back.", allow_abbrev=False)
    parser.add_argument("--dataset", choices=LATENT_SETS, default="folder", help="[%(default)s]")
    parser.add_argument("--n", type=int, default=100, help="how many of them are decoded again "
                        "[%(default)s]")
    add_field_flags(parser, (*MACHINE, "data_dir", "download", "image_size", "vae", "vae_weights",
                             "latents_dir"))
    given = {k: tuple(v) if isinstance(v, list) else v
             for k, v in vars(parser.parse_args(argv)).items()}
    if (n := given.pop("n")) < 1:
        raise UserError(f"--n {n} makes no sense; it must be at least 1")
    cfg = make_config(**given)
    images = data.open_images(cfg)
    latents = open_latents(cfg, choose_device(cfg), images)
    psnr = fidelity(images, latents, cfg.image_size, n)
    print(f"{latents.size:,} images in {cfg.latents_dir}/{latents.key}.npy; {cfg.vae} gives the "
          f"first {len(psnr):,} back at {psnr.mean():.2f} dB PSNR on average, {psnr.min():.2f} dB "
          "at worst")


if __name__ == "__main__":
    run_script(main)
