"""Training in several processes, each with a share of every step: what ``torchrun`` starts.

Every process draws everything random of a step, computes its share of the losses, and adds its
gradients to the others'; so all have the same weights, and a run of several processes learns what
a run of one does, up to rounding. Process 0 alone reads and writes files of the run's state.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from glance_ext.errors import GlanceError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that train together; by default this one alone.

    Attributes:
        rank: Which of them this is, from 0.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def on_first(self, work: Callable[[], T]) -> T:
        """Does something in process 0 and gives the result, or the error, to all."""
        if self.size == 1:
            return work()
        outcome: list[object] = [None, None]
        if self.is_first:
            try:
                outcome[0] = work()
            except GlanceError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, 0)
        if isinstance(outcome[1], GlanceError):
            raise outcome[1]
        return outcome[0]  # type: ignore[return-value]

    def start_alike(self, modules: Iterable[nn.Module]) -> None:
        """Gives all processes the weights of process 0."""
        if self.size > 1:
            for module in modules:
                for value in module.state_dict().values():
                    dist.broadcast(value, 0)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.on_all([torch.tensor([float(flag)])])[0].item() > 0 if self.size > 1 else flag

    def add_up(
        self,
        optimizer: torch.optim.Optimizer,
        losses: dict[str, Tensor],
        flag: bool,
        *,
        replicated: bool,
    ) -> tuple[dict[str, Tensor], bool]:
        """Adds up gradients and losses over the processes, in one message.

        Args:
            optimizer: Of the parameters, whose gradients are changed in place.
            losses: Scalars.
            flag: See :meth:`any`.
            replicated: Whether every process has done the whole step, so that the sum is divided
                by their number.

        Returns:
            The losses, and whether any process has set the flag.
        """
        if self.size == 1:
            return losses, flag
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in parameters]
        values = [loss.detach().reshape(1) for loss in losses.values()]
        share = 1 / self.size if replicated else 1.0
        *sums, flags = self.on_all([*grads, *values, torch.tensor([float(flag)])])
        for grad, total in zip(grads, sums[: len(grads)], strict=True):
            grad.copy_(total * share)
        found = [total.reshape(()) * share for total in sums[len(grads) :]]
        return dict(zip(losses, found, strict=True)), bool(flags.item() > 0)

    def on_all(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sums over all processes of some tensors, in the first one's dtype and place."""
        first = tensors[0]
        if dist.get_backend() == "nccl":
            first = first.cuda()
        flat = torch.cat([tensor.flatten().to(first) for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """Joins the other processes that ``torchrun`` has started; alone where it has not.

    Args:
        device: Where to train. Of the GPUs of a machine each process takes one.

    Yields:
        The processes, and the device of this one.
    """
    if not dist.is_torchelastic_launched():
        yield World(), device
        return
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise GlanceError(
                f"torchrun: expected at most a process for each of {torch.cuda.device_count()} "
                f"GPUs, got process {local} on this machine"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
