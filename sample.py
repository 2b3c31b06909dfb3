"""Samples a trained run: `python sample.py --nfe 4`, strips over NFE, trajectories, raw samples.

Sampling goes from noise at t = 1 to data at t = 0; NFE counts the calls of the network.
"""

import argparse
import re
from pathlib import Path

import torch
from tqdm import tqdm

import captions
from config import DATASETS, LATENT_DOWNSAMPLING, LATENT_SETS, MACHINE, flag, words
from harness import UserError, machine, pictures
from harness.saved import (at_a_time, conditions_of, examples, find_student, home_of, npz_name,
                           open_decoder, open_network, png_folder, read_prompts, same, save_npz,
                           save_pngs, unconditional)
from harness.script import add_field_flags, given_flags, make_parser, run_script
from losses import expand, interpolate
from model import Guided

BLOCK = 256                        # noise is drawn in blocks of this many samples
MOST_POINTS, MOST_IMAGES, MOST_LATENTS, MOST_CELLS = 100_000, 10_000, 1000, 1000   # per picture


def noise(shape, n, seed, start=0, stream=0):
    """Noise z1 of the samples start ... start + n - 1, float32 (n, *shape) on the CPU.

    It depends on seed and index alone, not on the batch size, the NFE or the device. Each `stream`
    gives independent noise; stochastic sampling needs several.
    """
    first, last = start // BLOCK, (start + n - 1) // BLOCK
    blocks = []
    for block in range(first, last + 1):
        # the constant keeps these draws apart from those of training, see data.step_seed
        key = (((seed * 4099 + stream) * 1_000_003 + block) * 2_654_435_761 + 0x5BD1E995) % 2**63
        blocks.append(torch.randn(BLOCK, *shape, generator=torch.Generator().manual_seed(key)))
    return torch.cat(blocks)[start - first * BLOCK :][:n]


# ----------------------------------------------------------------------------------- solvers
#
# A solver yields (t, zt, f(zt, t)) before each step, and (0, z0, z0) at the end. z (B, ...) starts
# as noise. Drawing samples takes the last of these, a trajectory takes all.


@torch.no_grad()
def euler(model, z, nfe, y=None):
    """z <- z - (1/N) v(z, i/N) for i = N ... 1, with N = nfe.

    A flow map is also told where each step ends, at (i - 1)/N; its f(zt, t) is that step, prolonged
    to t = 0.
    """
    told = getattr(model, "span_emb", None) is not None
    for i in range(nfe, 0, -1):
        t = torch.full((len(z),), i / nfe, device=z.device)
        v = model(z, t, y, t - 1 / nfe) if told else model(z, t, y)
        yield i / nfe, z, z - expand(t, z) * v
        z = z - v / nfe
    yield 0.0, z, z


@torch.no_grad()
def stochastic(model, z, nfe, y=None, renoise=torch.randn_like):
    """Consistency sampling: predict z0, mix in fresh noise up to the next lower time, repeat."""
    for i in range(nfe, 0, -1):
        t = torch.full((len(z),), i / nfe, device=z.device)
        x = z - expand(t, z) * model(z, t, y)
        yield i / nfe, z, x
        z = interpolate(x, renoise(z), t - 1 / nfe) if i > 1 else x
    yield 0.0, z, z


SOLVERS = {"euler": euler, "stochastic": stochastic}


def path(model, shape, n, nfe, seed=0, solver="euler", device="cpu", first=0, y=None):
    """The solver's steps for the samples first ... first + n - 1, from their own noise.

    y holds their conditions (n, ...), or is None.
    """
    y = None if y is None else y.to(device)

    def fresh(stream=0):
        return noise(shape, n, seed, first, stream).to(device)

    if solver == "stochastic":
        streams = iter(range(1, nfe + 1))
        return stochastic(model, fresh(), nfe, y, renoise=lambda z: fresh(next(streams)))
    return SOLVERS[solver](model, fresh(), nfe, y)


def draw(model, shape, n, nfe, seed=0, solver="euler", batch=500, device="cpu", first=0, y=None):
    """Samples first ... first + n - 1, float32 (n, *shape) on the CPU; y are their conditions.

    The result does not depend on `batch`.
    """
    samples = []
    for start in range(0, n, batch):
        size, some = min(batch, n - start), None if y is None else y[start : start + batch]
        for _, z0, _ in path(model, shape, size, nfe, seed, solver, device, first + start, some):
            pass
        samples.append(z0.cpu())
    return torch.cat(samples)


