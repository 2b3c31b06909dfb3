"""The paper's tables as grids of runs: `python -m study.ablation losses`.

    losses   Table 4: CD, + GAN and truncation (as we read it), + RF, + BI; draws Figure 6
    weights  Table 5: the weights of GAN, RF and BI, changed together; ours: one at a time
    times    Table 6: t_trunc, mu and t_skip, one changed at a time
    methods  Table 3: SCFlow and the baselines, all with the same compute
    fgm      FGM with SCFlow's and with RealUID's recipe, with the same compute as SCFlow
    guidance w against t_trunc, with CD alone and with all losses (needs --condition); draws both

Rows that the paper's table does not have are marked (ours); flowmap and fgm are ours, too. Each
cell is a run in runs/ablation/<dataset>/ with its measurements. Finished cells are kept, stopped
ones continue, and tables share the runs that they have in common. `--only teacher`, then several
processes with --only and other rows, fill a table in parallel; the same command without --only
then collects it.
"""

import json
import math
import re
import statistics
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import data
import evaluate
import sample
import teacher
import train
from config import CIFAR10_FGM, DATASETS, Config, make_config, words
from harness import UserError, pictures
from harness.checkpoint import write_text
from harness.log import Diverged
from harness.machine import choose_device
from harness.pictures import COLOURS, STYLE, plt
from harness.run import Run
from harness.script import given_flags, make_parser, run_script
from study import baselines

ROOT = Path("runs/ablation")
TABLES = {"losses": "Table 4, the losses one after the other",
          "weights": "Table 5, weights of GAN, RF and BI", "times": "Table 6, times and averages",
          "methods": "Table 3, methods with the same compute", "fgm": "recipes of FGM",
          "guidance": "guidance against truncation"}
OURS = " (ours)"                   # marks a row that the paper's table does not have
WEIGHTS = [(1.0, 1.0, 1.0), (0.4, 0.4, 0.4), (0.2, 0.2, 0.2), (0.1, 0.1, 0.1), (1.0, 0.1, 0.1),
           (0.1, 1.0, 1.0)]        # l_gan, l_rf, l_bi of Table 5
TIMES = {"t_trunc": (0.0, 0.1, 0.2, 0.4, 0.5), "mu": (0.9, 0.95), "t_skip": (0.1, 0.2)}   # Table 6
MORE_TIMES = {"mu": (0.0,), "t_skip": (0.02,)}
GUIDANCE, TRUNCATION = (1.0, 1.5, 3.0), (0.1, 0.2, 0.4)        # w and t_trunc of that table
# settings that the table itself chooses; all others are flags
CHOSEN = ("dataset", "out", "seed", "resume", "overwrite", "download", "method", "losses",
          "teacher_checkpoint")


def cells(kind, default):
    """{label: the settings that differ from the data set's own}, in the order of the table."""
    if kind == "losses":
        other = "fixed" if default.rf_x1 == "free" else "free"
        return {"CD": dict(losses=("cd",), t_trunc=0.0),
                "CD, truncation" + OURS: dict(losses=("cd",), t_trunc=default.t_trunc),
                "+ GAN" + OURS: dict(losses=("cd", "gan"), t_trunc=0.0),
                "+ GAN, truncation": dict(losses=("cd", "gan")),
                "+ RF": dict(losses=("cd", "gan", "rf")), "+ BI (all)": {},
                f"all, x1 {other}" + OURS: dict(rf_x1=other),
                "all without CD" + OURS: dict(losses=("gan", "rf", "bi"))}
    if kind == "methods":
        return {"SCFlow": {}, "cd": dict(method="cd", t_trunc=0.0),
                **{m: dict(method=m) for m in baselines.STEPS}}
    if kind == "guidance":
        return {f"{name}, w = {w:g}, t_trunc = {t:g}": dict(guidance=w, t_trunc=t, **losses)
                for name, losses in (("CD", dict(losses=("cd",))), ("all", {}))
                for w in GUIDANCE for t in TRUNCATION}
    if kind == "fgm":
        return {f"alpha = {alpha:g}, {name}": dict(method="fgm", fgm_alpha=alpha, **recipe)
                for name, recipe in fgm_recipes(default).items() for alpha in (1.0, 0.5)}
    if kind == "times":
        return {f"{name} = {value:g}{mark}": {name: value} for name in TIMES
                for mark, table in (("", TIMES), (OURS, MORE_TIMES))
                for value in table.get(name, ())}
    names = ("l_gan", "l_rf", "l_bi")
    table = {"{:g}, {:g}, {:g}".format(*row): dict(zip(names, row)) for row in WEIGHTS}
    if tuple(getattr(default, name) for name in names) not in WEIGHTS:
        table["default" + OURS] = {}
    return table | {f"{name} = {value:g}{OURS}": {name: value} for name in names
                    for value in (0.0, rounded(3 * getattr(default, name)))}


