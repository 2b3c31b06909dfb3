"""Settings: one dataclass. The comment behind each field is its documentation and its --help.

Each data set has a preset, which lists only the values that differ from the defaults below. Every
field but num_classes is a flag (`t_skip` is `--t-skip`). A flag that is given wins over the preset.
"""

import inspect
import math
import re
import typing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from harness import UserError

POINT_SETS = ("8gaussians", "moons", "checkerboard", "spirals")
UNCAPTIONED_SETS = ("celebahq", "folder")
LATENT_SETS = (*UNCAPTIONED_SETS, "captioned")         # images that an autoencoder encodes first
CAPTION_SETS = ("captions", "captions-digits")         # text to image, drawn on the fly
DATASETS = (*POINT_SETS, "mnist", "cifar10", *CAPTION_SETS, *LATENT_SETS)
LATENT_DOWNSAMPLING = 8                                # 8 x 8 pixels become one latent position
LATENT_CHANNELS = {"sd": 4, "taesd": 4, "taef2": 32}
LOSSES = ("cd", "gan", "rf", "bi")
METHODS = ("scflow", "cd", "flowmap", "reflow", "reflow-distill", "fgm")
CLASSES = {"8gaussians": 8, "mnist": 10, "cifar10": 10}   # a folder's classes are its sub-folders


