"""Recipes: functions that return complete, typed Runs. `RECIPES` lists them by name."""

from __future__ import annotations

from collections.abc import Callable

from vitnas.data.glance import Glance
from vitnas.recipes.autoformer import autoformer, autoformer_cifar
from vitnas.recipes.dynamicvit import dynamicvit, dynamicvit_tour
from vitnas.recipes.focusformer import focusformer, focusformer_tour
from vitnas.recipes.images import images, images_like
from vitnas.recipes.manifold import manifold, manifold_tour
from vitnas.recipes.pretrain import pretrain
from vitnas.recipes.slim import slim
from vitnas.recipes.tour import on_digits, tour
from vitnas.recipes.transformer_ls import transformer_ls, transformer_ls_tour
from vitnas.recipes.vision_xformers import vision_xformers, vision_xformers_tour
from vitnas.recipes.vit_resnas import vit_resnas, vit_resnas_cifar
from vitnas.recipes.vitas import vitas, vitas_tour
from vitnas.stages.run import Run

RECIPES: dict[str, Callable[[], Run]] = {
    "tour": tour,
    "images": images,
    "slim": slim,
    "pretrain": pretrain,
    "autoformer_tour": on_digits,
    "autoformer_cifar": autoformer_cifar,
    "autoformer": autoformer,
    "vit_resnas_cifar": vit_resnas_cifar,
    "vit_resnas": vit_resnas,
    "vision_xformers_tour": vision_xformers_tour,
    "vision_xformers": vision_xformers,
    "dynamicvit_tour": dynamicvit_tour,
    "dynamicvit": dynamicvit,
    "focusformer_tour": focusformer_tour,
    "focusformer": focusformer,
    "manifold_tour": manifold_tour,
    "manifold": manifold,
    "transformer_ls_tour": transformer_ls_tour,
    "transformer_ls": transformer_ls,
    "vitas_tour": vitas_tour,
    "vitas": vitas,
}

# Recipes that go by the images: how many and how large they are, what else is asked, and the seconds that are given
# (None: nothing said).
LIKE: dict[str, Callable[[Glance, Run, float | None], Run]] = {"images": images_like}

__all__ = ["LIKE", "RECIPES"]
