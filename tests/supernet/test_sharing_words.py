"""Sharing by words: what each word makes, and what a space cannot."""

from __future__ import annotations

import pytest

from vitnas.errors import UserError
from vitnas.space import autoformer, vitas
from vitnas.supernet import (
    PRIVATE_HEADS,
    PRIVATE_TOKENS,
    Bilateral,
    Cyclic,
    Prefix,
    Sharing,
    Supernet,
    make_sharing,
)

SPACE = vitas("micro", image_size=8, num_classes=5, in_chans=1, num_slots=2)


def test_words_make_sharings() -> None:
    assert make_sharing(SPACE).default == Prefix()
    both = make_sharing(SPACE, "bilateral", private_tokens=True, private_heads=True)
    assert (both.default, both.private) == (Bilateral(), (PRIVATE_TOKENS, PRIVATE_HEADS))
    assert (both.sides, Supernet(SPACE, sharing=both).sides) == (2, 2)


def test_cyclic_covers_every_axis_that_varies() -> None:
    sharing = make_sharing(SPACE, "cyclic", private_heads=True)
    assert sharing.private == (PRIVATE_HEADS,)
    supernet = Supernet(SPACE, sharing=sharing)
    sizes: dict[str, int] = {}
    for axes in supernet.axes.values():
        sizes.update(axes)
    widths = {axis: rule.widths for axis, rule in sharing.per_axis.items() if isinstance(rule, Cyclic)}
    assert widths == {"dim": SPACE.embed_dims, "inner": SPACE.inner_dims, "hidden": SPACE.mlp_hiddens}
    assert all(max(options) == sizes[axis] for axis, options in widths.items())


def test_words_that_a_space_cannot_follow() -> None:
    plain = autoformer("micro", image_size=8, patch_size=2, num_classes=5)
    assert make_sharing(plain, "bilateral").sides == 2
    with pytest.raises(
        UserError, match=r"is no vitas space; coupling cyclic and private_heads of sharing need"
    ):
        make_sharing(plain, "cyclic", private_heads=True)
    with pytest.raises(
        UserError, match=r"coupling is 'cylic'; it must be one of prefix, bilateral, cyclic\."
    ):
        make_sharing(SPACE, "cylic")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", ["micro", "tiny"])
def test_private_heads_of_a_space_that_does_not_list_them(size: str) -> None:
    space = autoformer(size, image_size=8, patch_size=4)
    with pytest.raises(UserError, match=r"does not list its options for 'private\.num_heads_"):
        Supernet(space, sharing=Sharing(private=(PRIVATE_HEADS,)))
