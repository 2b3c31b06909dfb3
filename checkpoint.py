"""What a run leaves on disk: checkpoints that describe themselves, the resume state, log.csv.

A checkpoint is a dict of tensors and plain values: "scflow" (the version of this format), "kind"
("teacher", "student", the resume state of either, "classifier"), "config" (the settings as a dict),
"shape" (of one sample), "step", and state dicts. It is always read with weights_only=True.
"""

import csv
import math
import os
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

import parallel
from config import ARCHITECTURE, CIRCUMSTANCES, Config, UserError, flag, make_config, words

VERSION = 1


# --------------------------------------------------------------------------------- checkpoints


def save(path, kind, cfg, shape, step, **states):
    """Writes a checkpoint to a temporary file, then renames it: a kill leaves the old or the new.

    Of several processes the first writes, and all wait. Raises UserError where the file cannot be
    written (no right to, disk full); the old one stays.
    """
    path = Path(path)
    content = {"scflow": VERSION, "kind": kind, "config": asdict(cfg), "shape": tuple(shape),
               "step": step, **states}
    if not parallel.FIRST:
        return parallel.wait()
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:           # torch.save turns a full disk into RuntimeError
        part.unlink(missing_ok=True)
        raise UserError(f"could not write {path} ({e}); what was saved before is untouched") from e
    parallel.wait()


def load(path, kind=None, device="cpu"):
    """Reads a checkpoint of ours; `kind` may be one name or a tuple of names.

    Raises UserError where the file is missing, damaged, not ours, or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; train one with train.py, or name another")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:                         # other bytes make the unpickler raise anything
        raise UserError(f"{path} cannot be read as a checkpoint: it is cut short, damaged, or not "
                        "a file that torch.save wrote; train again, or name another") from e
    if isinstance(content, dict) and "scflow" not in content:
        content = official(content) or content
    if not isinstance(content, dict) or "scflow" not in content:
        raise UserError(f"{path} is not a checkpoint of this project (it does not say so); "
                        "name a teacher.pt or student.pt that teacher.py or train.py wrote")
    if content["scflow"] > VERSION:
        raise UserError(f"{path} has format {content['scflow']}, newer than this code's {VERSION}; "
                        "update the code")
    kinds = (kind,) if isinstance(kind, str) else kind
    if kinds and content["kind"] not in kinds:
        raise UserError(f"{path} holds a {content['kind']}, where a {' or '.join(kinds)} is wanted")
    return content


def official(content):
    """A checkpoint of the official code or of LFM as one of ours, or None where it is neither.

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


def load_weights(network, weights, path):
    """Puts a state dict into a network, strictly; UserError where it is of another architecture."""
    own = network.state_dict()
    missing, extra = own.keys() - weights.keys(), weights.keys() - own.keys()
    shapes = [k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape]
    if missing or extra or shapes:
        first = ", ".join(sorted([*missing, *extra, *shapes])[:3])
        raise UserError(f"{path} holds a network of another architecture: {len(missing)} tensors "
                        f"are missing, {len(extra)} unexpected, {len(shapes)} of another shape "
                        f"(first: {first}); pass the flags it was trained with")
    network.load_state_dict(weights)


def config_of(content):
    """The settings that a checkpoint was made with; fields that no longer exist are dropped."""
    known = {f.name for f in fields(Config)}
    return Config(**{k: v for k, v in content["config"].items() if k in known})


def differences(a, b, names):
    """The settings of `names` in which two Configs differ, as words: "--lr 0.1 (there: 0.001)"."""
    return ", ".join(f"{flag(n)} {words(getattr(a, n))} (there: {words(getattr(b, n))})"
                     for n in names if getattr(a, n) != getattr(b, n))


def same_architecture(cfg, given, other, path):
    """cfg with the network of another Config; UserError where a given flag says otherwise."""
    named = ARCHITECTURE if "model" in given else [n for n in ARCHITECTURE if n in given]
    clash = differences(cfg, other, named)
    if clash:
        raise UserError(f"{path} holds a network of another architecture: {clash}; "
                        "leave these flags out, or name another checkpoint")
    return replace(cfg, **{name: getattr(other, name) for name in ARCHITECTURE})


# ------------------------------------------------------------------------------------ run folder


def resumed(cfg, given, folder):
    """The settings saved in a run's folder, to go on with; UserError where a given flag differs.

    How long and where a run happens may change; what it computes may not.
    """
    folder = Path(folder)
    found = [folder / f"{name}_resume.pt" for name in ("student", "teacher")]
    found = [path for path in found if path.exists()]
    if not found:
        raise UserError(f"there is nothing to resume in {folder}; leave --resume out to start")
    there = config_of(load(found[0], ("student resume", "teacher resume")))
    free = (*CIRCUMSTANCES, "teacher_steps")
    if there.method != "reflow-distill":           # whose steps are shared out between its stages
        free += ("steps",)
    if clash := differences(cfg, there, [name for name in given if name not in free]):
        raise UserError(f"--resume goes on with the settings saved in {found[0]}; these differ: "
                        f"{clash}; leave them out, or start anew with --overwrite or another --out")
    return replace(there, **{name: getattr(cfg, name) for name in given if name in free})


