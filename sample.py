"""Samples a trained run: `python sample.py --nfe 4`, strips over NFE, trajectories, raw samples.

Sampling goes from noise at t = 1 to data at t = 0; NFE counts the calls of the network.
"""

import argparse
import math
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import parallel
import plots
from config import (DATASETS, FACTOR, LATENT_SETS, MACHINE, POINT_SETS, Parser,
                    UserError, add_field_flags, make_config, run_script)
from data import to_uint8
from losses import expand, interpolate
from model import choose_device, copy_of, prepare, velocity_network

BLOCK = 256                        # noise is drawn in blocks of this many samples


def noise(shape, n, seed, start=0, stream=0):
    """Noise z1 of the samples start ... start + n - 1, float32 (n, *shape) on the CPU.

    A function of seed and index alone: the batch size, the NFE and the device do not change it.
    `stream` keeps independent draws apart, as the re-noising of stochastic sampling needs them.
    """
    first, last = start // BLOCK, (start + n - 1) // BLOCK
    blocks = []
    for block in range(first, last + 1):
        # the constant keeps these draws apart from those of training, see data.step_seed
        key = (((seed * 4099 + stream) * 1_000_003 + block) * 2_654_435_761 + 0x5BD1E995) % 2**63
        blocks.append(torch.randn(BLOCK, *shape, generator=torch.Generator().manual_seed(key)))
    return torch.cat(blocks)[start - first * BLOCK :][:n]


# ----------------------------------------------------------------------------------- solvers


@torch.no_grad()
def euler(model, z, nfe, y=None, path=None):
    """z <- z - (1/N) v(z, i/N) for i = N ... 1, with N = nfe; z (B, ...) starts as noise.

    A list given as `path` receives (t, zt, f(zt, t)) before each step and (0, z0, z0) at the end.
    """
    for i in range(nfe, 0, -1):
        t = torch.full((len(z),), i / nfe, device=z.device)
        v = model(z, t, y)
        if path is not None:
            path.append((i / nfe, z, z - expand(t, z) * v))
        z = z - v / nfe
    if path is not None:
        path.append((0.0, z, z))
    return z


@torch.no_grad()
def heun(model, z, nfe, y=None, path=None):
    """Heun's method, of second order: two calls a step, one in the last, so nfe = 2 steps - 1.

    Raises ValueError for an even nfe, which no number of steps would spend.
    """
    if nfe % 2 == 0:
        raise ValueError(f"Heun takes an odd number of calls, not {nfe}")
    steps = (nfe + 1) // 2
    for i in range(steps, 0, -1):
        t = torch.full((len(z),), i / steps, device=z.device)
        v = model(z, t, y)
        if path is not None:
            path.append((i / steps, z, z - expand(t, z) * v))
        if i > 1:                  # the trapezoid of both ends; at t = 0 there is nothing to call
            v = (v + model(z - v / steps, t - 1 / steps, y)) / 2
        z = z - v / steps
    if path is not None:
        path.append((0.0, z, z))
    return z


@torch.no_grad()
def stochastic(model, z, nfe, y=None, path=None, renoise=torch.randn_like):
    """Consistency sampling: predict z0, mix fresh noise in up to the next lower time, repeat."""
    for i in range(nfe, 0, -1):
        t = torch.full((len(z),), i / nfe, device=z.device)
        x = z - expand(t, z) * model(z, t, y)
        if path is not None:
            path.append((i / nfe, z, x))
        z = interpolate(x, renoise(z), t - 1 / nfe) if i > 1 else x
    if path is not None:
        path.append((0.0, z, z))
    return z


SOLVERS = {"euler": euler, "heun": heun, "stochastic": stochastic}


def draw(model, shape, n, nfe, seed=0, solver="euler", batch=500, device="cpu", path=None,
         first=0):
    """Samples first ... first + n - 1, float32 (n, *shape) on the CPU; `batch` changes nothing."""
    samples = []
    for start in range(first, first + n, batch):
        size, more = min(batch, first + n - start), {}
        if solver == "stochastic":
            streams = iter(range(1, nfe + 1))
            more["renoise"] = lambda z: noise(
                shape, size, seed, start, stream=next(streams)).to(device)
        z1 = noise(shape, size, seed, start).to(device)
        samples.append(SOLVERS[solver](model, z1, nfe, path=path, **more).cpu())
    return torch.cat(samples)


# ---------------------------------------------------------------------------------- pictures


def same(z0):
    """The decoder of points and images, which need none."""
    return z0


