"""timm names of the Vision X-formers that no Arch can say. Importing this module registers them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from vitnas.model.convolutional import cv, levi
from vitnas.model.fnet2d import FNet2d

_MAKERS: dict[str, Callable[..., Any]] = {"vix_fnet2d": FNet2d}
_MAKERS |= {f"vix_levi{letter}": partial(levi, letter) for letter in "npt"}
_MAKERS |= {f"vix_cv{letter}": partial(cv, letter) for letter in "npt"}

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
)


def _entry(name: str, maker: Callable[..., Any]) -> Callable[..., Any]:
    """The function that timm calls for a name."""

    def make(pretrained: bool = False, **options: Any) -> Any:
        return build_model_with_cfg(maker, name, pretrained, **options)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"{name} of Vision X-formers (arXiv 2107.02239)."
    return make


for _name, _maker in _MAKERS.items():
    globals()[_name] = _register(_entry(_name, _maker))
