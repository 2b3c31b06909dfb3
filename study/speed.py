"""What training and sampling cost on this machine: `python -m study.speed --dataset mnist`.

Random weights, and noise for data: the time does not depend on them. All settings are flags, so
compare, for example, `--precision fp32` with `--precision bf16`.
"""

import sys
from dataclasses import replace

import torch
from torch.utils.benchmark import Timer

import data
import sample
import train
import vae
from config import CAPTION_SETS, LATENT_SETS
from harness.machine import choose_device, fast_bf16, wants_bf16
from harness.saved import conditions_of
from harness.script import parse_config, run_script
from latents import Codec
from model import copy_of, velocity_network
from vae import AUTOENCODERS

try:
    import resource
except ImportError:                # Windows
    resource = None


def costs(cfg, device):
    """[(what, function to time), ...]: a training iteration, a sampling step, the decoder."""
    shape, n = data.sample_shape(cfg), cfg.batch_size
    teacher = copy_of(velocity_network(cfg, shape))
    net = train.begin(teacher, teacher, cfg, shape, device)
    z0, draws = torch.randn(n, *shape, device=device), data.Draws(0, device=device)
    y = conditions_of(cfg)(n) if cfg.num_classes else None
    if cfg.dataset == "captioned":
        y = torch.randn(n, *teacher.null.shape, device=device)
    late = max(cfg.n_gan, cfg.n_rf, cfg.n_bi)      # all losses are in use from this iteration on

    def iteration():
        train.scflow_step(net, (z0, y), late, cfg, draws)["cd"].item()

    def sampling():
        sample.draw(net.ema, shape, n, 1, batch=n, device=device, y=y)

    functions = [("a training iteration", iteration), ("sampling, per network call", sampling)]
    if cfg.dataset in LATENT_SETS:
        network = vae.of(cfg) if cfg.vae == "pipeline" else AUTOENCODERS[cfg.vae][0]()
        codec = Codec(network.eval().requires_grad_(False), cfg, device)
        functions.append((f"decoding ({cfg.vae})", lambda: codec.decode(z0)))
    return functions


def peak_memory(device):
    """Peak memory of this process in GB, on the GPU if there is one; None if it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024             # bytes on macOS, else kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def main(argv=None):
    cfg, _ = parse_config(__doc__, argv)
    if cfg.dataset in CAPTION_SETS:
        cfg = data.with_classes(cfg)
    device = choose_device(cfg)
    if wants_bf16(cfg, device) and not fast_bf16(device):
        print(f"bf16 is skipped: this {device.type} has no bf16 in hardware; fp32 instead")
        cfg = replace(cfg, precision="fp32")
    precision = "bf16" if wants_bf16(cfg, device) else "fp32"
    threads = torch.get_num_threads()

    print(f"{cfg.dataset}, batch {cfg.batch_size}, {precision}, {device}, {threads} threads, "
          "medians\n")
    for what, function in costs(cfg, device):
        timer = Timer("function()", globals={"function": function}, num_threads=threads)
        seconds = timer.blocked_autorange().median             # after a first call to warm up
        print(f"{what:<28} {1000 * seconds:10.1f} ms {cfg.batch_size / seconds:10.1f} samples/s")
    if memory := peak_memory(device):
        print(f"\npeak memory: {memory:.1f} GB")


if __name__ == "__main__":
    run_script(main)
