"""A Supernet that starts from a pretrained ViT holds that ViT: its Archs are prefixes of it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.extraction import extract
from vitnas.model import build, from_timm
from vitnas.space import AutoFormerSpace, around, autoformer, vit_resnas
from vitnas.supernet import Supernet
from vitnas.supernet.pretrained import start_from_timm
from vitnas.testing import randomize_


def vit(**options: object) -> VisionTransformer:
    """A small timm ViT with weights that are not symmetric in anything, in AutoFormer's form: mean pooling."""
    fields: dict[str, object] = {
        "img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 32, "depth": 3, "num_heads": 4,
        "mlp_ratio": 2.0, "global_pool": "avg", "fc_norm": False, **options,
    }  # fmt: skip
    model = VisionTransformer(**fields)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def space(**options: object) -> AutoFormerSpace:
    """A Space that contains exactly that ViT as its largest Arch."""
    fields: dict[str, object] = {
        "image_size": 16, "patch_size": 4, "in_chans": 3, "num_classes": 5, "embed_dims": (16, 32), "depths": (2, 3),
        "num_heads": (2, 4), "mlp_ratios": (1.0, 2.0), "head_dim": 8, "relative_position": 0, **options,
    }  # fmt: skip
    return autoformer("micro", **fields)  # type: ignore[arg-type]


def start(space: AutoFormerSpace, source: nn.Module) -> tuple[Supernet, str]:
    supernet = Supernet(space, generator=torch.Generator().manual_seed(1))
    return supernet.eval(), start_from_timm(supernet, source)