# ---------------------------------------------------------------------------------- pictures


def calls(network):
    """Network calls per step: two if it is guided."""
    return 2 if getattr(network, "w", 1) != 1 else 1


def strips(path, networks, shape, nfes, seed=0, device="cpu", solver="euler", data=None, title=None,
           columns=None, decode=same, across=False, conditions=unconditional, batch=500):
    """Figure 5: the same noise at every NFE. networks is [(name, network, its NFEs or None), ...].

    Points: one row per network and one panel per NFE; `across` transposes this (the paper's
    Figure 6). Images: one row per network and NFE, one column per noise. `columns` is the number
    of samples, usually 4000 points or 10 images.
    """
    rows, points = [], len(shape) == 1
    n = columns or (4000 if points else 10)
    for name, network, some in networks:
        cells = {k: draw(network, shape, n, k, seed, solver, batch, device, y=conditions(n))
                 for k in some or nfes}
        role = name if name in pictures.COLOURS else "student"
        if points:
            rows.append((name, [role] * len(cells), list(cells.values())))
        else:
            rows += [(f"{name}, {k * calls(network)} NFE", role, list(decode(z)))
                     for k, z in cells.items()]
    heads = [f"{k * calls(networks[0][1])} NFE" for k in nfes] if points else []
    if data is not None and points:                # only beside the first row
        heads.append("data")
        name, colours, cells = rows[0]
        rows[0] = name, [*colours, "data"], [*cells, data]
    elif data is not None:
        rows.append(("data", "data", list(decode(data[:n]))))
    if across:
        names, colours, cells = zip(*rows)
        rows, heads = list(zip(heads, zip(*colours), zip(*cells))), names
    return pictures.grid(path, rows, heads, title)


def by_prompt(path, cfg, columns, shape, prompts=(), seed=0, device="cpu", solver="euler",
              title=None, decode=same, batch=500):
    """One row per prompt; columns are [(head, network, steps, number of its first noise), ...].

    Without prompts these are the examples of cfg's data set.
    """
    prompts = prompts or examples(cfg)
    y = conditions_of(cfg, prompts=prompts)(len(prompts))
    cells = [decode(draw(network, shape, len(prompts), steps, seed, solver, batch, device, first,
                         y)) for _, network, steps, first in columns]
    rows = [(prompt.strip() or "(empty)", "student", row)
            for prompt, row in zip(prompts, zip(*cells))]
    return pictures.grid(path, rows, [head for head, *_ in columns], title)


