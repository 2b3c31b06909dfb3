"""What a run on latents will do, need and cost, printed before it begins."""

from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from config import LFM_TEACHER, UNCAPTIONED_SETS
from data import Draws
from harness import UserError, machine
from harness.checkpoint import no_room
from harness.saved import conditions_of
from losses import flow_matching_loss
from model import copy_of, discriminator, velocity_network

GIB = 2**30
ABOUT = "celebahq, folder: time iterations, print what the run will do and need, and stop"


def show(run, only, begin, step):
    """Prints the plan of a new run on celebahq or folder. Returns `only`: whether that is all.

    begin and step are train.begin and train.scflow_step. Iterations are timed on a GPU, or if the
    plan is all. The run's own networks and random numbers do not change. Raises UserError if the
    disk is too small for what the run will keep.
    """
    cfg, device = run.cfg, run.device
    if only and cfg.dataset not in UNCAPTIONED_SETS:
        raise UserError(f"--plan is for {' and '.join(UNCAPTIONED_SETS)}; leave it out")
    if cfg.dataset not in UNCAPTIONED_SETS or cfg.resume and not only:
        return False
    cuda, seconds = device.type == "cuda", []
    paths = cfg.teacher_checkpoint, run.path("teacher"), Path("runs", cfg.dataset, "teacher.pt")
    teacher = next((path for path in paths if path and Path(path).exists()), None)
    with torch.random.fork_rng(devices=[device] if cuda else []):
        theta, disc, memory = sizes(cfg, run.shape)
        if (only or cuda) and cfg.method in ("scflow", "cd"):
            seconds.append(measured(cfg, cfg.batch_size, device,
                                    lambda cfg: iteration(cfg, run.shape, device, begin, step)))
            if not teacher:
                seconds.append(measured(cfg, cfg.teacher_batch_size, device,
                                        lambda cfg: pretraining(cfg, run.shape, device)))
    if seconds and cuda:
        memory += f"; measured: {torch.cuda.max_memory_allocated() / GIB:.3g}"
        torch.cuda.empty_cache()
    if machine.FIRST:
        name = torch.cuda.get_device_name(device) if cuda else device
        print(f"plan of {run.folder}: {cfg.dataset}, --model {cfg.model}",
              f"device     {name}, {machine.WORLD} process{'es' * (machine.WORLD > 1)}",
              f"precision  {precision(cfg, device)}" + "; this device has no fast bf16, so teacher "
              "and samples take more time and memory" * (
                  cfg.precision == "auto" and not machine.fast_bf16(device)),
              f"networks   student {theta / 1e6:,.1f} M parameters, as its teacher and averages; "
              f"discriminator {disc / 1e6:,.1f} M",
              f"memory     {memory}",
              f"data       {cfg.data_dir or 'not named'}, encoded once into {cfg.latents_dir}",
              f"teacher    {f'{teacher}, if it fits' if teacher else without_teacher(cfg)}",
              f"student    {cfg.steps:,} iterations of batch {cfg.batch_size}" +
              f", --preset {cfg.preset}" * bool(cfg.preset),
              f"time       {hours(cfg, seconds)}", sep="\n  ", flush=True)
        # a student's state: theta, theta~, EMA, Adam's two moments; three while one is replaced
        every, need = cfg.keep_every, 3 * 4 * (5 * theta + 3 * disc)
        kept = (cfg.steps + (0 if teacher else cfg.teacher_steps)) // every if every else 0
        need += 4 * theta * ((0 if teacher else 8) + 2 + kept)
        no_room(run.folder, need, "what the run will keep", "choose another folder with --out")
    machine.wait()                                 # if rank 0 has failed, all stop
    return only


def precision(cfg, device):
    """In which precision the networks compute, in words."""
    tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32 and (
        torch.cuda.get_device_capability(device)[0] >= 8)      # from Ampere on
    fp32 = "fp32" + " (TF32 in convolutions, not in matrix products)" * tf32
    student, other = ("bf16" if machine.wants_bf16(cfg, device, distilled) else fp32
                      for distilled in (True, False))
    return student if student == other else f"student {student}, teacher and samples {other}"


def without_teacher(cfg):
    """What happens if there is no teacher yet, in words."""
    lfm = f";\n             LFM's: {LFM_TEACHER}" if cfg.model == "paper" else ""
    return (f"none yet: trained first, {cfg.teacher_steps:,} iterations of batch "
            f"{cfg.teacher_batch_size};\n             --teacher-checkpoint FILE skips this{lfm}")


