"""The log of a run, its progress bar, and stopping by Ctrl-C."""

import csv
import math
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from harness import UserError, checkpoint, machine
from harness.machine import FIRST


class Interrupt:
    """Ctrl-C (or SIGTERM, SIGHUP) lets the step end and sets `.asked`; a second one stops now."""

    def __enter__(self):
        self.asked, self.sent, self.before = False, None, {}
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            self.before |= machine.on_signal(name, self.ask)
        return self

    def now(self):
        """Whether to stop after this step; several processes agree on it in the step after."""
        if machine.WORLD == 1:
            return self.asked
        # the number of processes that were asked is summed on the CPUs while the next step is
        # computed: no process waits for its GPU, and all have stopped two iterations later
        agreed = self.sent is not None and self.sent.wait() and self.votes > 0
        self.votes = torch.tensor(int(self.asked))
        self.sent = dist.all_reduce(self.votes, async_op=True)
        return bool(agreed)

    def ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Diverged(UserError):
    """A loss or a weight that is not finite; the message begins with what, and when."""

    def __init__(self, what):
        super().__init__(f"{what}, so the run stopped; what was saved before is kept. Lower the "
                         "learning rate; if it ran in bf16, try --precision fp32")


class Log:
    """The progress bar, the csv file, and the check for losses that are not finite.

    Terms stay on the device as tensors. Every `every` steps they are fetched, all in one transfer,
    and their means are written as one row; `board` writes it for TensorBoard, too.
    """

    def __init__(self, path, columns, every, start, steps, batch_size, title, board=False):
        self.path, self.every, self.step, self.steps = Path(path), every, start, steps
        self.columns, self.batch_size, self.waiting = columns, batch_size, []
        self.board = None
        if board and FIRST:
            from torch.utils.tensorboard import SummaryWriter
            # hides what an older run, or a resumed one after its start, has written there
            self.board = SummaryWriter(self.path.parent / "tensorboard" / title,
                                       purge_step=start + 1)
        # a resumed run repeats the rows after its start
        self.rows = [row for row in read_rows(path) if int(row["step"]) <= start]
        self.bar = tqdm(total=steps, initial=start, desc=title, dynamic_ncols=True,
                        mininterval=0.5 if sys.stderr.isatty() else 30,
                        disable=not FIRST or not writable(sys.stderr))

    def __enter__(self):
        names = ["step", *self.columns, "per_second"]
        if FIRST:
            write_rows(self.path, names, self.rows)
        self.names, self.clock = names, time.perf_counter()
        return self

    def __exit__(self, *exception):
        self.bar.close()
        if self.board:
            self.board.close()

    def add(self, **terms):
        """Notes the terms of one step, 0-dim tensors; raises as fetch does."""
        self.step += 1
        self.waiting.append({name: term.detach() for name, term in terms.items()})
        self.bar.update()
        if self.step % self.every == 0 or self.step == self.steps:
            self.fetch()

    def fetch(self):
        """Writes one row, the means of the steps since the last; UserError if one is not finite."""
        if not self.waiting:
            return
        tensors = torch.stack([term for terms in self.waiting for term in terms.values()])
        numbers = iter(machine.mean(tensors).tolist())
        steps = [{name: next(numbers) for name in terms} for terms in self.waiting]
        for step, terms in enumerate(steps, self.step - len(steps) + 1):
            for name, value in terms.items():
                if not math.isfinite(value):
                    raise Diverged(f"{name} became {value} at step {step}")

        row = {"step": str(self.step)}
        for name in self.columns:
            if values := [terms[name] for terms in steps if name in terms]:
                row[name] = f"{sum(values) / len(values):.6g}"
        self.bar.set_postfix({k: f"{float(v):.3g}" for k, v in row.items() if k != "step"},
                             refresh=False)
        seconds = time.perf_counter() - self.clock
        row["per_second"] = f"{len(steps) * self.batch_size / seconds:.1f}"
        self.append(row)
        self.show(row)
        self.waiting, self.clock = [], time.perf_counter()

    def show(self, row):
        """Shows a row in TensorBoard, if that was asked for."""
        if self.board:
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(name, float(value), int(row["step"]))

    def append(self, row):
        try:
            if FIRST:
                with open(self.path, "a") as file:
                    file.write(",".join(row.get(name, "") for name in self.names) + "\n")
        except OSError as e:
            raise UserError(f"could not write {self.path} ({e.strerror}); what was saved before is "
                            "kept, make room and continue with --resume") from e


def writable(stream):
    """Whether a progress bar can be shown on a stream."""
    try:
        stream.write("\r")
        stream.flush()
    except (OSError, ValueError, AttributeError):
        return False
    return True


def write_rows(path, names, rows):
    """Writes a log anew: its columns, and rows that read_rows can read."""
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    checkpoint.write_text(path, "\n".join(map(",".join, lines)))


def read_rows(path):
    """The whole rows of a log as dicts of text, in order; damaged rows are left out."""
    rows = []
    if Path(path).is_file():
        with open(path, newline="", errors="replace") as file:
            for row in csv.DictReader(file):
                if is_whole(row) and (not rows or int(row["step"]) > int(rows[-1]["step"])):
                    rows.append(row)
    return rows


def is_whole(row):
    """Whether a row of a log has all its cells, an integer step, and numbers in the others."""
    try:
        return int(row["step"]) > 0 and all(float(x) is not None for x in row.values() if x != "")
    except (KeyError, TypeError, ValueError):
        return False


def curves(rows):
    """Rows of a log -> {name: (steps, values)}, in the order of its columns."""
    names = [name for name in (rows[0] if rows else ()) if name not in ("step", "per_second")]
    pairs = {name: [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
             for name in names}
    return {name: tuple(zip(*points)) for name, points in pairs.items() if points}
