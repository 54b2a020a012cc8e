"""Archs that one of timm's own functions makes, by words that JSON holds: such a network loads without vitnas."""

from __future__ import annotations

from typing import Any

import timm
import torch

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.model.timm_keys import arch_of_timm, as_timm_says, not_timm, words_of_vit

# A function of timm's for each epsilon of its norms, which no word of JSON says; all else about them is said.
BASES = {1e-6: "vit_tiny_patch16_224", 1e-5: "vit_base_patch32_clip_224"}
DISTILLED = "deit_tiny_distilled_patch16_224"  # 1e-6


def plain_timm(arch: Arch) -> tuple[str, dict[str, Any]] | None:
    """The name and the arguments by which timm makes a network of `arch`, with weights of the same names; None where
    it cannot."""
    name = DISTILLED if arch.distill_token and arch.norm_eps == 1e-6 else BASES.get(arch.norm_eps)
    if name is None or (arch.distill_token and name != DISTILLED) or list(not_timm(arch)):
        return None
    args = {**words_of_vit(arch), "act_layer": arch.act}
    kept = {key: value for key, value in args.items() if value is not None}
    try:
        with torch.device("meta"):
            made = timm.create_model(name, **kept)
        return (name, kept) if arch_of_timm(made) == as_timm_says(arch) else None
    except (UserError, KeyError, ValueError, TypeError, AssertionError, RuntimeError):  # it has no such part
        return None
