"""What runs leave behind, opened for sampling; and files of raw samples."""

import json
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import torch

import captions
from config import LATENT_SETS, MACHINE, POINT_SETS, Config
from harness import UserError, checkpoint, first_line, machine
from harness.pictures import to_uint8
from model import copy_of, flow_map, velocity_network


SHIPPED = Path(__file__).resolve().parent.parent / "weights"   # small students of the repository


def same(z0):
    """The decoder of points and images, which need none."""
    return z0


def find_student(dataset=None):
    """The newest student.pt in runs/ (of one data set, if named), else the newest resume state.

    If there is neither, the student of the repository's weights/. Files that cannot be read are
    passed over. Raises UserError if there is none.
    """
    for name in ("student.pt", "student_resume.pt"):
        found = sorted(Path("runs").glob(f"**/{name}"), key=lambda p: p.stat().st_mtime)
        for file in reversed(found):
            stage = file.parent.name == "reflow" and (file.parent.parent / "teacher.pt").exists()
            if stage or "ablation" in file.parts:  # of reflow-distill; a cell of a table
                continue
            try:
                content = checkpoint.load(file, ("student", "student resume"), mmap=True)
            except (UserError, OSError):
                continue
            if dataset in (None, content["config"]["dataset"]):
                return file
    if (file := SHIPPED / (dataset or Config.dataset) / "student.pt").is_file():
        return file
    of, flag = (f" of {dataset}", f" --dataset {dataset}") if dataset else ("", "")
    raise UserError(f"there is no student{of} in runs/; train one with: python train.py{flag}, "
                    "or name one by --checkpoint")


def home_of(file):
    """The folder for what is made with a checkpoint: its own.

    Of pipelines and of the repository's weights/ it is one in runs/.
    """
    folder = Path(file).parent
    if checkpoint.is_pipeline(file):
        return Path("runs", Path(file).name)
    return Path("runs/weights", folder.name) if folder.resolve().parent == SHIPPED else folder


def open_network(file, weights="ema", **given):
    """(network, checkpoint, cfg) of a teacher.pt, student.pt or resume state.

    `weights` chooses among the networks of a state: "ema", "theta" (the teacher's or student's own
    weights), "target" (theta~). Raises UserError if the file does not have them. cfg are the
    settings of the checkpoint. Those of the machine come from `given` instead, or are the defaults;
    `given` may also hold vae_weights and data_dir.
    """
    content = checkpoint.load(file, ("teacher", "student", "teacher resume", "student resume"),
                              pipeline=given.get("teacher_checkpoint", ""))
    part = content["kind"].split()[0] if weights == "theta" else weights
    if part not in content:
        raise UserError(f"{file} has no weights of {weights}; --weights ema is in every file, "
                        "theta and target are in a student_resume.pt")
    here = {name: getattr(Config, name) for name in (*MACHINE, "compile", "grad_accum")}
    cfg = checkpoint.config_of(content, **here | given)
    device = machine.choose_device(cfg)
    network = velocity_network(cfg, content["shape"])
    if cfg.method == "flowmap" and content["kind"].startswith("student"):
        network = flow_map(network)
    checkpoint.load_weights(network, content[part], file)
    network.one_step = cfg.one_step and content["kind"].startswith("student")
    return machine.prepare(copy_of(network), cfg, device), content, cfg


def open_decoder(cfg):
    """z0 -> images for the samples of a run: `same`, or the decoder of its autoencoder."""
    if cfg.dataset not in LATENT_SETS:
        return same
    import latents                                 # not above: points need no torchvision
    import vae
    return latents.Codec(vae.of(cfg), cfg, machine.choose_device(cfg)).decode


def unconditional(n):
    """The conditions of n samples of an unconditional network: none."""
    return None


def examples(cfg):
    """Prompts for the text to image that cfg names."""
    if cfg.dataset == "captioned":
        import captioned
        return captioned.EXAMPLES
    return captions.EXAMPLES[cfg.dataset]