@dataclass(frozen=True)
class Config:
    # -- what is learnt
    dataset: Literal[DATASETS] = "checkerboard"  # folder, captioned: your own images
    seed: int = 0                   # seed of weights, data and noise
    image_size: int = 256           # centre crop, then resize to this many pixels per side
    vae: Literal["sd", "taesd", "taef2", "pipeline"] = "sd"  # autoencoder; captioned: pipeline

    # -- where it comes from and goes to
    data_dir: str = "data"          # folder (or .zip) of the images, or where they are downloaded
    download: bool = False          # celebahq: download its 3 GB into the folder (needs datasets)
    out: str = ""                   # folder of the run; empty: runs/<dataset>[-<method>]
    resume: bool = False            # continue the run in the folder, with the settings saved there
    overwrite: bool = False         # replace what another run left in the folder
    teacher_checkpoint: str = ""    # a teacher.pt, LFM's model_480.pth; captioned: a pipeline
    vae_weights: tuple[str, ...] = ()  # the autoencoder's file (two if tiny); empty: download
    latents_dir: str = "latents"    # folder of the encoded latents; several runs may share it

    # -- presets for latents
    model: Literal["", "paper", "small", "tiny"] = ""  # 153, 15 or 1 M parameters; cifar10: 57, 7
    preset: Literal["", "paper", "official"] = ""  # the paper's text, untried; else its code

    # -- the machine
    device: str = "auto"            # cpu, cuda, cuda:1, mps; auto takes the first GPU, if any
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16 if fast; student of paper: fp32/TF32
    channels_last: bool = False     # NHWC memory format (images only; measure it on your machine)
    compile: bool = False           # torch.compile the velocity networks (the discriminator never)
    threads: int = 0                # CPU threads; 0: $OMP_NUM_THREADS, or 1 for points, else all
    grad_accum: int = 1             # parts per batch: less memory, slower, the same up to rounding
    checkpointing: bool = False     # UNet: recompute activations in backward: less memory, slower
    ema_on_cpu: bool = False        # keep the average that draws samples in CPU memory

    # -- networks: an MLP for points, a UNet for images
    channels: int = 128             # width of the MLP, channels of the UNet's finest level
    mult: tuple[int, ...] = (1, 2)  # UNet: channel multiplier of each level, finest first
    blocks: int = 3                 # hidden layers of the MLP; residual blocks per UNet level
    attention: tuple[int, ...] = (1,)  # UNet: levels with attention, 0 is the finest
    heads: int = 4                  # UNet: attention heads
    time_scale: float = 10.0        # t is multiplied by this before its sinusoidal features
    patch_size: int = 1             # UNet: p x p pixels are folded into channels first
    condition: Literal["none", "class", "text"] = "none"  # y: nothing, a label, a caption
    num_classes: int = 0            # classes, or words of captions; follows from the data

    # -- teacher: flow matching (Eq. 1)
    teacher_steps: int = 4000       # iterations of pretraining
    teacher_lr: float = 4e-3        # AdamW learning rate
    teacher_batch_size: int = 512   # samples per iteration
    teacher_ema: float = 0.995      # decay of the weights' average, which is the teacher
    p_null: float = 0.1             # share of conditions replaced by the null condition (for Eq. 3)
    teacher_lr_final: float = 0.0   # the rate falls along a cosine to this fraction of itself
    lr_warmup: int = 100            # iterations in which all rates rise from zero

    # -- student: Algorithm 1
    method: Literal[METHODS] = "scflow"  # what is trained: SCFlow, or a baseline
    losses: tuple[Literal[LOSSES], ...] = LOSSES  # the terms of the loss that are used
    steps: int = 5000               # iterations of distillation
    batch_size: int = 256           # samples per iteration
    lr: float = 2e-3                # AdamW learning rate of the student
    disc_lr: float = 2e-3           # AdamW learning rate of the discriminator
    lr_final: float = 0.0           # both rates fall along a cosine to this fraction; 1: constant
    betas: tuple[float, ...] = (0.9, 0.999)  # AdamW's two betas for the student
    disc_betas: tuple[float, ...] = (0.0, 0.99)  # AdamW's two betas for the discriminator
    disc_channels: int = 128        # width of the discriminator
    disc_trunk: Literal["trained", "frozen"] = "trained"  # captioned: the UNet's encoder in D
    adam8bit: bool = False          # AdamW with moments of 8 bits, for a GPU (needs bitsandbytes)
    guidance: float = 1.0           # w of the guided teacher (Eq. 3); 1 is off
    t_trunc: float = 0.1            # CD's goal is z0 below this time (Eq. 8); 0 without the GAN
    t_skip: float = 0.1             # longest step of the teacher (Algorithm 2)
    truncation: Literal["landing", "current"] = "landing"  # t_trunc is compared with t_lo, or t
    metric: Literal["pseudo-huber", "l2"] = "pseudo-huber"  # distance in CD and BI
    huber_c: float = 0.2            # pseudo-Huber's c: quadratic below this difference
    mu: float = 0.9                 # decay of theta~, the average that makes targets for CD and BI
    ema: float = 0.998              # decay of the average that is sampled from
    l_gan: float = 1.0              # weight of the GAN loss (Eq. 7)
    l_rf: float = 1.0               # weight of the reflow loss (Eq. 9)
    rf_x1: Literal["free", "fixed"] = "free"  # does RF also move x1, or not, as in Eq. 9?
    l_bi: float = 1.0               # weight of the bidirectional loss (Eq. 10)
    n_gan: int = 500                # first iteration with the GAN, counted from 0
    n_rf: int = 1000                # first iteration with reflow
    n_bi: int = 0                   # first iteration with the bidirectional loss
    r1: float = 0.1                 # gamma of R1, (gamma / 2) E || grad D(z0) ||^2; 0 leaves it out
    fgm_alpha: float = 1.0          # fgm: 0.5 is the whole loss, L1 + L2; 1 is L2 alone
    fgm_clip: float = 0.0           # fgm: largest gradient norm, losses summed per sample; 0: none

    # -- pairs of the reflow baselines
    pairs: int = 50_000             # reflow, reflow-distill: how many pairs (z0, z1) are made
    pair_steps: int = 100           # reflow, reflow-distill: Euler steps that make a pair

    # -- what is written, and when
    log_every: int = 50             # iterations per row of log.csv; losses are checked for nan then
    save_every: int = 1000          # iterations between two saved resume states
    preview_every: int = 1000       # iterations between two pictures of the EMA's samples
    keep_every: int = 0             # iterations between two EMAs that are kept as files; 0: none
    eval_every: int = 0             # iterations between two measurements of the student; 0: none
    log: Literal["", "tensorboard"] = ""  # also write the log for TensorBoard (needs tensorboard)

    @property
    def one_step(self):
        """True if the student is trained for one network call only, as FGM's is."""
        return self.method == "fgm"

    def student_nfes(self, *nfes):
        """These NFEs, or (1,) for a student of one call."""
        return (1,) if self.one_step else nfes


