"""What the benchmark compares: ways to compute the square root of a covariance, and its gradient, from feature maps.

Every method is given the same x and upstream gradient and is brought into the form that its user would run: what can be
done once (compilation, capture, a choice) is done in ``prepare``. One that cannot run here says why by Unavailable.
"""

import importlib
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from measure import available_memory
from pade import pade_sqrt


class Unavailable(Exception):
    """A method that cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Case:
    """One problem: feature maps (B, C, H, W) that require a gradient, and the upstream gradient of the output."""

    x: Tensor
    upstream: Tensor
    iterations: int
    output: str


def make_case(x: Tensor, iterations: int, output: str) -> Case:
    """The case of x with a fixed random upstream gradient, which is not symmetric."""
    batch, channels = x.shape[:2]
    rest = {"matrix": (channels, channels), "triu": (channels * (channels + 1) // 2,), "mean": (channels,)}[output]
    upstream = torch.randn((batch, *rest), generator=torch.Generator().manual_seed(1), dtype=x.dtype).to(x.device)
    return Case(x.detach().requires_grad_(), upstream, iterations, output)


@dataclass(frozen=True)
class Prepared:
    """A method ready to be called again and again; x may be overwritten in place between calls."""

    forward: Callable[[], Tensor]  # inference: nothing is recorded for a gradient
    step: Callable[[], tuple[Tensor, Tensor]]  # forward and backward: output, dX, a fresh one each time
    function: Callable[[Tensor], Tensor] | None = None  # x -> output under autograd, where there is such a thing
    detail: str = ""  # what was chosen
    options: dict[str, Any] = field(default_factory=dict)  # makes prepare() choose the same without looking for it
    own_pool: str = ""  # whose memory torch's books leave out
    replayed: Case | None = None  # a graph reads its tensors, and does not keep them


def truncated_root(case: Case, x: Tensor) -> Tensor:
    """N Newton-Schulz steps."""
    return reference.cov_sqrt(x, case.iterations, case.output)


MINIMAX_STEPS, MINIMAX_FLOOR = 3, 1e-2


def minimax_root(case: Case, x: Tensor) -> Tensor:
    """Fewer steps, with coefficients for a spectrum above MINIMAX_FLOOR of the trace."""
    steps = reference.minimax_steps(MINIMAX_STEPS, MINIMAX_FLOOR)
    return reference.cov_sqrt(x, MINIMAX_STEPS, case.output, steps)


def clamped_root(case: Case, x: Tensor) -> Tensor:
    """The exact root, where eigenvalues below eps of the working dtype times the trace count as that."""
    clamp = torch.finfo(working_dtype(case.x.dtype)).eps
    return reference.convert_output(reference.eig_sqrt(reference.covariance_pool(x), floor=clamp), case.output)


def gram_root(case: Case, x: Tensor) -> Tensor:
    """The exact root for fewer positions than channels, with the clamp that the working dtype has."""
    return eig_gram_cov_sqrt(x, case.output, torch.finfo(working_dtype(case.x.dtype)).eps)


def exact_root(case: Case, x: Tensor) -> Tensor:
    return reference.convert_output(reference.exact_sqrt(reference.covariance_pool(x)), case.output)


@dataclass(frozen=True)
class Method:
    summary: str
    prepare: Callable[..., Prepared]
    # What it computes, on the same numbers in float64: its errors are against that. One for each function, not method.
    target: Callable[[Case, Tensor], Tensor] = truncated_root
    devices: tuple[str, ...] = ("cpu", "cuda")
    quick: bool = True  # has a place in a run of seconds


def load_plain(module: str) -> ModuleType:
    """A module of isqrt_cov that needs no library: from the source tree where the compiled package is missing."""
    try:
        return importlib.import_module(f"isqrt_cov.{module}")
    except (ImportError, OSError):
        name = f"isqrt_cov_{module}"
        if name not in sys.modules:
            path = Path(__file__).resolve().parents[1] / "isqrt_cov" / f"{module}.py"
            spec = importlib.util.spec_from_file_location(name, path)
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        return sys.modules[name]


reference = load_plain("reference")


def load_library() -> ModuleType:
    try:
        return importlib.import_module("isqrt_cov")
    except (ImportError, OSError) as error:
        raise Unavailable(f"isqrt_cov does not import ({error}): pip install .") from error


# ---- Plain torch


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is computed in float32, by the library and so by all that it is compared with."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def working(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` in the working dtype, its result again in x's."""

    def call(x: Tensor, *arguments) -> Tensor:
        return function(x.to(working_dtype(x.dtype)), *arguments).to(x.dtype)

    return call


