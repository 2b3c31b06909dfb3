"""Settings: one dataclass whose field comments are the documentation and the --help.

A preset a data set holds only what differs from the dataclass. Every field is a flag
(`t_skip` is `--t-skip`); a flag that is given wins over the preset.
"""

import argparse
import difflib
import inspect
import os
import re
import signal
import sys
import typing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import parallel

POINT_SETS = ("8gaussians", "moons", "checkerboard", "spirals")
LATENT_SETS = ("celebahq", "folder")                   # images that an autoencoder encodes first
DATASETS = (*POINT_SETS, "mnist", *LATENT_SETS)
FACTOR = 8                                             # pixels a side of one latent's


@dataclass(frozen=True)
class Config:
    # -- the run
    dataset: Literal[DATASETS] = "checkerboard"  # what to learn; folder: any images of your own
    data_dir: str = "data"          # folder (or .zip) of the images, or where they are downloaded
    download: bool = False          # celebahq: fetch its 3 GB of parquet files into the folder
    out: str = ""                   # folder of the run; empty: runs/<dataset>[-<method>]
    seed: int = 0                   # of weights, data and noise; step i draws from (seed, i) alone
    resume: bool = False            # continue the run in the folder, with the settings saved there
    overwrite: bool = False         # replace a teacher or student of other settings in the folder

    # -- the machine
    device: str = "auto"            # cpu, cuda, cuda:1, mps; auto takes the first GPU there is
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 for images where it is fast
    channels_last: bool = False     # NHWC memory format (images only; measure it on your machine)
    compile: bool = False           # torch.compile the velocity networks (the discriminator never)
    threads: int = 0                # CPU threads; 0: all cores for images, at most 2 for points
    grad_accum: int = 1             # UNet: pieces of a batch, one in memory at a time; same result
    checkpointing: bool = False     # UNet: less memory, activations are computed a second time

    # -- images and their latents
    image_size: int = 256           # centre crop and Lanczos resize to this many pixels a side
    vae: Literal["sd", "taesd", "taef2"] = "sd"  # autoencoder; taesd: sd's latents, far smaller
    vae_weights: tuple[str, ...] = ()  # its file; tiny ones: encoder, decoder; empty: downloaded
    latents_dir: str = "latents"    # folder for the encoded latents, which several runs may share

    # -- networks (an MLP for points, a UNet for images)
    model: Literal["", "paper", "small", "tiny"] = ""  # latents: 153, 15 or 1 M parameters
    preset: Literal["", "paper", "official"] = ""  # latents: the paper's choices, or its code's
    channels: int = 128             # width of the MLP, channels of the UNet's finest level
    mult: tuple[int, ...] = (1, 2)  # UNet: channel multiplier of each level, finest first
    blocks: int = 3                 # hidden layers of the MLP, residual blocks a level of the UNet
    attention: tuple[int, ...] = (1,)  # UNet: levels with attention, 0 is the finest
    heads: int = 4                  # UNet: attention heads
    time_scale: float = 10.0        # t is multiplied by this before its sinusoidal features
    patch_size: int = 1             # UNet: p x p pixels are folded into channels first
    num_classes: int = 0            # classes of a conditional network; 0 means unconditional
    disc_channels: int = 128        # width of the discriminator

    # -- teacher: flow matching (Eq. 1)
    teacher_steps: int = 4000       # iterations of pretraining
    teacher_lr: float = 4e-3        # AdamW learning rate
    teacher_batch_size: int = 512   # samples an iteration
    teacher_ema: float = 0.995      # decay of the weights' average, which is the teacher
    teacher_checkpoint: str = ""    # distil from this teacher.pt, or from LFM's model_480.pth

    # -- student: Algorithm 1
    method: Literal["scflow", "cd", "reflow", "reflow-distill", "fgm"] = "scflow"  # or a baseline
    losses: tuple[Literal["cd", "gan", "rf", "bi"], ...] = ("cd", "gan", "rf", "bi")  # in use
    steps: int = 5000               # iterations of distillation
    batch_size: int = 256           # samples an iteration
    lr: float = 2e-3                # AdamW learning rate of the student
    disc_lr: float = 2e-3           # AdamW learning rate of the discriminator
    betas: tuple[float, ...] = (0.9, 0.999)  # the student's AdamW: memory of gradient and square
    disc_betas: tuple[float, ...] = (0.0, 0.99)  # the discriminator's AdamW, the same two
    lr_final: float = 0.0           # all rates fall along a cosine to this fraction; 1 is constant
    lr_warmup: int = 100            # iterations in which the rates rise from zero
    t_trunc: float = 0.1            # truncation time of CD (Eq. 8); 0, plain CD, without the GAN
    t_skip: float = 0.1             # longest step of the teacher (Algorithm 2)
    truncation: Literal["landing", "current"] = "landing"  # t_trunc is held against t_lo, or t
    metric: Literal["pseudo-huber", "l2"] = "pseudo-huber"  # distance in CD and BI
    huber_c: float = 0.2            # pseudo-Huber's c: quadratic below this difference
    mu: float = 0.9                 # decay of theta~, the average that CD and BI aim at
    ema: float = 0.998              # decay of the average that is sampled from
    l_gan: float = 30.0             # weight of the GAN loss (Eq. 7)
    l_rf: float = 30.0              # weight of the reflow loss (Eq. 9)
    l_bi: float = 0.05              # weight of the bidirectional loss (Eq. 10)
    n_gan: int = 500                # first iteration with the GAN
    n_rf: int = 1000                # first iteration with reflow
    n_bi: int = 0                   # first iteration with the bidirectional loss
    r1: float = 0.1                 # gamma of R1, (gamma / 2) E || grad D(z0) ||^2; 0 leaves it out
    pairs: int = 50_000             # reflow, reflow-distill: how many pairs (z0, z1) are made
    pair_steps: int = 100           # reflow, reflow-distill: Euler steps that make a pair

    # -- what is written, and when
    log_every: int = 50             # iterations a row of log.csv; then losses are checked, too
    save_every: int = 1000          # iterations between two saved resume states
    preview_every: int = 1000       # iterations between two pictures of the EMA's samples


