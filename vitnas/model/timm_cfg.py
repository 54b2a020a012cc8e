"""timm's description of a model: what makes it, the input that it expects, its first and last layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vitnas.arch import Arch
from vitnas.layers.stem import STEMS

DATA_KEYS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # how images are prepared
IMAGES_KNOWN = "images_known"  # false: those are placeholders
SEVERAL = "several_classes"  # true: an image may be of several classes, each of which is yes or no
OWN_ARCH = "vitnas_arch"  # the Arch, in the config of a folder that names a function of timm's
SCALE = (
    "target_scale"  # of numbers, told in place of classes: [means], [stds]; logits are (number - mean) / std
)
OWN_KEYS = (IMAGES_KNOWN, SEVERAL, SCALE)  # which timm does not know


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
    """Let `target` have its images prepared as those of `source` are, and its classes called the same."""
    cfg = getattr(source, "pretrained_cfg", None) or {}
    kept = {key: cfg[key] for key in (*DATA_KEYS, SEVERAL, SCALE) if cfg.get(key) is not None}
    names = cfg.get("label_names") or ()
    if len(names) == target.pretrained_cfg.get("num_classes"):
        kept["label_names"] = names
    target.pretrained_cfg = target.default_cfg = {
        **target.pretrained_cfg,
        **kept,
        IMAGES_KNOWN: bool(cfg) and knows_images(cfg),
    }


def knows_images(cfg: Mapping[str, Any]) -> bool:
    """Whether a description says how images are prepared: that of a Model fresh from `build` holds placeholders."""
    mean, std = cfg.get("mean"), cfg.get("std")
    if IMAGES_KNOWN in cfg or not (mean and std):
        return bool(mean and std and cfg.get(IMAGES_KNOWN))
    return cfg.get("architecture") != "vitnas_arch" or bool(cfg.get("source")) or {*mean, *std} != {0.5}


def take_images(
    network: Any,
    images: Mapping[str, Any],
    class_names: Sequence[str],
    *,
    several: bool = False,
    scale: Any = None,
) -> None:
    """Note how the images that `network` learns from are prepared, and what its classes are called.

    Args:
        images: by DATA_KEYS.
        class_names: of the images, which other classes of the network's are not called by.
        several: whether an image may be of several of them.
        scale: of numbers (`vitnas.model.scale`), which are called so in place of classes.
    """
    space, cfg = getattr(network, "space", None), getattr(network, "pretrained_cfg", None)
    if cfg is None and space is None:
        return  # a network that describes itself in no way of timm's
    cfg = {**(cfg or {}), **images, IMAGES_KNOWN: True, SEVERAL: several}
    cfg.pop(SCALE, None)
    if scale is not None:
        cfg[SCALE] = [[*scale.mean], [*scale.std]]
    classes = getattr(network, "num_classes", None) if space is None else space.largest().num_classes
    if len(class_names) == classes:
        cfg["label_names"] = list(class_names)
    network.pretrained_cfg = network.default_cfg = cfg


def described_anew(cfg: Mapping[str, Any], arch: Arch) -> dict[str, Any]:
    """The description `cfg` of a Model that has become one of `arch`."""
    now = {
        **cfg,
        "num_classes": arch.num_classes,
        "input_size": arch.input_size,
        "classifier": classifiers(arch),
    }
    for key in ("mean", "std"):  # of other channels than the published ones: their mean, as timm does
        if len(now[key]) != arch.in_chans:
            now[key] = (sum(now[key]) / len(now[key]),) * arch.in_chans
    if len(now.get("label_names") or ()) != arch.num_classes:
        now.pop("label_names", None)
    if len((now.get(SCALE) or [()])[0]) != arch.num_classes:
        now.pop(SCALE, None)
    return now


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
