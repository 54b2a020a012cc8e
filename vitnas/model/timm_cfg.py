"""timm's description of a model: what makes it, the input that it expects, its first and last layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vitnas.arch import Arch
from vitnas.layers.stem import STEMS

DATA_KEYS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # how images are prepared


def default_cfg(arch: Arch) -> dict[str, Any]:
    """The description of the Model of `arch`."""
    return {
        "architecture": "vitnas_arch",
        "url": "",
        "num_classes": arch.num_classes,
        "input_size": arch.input_size,
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.5,) * arch.in_chans,
        "std": (0.5,) * arch.in_chans,
        "first_conv": f"patch_embed.{STEMS[arch.stem].first_conv}",
        "classifier": classifiers(arch),
    }


def classifiers(arch: Arch) -> str | tuple[str, ...]:
    """Its layers that go by class, which timm leaves out of weights for other classes."""
    own = (("head_dist", arch.distill_token), ("patch_head", arch.patch_head))
    more = [name for name, used in own if used]
    return ("head", *more) if more else "head"


def copy_data_cfg(source: Any, target: Any) -> None:
    """Let `target` have its images prepared as those of `source` are."""
    cfg = getattr(source, "pretrained_cfg", None) or {}
    kept = {key: cfg[key] for key in DATA_KEYS if cfg.get(key) is not None}
    target.pretrained_cfg = target.default_cfg = {**target.pretrained_cfg, **kept}


def layer_groups(entries: Mapping[int, int], selecting: Iterable[int]) -> dict[str, Any]:
    """Groups for layer-wise learning rates.

    Args:
        entries: the reduction in front of each block that has one.
        selecting: blocks that have a selection in front.
    """
    between = [(rf"^reductions\.{index}\.", (start,)) for start, index in entries.items()]
    between += [(rf"^selections\.{index}\.", (index,)) for index in sorted(selecting)]
    return {
        "stem": r"^cls_token|^dist_token|^reg_token|^pos_embed|^norm_pre|^patch_norm|patch_embed",
        "blocks": [(r"^blocks\.(\d+)", None), *between, (r"^norm", (99999,))],
    }
