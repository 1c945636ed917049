"""The layer among threads, processes and files: copies, workers after fork and spawn, and data-parallel training."""

import concurrent.futures
import copy
import io
import multiprocessing
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common import assert_close, feature_maps
from isqrt_cov import CovSqrtNorm, cov_sqrt

SHAPE = (4, 24, 900)
SECONDS = 240  # a worker that hangs is an error, not the end of the tests


def value_and_gradient(seed=0):
    """Enough work for every thread of the pool. By value: a worker may be gone before its tensors are read."""
    x = feature_maps(*SHAPE, torch.float32, seed=seed).requires_grad_()
    y = cov_sqrt(x)
    return y.detach().numpy(), torch.autograd.grad(y, x, torch.ones_like(y))[0].numpy()


def equal(one, other):
    return all((a == b).all() for a, b in zip(one, other, strict=True))


def test_copies_of_the_layer_are_the_layer():
    layer = CovSqrtNorm(3, "triu", "minimax", 1e-2)
    x = torch.randn(2, 4, 9)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    copies = [copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))]
    for clone in (*copies, torch.load(saved, weights_only=False)):
        assert repr(clone) == repr(layer) and torch.equal(clone(x), layer(x))
    assert not layer.state_dict() and not list(layer.parameters()) and not list(layer.buffers())
    assert layer.load_state_dict({}) == torch.nn.Module().load_state_dict({})
    assert layer.double().half().to("meta").iterations == 3


def test_results_keep_no_more_than_they_need():
    # Neither a graph nor feature maps hang on what was computed without a gradient.
    with torch.no_grad():
        y = cov_sqrt(torch.randn(2, 4, 9, requires_grad=True))
    assert y.grad_fn is None and copy.deepcopy(y).equal(y) and pickle.loads(pickle.dumps(y)).equal(y)


def test_threads_of_one_process():
    expected = [value_and_gradient(seed) for seed in range(4)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for number, result in enumerate(pool.map(value_and_gradient, [seed % 4 for seed in range(64)])):
            assert equal(result, expected[number % 4])


# torch's own OpenMP loops cannot run on more threads after a fork; ours neither hang nor differ.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ("fork", "spawn"))
def test_worker_processes(method):
    expected = [value_and_gradient(seed) for seed in range(4)]  # the threads of this process have started
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        for result, wanted in zip(pool.map_async(value_and_gradient, range(4)).get(SECONDS), expected, strict=True):
            assert equal(result, wanted)
    assert equal(value_and_gradient(0), expected[0])


class Covariances(torch.utils.data.Dataset):
    """A data set whose samples are computed by the worker."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return cov_sqrt(feature_maps(*SHAPE, torch.float32, seed=index))[0]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ("fork", "spawn"))
def test_data_loader_workers(method):
    data = Covariances()
    expected = [data[index] for index in range(len(data))]
    loader = torch.utils.data.DataLoader(
        data, batch_size=2, num_workers=2, multiprocessing_context=method, timeout=SECONDS
    )
    assert torch.equal(torch.cat(list(loader)), torch.stack(expected))


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


def test_distributed_data_parallel(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=gradients_in_one_of_two_processes, args=(rank, tmp_path / "store", results))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    gathered = dict(results.get(timeout=SECONDS) for _ in workers)
    for worker in workers:
        worker.join(SECONDS)
        assert worker.exitcode == 0
    model = network()
    model(images()).square().mean().backward()
    for rank in range(2):
        for grad, parameter in zip(gathered[rank], model.parameters(), strict=True):
            assert_close(torch.from_numpy(grad), parameter.grad, 1e-12)