def make_folder(path):
    """Creates the run's folder and makes sure that it can be written to; UserError where not."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as e:
        raise UserError(f"cannot write to the folder {path} ({e.strerror}); "
                        "choose another with --out") from e
    return Path(path)


class Interrupt:
    """Ctrl-C (or SIGTERM) lets the step end and sets `.asked`; a second one stops at once."""

    def __enter__(self):
        self.asked, self.before = False, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[number] = signal.signal(number, self.ask)
            except ValueError:                     # not the main thread: leave signals alone
                pass
        return self

    def now(self, step, every, device):
        """Whether to stop after this step; several processes agree on it every `every` steps."""
        if parallel.WORLD == 1:
            return self.asked
        return step % every == 0 and parallel.any_of(self.asked, device)

    def ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Interrupted(KeyboardInterrupt):
    """A run stopped by Ctrl-C, its state saved; the message says how to go on."""

    def __init__(self, folder, cfg, step, steps):
        super().__init__(f"stopped at step {step} of {steps} and saved; go on with the same "
                         f"command and --resume (--dataset {cfg.dataset} --out {folder} --resume)")


class Diverged(UserError):
    """A loss that is not finite."""


class Log:
    """The progress bar, log.csv, and the watch for losses that are not finite.

    Terms stay on the device as tensors; only every `every` steps are they fetched, all at once,
    and their means written as a row.
    """

    def __init__(self, path, columns, every, start, steps, batch_size, title):
        self.path, self.every, self.step, self.steps = Path(path), every, start, steps
        self.columns, self.batch_size, self.waiting = columns, batch_size, []
        self.rows = []
        if start and self.path.exists():           # a resumed run repeats the rows after its start
            with open(self.path, newline="") as f:
                self.rows = [row for row in csv.DictReader(f) if int(row["step"]) <= start]
        self.bar = tqdm(total=steps, initial=start, desc=title, dynamic_ncols=True,
                        mininterval=0.5 if sys.stderr.isatty() else 30,
                        disable=not parallel.FIRST)

    def __enter__(self):
        self.file = open(self.path if parallel.FIRST else os.devnull, "w", newline="")
        names = ["step", *self.columns, "per_second"]
        self.writer = csv.DictWriter(self.file, names, restval="", lineterminator="\n")
        self.writer.writeheader()
        self.writer.writerows(self.rows)
        self.file.flush()                          # or a kill before the next row loses them all
        self.clock = time.perf_counter()
        return self

    def __exit__(self, *exception):
        self.file.close()
        self.bar.close()

    def add(self, **terms):
        """Notes one step's terms, 0-dim tensors; raises as fetch does."""
        self.step += 1
        self.waiting.append({name: term.detach() for name, term in terms.items()})
        self.bar.update()
        if self.step % self.every == 0 or self.step == self.steps:
            self.fetch()

    def fetch(self):
        """Writes what waits as one row; raises UserError naming the first term not finite."""
        if not self.waiting:
            return
        first, found = self.step - len(self.waiting) + 1, {}
        every = torch.stack([term for terms in self.waiting for term in terms.values()])
        values = iter(parallel.mean(every).tolist())
        for i, terms in enumerate(self.waiting):
            for name, value in zip(terms, values):
                if not math.isfinite(value):
                    raise Diverged(f"{name} became {value} at step {first + i}, so the run "
                                   "stopped; what was saved before is kept. Lower the learning "
                                   "rate, or try --precision fp32")
                found.setdefault(name, []).append(value)
        per_second = len(self.waiting) * self.batch_size / (time.perf_counter() - self.clock)
        row = {name: f"{sum(values) / len(values):.6g}" for name, values in found.items()}
        self.bar.set_postfix({k: f"{float(v):.3g}" for k, v in row.items()}, refresh=False)
        self.rows.append({"step": self.step, **row, "per_second": f"{per_second:.1f}"})
        self.writer.writerow(self.rows[-1])
        self.file.flush()
        self.waiting, self.clock = [], time.perf_counter()

    def curves(self):
        """The log so far, {name: (steps, values)}."""
        found = {n: [(int(r["step"]), float(r[n])) for r in self.rows if r.get(n)]
                 for n in self.columns}
        return {n: tuple(zip(*pairs)) for n, pairs in found.items() if pairs}
