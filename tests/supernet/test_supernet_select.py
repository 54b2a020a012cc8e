"""The Supernet's contract where its Archs keep fewer patches: weights of a selection go by the slot behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch

from vitnas.extraction import extract
from vitnas.space import AutoFormerSpace, autoformer
from vitnas.supernet import Bilateral, Sharing, Supernet
from vitnas.testing import SupernetContract, randomize_


@dataclass(frozen=True, kw_only=True)
class Keeping(AutoFormerSpace):
    """The AutoFormer space of Archs that keep fewer patches in front of slots 1 and 2."""

    selector: str

    def fixed_blocks(self) -> Sequence[Sequence[dict[str, Any]]]:
        (blocks,) = super().fixed_blocks()
        keeps = {1: 11, 2: 5}
        return [[{**block, "keep": keeps.get(slot)} for slot, block in enumerate(blocks)]]

    def fixed(self) -> dict[str, Any]:
        return {**super().fixed(), "selector": self.selector}


def keeping(selector: str, **options: Any) -> Keeping:
    like = autoformer("micro", image_size=16, patch_size=4, num_classes=5, depths=(2, 3), **options)
    given = {field.name: getattr(like, field.name) for field in fields(like)}
    return Keeping(**given, selector=selector)


class TestSelections(SupernetContract):
    @pytest.fixture(params=["predictor", "fixed", "attention"])
    def supernet(self, request: pytest.FixtureRequest) -> Supernet:
        return Supernet(keeping(request.param)).eval()


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
    outputs = supernet(images, supernet.space.largest(), want=("logits", "keep", "tokens"))
    assert outputs["tokens"].shape[1] == 17
    assert outputs["keep"].shape == (4, 2, 16)
    (outputs["logits"].square().sum() + outputs["keep"].square().sum()).backward()
    names = [name for name, _ in supernet.named_parameters() if name.startswith("selections.")]
    assert {name.split(".")[1] for name in names} == {"1", "2"}
    assert all(bool(supernet.get_parameter(name).grad.any()) for name in names)  # type: ignore[union-attr]
