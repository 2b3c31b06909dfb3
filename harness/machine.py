"""The machine: device, precision, memory, and several processes.

    torchrun --standalone --nproc_per_node=8 train.py --dataset celebahq

torchrun starts the same script once per GPU and tells each process its rank. Every process makes
the random numbers of the whole batch and takes its own slice (data.Draws). PyTorch's
DistributedDataParallel averages the gradients, and rank 0 writes the files. So the number of
processes changes a run by rounding alone. With one process, nothing of this happens.
"""

import os
import signal
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from config import POINT_SETS
from harness import UserError, first_line


def environment(name, default):
    """An integer that torchrun put into the environment; anything else counts as not set."""
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else default


WORLD = environment("WORLD_SIZE", 1)
RANK = environment("RANK", 0) if WORLD > 1 else 0
LOCAL_RANK = environment("LOCAL_RANK", 0)
FIRST = RANK == 0                  # the process that writes files and prints
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ------------------------------------------------------------------------------------ processes


def start(device):
    """Joins the processes of this run: nccl for tensors on GPUs, gloo for those on CPUs."""
    if WORLD == 1 or dist.is_initialized():
        return
    if "MASTER_ADDR" not in os.environ:
        raise UserError(f"WORLD_SIZE is {WORLD}, but nothing else of torchrun's environment is "
                        "set; start the script by torchrun, or unset WORLD_SIZE")
    # the others wait while rank 0 encodes a data set, which may take hours
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(days=1))
    except RuntimeError as e:                      # another process may have ended already
        raise UserError(f"the processes cannot join ({first_line(e)}); if another one says why, "
                        "fix that") from e


def share(network):
    """The network; its gradients are averaged over the processes in every backward pass."""
    if WORLD == 1:
        return network
    return nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)


def unwrap(network):
    """The network itself, without the wrapper of `share`."""
    return getattr(network, "module", network) if WORLD > 1 else network


def wait():
    """Waits until all processes have called this. If rank 0 has failed, the others exit."""
    if dist.is_initialized():
        together(dist.barrier)


def together(operation, *args):
    """Calls an operation of all processes. If rank 0 has failed, the others exit."""
    try:
        operation(*args)
    except RuntimeError as e:                      # the connection to another process is gone
        if not FIRST:
            raise SystemExit(2) from e
        raise UserError(f"another process has failed, and says why ({first_line(e)})") from e


