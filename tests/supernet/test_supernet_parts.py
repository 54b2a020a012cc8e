"""The Supernet's contract where its Archs have the parts of pretrained networks: every width of theirs is cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from vitnas.arch import Act, Arch, Block, RelPosBias, Stage
from vitnas.extraction import extract
from vitnas.space.around import AroundSpace
from vitnas.supernet import Supernet
from vitnas.testing import SupernetContract, randomize_

PARTS: dict[str, dict[str, Any]] = {
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


BLOCK = Block(num_heads=4, head_dim=8, mlp_hidden=40)
ARCH = Arch(image_size=16, patch_size=4, num_classes=5, stages=(Stage(embed_dim=32, blocks=(BLOCK, BLOCK)),))


class TestParts(SupernetContract):
    @pytest.fixture(params=PARTS)
    def supernet(self, request: pytest.FixtureRequest) -> Supernet:
        arch = replace(ARCH, **PARTS[request.param])
        options = {"heads": (0.5, 1.0), "hidden": (0.6, 1.0), "embed_dims": (0.5, 1.0), "blocks": (1,)}
        return Supernet(AroundSpace(arch=arch, **options)).eval()


@pytest.mark.parametrize("act", get_args(Act))
@pytest.mark.parametrize("bias", get_args(RelPosBias))
def test_fewer_heads_and_hidden_units_are_the_whole_without_the_last(act: Any, bias: Any) -> None:
    """The axes' names mean what they say: a cut network is the largest one whose last heads and units add nothing."""
    arch = replace(ARCH, act=act, rel_pos_bias=bias, qkv_bias="qv", qk_norm=True)
    space = AroundSpace(arch=arch, heads=(0.5, 1.0), hidden=(0.6, 1.0))
    supernet = Supernet(space).eval()
    generator = torch.Generator().manual_seed(0)
    randomize_(supernet, generator)
    images = torch.randn(2, 3, 16, 16, generator=generator)
    whole = extract(supernet, arch)
    smaller = space.smallest().blocks[0]
    assert (smaller.num_heads, smaller.mlp_hidden) == (2, 24)
    with torch.no_grad():
        for block in whole.blocks:
            block.attn.proj.weight[:, smaller.inner_dim :] = 0
            block.mlp.fc2.weight[:, smaller.mlp_hidden :] = 0
        torch.testing.assert_close(supernet(images, space.smallest()), whole(images), rtol=1e-4, atol=1e-5)