def columns_of(network, nfes, n, prompts):
    """Columns for by_prompt: several NFEs; or else other noise, so that there are n pictures."""
    heads = [f"{k * calls(network)} NFE" for k in nfes]
    if len(nfes) > 1:
        return [(head, network, k, 0) for head, k in zip(heads, nfes)]
    return [(heads[0] if j == 0 else "", network, nfes[0], j * prompts)
            for j in range(-(-n // prompts))]


def trajectory(file, networks, shape, n, nfe, seed=0, device="cpu", solver="euler", title=None,
               decode=same, conditions=unconditional):
    """Figures 4 and 7: zt and its z0-prediction along the path; for points the paths themselves."""
    rows = []
    for name, network in networks:
        steps = list(path(network, shape, n, nfe, seed, solver, device, y=conditions(n)))
        if len(shape) == 1:
            rows.append((f"{name}, {nfe * calls(network)} NFE", name, steps))
            continue
        for i in range(n):
            zt = decode(torch.stack([zt[i] for _, zt, _ in steps]))
            f = decode(torch.stack([f[i] for _, _, f in steps[:-1]]))
            rows += [(f"{name}: zt", name, list(zt)), ("f(zt, t)", name, [*f, None])]
    if len(shape) == 1:
        return pictures.paths(file, rows, title)
    return pictures.grid(file, rows, [f"t = {t:.2g}" for t, _, _ in steps], title)


def film(file, teacher, student, shape, n, seed=0, device="cpu", title=None,
         conditions=unconditional):
    """A GIF of points on their way: the teacher in 50 steps, the student in 1, 2 and 4."""
    panels = []
    for name, network, nfe in [("teacher", teacher, 50),
                               *[("student", student, k) for k in (1, 2, 4)]]:
        steps = path(network, shape, n, nfe, seed, device=device, y=conditions(n))
        panels.append((f"{name}, {nfe} NFE", name, [zt for _, zt, _ in steps]))
    return pictures.film(file, panels, title)


# ------------------------------------------------------------------------------ command line


def check_flags(args, **least):
    """UserError if a flag is below its least value, or empty."""
    for name, low in least.items():
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not low <= value < 2**31:
                raise UserError(f"--{name} {value} makes no sense; it must be at least {low}, and "
                                "below 2^31")
    for name in ("checkpoint", "teacher_checkpoint", "prompts", "clip", "samples", "npz", "png",
                 "out"):
        names = getattr(args, name, None)
        if names == "" or isinstance(names, list) and "" in names:
            raise UserError(f"{flag(name)} takes the name of a file, not an empty text")


def parse(argv=None):
    parser = make_parser(__doc__)
    what = parser.add_argument_group("what is sampled")
    what.add_argument("--checkpoint", metavar="FILE", help="student.pt, teacher.pt, a resume "
                      "state, or a pipeline of Stable Diffusion: a folder or an id on the Hugging "
                      "Face hub [the newest student in runs/]")
    what.add_argument("--dataset", choices=DATASETS, help="the newest student of this data set")
    what.add_argument("--teacher", action=argparse.BooleanOptionalAction, help="sample the "
                      "teacher.pt beside the student. --trajectory shows both, unless one is "
                      "chosen by --teacher or --no-teacher")
    what.add_argument("--weights", choices=("ema", "theta", "target"), default="ema",
                      help="of a resume state: the average, the trained network, theta~ [ema]")
    how = parser.add_argument_group("how")
    how.add_argument("--nfe", type=int, nargs="+", default=[4], metavar="N",
                     help="number of function evaluations; several make a strip (Figure 5) [4]")
    how.add_argument("--n", type=int, help="number of samples [4000 points, 64 images, 32 "
                     "latents, 8 per prompt (captioned: 4); several NFE: fewer; --npz, --png: "
                     "50000 points, 10000 images]")
    how.add_argument("--seed", type=int, default=0, help="of the noise, which all NFE share [0]")
    how.add_argument("--class", type=int, nargs="+", dest="classes", metavar="K",
                     help="a conditional network: the classes to draw, in turn [all]")
    texts = how.add_mutually_exclusive_group()
    texts.add_argument("--prompt", nargs="+", metavar="TEXT", help="captions, captioned: what to "
                       "draw, in turn, as 'a red ring' [examples]; '' is the null condition")
    texts.add_argument("--prompts", metavar="FILE", help="prompts from a file, one per line")
    how.add_argument("--guidance", type=float, metavar="W", help="a conditional teacher: guide it "
                     "(Eq. 3). W = 1 is off; any other W makes --nfe steps of two calls each [1]")
    how.add_argument("--stochastic", dest="solver", action="store_const", const="stochastic",
                     default="euler", help="predict z0, mix in fresh noise, repeat, as consistency "
                     "models do, instead of Euler's steps")
    how.add_argument("--batch", type=int, help="samples drawn at a time [1000 points, 500 images, "
                     "64 latents, captioned: 8]")
    output = parser.add_argument_group("what is written")
    kind = output.add_mutually_exclusive_group()
    kind.add_argument("--trajectory", action="store_true", help="zt and z0-predictions along the "
                      "path (Figure 4: --nfe 10; Figure 7: --nfe 4 --no-teacher)")
    kind.add_argument("--gif", action="store_true", help="points: a film of teacher (50 NFE) and "
                      "student (1, 2, 4 NFE); --nfe is ignored")
    kind.add_argument("--npz", metavar="FILE", help="raw samples, arr_0, instead of a picture")
    kind.add_argument("--png", metavar="FOLDER", help="each sample as a .png of its own")
    output.add_argument("--out", metavar="FILE", help="the picture [samples/ beside the "
                        "checkpoint]")
    add_field_flags(parser, (*MACHINE, "vae_weights", "teacher_checkpoint"))
    args = parser.parse_args(argv)
    check_flags(args, nfe=1, n=1, batch=1, seed=0)
    check_output(args)
    args.prompt = read_prompts(args.prompts) if args.prompts else args.prompt
    return args


def check_output(args):
    """UserError if other flags do not fit what is written."""
    if (args.npz or args.png or args.trajectory) and len(args.nfe) > 1:
        raise UserError("--npz, --png and --trajectory take one --nfe; run them once for each")
    if (args.npz or args.png) and args.out:
        raise UserError("--out is for pictures; --npz and --png name what they write, so leave "
                        "--out out")
    if args.gif and (args.solver != "euler" or args.teacher is not None):
        raise UserError("--gif shows teacher and student, both by Euler's method; leave "
                        "--stochastic and --teacher out")


def main(argv=None):
    args = parse(argv)
    dataset = args.dataset or (captions.dataset_of(args.prompt) if args.prompt else None)
    student = Path(args.checkpoint or find_student(dataset))
    home = home_of(student)
    teacher = student.parent / "teacher.pt"
    files = [teacher] if args.teacher else [student]
    both = args.trajectory and args.teacher is None and teacher.exists() and teacher != student
    if both or args.gif:
        files = [teacher, student]
    given = given_flags(args, (*MACHINE, "vae_weights", "teacher_checkpoint"))
    opened = [open_network(file, args.weights if file == files[-1] else "ema", **given)
              for file in files]
    networks = [(content["kind"].split()[0], with_guidance(network, content, cfg, args.guidance))
                for network, content, cfg in opened]
    network, content, cfg = opened[-1]
    if args.dataset and cfg.dataset != args.dataset:
        raise UserError(f"{student} was trained on {cfg.dataset}, not on {args.dataset}; "
                        "leave --dataset out")
    check_conditions(args, cfg)
    if network.one_step and (args.gif or args.nfe != [1]):
        raise UserError(f"{student} was trained for one network call ({cfg.method}); choose "
                        f"--nfe 1{' without --gif' if args.gif else ''}")
    if args.npz or args.png:
        written = write_raw(args, networks[-1][1], tuple(content["shape"]), cfg)
    elif machine.FIRST:                            # one process draws a picture
        written = write_picture(args, networks, tuple(content["shape"]), cfg, home)
    if machine.FIRST:
        print(f"wrote {written}   from {', '.join(map(str, files))}")


def with_guidance(network, content, cfg, w):
    """The network, guided with w; UserError if it is a student or knows no null condition."""
    if w is None:
        return network
    if not 0 <= w < 1000:
        raise UserError(f"--guidance {w} makes no sense; it must be at least 0, and finite")
    if cfg.condition == "none":
        raise UserError("--guidance needs a conditional network, and this one is unconditional; "
                        "leave it out, or train with --condition class")
    if content["kind"].startswith("student"):
        raise UserError(f"--guidance is for teachers; w = {cfg.guidance:g} is part of this student "
                        "already, so leave it out, or add --teacher")
    if w != 1 and cfg.p_null == 0:
        raise UserError("--guidance needs the null condition, which this teacher never saw "
                        "(--p-null 0); leave it out, or train another teacher")
    return Guided(network, w)


def check_conditions(args, cfg):
    """UserError if --class or --prompt does not fit the network."""
    if args.prompt and cfg.condition != "text":
        raise UserError("--prompt needs a network of captions, and this one is of "
                        f"{'classes' if cfg.num_classes else 'no condition'}; leave it out, or "
                        "train with --dataset captions")
    if args.classes and cfg.condition != "class":
        raise UserError("--class needs a network of classes, and this one is "
                        f"{'of captions' if cfg.condition == 'text' else 'unconditional'}; leave "
                        "it out, or train with --condition class")
    for k in args.classes or ():
        if not 0 <= k < cfg.num_classes:
            raise UserError(f"--class {k} does not exist; the classes are 0 to "
                            f"{cfg.num_classes - 1}")


def write_raw(args, network, shape, cfg):
    """--npz, --png: args.n samples, shared by the processes; returns what was written, in words."""
    file, device = npz_name(args.npz) if args.npz else None, next(network.parameters()).device
    if args.png and len(shape) == 1:
        raise UserError("--png is for images; --npz FILE writes points")
    folder = png_folder(args.png) if args.png and machine.FIRST else Path(args.png or "")
    machine.start(device)
    decode = open_decoder(cfg)
    many = len(args.prompt) if args.prompts else 50_000 if len(shape) == 1 else 10_000
    n, nfe = args.n or many, args.nfe[0]
    batch = args.batch or at_a_time(cfg.dataset)
    mine, y = machine.mine(n), conditions_of(cfg, args.classes, args.prompt)(n)

    def batches():
        for i in tqdm(mine[::batch], desc=f"{nfe} NFE", unit="batch", disable=not machine.FIRST):
            size = min(batch, mine.stop - i)
            yield i, decode(draw(network, shape, size, nfe, args.seed, args.solver, batch, device,
                                 first=i, y=None if y is None else y[i : i + size]))

    size = LATENT_DOWNSAMPLING * shape[-1]
    if args.png:
        machine.wait()
        save_pngs(folder, batches())
    else:
        save_npz(file, batches(), n, shape if decode is same else (3, size, size))
    return f"{file or folder}: {n} samples, {nfe * calls(network)} NFE, {args.solver}"


def number_in_picture(args, cfg, networks, points):
    """The number of samples in a picture, --n or its default; UserError if there are too many."""
    latent, k = cfg.dataset in LATENT_SETS, len(args.nfe)
    if points:
        usual, most = 2500 if args.gif else 2000 if args.trajectory else 4000, MOST_POINTS
    elif args.trajectory:                          # a row of zt and one of f per sample
        usual, most = 2, max(2, MOST_CELLS // (2 * len(networks) * (args.nfe[0] + 1)))
    elif cfg.condition == "text":
        prompts = len(args.prompt or examples(cfg))
        usual, most = prompts * (1 if k > 1 else 4 if latent else 8), MOST_CELLS // k
    elif k > 1:
        usual, most = 8 if latent else 10, MOST_CELLS // k
    else:
        usual, most = (32, MOST_LATENTS) if latent else (64, MOST_IMAGES)
    n = args.n or usual
    if n > most:
        raise UserError(f"--n {n} is too many for this picture, which takes {most:,} at most; "
                        "choose a smaller --n, or --npz FILE, which writes any number")
    return n


def write_picture(args, networks, shape, cfg, folder):
    """A film, a trajectory, a strip over NFE, or samples of the last network; returns its path."""
    (name, network), points = networks[-1], len(shape) == 1
    latent, device = cfg.dataset in LATENT_SETS, next(network.parameters()).device
    title = f"{cfg.dataset}, {args.solver}, seed {args.seed}"
    conditions = conditions_of(cfg, args.classes, args.prompt)
    n = number_in_picture(args, cfg, networks, points)
    if args.gif:
        if not points or name == "teacher":
            raise UserError("--gif takes a student of points, with the teacher.pt beside it; "
                            "--trajectory shows the path of images")
        return film(args.out or folder / "samples" / "film.gif", networks[0][1], network, shape,
                    n, args.seed, device, f"{cfg.dataset}: samples after each network call",
                    conditions)

    decode, nfe = open_decoder(cfg), args.nfe[0]
    suffix = "" if args.solver == "euler" else f"-{args.solver}"
    suffix += "" if args.weights == "ema" else f"-{args.weights}"
    if args.guidance not in (None, 1):
        suffix += f"-w{args.guidance:g}"
        title += f", w = {args.guidance:g}"
    if args.classes:
        suffix += "-class" + "-".join(map(str, args.classes))
        title += f", classes {words(args.classes)}"
    if args.prompt:
        named = re.sub(r"\W+", "-", " ".join(args.prompt))[:60].strip("-")
        suffix += f"-{named or 'null'}"
    kind = "trajectory" if args.trajectory else name
    numbers = "-".join(map(str, args.nfe))
    out = args.out or folder / "samples" / f"{kind}-nfe{numbers}{suffix}-seed{args.seed}.png"
    if args.trajectory:
        return trajectory(out, networks, shape, n, nfe, args.seed, device, args.solver, title,
                          decode, conditions)
    batch = args.batch or at_a_time(cfg.dataset)
    if cfg.condition == "text":
        prompts = args.prompt or examples(cfg)
        rows = n if len(args.nfe) > 1 else min(n, len(prompts))
        prompts = [prompts[i % len(prompts)] for i in range(rows)]
        return by_prompt(out, cfg, columns_of(network, args.nfe, n, rows), shape, prompts,
                         args.seed, device, args.solver, f"{name}, {title}", decode, batch)
    if len(args.nfe) > 1:
        return strips(out, [(name, network, None)], shape, args.nfe, args.seed, device, args.solver,
                      title=title, columns=n, decode=decode, conditions=conditions, batch=batch)

    z = decode(draw(network, shape, n, nfe, args.seed, args.solver, batch, device,
                    y=conditions(n)))
    title = f"{name}, {nfe * calls(network)} NFE\n{title}"
    if points:
        return pictures.grid(out, [("", name, [z])], title=title)
    return pictures.tiles(out, z, min(n, 8 if latent else 16), title)


if __name__ == "__main__":
    run_script(main)