def mine(n):
    """The part of range(n) that this process takes; in the order of the ranks they are all."""
    world, rank = (WORLD, RANK) if dist.is_initialized() else (1, 0)
    each = -(-n // world)
    return range(min(rank * each, n), min((rank + 1) * each, n))


def gathered(x):
    """x of every process, a list in the order of the ranks; x is anything that can be pickled."""
    if not dist.is_initialized():
        return [x]
    parts = [None] * WORLD
    together(dist.all_gather_object, parts, x)
    return parts


def from_first(function, *args):
    """function(*args), computed by rank 0 alone and told to the others."""
    return gathered(function(*args) if FIRST or not dist.is_initialized() else None)[0]


def mean(x):
    """Mean of a tensor over the processes, so that all log and check the same numbers."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x = x / WORLD
    return x


def on_signal(name, handler):
    """Calls handler at a signal from now on; returns {its number: the handler before}.

    The answer is empty if the signal is not handled: nohup ignores SIGHUP, Windows has none, and
    only the main thread handles signals.
    """
    with suppress(ValueError, AttributeError):
        number = getattr(signal, name)
        if name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
            return {number: signal.signal(number, handler)}
    return {}


def leave():
    """Ends the group of processes, if there is one, when rank 0 has drawn its pictures."""
    wait()
    if dist.is_initialized():
        dist.destroy_process_group()


# ------------------------------------------------------------------------- device and precision


def choose_device(cfg):
    """The device that the settings name; also sets the number of CPU threads.

    Points run on the CPU unless --device says otherwise: their networks are too small for a GPU.
    Raises UserError if the device does not exist.
    """
    name, points = cfg.device, cfg.dataset in POINT_SETS
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cpu" if points else "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{LOCAL_RANK}"
    elif name.startswith("cuda:") and WORLD > 1:
        raise UserError(f"--device {name} would put all {WORLD} processes on one GPU; use "
                        "--device cuda, and each takes its own")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except Exception as e:                         # each backend raises another exception type
        raise UserError(f"this machine has no device {name!r}; --device cpu always works") from e
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)   # a device without an index is refused
        torch.backends.cudnn.benchmark = True      # shapes never change while training
        # In fp32, convolutions round to TF32 (unless --precision fp32), as PyTorch does.
        # Linear layers do not: they embed the time, and cost nothing.
        torch.backends.cudnn.allow_tf32 = cfg.precision != "fp32"
        torch.backends.cuda.matmul.allow_tf32 = False

    # a small MLP gains little from a second thread, and loses much by it on a busy machine
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1 if points else max(CORES // WORLD, 1))
    return device


def moved(tensor, device):
    """A tensor of the CPU on a device; a GPU copies it from pinned memory while it works."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def prepare(network, cfg, device, distilled=False):
    """The network on its device, in its memory format and precision, compiled if asked for.

    All of this stays inside the network's call, so that no line of the method knows of it.
    `distilled` marks theta, its averages and D (see wants_bf16).
    """
    images = cfg.dataset not in POINT_SETS
    network.to(device)
    if cfg.channels_last and images:
        network.to(memory_format=torch.channels_last)
    if isinstance(network, VelocityNetwork):
        network.micro_batches, network.checkpointing = cfg.grad_accum, cfg.checkpointing
        if cfg.checkpointing and hasattr(network, "inner"):    # diffusers has its own
            network.inner.enable_gradient_checkpointing()
        if cfg.compile:
            network.compile()
    network.bf16 = wants_bf16(cfg, device, distilled)
    return network


def save_memory(net, cfg):
    """Less memory for the networks of a run, with the same results.

    The layers of frozen networks that autocast rounds to bf16 in every call are kept in bf16. With
    --ema-on-cpu the average is moved to the CPU.
    """
    teacher = net.teacher.network
    if cfg.dataset == "captioned" and teacher.bf16:            # elsewhere networks are small
        for network in (teacher, *getattr(net.disc, "frozen", ())):
            for layer in network.modules():
                if isinstance(layer, (nn.Linear, nn.Conv2d)):
                    layer.bfloat16()
    if cfg.ema_on_cpu:
        net.ema.cpu()


def wants_bf16(cfg, device, distilled=False):
    """Whether to compute in bf16; `auto` does for images if the device is fast at it.

    But `auto` distils the network of --model paper in float32: CD compares its predictions at
    neighbouring times, and bf16 loses much of their difference (study.precision). Its teacher may
    use bf16, since the step that it makes is no difference, and so may sampling.
    """
    if cfg.precision == "auto":
        exact = cfg.dataset in POINT_SETS or distilled and cfg.model == "paper"
        return not exact and fast_bf16(device)
    return cfg.precision == "bf16"


def fast_bf16(device):
    """Whether the device multiplies bf16 matrices in hardware: NVIDIA GPUs from Ampere on, CPUs
    with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(getattr(torch.cpu, f"_is_{name}_supported", bool)()
                                        for name in ("amx_tile", "avx512_bf16"))


class Network(nn.Module):
    """A network that `prepare` may set to compute in bf16; it returns float32."""

    bf16 = False

    def __call__(self, z, *others):
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.bf16):
            return super().__call__(z, *others).float()


class VelocityNetwork(Network):
    """A network that can also save memory in training.

    With micro_batches > 1 a batch passes in that many parts. Each part is computed again in the
    backward pass, so that only one part's activations are in memory. This is gradient
    accumulation without any change to the method or its result.
    """

    micro_batches, checkpointing = 1, False

    def __call__(self, z, *others):
        whole = super().__call__
        if self.micro_batches == 1:
            return whole(z, *others)
        columns = [[None] * self.micro_batches if x is None else x.chunk(self.micro_batches)
                   for x in (z, *others)]
        return torch.cat([self.again(whole, *part) for part in zip(*columns)])

    def again(self, function, *args):
        """function(*args), computed again in the backward pass instead of kept in memory."""
        if not torch.is_grad_enabled():
            return function(*args)
        return recompute(function, *args, use_reentrant=False, preserve_rng_state=False)
