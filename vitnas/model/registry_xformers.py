"""timm names of the Vision X-formers that no Arch can say. Importing this module registers them.

`vix_levi*`, `vix_cv*` and `vix_fnet2d` are the authors' small networks. `pin_*`, `pip_*`, `levin_*` and `levip_*` are
timm's own PiT and LeViT with Nystrom (n) or Performer (p) in the place of attention.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import timm
import torch
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    load_pretrained,
    register_model,
)

from vitnas.model.convolutional import cv, levi
from vitnas.model.fnet2d import FNet2d
from vitnas.model.swap import swap_attention

_MAKERS: dict[str, Callable[..., Any]] = {"vix_fnet2d": FNet2d}
_MAKERS |= {f"vix_levi{letter}": partial(levi, letter) for letter in "npt"}
_MAKERS |= {f"vix_cv{letter}": partial(cv, letter) for letter in "npt"}

# Ours, timm's model, mixer.
SWAPPED = {
    f"{ours}{letter}_{size}": (f"{theirs}_{size}", mixer)
    for ours, theirs, sizes in (
        ("pi", "pit", ("ti_224", "xs_224", "s_224")),
        ("levi", "levit", ("128s", "192", "256")),
    )
    for size in sizes
    for letter, mixer in (("n", "nystrom"), ("p", "performer"))
}

_register: Callable[[Callable[..., Any]], Callable[..., Any]] = register_model  # timm leaves it untyped

default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {
            "url": "",
            "num_classes": 10 if name == "vix_fnet2d" else 200,
            "input_size": (3, 32, 32) if name == "vix_fnet2d" else (3, 64, 64),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.0" if name == "vix_fnet2d" else "layers.0",
            "classifier": "head",
        }
        for name in _MAKERS
    }
    | {f"{name}.untrained": {"url": "", "input_size": (3, 224, 224), "num_classes": 1000} for name in SWAPPED}
)


def _entry(name: str, maker: Callable[..., Any]) -> Callable[..., Any]:
    """The function that timm calls for a name."""

    def build(
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, **sizes: Any
    ) -> Any:
        with nullcontext() if device is None else torch.device(device):
            return maker(**sizes).to(dtype=dtype)

    def make(pretrained: bool = False, **options: Any) -> Any:
        return build_model_with_cfg(build, name, pretrained, **options)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"{name} of Vision X-formers (arXiv 2107.02239)."
    return make


def _swapped_entry(name: str, base: str, mixer: str) -> Callable[..., Any]:
    """The function that timm calls for one of its own models with another mixer."""

    def make(pretrained: bool = False, **options: Any) -> Any:
        given, cache_dir = options.pop("pretrained_cfg", None), options.pop("cache_dir", None)
        overlay = options.pop("pretrained_cfg_overlay", None)
        # Of weights of this very net; else a tag.
        own = given if given and not isinstance(given, str) else None
        of_this = own is not None or not {"state_dict", "file"}.isdisjoint(overlay or {})
        model = timm.create_model(base, pretrained=pretrained and not of_this, **options)
        swap_attention(model, mixer)
        if (base_cfg := getattr(model, "pretrained_cfg", None)) is not None:
            mine = own.to_dict() if isinstance(own, PretrainedCfg) else own
            model.pretrained_cfg = {**base_cfg, **(mine or {}), **(overlay or {}), "architecture": name}
            model.default_cfg = model.pretrained_cfg
        if pretrained and of_this:
            sizes: dict[str, Any] = {"num_classes": model.num_classes, "in_chans": options.get("in_chans", 3)}
            load_pretrained(model, model.pretrained_cfg, cache_dir=cache_dir, **sizes)
        return model

    make.__name__ = make.__qualname__ = name
    make.__doc__ = (
        f"timm's {base} with {mixer} in the place of attention; `pretrained` gives {base}'s weights."
    )
    return make


for _name, (_base, _mixer) in SWAPPED.items():
    globals()[_name] = _register(_swapped_entry(_name, _base, _mixer))
for _name, _maker in _MAKERS.items():
    globals()[_name] = _register(_entry(_name, _maker))