PRESETS = {
    "8gaussians": dict(t_trunc=0.4, l_gan=3.0, l_rf=20.0, n_gan=0),  # narrow modes stay wide
    "mnist": dict(
        channels=32, blocks=1, patch_size=2, time_scale=1000.0, disc_channels=32,
        teacher_steps=2000, teacher_lr=1e-3, teacher_batch_size=128,
        steps=4000, batch_size=16, lr=4e-4, disc_lr=1e-3, huber_c=0.01,
        t_trunc=0.4, l_gan=0.1, l_rf=1.0, l_bi=0.1, n_gan=0, n_rf=400, r1=1.0,
        pairs=5000, pair_steps=50,
        save_every=400, preview_every=800,
    ),
}

# The paper's experiment, CelebA-HQ 256. What the paper leaves open is taken from the official code
# and marked (o); both agree on the rest.
LATENTS = dict(
    batch_size=32, steps=168_750,                      # 200 epochs of 27,000; batch (o)
    lr=1e-5, disc_lr=1e-5, betas=(0.9, 0.999), disc_betas=(0.9, 0.999),  # AdamW (o)
    lr_final=1.0, lr_warmup=0, ema=0.9999,             # constant rates, an EMA to sample from (o)
    t_trunc=0.4, t_skip=0.1, mu=0.9, truncation="current", metric="l2",
    l_gan=0.1, l_rf=0.1, l_bi=0.1, n_gan=0, n_rf=1000, n_bi=1000, r1=1.0,  # R1 (o)
    pair_steps=500,
    teacher_steps=120_500, teacher_lr=2e-5, teacher_batch_size=112, teacher_ema=0.9999,
    save_every=1000, preview_every=5000,
)
PRESETS["celebahq"] = LATENTS | dict(data_dir="data/celebahq")
PRESETS["folder"] = LATENTS | dict(data_dir="")

# the official code where it differs; its warm-ups are `iter > N`
OFFICIAL = dict(metric="pseudo-huber", huber_c=0.01, truncation="landing", lr=2e-5, disc_lr=1e-4,
                n_gan=1, n_rf=1001, n_bi=1001)

# networks for latents, and how fast each may learn where it is not the paper's
MODELS = {
    "paper": dict(channels=256, mult=(1, 2, 2, 2), blocks=2, attention=(3,), heads=4,
                  time_scale=1.0, disc_channels=128),
    "small": dict(channels=80, mult=(1, 2, 2, 2), blocks=2, attention=(2, 3), heads=4,
                  time_scale=1000.0, disc_channels=64,
                  teacher_steps=60_000, teacher_lr=2e-4, teacher_batch_size=64, lr_final=0.0,
                  lr_warmup=500, steps=20_000, lr=5e-5, disc_lr=2e-4),
    "tiny": dict(channels=40, mult=(1, 2), blocks=1, attention=(1,), heads=4, patch_size=2,
                 time_scale=1000.0, disc_channels=32,
                 teacher_steps=3000, teacher_lr=1e-3, teacher_batch_size=64, teacher_ema=0.998,
                 lr_final=0.0, lr_warmup=100, steps=1200, batch_size=32, lr=4e-4, disc_lr=5e-4,
                 disc_betas=(0.0, 0.99), ema=0.995, metric="pseudo-huber", huber_c=0.01,
                 truncation="landing",
                 l_gan=0.02, l_rf=1.0, n_rf=200, n_bi=0, save_every=200, preview_every=400),
}