def strips(path, networks, shape, nfes, seed=0, device="cpu", solver="euler", data=None, title=None,
           columns=10, decode=same, across=False):
    """Figure 5: the same noise at every NFE. networks is [(name, network, nfes or None), ...].

    Points: a row a network, a panel an NFE; `across` turns this, and with the runs of an ablation,
    at NFE 1 and 4, it is Figure 6. Images: a row an NFE of a network, a column a noise.
    """
    rows, points = [], len(shape) == 1
    for name, network, own in networks:
        n = 4000 if points else columns
        cells = {k: draw(network, shape, n, k, seed, solver, device=device) for k in own or nfes}
        role = name if name in plots.COLOURS else "student"
        if points:
            rows.append((name, [role] * len(cells), list(cells.values())))
        else:
            rows += [(f"{name}, {k} NFE", role, list(decode(z))) for k, z in cells.items()]
    heads = [f"{k} NFE" for k in nfes] if points else []
    if data is not None and points:                # beside the first row alone
        heads.append("data")
        rows[0] = (rows[0][0], [*rows[0][1], "data"], [*rows[0][2], data])
    elif data is not None:
        rows.append(("data", "data", list(decode(data[:columns]))))
    if across:
        names, colours, cells = zip(*rows)
        rows, heads = list(zip(heads, zip(*colours), zip(*cells))), names
    return plots.grid(path, rows, heads, title)


def trajectory(path, networks, shape, nfe, seed=0, device="cpu", solver="euler", title=None,
               decode=same):
    """Figures 4 and 7: zt and its z0-prediction along the path; for points the paths themselves."""
    rows = []
    for name, network in networks:
        steps = []
        draw(network, shape, 2000 if len(shape) == 1 else 2, nfe, seed, solver, batch=2000,
             device=device, path=steps)
        if len(shape) == 1:
            rows.append((f"{name}, {nfe} NFE", name, steps))
            continue
        for i in range(2):
            zt = decode(torch.stack([zt[i] for _, zt, _ in steps]))
            f = decode(torch.stack([f[i] for _, _, f in steps[:-1]]))
            rows += [(f"{name}: zt", name, list(zt)), ("z0-prediction", name, [*f, None])]
    if len(shape) == 1:
        return plots.paths(path, rows, title)
    return plots.grid(path, rows, [f"t = {t:.2g}" for t, _, _ in steps], title)


def film(path, teacher, student, shape, seed=0, device="cpu", title=None, n=2500):
    """A GIF of points on their way: the teacher in 50 steps, the student in 1, 2 and 4."""
    panels = []
    students = [("student", student, k) for k in (1, 2, 4)]
    for name, network, nfe in [("teacher", teacher, 50), *students]:
        steps = []
        draw(network, shape, n, nfe, seed, batch=n, device=device, path=steps)
        panels.append((f"{name}, {nfe} NFE", name, [zt for _, zt, _ in steps]))
    return plots.film(path, panels, title)


# ----------------------------------------------------------------------------------- networks


def find_student(dataset=None):
    """The newest student.pt in runs/ (of one data set, where named), else a newest resume state.

    Raises UserError where there is none.
    """
    for name in ("student.pt", "student_resume.pt"):
        found = sorted(Path("runs").glob(f"**/{name}"), key=lambda p: p.stat().st_mtime)
        for path in reversed(found):
            if "ablation" in path.parts or path.parent.name == "reflow":
                continue                           # a cell of a table, a stage of reflow-distill
            kinds = ("student", "student resume")
            if dataset is None or checkpoint.load(path, kinds)["config"]["dataset"] == dataset:
                return path
    of = f" of {dataset}" if dataset else ""
    which = f" --dataset {dataset}" if dataset else ""
    raise UserError(f"there is no student{of} in runs/; train one with: python train.py{which}, "
                    "or name one by --checkpoint")


def open_network(path, cfg):
    """(network, checkpoint) of a teacher.pt, student.pt or resume state: its EMA, ready to sample.

    cfg tells the machine's part alone (device, precision, threads); the file tells the rest.
    """
    content = checkpoint.load(path, ("teacher", "student", "teacher resume", "student resume"))
    own = machine_of(cfg, content)
    device = choose_device(own)
    network = velocity_network(own, content["shape"])
    checkpoint.load_weights(network, content["ema"], path)
    return prepare(copy_of(network), own, device), content


def machine_of(cfg, content):
    """The settings of a checkpoint, with the machine's part (and the autoencoder) from cfg."""
    own = replace(checkpoint.config_of(content), compile=False, grad_accum=1, **{
        name: getattr(cfg, name) for name in MACHINE})
    return replace(own, vae_weights=cfg.vae_weights) if cfg.vae_weights else own


