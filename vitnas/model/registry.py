"""Names for `timm.create_model`: the published Archs, and `vitnas_arch` for any other.

    timm.create_model("autoformer_tiny", num_classes=10, img_size=64, drop_path_rate=0.1)
    timm.create_model("vitnas_arch", arch=arch)          # an Arch, or its JSON

Importing this module registers them; nothing is built before a name is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from vitnas.arch import Arch
from vitnas.errors import UserError, nearest
from vitnas.grids import as_image_size, side_of, size_text
from vitnas.model.blocks import resized
from vitnas.model.build import build
from vitnas.model.dynamicvit_official import dynamicvit_tensors
from vitnas.model.official import read_checkpoint
from vitnas.model.published import PUBLISHED
from vitnas.model.timm_cfg import default_cfg
from vitnas.model.transformer_ls_official import is_transformer_ls, transformer_ls_tensors
from vitnas.model.vit import Model

# Options that are fields of an Arch of the same name.
ARCH_OPTIONS = ("num_classes", "in_chans", "patch_size", "patch_head", "distill_token")
OPTIONS = (*ARCH_OPTIONS, "img_size", "global_pool", "drop_path_rate", "drop_rate", "device", "dtype")

_register: Callable[[Callable[..., Any]], Callable[..., Any]] = register_model  # timm leaves it untyped

IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "crop_pct": 0.875}

# timm reads this name when a model of this module is registered.
default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {
            **default_cfg(arch),
            **({} if name.startswith("vix_") else IMAGENET),
        }
        for name, arch in PUBLISHED.items()
    }
)


def _entry(name: str, arch: Arch) -> Callable[..., Any]:
    """The function that timm calls for a published name."""

    def make(pretrained: bool = False, **options: Any) -> Any:
        return _create(name, arch, pretrained, options)

    make.__name__ = make.__qualname__ = name  # timm registers it under its own name
    make.__doc__ = f"{name}: {arch.describe()}."
    return make


for _name, _arch in PUBLISHED.items():
    globals()[_name] = _register(_entry(_name, _arch))


@_register
def vitnas_arch(pretrained: bool = False, **options: Any) -> Any:
    """The Model of any Arch: `arch` is an Arch, or what `Arch.to_json` gave.

    Raises:
        UserError: no Arch, or one that cannot be read.
    """
    given = options.pop("arch", None)
    if given is None:
        raise UserError("arch is missing; vitnas_arch takes an Arch or its JSON. Give arch=...")
    arch = given if isinstance(given, Arch) else Arch.from_json(given)
    cfg = options.get("pretrained_cfg")
    options["pretrained_cfg"] = {**default_cfg(arch), **(cfg if isinstance(cfg, dict) else {})}
    return _create("vitnas_arch", arch, pretrained, options)


def _create(name: str, arch: Arch, pretrained: bool, options: dict[str, Any]) -> Any:
    """A Model, or timm's feature extractor around one with `features_only`."""
    made = build_model_with_cfg(
        partial(_build, name, arch),
        name,
        pretrained,
        pretrained_filter_fn=partial(fit_weights, made_for=arch),
        feature_cfg={"out_indices": min(3, arch.depth), "feature_cls": "getter"},
        **options,
    )
    model = getattr(made, "model", made)
    if isinstance(model, Model):
        model.record_arch(model.arch)  # timm describes the weights' source: its sizes, not those asked for
        asked = {key: model.pretrained_cfg[key] for key in ("input_size", "mean", "std")}
        made.pretrained_cfg = made.default_cfg = {**made.pretrained_cfg, **asked}
    return made


def _build(name: str, arch: Arch, **options: Any) -> Model:
    """The Model of `arch` with timm's options applied."""
    for word in options:
        if word not in OPTIONS:
            raise UserError(
                f"{name} has no option {word!r}; it takes {', '.join(OPTIONS)}.{nearest(word, OPTIONS)}"
            )
    if options.get("drop_rate"):
        raise UserError(
            f"drop_rate is {options['drop_rate']}; {name} has no dropout before its head. Use drop_path_rate."
        )
    changed = {key: options[key] for key in ARCH_OPTIONS if key in options}
    if "img_size" in options:
        patch_size = side_of("patch_size", changed.get("patch_size", arch.patch_size))
        arch = resized(arch, as_image_size("img_size", options["img_size"]), patch_size)
    pool = options.get("global_pool")
    model = build(
        replace(arch, **changed, global_pool=pool or arch.global_pool),
        drop_path=options.get("drop_path_rate", 0.0),
        device=options.get("device"),
    )
    if pool == "":
        model.global_pool = pool
    return model.to(dtype=options.get("dtype"))


def fit_weights(state: dict[str, Tensor], model: Model, made_for: Arch | None = None) -> dict[str, Tensor]:
    """Resample positions and patches of weights that were made for another image or patch size, as timm does.

    What training code wraps them in is taken off; names of the authors of DynamicViT and Transformer-LS become ours.

    Args:
        made_for: the Arch that the weights are likely of. If they are, all that a size changes is resampled, as
            `set_input_size` does; else positions are taken to be of square images.

    Raises:
        UserError: positions are to be resampled, and a stage has none.
    """
    arch = model.arch
    state = dynamicvit_tensors(read_checkpoint(state), arch)
    if is_transformer_ls(state):
        state = transformer_ls_tensors(state, arch)
    if made_for and (made_for.image_size, made_for.patch_size) != (arch.image_size, arch.patch_size):
        old = build(made_for, device="meta")
        if {key: t.shape for key, t in state.items()} == {
            key: t.shape for key, t in old.state_dict().items()
        }:
            old.load_state_dict(state, assign=True)
            old.set_input_size(arch.image_size, arch.patch_size)
            return old.state_dict()
    patch, proj = state.get("patch_embed.proj.weight"), getattr(model.patch_embed, "proj", None)
    size = list(proj.kernel_size) if isinstance(proj, nn.Conv2d) else []
    if patch is not None and size and list(patch.shape[-2:]) != size:
        state["patch_embed.proj.weight"] = resample_patch_embed(patch, size)
    missing, resampled = [], False
    for index, grid in enumerate(model.arch.grids if model.pos_embed is not None else ()):
        name, prefix = (
            (f"reductions.{index - 1}.pos_embed", 0)
            if index
            else ("pos_embed", model.arch.num_prefix_positions)
        )
        table = state.get(name)
        if table is None:
            missing.append(name)
        elif table.shape[1] != prod(grid) + prefix:
            resampled = True
            state[name] = resample_abs_pos_embed(table, [*grid], num_prefix_tokens=prefix)
    if missing and (resampled or len(missing) == len(model.arch.stages)):
        raise UserError(
            f"the weights have no {', '.join(missing)}; for images of {size_text(model.arch.image_size)} pixels the "
            "positions of every stage are resampled. Give weights that have them, or an Arch with position 'none'."
        )
    return state