# a teacher made with the same values of these is the same teacher
TEACHER_FIELDS = (
    "dataset", "image_size", "vae", "seed", "channels", "mult", "blocks", "attention", "heads",
    "time_scale", "patch_size", "num_classes", "teacher_steps", "teacher_lr", "teacher_batch_size",
    "teacher_ema", "lr_final", "lr_warmup",
)
ARCHITECTURE = ("channels", "mult", "blocks", "attention", "heads", "time_scale", "patch_size",
                "num_classes")
# the machine's part, which sampling and evaluation have, too
MACHINE = ("device", "precision", "channels_last", "threads")
# these say where and how a run happens, not what comes out of it
CIRCUMSTANCES = (*MACHINE, "data_dir", "download", "out", "resume", "overwrite", "compile",
                 "grad_accum", "checkpointing", "vae_weights", "latents_dir", "model", "preset",
                 "teacher_checkpoint", "log_every", "save_every", "preview_every")


def teacher_fields(cfg):
    """TEACHER_FIELDS, and for images of the user's own also where they lie."""
    return TEACHER_FIELDS + (("data_dir",) if cfg.dataset in LATENT_SETS else ())


ABOUT_CELEBAHQ = (
    "celebahq: pretraining the paper's teacher takes 120,500 iterations of batch 112 through 153 M "
    "parameters, days on a large GPU. It is published by LFM as model_480.pth (Google Drive id "
    "1AIuMr5Ewti6_wQAJdM9elsrERwrxI9Sb, which the package gdown fetches); --teacher-checkpoint "
    "model_480.pth distils from it at once. The students of --model small and tiny need a teacher "
    "of their own size, which train.py pretrains.")


class UserError(Exception):
    """Something the user can mend: one sentence, printed without a traceback, exit code 2."""


def make_config(dataset=Config.dataset, **given):
    """Settings of a data set: the defaults, its preset, its model, then what is given; checked.

    Without the GAN there is no truncation either (the paper's ladder), unless t_trunc is given.
    Raises UserError for a value that makes no sense.
    """
    settings = {"dataset": dataset, **PRESETS.get(dataset, {})}
    if dataset in LATENT_SETS:
        settings |= dict(model=given.get("model") or "paper", preset=given.get("preset") or "paper")
        settings |= MODELS[settings["model"]]
        settings |= OFFICIAL if settings["preset"] == "official" else {}
    elif given.get("model") or given.get("preset"):
        raise UserError(f"--model and --preset are for {' and '.join(LATENT_SETS)}; {dataset} has "
                        "one preset of its own")
    cfg = Config(**{**settings, **{k: v for k, v in given.items() if k not in ("model", "preset")}})
    if cfg.method != "scflow":
        if "losses" in given and (cfg.method, cfg.losses) != ("cd", ("cd",)):
            raise UserError(f"--losses chooses among SCFlow's; --method {cfg.method} has its own")
        cfg = replace(cfg, losses=("cd",))
        if cfg.method == "cd" and given.get("t_trunc"):
            raise UserError("--method cd is plain consistency distillation, not truncated; "
                            "--losses cd with --t-trunc truncates it")
    if "gan" not in cfg.losses and "t_trunc" not in given:
        cfg = replace(cfg, t_trunc=0.0)
    if dataset in LATENT_SETS:                         # a checkpoint finds these from anywhere
        where = str(Path(cfg.data_dir).resolve()) if cfg.data_dir else ""
        files = tuple(str(Path(f).resolve()) for f in cfg.vae_weights)
        cfg = replace(cfg, data_dir=where, vae_weights=files)
    check(cfg)
    return cfg


def check(cfg):
    """Raises UserError where a value is out of its range; the sentence names the flag."""
    at_least_one = ("channels", "blocks", "heads", "patch_size", "disc_channels", "teacher_steps",
                    "teacher_batch_size", "steps", "batch_size", "grad_accum", "image_size",
                    "log_every", "save_every", "preview_every", "pairs", "pair_steps")
    not_negative = ("seed", "threads", "num_classes", "l_gan", "l_rf", "l_bi", "n_gan", "n_rf",
                    "n_bi", "r1", "lr_warmup")
    fractions = ("t_trunc", "t_skip", "mu", "ema", "teacher_ema", "lr_final")
    positive = ("teacher_lr", "lr", "disc_lr", "time_scale", "t_skip", "huber_c")
    rules = [(at_least_one, lambda x: x >= 1, "at least 1"),
             (not_negative, lambda x: x >= 0, "not negative"),
             (("seed",), lambda x: x < 2**63, "below 2^63"),
             (fractions, lambda x: 0 <= x <= 1, "between 0 and 1"),
             (positive, lambda x: x > 0, "larger than 0")]
    for names, fits, wanted in rules:
        for name in names:
            if not fits(getattr(cfg, name)):
                raise UserError(f"{flag(name)} {getattr(cfg, name)} makes no sense; "
                                f"it must be {wanted}")
    for name in ("betas", "disc_betas"):
        if len(getattr(cfg, name)) != 2 or not all(0 <= b < 1 for b in getattr(cfg, name)):
            raise UserError(f"{flag(name)} takes two numbers from 0 to below 1, as 0.9 0.999")
    if cfg.image_size % FACTOR:
        raise UserError(f"--image-size {cfg.image_size} does not divide by {FACTOR}, which the "
                        "autoencoders need")
    if cfg.method == "reflow-distill" and cfg.steps < 2:
        raise UserError("--method reflow-distill has two stages, so --steps must be at least 2")
    if "cd" not in cfg.losses:
        raise UserError("--losses must contain cd; the others correct it and do not stand alone")