PRESETS = {
    "8gaussians": dict(
        t_trunc=0.4, l_gan=3.0, l_rf=20.0, rf_x1="fixed", l_bi=0.05, n_gan=0),
    "mnist": dict(
        channels=32, blocks=1, patch_size=2, time_scale=1000.0, disc_channels=32,
        teacher_steps=2000, teacher_lr=1e-3, teacher_batch_size=128,
        steps=4000, batch_size=16, lr=1.5e-3, disc_lr=1e-3, lr_final=1.0, huber_c=0.01,
        t_skip=0.4, l_gan=0.02, l_rf=0.02, l_bi=0.1, n_gan=0, n_rf=400, r1=1.0,
        rf_x1="fixed", pairs=5000, pair_steps=50,
        save_every=400, preview_every=800,
    ),
}

PRESETS["captions"] = PRESETS["mnist"] | dict(
    condition="text", guidance=1.5, lr_warmup=200,
    teacher_steps=1600, teacher_lr=1.5e-3, teacher_batch_size=64,
    steps=1200, batch_size=32, disc_lr=2e-4, l_gan=0.002)
PRESETS["captions-digits"] = PRESETS["captions"] | dict(
    teacher_steps=6500, guidance=2.0, l_gan=0.001, l_rf=0.005, l_bi=0.02)

# CIFAR-10, which FGM's authors measured. These settings were never trained to their end.
PRESETS["cifar10"] = dict(
    time_scale=1000.0, disc_channels=64,
    teacher_steps=100_000, teacher_lr=2e-4, teacher_batch_size=128, teacher_ema=0.9999,
    steps=50_000, batch_size=128, lr=1e-4, disc_lr=2e-4, lr_warmup=1000, ema=0.9995, huber_c=0.01,
    t_trunc=0.4, l_gan=0.1, l_rf=0.1, rf_x1="fixed", l_bi=0.1, n_gan=0, n_bi=1000, r1=1.0,
    preview_every=5000)
CIFAR10_MODELS = {                                     # 7 M parameters; or 57 M, as EDM's network
    "small": dict(channels=64, mult=(1, 2, 2), blocks=2),
    "paper": dict(channels=128, mult=(2, 2, 2), blocks=4, teacher_steps=400_000, lr=2e-5)}
# RealUID's run of FGM on CIFAR-10; how FGM's authors trained it is not known
CIFAR10_FGM = dict(fgm_alpha=0.5, fgm_clip=1.0, lr=3e-5, disc_lr=3e-5, betas=(0.0, 0.999),
                   disc_betas=(0.0, 0.999), batch_size=256, lr_warmup=500, ema=0.9999)

# The paper's experiment, CelebA-HQ 256. What the paper does not state is taken from the official
# code (o), the teacher's values from LFM (l).
LATENTS = dict(
    batch_size=32, steps=168_750,                      # 200 epochs of 27,000 (o)
    lr=1e-5, disc_lr=1e-5, disc_betas=(0.9, 0.999),    # AdamW (o)
    lr_final=1.0, lr_warmup=0, ema=0.9999,             # constant rates, an EMA to sample from (o)
    t_trunc=0.4, truncation="current", metric="l2",    # and the defaults of t_skip, mu
    l_gan=0.1, l_rf=0.1, rf_x1="fixed", l_bi=0.1, n_gan=0, n_rf=1000, n_bi=1000, r1=1.0,  # R1 (o)
    pair_steps=500,
    teacher_steps=120_500, teacher_lr=2e-5, teacher_batch_size=112,        # (l)
    teacher_ema=0.9999,                                # LFM has none by default
    preview_every=5000, keep_every=25_000,
)
PRESETS["celebahq"] = LATENTS | dict(data_dir="data/celebahq")
PRESETS["folder"] = LATENTS | dict(data_dir="")

# the official code where it differs from the paper; its warm-ups are `iter > N`
OFFICIAL_LOSSES = dict(metric="pseudo-huber", huber_c=0.01, truncation="landing")
OFFICIAL = OFFICIAL_LOSSES | dict(lr=2e-5, disc_lr=1e-4, n_gan=1, n_rf=1001, n_bi=1001)