def fgm_recipes(default):
    """{name: settings}: SCFlow's, and RealUID's with SCFlow's learning rates divided by 1, 3, 10.

    RealUID has 3e-5 for a UNet of CIFAR-10, which tells nothing of the rate that another needs.
    """
    realuid = dict(betas=(0.0, 0.999), disc_betas=(0.0, 0.999), fgm_clip=1.0)
    # cifar10 has RealUID's recipe for fgm, so SCFlow's is named
    scflow = {name: getattr(default, name) for name in CIFAR10_FGM if name != "fgm_alpha"}
    return {"SCFlow's recipe": scflow} | {
        f"RealUID's, rates / {k}": realuid | dict(lr=rounded(default.lr / k),
                                                  disc_lr=rounded(default.disc_lr / k))
        for k in (1, 3, 10)}


def rounded(value):
    return float(f"{value:.3g}")


def folder_name(settings, default):
    """A folder's name for the settings of a cell: what differs from the default."""
    gan = settings.get("method") != "cd" and "gan" in settings.get("losses", default.losses)
    usual = {**vars(default), "t_trunc": default.t_trunc if gan else 0.0}
    return "-".join(f"{k}-{words(v).replace(' ', '-')}" for k, v in settings.items()
                    if v != usual[k]) or "scflow"


# ------------------------------------------------------------------------------- equal compute


def passes(cfg, step):
    """The compute of iteration `step`, in forward passes of one batch through the network.

    A backward pass counts 2 if it reaches the weights, and 1 if it only reaches the inputs. The
    discriminator is not counted; FGM's online flow, a full velocity network, is.
    """
    learn, frozen = 3, 2                           # forward and backward, with and without weights
    teacher = 1 if cfg.guidance == 1 else 2        # a guided teacher is called twice
    if cfg.method in ("reflow", "reflow-distill"):
        return learn
    if cfg.method == "fgm":                        # generate, step the online flow; then theta
        return baselines.FAKE_STEPS * (1 + learn) + learn + frozen + teacher * frozen
    use = train.losses_in_use(cfg, step)
    predictions = 1 + bool(use & {"gan", "rf"}) + ("rf" in use)    # f(zt, t), f(z1, 1), f(zr, t)
    return teacher + (1 + ("bi" in use)) + learn * predictions     # phi, theta~, theta


def for_pairs(cfg):
    """The compute of making the pairs, in the same units; reflow-distill makes them twice."""
    teacher = 1 if cfg.guidance == 1 else 2
    times = {"reflow": teacher, "reflow-distill": teacher + 1}.get(cfg.method, 0)
    return times * cfg.pairs * cfg.pair_steps / cfg.batch_size


def compute(cfg):
    """The compute of a whole run, in the same units."""
    return for_pairs(cfg) + sum(passes(cfg, step) for step in range(cfg.steps))


def equal_compute(cfg, scflow):
    """A baseline's settings, with as many iterations as the compute of SCFlow's run pays for.

    Raises UserError if these are fewer than 100.
    """
    budget = compute(scflow) * scflow.batch_size / cfg.batch_size    # in passes of cfg's batch
    steps = int((budget - for_pairs(cfg)) / passes(cfg, 0))
    if steps < 100:
        raise UserError(f"{cfg.method} would have fewer than 100 iterations in the {budget:,.0f} "
                        f"network passes of SCFlow's run, of which making pairs takes "
                        f"{for_pairs(cfg):,.0f}; choose more --steps, or fewer --pairs or "
                        "--pair-steps")
    return replace(cfg, steps=steps)


