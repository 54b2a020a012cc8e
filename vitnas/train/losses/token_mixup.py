"""Token mixup: half of a batch by CutMix along the cells of the final grid, half by mixup, with a label per cell.

Source: ViT-ResNAS (arXiv 2109.00642, section 4.1; "SwitchTokenMix" in the authors' code, after Gong et al., arXiv
2104.12753). The network learns the image's label by its class token and the cells' labels by its patch head. One
deviation: boxes reach the last row and column of cells, which the authors' offsets leave out (PAPERS.md).

Shapes: B images, R rows and C columns of cells, n = R C, Y classes.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from vitnas.data import require_labels, require_one_class
from vitnas.errors import UserError
from vitnas.grids import Grid
from vitnas.train.task import Batch, Outputs, Task, TaskConfig, TaskGiven

CUTMIX_ALPHA, MIXUP_ALPHA = 1.0, 0.8


@dataclass(frozen=True, kw_only=True)
class TokenMixup(Task):
    """Cross-entropy of the class token and of every patch.

    Attributes:
        num_classes: width of the labels.
        grid: rows and columns of patches that the patch head sees.
        label_smoothing: spread over all classes before mixing.
        patch_weight: factor of the patches' term.
    """

    num_classes: int
    grid: Grid
    label_smoothing: float = 0.1
    patch_weight: float = 1.0
    wants = ("head", "patch_head?")

    def mix(self, batch: Batch) -> Batch:
        """Mix every other image by cells, the others as a whole. Draws from Python's and torch's generators.

        Raises:
            UserError: no labels, or labels that were mixed before; images that the grid does not divide.
        """
        images_BCHW, (rows, columns) = batch.images_BCHW.clone(), self.grid
        if batch.kind != "class":
            require_one_class(batch.targets, "token mixup")
        require_labels(batch.targets, "token mixup")
        if batch.targets.dim() != 1:
            raise UserError(
                "the labels are mixed already; token mixup mixes images by itself. Set mixup and cutmix of the "
                "augmentation to 0."
            )
        height, width = images_BCHW.shape[-2:]
        if height % rows or width % columns:
            raise UserError(
                f"the images have {height} x {width} pixels and the final grid {rows} x {columns} cells; the grid must "
                "divide the image. Change the image size."
            )
        hard_BY = functional.one_hot(batch.targets, self.num_classes).float()
        labels_BY = hard_BY * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        cells_BRCY = labels_BY[:, None, None].repeat(1, rows, columns, 1)
        self._cut(images_BCHW[0::2], labels_BY[0::2], cells_BRCY[0::2])
        self._blend(images_BCHW[1::2], labels_BY[1::2], cells_BRCY[1::2])
        return replace(
            batch,
            views=(images_BCHW, *batch.views[1:]),
            targets=labels_BY,
            patch_targets=cells_BRCY.flatten(1, 2),
        )

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        ce = functional.cross_entropy(outputs["head"], batch.targets)
        if "patch_head" not in outputs or batch.patch_targets is None:
            return {"loss": ce}
        patches_BNY = outputs["patch_head"]
        targets_BNY = as_fine(batch.patch_targets, self.grid, patches_BNY.shape[1])
        patch = functional.cross_entropy(patches_BNY.flatten(0, 1), targets_BNY.flatten(0, 1))
        return {"loss": ce + self.patch_weight * patch, "ce": ce, "patch": patch}

    def _cut(self, images_BCHW: Tensor, labels_BY: Tensor, cells_BRCY: Tensor) -> None:
        """Paste a box of cells from a random partner, the same box for all, in place."""
        grid, partner_B = self.grid, _partners(images_BCHW)
        top, left, height, width = random_box(grid, random.betavariate(CUTMIX_ALPHA, CUTMIX_ALPHA))
        rows, columns = slice(top, top + height), slice(left, left + width)
        cells_BRCY[:, rows, columns] = cells_BRCY[partner_B][:, rows, columns]
        down, across = images_BCHW.shape[-2] // grid[0], images_BCHW.shape[-1] // grid[1]
        pixels = (
            ...,
            slice(top * down, (top + height) * down),
            slice(left * across, (left + width) * across),
        )
        images_BCHW[pixels] = images_BCHW[partner_B][pixels]
        kept = 1 - height * width / prod(grid)
        labels_BY.copy_(labels_BY * kept + labels_BY[partner_B] * (1 - kept))

    def _blend(self, images_BCHW: Tensor, labels_BY: Tensor, cells_BRCY: Tensor) -> None:
        """Average with a random partner, in place."""
        partner_B, share = _partners(images_BCHW), random.betavariate(MIXUP_ALPHA, MIXUP_ALPHA)
        images_BCHW.copy_(images_BCHW * share + images_BCHW[partner_B] * (1 - share))
        labels_BY.copy_(labels_BY * share + labels_BY[partner_B] * (1 - share))
        cells_BRCY.copy_(labels_BY[:, None, None].expand_as(cells_BRCY))


@dataclass(frozen=True, kw_only=True)
class TokenMixupConfig(TaskConfig):
    """Labels per patch of mixed images, with a patch head weighted `patch_weight`."""

    kind = "token_mixup"
    heads = ("patch_head",)
    needs_heads = True

    patch_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.patch_weight < 0:
            raise UserError(f"task.patch_weight is {self.patch_weight}; it cannot be negative. Use 1.")

    def build(self, given: TaskGiven) -> TokenMixup:
        augment = given.augment
        if augment.mixup or augment.cutmix:
            raise UserError(
                f"data.augment mixes images (mixup {augment.mixup}, cutmix {augment.cutmix}) and task.kind token_mixup "
                "does so itself; only one may. Set data.augment.mixup and data.augment.cutmix to 0."
            )
        return TokenMixup(
            num_classes=given.num_classes,
            grid=given.grid,
            label_smoothing=augment.label_smoothing,
            patch_weight=self.patch_weight,
        )


def _partners(images_BCHW: Tensor) -> Tensor:
    """Every image's partner. Drawn on the host and sent along: as an index from there each use would wait."""
    return torch.randperm(len(images_BCHW)).to(images_BCHW.device, non_blocking=True)


def random_box(grid: Grid, share: float) -> tuple[int, int, int, int]:
    """Top, left, height and width, in cells, of a box of about `share` of the grid; without cells when that is < 1."""
    rows, columns = grid
    area = int(rows * columns * share)
    height = random.randint(1, max(1, min(rows, area) - 2))
    width = area // height
    if width > columns:
        width, height = columns, area // columns
    return random.randint(0, rows - height), random.randint(0, columns - width), height, width


def as_fine(targets_BnY: Tensor, cells: Grid, num_patches: int) -> Tensor:
    """Labels of a grid of cells for a finer grid of patches, whose patches each lie in one cell.

    Raises:
        UserError: the grid is not a multiple of the cells'.
    """
    times = math.isqrt(num_patches // prod(cells))
    if times == 1 and num_patches == prod(cells):
        return targets_BnY
    if times**2 * prod(cells) != num_patches:
        raise UserError(
            f"the network has {num_patches} patches and the labels {cells[0]} x {cells[1]} cells; patches must lie "
            "within cells. Use a grid that divides the patches."
        )
    fine = targets_BnY.unflatten(1, cells).repeat_interleave(times, 1).repeat_interleave(times, 2)
    return fine.flatten(1, 2)
