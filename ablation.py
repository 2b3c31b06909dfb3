"""The paper's tables as grids of runs: `python evaluate.py --ablation losses`.

    losses   Table 4, the ladder: CD, + GAN and truncation, + RF, + BI; draws Figure 6
    weights  Table 5: the weights of the losses, one changed at a time
    times    Table 6: t_trunc, t_skip and mu, one changed at a time
    methods  Table 3: SCFlow and the baselines, each for as long as SCFlow takes

A cell is a run in runs/ablation/<dataset>/ with its measurements. Finished cells are kept, and one
that was stopped goes on; runs that several tables share are made once.
"""

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

import baselines
import checkpoint
import data
import evaluate
import sample
import teacher
import train
from config import Config, UserError, make_config, run_dir, teacher_fields, words
from model import choose_device

ROOT = Path("runs/ablation")
TABLES = {"losses": "Table 4, the ladder of losses", "weights": "Table 5, weights of the losses",
          "times": "Table 6, times and averages", "methods": "Table 3, methods"}


def cells(kind, default):
    """{label: the settings that differ from the data set's own}, in the order of the table."""
    if kind == "losses":
        return {"CD": dict(losses=("cd",), t_trunc=0.0),
                "+ GAN, truncation": dict(losses=("cd", "gan")),
                "+ RF": dict(losses=("cd", "gan", "rf")), "+ BI (all)": {}}
    if kind == "methods":
        plain = {"cd": dict(method="cd", t_trunc=0.0)}
        return {"SCFlow": {}, **plain, **{m: dict(method=m) for m in baselines.STEPS}}
    if kind == "times":
        values = {"t_trunc": (0.0, 0.1, 0.2, 0.4, 0.6), "t_skip": (0.02, 0.05, 0.1, 0.2),
                  "mu": (0.0, 0.5, 0.9, 0.99)}
    else:
        values = {name: [float(f"{getattr(default, name) * f:.3g}") for f in (0, 1 / 3, 1, 3)]
                  for name in ("l_gan", "l_rf", "l_bi")}
    table = {"default": {}}
    if kind == "weights":
        table["0.1, 0.1, 0.1 (paper)"] = dict(l_gan=0.1, l_rf=0.1, l_bi=0.1)
    return table | {f"{name} = {value:g}": {name: value} for name, some in values.items()
                    for value in some if value != getattr(default, name)}


def slug(settings):
    """A folder's name for the settings of a cell."""
    if "losses" in settings or "method" in settings:
        settings = {k: v for k, v in settings.items() if k != "t_trunc"}
    return "-".join(f"{k}-{words(v).replace(' ', '-')}" for k, v in settings.items()) or "scflow"


def run(args, given):
    """Trains and measures the cells of `--ablation`, prints their table, draws Figure 6."""
    try:
        make_table(args, given)
    except checkpoint.Interrupted as e:
        raise KeyboardInterrupt("stopped and saved; the same command goes on") from e


def make_table(args, given):
    kind, dataset = args.ablation, args.dataset or Config.dataset
    root, nfes = ROOT / dataset, args.nfe
    default = make_config(dataset, **given)
    shape = data.sample_shape(default)
    rows, trained, pictures, diverged, reference, how = [], {}, [], [], None, None

    for seed in range(args.seed, args.seed + args.seeds):
        own = str(root / f"teacher-{seed}")
        phi = the_teacher(make_config(dataset, **given, seed=seed, out=own))
        network, content = sample.open_network(phi, default)
        if reference is None:
            reference, how = evaluate.prepare(args, default, shape, network)
            how["decode"] = sample.open_decoder(content, default)
        rows += measured(phi, "teacher", evaluate.of_teachers(args, reference), network, reference,
                         how, args.seed)
        pictures += [("teacher", network, (1, 4))] if seed == args.seed else []

        for label, settings in cells(kind, default).items():
            cfg = make_config(dataset, **{**given, **settings}, seed=seed,
                              teacher_checkpoint=str(phi),
                              out=str(root / f"{slug(settings)}-{seed}"))
            if kind == "methods" and cfg.method != "scflow":
                cfg = as_long_as(trained["SCFlow"][-1], cfg, root / "budget.json", phi)
            try:
                path = the_student(cfg)
            except checkpoint.Diverged as e:
                diverged.append(f"{label}, seed {seed}: {str(e).split(',')[0]}")
                continue
            network, content = sample.open_network(path, default)
            rows += measured(path, label, nfes, network, reference, how, args.seed)
            trained.setdefault(label, []).append((content["step"], content["seconds"]))
            pictures += [(label, network, (1, 4))] if seed == args.seed else []

    text = evaluate.report(dataset, reference, evaluate.medians(rows) if args.seeds > 1 else rows,
                           args.solver)
    text = "\n\n".join([f"{TABLES[kind]}: {text}", costs(trained), *diverged])
    print(text)
    evaluate.write(args.out or root / kind, dataset, reference, rows, text, ablation=kind,
                   seeds=args.seeds, solver=args.solver, trained=trained, diverged=diverged)
    if kind == "losses":
        picture = sample.strips(root / "figure6.png", pictures, shape, (1, 4), args.seed,
                                how["device"], columns=8, decode=how["decode"],
                                across=reference.points,
                                title=f"{dataset}: the losses one after the other (Figure 6)")
        print(f"wrote {picture}")


