"""A vmap rule for any op: one call for each element, stacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def loop_over(op: Callable[..., Any], info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    """Calls ``op`` for each element of the mapped dimension and stacks the results in front."""

    def chosen(arg: Any, dim: Any, index: int) -> Any:
        if isinstance(arg, (list, tuple)) and isinstance(dim, (list, tuple)):
            return [chosen(a, d, index) for a, d in zip(arg, dim, strict=True)]
        return arg.select(dim, index) if isinstance(arg, Tensor) and dim is not None else arg

    def element(index: int) -> tuple[Tensor, ...]:
        pairs = zip(args, in_dims, strict=True)
        result = op(*(chosen(arg, dim, index) for arg, dim in pairs))
        return result if isinstance(result, tuple) else (result,)

    columns = zip(*(element(index) for index in range(info.batch_size)), strict=True)
    stacked = tuple(torch.stack(column) for column in columns)
    if len(stacked) == 1:
        return stacked[0], 0
    return stacked, tuple(0 for _ in stacked)
