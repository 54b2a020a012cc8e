"""Features for dense tasks and resizing, beside timm's own VisionTransformer with the same weights."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor

from vitnas.errors import UserError
from vitnas.model import Model
from vitnas.model.timm_keys import from_timm
from vitnas.testing import randomize_

SIZES: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 5,
}
KINDS: dict[str, dict[str, Any]] = {
    "class token": {},
    "mean pooled": {"class_token": False, "global_pool": "avg"},
}


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, generator: torch.Generator) -> tuple[Any, Model]:
    theirs = VisionTransformer(**SIZES, **KINDS[request.param]).eval()
    randomize_(theirs, generator)
    return theirs, from_timm(theirs)


def images_of(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("indices", [2, (2, 0, -3), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
def test_forward_intermediates_with_all_options(
    pair: tuple[Any, Model], indices: Any, output_fmt: str
) -> None:
    theirs, ours = pair
    flags = ("return_prefix_tokens", "norm", "stop_early", "intermediates_only", "output_dict")
    with torch.no_grad():
        for values in product((False, True), repeat=len(flags)):
            options = {"indices": indices, "output_fmt": output_fmt, **dict(zip(flags, values, strict=True))}
            want = theirs.forward_intermediates(images_of(16), **options)
            same(ours.forward_intermediates(images_of(16), **options), want)


@pytest.mark.parametrize("indices", [0, 5, [4], [-5], [], (1, 4)], ids=str)
def test_blocks_that_do_not_exist_are_refused(pair: tuple[Any, Model], indices: Any) -> None:
    for call in (
        lambda: pair[1].forward_intermediates(images_of(16), indices),
        lambda: pair[1].prune_intermediate_layers(indices),
    ):
        with pytest.raises(
            UserError, match=r"indices is .*; the model has blocks 0 to 3\. Ask for some of these"
        ):
            call()


def test_an_unknown_format_is_refused(pair: tuple[Any, Model]) -> None:
    with pytest.raises(UserError, match=r"output_fmt is 'NHWC'; it must be 'NCHW' or 'NLC'"):
        pair[1].forward_intermediates(images_of(16), output_fmt="NHWC")


@pytest.mark.parametrize(("prune_norm", "prune_head"), list(product((False, True), repeat=2)))
def test_pruning(pair: tuple[Any, Model], prune_norm: bool, prune_head: bool) -> None:
    theirs, ours = pair
    taken = [
        model.prune_intermediate_layers([0, 2], prune_norm=prune_norm, prune_head=prune_head)
        for model in (theirs, ours)
    ]
    assert taken == [[0, 2], [0, 2]]
    assert len(ours.blocks) == ours.arch.depth == 3
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        same(ours(images_of(16)), theirs(images_of(16)))


@pytest.mark.parametrize(
    "change",
    [
        {"img_size": 32},
        {"img_size": (8, 8)},
        {"img_size": (16, 32)},
        {"img_size": (24, 8), "patch_size": 8},
        {"patch_size": 2},
        {"patch_size": (8, 8)},
        {"img_size": 24, "patch_size": 6},
    ],
    ids=str,
)
def test_set_input_size(pair: tuple[Any, Model], change: dict[str, Any]) -> None:
    theirs, ours = pair
    ours.pos_embed.requires_grad_(False)
    theirs.set_input_size(
        **{key: (value, value) if isinstance(value, int) else value for key, value in change.items()}
    )
    ours.set_input_size(**change)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
    assert not ours.pos_embed.requires_grad
    sides = theirs.patch_embed.img_size
    images = torch.randn(2, 3, *sides, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        same(ours(images), theirs(images))
        same(ours.forward_intermediates(images), theirs.forward_intermediates(images))
    assert ours.pretrained_cfg["input_size"] == (3, *sides)
    assert ours.feature_info[0]["reduction"] == theirs.patch_embed.patch_size[0]


def test_sizes_that_cannot_be_are_refused(pair: tuple[Any, Model]) -> None:
    before = copy.deepcopy(pair[1].arch)
    with pytest.raises(UserError, match=r"patch_size is \(4, 8\); both sides must be the same"):
        pair[1].set_input_size(patch_size=(4, 8))
    with pytest.raises(UserError, match=r"image_size is 16 x 18; .* patch_size 4\. Nearest: 16"):
        pair[1].set_input_size(img_size=(16, 18))
    with pytest.raises(
        UserError, match=r"image_size is 18; it must be a multiple of patch_size 4\. Nearest: 16"
    ):
        pair[1].set_input_size(img_size=18)
    assert pair[1].arch == before


def test_reset_classifier(pair: tuple[Any, Model]) -> None:
    theirs, ours = pair
    for args in [(7,), (0,), (0, ""), (3, "avg"), (3, "")]:
        for model in (theirs, ours):
            model.reset_classifier(*args)
        ours.load_state_dict(theirs.state_dict())
        with torch.no_grad():
            same(ours(images_of(16)), theirs(images_of(16)))
        assert ours.num_classes == ours.arch.num_classes == args[0]


def test_pooling_a_class_token_that_is_not_there_is_refused(generator: torch.Generator) -> None:
    ours = from_timm(VisionTransformer(**SIZES, **KINDS["mean pooled"]))
    with pytest.raises(UserError, match=r"global_pool is 'token' but class_token is False"):
        ours.reset_classifier(5, "token")


@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_parameter_groups_are_timms(pair: tuple[Any, Model], layer_decay: float | None) -> None:
    found = []
    for model in pair:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        options: dict[str, Any] = {"weight_decay": 0.05, "no_weight_decay_list": model.no_weight_decay()}
        if layer_decay is None:
            groups = param_groups_weight_decay(model, **options)
        else:
            groups = param_groups_layer_decay(model, **options, layer_decay=layer_decay)
        found.append(
            {names[id(p)]: (g["weight_decay"], g.get("lr_scale", 1.0)) for g in groups for p in g["params"]}
        )
    assert found[1] == found[0]


def test_relative_tables_are_decayed_and_grouped_with_their_block() -> None:
    import timm

    import vitnas  # noqa: F401 - registers the models

    model = timm.create_model("autoformer_tiny", img_size=32, num_classes=3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(
        model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5
    )
    found = {names[id(p)]: g for g in groups for p in g["params"]}
    table, weight = found["blocks.12.attn.rel_pos_k.rows"], found["blocks.12.attn.proj.weight"]
    assert table["weight_decay"] == 0.05
    assert table["lr_scale"] == weight["lr_scale"] == 0.5
