"""Connects an operator with autograd, forward-mode AD, ``torch.func`` and autocast.

``torch.library.register_autograd`` ends in an ``autograd.Function`` that drops tangents without a word and refuses
``torch.func.grad`` (github.com/pytorch/pytorch/issues/170834). What is registered here under the same dispatch key has
a ``jvp``, and treats one level of ``torch.func`` at a time, as the kernels of torch's own operators do.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import _C, Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils._pytree import tree_map

_library = torch.library.Library("isqrt_cov", "FRAGMENT")
_AUTOCAST_DEVICES = ("cpu", "cuda")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What feature maps and matrices of this dtype are computed in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def autocast_is_enabled(x: Tensor) -> bool:
    """Of x's device, if there is any: the meta device has none."""
    # torch.amp.is_autocast_available would tell, but torch.compile did not trace it before torch 2.11.
    device = x.device.type
    return _C._is_any_autocast_enabled() and device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Of x's device, if there is any."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if device in _AUTOCAST_DEVICES else nullcontext()


def _only_autograd_cares(tensors: tuple[Any, ...]) -> bool:
    """True for arguments of which autograd alone would come to know before the operator runs."""
    return (
        type(tensors[0]) is Tensor
        and not torch.compiler.is_compiling()
        and not _C._are_functorch_transforms_active()
        and not _C._is_torch_function_mode_enabled()
        and not _C._get_tracing_state()
        and not _C._dispatch_tls_is_dispatch_key_excluded(_C.DispatchKey.AutogradFunctionality)
        and not any(map(_C._functorch.is_legacy_batchedtensor, tensors))  # of is_grads_batched
    )


def _refuse_autocast(name: str, like: Tensor) -> None:
    """torch.func restores an outer level's autocast, and only a product shows whether it did."""
    one = torch.ones(1, 1, dtype=compute_dtype(like.dtype), device=like.device)
    if (one @ one).dtype != one.dtype:
        raise NotImplementedError(
            f"isqrt_cov::{name}: this forward-mode derivative by torch.func does not work in an autocast region"
        )


def _function(name: str, setup_context: Any, backward: Any, jvp: Any, tensor_count: int) -> Any:
    """The ``autograd.Function`` whose methods these are, for :func:`register_derivatives`."""

    class Derivatives(_SingleLevelFunction):
        @staticmethod
        def forward(ctx, run, arguments, others, *tensors):
            output = run(*tensors, *arguments)
            ctx.arguments = arguments
            setup_context(ctx, tensors, output)
            if not isinstance(output, tuple):
                return output
            others.extend(output[1:])
            return output[0]

        @staticmethod
        def backward(ctx, grad):
            grads = backward(ctx, grad)
            return None, None, None, *grads, *(None,) * (tensor_count - len(grads))

        @staticmethod
        def jvp(ctx, _run, _arguments, _others, *tangents):
            # What was saved carries the tangent of this level, which is done with, and those of outer levels.
            like = ctx.saved_tensors[0]
            with forward_ad._set_fwd_grad_enabled(True), without_autocast(like):
                _refuse_autocast(name, like)
                saved = [forward_ad.unpack_dual(t, level=0).primal for t in ctx.saved_tensors]  # of torch.func, too
                return jvp(ctx, saved, *tangents)

        _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)

    # What profilers, error messages and Tensor.grad_fn call it, as "CovSqrt" and "CovSqrtBackward".
    Derivatives.__name__ = Derivatives.__qualname__ = name.title().replace("_", "")
    backward_class = Derivatives._backward_cls
    backward_class.__name__ = backward_class.__qualname__ = f"{Derivatives.__name__}Backward"
    return Derivatives


def _register_autocast(name: str, op: Any, defaults: tuple[Any, ...]) -> None:
    names = [argument.name for argument in op._schema.arguments]
    if "wide" not in names:
        for device in _AUTOCAST_DEVICES:
            torch.library.register_autocast(f"isqrt_cov::{name}", device, torch.float32, lib=_library)
        return
    at = names.index("wide")

    def wide(_, *args):
        args += defaults[len(args) :]
        keys = _C.DispatchKeySet(_C.DispatchKey.AutocastCPU).add(_C.DispatchKey.AutocastCUDA)
        with _C._ExcludeDispatchKeyGuard(keys):
            return op(*args[:at], True, *args[at + 1 :])

    for key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl(name, wide, key, with_keyset=True)


