"""What is allocated: beside x and its gradient only C x C matrices, whatever the layout and the dtype of x; or, for
fewer positions than channels, smaller matrices, and one like x for the gradient."""

import gc

import pytest
import torch

from common import layouts
from isqrt_cov import cov_sqrt, covariance_pool

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = tuple(layouts(torch.zeros(1, 1, 1, 1)))


def allocated(function, device):
    """Result of ``function()``, and the bytes that it allocated: all of them on a CPU, their peak on a CUDA device."""
    if device == "cuda":
        gc.collect()  # what is freed in between would count
        # What is asked for: blocks of the caching allocator may be up to 1 MiB larger.
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        return function(), torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    # Not what remains of it after each operator: some is freed in the operator that allocated it.
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return result, sum(change for change in changes if change > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_copy_of_x(device, layout, dtype):
    x = layouts(torch.randn(2, 8, 200, 240, device=device).to(dtype))[layout].detach().requires_grad_()
    size = x.numel() * x.element_size()
    for function in (cov_sqrt, covariance_pool):
        y, in_forward = allocated(lambda function=function: function(x), device)
        upstream = torch.randn_like(y)
        (slope,), in_backward = allocated(lambda y=y, upstream=upstream: torch.autograd.grad(y, x, upstream), device)
        assert 0 < in_forward < size / 4
        assert size <= in_backward < size * 5 / 4
        assert slope.dtype == dtype


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_copy_of_x_under_autocast(device, layout, dtype):
    x = layouts(torch.randn(2, 8, 200, 240, device=device).to(dtype))[layout].detach().requires_grad_()
    size = x.numel() * x.element_size()
    for function in (cov_sqrt, covariance_pool, lambda x: torch.ops.isqrt_cov.cov_sqrt(x, 5, 0)[0]):
        with torch.autocast(device, dtype=dtype):
            y, in_forward = allocated(lambda function=function: function(x), device)
        upstream = torch.randn_like(y)
        (slope,), in_backward = allocated(lambda y=y, upstream=upstream: torch.autograd.grad(y, x, upstream), device)
        assert 0 < in_forward < size / 4
        assert size <= in_backward < size * 5 / 4
        assert (y.dtype, slope.dtype) == (torch.float32, dtype)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_no_copy_of_a_half_root_and_its_gradient(device, dtype):
    x = torch.randn(4, 96, 200, device=device).to(dtype).requires_grad_()  # one chunk, of which nothing is kept
    y, in_forward = allocated(lambda: cov_sqrt(x), device)
    size = y.numel() * y.element_size()
    _, in_backward = allocated(lambda: torch.autograd.grad(y, x, torch.ones_like(y)), device)
    assert 3 * size < in_forward < 3.2 * size  # Sigma in float32, and y
    assert 3 * size <= in_backward - x.numel() * x.element_size() < 3.2 * size  # its gradient, and that of y


def test_matrices_of_the_positions():
    x = torch.randn(4, 128, 40, requires_grad=True)
    matrix, size = 4 * 4 * 39 * 39, 4 * x.numel()
    y, in_forward = allocated(lambda: cov_sqrt(x), "cpu")
    (_,), in_backward = allocated(lambda: torch.autograd.grad(y, x, torch.ones_like(y)), "cpu")
    y_size = 4 * y.numel()
    assert 2 * matrix <= in_forward - y_size < 2.2 * matrix
    assert 3 * matrix <= in_backward - y_size - size - 39 / 40 * size < 3.2 * matrix


def test_a_copy_would_be_seen(device):
    x = layouts(torch.randn(2, 8, 200, 240, device=device))["cropped"]
    size = x.numel() * x.element_size()
    assert allocated(lambda: cov_sqrt(x.contiguous()), device)[1] > size
    half = x.bfloat16()
    assert allocated(lambda: cov_sqrt(half.float()), device)[1] > size


def test_kept_for_backward_is_one_matrix_per_sample(device):
    x = torch.randn(16, 64, 48, 48, device=device, requires_grad=True)
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = cov_sqrt(x)
    beyond_x = sum(size for address, size in kept.items() if address != x.untyped_storage().data_ptr())
    assert x.untyped_storage().data_ptr() in kept
    assert beyond_x == 4 * (16 * 64 * 64 + 16 * 64 + 16)  # sigma, mu and scale in float32
    assert beyond_x < 1 << 20
    y.sum().backward()