def costs(trained):
    """Iterations and seconds of every cell, a number a seed, as a table."""
    lines = ["| run | iterations | seconds of training |", "|---|---|---|"]
    for label, runs in trained.items():
        steps, seconds = (" ".join(f"{r[i]:,.0f}" for r in runs) for i in (0, 1))
        lines.append(f"| {label} | {steps} | {seconds} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------- one cell


def the_teacher(cfg):
    """The path of the teacher for these settings: found, finished, or trained."""
    own = run_dir(cfg) / "teacher.pt"
    return teacher.find_or_train(go_on(cfg, own, teacher.state_path(own), teacher_fields(cfg)))


def the_student(cfg):
    """The path of a cell's student: kept where it is finished, else trained, or trained on."""
    folder = run_dir(cfg)
    print(f"\n{folder}")
    return train.train(go_on(cfg, folder / "student.pt", folder / "student_resume.pt",
                             train.what_counts(cfg)))


def go_on(cfg, path, state, names):
    """cfg, with resume where there is a state but no result; UserError where it is of others."""
    found = [p for p in (path, state) if p.exists()]
    if found:
        there = checkpoint.config_of(checkpoint.load(found[0]))
        if clash := checkpoint.differences(cfg, there, names):
            raise UserError(f"{found[0]} is of a table with other settings: {clash}; remove its "
                            "folder to train it anew, or give the same flags")
    return replace(cfg, resume=found == [state])


def measured(path, label, nfes, network, reference, how, seed):
    """The rows of evaluate.measure for a checkpoint, kept beside it in a file."""
    kept = path.with_name(f"{path.stem}-measured.json")
    key = dict(nfes=nfes, n=how["n"], solver=how["solver"], seed=seed, metric=reference.name,
               data=f"{reference.data.double().sum().item():.6g}")
    if kept.exists() and kept.stat().st_mtime >= path.stat().st_mtime:
        try:
            content = json.loads(kept.read_text())
            if content["key"] == key:
                return [{**row, "network": label} for row in content["rows"]]
        except (ValueError, KeyError):             # cut short: measured anew
            pass
    rows = evaluate.measure(label, network, nfes, reference, seed=seed, **how)
    evaluate.write_text(kept, json.dumps({"key": key, "rows": rows}, indent=1))
    return rows


# ------------------------------------------------------------------------------- the same time


def as_long_as(scflow, cfg, path, phi):
    """cfg with the number of iterations that takes as long as SCFlow's run, pairs included.

    scflow is its (iterations, seconds). An iteration of both methods is timed for a moment, and the
    number is kept in the file `path`, so that an interrupted table goes on with the same one.
    """
    known = json.loads(path.read_text()) if path.exists() else {}
    name, (steps, seconds) = run_dir(cfg).name, scflow
    if known.get(name, {}).get("scflow") != [steps, seconds]:
        device, shape = choose_device(cfg), data.sample_shape(cfg)
        like = replace(cfg, method="scflow", losses=Config.losses)
        late = min(max(cfg.n_gan, cfg.n_rf, cfg.n_bi), steps)
        today = late * iteration(like, phi, shape, device, 0) + (steps - late) * iteration(
            like, phi, shape, device)
        slower = seconds / today                   # than now, and previews, logs and so on
        stages = {"reflow": ["reflow"], "reflow-distill": ["reflow"] * 5 + ["reflow-distill"]}
        parts = [iteration(replace(cfg, method=m), phi, shape, device)
                 for m in stages.get(cfg.method, [cfg.method])]
        for_pairs = 0.0
        if "reflow" in cfg.method:
            network, k = teacher.load_teacher(phi, cfg, shape), min(cfg.pairs, 500)
            begun = time.perf_counter()
            sample.draw(network.to(device), shape, k, cfg.pair_steps, batch=k, device=device)
            for_pairs = slower * (time.perf_counter() - begun) * cfg.pairs / k
            for_pairs *= 2 if cfg.method == "reflow-distill" else 1
        left = (seconds - for_pairs) / (slower * sum(parts) / len(parts))
        if left < 100:
            raise UserError(f"{cfg.method} would have fewer than 100 iterations in the "
                            f"{seconds:.3g} s of SCFlow's run, {for_pairs:.3g} s of them for "
                            "making pairs; choose more --steps, or fewer --pairs or --pair-steps")
        known[name] = {"scflow": [steps, seconds], "steps": int(left)}
        evaluate.write_text(path, json.dumps(known, indent=1))
    return replace(cfg, steps=known[name]["steps"])


def iteration(cfg, phi, shape, device, number=None, at_most=3.0):
    """Seconds of iteration `number` of a method (None: one after all warm-ups), a median."""
    net = train.begin(teacher.load_teacher(phi, cfg, shape), cfg, shape, device)
    step, _ = baselines.STEPS.get(cfg.method, (train.scflow_step, None))
    draws, z0 = data.Draws(0, device=device), torch.randn(cfg.batch_size, *shape, device=device)
    second = torch.randn_like(z0) if "reflow" in cfg.method else None
    late = max(cfg.n_gan, cfg.n_rf, cfg.n_bi) if number is None else number
    seconds = []
    while sum(seconds) < at_most and len(seconds) < 200:
        begun = time.perf_counter()
        step(net, z0, second, late, cfg, draws)["grad_norm"].item()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)
