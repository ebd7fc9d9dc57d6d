"""CUDA graphs: many small kernels launched as one."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from glance_ext.models.glance import HeadScores

_WARM_UP = 3  # calls before a capture: libraries choose their kernels and take their memory


class GraphedFunction:
    """Scoring on a GPU, whose kernels are replayed as one graph for batches of one size.

    A batch of another size runs kernel by kernel. The graph is captured at the first batch of its
    size; if this cannot be done a warning says why, and every batch runs kernel by kernel.

    Args:
        function: Scores images. It must read nothing back from the GPU, copy nothing to it, and
            keep its weights where they are.
        example: Images of the shape, dtype and device that the graph is for; kept, and written to.
    """

    def __init__(self, function: Callable[[Tensor], HeadScores], example: Tensor) -> None:
        self._function = function
        self._input = example
        self._output: HeadScores | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tried = False

    def __call__(self, images: Tensor) -> HeadScores:
        """What the function gives; the caller's own, not the graph's buffers."""
        if images.shape != self._input.shape or images.dtype != self._input.dtype:
            return self._function(images)
        if not self._tried:
            self._tried = True
            self._capture()
        if self._graph is None or self._output is None:
            return self._function(images)
        with torch.cuda.device(self._input.device):
            self._input.copy_(images)
            self._graph.replay()
            return self._output.map(torch.clone)

    def _capture(self) -> None:
        with torch.cuda.device(self._input.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    self._function(self._input)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    self._output = self._function(self._input)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                warnings.warn(
                    f"no CUDA graph of the scoring, which runs slower without: {reason}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return
            self._graph = graph
