"""The plain ViT that a person would scale by hand to the same budget: the baseline that a search has to beat.

DeiT's rules (arXiv 2012.12877): all blocks equal, MLP four times the width, class token, learned positions, no relative
positions. Width and depth are scaled until the budget is used, with a width of 8 to 32 times the depth; among those
that use it about equally well, the one whose ratio is nearest to DeiT-Ti's (192 / 12 = 16) wins. Limits on latency are
not looked at: the final table shows what was measured.
"""

from __future__ import annotations

import math
from dataclasses import replace

from vitnas.arch import Arch, Block, Stage
from vitnas.budget import Budget
from vitnas.counting import count
from vitnas.errors import UserError

RATIO = 16.0  # DeiT-Ti's width over depth
CLOSE = 0.02  # nets within 2 % of the best use of the budget count as equal
WIDTH_STEP = 2
LEAST, MOST = RATIO / 2, RATIO * 2  # DeiT-S is 32; nobody draws a ViT outside by hand


def hand_scaled(like: Arch, budget: Budget) -> Arch:
    """The hand-scaled ViT for `budget`'s counted limits, for the images, patch and classes of `like`.

    Where the budget does not limit MACs from above, `like`'s own MACs are the limit.

    Raises:
        UserError: no plain ViT meets the budget.
    """
    limits = [
        limit.high for limit in budget.counted.limits if limit.quantity == "macs" and limit.high is not None
    ]
    limit = min(limits, default=count(like).macs)
    options = []
    for depth in range(2, 25):
        for width in range(WIDTH_STEP, 1025, WIDTH_STEP):
            arch = plain_vit(like, width, depth)
            cost = count(arch)
            if cost.macs > limit:
                break
            if not budget.counted.misses(cost):
                options.append((cost.macs, arch))
    if not options:
        raise UserError(
            f"no plain ViT meets the budget {budget.text!r}; leave the baseline 'hand_scaled' out."
        )
    shapely = [option for option in options if LEAST <= _ratio(option[1]) <= MOST] or options
    most = max(macs for macs, _ in shapely)
    near = [arch for macs, arch in shapely if macs >= (1 - CLOSE) * most]
    return min(near, key=lambda arch: abs(math.log(_ratio(arch) / RATIO)))


def _ratio(arch: Arch) -> float:
    return arch.embed_dim / arch.depth


def plain_vit(like: Arch, width: int, depth: int) -> Arch:
    """A DeiT of that width and depth; heads are as near to 64 wide (or to `like`'s) as the width allows."""
    wanted = like.blocks[0].head_dim
    heads = min((h for h in range(1, width + 1) if width % h == 0), key=lambda h: abs(width / h - wanted))
    block = Block(num_heads=heads, head_dim=width // heads, mlp_hidden=4 * width)
    return replace(
        like,
        stages=(Stage(embed_dim=width, blocks=(block,) * depth),),
        stem="linear",
        stem_width=0,
        relative_position=0,
        global_pool="token",
        class_token=True,
        position="learned",
        mlp_norm="branch",
        fc_norm=False,
        norm_eps=1e-6,
    )
