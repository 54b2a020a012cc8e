"""Which mixers stand before and behind a selection, and how many patches may enter their blocks."""

from __future__ import annotations

from collections.abc import Sequence

from vitnas.errors import UserError, check_word
from vitnas.layers.select import SELECTIONS
from vitnas.mixers import MIXERS


def check_selections(
    selector: str | None, blocks: Sequence[tuple[str, int | None]], *, first: int, patches: int
) -> None:
    """Raise UserError where selections cannot be.

    Args:
        selector: the word of their kind.
        blocks: mixer and patches kept (None: all that come) of every block.
        first: number of the last stage's first block.
        patches: of the last stage's grid.
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
    left = patches
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
            _check_attention(where, selector, blocks[index - 1][0] if index else None)
            left = keep
        if left < patches and not MIXERS[mixer].takes_selection:
            able = [word for word, kind in MIXERS.items() if kind.takes_selection]
            raise UserError(
                f"{where}mixer is {mixer!r} behind a selection; only {', '.join(able)} can do without the patches that "
                "are gone. Use one of these, or leave keep out."
            )


def _check_attention(where: str, selector: str, before: str | None) -> None:
    """That the mixer before can tell its attention, if the selector asks for it."""
    if SELECTIONS[selector].needs_attention and not (before and MIXERS[before].gives_attention):
        able = [word for word, kind in MIXERS.items() if kind.gives_attention]
        raise UserError(
            f"{where}selector is {selector!r}, but {f'mixer {before!r}' if before else 'no block'} stands before it; "
            f"it goes by the attention of the block before, which {', '.join(able)} tells. Use another."
        )
