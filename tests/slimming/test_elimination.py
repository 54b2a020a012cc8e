"""Backward elimination against the definition: refit what is left, and see which unit costs least."""

from __future__ import annotations

import torch

from vitnas.slimming import elimination
from vitnas.slimming.elimination import eliminated


def by_refitting(cov_AA: torch.Tensor, weight_YA: torch.Tensor, units: int) -> list[int]:
    """The order in which units go, each time the one after which the best fit of all outputs is nearest."""
    inputs, left, order = len(cov_AA) // units, list(range(units)), []
    ridge = elimination.RIDGE * cov_AA.diagonal().mean()
    cov_AA = cov_AA + ridge * torch.eye(len(cov_AA), dtype=cov_AA.dtype)

    def cost(kept: list[int]) -> float:
        at = [unit * inputs + i for unit in kept for i in range(inputs)]
        wanted = weight_YA @ cov_AA
        slopes = torch.linalg.solve(cov_AA[at][:, at], wanted[:, at].T)
        return float((weight_YA @ cov_AA @ weight_YA.T).trace() - (wanted[:, at] @ slopes).trace())

    while len(left) > 1:
        gone = min(left, key=lambda unit: cost([each for each in left if each != unit]))
        order.append(gone)
        left.remove(gone)
    return [*order, *left]


def test_units_go_as_refitting_says() -> None:
    generator = torch.Generator().manual_seed(0)
    for units, inputs in ((9, 1), (4, 3)):
        mixed = torch.randn(12, units * inputs, generator=generator, dtype=torch.float64)
        weight = torch.randn(5, units * inputs, generator=generator, dtype=torch.float64)
        scores = eliminated(mixed.T @ mixed, weight, units)
        assert scores.argsort().tolist() == by_refitting(mixed.T @ mixed, weight, units)


def test_of_copies_one_stays() -> None:
    """All copies cost nothing to begin with; when several units go in one round, one of each pair is left."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(400, 96, generator=generator, dtype=torch.float64)
    given = torch.cat([half, half], 1)
    weight = torch.randn(8, 192, generator=generator, dtype=torch.float64)
    kept = eliminated(given.T @ given / 400, weight, 192).argsort(descending=True)[:96]
    assert sorted((kept % 96).tolist()) == list(range(96))
