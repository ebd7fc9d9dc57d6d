"""Settings of training, as presets and as they are stored in a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from glance_ext.data.grid import patch_grid
from glance_ext.data.stains import STAINS
from glance_ext.errors import GlanceError

PRECISIONS = ("float32", "bfloat16")
PATCH_SCALES = range(1, 8)
AGGREGATIONS = ("mean", "gaussian", "max", "idw")
IMAGE_SCORES = ("max", "contrast", "mean")
DISTORTIONS = ("stain", "turn")
WHITEN_OVER = ("patch", "image")
LOCAL_NETS = ("fine", "deep")
MEMORY_OF = ("context", "teacher", "local")


def _has_context(settings: TrainSettings) -> bool:
    """Whether a distortion head in context has features to see and stains to learn."""
    remembers = settings.memory_size > 0 and settings.memory_of == "context"
    return remembers and settings.distortion == "stain"


@dataclass(frozen=True)
class TrainSettings:
    """Settings of stages 2 and 3 and of calibration.

    Attributes:
        local_net: Which of the package's Local-Nets to begin with, unless another is given:
            ``"fine"`` has learnt what a teacher's first layers see at a patch, edges and texture;
            ``"deep"`` what a deeper layer makes of the patch alone, closer to the paper's.
        precision: What the networks compute in during stage 3, ``"float32"`` or ``"bfloat16"``;
            weights, losses and the optimizer stay in float32, and so does the distortion head.
        fine_tune_steps: Steps of stage 2; needs the teacher. 0 leaves the stage out.
        fine_tune_batch_size: Patches a step of stage 2.
        fine_tune_learning_rate: Of Local-Net.
        steps: Steps of stage 3.
        batch_size: Patches a step of stage 3.
        holes_per_image: The most of them that come from one image and share its pass through
            Global-Net. The paper draws an image for each patch: 1.
        positions: Where the patches of stage 3 may lie: ``"uniform"`` for anywhere, as in the
            paper; or a stride for those of that grid, whose Local-Net features are then computed
            densely, once an image, if that is less work than one pass a patch.
        turns: Whether normal images are learnt in all eight views that quarter turns and mirroring
            give; the paper learns them as they are.
        stain_uses: How often a patch of stage 3 is used, on average. From 2 on, steps draw from a
            pool of patches, each stained once, whose Local-Net features are computed once; so there
            are as many times fewer patches as they are used. 1 draws and stains each step's patches
            anew, as the paper does.
        global_learning_rate: Of Global-Net.
        head_learning_rate: Of the distortion head.
        stains: What the distortion head learns to tell from untouched patches: ``"small"`` random
            stains, as the paper has them, or ``"wide"``, of any size and fainter too; see
            :data:`~glance_ext.data.stains.STAINS`.
        lambda_t: Weight of the distortion loss beside the inconsistency loss.
        distortion: What the distortion head learns to tell from normal patches: the paper's
            ``"stain"``, or ``"turn"`` for the patch turned by quarters, where an anomaly is the
            whole image.
        head_steps: Further steps of the distortion head alone behind stage 3, with both networks
            frozen, on up to 1,500 images; the paper's are 0.
        lambda_s: Share of the inconsistency score in a patch's score.
        standardise: Whether the heads' scores are brought to one scale over held-out normal patches
            before mixing; the paper mixes raw scores.
        surprisal: Whether that scale is the surprisal, ``-log`` of the share of normal patches that
            score higher, or else mean 0 and variance 1.
        whiten: Whether ``s_IAD`` is of the difference whitened over normal patches; the paper's is
            of the difference as it is. It is not fitted where ``lambda_s`` is 0.
        whiten_over: Whether that is each patch's difference, ``"patch"``, or the mean difference of
            all patches of an image, ``"image"``.
        memory_size: Features of normal patches that are kept, and how far a patch is from the
            nearest of them is part of its score; 0 for none, as in the paper.
        memory_drawn: Share of these that is drawn at random; the rest is a coreset, which leaves
            none of many more far from all of it.
        memory_share: Share of the novelty in a patch's score.
        memory_of: What is kept and compared: ``"context"`` for what the first layers of a
            pretrained network see at a patch in its image, ``"teacher"`` for the teacher's features
            as Local-Net's decoder tells them, ``"local"`` for Local-Net's own.
        refit: Whether, once the model is calibrated on held-out images, its memory is filled anew
            from these too, and the distortion head in context one that has learnt from these too:
            so no good image is new to them.
        context_steps: Steps of a second distortion head, over what that pretrained network sees,
            which learns to tell stains that are all over images, and pieces that do not belong
            there, from what is beside them; 0 for none, as in the paper.
        context_share: Its share in what both distortion heads say.
        pieces: Pieces of other places that are put on an image for it; 0 for stains alone.
        grain: Whether some images that it learns are made noisier or less sharp, as good ones to
            come may be.
        image_score: What of its map an image's score is: ``"max"``, ``"contrast"`` for the
            greatest value above the map's median, or ``"mean"``.
        aggregation: How patches become a map; see ``aggregate_patch_scores``.
        grid: Which patches are scored: a stride, or ``"paper"``.
        patch_scale: By how much the image is shrunk for Local-Net, 1 to 7: its patch of 33x33
            pixels is then a place of 33 to 231 pixels in the 256x256 that Global-Net sees with a
            hole there. ``grid`` and ``positions`` count Local-Net's pixels. The
            paper's is 1.
        tile: Whether to train and calibrate at the images' own resolution, in windows of 256x256,
            instead of resizing every image to that size.
        held_out_share: Share of the normal images kept from training for calibration.
        held_out_most: The most images kept.
        seed: Of everything random.
    """

    local_net: str = LOCAL_NETS[0]
    precision: str = "float32"
    fine_tune_steps: int = 0
    fine_tune_batch_size: int = 16
    fine_tune_learning_rate: float = 2e-4
    steps: int = 2000
    batch_size: int = 32
    holes_per_image: int = 8
    positions: str = "4"
    turns: bool = True
    stain_uses: int = 4
    global_learning_rate: float = 1e-3
    head_learning_rate: float = 1e-3
    stains: str = "wide"
    lambda_t: float = 0.01
    distortion: str = "stain"
    head_steps: int = 0
    lambda_s: float = 0.0
    standardise: bool = True
    surprisal: bool = True
    whiten: bool = True
    whiten_over: str = "patch"
    memory_size: int = 2000
    memory_drawn: float = 0.25
    memory_share: float = 0.4
    memory_of: str = "context"
    refit: bool = True
    context_steps: int = 0
    context_share: float = 0.75
    pieces: int = 3
    grain: bool = True
    image_score: str = "max"
    aggregation: str = "gaussian"
    grid: str = "4"
    patch_scale: int = 1
    tile: bool = False
    held_out_share: float = 0.2
    held_out_most: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses values that mean nothing.

        Raises:
            GlanceError: Names the setting, what it may be, and what came.
        """
        if self.local_net not in LOCAL_NETS:
            raise GlanceError(
                f"local net: expected one of {', '.join(LOCAL_NETS)}, got {self.local_net!r}"
            )
        if not 0 <= self.lambda_s <= 1:
            raise GlanceError(f"lambda_s: expected a share between 0 and 1, got {self.lambda_s}")
        if self.steps < 1 or self.fine_tune_steps < 0:
            raise GlanceError(
                "steps: expected at least 1, and fine-tuning at least 0, got "
                f"{self.steps} and {self.fine_tune_steps}"
            )
        if self.batch_size < 1 or self.fine_tune_batch_size < 2:
            raise GlanceError(
                "batch size: expected at least 1, and for fine-tuning at least 2, got "
                f"{self.batch_size} and {self.fine_tune_batch_size}"
            )
        if self.holes_per_image < 1:
            raise GlanceError(f"holes per image: expected at least 1, got {self.holes_per_image}")
        if self.stain_uses < 1:
            raise GlanceError(f"stain uses: expected at least 1, got {self.stain_uses}")
        if self.patch_scale not in PATCH_SCALES:
            raise GlanceError(f"patch scale: expected 1 to 7, got {self.patch_scale}")
        if self.distortion not in DISTORTIONS:
            raise GlanceError(
                f"distortion: expected one of {', '.join(DISTORTIONS)}, got {self.distortion!r}"
            )
        if self.turns and self.distortion == "turn":
            raise GlanceError(
                "turns: expected none with the distortion 'turn', which tells turned patches from "
                "good ones"
            )
        if self.head_steps < 0:
            raise GlanceError(f"head steps: expected at least 0, got {self.head_steps}")
        if self.memory_size < 0:
            raise GlanceError(f"memory size: expected at least 0, got {self.memory_size}")
        if not 0 <= self.memory_drawn <= 1:
            raise GlanceError(
                f"memory drawn: expected a share between 0 and 1, got {self.memory_drawn}"
            )
        if not 0 <= self.memory_share <= 1:
            raise GlanceError(
                f"memory share: expected a share between 0 and 1, got {self.memory_share}"
            )
        if self.context_steps < 0:
            raise GlanceError(f"context steps: expected at least 0, got {self.context_steps}")
        if self.context_steps and not _has_context(self):
            raise GlanceError(
                "context steps: expected 0 without a memory of context, and where the distortion "
                f"is no stain, got {self.context_steps}"
            )
        if self.pieces < 0:
            raise GlanceError(f"pieces: expected at least 0, got {self.pieces}")
        if not 0 <= self.context_share <= 1:
            raise GlanceError(
                f"context share: expected a share between 0 and 1, got {self.context_share}"
            )
        if self.memory_of not in MEMORY_OF:
            raise GlanceError(
                f"memory of: expected one of {', '.join(MEMORY_OF)}, got {self.memory_of!r}"
            )
        if self.memory_size and not self.standardise:
            raise GlanceError(
                "memory size: expected 0 with a raw mix of scores, which has no scale for the "
                f"novelty, got {self.memory_size}"
            )
        if self.surprisal and not self.standardise:
            raise GlanceError(
                "surprisal: expected none with a raw mix of scores, which brings them to no scale"
            )
        if self.whiten_over not in WHITEN_OVER:
            raise GlanceError(
                f"whiten over: expected one of {', '.join(WHITEN_OVER)}, got {self.whiten_over!r}"
            )
        if self.precision not in PRECISIONS:
            raise GlanceError(
                f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )
        if self.stains not in STAINS:
            raise GlanceError(f"stains: expected one of {', '.join(STAINS)}, got {self.stains!r}")
        if self.aggregation not in AGGREGATIONS:
            raise GlanceError(
                f"aggregation: expected one of {', '.join(AGGREGATIONS)}, got {self.aggregation!r}"
            )
        if self.image_score not in IMAGE_SCORES:
            raise GlanceError(
                f"image score: expected one of {', '.join(IMAGE_SCORES)}, got {self.image_score!r}"
            )
        try:
            patch_grid(self.grid)
        except ValueError as error:
            raise GlanceError(str(error)) from error
        if self.positions != "uniform":
            try:
                patch_grid(self.positions)
            except ValueError as error:
                raise GlanceError(f"positions: expected 'uniform' or a grid; {error}") from error

    def to_json(self) -> dict[str, Any]:
        """All settings as JSON values."""
        return asdict(self)


