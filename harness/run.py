"""A run: its folder, its teacher, what it may overwrite, how it resumes, its log and pictures.

    teacher.pt, student.pt                results: the averages that are sampled from
    teacher_resume.pt, student_resume.pt  states to continue from
    ..._resume_old.pt                     the state before that, until the run is finished
    teacher_010000.pt, student_010000.pt  averages of that iteration (--keep-every)
    teacher_log.csv, log.csv              the logged terms, one row per cfg.log_every iterations
    quality.csv                           distances of the student's samples (--eval-every)
    samples.png, losses.png, preview_*    pictures

When train.py refuses to start, the reason is in this file.
"""

import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import get_total_norm
from tqdm import tqdm

import data
import sample
from config import (CAPTION_SETS, CIRCUMSTANCES, LATENT_SETS, MACHINE, identity, run_dir,
                    with_pipeline)
from harness import UserError, checkpoint, machine, pictures
from harness.hub import package
from harness.log import Diverged, Interrupt, Log, curves, read_rows, write_rows
from harness.machine import FIRST
from harness.saved import conditions_of, open_network
from model import check_network, copy_of, velocity_network

ANEW = "--overwrite starts anew, another --out keeps both"


class Interrupted(KeyboardInterrupt):
    """A run stopped by Ctrl-C, its state saved; the message says how to continue."""

    def __init__(self, run, step, steps):
        again = "--resume instead of --overwrite" if run.cfg.overwrite else "and --resume"
        advice = (f"continue with the same command {again} "
                  f"(--dataset {run.cfg.dataset} --out {run.folder} --resume)")
        if run.go_on or run.home != run.folder:    # a cell of a table, or a stage of a run
            advice = "the same command continues" + ", without --overwrite" * run.cfg.overwrite
        super().__init__(f"stopped at step {step} of {steps} and saved; {advice}")


@contextmanager
def unimportant():
    """A picture that cannot be drawn does not stop training."""
    try:
        yield
    except UserError as e:
        tqdm.write(f"{e}; training goes on")


