"""What test_processes.py runs in other processes, which have to find it by a module's name."""

import resource
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common import feature_maps
from isqrt_cov import CovSqrtNorm, cov_sqrt

SHAPE = (4, 24, 900)


def value_and_gradient(seed=0):
    """Enough work for every thread of the pool. By value: a worker may be gone before its tensors are read."""
    x = feature_maps(*SHAPE, torch.float32, seed=seed).requires_grad_()
    y = cov_sqrt(x)
    return y.detach().numpy(), torch.autograd.grad(y, x, torch.ones_like(y))[0].numpy()


def error_of_one_sample():
    """What comes of a sample that needs a second pass where there is no memory for it, and a call after that."""
    torch.set_num_threads(2)
    x = torch.randn(3, 2, 1 << 23)
    x[0] *= 1e-30
    cov_sqrt(x[1:])  # the threads are there
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (8 << 20), before[1]))
    try:
        cov_sqrt(x)
    except RuntimeError as error:
        return str(error), cov_sqrt(x[1:]).isfinite().all().item()
    return "none", True


class Covariances(torch.utils.data.Dataset):
    """A data set whose samples are computed by the worker."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return cov_sqrt(feature_maps(*SHAPE, torch.float32, seed=index))[0]


def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, bias=False), CovSqrtNorm(3, "triu"), torch.nn.Linear(21, 1)
    ).double()


def images():
    return torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def gradients_in_one_of_two_processes(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = DistributedDataParallel(network())
    for _ in range(2):  # DDP rebuilds its buckets after the first step
        model.zero_grad()
        model(images()[rank::2]).square().mean().backward()
    results.put((rank, [p.grad.numpy() for p in model.parameters()]))
    dist.barrier()
    dist.destroy_process_group()
