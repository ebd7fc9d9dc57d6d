"""The whole model: both networks and both heads, from images and patch origins to raw scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glance_ext.data.patches import crop_patches
from glance_ext.models.context_net import ContextNet
from glance_ext.models.global_net import GlobalNet, hole_masks
from glance_ext.models.heads import (
    ContextHead,
    DistortionHead,
    ResidualScale,
    distortion,
    inconsistency,
)
from glance_ext.models.local_net import LocalNet
from glance_ext.models.local_plan import LocalPlan
from glance_ext.models.memory import FeatureMemory
from glance_ext.models.normalisation import normalise
from glance_ext.nn import HolePlan

PATCH_SIZE = 33
IMAGE_SIZE = (GlobalNet.IMAGE_SIZE, GlobalNet.IMAGE_SIZE)
_COMPARED_LAYERS = 2  # of the context net, by the memory: the third sees too much of an image


@dataclass(frozen=True)
class HeadScores:
    """Raw scores of patches; higher is more anomalous.

    Attributes:
        inconsistency: ``s_IAD``, any shape; of the whitened difference where the model has a
            :class:`~glance_ext.models.heads.ResidualScale`.
        distortion: ``s_DAD`` in [0, 1], the same shape.
        log_odds: The distortion head's log-odds of being distorted, the same shape.
        novelty: Distance to the nearest normal patch that is kept, the same shape; None where the
            model has no :class:`~glance_ext.models.memory.FeatureMemory`.
        context_log_odds: The log-odds of being distorted of the distortion head in context, the
            same shape; None where the model has no :class:`~glance_ext.models.heads.ContextHead`.
    """

    inconsistency: Tensor
    distortion: Tensor
    log_odds: Tensor
    novelty: Tensor | None = None
    context_log_odds: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> HeadScores:
        """Each score that there is, changed."""
        scores = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self, **{n: change(score) for n, score in scores.items() if score is not None}
        )


@dataclass(frozen=True)
class GridPlan:
    """What depends on the grid alone and serves every image; see :meth:`Glance.plan`.

    Attributes:
        local: How the patches share Local-Net's convolutions.
        holes: How the holes share Global-Net's.
        origins: ``(P, 2)``, the patches' first pixels as Local-Net sees them.
    """

    local: LocalPlan
    holes: HolePlan
    origins: Tensor

    def __len__(self) -> int:
        return len(self.local)


class Glance(nn.Module):
    """Local-Net, Global-Net and the distortion head.

    Args:
        local_net: A distilled Local-Net.
        global_net: A Global-Net of as many features.
        distortion_head: The DAD head.
        patch_scale: By how much the image is shrunk for Local-Net, 1 to 7. Its patch of 33x33
            pixels is then a place of ``33 * patch_scale`` in the image, where Global-Net has its
            hole. Origins count the pixels that Local-Net sees.
        whiten: Whether ``s_IAD`` is of the whitened difference; it is the plain one until
            ``residual_scale`` is fitted.
        whiten_over: ``"patch"``, or ``"image"`` for the mean difference of an image's patches.
        memory_size: How many features of normal patches are kept for the novelty score; 0 for none,
            and no such score.
        memory_features: t, the length of the teacher's feature that they are decoded to; 0 to keep
            Local-Net's own.
        memory_context: Whether they are a :class:`~glance_ext.models.context_net.ContextNet`'s
            instead, whose weights are still to be loaded.
        context_head: Whether there is a distortion head over that network's features.
        context_depth: Of how many of its layers, 2 or 3; the memory compares the first two.
    """

    def __init__(
        self,
        local_net: LocalNet,
        global_net: GlobalNet | None = None,
        distortion_head: DistortionHead | None = None,
        patch_scale: int = 1,
        *,
        whiten: bool = False,
        whiten_over: str = "patch",
        memory_size: int = 0,
        memory_features: int = 0,
        memory_context: bool = False,
        context_head: bool = False,
        context_depth: int = 3,
    ) -> None:
        if memory_context and (memory_features or not memory_size):
            raise ValueError(
                "Glance: expected a memory_size above 0 and memory_features of 0 with "
                f"memory_context, got {memory_size} and {memory_features}"
            )
        if context_head and not memory_context:
            raise ValueError("Glance: expected memory_context with context_head, got neither")
        super().__init__()
        self.patch_scale = patch_scale
        self.local_net = local_net
        self.global_net = global_net or GlobalNet(local_net.features)
        self.distortion_head = distortion_head or DistortionHead(local_net.features)
        self.residual_scale = ResidualScale(local_net.features, whiten_over) if whiten else None
        self.memory = None
        self.context_net = self.context_head = None
        if memory_context:
            self.context_net = ContextNet(context_depth if context_head else _COMPARED_LAYERS)
            layers = ContextNet.LAYERS[:_COMPARED_LAYERS]
            self.memory = FeatureMemory(memory_size, sum(layers), layers=layers)
            if context_head:
                self.context_head = ContextHead(self.context_net.features)
        elif memory_size:
            self.memory = FeatureMemory(memory_size, local_net.features, memory_features)

    @property
    def view_size(self) -> int:
        """Side of the square image that Local-Net sees, in pixels."""
        return GlobalNet.IMAGE_SIZE // self.patch_scale

    @property
    def hole_size(self) -> int:
        """Side of the hole that Global-Net sees, in pixels."""
        return PATCH_SIZE * self.patch_scale

    def local_view(self, images: Tensor) -> Tensor:
        """Images ``(N, 3, 256, 256)`` as Local-Net sees them, ``(N, 3, view_size, view_size)``."""
        return images if self.patch_scale == 1 else F.avg_pool2d(images, self.patch_scale)

    def forward(self, images: Tensor, origins: Tensor) -> HeadScores:
        """Scores one patch of each image.

        Args:
            images: ``(B, 3, 256, 256)``, RGB in [0, 1].
            origins: ``(B, 2)`` int64, row and column of each patch's first pixel.

        Returns:
            Scores ``(B,)``.
        """
        local_features, global_features = self.patch_features(images, origins)
        scores = self.compare(
            local_features[:, None],
            global_features[:, None],
            self.context_features(images, origins[:, None]),
        )
        return scores.map(lambda score: score[:, 0])

    def patch_features(self, images: Tensor, origins: Tensor) -> tuple[Tensor, Tensor]:
        """Local and global features, ``(B, n)`` each, of one patch of each image."""
        images = normalise(images)
        local_features = self.local_net(crop_patches(self.local_view(images), origins, PATCH_SIZE))
        masks = hole_masks(origins * self.patch_scale, self.hole_size, IMAGE_SIZE)
        return local_features, self.global_net(images, masks)

    def context_features(self, images: Tensor, origins: Tensor) -> Tensor | None:
        """What the ``context_net`` sees at patches of each image.

        Args:
            images: ``(N, 3, 256, 256)``, RGB in [0, 1].
            origins: ``(P, 2)``, in every image, or ``(N, P, 2)``.

        Returns:
            ``(N, P, 192)``, with a head in context ``(N, P, 448)``; None where the model has no
            ``context_net``.
        """
        if self.context_net is None:
            return None
        view = self.local_view(normalise(images)).to(self.context_net.stem.weight.dtype)
        return self.context_net.patch_features(view, origins)

    def compare(
        self,
        local_features: Tensor,
        global_features: Tensor,
        context_features: Tensor | None = None,
    ) -> HeadScores:
        """Scores ``(N, P)`` from features ``(N, P, n)`` of both kinds, P patches of each image.

        A model with a ``context_net`` needs its features too: :meth:`context_features`.

        Raises:
            ValueError: It does not get them.
        """
        if self.context_net is not None and context_features is None:
            raise ValueError(
                "Glance.compare: expected context_features for the context_net, got none"
            )
        log_odds = self.distortion_head(local_features, global_features)
        difference = inconsistency if self.residual_scale is None else self.residual_scale
        return HeadScores(
            difference(local_features, global_features),
            distortion(log_odds),
            -log_odds,
            None
            if self.memory is None
            else self.memory(
                self.remembered(local_features if context_features is None else context_features)
            ),
            None if self.context_head is None else -self.context_head(context_features),
        )

    def remembered(self, features: Tensor) -> Tensor:
        """What the memory compares of patches' context features, or without any of ``Z_l``."""
        if self.context_net is None:
            return features
        return features[..., : sum(ContextNet.LAYERS[:_COMPARED_LAYERS])]

    def plan(
        self,
        row_starts: Sequence[int],
        column_starts: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> GridPlan:
        """Plans the grid of all patches that begin at these rows and columns.

        Args:
            row_starts: First rows, ascending.
            column_starts: First columns, ascending.
            device: Of the images to come.
            dtype: That the networks compute in.
        """
        rows, columns = torch.tensor(row_starts), torch.tensor(column_starts)
        origins = torch.cartesian_prod(rows, columns).reshape(-1, 2)
        return GridPlan(
            self.local_net.plan(row_starts, column_starts, PATCH_SIZE),
            self.plan_holes(origins, device=device, dtype=dtype),
            origins.to(device),
        )

    def plan_holes(
        self,
        origins: Tensor,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> HolePlan:
        """Plans Global-Net's holes over patches at ``origins`` ``(P, 2)`` or ``(N, P, 2)``."""
        return self.global_net.plan(
            origins * self.patch_scale, self.hole_size, IMAGE_SIZE, device=device, dtype=dtype
        )

    @torch.no_grad()
    def score_grid(self, images: Tensor, plan: GridPlan) -> HeadScores:
        """Scores every patch of a grid in every image, sharing what the patches share.

        Equal to :meth:`score_patches` up to rounding, in a fraction of the work. The networks
        compute in the dtype of their parameters, the heads in float32.

        Args:
            images: ``(N, 3, 256, 256)``, RGB in [0, 1].
            plan: From :meth:`plan`.

        Returns:
            Scores ``(N, P)``, the grid's patches row by row.
        """
        return self.compare(
            *self.grid_features(images, plan), self.context_features(images, plan.origins)
        )

    @torch.no_grad()
    def grid_features(
        self, images: Tensor, plan: GridPlan, local_features: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features of every patch of a grid in every image, sharing what the patches share.

        Args:
            images: ``(N, 3, 256, 256)``, RGB in [0, 1].
            plan: From :meth:`plan`.
            local_features: What an earlier call gave for these images, if it is known.

        Returns:
            Local and global features, ``(N, P, n)`` each, in float32 or wider.
        """
        dtype = next(self.local_net.parameters()).dtype
        images = normalise(images)
        if local_features is None:
            view = self.local_view(images).to(dtype)
            local_features = self.local_net.dense(view, plan.local)
        images = images.to(dtype)
        global_features = self.global_net.shared_features(images, plan.holes)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return local_features.to(wide), global_features.to(wide)

    @torch.no_grad()
    def score_patches(
        self, images: Tensor, origins: Tensor, batch_size: int | None = None
    ) -> HeadScores:
        """Scores every patch of every image, each by its own masked pass: the specification.

        Args:
            images: ``(N, 3, 256, 256)``, RGB in [0, 1].
            origins: ``(P, 2)`` int64.
            batch_size: Patches that are scored together; by default 8 on a CPU, whose allocator
                hands larger tensors back to the system after every use, and 128 elsewhere.

        Returns:
            Scores ``(N, P)``.
        """
        if batch_size is None:
            batch_size = 8 if images.device.type == "cpu" else 128
        parts = [
            self.patch_features(image.expand(len(chunk), -1, -1, -1), chunk)
            for image in images
            for chunk in origins.to(images.device).split(batch_size)
        ]
        shape = (len(images), len(origins), -1)
        local_features, global_features = (
            torch.cat(features).reshape(shape) for features in zip(*parts, strict=True)
        )
        return self.compare(local_features, global_features, self.context_features(images, origins))
