"""The processes of one training: those that torchrun started, or this one alone."""

import gc
import importlib
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .images import InputError
from .upscale import find_device

TORCHRUN = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what it sets beside WORLD_SIZE


@dataclass
class Process:
    """This process among ``world`` of them."""

    rank: int
    world: int
    device: torch.device

    def sum(self, tensor: Tensor) -> Tensor:
        """In place, over all processes."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The value of every process; each waits for all."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values


@contextmanager
def processes(device: str) -> Iterator[Process]:
    """Joins the process group of torchrun, NCCL on CUDA and gloo elsewhere."""
    if "WORLD_SIZE" not in os.environ:
        yield Process(0, 1, find_device(device))
        return
    lacking = [name for name in TORCHRUN if name not in os.environ]
    if lacking:
        raise InputError(f"WORLD_SIZE is set, as by torchrun, but not {', '.join(lacking)}")
    rank, local_rank, world, port = map(_whole_number, ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank >= world:  # it would wait for ever
        raise InputError(f"RANK: expected less than WORLD_SIZE = {world}, got {rank}")
    if port >= 2**16:
        raise InputError(f"MASTER_PORT: expected less than {2**16}, got {port}")
    # Its functions keep, as a default argument, the group there is when they are imported; torch does so on the way.
    importlib.import_module("torch.distributed.nn.functional")
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{local_rank}"
    chosen = find_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), chosen)
        dist.barrier()  # nobody leaves while another still talks to it
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # whose variables may hold the network, which holds the group
        raise
    finally:
        gc.collect()  # what holds the group, in a cycle perhaps, goes first: threads that outlive Python abort it
        dist.destroy_process_group()


def _whole_number(variable: str) -> int:
    value = os.environ[variable]
    if not value.isdecimal():
        raise InputError(f"{variable}: expected a whole number, got {value!r}")
    return int(value)