def conditions_of(cfg, classes=(), prompts=()):
    """A function n -> conditions of n samples: the classes (n,) or prompts (n, L) in turn.

    Without a choice these are all classes, or examples. It returns None if the network is
    unconditional. Raises UserError for a prompt with unknown words.
    """
    if cfg.condition == "none":
        return unconditional
    if cfg.dataset == "captioned":
        import captioned
        chosen = captioned.Prompts(cfg.teacher_checkpoint, list(prompts or examples(cfg)))
    elif cfg.condition == "text":
        chosen = captions.tokens(prompts or examples(cfg), cfg.dataset)
    else:
        chosen = torch.tensor(classes or range(cfg.num_classes))
    return lambda n: chosen[torch.arange(n) % len(chosen)]


def at_a_time(dataset):
    """Default batch size of sampling: large for points, small for latents, whose decoder needs
    memory."""
    if dataset == "captioned":
        return 8
    return 64 if dataset in LATENT_SETS else 1000 if dataset in POINT_SETS else 500


def read_prompts(file):
    """The prompts of a file: one per line, or a JSON list of prompts or of [path, prompt] pairs."""
    try:
        text = Path(file).read_text("utf-8-sig")
        prompts = (json.loads(text) if Path(file).suffix == ".json" else
                   [line for line in text.splitlines() if line.strip()])
        if not isinstance(prompts, list):
            raise ValueError("it is no list")
        prompts = [p if isinstance(p, str) else p[1] for p in prompts]
        if not all(isinstance(p, str) and p.strip() for p in prompts):
            raise ValueError("one of them is no text, or is empty")
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise UserError(f"--prompts {file} cannot be read ({first_line(e)}); it has one prompt per "
                        "line, or is a .json list of [path, prompt]") from e
    prompts = [p.strip() for p in prompts]
    if not prompts:
        raise UserError(f"--prompts {file} has no prompt; it has one per line")
    return prompts


# ------------------------------------------------------------------------------- raw samples


def save_npz(file, batches, n, shape):
    """Raw samples as ADM writes them, `arr_0`: images uint8 (n, H, W, C), points float32 (n, 2).

    `batches` yields (start, float32 points or images (b, C, H, W) in [-1, 1]). They go to the disk
    one after the other, so that memory does not grow with n; each process writes its own. Raises
    UserError if the disk is too full.
    """
    images = len(shape) == 3
    rows = (n, *shape[1:], shape[0]) if images else (n, *shape)
    # all processes of torchrun have the same parent
    number = os.getpid() if machine.WORLD == 1 else os.getppid()
    part = file.with_name(f"{file.name}.{number}.rows.part")
    try:
        if machine.FIRST:
            file.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.no_room(file.parent, 2 * math.prod(rows) * (1 if images else 4), str(file),
                               "name another file")
            np.lib.format.open_memmap(part, "w+", np.uint8 if images else np.float32, rows)
        machine.wait()
        array = np.lib.format.open_memmap(part, "r+")
        for start, z in batches:
            array[start : start + len(z)] = to_uint8(z).permute(0, 2, 3, 1) if images else z
        array.flush()
        machine.wait()
        if machine.FIRST:
            with checkpoint.replacing(file) as target, zipfile.ZipFile(target, "w") as archive:
                archive.write(part, "arr_0.npy")   # an .npz is a .zip of .npy files
    finally:
        if machine.FIRST and part.is_file():
            part.unlink()


def save_pngs(folder, batches):
    """Writes images as FOLDER/000000.png and so on; `batches` as for save_npz."""
    from torchvision.transforms.functional import to_pil_image
    for start, images in batches:
        for i, pixels in enumerate(to_uint8(images), start):
            to_pil_image(pixels).save(folder / f"{i:06d}.png")


def png_folder(name):
    """A folder for PNG files, made if need be; UserError if it already holds something."""
    folder = Path(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no empty folder; name another by --png")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def npz_name(name):
    """The path of an .npz; UserError for another suffix, or if the file is no .npz."""
    file = Path(name)
    if file.suffix != ".npz" or file.is_dir():
        raise UserError(f"--npz {name!r} is not the name of an .npz file; name one, as samples.npz")
    if file.exists() and not zipfile.is_zipfile(file):
        raise UserError(f"{file} exists and is not an .npz file, so it is not overwritten; name "
                        "another")
    return file