def covariance(x: Tensor) -> Tensor:
    """As a user writes it: a centred copy and a batched product. (``reference`` spends one more pass on accuracy.)"""
    x = x.flatten(2)
    centred = x - x.mean(2, keepdim=True)
    return centred.bmm(centred.mT) / x.shape[2]


def eager_cov_sqrt(x: Tensor, iterations: int, output: str) -> Tensor:
    """The usual code of the field, with its 3 N - 3 products by bmm and its sums apart, but no M x M matrix."""
    sigma = covariance(x)
    trace = sigma.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    a = sigma / trace
    eye3 = 3 * torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    zy = 0.5 * (eye3 - a)
    y, z = a.bmm(zy), zy
    for n in range(1, iterations):
        zy = 0.5 * (eye3 - z.bmm(y))
        y, z = y.bmm(zy), zy.bmm(z) if n < iterations - 1 else None
    return reference.convert_output(trace.sqrt() * y, output)


def eig_cov_sqrt(x: Tensor, output: str) -> Tensor:
    return reference.convert_output(reference.eig_sqrt(covariance(x)), output)


class _InverseEigenRoot(torch.autograd.Function):
    """f(A) of a symmetric A with f(l) = 1 / sqrt(l) above ``floor`` and 0 below, by eigen-decomposition."""

    @staticmethod
    def forward(ctx, a, floor):
        values, vectors = torch.linalg.eigh(a)
        inverse = torch.where(values > floor, values.clamp_min(floor).rsqrt(), 0.0)
        ctx.save_for_backward(inverse, vectors)
        return (vectors * inverse[:, None, :]) @ vectors.mT

    @staticmethod
    def backward(ctx, grad):
        # Daleckii-Krein, as in reference.eig_sqrt; where one eigenvalue is below the floor the features are zero, too.
        inverse, vectors = ctx.saved_tensors
        product = inverse[:, :, None] * inverse[:, None, :]
        sums = (inverse[:, :, None] + inverse[:, None, :]).clamp_min(torch.finfo(inverse.dtype).tiny)
        k = -product * product / sums
        return vectors @ (k * (vectors.mT @ ((grad + grad.mT) / 2) @ vectors)) @ vectors.mT, None


def eig_gram_cov_sqrt(x: Tensor, output: str, eps: float) -> Tensor:
    """The exact root by way of the smaller matrix, for fewer positions than channels.

    With F = X - mu 1' and K = F' F / M it is F K^{-1/2} F' / M. Eigenvalues below M eps of the trace count as that.
    """
    x = x.flatten(2)
    centred = x - x.mean(2, keepdim=True)
    gram = centred.mT.bmm(centred) / x.shape[2]
    trace = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    root = _InverseEigenRoot.apply(gram / trace, x.shape[2] * eps)
    return reference.convert_output(centred @ root @ centred.mT / (x.shape[2] * trace.sqrt()), output)


def of_function(case: Case, function: Callable[[Tensor], Tensor], **about) -> Prepared:
    """A function of x that autograd can go through."""

    def forward():
        with torch.no_grad():
            return function(case.x)

    def step():
        case.x.grad = None
        y = function(case.x)
        y.backward(case.upstream)
        return y.detach(), case.x.grad

    return Prepared(forward, step, function, **about)