PRESETS: dict[str, TrainSettings] = {
    "quick": TrainSettings(steps=200, memory_share=0.5),  # as chosen without a head in context
    "default": TrainSettings(head_steps=1500, context_steps=2000),
    "paper": TrainSettings(
        local_net="deep",
        fine_tune_steps=50_000,
        steps=200_000,
        batch_size=64,
        holes_per_image=1,
        positions="uniform",
        turns=False,
        stain_uses=1,
        global_learning_rate=1e-4,
        head_learning_rate=1e-5,
        stains="small",
        lambda_s=0.8,
        standardise=False,
        surprisal=False,
        memory_size=0,
        whiten=False,
        image_score="max",
        aggregation="mean",
        grid="paper",
    ),
}


def preset(name: str, **changes: Any) -> TrainSettings:
    """A preset with every change that is not None.

    Where the grid has patches that training would never see, and no positions are named, training
    sees patches anywhere: Global-Net answers badly for holes at alignments that it never met.
    Where the distortion head learns to tell turned patches, images are not turned, unless that is
    asked for. Without a memory of context, or without stains, there is no distortion head in
    context.

    Raises:
        GlanceError: The name is unknown or a value means nothing.
    """
    if name not in PRESETS:
        raise GlanceError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    changes = {k: v for k, v in changes.items() if v is not None}
    if changes.get("distortion") == "turn":
        changes.setdefault("turns", False)
    base = PRESETS[name]
    if not _has_context(replace(base, **{**changes, "context_steps": 0})):
        changes.setdefault("context_steps", 0)
    settings = replace(base, **changes)
    if changes.get("positions") is None and not learnt(settings.grid, settings.positions):
        return replace(settings, positions="uniform")
    return settings


def learnt(grid: str, positions: str) -> bool:
    """Whether training on patches at ``positions`` sees every patch of a grid."""
    if positions == "uniform":
        return True
    return set(patch_grid(grid).starts) <= set(patch_grid(positions).starts)
