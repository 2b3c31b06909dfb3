"""What training and sampling cost on this machine: `python -m study.speed --dataset mnist`.

Random weights, and noise for data: the time does not depend on them. All settings are flags, so
compare, for example, `--precision fp32` with `--precision bf16`, `--channels-last`, `--compile`.
"""

from dataclasses import replace

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import data
import sample
import train
import vae
from config import CAPTION_SETS, LATENT_SETS, make_config
from harness import UserError, plan
from harness.machine import choose_device, fast_bf16, prepare, wants_bf16
from harness.script import add_field_flags, given_flags, make_parser, run_script
from latents import Codec
from model import copy_of, velocity_network
from vae import AUTOENCODERS


def iteration(cfg, device):
    return plan.iteration(cfg, data.sample_shape(cfg), device, train.begin, train.scflow_step)


def flops(cfg, device):
    """Operations of a training iteration, without R1 and what --checkpointing and such repeat."""
    function = iteration(replace(cfg, batch_size=1, r1=0.0, compile=False, checkpointing=False,
                                 grad_accum=1), device)
    with FlopCounterMode(display=False) as counter:
        function()
    return cfg.batch_size * counter.get_total_flops()


def costs(cfg, device):
    """[(what, function to time), ...]: a training iteration, a sampling step, the decoder."""
    shape, n = data.sample_shape(cfg), cfg.batch_size
    network = prepare(copy_of(velocity_network(cfg, shape)), cfg, device)
    z0, y = plan.noise(cfg, n, shape, device, network)

    def sampling():
        sample.draw(network, shape, n, 1, batch=n, device=device, y=y)

    functions = [("a training iteration", iteration(cfg, device)),
                 ("sampling, per network call", sampling)]
    if cfg.dataset in LATENT_SETS:
        decoder = vae.of(cfg) if cfg.vae == "pipeline" else AUTOENCODERS[cfg.vae][0]()
        codec = Codec(decoder.eval().requires_grad_(False), cfg, device)
        functions.append((f"decoding ({cfg.vae})", lambda: codec.decode(z0)))
    return functions


def main(argv=None):
    parser = make_parser(__doc__, usage="%(prog)s [flags]")
    parser.add_argument("--peak", type=float, default=0.0, help="the device's peak TFLOP/s; "
                        "the share that training reaches is also printed")
    add_field_flags(parser)
    given = given_flags(parser.parse_args(argv))
    peak, cfg = given.pop("peak"), make_config(**given)
    if cfg.method not in ("scflow", "cd"):
        raise UserError(f"only --method scflow and cd are timed, not {cfg.method}")
    if cfg.dataset in CAPTION_SETS:
        cfg = data.with_classes(cfg)
    device = choose_device(cfg)
    if wants_bf16(cfg, device) and not fast_bf16(device):
        print(f"bf16 is skipped: this {device.type} has no bf16 in hardware; fp32 instead")
        cfg = replace(cfg, precision="fp32")
    threads, operations = torch.get_num_threads(), flops(cfg, device)

    print(f"{cfg.dataset}, batch {cfg.batch_size}, {plan.precision(cfg, device)}, {device}, "
          f"{threads} threads, medians\n")
    for what, function in costs(cfg, device):
        timer = Timer("function()", globals={"function": function}, num_threads=threads)
        least = 3.0 if device.type == "cuda" else 0.2
        seconds = timer.blocked_autorange(min_run_time=least).median   # after a call to warm up
        print(f"{what:<28} {1000 * seconds:10.1f} ms {cfg.batch_size / seconds:10.1f} samples/s")
        if what == "a training iteration":
            rate = operations / seconds / 1e12
            print(f"  {operations / 1e12:.3g} TFLOP, {rate:.3g} TFLOP/s" + (
                f", {100 * rate / peak:.1f} % of {peak:g}" if peak else ""))
    if device.type == "cuda":
        print(f"\npeak memory: {torch.cuda.max_memory_allocated() / plan.GIB:.1f} GiB")


if __name__ == "__main__":
    run_script(main)
