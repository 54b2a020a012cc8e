"""The plain ViT that a person would scale by hand to the same budget: the baseline that a search has to beat.

DeiT's rules (arXiv 2012.12877): all blocks equal, MLP four times the width, class token, learned positions, heads 64
wide, at least three of them; smaller nets than DeiT-Ti have three narrower heads, the smallest two. What comes from the
winner is what the data and the training ask for, and its patch size: a baseline that is given the patch size which the
search found is the harder one to beat, and the comparison is then of widths, heads and depth. Width and depth are
scaled until the budget is used, with a width of 8 to 32 times the depth; among those that use it about equally well,
the one whose ratio is nearest to DeiT-Ti's (192 / 12 = 16) wins. Limits on latency are not looked at: the final table
shows what was measured.
"""

from __future__ import annotations

import math

from vitnas.arch import Arch, Block, Stage
from vitnas.budget import Budget
from vitnas.counting import count
from vitnas.errors import UserError

RATIO = 16.0  # DeiT-Ti's width over depth
CLOSE = 0.02  # nets within 2 % of the best use of the budget count as equal
LEAST, MOST = RATIO / 2, RATIO * 2  # DeiT-S is 32; nobody draws a ViT outside by hand
HEAD_DIM = 64
SMALLEST = 8  # width of the smallest net that is looked at
TWO_HEADS = 48  # below this width three heads would have less than 16 entries each


def hand_scaled(like: Arch, budget: Budget) -> Arch:
    """The hand-scaled ViT for `budget`'s counted limits, for the images, patches, classes and trained heads of `like`.

    Where the budget does not limit MACs from above, `like`'s own MACs are the limit.

    Raises:
        UserError: no plain ViT meets the budget.
    """
    limits = [
        limit.high for limit in budget.counted.limits if limit.quantity == "macs" and limit.high is not None
    ]
    limit = min(limits, default=count(like).macs)
    options = _within(like, budget, limit)
    if not options:
        raise UserError(
            f"no plain ViT meets the budget {budget.text!r}; leave the baseline 'hand_scaled' out."
        )
    shapely = [option for option in options if LEAST <= _ratio(option[1]) <= MOST] or options
    most = max(macs for macs, _ in shapely)
    near = [arch for macs, arch in shapely if macs >= (1 - CLOSE) * most]
    return min(near, key=lambda arch: abs(math.log(_ratio(arch) / RATIO)))


def _within(like: Arch, budget: Budget, most: float) -> list[tuple[int, Arch]]:
    """(MACs, Arch) of every plain ViT that meets the budget."""
    options = []
    for depth in range(2, 25):
        for width in range(SMALLEST, 1025):
            if num_heads(width) is None:
                continue
            arch = plain_vit(like, width, depth)
            cost = count(arch)
            if cost.macs > most:
                break
            if not budget.counted.misses(cost):
                options.append((cost.macs, arch))
    return options


def _ratio(arch: Arch) -> float:
    return arch.embed_dim / arch.depth


def num_heads(width: int) -> int | None:
    """As few heads as are at most 64 wide each, at least 3 (2 in the smallest nets); None where none of even width fit.

    >>> [num_heads(width) for width in (32, 48, 192, 384, 390)]
    [2, 3, 3, 6, None]
    """
    heads = max(2 if width < TWO_HEADS else 3, math.ceil(width / HEAD_DIM))
    return None if width % (2 * heads) else heads


def plain_vit(like: Arch, width: int, depth: int) -> Arch:
    """A DeiT of that width and depth for the images, patches, classes and trained heads of `like`.

    Raises:
        UserError: a width that does not divide into heads.
    """
    heads = num_heads(width)
    if heads is None:
        raise UserError(
            f"width is {width}; it must divide into heads of an even width of at most {HEAD_DIM}. Use 192, 256 or 384."
        )
    block = Block(num_heads=heads, head_dim=width // heads, mlp_hidden=4 * width)
    return Arch(
        image_size=like.image_size,
        patch_size=like.patch_size,
        in_chans=like.in_chans,
        num_classes=like.num_classes,
        stages=(Stage(embed_dim=width, blocks=(block,) * depth),),
        distill_token=like.distill_token,
        patch_head=like.patch_head,
    )