def register_derivatives(
    name: str,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    jvp: Callable[..., Any],
    *,
    autocast: bool,
) -> Callable[..., Any]:
    """Derivatives of ``isqrt_cov::name`` by the methods of ``torch.autograd.Function`` of these names.

    Returns the operator as a function of positional arguments, the first one a tensor, that calls what is registered
    here without the way through the dispatcher, which takes as long as a small batch.

    ``setup_context(ctx, tensors, output)`` is given the tensors among the arguments, which come first; the others are
    ``ctx.arguments``. Only the first result has derivatives: ``backward(ctx, grad)`` returns gradients of the first
    tensors, and ``jvp(ctx, saved, *tangents)`` is given what was saved for it as values without a tangent. With
    ``autocast`` the operator returns float32 for 16-bit tensors in an autocast region: by its argument ``wide``, or
    where it has none by a cast of them.
    """
    op = getattr(torch.ops.isqrt_cov, name).default
    defaults = tuple(a.default_value if a.has_default_value() else None for a in op._schema.arguments)
    tensor_count = sum(isinstance(a.type, torch.TensorType) for a in op._schema.arguments)
    function = _function(name, setup_context, backward, jvp, tensor_count)

    def run(*args):
        with _C._AutoDispatchBelowAutograd():
            return op(*args)

    def differentiate(run, args):
        args += defaults[len(args) :]  # the dispatcher leaves out trailing defaults
        others: list[Tensor] = []  # pass by Function, whose every argument and result takes time
        result = function.apply(run, args[tensor_count:], others, *args[:tensor_count])
        return (result, *others) if others else result

    def is_differentiated(args):
        return forward_ad._current_level >= 0 or (_C.is_grad_enabled() and _C._any_requires_grad(*args))

    def has_tangent(args):
        # A compiled graph enters the one level that there is without the knowledge of forward_ad.
        return any(forward_ad.unpack_dual(t, level=0).tangent is not None for t in args[:tensor_count])

    def kernel(keyset, *args):
        def run_next(*args):
            with _C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & _C._after_autograd_keyset, *args)

        def run_with_modes(*args):
            # Function turns both modes off for its forward; the outer levels of torch.func, below, want them on.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return run_next(*args)

        if not is_differentiated(args) and not has_tangent(args):
            return run_next(*args)
        if not _C._are_functorch_transforms_active():
            return differentiate(run_next, args)
        with enable_single_level_autograd_function():
            return differentiate(run_with_modes, args)

    def call(*args):
        if not _only_autograd_cares(args[:tensor_count]):
            return op(*args)
        return differentiate(run, args) if is_differentiated(args) else run(*args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)
    if autocast:
        _register_autocast(name, op, defaults)
    return call


def register_batching(name: str, fake: Callable[..., Any]) -> None:
    """``torch.vmap`` of ``isqrt_cov::name``, by folding its dimension into the batch that every tensor begins with.

    ``fake``, the operator without numbers, tells what is wrong with the tensors as the caller knows them.
    """
    op = getattr(torch.ops.isqrt_cov, name).default

    def rule(info, in_dims, *args):
        def in_front(arg: Any, dim: int | None) -> Any:
            if not isinstance(arg, Tensor):
                return arg
            return arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)

        args = tuple(map(in_front, args, in_dims))
        sizes = args[0].shape[:2]
        try:
            outputs = op(*(arg.flatten(0, 1) if isinstance(arg, Tensor) else arg for arg in args))
        except (IndexError, RuntimeError):
            fake(*(arg.new_empty(arg.shape[1:], device="meta") if isinstance(arg, Tensor) else arg for arg in args))
            raise
        return tree_map(lambda t: t.unflatten(0, sizes), outputs), tree_map(lambda _: 0, outputs)

    torch.library.register_vmap(f"isqrt_cov::{name}", rule, lib=_library)