# Text to image, the paper's second experiment: what the paper says, then the settings of its
# script. What the paper does not state is taken from the script (learning rates: both).
PRESETS["captioned"] = LATENTS | dict(
    data_dir="", image_size=512, vae="pipeline", condition="text", guidance=1.5,
    batch_size=40, steps=18_000, ema=0.9995, r1=0.0)
CAPTIONED_OFFICIAL = OFFICIAL_LOSSES | dict(t_trunc=0.1, n_gan=500, n_rf=0, n_bi=500)

# the teacher of the paper's network, as LFM published it; no hash of it is known
LFM_TEACHER = ("model_480.pth (Google Drive id 1AIuMr5Ewti6_wQAJdM9elsrERwrxI9Sb; the package "
               "gdown downloads it)")
# networks for latents; the smaller ones learn faster
MODELS = {
    "paper": dict(channels=256, mult=(1, 2, 2, 2), blocks=2, attention=(3,), heads=4,
                  time_scale=1.0, disc_channels=128, teacher_lr_final=0.5),        # to 1e-5 (l)
    "small": OFFICIAL_LOSSES | dict(
        channels=80, mult=(1, 2, 2, 2), blocks=2, attention=(2, 3), heads=4,
        time_scale=1000.0, disc_channels=64,
        teacher_steps=60_000, teacher_lr=2e-4, teacher_batch_size=64, lr_final=0.0,
        lr_warmup=500, steps=20_000, lr=5e-5, disc_lr=2e-4),
    "tiny": OFFICIAL_LOSSES | dict(
        channels=40, mult=(1, 2), blocks=1, attention=(1,), heads=4, patch_size=2,
        time_scale=1000.0, disc_channels=32,
        teacher_steps=3000, teacher_lr=1e-3, teacher_batch_size=64, teacher_ema=0.998,
        lr_final=0.0, lr_warmup=100, steps=1200, batch_size=32, lr=4e-4, disc_lr=5e-4,
        disc_betas=(0.0, 0.99), ema=0.995,
        l_gan=0.02, l_rf=1.0, n_rf=200, n_bi=0, save_every=200, preview_every=400),
}


# ------------------------------------------------------------------------- sections and identity


def field_comments():
    """({field: its comment}, {field: its section}), read from the dataclass's own source."""
    comments, sections, section = {}, {}, None
    for line in inspect.getsource(Config).splitlines():
        if title := re.match(r"    # -- (.+)", line):
            section = title[1]
        elif field := re.match(r"    (\w+): .*?  # (.+)", line):
            comments[field[1]], sections[field[1]] = field[2], section
    return comments, sections


def section(*starts):
    """Names of the fields in the sections whose titles begin with one of `starts`."""
    return tuple(name for name, title in field_comments()[1].items() if title.startswith(starts))


MACHINE = ("device", "precision", "channels_last", "threads")   # sampling has these flags, too
ARCHITECTURE = section("networks")
# where and how a run happens; none of these changes what it computes
CIRCUMSTANCES = section("where", "the machine", "what is written")


def identity(cfg, kind):
    """Names of the settings that two teachers, or two students, must share to be the same."""
    sections = ["what is learnt", "networks", "teacher"]
    if kind == "student":
        sections += ["student", "pairs"] if "reflow" in cfg.method else ["student"]
    return section(*sections)


# ----------------------------------------------------------------------------------- making one


