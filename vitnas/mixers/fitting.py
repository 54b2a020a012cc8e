"""What positions, parts and selections the mixers of an Arch's blocks can take. Sizes are checked by the mixers
themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from vitnas.errors import UserError, check_word
from vitnas.grids import Grid
from vitnas.layers.rotary import STEPS, rotary_of
from vitnas.layers.selectors import SELECTIONS, selection_of
from vitnas.mixers import MIXERS


def check_mixers(
    blocks: Mapping[tuple[str, int], int],
    *,
    position: str,
    relative_position: int,
    rel_pos_bias: str,
    num_prefix_tokens: int,
    parts: Sequence[str],
) -> None:
    """Raise UserError where a mixer lacks what it is asked for, or one kind of positions excludes another.

    Args:
        blocks: every mixer and head_dim, and the first block that has them.
        parts: what only attention in its plain form has, as a user would call it.
    """
    step = STEPS[rotary_of(position)]
    for (word, head_dim), index in blocks.items():
        where, mixer = f"block {index}: ", MIXERS[word]
        if relative_position and not mixer.takes_relative_position:
            raise UserError(
                f"{where}mixer is {word!r}, but relative_position is {relative_position}; only "
                f"{_able('takes_relative_position')} has relative positions. Use relative_position=0."
            )
        lacking = [name for name in parts if not (mixer.has_own_bias and name == "rel_pos_bias")]
        if lacking and not mixer.takes_attention_parts:
            raise UserError(
                f"{where}mixer is {word!r}, which has no {' and no '.join(lacking)}; only "
                f"{_able('takes_attention_parts')} has. Use that, or leave this out."
            )
        if num_prefix_tokens and not mixer.takes_class_token:
            raise UserError(
                f"{where}mixer is {word!r}; it mixes patches alone, and a class token has no place there. "
                "Use class_token=False and global_pool='avg'."
            )
        if step > 1 and mixer.has_heads and head_dim % step:
            raise UserError(
                f"{where}head_dim is {head_dim}; position {position!r} turns it in groups of {step}. "
                f"Nearest: {max(step, round(head_dim / step) * step)}."
            )
    if (step > 1) + (relative_position > 0) + (rel_pos_bias != "none") > 1:
        raise UserError(
            f"position is {position!r}, relative_position {relative_position} and rel_pos_bias {rel_pos_bias!r}; one "
            "kind of distances is enough. Use relative_position=0, or rel_pos_bias='none'."
        )
    if rel_pos_bias == "table" and num_prefix_tokens > 1:
        raise UserError(
            f"rel_pos_bias is 'table' with {num_prefix_tokens} tokens before the patches; the table has entries for "
            "one class token. Use one at most, or rel_pos_bias='mlp'."
        )


def check_selections(
    selector: str | None,
    blocks: Sequence[tuple[str, int | None]],
    *,
    first: int,
    grid: Grid,
    class_token: bool,
    reads_patches: bool,
    relative_position: int,
    rel_pos_bias: str,
) -> None:
    """Raise UserError where selections cannot be.

    Args:
        selector: the word of their kind.
        blocks: mixer and patches kept (None: all that come) of every block.
        first: number of the last stage's first block.
        grid: rows and columns of the last stage's patches.
        reads_patches: whether a classifier reads patches of the last block.
    """
    keeping = sum(keep is not None for _, keep in blocks)
    if (selector is None) == (keeping > 0):
        raise UserError(
            f"selector is {selector!r} and {keeping} blocks keep fewer patches; a selector goes with a keep, and a "
            f"keep with a selector. Use selector={next(iter(SELECTIONS)) if keeping else None!r}."
        )
    if selector is None:
        return
    check_word("selector", selector, SELECTIONS)
    if rel_pos_bias != "none":
        raise UserError(
            f"selector is {selector!r} and rel_pos_bias {rel_pos_bias!r}; the bias is for all patches. Use "
            "rel_pos_bias='none', or keep all patches."
        )
    if relative_position and SELECTIONS[selector].asked(class_token=class_token) == "all":
        raise UserError(
            f"selector is {selector!r} and relative_position {relative_position} without a class token; the attention "
            "of all tokens is told without them. Use another selector, or relative_position=0."
        )
    patches = left = prod(grid)
    for index, (mixer, keep) in enumerate(blocks):
        where = f"block {index}: "
        if keep is not None:
            if index < first or index == first > 0:
                raise UserError(
                    f"{where}keep is {keep}; a reduction needs all patches before it, and it stands where the "
                    "selection would. Keep fewer in the last stage alone, behind its first block."
                )
            if keep >= left:
                raise UserError(
                    f"{where}keep is {keep}, but {left} patches come to it; keep must be lower. Leave it out to "
                    "keep all."
                )
            if keep == 0 and reads_patches:
                raise UserError(
                    f"{where}keep is 0, which leaves the class token alone, but a classifier reads patches. Keep at "
                    "least 1, or use global_pool='token' without a patch head."
                )
            kind = selection_of(selector, keep)
            _check_asked(where, selector, kind.asks, blocks[index - 1][0] if index else None)
            if kind.keeps_keys:
                _check_picked(f"{where}keep is {keep} and selector {selector!r}", mixer, relative_position)
            if (why := kind.refusal(keep, left, grid)) is not None:
                raise UserError(f"{where}keep is {keep} of {left} patches and selector {selector!r}; {why}")
            left = keep
        if left < patches and not MIXERS[mixer].takes_selection:
            raise UserError(
                f"{where}mixer is {mixer!r} behind a selection; only {_able('takes_selection')} can do without the "
                "patches that are gone. Use one of these, or leave keep out."
            )


def _check_picked(what: str, mixer: str, relative_position: int) -> None:
    """That a mixer can have queries of some tokens and keys of more."""
    if not MIXERS[mixer].takes_picked or relative_position:
        raise UserError(
            f"{what} with mixer {mixer!r} and relative_position {relative_position}; what leaves still gives keys and "
            f"values, which {_able('takes_picked')} without relative positions can take. Use that, or another selector."
        )


def _check_asked(where: str, selector: str, asks: str, before: str | None) -> None:
    """That the mixer before can tell what the selector asks."""
    if asks != "nothing" and not (before and MIXERS[before].gives_attention):
        raise UserError(
            f"{where}selector is {selector!r}, but {f'mixer {before!r}' if before else 'no block'} stands before it; "
            f"it goes by the {asks} of the block before, which {_able('gives_attention')} tells. Use another."
        )


def _able(what: str) -> str:
    return ", ".join(word for word, kind in MIXERS.items() if getattr(kind, what))
