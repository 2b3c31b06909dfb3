"""Files that are saved and read back: checkpoints, small text files, locks.

A checkpoint is a dict of tensors and plain values: "scflow" (the version of this format), "kind"
("teacher", "student", the resume state of either, "classifier"), "config" (the settings as a dict),
"shape" (of one sample), "step", and state dicts. It is always read with weights_only=True.
"""

import hashlib
import os
import re
import shutil
import socket
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from config import (ARCHITECTURE, Config, check, flag, known_fields, make_config, words)
from harness import UserError
from harness.machine import FIRST, wait

try:
    import fcntl
except ImportError:                # Windows: two runs in one folder are not noticed there
    fcntl = None

VERSION = 1
# what a file of each kind holds beside config, shape and step; state dicts are dicts
PARTS = {
    "teacher": ("ema",),
    "student": ("ema",),
    "teacher resume": ("teacher", "ema", "opt"),
    "student resume": ("student", "target", "ema", "disc", "opt", "opt_disc"),
    "classifier": ("net",),
}


# ------------------------------------------------------------------------------ writing, locking


def save(path, kind, cfg, shape, step, older=None, **states):
    """Writes a checkpoint to a temporary file, then renames it.

    So a kill leaves either the old file or the new one. `older` is a path that the old file moves
    to; without it the old file is replaced. Rank 0 writes, and all processes wait. Raises UserError
    if the file cannot be written (no permission, disk full); the old one stays.
    """
    content = {"scflow": VERSION, "kind": kind, "config": asdict(cfg), "shape": tuple(shape),
               "step": step, **states}
    if FIRST:
        with replacing(path, "wb", older) as file:
            torch.save(content, file)
    wait()


def write_text(path, text):
    """Writes a text to a temporary file, then renames it; UserError if it cannot be written."""
    with replacing(path, "w") as file:
        file.write(text + "\n")


@contextmanager
def replacing(path, mode="wb", older=None):
    """A temporary file that replaces `path` when the block ends; deleted if the block fails.

    What was at `path` moves to `older`, if one is named.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if older and path.exists():
            os.replace(path, older)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:           # torch.save turns a full disk into RuntimeError
        raise UserError(f"could not write {path} ({getattr(e, 'strerror', None) or e}); what was "
                        "saved before is untouched") from e
    finally:
        if part.is_file():
            part.unlink()


@contextmanager
def locked(path, what):
    """Holds a lock on the file `path`; the system drops it when the process ends, however it ends.

    Raises UserError ("another process <what> ...") if another process holds it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            file.seek(0)
            raise UserError(f"another process {what} ({file.read().strip()}); wait until it has "
                            "ended, or choose another folder") from e
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def no_room(folder, need, what, advice):
    """Raises UserError if the disk of `folder` has fewer than `need` bytes free."""
    if (free := shutil.disk_usage(folder).free) < need:
        raise UserError(f"{what} needs {need / 1e6:,.0f} MB in {folder}, which has "
                        f"{free / 1e6:,.0f} MB free; make room, or {advice}")


# --------------------------------------------------------------------------------------- reading


def load(path, kind=None, mmap=False, pipeline="", checksums=None):
    """Reads a checkpoint of ours, or of the official code; `kind` is one name, a tuple or None.

    A pipeline of Stable Diffusion counts as a teacher; if it is a network alone, `pipeline` names
    the rest of it. With mmap, tensors are read from disk only when they are used, and checksums
    only if asked for; a pipeline is opened without its tensors. Raises UserError if the file is
    missing, damaged, not ours, of another kind, or does not hold what its kind must.
    """
    if is_pipeline(path):
        import text2image                          # not above: it needs optional packages
        content = text2image.content(str(path), pipeline, weights=not mmap)
        return {"scflow": VERSION} | content
    path = Path(path)
    if path.is_dir():
        raise UserError(f"there is no checkpoint {path}: it is a folder without unet/config.json, "
                        "so no pipeline; name a pipeline, or a checkpoint, which is a file")
    if not path.is_file():
        hint = ("; train.py --help says where the official teacher, model_480.pth, is"
                if path.name.startswith("model_") else "")
        raise UserError(f"there is no checkpoint {path}; train one with train.py, or name another"
                        + hint)
    try:
        # torch.load does not look at the checksums
        if (not mmap if checksums is None else checksums) and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("a checksum is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except PermissionError:
        raise
    except Exception as e:                         # other bytes make the unpickler raise anything
        raise UserError(f"{path} cannot be read as a checkpoint: it is cut short, damaged, or not "
                        "a file that torch.save wrote; train again, or name another") from e
    if isinstance(content, dict) and "scflow" not in content:
        content = official(content) or content
    if not isinstance(content, dict) or "scflow" not in content:
        raise UserError(f"{path} is not a checkpoint of this project (it has no entry scflow); "
                        "name a teacher.pt or student.pt that teacher.py or train.py wrote")
    if problem := fault_of(content):
        raise UserError(f"{path} is damaged or changed: {problem}; train again, or name another")
    if content["scflow"] > VERSION:
        raise UserError(f"{path} has format {content['scflow']}, newer than this code's {VERSION}; "
                        "update the code")
    kinds = (kind,) if isinstance(kind, str) else kind
    if kinds and content["kind"] not in kinds:
        raise UserError(f"{path} holds a {content['kind']}; a {' or '.join(kinds)} is needed")
    return content


def is_pipeline(path):
    """Whether a path is a folder in diffusers' layout, or else could be an id on the hub."""
    path = Path(path)
    if path.is_dir():
        return any(path.glob("config.json")) or any(path.glob("*/config.json"))
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path.as_posix())
    return bool(is_id) and not path.parent.exists() and path.suffix not in (".pt", ".pth")