class Run:
    """The folder of one run, and everything about the run except the training.

    Used as `with Run(cfg, given) as run`, which locks the folder. `given` names the settings that
    were given on the command line. With `go_on`, an unfinished run of the same settings continues
    without --resume; study.ablation needs this. Raises UserError if the settings contradict what
    is saved in the folder.
    """

    def __init__(self, cfg, given=(), go_on=False):
        self.folder = self.home = run_dir(cfg)
        self.go_on, self.discarded = go_on, False
        if go_on:
            cfg = self.continued(data.with_classes(cfg))
        elif cfg.resume:
            cfg = self.resumed(cfg, given)
        elif cfg.teacher_checkpoint:
            other = checkpoint.load(cfg.teacher_checkpoint, "teacher", mmap=True)
            saved = checkpoint.config_of(other)
            cfg = checkpoint.same_architecture(cfg, given, saved, cfg.teacher_checkpoint)
            if cfg.dataset == saved.dataset == "captioned":
                # a teacher.pt stands for the pipeline that it came from
                cfg = replace(cfg, teacher_checkpoint=saved.teacher_checkpoint)
        elif cfg.dataset == "captioned":
            raise UserError("--dataset captioned needs --teacher-checkpoint, a pipeline of Stable "
                            "Diffusion: a folder in diffusers' layout, or an id on the Hugging "
                            "Face hub, as XCLiu/2_rectified_flow_from_sd_1_5")
        if cfg.adam8bit:
            package("bitsandbytes")                # if it is absent, now and not after the encoding
        if cfg.log:
            package(cfg.log)
        self.cfg = cfg = data.with_classes(cfg)
        self.shape = data.sample_shape(cfg)
        check_network(cfg, self.shape)             # before anything is encoded or trained
        self.device = machine.choose_device(cfg)
        machine.start(self.device)

    def __enter__(self):
        self.stack, self.begun = ExitStack(), time.perf_counter()
        if FIRST:
            try:
                self.stack.enter_context(checkpoint.locked(
                    self.folder / ".lock", f"is training in {self.folder}"))
                for file in self.folder.glob("*.pt.*.part"):   # what a kill left
                    file.unlink()
            except OSError as e:
                raise UserError(f"cannot write to the folder {self.folder} ({e.strerror}); "
                                "choose another with --out") from e
        return self

    def __exit__(self, *exception):
        self.stack.close()

    def path(self, kind):
        """The path of teacher.pt or student.pt."""
        return self.folder / f"{kind}.pt"

    def resume_files(self, kind):
        """The paths of the last two states of a teacher or student, the newest first."""
        return self.folder / f"{kind}_resume.pt", self.folder / f"{kind}_resume_old.pt"

    def resume_file(self, kind):
        """The path of the state to continue from: the older one if no newer one is readable."""
        newest, older = self.resume_files(kind)
        if older.exists():
            try:
                checkpoint.load(newest, mmap=True)
            except UserError:
                return older
        return newest

    def logfile(self, kind):
        return self.folder / ("log.csv" if kind == "student" else "teacher_log.csv")

    def stage(self, name, **changes):
        """A run inside this one, in a folder of its own, that starts from this run's teacher."""
        pipeline = self.cfg.teacher_checkpoint if self.cfg.dataset == "captioned" else ""
        cfg = replace(self.cfg, out=str(self.folder / name), resume=False,
                      teacher_checkpoint=pipeline or str(self.path("teacher")), **changes)
        stage = Run(cfg, go_on=not cfg.overwrite)
        stage.home = self.folder                   # to continue, this run is started again
        return stage

    @cached_property
    def dataset(self):
        return data.load(self.cfg, self.device)

    @cached_property
    def data_key(self):
        return data.key(self.cfg)

    @cached_property
    def judge(self):
        """The Reference and the arguments of evaluate.measure, by the defaults of evaluate.py."""
        import evaluate                            # not above: it is seldom needed
        machine.wait()                             # so that no process finds what another makes now
        reference, settings, _ = evaluate.prepare(self.cfg, self.shape, self.device)
        return reference, settings | {"decode": self.dataset.decode}

    def open(self):
        """Opens data and judge, which may fail: before anything is replaced or trained."""
        self.dataset
        if self.cfg.eval_every:
            self.judge

    # ------------------------------------------------------------------ which settings are in force

    def resumed(self, cfg, given):
        """The saved settings of the run that --resume continues.

        Flags about the machine, the folders or the length may change; any other that differs is a
        UserError. captioned: --teacher-checkpoint may name the new place of the pipeline.
        """
        if cfg.overwrite:
            raise UserError("--resume continues a run and --overwrite starts anew; leave one out")
        kinds = [kind for kind in ("student", "teacher") if self.resume_file(kind).exists()]
        if not kinds:
            raise UserError(f"there is nothing to resume in {self.folder}; leave --resume out to "
                            "start")
        file = self.resume_file(kinds[0])
        saved = checkpoint.config_of(checkpoint.load(file, f"{kinds[0]} resume", mmap=True))
        moved = saved.dataset == "captioned" and checkpoint.is_pipeline(cfg.teacher_checkpoint)
        if "teacher_checkpoint" in given and kinds[0] == "student" and not moved:
            raise UserError(f"{file} continues with the teacher that it started from; leave "
                            "--teacher-checkpoint out")
        free = [*CIRCUMSTANCES]
        if kinds[0] == "teacher":
            free.append("teacher_steps")
        if saved.method != "reflow-distill":       # its steps are divided between two stages
            free.append("steps")
        if clash := checkpoint.differences(cfg, saved, [n for n in given if n not in free]):
            raise UserError(f"--resume continues with the settings saved in {file}; these differ: "
                            f"{clash}; leave them out, or start anew with --overwrite or another "
                            "--out")
        changed = {name: getattr(cfg, name) for name in given if name in free}
        cfg = replace(saved, **{"overwrite": False, "out": cfg.out, **changed})
        return with_pipeline(cfg) if cfg.dataset == "captioned" else cfg

    def continued(self, cfg):
        """cfg, with resume set if the folder holds a state of this run but no result."""
        for kind in ("student", "teacher"):
            files = [p for p in (self.path(kind), self.resume_file(kind)) if p.exists()]
            if files:
                saved = checkpoint.config_of(checkpoint.load(files[0], mmap=True))
                if clash := checkpoint.differences(cfg, saved, identity(cfg, kind)):
                    raise UserError(f"{files[0]} was made with other settings: {clash}; remove its "
                                    "folder to train it anew, or give the same flags")
                return replace(cfg, resume=files == [self.resume_file(kind)])
        return cfg

    # -------------------------------------------------------------------- what may be overwritten

    def finished(self):
        """Whether this run is finished: student.pt has the same settings and data.

        Raises UserError if the folder holds another run's student, or an unfinished one.
        """
        student, state, cfg = self.path("student"), self.resume_file("student"), self.cfg
        if cfg.overwrite:
            return False
        if cfg.resume and state.exists():
            step = checkpoint.load(state, "student resume", mmap=True)["step"]
            if step > cfg.steps:
                raise UserError(f"{state} is at step {step} already; choose --steps {step} or more")
            return student.exists() and step == cfg.steps == checkpoint.load(
                student, "student", mmap=True)["step"]
        if not student.exists():
            if state.exists():
                step = checkpoint.load(state, "student resume", mmap=True)["step"]
                raise UserError(f"{self.folder} holds an unfinished student at step {step}; "
                                f"--resume continues it, {ANEW}")
            return False
        if cfg.resume:
            raise UserError(f"{student} is finished, and there is no {state.name} to continue "
                            f"from; {ANEW}")
        if clash := self.clash(student, "student"):
            raise UserError(f"{student} was trained with other {clash}; {ANEW}")
        return True

    def discard_older(self, *results):
        """With --overwrite, removes an older student (and results): --resume would mix the runs.

        This happens only when all has been checked and the training begins.
        """
        self.open()
        if FIRST and self.cfg.overwrite and not self.discarded:
            self.discarded = True
            for file in (*results, self.path("student"), *self.resume_files("student"),
                         *self.resume_files("teacher"), self.logfile("student"),
                         *self.folder.glob("student_[0-9]*.pt"),
                         *self.folder.glob("teacher_[0-9]*.pt"),
                         *self.folder.glob("pairs-*.npy")):
                file.unlink(missing_ok=True)

    def clash(self, path, kind):
        """What differs between this run and a checkpoint: settings or data, in words; or ""."""
        content = checkpoint.load(path, kind, mmap=True)
        names = identity(self.cfg, kind)
        if differing := checkpoint.differences(self.cfg, checkpoint.config_of(content), names):
            return f"settings: {differing}"
        if content.get("data", self.data_key) != self.data_key:
            return f"data: {content['data']} (these are {self.data_key})"
        return ""

    # ---------------------------------------------------------------------------- which teacher

    def find_teacher(self):
        """The path of the teacher that this run starts from, or None if it must be trained.

        It is the one of --teacher-checkpoint, or else one of the same settings and data in the
        run's folder or in runs/<dataset>. Raises UserError if another teacher is in the folder.
        """
        own, cfg = self.path("teacher"), self.cfg
        if cfg.resume and own.exists() and self.resume_file("student").exists():
            return own                             # the student has started from this one
        if cfg.teacher_checkpoint:
            return Path(cfg.teacher_checkpoint)
        for path in dict.fromkeys([own, Path("runs") / cfg.dataset / "teacher.pt"]):
            if not path.exists():
                continue
            try:
                clash = self.clash(path, "teacher")
            except UserError:
                if path == own and not cfg.overwrite:
                    raise
                continue                           # a damaged file that this run does not need
            if not clash:
                return path
            if path == own and not cfg.overwrite:
                raise UserError(f"{own} was trained with other {clash}; distil from it by "
                                f"--teacher-checkpoint {own}, replace it by --overwrite, or "
                                "choose another --out")
        unfinished = self.resume_file("teacher").exists() and not own.exists()
        if unfinished and not (cfg.resume or cfg.overwrite):
            raise UserError(f"{self.folder} holds an unfinished teacher; --resume continues it, "
                            f"{ANEW}")
        return None

    def adopted(self, path):
        """The path of the run's own copy of a teacher.pt: the folder can be moved or shared.

        Raises UserError if the teacher does not fit the run.
        """
        own, cfg = self.path("teacher"), self.cfg
        saved = checkpoint.config_of(checkpoint.load(path, "teacher", mmap=True))
        if cfg.guidance != 1 and saved.p_null == 0:
            raise UserError(f"{path} never saw the null condition (--p-null 0), so it cannot be "
                            "guided; leave --guidance out, or name another teacher")
        if own.exists() and own.resolve() == path.resolve():
            return own
        content = checkpoint.load(path, "teacher")
        alike = saved.dataset == cfg.dataset or {saved.dataset, cfg.dataset} <= set(LATENT_SETS)
        if tuple(content["shape"]) != self.shape or not alike:
            raise UserError(f"{path} was trained on {saved.dataset}, samples of shape "
                            f"{tuple(content['shape'])}, and does not fit {cfg.dataset}; "
                            "name a teacher of this data set")
        checkpoint.load_weights(velocity_network(cfg, self.shape), content["ema"], path)
        if own.exists() and not cfg.overwrite:
            older = checkpoint.config_of(checkpoint.load(own, "teacher", mmap=True))
            if checkpoint.differences(older, saved, identity(cfg, "teacher")):
                raise UserError(f"{own} is another teacher than {path}; --overwrite replaces it, "
                                "another --out keeps both")
        if cfg.overwrite:
            self.discard_older()
        more = {name: content[name] for name in ("data", "seconds") if name in content}
        checkpoint.save(own, "teacher", saved, content["shape"], content["step"],
                        ema=content["ema"], **more)
        return own

    # --------------------------------------------------------------------------------- training

    @contextmanager
    def loop(self, kind, states, columns, first=0):
        """The iterations of a teacher or student: `with run.loop(...) as steps: for step in steps`.

        states holds the networks and optimisers by name ("ema" is shown in previews), columns the
        logged terms; the loop calls `run.log(**terms)` in each iteration. Restores the states if
        the run resumes, saves them now and every cfg.save_every iterations, draws previews, and
        stops after the iteration in which Ctrl-C was pressed. `first` is the first iteration.
        """
        cfg = self.cfg
        steps = cfg.steps if kind == "student" else cfg.teacher_steps
        size = cfg.batch_size if kind == "student" else cfg.teacher_batch_size
        states = {name: machine.unwrap(part) for name, part in states.items()}
        eval_every = cfg.eval_every if kind == "student" else 0
        self.open()
        start, seconds = self.restored(kind, states)
        start, self.begun = max(start, first), self.begun - seconds
        if start > steps:
            raise UserError(f"{self.resume_file(kind)} is at step {start} already; choose "
                            f"{start} steps or more")

        with Interrupt() as interrupt, Log(self.logfile(kind), columns, cfg.log_every, start,
                                           steps, size, kind, bool(cfg.log)) as log:
            self.log = log.add

            def iterations():
                for done in range(start + 1, steps + 1):
                    yield done - 1
                    stop, keep = interrupt.now(), cfg.keep_every and done % cfg.keep_every == 0
                    if done % cfg.save_every == 0 or done == steps or stop or keep:
                        log.fetch()                # so a loss that is not finite is never saved
                        self.save(kind, states, done, self.resume_files(kind)[1])
                    if keep:
                        kept = self.folder / f"{kind}_{done:06d}.pt"
                        self.save_ema(kept, kind, states["ema"], done)
                    if stop and done < steps:
                        raise Interrupted(self, done, steps)
                    if FIRST and done % cfg.preview_every == 0:
                        self.preview(kind, states["ema"], done)
                    if eval_every and done % eval_every == 0:
                        log.show(self.measure(states["ema"], done))

            self.save(kind, states, start)
            yield iterations()

    def restored(self, kind, states):
        """(step, seconds so far) of a run that resumes, its states restored; else (0, 0.0)."""
        files = [path for path in self.resume_files(kind) if path.exists()]
        if not (self.cfg.resume and files):
            if kind == "teacher":
                self.discard_older(self.path("teacher"))
            if FIRST:
                self.logfile(kind).unlink(missing_ok=True)   # of an older run
                if kind == "student":
                    (self.folder / "quality.csv").unlink(missing_ok=True)
            return 0, 0.0
        newest = self.resume_files(kind)[0]
        for path in files:
            try:                                   # mapped: all processes share the host's memory
                content = checkpoint.load(path, f"{kind} resume", mmap=True, checksums=True)
                break
            except UserError:
                if path == files[-1]:
                    raise
        if content.get("data", self.dataset.key) != self.dataset.key:
            raise UserError(f"{path} was trained on other data: {content['data']} (these are "
                            f"{self.dataset.key}); name the same data, or another --out")
        for name, part in states.items():
            checkpoint.load_state(part, content[name], path)
        machine.wait()                             # all have read it before one of them writes
        if FIRST and path != newest:
            print(f"{newest} is missing or damaged; continuing from {path}, of step "
                  f"{content['step']}")
            path.replace(newest)
        return content["step"], content.get("seconds", 0.0)

    @torch.no_grad()
    def save(self, kind, states, step, older=None):
        """Saves a state to continue from; the one before moves to `older`, if that is named.

        Raises Diverged if a network has a weight that is not finite.
        """
        for name, part in states.items():
            if isinstance(part, nn.Module) and not get_total_norm(part.parameters()).isfinite():
                raise Diverged(f"the weights of net.{name} are no longer finite at step {step}")
        checkpoint.save(self.resume_files(kind)[0], f"{kind} resume", self.cfg, self.shape, step,
                        older, data=self.dataset.key, seconds=time.perf_counter() - self.begun,
                        **{name: part.state_dict() for name, part in states.items()})

    def save_ema(self, path, kind, ema, step):
        checkpoint.save(path, kind, self.cfg, self.shape, step, ema=ema.state_dict(),
                        data=self.dataset.key, seconds=time.perf_counter() - self.begun)

    def on_device(self, ema):
        """The EMA, or a copy of it on the run's device if it is kept elsewhere (--ema-on-cpu)."""
        there = next(ema.parameters()).device.type == self.device.type
        return ema if there else copy_of(ema).to(self.device)

    def preview(self, kind, ema, step):
        """Draws samples of the EMA, and the loss curves so far."""
        name, nfes = (("", self.cfg.student_nfes(1, 4)) if kind == "student" else
                      ("teacher_", (4, 16)))
        with unimportant():
            sample.strips(self.folder / f"{name}preview_{step:06d}.png",
                          [(kind, self.on_device(ema), None)], self.shape, nfes,
                          device=self.device, decode=self.dataset.decode,
                          title=f"the {kind}'s EMA after {step} iterations",
                          conditions=conditions_of(self.cfg))
            self.draw_losses(kind)

    def measure(self, ema, step):
        """Measures the EMA as evaluate.py does, at 1 and 4 NFE; returns the row of quality.csv."""
        import evaluate
        (reference, settings), file = self.judge, self.folder / "quality.csv"
        measured = evaluate.measure("student", self.on_device(ema), self.cfg.student_nfes(1, 4),
                                    reference, **settings)
        row = {"step": str(step)} | {f"distance at {m['nfe']} NFE": f"{m['distance']:.6g}"
                                     for m in measured}
        if FIRST:
            tqdm.write(f"{reference.name}: " + ", ".join(f"{k} {v}" for k, v in row.items()))
            with unimportant():
                rows = [r for r in read_rows(file) if int(r["step"]) < step] + [row]
                write_rows(file, row, rows)
                pictures.losses(file.with_suffix(".png"), curves(rows), reference.name)
        return row

    def finish(self, kind, ema):
        """Writes teacher.pt or student.pt and the pictures; returns its path."""
        steps = self.cfg.steps if kind == "student" else self.cfg.teacher_steps
        for picture in self.picture_paths(kind):   # or a kill would leave a shorter run's pictures
            if FIRST and picture.is_file():
                picture.unlink()
        if FIRST and self.cfg.dataset == "captioned":
            ema.save(self.folder)                  # for every tool that reads diffusers' layout
        self.save_ema(self.path(kind), kind, ema, steps)
        if FIRST:
            self.resume_files(kind)[1].unlink(missing_ok=True)
        with unimportant():
            self.pictures(kind)
        self.begun = time.perf_counter()           # of the student, after its teacher
        return self.path(kind)

    def picture_paths(self, kind):
        if kind == "student":
            return self.folder / "losses.png", self.folder / "samples.png"
        return (self.folder / "teacher_losses.png",)

    def draw_losses(self, kind):
        title = self.cfg.method if kind == "student" else "teacher"
        pictures.losses(self.picture_paths(kind)[0], curves(read_rows(self.logfile(kind))),
                        f"{title} on {self.cfg.dataset}")

    def pictures(self, kind):
        """Draws the loss curves, and the samples of a student, if they are missing."""
        losses, *samples = self.picture_paths(kind)
        if FIRST and not losses.is_file():
            self.draw_losses(kind)
        if samples and not samples[0].is_file():
            self.strips(samples[0], self.dataset)
        return [path for path in (*samples, losses) if path.is_file()]

    def strips(self, path, dataset):
        """Teacher, student and data over NFE (Figure 5)."""
        if not FIRST:
            return
        points = len(self.shape) == 1
        few = self.cfg.student_nfes(1, 2, 4, 8, *[16] * points)
        many = (1, 2, 4, 8, 16 if points else 50)
        moved = ["teacher_checkpoint"] * (self.cfg.dataset == "captioned")     # the pipeline
        settings = {name: getattr(self.cfg, name) for name in (*MACHINE, *moved)}
        networks = [(kind, open_network(self.path(kind), **settings)[0], nfes)
                    for kind, nfes in (("teacher", many), ("student", few))]
        shown = min(4000 if points else 10, dataset.size or 4000)
        draws = data.Draws(self.cfg.seed, stream=1, device=self.device, rank=0, world=1)
        if self.cfg.dataset in CAPTION_SETS and self.cfg.condition == "text":
            phi, theta = (network for _, network, _ in networks)
            guided = ("teacher\nw = 3\n100 NFE", sample.Guided(phi, 3.0), 50, 0)
            columns = [("teacher\nw = 1\n50 NFE", phi, 50, 0), *[guided] * (self.cfg.p_null > 0),
                       *((f"student\n\n{k} NFE", theta, k, 0)
                         for k in self.cfg.student_nfes(1, 2, 4))]
            sample.by_prompt(path, self.cfg, columns, self.shape, device=self.device)
            return
        w = self.cfg.guidance
        title = f"the student learnt the guided path, w = {w:g}; the teacher has w = 1"
        sample.strips(path, networks, self.shape, many, device=self.device, decode=dataset.decode,
                      title=title if w != 1 else None,
                      data=dataset.batch(shown, draws)[0].cpu(),
                      conditions=conditions_of(self.cfg))
