"""Networks that take smaller images beside their own, with the weights that they have."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from vitnas.arch import Arch, Block, Stage
from vitnas.errors import UserError
from vitnas.extraction import extract
from vitnas.model import build
from vitnas.model.sizes import cell_of, local_size, take_other_sizes
from vitnas.space import autoformer
from vitnas.supernet import Supernet

BLOCK = Block(num_heads=2, head_dim=8, mlp_hidden=24)
ONE = (Stage(embed_dim=16, blocks=(BLOCK, BLOCK)),)
TWO = (Stage(embed_dim=16, blocks=(BLOCK,)), Stage(embed_dim=32, blocks=(BLOCK,)))
PLAIN = Arch(image_size=16, patch_size=2, num_classes=3, stages=ONE)
MEAN = {"class_token": False, "global_pool": "avg"}
SPACE = autoformer(
    "micro", image_size=16, patch_size=4, num_classes=3, embed_dims=(16, 32), depths=(1, 2), head_dim=8,
    relative_position=2,
)  # fmt: skip


def images(side: int) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def made(arch: Arch) -> Any:
    return build(arch, generator=torch.Generator().manual_seed(0)).eval()


@pytest.mark.parametrize(
    "arch",
    [
        replace(PLAIN, position="none", relative_position=3),
        replace(PLAIN, position="rotary_2d"),
        replace(PLAIN, position="none", stages=TWO, **MEAN),
        replace(PLAIN, position="none", rel_pos_bias="mlp"),
    ],
    ids=["relative", "rotary", "stages", "bias"],
)
def test_without_tables_of_places_it_is_the_network_of_that_size(arch: Arch) -> None:
    network = made(arch)
    small = made(replace(arch, image_size=8))
    small.load_state_dict(network.state_dict())
    with pytest.raises(UserError):
        network(images(8))
    take_other_sizes(network, (3, 16, 16), 8)
    torch.testing.assert_close(network(images(8)), small(images(8)))
    assert network(images(16)).shape == (2, 3)
    assert network.arch == arch


@pytest.mark.parametrize("arch", [PLAIN, replace(PLAIN, stages=TWO, **MEAN)], ids=["plain", "stages"])
def test_places_of_the_smaller_grid_learn_too(arch: Arch) -> None:
    network = made(arch)
    take_other_sizes(network, (3, 16, 16), 8)
    network(images(8)).sum().backward()
    tables = [p for name, p in network.named_parameters() if name.endswith("pos_embed")]
    assert len(tables) == len(arch.stages)
    assert all(table.grad is not None and bool(table.grad.any()) for table in tables)


def test_a_table_of_steps_gives_the_steps_that_are_left() -> None:
    """The steps of a small grid are the middle ones of a large grid's."""
    arch = replace(PLAIN, position="none", rel_pos_bias="table", **MEAN)
    network, small = made(arch), made(replace(arch, image_size=8))
    state = network.state_dict()
    for name, table in state.items():
        if name.endswith("bias_table"):
            table.normal_(generator=torch.Generator().manual_seed(0))
            state[name] = table.view(15, 15, 2)[4:11, 4:11].reshape(49, 2)
    small.load_state_dict(state)
    take_other_sizes(network, (3, 16, 16), 8)
    torch.testing.assert_close(network(images(8)), small(images(8)))


def test_it_follows_its_weights_mode_and_head() -> None:
    """After a step, a copy, another mode and another head, small images meet what large ones do."""
    network = made(PLAIN)
    take_other_sizes(network, (3, 16, 16), 8)
    before = network(images(8))
    with torch.no_grad():
        network.norm.bias += 1
    assert not torch.equal(network(images(8)), before)
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.norm.bias += 1
    assert not torch.equal(other(images(8)), network(images(8)))
    network.set_drop_path(0.5)
    network.train()
    torch.manual_seed(0)
    many = images(8).repeat(8, 1, 1, 1)
    assert not torch.equal(network(many), network(many))
    network.reset_classifier(5)
    assert network.eval()(images(8)).shape == (2, 5)


def test_a_supernet_is_the_extracted_model() -> None:
    """Of small images too, bit for bit, whichever Arch; with gradients in the shared tensors."""
    supernet = Supernet(SPACE, generator=torch.Generator().manual_seed(0)).eval()
    take_other_sizes(supernet, (3, 16, 16), 8)
    for arch in (SPACE.smallest(), SPACE.largest()):
        model = extract(supernet, arch).eval()
        take_other_sizes(model, (3, 16, 16), 8)
        for side in (8, 16, 8):
            with torch.no_grad():
                assert torch.equal(supernet(images(side), arch), model(images(side)))
    supernet(images(8), SPACE.smallest()).sum().backward()
    assert supernet.pos_embed.grad is not None  # type: ignore[union-attr]
    assert bool(supernet.pos_embed.grad.any())  # type: ignore[union-attr]


def test_the_side_of_small_crops() -> None:
    """96 / 224 of the image, in whole cells of the last grid."""
    assert local_size(made(PLAIN), 16) == 6
    assert (cell_of(made(replace(PLAIN, stages=TWO, **MEAN))), local_size(made(PLAIN), 4)) == (4, 2)
    assert local_size(timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)), 224) == 96
    assert local_size(timm.create_model("test_vit", img_size=32, patch_size=4), 32) == 12


def test_swin_fills_up_before_it_shifts_and_keeps_its_own_size() -> None:
    """Images of its own size meet timm's network as it is, even where its windows do not fit."""
    options = {
        "img_size": 32,
        "patch_size": 2,
        "window_size": 3,
        "embed_dim": 8,
        "depths": (2,),
        "num_heads": (1,),
    }
    network = timm.create_model("swin_tiny_patch4_window7_224", num_classes=2, **options).eval()
    before = network(images(32))
    take_other_sizes(network, (3, 32, 32), 14)
    assert torch.equal(network(images(32)), before)
    found = network.forward_features(images(14))
    assert found.shape == (2, 7, 7, 8)


def mixer(word: str) -> nn.Module:
    return made(replace(PLAIN, stages=(replace(ONE[0], blocks=(replace(BLOCK, mixer=word),)),)))


@pytest.mark.parametrize(
    ("make", "size", "said"),
    [
        (lambda: made(PLAIN), 24, "larger than the network's"),
        (lambda: made(PLAIN), 1, "local_crops_size=2"),
        (lambda: mixer("linformer"), 8, "weights per token"),
        (lambda: MlpMixer(img_size=32, patch_size=8, num_blocks=1, embed_dim=8), 16, "MlpMixer cannot"),
    ],
)
def test_refused(make: Any, size: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        take_other_sizes(make(), (3, 16, 16), size)
