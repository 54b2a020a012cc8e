"""Sharing by words, for runs: which coupling, and whether tokens and attention maps are private."""

from __future__ import annotations

from typing import Literal, get_args

from vitnas.errors import UserError, nearest
from vitnas.space import Space, VitasSpace
from vitnas.supernet.sharing import PRIVATE_HEADS, PRIVATE_TOKENS, Bilateral, Cyclic, Sharing

Coupled = Literal["prefix", "bilateral", "cyclic"]


def make_sharing(
    space: Space,
    coupling: Coupled = "prefix",
    *,
    private_tokens: bool = False,
    private_heads: bool = False,
) -> Sharing:
    """The Sharing of these words for `space`.

    Args:
        coupling: `prefix`, `bilateral` (two weight sets per Arch, trained together; any Space) or `cyclic`.
        private_tokens: patch embedding, class token and positions per patch size.
        private_heads: q and k per head count.

    Raises:
        UserError: an unknown coupling; anything but prefix and bilateral on a Space that is not ViTAS's.
    """
    known = get_args(Coupled)
    if coupling not in known:
        raise UserError(
            f"coupling is {coupling!r}; it must be one of {', '.join(known)}.{nearest(coupling, known)}"
        )
    wanted = {
        "coupling cyclic": coupling == "cyclic",
        "private_tokens": private_tokens,
        "private_heads": private_heads,
    }
    asked = [name for name, is_on in wanted.items() if is_on]
    if asked and not isinstance(space, VitasSpace):
        raise UserError(
            f"{space.name} is no vitas space; {' and '.join(asked)} of sharing need its options. Use a space of kind "
            "vitas, or coupling prefix or bilateral without private tensors."
        )
    private = tuple(
        rule for rule, is_on in ((PRIVATE_TOKENS, private_tokens), (PRIVATE_HEADS, private_heads)) if is_on
    )
    if coupling == "cyclic" and isinstance(space, VitasSpace):
        return Sharing(per_axis=cyclic_axes(space), private=private)
    return Sharing(Bilateral(), private=private) if coupling == "bilateral" else Sharing(private=private)


def cyclic_axes(space: VitasSpace) -> dict[str, Cyclic]:
    """Cyclic rules for all axes whose widths `space` varies."""
    return {
        "dim": Cyclic(space.embed_dims),
        "inner": Cyclic(space.inner_dims),
        "hidden": Cyclic(space.mlp_hiddens),
    }
