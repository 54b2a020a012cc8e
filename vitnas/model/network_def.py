"""The `network_def` tuples of ViT-ResNAS's authors: read into an Arch, and written from one.

    (0, d)  linear stem, patch 14      (4, d)  convolutional stem of width 24      (5, d, width)  the same, any width
    (1, (d, heads, head_dim), (d, hidden), exists)  block
    (3, d, d')  residual reduction        (2, d, classes)  norm and classifier, last

Source: arXiv 2109.00642 and the authors' published networks.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from vitnas.arch import Arch, Block, Stage
from vitnas.errors import UserError
from vitnas.grids import ImageSize

PATCH_SIZE = 14
STEM_WIDTH = 24
FORMS = {
    0: "(0, width) or (4, width) or (5, width, stem width)",
    1: "(1, (width, heads, head size), (width, hidden units), 0 or 1)",
    2: "(2, width, classes)",
    3: "(3, width before, width behind)",
}
Definition = tuple[Any, ...]


def parse_network_def(
    definition: str | Sequence[Any],
    *,
    image_size: ImageSize = 224,
    patch_size: int = PATCH_SIZE,
    in_chans: int = 3,
    patch_head: bool = False,
    distill_token: bool = False,
    slots: bool = False,
) -> Arch:
    """The Arch of a `network_def`. Blocks that do not exist (last number 0) are left out.

    Args:
        definition: nested tuples or lists, or their text.
        image_size, patch_size: in pixels; the authors' patch is 14 in nets of several stages and 16 in flat ones.
        patch_head, distill_token: what the tuples do not say.
        slots: keep each block's place in its stage, where a Supernet has its weights.

    Raises:
        UserError: what is wrong, at which position, and what is allowed there.
    """
    entries = _entries(definition)
    stem, dim = _stem(entries)
    stages: list[Stage] = []
    blocks: list[Block] = []
    place, start = 0, 1
    for position, entry in enumerate(entries[1:], 1):
        kind = entry[0]
        if kind == 1 and position < len(entries) - 1:
            (width, heads, head_dim), (inner, hidden), exists = entry[1:]
            _same(position, dim, width, inner)
            if exists:
                slot = place if slots else None
                blocks.append(Block(num_heads=heads, head_dim=head_dim, mlp_hidden=hidden, slot=slot))
            place += 1
        elif (kind == 3 and position < len(entries) - 1) or (kind == 2 and position == len(entries) - 1):
            _same(position, dim, entry[1])
            if not blocks:
                raise UserError(
                    f"network_def[{start}:{position}] leaves a stage without a block; each needs one. Keep one."
                )
            stages.append(Stage(embed_dim=dim, blocks=tuple(blocks)))
            if kind == 3 and entry[2] < dim:
                raise _refused(
                    position, entry, f"a residual reduction cannot narrow from {dim}; raise its last number"
                )
            dim, blocks, place, start = entry[2], [], 0, position + 1
        else:
            allowed = (
                "the head (2, ...) is last and only last; between stem and head are blocks and reductions"
            )
            raise _refused(position, entry, allowed)
    return Arch(
        image_size=image_size,
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=dim,
        stages=tuple(stages),
        patch_head=patch_head,
        distill_token=distill_token,
        **stem,
    )


def network_def(arch: Arch) -> Definition:
    """The `network_def` of an Arch, without the blocks that it does not have.

    Raises:
        UserError: the tuples cannot say it; all reasons are given.
    """
    reasons = [
        f"{name} is {getattr(arch, name)!r}, not {value!r}"
        for name, value in {
            "reduction": "residual",
            "class_token": True,
            "position": "learned",
            "relative_position": 0,
            "global_pool": "token",
            "fc_norm": False,
            "qkv_bias": True,
            "norm_eps": 1e-6,
        }.items()
        if getattr(arch, name) != value
    ]
    reasons += [] if arch.stem in ("linear", "conv") else [f"stem is {arch.stem!r}, not 'linear' or 'conv'"]
    reasons += [] if all(b.mixer == "softmax" for b in arch.blocks) else ["not every mixer is softmax"]
    reasons += [] if arch.num_classes else ["it has no classes"]
    if reasons:
        raise UserError(f"{arch.id} has no network_def: {'; '.join(reasons)}. Keep it as an Arch.")
    dim = arch.stages[0].embed_dim
    if arch.stem == "linear":
        entries: list[Any] = [(0, dim)]
    else:
        entries = [(4, dim) if arch.stem_width == STEM_WIDTH else (5, dim, arch.stem_width)]
    for index, stage in enumerate(arch.stages):
        if index:
            entries.append((3, dim, stage.embed_dim))
            dim = stage.embed_dim
        entries += [
            (1, (dim, block.num_heads, block.head_dim), (dim, block.mlp_hidden), 1) for block in stage.blocks
        ]
    return (*entries, (2, dim, arch.num_classes))


def _entries(definition: str | Sequence[Any]) -> list[Definition]:
    """Tuples of the right form, whatever their order."""
    if isinstance(definition, str):
        try:
            definition = ast.literal_eval(definition.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
            raise UserError(
                f"network_def cannot be read ({' '.join(str(error).split())[:80]}); it must be nested tuples of whole "
                "numbers, such as ((4, 176), ..., (2, 704, 1000)). Check brackets and commas."
            ) from error
    if not isinstance(definition, list | tuple) or len(definition) < 3:
        raise UserError(
            f"network_def is {str(definition)[:60]!r}; it needs at least a stem, a block and a head. Write "
            "((4, 176), (1, ...), (2, 176, 1000))."
        )
    return [_entry(position, entry) for position, entry in enumerate(definition)]


def _entry(position: int, entry: Any) -> Definition:
    kind = entry[0] if isinstance(entry, list | tuple) and entry else None
    wanted = {0: (0, 0), 4: (0, 0), 5: (0, 0, 0), 1: (0, (0, 0, 0), (0, 0), 0), 2: (0, 0, 0), 3: (0, 0, 0)}
    if isinstance(kind, bool) or kind not in wanted:
        raise _refused(
            position,
            entry,
            f"it must begin with 0, 4, 5 (stem), 1 (block), 3 (reduction) or 2 (head): {FORMS[1]}",
        )
    form = FORMS[kind if kind in FORMS else 0]
    plain: Definition = _plain(entry)
    if _shape(plain) != _shape(wanted[kind]):
        raise _refused(position, entry, f"it must be {form}, all whole numbers")
    if kind == 1 and plain[3] not in (0, 1):
        raise _refused(
            position,
            entry,
            f"the last number is 1 for a block that exists and 0 for one that does not; {form}",
        )
    numbers = [*plain[1], *plain[2]] if kind == 1 else plain[1:]
    if min(numbers) < 1:
        raise _refused(position, entry, f"widths and counts must be at least 1: {form}")
    return plain


def _plain(value: Any) -> Any:
    return tuple(_plain(item) for item in value) if isinstance(value, list | tuple) else value


def _shape(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_shape(item) for item in value)
    return int if isinstance(value, int) and not isinstance(value, bool) else None


def _stem(entries: Sequence[Definition]) -> tuple[dict[str, Any], int]:
    """Fields of the Arch, and the width of the first stage."""
    first = entries[0]
    if first[0] not in (0, 4, 5):
        raise _refused(0, first, f"the first is the stem: {FORMS[0]}")
    if first[0] == 0:
        return {"stem": "linear"}, first[1]
    return {"stem": "conv", "stem_width": STEM_WIDTH if first[0] == 4 else first[2]}, first[1]


def _same(position: int, dim: int, *widths: int) -> None:
    for width in widths:
        if width != dim:
            raise UserError(
                f"network_def[{position}] has width {width}; its stage is {dim} wide. Write {dim}, or change the stem "
                "or reduction before it."
            )


def _refused(position: int, entry: Any, rule: str) -> UserError:
    return UserError(f"network_def[{position}] is {str(entry)[:60]}; {rule}. Mend that entry.")