def _prepare_ours(case: Case) -> Prepared:
    library = load_library()
    plan = library.plan(tuple(case.x.shape), case.x.dtype, case.x.device)
    detail = "pooling {pooling}, forward {forward}, backward {backward}"
    if case.x.is_cuda:
        detail += "; blocks of a cluster: forward {forward_blocks}, backward {backward_blocks}"
    detail = detail.format(**plan)
    return of_function(case, lambda x: library.cov_sqrt(x, case.iterations, case.output), detail=detail)


def _prepare_minimax(case: Case) -> Prepared:
    library = load_library()
    options = {"coefficients": "minimax", "spectrum_floor": MINIMAX_FLOOR}
    return of_function(case, lambda x: library.cov_sqrt(x, MINIMAX_STEPS, case.output, **options))


def _prepare_pade(case: Case) -> Prepared:
    return of_function(case, working(lambda x: reference.convert_output(pade_sqrt(covariance(x)), case.output)))


def _prepare_eig(case: Case) -> Prepared:
    return of_function(case, working(lambda x: eig_cov_sqrt(x, case.output)))


def _prepare_eig_gram(case: Case) -> Prepared:
    channels, positions = case.x.flatten(2).shape[1:]
    if positions >= channels:
        raise Unavailable("there are no fewer positions than channels")
    return of_function(case, working(partial(gram_root, case)))


def _prepare_eager(case: Case) -> Prepared:
    return of_function(case, working(lambda x: eager_cov_sqrt(x, case.iterations, case.output)))


def _prepare_baddbmm(case: Case) -> Prepared:
    return of_function(case, working(lambda x: reference.baddbmm_cov_sqrt(x, case.iterations, case.output)))


def mxm_bytes(shape: torch.Size, itemsize: int) -> int:
    """Memory of the centring matrix and of its copy for every sample."""
    batch, _, height, width = shape
    return (batch + 1) * (height * width) ** 2 * itemsize


def _prepare_mxm(case: Case) -> Prepared:
    itemsize = working_dtype(case.x.dtype).itemsize
    needed, available = mxm_bytes(case.x.shape, itemsize), available_memory(case.x.device)
    if needed > 0.8 * available:
        raise Unavailable(f"its M x M matrices take {needed / 2**30:.1f} GiB; {available / 2**30:.1f} GiB are free")
    return of_function(case, working(lambda x: reference.mxm_cov_sqrt(x, case.iterations, case.output)))


def _prepare_matrix_sqrth(case: Case) -> Prepared:
    if not hasattr(torch.linalg, "matrix_sqrth"):
        raise Unavailable(f"torch {torch.__version__} has no torch.linalg.matrix_sqrth")
    root = torch.linalg.matrix_sqrth
    return of_function(case, working(lambda x: reference.convert_output(root(covariance(x)), case.output)))


# ---- torch.compile


def _compiled(case: Case, form: str) -> Prepared:
    body, _, mode = form.partition(", ")
    function = {"eager": eager_cov_sqrt, "baddbmm": reference.baddbmm_cov_sqrt}[body]
    compiled = torch.compile(working(function), fullgraph=True, dynamic=False, mode=mode or None)

    def call(x):
        if mode:  # what CUDA graphs returned last time may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
        return compiled(x, case.iterations, case.output)

    own_pool = "a CUDA graph's" if mode else ""
    return of_function(case, call, detail=f"of {form}", options={"form": form}, own_pool=own_pool)


def _prepare_compile(case: Case, form: str | None = None) -> Prepared:
    """torch.compile of the form that turns out fastest at forward + backward on this very problem."""
    on_cuda = case.x.is_cuda
    forms = ["eager", "baddbmm"] + (["eager, reduce-overhead", "baddbmm, reduce-overhead"] if on_cuda else [])
    candidates, best, failures = {}, {}, []
    torch._dynamo.reset()  # each shape is compiled for itself, and none falls back for having been preceded by many
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Inductor's deprecation warnings about itself
        for name in [form] if form else forms:
            try:
                prepared = _compiled(case, name)
                for _ in range(3 if on_cuda else 1):
                    prepared.step()
                candidates[name] = prepared
            except Exception as error:  # a compiler has many ways to fail; the other forms stand
                failures.append(f"{name}: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}")
    if not candidates:
        raise Unavailable("torch.compile failed for " + "; ".join(failures))
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    for _ in range(5):
        for name, prepared in candidates.items():
            _synchronize(case)
            start = time.perf_counter()
            prepared.step()
            _synchronize(case)
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
    return candidates[min(best, key=best.get)]


