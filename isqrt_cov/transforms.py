"""Connects an operator with autograd, forward-mode AD and ``torch.func``.

``torch.library.register_autograd`` ends in an ``autograd.Function`` that drops tangents without a word and refuses
``torch.func.grad`` (github.com/pytorch/pytorch/issues/170834). What is registered here under the same dispatch key has a
``jvp``, and treats one level of ``torch.func`` at a time, as the kernels of torch's own operators do.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import _C, Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

_library = torch.library.Library("isqrt_cov", "FRAGMENT")


def register_derivatives(name: str, setup_context: Callable, backward: Callable, jvp: Callable) -> None:
    """Derivatives of ``isqrt_cov::name`` by the methods of ``torch.autograd.Function`` of these names.

    ``jvp(ctx, saved, *tangents)`` is given what was saved for it as values without a tangent.
    """
    op = getattr(torch.ops.isqrt_cov, name).default
    defaults = tuple(a.default_value if a.has_default_value() else None for a in op._schema.arguments)

    def below_autograd(keyset, args):
        with _C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _C._after_autograd_keyset, *args)

    class Derivatives(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, *args):
            # Function turns both modes off for its forward; the outer levels of torch.func, below, want them on.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                output = below_autograd(keyset, args)
            setup_context(ctx, args + defaults[len(args) :], output)  # the dispatcher leaves out trailing defaults
            return output

        @staticmethod
        def backward(ctx, *grads):
            return None, *backward(ctx, *grads)

        @staticmethod
        def jvp(ctx, _, *tangents):
            # What was saved carries the tangent of this level, which is done with, and those of outer levels.
            with forward_ad._set_fwd_grad_enabled(True):
                saved = [forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]
                return jvp(ctx, saved, *tangents)

    Derivatives.__name__ = Derivatives.__qualname__ = name
    # Derivatives.apply itself would start again at the innermost level of torch.func.
    apply = super(torch.autograd.Function, Derivatives).apply

    def kernel(keyset, *args):
        if forward_ad._current_level < 0 and not (_C.is_grad_enabled() and _C._any_requires_grad(*args)):
            return below_autograd(keyset, args)
        with enable_single_level_autograd_function():
            return apply(keyset, *args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def register_batching(name: str) -> None:
    """``torch.vmap`` of ``isqrt_cov::name``, by folding its dimension into the batch that every tensor begins with."""
    op = getattr(torch.ops.isqrt_cov, name).default

    def rule(info, in_dims, *args):
        def fold(arg: Any, dim: int | None) -> Any:
            if not isinstance(arg, Tensor):
                return arg
            arg = arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
            return arg.flatten(0, 1)

        outputs = op(*map(fold, args, in_dims))
        return tree_map(lambda t: t.unflatten(0, (info.batch_size, -1)), outputs), tree_map(lambda _: 0, outputs)

    torch.library.register_vmap(f"isqrt_cov::{name}", rule, lib=_library)