def share(said: str) -> int:
    found = re.search(r"(\d+)% of the supernet's weights", said)
    assert found, said
    return int(found.group(1))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def norm_eps(arch: Arch, model: VisionTransformer) -> None:
    """timm's layers and the Space's may have different constants; make the ViT's those of the Space."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = arch.norm_eps


@torch.no_grad()
def test_the_largest_arch_is_the_vit(images: torch.Tensor) -> None:
    source = vit()
    supernet, said = start(space(), source)
    largest = supernet.space.largest()
    norm_eps(largest, source)
    assert share(said) == 100
    torch.testing.assert_close(supernet(images, largest), source(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(extract(supernet, largest)(images), source(images), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_smaller_arch_is_a_prefix_of_the_vit() -> None:
    source = vit()
    supernet, _ = start(space(), source)
    model = extract(supernet, supernet.space.smallest())
    theirs = source.state_dict()
    width, heads, head_dim, hidden = 16, 2, 8, 16
    for name, ours in model.state_dict().items():
        if name.endswith(("attn.qkv.weight", "attn.qkv.bias")):
            # q, k and v are each cut to the first heads, not the first rows of the three together.
            blocks = theirs[name].view(3, 4, head_dim, *theirs[name].shape[1:])[:, :heads]
            want = blocks.reshape(3 * heads * head_dim, *theirs[name].shape[1:])[..., :width]
            want = want if name.endswith("weight") else blocks.reshape(-1)
        else:
            want = theirs[name][tuple(slice(0, size) for size in ours.shape)]
        torch.testing.assert_close(ours, want, rtol=0, atol=0, msg=name)
    assert model.blocks[0].mlp.fc1.out_features == hidden
    assert len(model.blocks) == 2


@torch.no_grad()
def test_what_the_vit_lacks_keeps_its_first_weights() -> None:
    """A deeper, wider Space with relative positions and other classes."""
    bigger = space(embed_dims=(32, 48), depths=(3, 4), num_heads=(4, 6), relative_position=3, num_classes=7)
    untouched = Supernet(bigger, generator=torch.Generator().manual_seed(1))
    supernet, said = start(bigger, vit())
    before, after = untouched.state_dict(), supernet.state_dict()
    assert 10 < share(said) < 90
    for name in before:
        if "rel" in name or name.startswith(("head.", "blocks.3.")):
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, msg=name)
    assert not torch.equal(after["blocks.0.mlp.fc1.weight"], before["blocks.0.mlp.fc1.weight"])
    torch.testing.assert_close(
        after["blocks.0.mlp.fc1.weight"][:, 32:], before["blocks.0.mlp.fc1.weight"][:, 32:]
    )


@torch.no_grad()
def test_grey_images_see_the_sum_of_the_channels(images: torch.Tensor) -> None:
    source, grey = vit(), space(in_chans=1)
    supernet, _ = start(grey, source)
    norm_eps(grey.largest(), source)
    one = images[:, :1]
    got = supernet(one, grey.largest())
    torch.testing.assert_close(got, source(one.expand(-1, 3, -1, -1)), rtol=0, atol=1e-4)


def test_heads_of_another_width_are_refused() -> None:
    with pytest.raises(UserError, match="heads are 16 wide; the space's are 8"):
        start(space(), vit(num_heads=2))


def test_a_network_that_is_no_plain_vit_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be written as an Arch"):
        start(space(), vit(final_norm=False))


def test_a_network_of_other_parts_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"has reg_tokens 2, layer_scale True; the space's Archs have 0, False"
    ):
        start(space(), vit(init_values=0.1, reg_tokens=2))


def test_another_patch_and_image_size_are_resampled() -> None:
    supernet, said = start(space(image_size=24, patch_size=6), vit())
    assert share(said) == 100
    assert torch.isfinite(supernet(torch.randn(1, 3, 24, 24), supernet.space.smallest())).all()


def test_several_stages_do_not_start_from_a_plain_vit() -> None:
    supernet = Supernet(vit_resnas("micro", image_size=16, patch_size=4, num_classes=5, depths=(2, 2)))
    with pytest.raises(
        UserError, match=r"has 2 stages and stem 'conv'; the pretrained model has 1 and stem 'linear'"
    ):
        start_from_timm(supernet, vit())


@torch.no_grad()
def test_a_kind_of_its_own_is_told(images: torch.Tensor) -> None:
    source = vit(global_pool="token", qkv_bias=False)
    supernet, said = start(space(), source)
    assert "differ in kind" in said
    assert "global_pool 'avg' (was 'token')" in said
    assert "qkv_bias True (was False)" in said
    assert not torch.allclose(supernet(images, supernet.space.largest()), source(images), atol=1e-3)


@torch.no_grad()
def test_tokens_that_one_side_lacks_move_no_positions() -> None:
    """DeiT's distillation token has a place that AutoFormer's nets lack; the patches keep theirs."""
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2.0}
    source = VisionTransformerDistilled(**options, num_classes=5)
    randomize_(source, torch.Generator().manual_seed(0))
    supernet, _ = start(space(), source)
    there, here = source.pos_embed, supernet.get_parameter("pos_embed")
    torch.testing.assert_close(here, torch.cat([there[:, :1], there[:, 2:]], dim=1), rtol=0, atol=0)

    back = Supernet(around(from_timm(source)), generator=torch.Generator().manual_seed(1))
    first = back.get_parameter("pos_embed").clone()
    start_from_timm(back, extract(supernet, supernet.space.largest()))
    found = back.get_parameter("pos_embed")
    want = torch.cat([here[:, :1], first[:, 1:2], here[:, 1:]], dim=1)
    torch.testing.assert_close(found, want, rtol=0, atol=0)


@torch.no_grad()
def test_no_classifier_for_other_classes_is_copied() -> None:
    arch = replace(from_timm(vit()).arch, patch_head=True)
    made = Supernet(around(replace(arch, num_classes=7)), generator=torch.Generator().manual_seed(1))
    before = {name: made.get_parameter(f"{name}.weight").clone() for name in ("head", "patch_head")}
    start_from_timm(made, build(arch))
    for name, weight in before.items():
        torch.testing.assert_close(made.get_parameter(f"{name}.weight"), weight, rtol=0, atol=0)


NETWORKS = {
    "deit": "deit_tiny_patch16_224",
    "deit distilled": "deit_tiny_distilled_patch16_224",
    "deit3": "deit3_small_patch16_224",
    "registers": "vit_small_patch14_reg4_dinov2",
    "clip": "vit_base_patch16_clip_224",
    "siglip": "vit_base_patch16_siglip_224",
}


@torch.no_grad()
@pytest.mark.parametrize("kind", NETWORKS)
def test_around_a_network_the_largest_is_that_network(kind: str) -> None:
    name = NETWORKS[kind]
    network = timm.create_model(name, img_size=28 if "14" in name else 32, depth=2, num_classes=5).eval()
    randomize_(network, torch.Generator().manual_seed(0))
    made = around(network)
    supernet = Supernet(made).eval()
    said = start_from_timm(supernet, network)
    assert "100% of the supernet's weights" in said
    assert "differ" not in said
    model = from_timm(network)
    images = torch.randn(2, *model.arch.input_size, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(supernet(images, made.largest()), model(images), rtol=0, atol=0)
    torch.testing.assert_close(supernet(images, made.largest()), network(images), rtol=1e-5, atol=1e-5)
    again = Supernet(made).eval()
    start_from_timm(again, model)
    torch.testing.assert_close(again(images, made.largest()), model(images), rtol=0, atol=0)
