"""The plain ViT that a person would scale by hand to the same budget: the baseline that a search has to beat.

DeiT's rules (arXiv 2012.12877): all blocks equal, MLP four times the width, class token, learned positions, heads 64
wide, at least three of them; smaller nets than DeiT-Ti have three narrower heads, the smallest two. What comes from
the winner is what the data and the training ask for, and its patch size, to begin with. Width and depth are scaled
until the budget is used, with a width of 8 to 32 times the depth; among those that use it about equally well, the one
whose ratio is nearest to DeiT-Ti's (192 / 12 = 16) wins. A person would try more than one shape, so there are three: a
deep one, DeiT-Ti's and a wide one, of every patch size that the Space has, of which the best is taken. They keep to
the same limits as the search, latency included, which is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cache
from typing import TypeAlias

from vitnas.arch import Arch, Block, Stage
from vitnas.budget import Budget, Limit
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.space import Space

RATIO = 16.0  # DeiT-Ti's width over depth
CLOSE = 0.02  # nets within 2 % of the best use of the budget count as equal
# Of width over depth, and how many times off is as good: DeiT-S is 32; nobody draws a ViT far outside by hand.
SHAPES = ((RATIO, 2.0), (RATIO / 2, math.sqrt(2)), (RATIO * 2, math.sqrt(2)))
MORE = 4  # times the MACs, where a plain ViT of so many could be slower still
TIMED = 4  # nets of about equal MACs that are timed for the right shape
HEAD_DIM = 64
SMALLEST = 8  # width of the smallest net that is looked at
TWO_HEADS = 48  # below this width three heads would have less than 16 entries each

Milliseconds: TypeAlias = Callable[[Arch], float]


def hand_scaled(
    like: Arch,
    budget: Budget,
    clocks: Mapping[str, Milliseconds] | None = None,
    ratio: float = RATIO,
    *,
    spread: float = 2.0,
    patch_size: int | None = None,
    without: Collection[Arch] = (),
) -> Arch:
    """The hand-scaled ViT for `budget`, for the images, patches, classes and trained heads of `like`.

    Where the budget limits neither MACs nor latency from above, `like`'s own MACs are the limit. Where it limits
    latency and no MACs there is none: at equal latency a plain ViT may have many times the MACs of `like`.

    Args:
        clocks: what measures latency, for each target that the budget names; without, such limits are not looked at.
        ratio: the width over the depth to be near to; where no net is within `spread` times of it, the nearest.
        patch_size: None: `like`'s.
        without: is not taken again.

    Raises:
        UserError: no plain ViT meets the budget.
    """
    bounded = [limit for limit in budget.limits if limit.high is not None]
    limits = [limit.high for limit in bounded if limit.quantity == "macs" and limit.high is not None]
    timed = [limit for limit in bounded if limit.quantity == "latency"] if clocks else []
    most = min(limits, default=count(like).macs)

    def options() -> list[tuple[int, Arch]]:
        """(MACs, Arch) of rising MACs."""
        every = [option for option in _within(like, budget, most, patch_size) if option[1] not in without]
        off = [_off(arch, ratio) for _, arch in every]
        least = max(math.log(spread), min(off, default=0.0))
        near = [option for option, away in zip(every, off, strict=True) if away <= least]
        return sorted(near, key=lambda option: option[0])

    ranked = options()
    if timed and clocks:
        while not limits and ranked:
            shallow = min(
                (arch for _, arch in ranked[-TIMED:]), key=lambda arch: arch.depth
            )  # so the fastest
            if _misses(shallow, timed, clocks):
                break
            before, most = len(ranked), MORE * most
            ranked = options()
            if len(ranked) == before:
                break
        ranked = _fast(ranked, timed, clocks)
    if not ranked:
        raise UserError(
            f"no plain ViT meets the budget {budget.text!r}; leave the baseline 'hand_scaled' out."
        )
    near = [arch for macs, arch in ranked if macs >= (1 - CLOSE) * ranked[-1][0]]
    best = sorted(near, key=lambda arch: _off(arch, ratio))
    if timed and clocks:  # among those of about equal MACs some are slower
        return next((arch for arch in best[:TIMED] if not _misses(arch, timed, clocks)), ranked[-1][1])
    return best[0]


def three_shapes(
    like: Arch,
    budget: Budget,
    clocks: Mapping[str, Milliseconds] | None = None,
    patch_sizes: Sequence[int] = (),
) -> list[Arch]:
    """The hand-scaled ViTs of three widths over depths, DeiT-Ti's shape first, of which no two are the same; of
    `like`'s patches and those of `patch_sizes` too, where some meet the budget.

    Raises:
        UserError: as `hand_scaled`.
    """
    quick = {target: cache(clock) for target, clock in (clocks or {}).items()}
    found: list[Arch] = []
    for patch in dict.fromkeys((like.patch_size, *patch_sizes)):
        for ratio, spread in SHAPES:
            with suppress(UserError) if found else nullcontext():
                found.append(
                    hand_scaled(like, budget, quick, ratio, spread=spread, patch_size=patch, without=found)
                )
    return found


def _fast(
    ranked: list[tuple[int, Arch]], limits: Sequence[Limit], clocks: Mapping[str, Milliseconds]
) -> list[tuple[int, Arch]]:
    """Those of rising MACs up to the last that meets limits on latency, found by halving."""
    low, high = 0, len(ranked)
    while low < high:
        middle = (low + high) // 2
        if _misses(ranked[middle][1], limits, clocks):
            high = middle
        else:
            low = middle + 1
    return ranked[:low]


def _misses(arch: Arch, limits: Sequence[Limit], clocks: Mapping[str, Milliseconds]) -> bool:
    """It is slower than allowed; nothing is too fast for a baseline."""
    return any(limit.high is not None and clocks[limit.target](arch) > limit.high for limit in limits)


def _within(like: Arch, budget: Budget, most: float, patch_size: int | None = None) -> list[tuple[int, Arch]]:
    """(MACs, Arch) of every plain ViT that meets the budget."""
    options: list[tuple[int, Arch]] = []
    for depth in range(2, 25):
        for width in range(SMALLEST, 1025):
            if num_heads(width) is None:
                continue
            arch = plain_vit(like, width, depth, patch_size)
            cost = count(arch)
            if cost.macs > most:
                break
            if not budget.counted.misses(cost):
                options.append((cost.macs, arch))
    return options


def _off(arch: Arch, ratio: float) -> float:
    """How far its width over its depth is from a ratio, in both directions alike."""
    return abs(math.log(arch.embed_dim / arch.depth / ratio))


def num_heads(width: int) -> int | None:
    """As few heads as are at most 64 wide each, at least 3 (2 in the smallest nets); None where none of even width fit.

    >>> [num_heads(width) for width in (32, 48, 192, 384, 390)]
    [2, 3, 3, 6, None]
    """
    heads = max(2 if width < TWO_HEADS else 3, math.ceil(width / HEAD_DIM))
    return None if width % (2 * heads) else heads


def plain_vit(like: Arch, width: int, depth: int, patch_size: int | None = None) -> Arch:
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
        patch_size=like.patch_size if patch_size is None else patch_size,
        in_chans=like.in_chans,
        num_classes=like.num_classes,
        stages=(Stage(embed_dim=width, blocks=(block,) * depth),),
        distill_token=like.distill_token,
        patch_head=like.patch_head,
    )


def patch_sizes(space: Space) -> tuple[int, ...]:
    """The patch sizes that a Space chooses from; none where it has one."""
    return next((gene.options for gene in space.genes if gene.name == "patch_size"), ())
