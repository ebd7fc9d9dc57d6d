"""Calls in a process of their own."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from glance_ext.bench.alone import Alone
from glance_ext.errors import GlanceError


def counter(first: Tensor) -> Callable[[], Tensor]:
    """Counts its calls; beside the count, where and with how many threads it runs."""
    count = first.clone()

    def call() -> Tensor:
        count.add_(1)
        return torch.stack(
            [count, torch.tensor(os.getpid()), torch.tensor(torch.get_num_threads())]
        )

    return call


def leaver() -> Callable[[], Tensor]:
    return lambda: os._exit(3)


def test_it_is_prepared_once_in_one_other_process() -> None:
    alone = Alone(counter, torch.tensor(40))
    results = [alone().tolist() for _ in range(2)]
    assert [count for count, _, _ in results] == [41, 42]
    (process,) = {process for _, process, _ in results}
    assert process != os.getpid()
    assert {threads for _, _, threads in results} == {torch.get_num_threads()}


def test_the_process_ends_with_the_object() -> None:
    alone = Alone(counter, torch.tensor(0))
    process = int(alone()[1])
    os.kill(process, 0)
    del alone
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_process_that_ends_is_an_error_that_names_the_call() -> None:
    alone = Alone(leaver)
    with pytest.raises(
        GlanceError, match="leaver: the process that runs it alone has ended with 3"
    ):
        alone()
