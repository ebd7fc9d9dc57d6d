"""CUDA graphs: many small kernels launched as one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from glance_ext.models.glance import HeadScores

_WARM_UP = 3  # calls before a capture: libraries choose their kernels and take their memory


class GraphedFunction:
    """Scoring on a GPU, whose kernels are replayed as one graph for batches of some sizes.

    A batch of another size runs kernel by kernel. A size's graph is captured at its first batch;
    if this cannot be done a warning says why, and every batch runs kernel by kernel.

    Args:
        function: Scores images. It must read nothing back from the GPU, copy nothing to it, and
            keep its weights where they are.
        example: Images of the shape, dtype and device that the graphs are for, as many as in the
            largest batch; kept, and written to.
        sizes: How many images the batches have that are worth a graph; without, as many as the
            example alone.
    """

    def __init__(
        self,
        function: Callable[[Tensor], HeadScores],
        example: Tensor,
        sizes: Iterable[int] | None = None,
    ) -> None:
        self._function = function
        self._example = example
        self._sizes = {len(example)} if sizes is None else set(sizes)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, HeadScores]] = {}

    @property
    def captured(self) -> frozenset[int]:
        """The sizes of batches that have their graph."""
        return frozenset(self._graphs)

    def __call__(self, images: Tensor) -> HeadScores:
        """What the function gives; the caller's own, not the graph's buffers."""
        size, example = len(images), self._example
        fits = images.shape[1:] == example.shape[1:] and images.dtype == example.dtype
        if not fits or size not in self._sizes:
            return self._function(images)
        if size not in self._graphs:
            self._capture(size)
        if size not in self._graphs:
            return self._function(images)
        graph, output = self._graphs[size]
        with torch.cuda.device(example.device):
            example[:size].copy_(images)
            graph.replay()
            return output.map(torch.clone)

    def _capture(self, size: int) -> None:
        images = self._example[:size]
        with torch.cuda.device(images.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    self._function(images)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    output = self._function(images)
            except RuntimeError as error:
                self._sizes.clear()
                reason = str(error).splitlines()[0]
                warnings.warn(
                    f"no CUDA graph of the scoring, which runs slower without: {reason}",
                    RuntimeWarning,
                    stacklevel=3,
                )
                return
            self._graphs[size] = graph, output
