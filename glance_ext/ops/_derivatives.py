"""What the ops' derivatives share; derivatives that they do not have are an error, not a zero."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

_registrations: list[torch.library.Library] = []  # which end with these objects


def register_autograd(
    op: str,
    backward: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """``torch.library.register_autograd``, whose ops also go through ``torch.func.grad``.

    torch's own makes a ``torch.autograd.Function``, which under a function transform wants to
    dispatch by itself, above the dispatcher. Inside of the dispatcher the transform has already
    been entered: what is right there is a function of this one level, as torch's operators are. The
    level below is reached by the call of the op itself.

    Args:
        op: Its name, with the namespace.
        backward: ``backward(ctx, *grads)``, with one result for each argument of the op.
        setup_context: ``setup_context(ctx, inputs, output)``.
    """
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch._library.utils import fill_defaults
    from torch.autograd.function import _SingleLevelFunction

    namespace, name = op.split("::")
    overload = getattr(getattr(torch.ops, namespace), name).default

    def below(keyset: Any, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def run_forward(ctx: Any, *args_and_keyset: Any) -> Any:
        *args, keyset = args_and_keyset
        with contextlib.ExitStack() as modes:
            if torch._C._are_functorch_transforms_active():
                # A function's forward runs without gradients, but the levels below may want them.
                modes.enter_context(torch.enable_grad())
                modes.enter_context(forward_ad._set_fwd_grad_enabled(True))
            result = below(keyset, tuple(args))
        if setup_context is not None:
            setup_context(ctx=ctx, inputs=tuple(args), output=result)
        return result

    def run_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return (*backward(ctx, *grads), None)

    function = type(
        f"{name}_autograd",
        (_SingleLevelFunction,),
        {"forward": staticmethod(run_forward), "backward": staticmethod(run_backward)},
    )

    def kernel(keyset: Any, *args: Any) -> Any:
        _forbid_forward_mode(name.removesuffix("_backward"), args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return below(keyset, args)
        args, _ = fill_defaults(overload._schema, args, {})
        with enable_single_level_autograd_function():
            return function.apply(*args, keyset)  # type: ignore[attr-defined]

    library = torch.library.Library(namespace, "FRAGMENT")
    _registrations.append(library)
    library.impl(name, kernel, "Autograd", with_keyset=True)


def _forbid_forward_mode(op: str, args: tuple[Any, ...]) -> None:
    """Refuses dual tensors, whose tangents torch would drop at an op without a rule for them."""
    if forward_ad._current_level < 0:
        return
    for tensor in args:
        if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                f"{op}: expected to be differentiated backward, got a tangent of forward mode"
            )


def forbid_second_backward(op: str) -> None:
    """Makes the gradient of ``glance_ext::<op>_backward`` an error that names ``op``."""

    def second_backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"{op}: expected to be differentiated once, got a second backward")

    register_autograd(f"glance_ext::{op}_backward", second_backward)


def forbid_backward(op: str, instead: str) -> None:
    """Makes the gradient of ``glance_ext::<op>``, which is for inference, an error that helps."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    def backward(ctx: Any, grad: Tensor) -> NoReturn:
        raise RuntimeError(f"{op}: expected inference, got a backward; {instead}")

    torch.library.register_autograd(f"glance_ext::{op}", backward, setup_context=setup)