def make_config(dataset=Config.dataset, **given):
    """Settings of a data set: the defaults, its preset, its model, then what is given; checked.

    Without the GAN there is no truncation either (our reading of Table 4), unless t_trunc is given.
    Raises UserError for a value that makes no sense.
    """
    settings = {"dataset": dataset, **PRESETS.get(dataset, {})}
    if dataset == "captioned":
        if given.get("model"):
            raise UserError("--model is not for captioned; its network is that of the pipeline "
                            "which --teacher-checkpoint names")
        settings["preset"] = given.get("preset") or "official"
        settings |= CAPTIONED_OFFICIAL if settings["preset"] == "official" else {}
    elif dataset in LATENT_SETS:
        model, preset = given.get("model") or "paper", given.get("preset")
        if preset and model != "paper":
            raise UserError(f"--preset {preset} is for --model paper; --model {model} has settings "
                            "of its own")
        settings |= dict(model=model, preset=(preset or "official") if model == "paper" else "")
        settings |= MODELS.get(model, {})
        settings |= OFFICIAL if settings["preset"] == "official" else {}
    elif dataset == "cifar10":
        settings |= cifar10_settings(**given)
    elif given.get("model") or given.get("preset"):
        raise UserError(f"{dataset} has neither --model nor --preset; leave them out")
    cfg = Config(**{**settings, **{k: v for k, v in given.items() if k not in ("model", "preset")}})

    if cfg.method != "scflow":
        if "losses" in given and (cfg.method, cfg.losses) != ("cd", ("cd",)):
            raise UserError(f"--losses chooses among SCFlow's; --method {cfg.method} has its own")
        cfg = replace(cfg, losses=("cd",))
        if cfg.method == "cd" and given.get("t_trunc"):
            raise UserError("--method cd is plain consistency distillation, not truncated; "
                            "--losses cd with --t-trunc truncates it")
    if dataset == "captioned":
        cfg = with_pipeline(cfg)
    elif cfg.vae == "pipeline":
        raise UserError("--vae pipeline is the autoencoder of captioned's teacher; name another")
    if cfg.download and dataset != "celebahq":
        raise UserError("--download is for celebahq alone; leave it out")
    if "gan" not in cfg.losses and "t_trunc" not in given:
        cfg = replace(cfg, t_trunc=0.0)
    cfg = with_classes(cfg)
    if dataset in LATENT_SETS:                         # so that a checkpoint works from any folder
        data_dir = str(Path(cfg.data_dir).absolute()) if cfg.data_dir else ""
        files = tuple(str(Path(f).absolute()) for f in cfg.vae_weights)
        cfg = replace(cfg, data_dir=data_dir, vae_weights=files)
    check(cfg)
    return cfg


def cifar10_settings(model="", preset="", method="", **given):
    """What differs for CIFAR-10's --model, small by default, and for FGM; UserError for others."""
    model = model or "small"
    if preset or model not in CIFAR10_MODELS:
        raise UserError("cifar10 has --model small and --model paper, and no --preset")
    return dict(model=model, **CIFAR10_MODELS[model]) | (CIFAR10_FGM if method == "fgm" else {})


def with_pipeline(cfg):
    """cfg with the absolute path of its pipeline, if a folder; UserError for what it cannot do."""
    if cfg.r1 > 0:
        raise UserError(f"--r1 {cfg.r1} is not possible for captioned: the attention in its "
                        "discriminator has no second derivative; leave it out, or set it to 0")
    if cfg.vae == "pipeline" and cfg.vae_weights:
        raise UserError("--vae pipeline has its own weights; leave --vae-weights out, or add "
                        "--vae sd")
    if cfg.eval_every:
        raise UserError("--eval-every is not for captioned; leave it out, and measure its samples "
                        "by evaluate.py --prompts FILE --real FOLDER")
    if Path(cfg.teacher_checkpoint).is_dir() and cfg.teacher_checkpoint:
        return replace(cfg, teacher_checkpoint=str(Path(cfg.teacher_checkpoint).absolute()))
    return cfg


def with_classes(cfg):
    """cfg with the number of classes; UserError if condition and guidance do not fit the data."""
    if cfg.condition == "none":
        if cfg.guidance != 1:
            raise UserError(f"--guidance {cfg.guidance} needs a condition; add --condition class "
                            "(captions: text), or --guidance 1")
        return cfg
    if (cfg.condition == "text") != (cfg.dataset in (*CAPTION_SETS, "captioned")):
        raise UserError(f"--condition {cfg.condition} does not fit {cfg.dataset}; "
                        f"{', '.join(CAPTION_SETS)} and captioned have text, the other data sets "
                        "have classes or nothing")
    if cfg.condition == "class" and cfg.dataset not in CLASSES and cfg.dataset != "folder":
        raise UserError(f"--condition class needs classes, and {cfg.dataset} has none; "
                        f"{', '.join(CLASSES)} and folder have")
    if cfg.guidance != 1 and cfg.p_null == 0:
        raise UserError(f"--guidance {cfg.guidance} needs a teacher that knows the null condition; "
                        "with --p-null 0 it never sees it")
    return replace(cfg, num_classes=CLASSES.get(cfg.dataset, 0))


