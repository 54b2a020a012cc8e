"""with_selections: a trained network keeps its weights, and says what cannot be kept where."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from vitnas.arch import Arch, Block, Stage
from vitnas.errors import UserError
from vitnas.model import Model, build
from vitnas.model.selections import keeps_of, selecting, with_selections
from vitnas.testing import randomize_

BLOCK = Block(num_heads=2, head_dim=8, mlp_hidden=32)


def arch_of(depth: int = 4, **fields: Any) -> Arch:
    options: dict[str, Any] = {"image_size": 16, "patch_size": 4, "num_classes": 3, **fields}
    return Arch(stages=(Stage(embed_dim=16, blocks=(BLOCK,) * depth),), **options)


def made(arch: Arch) -> Model:
    model = build(arch)
    randomize_(model, torch.Generator().manual_seed(0))
    return model.eval()


def images_for(model: Model) -> torch.Tensor:
    return torch.randn(2, *model.arch.input_size, generator=torch.Generator().manual_seed(1))


def test_the_authors_numbers_of_patches() -> None:
    deit = arch_of(12, image_size=224, patch_size=16)
    assert keeps_of(deit, 0.7) == {3: 137, 6: 96, 9: 67}
    assert keeps_of(deit, 0.9) == {3: 176, 6: 158, 9: 142}
    assert keeps_of(deit, (0.7, 0.343), (2, 5)) == {2: 137, 5: 67}
    assert keeps_of(deit, {4: 50}) == {4: 50}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"class_token": False, "global_pool": "avg", "image_size": (12, 20)},
        {"reg_tokens": 2, "no_embed_class": True, "fc_norm": True, "global_pool": "avg"},
    ],
)
def test_all_weights_stay(fields: dict[str, Any]) -> None:
    """With every selection taken away again the network is what it was; the copy shares nothing with it."""
    model = made(arch_of(**fields))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fewer = with_selections(model, 0.5, (1, 3), generator=torch.Generator().manual_seed(0))
    patches = model.arch.grids[0][0] * model.arch.grids[0][1]
    assert fewer.arch.num_final_tokens == patches // 4 + model.num_prefix_tokens
    found = fewer(images_for(model), want=("logits", "keep"))
    assert found["keep"].sum(2).tolist() == [[patches // 2, patches // 4]] * 2
    again = with_selections(fewer, {})
    torch.testing.assert_close(again(images_for(model)), model(images_for(model)), rtol=0, atol=0)
    with torch.no_grad():
        for parameter in fewer.parameters():
            parameter.zero_()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_network_of_timm() -> None:
    timms = VisionTransformer(img_size=16, patch_size=4, embed_dim=16, depth=4, num_heads=2, num_classes=3)
    timms.pretrained_cfg = {
        **timm.get_pretrained_cfg("vit_tiny_patch16_224").to_dict(),
        "mean": (0.1, 0.2, 0.3),
    }
    fewer = with_selections(timms, 0.7)
    assert [block.keep for block in fewer.arch.blocks] == [None, 11, 7, 5]
    assert fewer.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    torch.testing.assert_close(
        with_selections(fewer, {})(images_for(fewer)), timms.eval()(images_for(fewer)), rtol=1e-5, atol=1e-6
    )


def test_other_rates_keep_a_trained_predictor() -> None:
    fewer = made(selecting(arch_of(), {1: 8, 2: 4}, "predictor"))
    other = with_selections(fewer, {1: 10, 3: 5})
    assert other.selections["1"].keep == 10
    for name, value in fewer.selections["1"].state_dict().items():
        torch.testing.assert_close(other.selections["1"].state_dict()[name], value, rtol=0, atol=0)
    assert "1" not in with_selections(fewer, {2: 4}, selector="fixed").selections


@pytest.mark.parametrize(
    ("keep", "places", "message"),
    [
        (0.3, None, "leaves 0 of 16 patches at block 3"),
        (1.0, None, "a share lies between 0 and 1"),
        (float("nan"), None, "keep is nan, which leaves 0 of 16 patches at block 1"),
        (float("inf"), None, "keep is inf, which leaves 16 of 16 patches at block 1"),
        ((0.5, 0.5), (1, 2), "block 2: keep is 8, but 8 patches come to it"),
        ((0.5,), (1, 2), "keep has 1 shares and there are 2 places"),
        (0.7, (1, 4), "places has 4; the network has blocks 0 to 3"),
        (0.7, (2, 1), "numbers of blocks that rise"),
        (0.7, (), "places is empty"),
        ({4: 3}, None, "places has 4"),
        ({"1": 4}, None, "places has '1'; the network has blocks 0 to 3"),
        ({1: -1}, None, "keep is -1"),
    ],
)
def test_what_cannot_be_kept(keep: Any, places: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_selections(made(arch_of()), keep, places)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_predictor_works_at_any_width(width: int) -> None:
    block = Block(num_heads=1, head_dim=2, mlp_hidden=4)
    arch = Arch(
        image_size=16, patch_size=4, num_classes=3, stages=(Stage(embed_dim=width, blocks=(block,) * 3),)
    )
    model = with_selections(build(arch), 0.5, (1, 2))
    for mode in (True, False):
        assert bool(model.train(mode)(images_for(model)).isfinite().all())


def test_a_grid_that_the_rest_needs() -> None:
    halves = Arch(
        image_size=16,
        patch_size=4,
        stages=(Stage(embed_dim=16, blocks=(BLOCK,) * 2), Stage(embed_dim=16, blocks=(BLOCK,) * 4)),
    )
    assert keeps_of(halves, (0.75, 0.5, 0.25)) == {3: 3, 4: 2, 5: 1}
    with pytest.raises(UserError, match="a reduction needs all patches before it"):
        selecting(halves, {1: 8}, "predictor")