def hours(cfg, seconds):
    """The time of all iterations, in words; seconds are those of one, of student and teacher."""
    parts = zip(seconds, ("student", "teacher"), (cfg.steps, cfg.teacher_steps))
    return ", ".join(f"about {float(f'{one * steps / 3600:.2g}'):,g} hours for the {name} "
                     f"({one:.3g} s per iteration)" for one, name, steps in parts) or (
        "unknown; add --plan to time iterations (of --method scflow or cd)")


# ------------------------------------------------------------------------------ memory and time


def sizes(cfg, shape):
    """(parameters of a velocity network, those of D, memory of training in words), counted."""
    network, disc = velocity_network(cfg, shape).train(), discriminator(cfg, shape)
    theta, d = (sum(p.numel() for p in x.parameters()) for x in (network, disc))
    z, t, n = torch.randn(1, *shape), torch.rand(1), cfg.batch_size // machine.WORLD

    def recompute(recomputed):
        network.checkpointing, network.again = True, recomputed

    kept = kept_bytes(network, lambda: network(z, t), recompute if cfg.checkpointing else None)
    kept = n * (3 * kept / cfg.grad_accum + kept_bytes(disc, lambda: disc(z))) / GIB
    # fp32: teacher, theta, its gradient, theta~, the EMA, and Adam's two moments
    state = theta * (28 - 4 * cfg.ema_on_cpu - 6 * cfg.adam8bit) + d * (16 - 6 * cfg.adam8bit)
    return theta, d, (f"about {state / GIB + kept:.3g} GiB per process: {state / GIB:.3g} for "
                      f"networks and optimisers, {kept:.3g} for activations")


def kept_bytes(network, function, checkpoint=None):
    """Bytes that function() keeps for the backward pass beside the network's parameters.

    `checkpoint(recomputed)` makes the network call recomputed(block, *inputs) for each of its
    blocks, of which then only the inputs are kept.
    """
    kept = {p.untyped_storage()._cdata: (0, p) for p in network.parameters()}

    def keep(tensor):
        if torch.is_tensor(tensor):                # the tensor is held, or its address comes again
            storage = tensor.untyped_storage()
            kept.setdefault(storage._cdata, (storage.nbytes(), tensor))
        return tensor

    def recomputed(block, *inputs):
        for tensor in inputs:
            keep(tensor)
        with torch.autograd.graph.saved_tensors_hooks(id, id):
            return block(*inputs)

    if checkpoint:
        checkpoint(recomputed)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(size for size, _ in kept.values())


def iteration(cfg, shape, device, begin, step):
    """A function that makes one training iteration on noise, with all losses in use."""
    teacher = copy_of(velocity_network(cfg, shape))
    net = begin(teacher, teacher, cfg, shape, device)
    batch = noise(cfg, cfg.batch_size, shape, device, teacher)
    draws, late = Draws(0, device=device), max(cfg.n_gan, cfg.n_rf, cfg.n_bi)
    return lambda: step(net, batch, late, cfg, draws)["cd"].item()


def pretraining(cfg, shape, device):
    """A function that makes one iteration of the teacher on noise, without AdamW's few per cent."""
    network = machine.share(machine.prepare(velocity_network(cfg, shape), cfg, device))
    z1, y = noise(cfg, cfg.teacher_batch_size, shape, device, network)
    t = torch.rand(len(z1), device=device)

    def function():
        loss = flow_matching_loss(network(z1, t, y), z1, z1)
        loss.backward()
        loss.item()
    return function


def noise(cfg, n, shape, device, network):
    """(noise (n, *shape), conditions) for a process's part of a batch of n."""
    n, y = n // machine.WORLD, None
    if cfg.dataset == "captioned":
        y = torch.randn(n, *network.null.shape, device=device)
    elif cfg.num_classes:
        y = conditions_of(cfg)(n).to(device)
    return torch.randn(n, *shape, device=device), y


def measured(cfg, batch, device, make):
    """Seconds per iteration of make(cfg), with `batch` samples on all processes.

    On a CPU, ten iterations of a large network take hours. So one of a single sample is timed
    first. If the whole batch would take more than 5 s, the answer is the batch times this.
    """
    if device.type == "cpu":
        single = replace(cfg, batch_size=machine.WORLD, teacher_batch_size=machine.WORLD,
                         grad_accum=1)
        seconds = median_seconds(make(single), calls=1) * batch / machine.WORLD
        if seconds > 5:
            return seconds
    return median_seconds(make(cfg))


def median_seconds(function, calls=10):
    """Median of `calls` calls, which must wait for their result, after two that warm up."""
    times = [perf_counter()]
    for _ in range(2 + calls):
        function()
        times.append(perf_counter())
    return median(b - a for a, b in zip(times[2:], times[3:]))