def open_decoder(content, cfg):
    """z0 -> images for the samples of a checkpoint: `same`, or its autoencoder's decoder."""
    own = machine_of(cfg, content)
    if own.dataset not in LATENT_SETS:
        return same
    from latents import Codec                      # points need neither, and start faster
    from vae import load
    return Codec(load(own.vae, own.vae_weights), own, choose_device(own)).decode


def save_npz(path, samples, n, shape):
    """Raw samples as ADM writes them, `arr_0`: images uint8 (n, H, W, C), points float32 (n, 2).

    `samples` yields (start, rows as float32 in [-1, 1], images (b, C, H, W)). They go to the disk
    as they come, so that memory does not grow with n; each of several processes writes its own.
    """
    path, images = Path(path), len(shape) == 3
    rows = (n, *shape[1:], shape[0]) if images else (n, *shape)
    part = path.with_name(path.name + ".part.npy")
    try:
        if parallel.FIRST:
            path.parent.mkdir(parents=True, exist_ok=True)
            need = 2 * math.prod(rows) * (1 if images else 4)
            if (free := shutil.disk_usage(path.parent).free) < need:
                raise UserError(f"{path} needs {need / 1e6:,.0f} MB for a moment, and "
                                f"{free / 1e6:,.0f} MB are free; make room, or name another file")
            np.lib.format.open_memmap(part, "w+", np.uint8 if images else np.float32, rows)
        parallel.wait()
        array = np.lib.format.open_memmap(part, "r+")
        for start, z in samples:
            array[start : start + len(z)] = to_uint8(z).permute(0, 2, 3, 1) if images else z
        array.flush()
        parallel.wait()
        if parallel.FIRST:
            with zipfile.ZipFile(path, "w") as file:   # an .npz is a .zip of .npy files
                file.write(part, "arr_0.npy")
    except OSError as e:
        raise UserError(f"could not write {path} ({e.strerror}); name another file") from e
    finally:
        if parallel.FIRST and part.is_file():
            part.unlink()


def check(args, **least):
    """UserError where a flag is below its least value, or an NFE is none that Heun can spend."""
    for name, low in least.items():
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < low:
                raise UserError(f"--{name} {value} makes no sense; it must be at least {low}")
    even = [k for k in args.nfe if k % 2 == 0]
    if args.solver == "heun" and even:
        raise UserError("--solver heun takes an odd --nfe: two calls a step, one in the last; "
                        f"{min(even)} is even")


def at_a_time(dataset):
    """Samples that are drawn together: what caches like; of latents, few for the memory's sake."""
    return 64 if dataset in LATENT_SETS else 1000 if dataset in POINT_SETS else 500


def parse(argv=None):
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    what = parser.add_argument_group("what is sampled")
    what.add_argument("--checkpoint", metavar="FILE", help="student.pt, teacher.pt or a resume "
                      "state [the newest student in runs/]")
    what.add_argument("--dataset", choices=DATASETS, help="the newest student of this data set")
    what.add_argument("--teacher", action=argparse.BooleanOptionalAction, help="sample the "
                      "teacher.pt that lies beside the student; with --trajectory both are shown "
                      "unless one is chosen by --teacher or --no-teacher")
    how = parser.add_argument_group("how")
    how.add_argument("--nfe", type=int, nargs="+", default=[4], metavar="N",
                     help="number of function evaluations; several make a strip (Figure 5) [4]")
    how.add_argument("--n", type=int, help="number of samples [64 images or 4000 points]")
    how.add_argument("--seed", type=int, default=0, help="of the noise, the same at every NFE [0]")
    how.add_argument("--solver", choices=("euler", "heun"), default="euler",
                     help="heun is of second order and takes an odd NFE [euler]")
    how.add_argument("--stochastic", action="store_true",
                     help="predict z0, mix in fresh noise, repeat, as consistency models do")
    how.add_argument("--batch", type=int, help="samples at a time [1000 points, 500 images, "
                     "64 latents]")
    to = parser.add_argument_group("what is written")
    to.add_argument("--trajectory", action="store_true", help="zt and z0-predictions along the "
                    "path (Figure 4: --nfe 10; Figure 7: --nfe 4 --no-teacher)")
    to.add_argument("--gif", action="store_true", help="points: a film of teacher (50 NFE) and "
                    "student (1, 2, 4 NFE), whatever --nfe says")
    to.add_argument("--npz", metavar="FILE", help="raw samples, arr_0, instead of a picture")
    to.add_argument("--out", metavar="FILE", help="the picture [samples/ beside the checkpoint]")
    add_field_flags(parser, (*MACHINE, "vae_weights"))
    args = parser.parse_args(argv)
    check(args, nfe=1, n=1, batch=1, seed=0)
    if args.stochastic and args.solver == "heun":
        raise UserError("--stochastic and --solver heun exclude each other; leave one out")
    if (args.npz or args.trajectory) and len(args.nfe) > 1:
        raise UserError("--npz and --trajectory take one --nfe; run them once for each")
    if bool(args.npz) + args.trajectory + args.gif > 1:
        raise UserError("--npz, --trajectory and --gif exclude each other; leave one")
    return args


