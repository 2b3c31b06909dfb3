"""What everything costs on this machine: `python evaluate.py --speed [--dataset mnist]`.

Random weights and noise for data, all losses in use: the time does not depend on them. Everything
is taken in turns, several times, and the median counts, since machines drift.
"""

import resource
import statistics
import sys
import time
from dataclasses import replace

import torch
from tqdm import tqdm

import data
import sample
import train
import vae as autoencoders
from config import LATENT_SETS, POINT_SETS
from losses import r1_penalty
from model import CORES, choose_device, copy_of, ema_update, velocity_network


def medians(functions, device, rounds, warmup=1, desc="rounds"):
    """{name: median seconds} of {name: function}, each called once a round, in turns."""
    seconds = {name: [] for name in functions}
    for i in tqdm(range(rounds + warmup), desc=desc):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= warmup:                        # the first ones allocate, tune and compile
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def report(cfg):
    """Prints the cost of a training iteration, of its parts, and of sampling."""
    shape, device = data.sample_shape(cfg), choose_device(cfg)
    rounds = 5 if cfg.dataset in LATENT_SETS else 7
    ways(cfg, shape, rounds)
    if cfg.dataset not in POINT_SETS:
        for precision in ("fp32", "bf16"):
            parts(replace(cfg, precision=precision), shape, device, rounds)
    sampling(cfg, shape, device)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:                                          # kilobytes, but bytes on macOS
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    print(f"\npeak memory of all this: {peak:.1f} GB")


def begin(cfg, shape):
    """Networks, optimisers, a batch and the draws of an iteration, as training has them."""
    device = choose_device(cfg)
    net = train.begin(copy_of(velocity_network(cfg, shape)), cfg, shape, device)
    return net, torch.randn(cfg.batch_size, *shape, device=device), data.Draws(0, device=device)


def ways(cfg, shape, rounds):
    """Prints the seconds of an iteration for each way to run it."""
    large = cfg.dataset in LATENT_SETS
    choices = [("fp32", False, False), ("bf16", False, False)]
    if len(shape) == 3:
        choices += [("fp32", True, False), ("bf16", True, False)]
        choices += [] if large else [("bf16", False, True)]
    functions, step = {}, max(cfg.n_gan, cfg.n_rf, cfg.n_bi)
    for precision, channels_last, compiled in choices:
        for threads in {1, CORES} if not (compiled or large) else {CORES}:
            own = replace(cfg, precision=precision, channels_last=channels_last, compile=compiled,
                          threads=threads)
            name = f"{precision} {'NHWC' if channels_last else 'NCHW'} {threads} threads"

            def iterate(own=own, state=begin(own, shape)):
                choose_device(own)                 # sets the number of threads
                net, z0, draws = state
                train.scflow_step(net, z0, None, step, own, draws)["cd"].item()
            functions[name + (" compiled" if compiled else "")] = iterate
            if large:                              # one at a time, or the memory would not suffice
                show(medians({name: functions.pop(name)}, choose_device(own), rounds), cfg, rounds)
    if functions:
        show(medians(functions, choose_device(cfg), rounds), cfg, rounds)


def show(times, cfg, rounds):
    best = min(times.values())
    print(f"\n{cfg.dataset}: a training iteration, batch {cfg.batch_size}, median of {rounds}")
    for name, seconds in times.items():
        print(f"{name:<34} {1000 * seconds:9.1f} ms   {seconds / best:5.2f}")


def parts(cfg, shape, device, rounds):
    """Prints an iteration beside the sum of its parts, each timed alone in the same rounds."""
    net, z0, draws = begin(cfg, shape)
    t, step = torch.rand(len(z0), device=device), max(cfg.n_gan, cfg.n_rf, cfg.n_bi)
    theta, real = list(net.student.parameters()), z0.clone().requires_grad_()
    two, t2 = torch.cat([z0, z0]), torch.cat([t, t])

    def student(z, t):
        net.student(z, t).mean().backward()

    def disc():
        d_real, d_fake = net.disc(real), net.disc(z0)
        (d_real.mean() - d_fake.mean() + r1_penalty(d_real, real)).backward()

    def through_disc():
        net.disc(real).mean().backward(inputs=[real])

    def forward(network, z, t):
        with torch.no_grad():
            network(z, t)

    def optimisers():
        net.opt.step()
        net.opt_disc.step()

    functions = {
        "teacher, B forward": lambda: forward(net.teacher, z0, t),
        "theta~, 2B forward": lambda: forward(net.target, two, t2),
        "student, 2B forward and backward": lambda: student(two, t2),
        "student, B forward and backward": lambda: student(z0, t),
        "discriminator with R1": disc,
        "GAN's gradient through it": through_disc,
        "gradient norm": lambda: torch.nn.utils.get_total_norm([p.grad for p in theta]),
        "two optimisers": optimisers,
        "two EMAs": lambda: (ema_update(net.target, net.student, cfg.mu),
                             ema_update(net.ema, net.student, cfg.ema)),
    }
    whole = "iteration"
    functions[whole] = lambda: train.scflow_step(net, z0, None, step, cfg, draws)
    # the iteration leaves no gradients, which the parts before it need again
    functions["(gradients)"] = lambda: (student(z0, t), disc())
    functions["(gradients)"]()
    times = medians(functions, device, rounds)
    del times["(gradients)"]
    total = sum(s for name, s in times.items() if name != whole)
    print(f"\n{cfg.dataset}: the parts of an iteration, batch {cfg.batch_size}, "
          f"{'bf16' if net.student.bf16 else 'fp32'}, median of {rounds}")
    for name, seconds in times.items():
        print(f"{name:<34} {1000 * seconds:9.1f} ms")
    print(f"{'sum of the parts':<34} {1000 * total:9.1f} ms   "
          f"iteration / sum = {times[whole] / total:.2f}")
    if cfg.dataset in LATENT_SETS:
        codec, images = random_codec(cfg, device), torch.rand(
            cfg.batch_size, 3, cfg.image_size, cfg.image_size) * 2 - 1
        (seconds,) = medians({"encode": lambda: codec.encode(images)}, device, 3).values()
        print(f"{'encoding the batch, were it not cached':<34} {1000 * seconds:9.1f} ms   "
              f"({cfg.vae}) an iteration would take {1 + seconds / times[whole]:.2f} times as long")


def random_codec(cfg, device):
    """The autoencoder of the settings with random weights: its time is that of the real one."""
    from latents import Codec
    return Codec(autoencoders.AUTOENCODERS[cfg.vae][0]().eval().requires_grad_(False), cfg, device)


def sampling(cfg, shape, device):
    """Prints images a second by Euler, and the decoder's share of the time."""
    network = train.begin(copy_of(velocity_network(cfg, shape)), cfg, shape, device).ema
    n = cfg.batch_size if cfg.dataset in LATENT_SETS else 256
    functions = {f"{k} NFE": lambda k=k: sample.draw(network, shape, n, k, batch=n, device=device)
                 for k in (1, 2, 4, 50)}
    if cfg.dataset in LATENT_SETS:
        codec, z0 = random_codec(cfg, device), torch.randn(n, *shape)
        functions["decode"] = lambda: codec.decode(z0)
    times = medians(functions, device, 3)
    decode = times.pop("decode", None)
    print(f"\n{cfg.dataset}: images a second, {n} at a time")
    for name, seconds in times.items():
        line = f"{name:<10} {n / seconds:9.2f}"
        if decode is not None:
            line += (f"   with decoding ({cfg.vae}) {n / (seconds + decode):9.2f}, of which the "
                     f"decoder takes {100 * decode / (seconds + decode):.0f} %")
        print(line)
