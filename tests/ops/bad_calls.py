"""What an op says of a bad call, in each of its forms."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from glance_ext.ops import reference


def assert_all_forms_say(op: str, expected: str, arguments: list[Any], device: str) -> None:
    """Native, meta, fake mode and reference raise the same kind with ``op: expected ...``."""
    native: Callable[..., Any] = getattr(torch.ops.glance_ext, op)

    def moved(to: str) -> list[Any]:
        return [v.to(to) if isinstance(v, Tensor) else v for v in arguments]

    def in_fake_mode() -> None:
        with FakeTensorMode() as mode:
            native(*(mode.from_tensor(v) if isinstance(v, Tensor) else v for v in arguments))

    raised = []
    for attempt in (
        lambda: native(*moved(device)),
        lambda: native(*moved("meta")),
        in_fake_mode,
        lambda: getattr(reference, op)(*moved(device)),
    ):
        with pytest.raises((ValueError, TypeError)) as caught:
            attempt()
        raised.append((caught.type, str(caught.value).splitlines()[0]))
    kind = TypeError if re.search(r"got (float|int)\d+$", expected) else ValueError
    assert raised == [(kind, f"{op}: expected {expected}")] * 4