def costs(trained, batch):
    """A table of what every cell's training took, in passes of `batch` samples.

    trained: {label: [(Config, seconds), ...]}.
    """
    lines = [["run", "iterations", "passes per iteration", "passes in all", "seconds"]]
    for label, runs in trained.items():
        cfg, seconds = runs[0][0], " ".join(f"{seconds:,.0f}" for _, seconds in runs if seconds)
        ratio = cfg.batch_size / batch
        each = (compute(cfg) - for_pairs(cfg)) / cfg.steps * ratio
        lines.append([label, f"{cfg.steps:,}", f"{each:.3g}", f"{compute(cfg) * ratio:,.0f}",
                      seconds])
    return (f"compute in network passes of {batch} samples, pairs included, the discriminator "
            f"apart\n\n{evaluate.markdown(lines)}")


# ------------------------------------------------------------------------------------- one table


def runs(kind, dataset, seeds, given, only, diverged):
    """Trains what is missing; yields (label, seed, path of a teacher.pt or student.pt) in turn.

    `only` names the rows to train, all if empty. Appends a sentence to `diverged` for each cell
    whose loss became nan.
    """
    root, default = ROOT / dataset, make_config(dataset, **given)
    table = cells(kind, default)
    if unknown := set(only) - {"teacher", *table}:
        raise UserError(f"--only {', '.join(sorted(unknown))} is no row of {kind}; its rows are: "
                        f"{'; '.join(['teacher', *table])}")
    for seed in seeds:
        run = Run(make_config(dataset, **given, seed=seed, out=str(root / f"teacher-{seed}")),
                  go_on=True)
        phi = run.find_teacher()
        if phi != run.path("teacher"):             # processes with --only share the finished one
            with run:
                phi = teacher.find_or_train(run)
        yield "teacher", seed, phi

        for label, settings in table.items():
            if only and label not in only:
                continue
            cfg = make_config(dataset, **given | settings, seed=seed, teacher_checkpoint=str(phi),
                              out=str(root / f"{folder_name(settings, default)}-{seed}"))
            if kind in ("methods", "fgm") and cfg.method != "scflow":
                cfg = equal_compute(cfg, default)
            print(f"\n{cfg.out}")
            try:
                with Run(cfg, go_on=True) as run:
                    path = train.train(run)
            except Diverged as e:
                diverged.append(f"{label}, seed {seed}: {str(e).split(',')[0]}")
            else:
                yield label, seed, path


def measured(path, label, nfes, network, reference, settings, seed):
    """The rows of evaluate.measure for a checkpoint, kept in a file beside it."""
    w = f"-w{network.w:g}" if sample.calls(network) > 1 else ""
    file = path.with_name(f"{path.stem}{w}-measured.json")
    key = dict(nfes=nfes, n=settings["n"], solver=settings["solver"], seed=seed,
               metric=reference.name, data=f"{reference.data.double().sum().item():.6g}")
    if file.exists() and file.stat().st_mtime >= path.stat().st_mtime:
        with suppress(ValueError, KeyError, TypeError):        # damaged: they are measured again
            content = json.loads(file.read_text())
            if content["key"] == key:
                return [row | {"network": label} for row in content["rows"]]
    rows = evaluate.measure(label, network, nfes, reference, seed=seed, **settings)
    write_text(file, json.dumps({"key": key, "rows": rows}, indent=1, allow_nan=False))
    return rows


