"""Transformer-LS for images by name, and the authors' way to write such a network.

Zhu et al., "Long-Short Transformer" (arXiv 2107.02192), section 4.3: four stages, long-short attention in the first two
and full attention with a bias per step in the others, a class token per stage, the mean of the last patches. The
authors' code writes a network as a text, stages joined by "_": h heads, d width, n blocks, s 1 for long-short and 0 for
full attention, g class tokens, p patch, f window, a 1 for absolute positions instead of biases, r mixtures. Once a
stage is full, later ones are too, whatever they say.
"""

from __future__ import annotations

from typing import Any

from vitnas.arch import Arch, Block, Stage
from vitnas.errors import UserError
from vitnas.grids import ImageSize

LETTERS = "lhdnsgpfar"
USUAL = {"l": 1, "h": 3, "d": 192, "n": 1, "s": 1, "g": 1, "p": 2, "f": 7, "a": 1, "r": 0}


def transformer_ls(text: str, *, image_size: ImageSize = 224, **options: Any) -> Arch:
    """The Arch of the authors' text, with their table of window biases, so that it takes their weights.

    Args:
        options: other fields of the Arch (`num_classes`, `in_chans`; `window_bias="step"` for a fresh network).

    Raises:
        UserError: a text that is none, or what an Arch cannot say.

    >>> transformer_ls("l1,h2,d16,n1,s1,g0,p4,f7,a0,r8_l2,h2,d32,n1,s0,g0,p2,f7,a0,r8").describe()
    '2 blocks, width 16/32, 2 heads, MLP 64-128, 1 long_short, 1 softmax, patch 4 of 224 px'
    """
    stages = [_read(part) for part in text.split("_")]
    first, last = stages[0], stages[-1]
    ends = last["g"] > 0
    rules = (
        (
            all(s["g"] == first["g"] for s in stages[:-1]),
            "class tokens (g) differ between the stages before the last",
        ),
        (
            all(s["g"] <= 1 for s in stages) and last["g"] <= first["g"],
            "a stage has more than one class token (g)",
        ),
        (all(s["p"] == 2 for s in stages[1:]), "patches (p) behind the first stage are other than 2"),
        (all(s["a"] == first["a"] for s in stages), "absolute positions (a) differ between stages"),
        (all(s["h"] and s["d"] % s["h"] == 0 for s in stages), "heads (h) do not divide the width (d)"),
    )
    for is_kept, reason in rules:
        if not is_kept:
            raise UserError(f"{text!r} cannot be written as an Arch: {reason}. Give another text.")
    made, is_full = [], False
    for stage in stages:
        is_full = is_full or not stage["s"]
        own: dict[str, Any] = (
            {} if is_full else {"mixer": "long_short", "mixer_size": stage["r"], "window": stage["f"]}
        )
        sizes: dict[str, Any] = {
            "num_heads": stage["h"],
            "head_dim": stage["d"] // stage["h"],
            "mlp_hidden": 4 * stage["d"],
        }
        made.append(Stage(embed_dim=stage["d"], blocks=(Block(**sizes, **own),) * stage["n"]))
    fields: dict[str, Any] = {
        "patch_size": first["p"],
        "stages": tuple(made),
        "reduction": "patch",
        "patch_norm": True,
        "class_token": first["g"] > 0,
        "global_pool": "token" if ends else "avg",
        "position": "learned" if first["a"] else "none",
        "rel_pos_bias": "none" if first["a"] else "table",
        "window_bias": "step" if first["a"] else "folded",
    }
    return Arch(image_size=image_size, **{**fields, **options})


def _read(part: str) -> dict[str, int]:
    """One stage: numbers by letter."""
    numbers = dict(USUAL)
    for word in part.split(","):
        if word[:1] not in LETTERS or not word[1:].isdecimal():
            raise UserError(
                f"{word!r} is no part of a Transformer-LS text; a part is one of {', '.join(LETTERS)} and a "
                "number, as in h3. Mend it."
            )
        numbers[word[0]] = int(word[1:])
    return numbers


def _published(small: int, large: int, window: int) -> str:
    """The text of a published network, by its blocks in the second and third stage."""
    stages = ((3, 96, 1, 1, 1, 4), (3, 192, small, 1, 1, 2), (6, 384, large, 0, 1, 2), (12, 768, 1, 0, 0, 2))
    return "_".join(
        f"l{number},h{h},d{d},n{n},s{s},g{g},p{p},f{window},a0,r8"
        for number, (h, d, n, s, g, p) in enumerate(stages, start=1)
    )


TRANSFORMER_LS: dict[str, Arch] = {
    "transformer_ls_medium": transformer_ls(_published(4, 16, 7)),
    "transformer_ls_base": transformer_ls(_published(8, 24, 7)),
    "transformer_ls_medium_384": transformer_ls(_published(4, 16, 8), image_size=384),
}
