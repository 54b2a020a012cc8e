"""Which units go first if the others make up for them: backward elimination, in closed form.

With C the covariance of units' activations and W their outgoing weights, and the other units' weights refitted, leaving
out group g costs the squared error tr(W_g (P_gg)^-1 W_g'), where P is the inverse of C, and W and P of those left
follow from a Schur complement. It is the step of optimal brain surgery (Hassibi and Stork, 1993) for whole units:
copies of one unit cost nothing until the last one. Everything in float64.

Shapes: A inputs of the writer, Y its outputs, U units of K inputs each.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-3  # of the mean variance
SHARE = 32  # of the units left, one in so many goes per round


def eliminated(cov_AA: Tensor, weight_YA: Tensor, units: int) -> Tensor:
    """(U) the squared error once a unit and all that go before it are gone; the last to go has the most."""
    inputs = len(cov_AA) // units
    ridge = (RIDGE * cov_AA.diagonal().mean()).clamp(min=1e-30)
    inverse_AA = torch.linalg.inv(
        cov_AA + ridge * torch.eye(len(cov_AA), dtype=cov_AA.dtype, device=cov_AA.device)
    )
    weight_YA = weight_YA.double()
    left = torch.arange(units, device=cov_AA.device)
    scores_U = torch.zeros(units, dtype=torch.float64, device=cov_AA.device)
    total = cov_AA.new_zeros(())
    while len(left):
        number = max(1, len(left) // SHARE)
        costs = _costs(inverse_AA, weight_YA, inputs)
        few = costs.topk(min(len(left), 2 * number), largest=False).indices
        gone, costs = _one_by_one(inverse_AA, weight_YA, few, inputs, number)
        scores_U[left[gone]] = total + costs.cumsum(0)
        total = total + costs.sum()
        inverse_AA, weight_YA = _without(inverse_AA, weight_YA, gone, inputs)
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[gone] = False
        kept = _inputs(stays.nonzero().squeeze(1), inputs)
        inverse_AA, weight_YA, left = inverse_AA[kept][:, kept], weight_YA[:, kept], left[stays]
    return scores_U


def _inputs(units: Tensor, inputs: int) -> Tensor:
    """The inputs of these units."""
    return (units[:, None] * inputs + torch.arange(inputs, device=units.device)).flatten()


def _costs(inverse_AA: Tensor, weight_YA: Tensor, inputs: int) -> Tensor:
    """(U) what leaving out each unit alone costs."""
    units = len(inverse_AA) // inputs
    if inputs == 1:
        return weight_YA.square().sum(0) / inverse_AA.diagonal()
    own_UKK = inverse_AA.view(units, inputs, units, inputs).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    weight_UKY = weight_YA.T.reshape(units, inputs, -1)
    return (weight_UKY * torch.linalg.solve(own_UKK, weight_UKY)).sum((1, 2))


def _one_by_one(
    inverse_AA: Tensor, weight_YA: Tensor, few: Tensor, inputs: int, number: int
) -> tuple[Tensor, Tensor]:
    """Of these few units the ones to go, in turn, and what each costs then."""
    at = _inputs(few, inputs)
    inverse_AA, weight_YA = inverse_AA[at][:, at], weight_YA[:, at]
    there, gone, costs = few.clone(), [], []
    for _ in range(number):
        each = _costs(inverse_AA, weight_YA, inputs)
        least = int(each.argmin())
        gone.append(there[least])
        costs.append(each[least])
        inverse_AA, weight_YA = _without(
            inverse_AA, weight_YA, torch.tensor([least], device=there.device), inputs
        )
        stays = torch.arange(len(there), device=there.device) != least
        kept = _inputs(stays.nonzero().squeeze(1), inputs)
        inverse_AA, weight_YA, there = inverse_AA[kept][:, kept], weight_YA[:, kept], there[stays]
    return torch.stack(gone), torch.stack(costs)


def _without(inverse_AA: Tensor, weight_YA: Tensor, gone: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
    """Inverse and weights once these units are gone; their own entries mean nothing then."""
    at = _inputs(gone.to(inverse_AA.device), inputs)
    across_GA = torch.linalg.solve(inverse_AA[at][:, at], inverse_AA[at])
    return inverse_AA - inverse_AA[:, at] @ across_GA, weight_YA - weight_YA[:, at] @ across_GA