def main(argv=None):
    args = parse(argv)
    machine = {k: tuple(v) if isinstance(v, list) else v
               for k, v in vars(args).items() if k in (*MACHINE, "vae_weights")}
    cfg, path = make_config(**machine), Path(args.checkpoint or find_student(args.dataset))
    beside = path.with_name("teacher.pt")
    wanted = [beside] if args.teacher else [path]
    if args.trajectory and args.teacher is None and beside.exists() and beside != path:
        wanted = [beside, path]
    if args.gif:
        wanted = [beside, path]
    if args.checkpoint and args.dataset:
        trained = checkpoint.load(path)["config"]["dataset"]
        if trained != args.dataset:
            raise UserError(f"{path} was trained on {trained}, not on {args.dataset}; "
                            "leave --dataset out")

    networks = []
    for file in wanted:
        network, content = open_network(file, cfg)
        networks.append((content["kind"].split()[0], network))
    name, network = networks[-1]
    shape, dataset = tuple(content["shape"]), content["config"]["dataset"]
    device, decode = next(network.parameters()).device, open_decoder(content, cfg)
    solver = "stochastic" if args.stochastic else args.solver
    points, nfes = len(shape) == 1, "-".join(map(str, args.nfe))
    batch = args.batch or at_a_time(dataset)

    if args.npz:
        parallel.start(device)
        n = args.n or (50000 if points else 10000)
        each = -(-n // parallel.WORLD)             # this process's samples
        mine = range(min(parallel.RANK * each, n), min((parallel.RANK + 1) * each, n))

        def batches():
            for i in tqdm(mine[::batch], desc=f"{args.nfe[0]} NFE", unit="batch",
                          disable=not parallel.FIRST):
                yield i, decode(draw(network, shape, min(batch, mine.stop - i), args.nfe[0],
                                     args.seed, solver, batch, device, first=i))

        size = FACTOR * shape[-1]
        save_npz(args.npz, batches(), n, shape if decode is same else (3, size, size))
        if parallel.FIRST:
            print(f"wrote {args.npz}: {n} samples of the {name} in {wanted[-1]}, "
                  f"{args.nfe[0]} NFE, {solver}")
        return

    if not parallel.FIRST:                         # a picture is drawn by one process
        return
    if args.gif:
        if not points or name.startswith("teacher"):
            raise UserError("--gif takes a student of points, with the teacher.pt beside it; "
                            "--trajectory shows the path of images")
        out = film(args.out or path.parent / "samples" / "film.gif", networks[0][1], network, shape,
                   args.seed, device, f"{dataset}: samples after so many calls of the network")
        print(f"wrote {out}   from {', '.join(map(str, wanted))}")
        return
    kind = "trajectory" if args.trajectory else name
    suffix = "" if solver == "euler" else f"-{solver}"
    out = args.out or path.parent / "samples" / f"{kind}-nfe{nfes}{suffix}-seed{args.seed}.png"
    title = f"{dataset}, {solver}, seed {args.seed}"
    if args.trajectory:
        trajectory(out, networks, shape, args.nfe[0], args.seed, device, solver, title, decode)
    elif len(args.nfe) > 1:
        strips(out, [(name, network, None)], shape, args.nfe, args.seed, device, solver,
               title=title, columns=args.n or (8 if dataset in LATENT_SETS else 10), decode=decode)
    else:
        n = args.n or (4000 if points else 32 if dataset in LATENT_SETS else 64)
        z = decode(draw(network, shape, n, args.nfe[0], args.seed, solver, batch, device))
        width = 8 if dataset in LATENT_SETS else 16
        rows = [("", name, [z])] if points else [("", name, list(z[i:i + width]))
                                                 for i in range(0, n, width)]
        plots.grid(out, rows, title=f"{name}, {args.nfe[0]} NFE\n{title}")
    print(f"wrote {out}   from {', '.join(map(str, wanted))}")


if __name__ == "__main__":
    run_script(main)