def fault_of(content):
    """What is wrong with the fields of a checkpoint, in words; an empty string if nothing is."""
    version, kind, step = (content.get(name) for name in ("scflow", "kind", "step"))
    shape = content.get("shape")
    if type(version) is not int or version < 1:
        return f"its format is {version!r}"
    if version > VERSION:
        return ""
    if not isinstance(kind, str) or kind not in PARTS:
        return f"its kind is {kind!r}"
    if type(step) is not int or step < 0:
        return f"its step is {step!r}"
    if not isinstance(shape, (tuple, list)) or len(shape) not in (1, 3) or not all(
            type(n) is int and 0 < n < 2**16 for n in shape):
        return f"its shape is {shape!r}"
    if lacking := [name for name in PARTS[kind] if not isinstance(content.get(name), dict)]:
        return f"it has no {lacking[0]}"
    if not isinstance(content.get("seconds", 0.0), (int, float)):
        return f"its seconds are {content['seconds']!r}"
    try:
        config_of(content)
    except (UserError, KeyError, TypeError, AttributeError) as e:
        return f"its settings are not valid ({e})"
    return ""


def config_of(content, **given):
    """The settings that a checkpoint was made with, and `given` in their place; checked.

    Fields that no longer exist are dropped. A checkpoint never asks for a download.
    """
    cfg = Config(**known_fields(content["config"]) | {"download": False} | given)
    check(cfg)
    return cfg


def official(content):
    """A checkpoint of the official code or of LFM as one of ours, or None if it is neither.

    The teacher, model_480.pth, is a bare state dict, its keys with or without "module."; a student,
    model_N.pth, is {"model": ..., "ema_model": ...}, and the average is the one to sample from.
    """
    weights = content.get("ema_model", content)
    if not isinstance(weights, dict):
        return None
    weights = {key.removeprefix("module."): value for key, value in weights.items()
               if isinstance(key, str)}
    if "input_blocks.0.0.weight" not in weights:
        return None
    cfg = make_config("celebahq", preset="official")
    return {"scflow": VERSION, "kind": "student" if "ema_model" in content else "teacher",
            "config": asdict(cfg), "shape": (4, 32, 32), "step": 0, "ema": weights}


# ------------------------------------------------------------------------- into the run's objects


def load_weights(network, weights, path, advice=""):
    """Puts a state dict into a network, strictly; UserError if it is of another architecture."""
    expected = network.state_dict()
    missing, extra = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    shapes = [k for k in expected.keys() & weights.keys() if not alike(weights[k], expected[k])]
    if missing or extra or shapes:
        first = ", ".join(map(str, sorted([*missing, *extra, *shapes], key=str)[:3]))
        raise UserError(f"{path} holds a network of another architecture: {len(missing)} tensors "
                        f"are missing, {len(extra)} unexpected, {len(shapes)} of another shape or "
                        f"type (first: {first}); {advice or 'pass the flags it was trained with'}")
    if bad := [k for k, v in weights.items() if not v.isfinite().all()]:
        raise UserError(f"{path} holds weights that are not finite (first: {bad[0]}); "
                        f"{advice or 'train again, or name another'}")
    network.load_state_dict(weights)


def alike(value, tensor):
    """Whether a value from a file can take the place of a tensor of floats."""
    return (torch.is_tensor(value) and value.shape == tensor.shape and value.is_floating_point()
            and value.layout == torch.strided and not value.is_meta)


def load_state(part, state, path):
    """Puts a saved state back into a network or an optimiser; UserError if it does not fit."""
    if isinstance(part, torch.nn.Module):
        return load_weights(part, state, path)
    parameters = [p for group in part.param_groups for p in group["params"]]
    try:
        # bitsandbytes' AdamW has moments of another form, and compares them itself
        for i, moments in state["state"].items() if isinstance(part, torch.optim.AdamW) else ():
            fits = alike(moments["step"], torch.tensor(0.0)) and all(
                alike(moments[name], parameters[i]) for name in ("exp_avg", "exp_avg_sq"))
            if not fits:
                raise ValueError("its moments have other shapes")
        # betas come from the settings; the rate is that of the last iteration
        part.load_state_dict({**part.state_dict(), "state": state["state"]})
        for group, saved in zip(part.param_groups, state["param_groups"]):
            group["lr"] = saved["lr"]
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise UserError(f"{path} holds an optimiser that does not fit its network ({e}); start "
                        "anew with --overwrite or another --out") from e


def differences(a, b, names):
    """The settings of `names` in which two Configs differ, as words: "--lr 0.1 (not 0.001)"."""
    return ", ".join(f"{flag(n)} {words(getattr(a, n))} (not {words(getattr(b, n))})"
                     for n in dict.fromkeys(names) if getattr(a, n) != getattr(b, n))


def same_architecture(cfg, given, other, path):
    """cfg with the network of another Config; UserError if a given flag says otherwise."""
    named = ARCHITECTURE if "model" in given else [n for n in ARCHITECTURE if n in given]
    if clash := differences(cfg, other, named):
        flags = "--model" if "model" in given else "these flags"
        raise UserError(f"{path} holds a network of another architecture: {clash}; "
                        f"leave {flags} out, or name another checkpoint")
    return replace(cfg, **{name: getattr(other, name) for name in ARCHITECTURE})


def fingerprint(network):
    """12 hexadecimal digits that change with any weight: a part of the key of what it makes."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        value = value.cpu().contiguous().flatten().view(torch.uint8)       # NumPy has no bf16
        digest.update(key.encode() + value.numpy().tobytes())
    return digest.hexdigest()[:12]
