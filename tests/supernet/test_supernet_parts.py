"""The Supernet's contract where its Archs have the parts of pretrained networks: every width of theirs is cut."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, get_args

import pytest
import torch

from vitnas.arch import Act
from vitnas.extraction import extract
from vitnas.space import AutoFormerSpace, autoformer
from vitnas.supernet import Supernet
from vitnas.testing import SupernetContract, randomize_

PARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "register tokens, swiglu": {
        "reg_tokens": 3,
        "no_embed_class": True,
        "pre_norm": True,
        "layer_scale": True,
        "act": "swiglu",
        "scale_mlp_norm": True,
    },
    "no bias on keys, normed": {"qkv_bias": "qv", "qk_norm": True, "position": "rotary_dinov3"},
    "position bias by a table": {"rel_pos_bias": "table", "global_pool": "token", "position": "none"},
    "position bias by an MLP": {"rel_pos_bias": "mlp", "reg_tokens": 2},
    "attention pooling": {
        "global_pool": "map",
        "pool_num_heads": 4,
        "pool_mlp_hidden": 24,
        "act": "quick_gelu",
    },
    "distilled, packed": {
        "distill_token": True,
        "global_pool": "token",
        "act": "swiglu_packed",
        "scale_mlp_norm": True,
        "layer_scale": True,
    },
}


@dataclass(frozen=True)
class OtherParts(AutoFormerSpace):
    """The AutoFormer space of Archs with other parts."""

    parts: str = ""
    act: str = "gelu"

    def _fixed(self) -> dict[str, Any]:
        return {**super()._fixed(), "relative_position": 0, "act": self.act, **PARTS[self.parts]}


class TestParts(SupernetContract):
    @pytest.fixture(params=[name for name in PARTS if name != "plain"])
    def supernet(self, request: pytest.FixtureRequest) -> Supernet:
        like = autoformer("micro", image_size=16, patch_size=4, num_classes=5, depths=(1, 2))
        given = {field.name: getattr(like, field.name) for field in fields(like)}
        return Supernet(OtherParts(**given, parts=request.param)).eval()


@pytest.mark.parametrize("act", get_args(Act))
def test_fewer_heads_and_hidden_units_are_the_whole_without_the_last(act: str) -> None:
    """The axes' names mean what they say: a cut network is the largest one whose last heads and units add nothing."""
    like = autoformer("micro", image_size=16, patch_size=4, num_classes=5, depths=(1,), embed_dims=(48,))
    given = {field.name: getattr(like, field.name) for field in fields(like)}
    supernet = Supernet(OtherParts(**given, parts="plain", act=act)).eval()
    generator = torch.Generator().manual_seed(0)
    randomize_(supernet, generator)
    space, images = supernet.space, torch.randn(2, 3, 16, 16, generator=generator)
    whole = extract(supernet, space.largest())
    smaller = space.smallest().blocks[0]
    block = whole.blocks[0]
    with torch.no_grad():
        block.attn.proj.weight[:, smaller.num_heads * smaller.head_dim :] = 0
        block.mlp.fc2.weight[:, smaller.mlp_hidden :] = 0
        torch.testing.assert_close(supernet(images, space.smallest()), whole(images), rtol=1e-4, atol=1e-5)