def flag(name):
    return "--" + name.replace("_", "-")


def run_dir(cfg):
    """Folder of the run: --out exactly, or runs/<dataset>, runs/<dataset>-<method> of baselines."""
    name = cfg.dataset if cfg.method == "scflow" else f"{cfg.dataset}-{cfg.method}"
    return Path(cfg.out or Path("runs") / name)


# --------------------------------------------------------------------------------- command line


def field_comments():
    """The comment behind each field and the sections, read from the dataclass's own source."""
    comments, sections, section = {}, {}, None
    for line in inspect.getsource(Config).splitlines():
        if title := re.match(r"    # -- (.+)", line):
            section = title[1]
        elif field := re.match(r"    (\w+): .*?  # (.+)", line):
            comments[field[1]], sections[field[1]] = field[2], section
    return comments, sections


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence, with the nearest flag where one was mistyped."""

    def error(self, message):
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            known = [o for action in self._actions for o in action.option_strings]
            near = difflib.get_close_matches(unknown[1], known, n=1)
            message = f"there is no flag {unknown[1]}"
            message += f"; did you mean {near[0]}?" if near else ";"
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists the flags)\n")


def words(value):
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def add_field_flags(parser, names=None):
    """One flag a field of Config, absent from the result where it was not given."""
    comments, sections = field_comments()
    hints, groups = typing.get_type_hints(Config), {}
    presets = {"mnist": PRESETS["mnist"], "latents": LATENTS | MODELS["paper"]}
    for f in fields(Config):
        if names is not None and f.name not in names:
            continue
        section = sections[f.name]
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        kind, many = hints[f.name], {}
        if typing.get_origin(kind) is tuple:
            kind, many = typing.get_args(kind)[0], {"nargs": "*" if f.name != "losses" else "+"}
        if typing.get_origin(kind) is Literal:
            many["choices"], kind = typing.get_args(kind), str
        others = "".join(f"; {d}: {words(v[f.name])}" for d, v in presets.items()
                         if v.get(f.name, f.default) != f.default)
        default = words(f.default)
        shown = f" [{default}{others}]" if default not in ("", "False") or others else ""
        text = (comments[f.name] + shown).replace("%", "%%")
        if kind is bool:
            groups[section].add_argument(flag(f.name), action="store_true",
                                         default=argparse.SUPPRESS, help=text)
        else:
            metavar = None if "choices" in many else kind.__name__.upper()
            groups[section].add_argument(flag(f.name), type=kind, default=argparse.SUPPRESS,
                                         metavar=metavar, help=text, **many)


def parse_config(description, argv=None):
    """Command line -> (Config, the fields that were given on it)."""
    parser = Parser(description=description, epilog=ABOUT_CELEBAHQ, usage="%(prog)s [flags]",
                    allow_abbrev=False)
    add_field_flags(parser)
    given = vars(parser.parse_args(argv))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return make_config(**given), given


def run_script(main):
    """Runs a script's main(): a UserError is one sentence and exit code 2, Ctrl-C code 130."""
    script = Path(sys.argv[0]).name
    try:
        result = main()
        parallel.leave()
        sys.exit(result)
    except UserError as e:
        sys.exit(fail(script, e))
    except KeyboardInterrupt as e:                 # training's own says how to go on
        fail("\n" + script, str(e) or "interrupted")
        sys.exit(130)
    except (MemoryError, RuntimeError) as e:       # PyTorch's own is a RuntimeError
        if not isinstance(e, MemoryError) and "memory" not in str(e):
            raise
        sys.exit(fail(script, "the memory did not suffice; choose a smaller --batch-size or network"
                      ", or --grad-accum and --checkpointing where there is a UNet"))
    except BrokenPipeError:                        # the reader of our output left (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def fail(script, error):
    if parallel.FIRST:                             # of several processes, one tells it
        print(f"{script}: {error}", file=sys.stderr)
    return 2
