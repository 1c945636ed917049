"""The layer among threads, processes and files: copies, workers after fork and spawn, and data-parallel training."""

import concurrent.futures
import copy
import io
import multiprocessing
import pickle
from pathlib import Path

import pytest
import torch

from common import assert_close
from isqrt_cov import CovSqrtNorm, cov_sqrt
from workers import (
    Covariances,
    error_of_one_sample,
    gradients_in_one_of_two_processes,
    images,
    network,
    value_and_gradient,
)

SECONDS = 120  # a worker that hangs is an error, not the end of the tests


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


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_an_error_in_one_sample_ends_the_call():
    # The threads that wait for it go on; a worker that waits for ever is an error here.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        message, finite = pool.apply_async(error_of_one_sample).get(SECONDS)
    assert "out of memory" in message and finite


# A fork leaves the threads of OpenMP behind: of torch's own operators, too, only those on one thread work after it.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ("fork", "spawn"))
def test_worker_processes(method):
    expected = [value_and_gradient(seed) for seed in range(4)]  # the threads of this process have started
    context = multiprocessing.get_context(method)
    with context.Pool(2, torch.set_num_threads, (1,)) as pool:
        for result, wanted in zip(pool.map_async(value_and_gradient, range(4)).get(SECONDS), expected, strict=True):
            assert equal(result, wanted)
    assert equal(value_and_gradient(0), expected[0])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ("fork", "spawn"))
def test_data_loader_workers(method):
    data = Covariances()
    expected = [data[index] for index in range(len(data))]
    loader = torch.utils.data.DataLoader(
        data, batch_size=2, num_workers=2, multiprocessing_context=method, timeout=SECONDS
    )
    assert torch.equal(torch.cat(list(loader)), torch.stack(expected))


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
