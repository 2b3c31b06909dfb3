"""Several processes, by PyTorch's DistributedDataParallel. Skip this file: alone, it does nothing.

    torchrun --standalone --nproc_per_node=8 train.py --dataset celebahq

torchrun starts the same script once a GPU and tells each its rank. Every process makes the random
numbers of the whole batch and takes its own slice (data.Draws); DistributedDataParallel averages
the gradients; rank 0 writes the files. So the number of processes does not change a run.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
FIRST = RANK == 0                  # the process that writes files and talks


def start(device):
    """Joins the processes of this run, over nccl on GPUs and gloo elsewhere."""
    if WORLD > 1 and not dist.is_initialized():
        # the others wait while rank 0 encodes a data set, which may take hours
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(days=1))


def share(network):
    """The network, its gradients averaged over the processes in every backward pass."""
    if WORLD == 1:
        return network
    return torch.nn.parallel.DistributedDataParallel(network)


def own(network):
    """The network itself, without the wrapper of `share`."""
    return getattr(network, "module", network) if WORLD > 1 else network


def wait():
    """Goes on when every process has come here; ends where the first gave up and said why."""
    if dist.is_initialized():
        try:
            dist.barrier()
        except RuntimeError as e:                  # the connection to rank 0 is gone
            if not FIRST:
                raise SystemExit(2) from e
            raise


def mean(x):
    """Mean of a tensor over the processes: each then logs, and stops for, the same numbers."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x = x / WORLD
    return x


def any_of(flag, device):
    """Whether the flag is set in any process."""
    if not dist.is_initialized():
        return flag
    return bool(mean(torch.tensor(float(flag), device=device)))


def leave():
    """Ends the group of processes, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