def make_table(args, given):
    """Trains and measures the cells of a table, prints it, and draws the picture that it has."""
    default, root = data.with_classes(make_config(args.dataset, **given)), ROOT / args.dataset
    if args.kind == "guidance" and default.condition == "none":
        raise UserError("the table of guidance needs conditions; add --condition class")
    shape, machine = data.sample_shape(default), given_flags(args, evaluate.OPENING)
    rows, trained, ladder, diverged, reference = [], {}, [], [], None

    seeds = range(args.seed, args.seed + args.seeds)
    for label, seed, path in runs(args.kind, args.dataset, seeds, given, args.only, diverged):
        network, content, cfg = sample.open_network(path, **machine)
        if reference is None:
            reference, settings, best = evaluate.prepare(
                default, shape, choose_device(cfg), args.n, args.solver, args.features, args.batch)
        nfes = sorted({*args.nfe, best}) if label == "teacher" else args.nfe
        several = GUIDANCE if label == "teacher" and args.kind == "guidance" else (None,)
        for w in several:
            guided = sample.with_guidance(network, content, cfg, w)
            rows += measured(path, label if w is None else f"{label}, w = {w:g}", nfes, guided,
                             reference, settings, seed)
        if label != "teacher":
            trained.setdefault(label, []).append((cfg, content.get("seconds", 0)))
        if seed == args.seed and args.kind == "losses" and OURS not in label:
            ladder.append((label, network, (1, 4)))

    text = evaluate.report(args.dataset, reference, rows, args.solver)
    spent = costs(trained, default.batch_size)
    part = [*args.only, str(args.seed)] if args.only else []
    name = re.sub(r"[^\w.]+", "-", " ".join([args.kind, *part]))
    evaluate.write(args.out or root / name, args.dataset, reference, rows,
                   "\n\n".join([f"{TABLES[args.kind]}: {text}", spent, *diverged]),
                   ablation=args.kind, seeds=args.seeds, solver=args.solver, diverged=diverged,
                   costs=spent)
    if len(ladder) > 2:                            # more than the teacher and one row
        points = len(shape) == 1
        picture = sample.strips(root / "figure6.png", ladder, shape, (1, 4), args.seed,
                                settings["device"], columns=None if points else 8,
                                decode=settings["decode"], across=points,
                                conditions=sample.conditions_of(default),
                                title=f"{args.dataset}: the losses one after the other (Figure 6)")
        print(f"wrote {picture}")
    if args.kind == "guidance" and not args.only:
        print(f"wrote {guidance_picture(root / 'guidance.png', rows, reference.name)}")


def guidance_picture(file, rows, distance):
    """Draws spread and distance of one call over t_trunc, one line per w; dashed: the teachers."""
    def median(measure, network, nfe):
        found = [r[measure] for r in rows if r["network"] == network and r["nfe"] == nfe]
        return statistics.median(found) if found else math.nan

    most = max(r["nfe"] for r in rows)             # the teacher's calls at its best
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(2, 2, figsize=(9.2, 6), sharex=True, sharey="row")
        names = "std / data's std", distance.split(",")[0]
        for line, measure, name in zip(axes, ("spread", "distance"), names):
            for ax, losses in zip(line, ("CD", "all")):
                for w, colour in zip(GUIDANCE, COLOURS.values()):
                    students = [median(measure, f"{losses}, w = {w:g}, t_trunc = {t:g}", 1)
                                for t in TRUNCATION]
                    ax.plot(TRUNCATION, students, marker="o", ms=4, c=colour, label=f"w = {w:g}")
                    ax.axhline(median(measure, f"teacher, w = {w:g}", most), c=colour, ls="--",
                               lw=1)
            line[0].set_ylabel(name)
        axes[0, 0].set_title("CD with truncation alone, 1 NFE")
        axes[0, 1].set_title("all losses, 1 NFE")
        for ax in axes[1]:
            ax.set(xlabel="t_trunc", xticks=TRUNCATION)
        axes[0, 0].legend(frameon=False, title=f"dashed: teacher, {most} NFE")
        return pictures.write(fig, file)


def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("kind", choices=tuple(TABLES), help="which table")
    parser.add_argument("--dataset", default=Config.dataset, help="[%(default)s]",
                        choices=[name for name in DATASETS if name != "captioned"])
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="train and measure "
                        "these rows alone, and the teacher; writes a table of its own")
    names = [f.name for f in fields(Config) if f.name not in CHOSEN]
    args = evaluate.parse(parser, argv, names, "train each cell with so many seeds; the table "
                          "shows medians and half the range [1]", "runs/ablation/DATASET/KIND")
    make_table(args, given_flags(args, names))


if __name__ == "__main__":
    run_script(main)