def _synchronize(case: Case) -> None:
    if case.x.is_cuda:
        torch.cuda.synchronize(case.x.device)


# ---- CUDA


def capture(case: Case, plain: Prepared) -> Prepared:
    """``plain`` as CUDA graphs: one launch replays all its kernels. The results lie in fixed buffers."""
    x = case.x.detach().requires_grad_()  # the same memory; a leaf that other streams know would break the capture
    with torch.cuda.device(case.x.device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # library handles and workspaces must exist before the capture
            for _ in range(3):
                plain.forward()
                torch.autograd.grad(plain.function(x), x, case.upstream)
        torch.cuda.current_stream().wait_stream(side)
        inference, training = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(inference):
            inferred = plain.forward()
        with torch.cuda.graph(training):
            y = plain.function(x)
            (dx,) = torch.autograd.grad(y, x, case.upstream)
            y = y.detach()

    def forward():
        inference.replay()
        return inferred

    def step():
        training.replay()
        return y, dx

    return Prepared(forward, step, detail=plain.detail, own_pool="a CUDA graph's", replayed=case)


def _prepare_cupy(case: Case) -> Prepared:
    """EIG with CuPy's eigen-decomposition of the whole batch at once, and the gradient of ``reference``'s EIG."""
    try:
        import cupy
    except Exception as error:  # a CuPy for another CUDA fails in its own ways
        raise Unavailable(f"CuPy does not import ({error})") from error

    def eigh(a):
        stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(a.device).cuda_stream)
        with cupy.cuda.Device(a.device.index or 0), stream:
            values, vectors = cupy.linalg.eigh(cupy.from_dlpack(a.detach().contiguous()))
            return torch.from_dlpack(values), torch.from_dlpack(vectors)

    def function(x):
        return reference.convert_output(reference.eig_sqrt(covariance(x), eigh=eigh), case.output)

    return of_function(case, working(function), detail=f"CuPy {cupy.__version__}", own_pool="CuPy's")


METHODS: dict[str, Method] = {
    "ours": Method("isqrt_cov.cov_sqrt", _prepare_ours),
    "ours_graph": Method(
        "CUDA graph of isqrt_cov.cov_sqrt", lambda case: capture(case, _prepare_ours(case)), devices=("cuda",)
    ),
    "minimax": Method(f"isqrt_cov.cov_sqrt, {MINIMAX_STEPS} minimax steps", _prepare_minimax, minimax_root),
    "eig": Method("torch.linalg.eigh, clamped, stable backward", _prepare_eig, clamped_root),
    "eig_gram": Method("the same of the M x M Gram matrix, where it is the smaller one", _prepare_eig_gram, gram_root),
    "eager": Method("Newton-Schulz, bmm and autograd", _prepare_eager),
    "baddbmm": Method("Newton-Schulz, fused products, autograd", _prepare_baddbmm),
    "compile": Method("torch.compile of eager or baddbmm, the faster", _prepare_compile, quick=False),
    "graph": Method("CUDA graph of baddbmm", lambda case: capture(case, _prepare_baddbmm(case)), devices=("cuda",)),
    "mxm": Method("baddbmm after the published pooling by an M x M matrix", _prepare_mxm),
    "pade": Method("Pade approximant, Lyapunov equation for the gradient", _prepare_pade, clamped_root),
    "matrix_sqrth": Method("torch.linalg.matrix_sqrth", _prepare_matrix_sqrth, clamped_root),
    "cupy": Method("EIG by CuPy's batched eigh", _prepare_cupy, clamped_root, devices=("cuda",)),
}


def prepare(name: str, case: Case, **options) -> Prepared:
    method = METHODS[name]
    if case.x.device.type not in method.devices:
        raise Unavailable(f"runs on {' and '.join(method.devices)} only")
    return method.prepare(case, **options)
