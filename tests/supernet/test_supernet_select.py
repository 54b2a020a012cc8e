"""Selections in Supernets beyond the contract: sharing from both ends, halves of a predictor, gradients by slot."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from vitnas.counting import count
from vitnas.extraction import extract
from vitnas.space import Space, autoformer, vitas
from vitnas.supernet import Bilateral, Sharing, Supernet, select
from vitnas.testing import SupernetContract, randomize_


def keeping(selector: str, **options: Any) -> Space:
    """The patches left in front of slots 1 and 2 are a third or two thirds."""
    sizes = {"image_size": 16, "patch_size": 4, "num_classes": 5, "depths": (2, 3), "keep": (0.3, 0.7)}
    return autoformer("micro", **{**sizes, "keep_places": (1, 2), "selector": selector, **options})


@pytest.mark.parametrize("selector", ["evit", "merge", "pool", "random", "first"])
def test_any_selector_in_a_supernet(selector: str) -> None:
    """Archs of all lengths: what is scored is what is extracted, bit for bit, and costs are those that are counted."""
    options: dict[str, Any] = {"keep": (0.25, 1.0)} if selector == "pool" else {}
    if selector in ("evit", "merge"):
        options["depths"] = (3,)  # the block before the first place stays
    space = keeping(selector, **options)
    supernet = Supernet(space).eval()
    randomize_(supernet, torch.Generator().manual_seed(0))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    rng = random.Random(0)
    archs = list(dict.fromkeys([space.smallest(), *(space.sample(rng) for _ in range(4))]))
    assert any(arch.selector == selector for arch in archs)
    costs = space.cost_table().costs(np.array([space.encode(arch) for arch in archs]))
    with torch.no_grad():
        for row, arch in enumerate(archs):
            model = extract(supernet, arch).eval()
            torch.testing.assert_close(model(images), supernet(images, arch), rtol=0, atol=0)
            cost = count(arch)
            found = [int(costs[name][row]) for name in ("macs", "params", "memory")]
            assert found == [cost.macs, cost.params, cost.memory_bytes]


class TestPredictorFromBothEnds(SupernetContract):
    @pytest.fixture
    def supernet(self) -> Supernet:
        return Supernet(keeping("predictor"), sharing=Sharing(default=Bilateral())).eval()


def test_a_narrow_predictor_is_the_wide_one_without_its_last_channels() -> None:
    """Own and whole halves are cut alike: where the channels left out are 0, both score the same."""
    supernet = Supernet(keeping("predictor", embed_dims=(48, 80))).eval()
    randomize_(supernet, torch.Generator().manual_seed(0))
    space = supernet.space
    wide, narrow = space.largest(), space.smallest()
    assert wide.blocks[1].keep == 11
    assert narrow.blocks[1].keep == 4
    small = extract(supernet, narrow).selections["1"]
    large = extract(supernet, wide).selections["1"]
    x = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        large.norm, small.norm = torch.nn.Identity(), torch.nn.Identity()
        half, quarter = small.fc1.out_features, small.fc2.out_features
        for name, axes in large.axes().items():
            if name.startswith("norm."):
                continue
            part = large.get_parameter(name).view([size for _, size in axes])
            for place, (axis, _) in enumerate(axes):
                kept = {"predictor_dim": half, "predictor_half": half, "predictor_quarter": quarter}.get(axis)
                if kept is not None:
                    part.narrow(place, kept, part.shape[place] - kept).zero_()
        padded = torch.nn.functional.pad(x, (0, 80 - 48))
        scores = [
            s(torch.nn.functional.pad(y, (0, 0, 1, 0))).scores_BP for s, y in ((small, x), (large, padded))
        ]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-5)


def test_training_draws_and_shares_gradients_by_slot() -> None:
    supernet = Supernet(keeping("predictor")).train()
    randomize_(supernet, torch.Generator().manual_seed(0))
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    rng = random.Random(0)
    archs = (supernet.space.sample(rng) for _ in range(1000))
    arch = next(arch for arch in archs if [block.keep for block in arch.blocks][1:] == [11, 4])
    outputs = supernet(images, arch, want=("logits", "keep", "tokens"))
    assert outputs["tokens"].shape[1] == 17
    assert outputs["keep"].shape == (4, 2, 16)
    (outputs["logits"].square().sum() + outputs["keep"].square().sum()).backward()
    names = [name for name, _ in supernet.named_parameters() if name.startswith("selections.")]
    assert {name.split(".")[1] for name in names} == {"1", "2"}
    assert all(bool(supernet.get_parameter(name).grad.any()) for name in names)  # type: ignore[union-attr]


def test_a_selection_has_the_weights_of_its_slot_where_blocks_are_left_out() -> None:
    space = vitas(
        "micro", image_size=16, num_classes=5, shifted=False, num_slots=4, keep=(0.5,), keep_places=(1, 2)
    )
    supernet, rng = Supernet(space), random.Random(0)
    randomize_(supernet, torch.Generator().manual_seed(0))
    tried = 0
    for arch in (space.sample(rng) for _ in range(200)):
        for index, (block, slot) in enumerate(zip(arch.blocks, space.slots(arch), strict=True)):
            if block.keep is not None and slot != index:
                bias = select(supernet, arch)[f"selections.{index}.decision.bias"]
                torch.testing.assert_close(
                    bias, supernet.get_parameter(f"selections.{slot}.decision.bias"), rtol=0, atol=0
                )
                tried += 1
    assert tried > 10
