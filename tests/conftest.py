"""Where the tests run."""

import pytest
import torch

from common import CUDA_ENGINES, missing_cuda, refusal
from isqrt_cov import build_info


def pytest_collection_modifyitems(items):
    """The longest file first: where two run at a time, the other worker would wait for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_emulation_checks.py")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    if request.param == "cuda" and (reason := missing_cuda()):
        pytest.skip(reason)
    return request.param


@pytest.fixture(
    params=[
        "library",
        "portable",
        "avx2",
        "avx512",
        *(pytest.param(name, marks=pytest.mark.cuda) for name in CUDA_ENGINES),
    ]
)
def engine(request):
    """Every engine by its name; skipped with the reason where it cannot run."""
    if request.param in CUDA_ENGINES and (reason := missing_cuda()):
        pytest.skip(reason)
    if request.param == "warpgroup" and (reason := refusal(request.param, (1, 1, 1), torch.float32, "cuda")):
        pytest.skip(reason)
    if request.param in ("avx2", "avx512") and request.param not in build_info()["simd_usable"]:
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


@pytest.fixture(autouse=True)
def same_numbers_each_time():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def compiled_here(tmp_path_factory):
    """torch.compile's cache on disk does not see that the schema of an operator has changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture
def one_thread():
    """Sums of floats depend on the number of threads; and what is small gains nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