AT_LEAST_1 = ("channels", "blocks", "heads", "patch_size", "disc_channels", "teacher_steps",
              "teacher_batch_size", "steps", "batch_size", "grad_accum", "image_size", "log_every",
              "save_every", "preview_every", "pairs", "pair_steps")
POSITIVE = ("teacher_lr", "lr", "disc_lr", "time_scale", "t_skip", "huber_c")
AT_MOST_1 = ("t_trunc", "t_skip", "lr_final", "teacher_lr_final", "p_null")
BELOW_1 = ("mu", "ema", "teacher_ema", "betas", "disc_betas")


def check(cfg):
    """Raises UserError if a value has the wrong type or is out of range; it names the flag."""
    for name, kind in typing.get_type_hints(Config).items():
        value = getattr(cfg, name)
        many = typing.get_origin(kind) is tuple
        kind = typing.get_args(kind)[0] if many else kind
        if many != isinstance(value, (tuple, list)):
            raise UserError(f"{flag(name)} {value} makes no sense here")
        for one in value if many else (value,):
            if wanted := complaint(name, kind, one):
                raise UserError(f"{flag(name)} {words(value)} makes no sense; it must be {wanted}")
    for name in ("betas", "disc_betas"):
        if len(getattr(cfg, name)) != 2:
            raise UserError(f"{flag(name)} takes two numbers from 0 to below 1, as 0.9 0.999")
    if cfg.image_size % LATENT_DOWNSAMPLING:
        raise UserError(f"--image-size {cfg.image_size} is not a multiple of "
                        f"{LATENT_DOWNSAMPLING}, which the autoencoders need")
    if cfg.method == "reflow-distill" and cfg.steps < 2:
        raise UserError("--method reflow-distill has two stages, so --steps must be at least 2")
    if cfg.method == "flowmap" and cfg.dataset == "captioned":
        raise UserError("--method flowmap needs a network that is told where a step ends, and that "
                        "of a pipeline is not; choose another method")
    if not cfg.losses:
        raise UserError("--losses names at least one of cd, gan, rf and bi")


def complaint(name, kind, value):
    """What a value of a field must be, in words, if it is not; else an empty string."""
    if typing.get_origin(kind) is Literal:
        return "" if value in typing.get_args(kind) else f"one of {words(typing.get_args(kind))}"
    if not isinstance(value, (int, float) if kind is float else kind) or (
            kind is not bool and isinstance(value, bool)):
        return f"of type {kind.__name__}"
    if kind not in (int, float):
        return ""
    low = 1 if name in AT_LEAST_1 else 0
    if not math.isfinite(value) or value < low or value == 0 and name in POSITIVE:
        least = "larger than 0" if name in POSITIVE else f"at least {low}"
        return least + ("" if kind is int else ", and finite")
    # PyTorch's generators take 32 bits of a seed, and no machine has so many of anything else
    if kind is int and value >= (1024 if name == "threads" else 2**31):
        return f"below {'1024' if name == 'threads' else '2^31'}"
    if name in AT_MOST_1 and value > 1 or name in BELOW_1 and value >= 1:
        return "between 0 and 1" + ("" if name in AT_MOST_1 else ", and below 1")
    return ""


def flag(name):
    return "--" + name.replace("_", "-")


def words(value):
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def run_dir(cfg):
    """Folder of the run: --out, or else runs/<dataset>, runs/<dataset>-<method> of baselines."""
    name = cfg.dataset if cfg.method == "scflow" else f"{cfg.dataset}-{cfg.method}"
    return Path(cfg.out or Path("runs") / name)


def known_fields(settings):
    """Those entries of a dictionary that are fields of Config, lists as tuples."""
    names = {f.name for f in fields(Config)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items() if k in names}
