"""How often a slot holds the identity: so often that the mean cost of the Archs drawn meets the Budget.

Paper: ViTAS (arXiv 2106.13700) and its code, which walk from 0.5 in steps of 0.01 with 1,000 fresh draws each. Here the
same draws serve every probability (each slot of each draw keeps its uniform number), so that the mean falls as the
probability rises and the walk's end is found by bisection on the same grid: ten means instead of fifty, and no noise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from vitnas.arch import Arch
from vitnas.budget import Budget, Limit, format_quantity
from vitnas.errors import UserError
from vitnas.runs import RunFile
from vitnas.sample.sampler import Draw, Given, SamplerConfig
from vitnas.space import Matrix, Space, VitasSpace

START = 0.5
STEP = 0.01
_MOST = 99  # steps; at a probability of 1 nothing would be left to draw
_FINER = 1e-4  # where the window is narrower than a step

Measure: TypeAlias = Callable[[Arch], float]


@dataclass(frozen=True)
class Identity:
    """One random Arch per step, whose slots hold the identity with probability `prob`; other genes are uniform."""

    space: Space
    prob: float = START

    def __post_init__(self) -> None:
        require_identity(self.space)
        if not 0 <= self.prob < 1:
            raise UserError(
                f"the identity's probability is {self.prob}; it must be from 0 to below 1. Use 0.5."
            )

    def draw(self, rng: random.Random) -> list[Draw]:
        space = require_identity(self.space)
        generator = np.random.default_rng(rng.getrandbits(64))
        genes = _Draws.of(space, 1, generator).genes(self.prob)
        return [Draw(arch=space.arch_of(tuple(genes[0].tolist())))]


@dataclass(frozen=True)
class Found(RunFile):
    """The probability found, and the mean of every limited quantity there, by the limit's text."""

    FILE = "identity.json"

    prob: float
    means: Mapping[str, float]

    def __str__(self) -> str:
        means = "; ".join(f"{limit}: {value:.4g}" for limit, value in self.means.items())
        return f"identity probability {self.prob:g}" + (
            f" (mean cost of the Archs drawn, {means})" if means else ""
        )


@dataclass(frozen=True, kw_only=True)
class IdentityConfig(SamplerConfig):
    """One random Arch per step, whose slots hold the identity with `identity_prob`.

    Without it the probability is searched for before training, so that the mean cost meets the budget (identity.json).
    """

    kind = "identity"
    settles = Found

    identity_prob: float | None = None

    def __post_init__(self) -> None:
        if self.identity_prob is not None and not 0 <= self.identity_prob < 1:
            raise UserError(
                f"sampler.identity_prob is {self.identity_prob}; it must be from 0 to below 1. Use 0.5, or leave it "
                "out."
            )

    def build(self, space: Space, given: Given) -> Identity:
        if self.identity_prob is not None:
            return Identity(space, self.identity_prob)
        assert isinstance(given.settled, Found), "the probability is found before training"
        return Identity(space, given.settled.prob)

    @property
    def is_settled(self) -> bool:
        return self.identity_prob is not None

    def settle(self, space: Space, budget: Budget, *, seed: int, measures: Mapping[str, Measure]) -> Found:
        return identity_probability(space, budget, seed=seed, measures=measures)


def identity_probability(
    space: Space,
    budget: Budget | str,
    *,
    n: int = 1000,
    seed: int = 0,
    measures: Mapping[str, Measure] | None = None,
    num_measured: int = 16,
) -> Found:
    """The identity's probability nearest to 0.5, in hundredths, at which the mean cost meets every limit of `budget`.

    Args:
        space: a ViTAS space with the identity.
        budget: limits on MACs, parameters, memory, latency; a window has two bounds.
        n: Archs drawn per probability.
        seed: of the draws.
        measures: milliseconds of an Arch by latency target; needed where the Budget limits latency.
        num_measured: Archs that are measured per probability.

    Raises:
        UserError: no probability meets the Budget (the range of means that can be reached is given); no identity in
            the space; latency without a measure.
    """
    space = require_identity(space)
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    missing = [target for target in budget.latency_targets if target not in (measures or {})]
    if missing:
        raise UserError(
            f"latency on {', '.join(missing)} has no measure; a limit on latency is measured, never guessed. "
            "Pass measures, as a mapping from target to a function of an Arch."
        )
    draws = _Draws.of(space, n, np.random.default_rng(seed))
    means = _Means(space, budget, draws, measures or {}, num_measured)
    if means.misses(START) == 0:
        return Found(START, means.at(START))
    too_large = means.misses(START) > 0
    # The first step from 0.5 whose mean is no longer on the wrong side: where the authors' walk stops.
    inside, outside = (_MOST if too_large else 0), round(START / STEP)
    if means.misses(inside * STEP) == means.misses(START):
        raise _unreachable(space, budget, means)
    while abs(inside - outside) > 1:
        middle = (inside + outside) // 2
        if means.misses(middle * STEP) == means.misses(START):
            outside = middle
        else:
            inside = middle
    prob = inside * STEP
    if means.misses(prob) != 0:  # the window lies between two steps
        low, high = sorted((inside * STEP, outside * STEP))
        while means.misses(prob) != 0 and high - low > _FINER:
            prob = (low + high) / 2
            low, high = (prob, high) if means.misses(prob) > 0 else (low, prob)
    if means.misses(prob) != 0:
        raise _unreachable(space, budget, means)
    return Found(round(prob, 6), means.at(prob))


def require_identity(space: Space) -> VitasSpace:
    """`space`, if its slots can hold the identity."""
    if not isinstance(space, VitasSpace) or not space.identity:
        raise UserError(
            f"{space.name} has no identity; there is no probability to set. Use the sampler 'uniform', or a vitas "
            "space with identity=true."
        )
    return space


@dataclass(frozen=True)
class _Draws:
    """Archs drawn once: genes without identities, and a uniform number per slot that says when it becomes one."""

    space: VitasSpace
    drawn: Matrix
    uniform: npt.NDArray[np.float64]

    @classmethod
    def of(cls, space: VitasSpace, n: int, rng: np.random.Generator) -> _Draws:
        drawn = rng.integers(0, space.num_options, size=(n, len(space.genes)))
        return cls(space, drawn, rng.random((n, space.num_slots)))

    def genes(self, prob: float) -> Matrix:
        """(n, num_genes) canonical genes."""
        return self.space.with_identities(self.drawn, self.uniform < prob)


class _Means:
    """Mean costs by probability, each computed once."""

    def __init__(
        self,
        space: VitasSpace,
        budget: Budget,
        draws: _Draws,
        measures: Mapping[str, Measure],
        num_measured: int,
    ) -> None:
        self._space, self._budget, self._draws = space, budget, draws
        self._measures, self._num_measured = measures, num_measured
        self._known: dict[float, dict[str, float]] = {}
        self._timed: dict[tuple[str, Arch], float] = {}

    def at(self, prob: float) -> dict[str, float]:
        """The mean of every limited quantity, by the limit's text."""
        if prob not in self._known:
            genes = self._draws.genes(prob)
            costs = self._space.cost_table().costs(genes)
            self._known[prob] = {
                str(limit): self._time(limit.target, genes)
                if limit.quantity == "latency"
                else float(costs[limit.quantity].mean())
                for limit in self._budget.limits
            }
        return self._known[prob]

    def misses(self, prob: float) -> int:
        """1 where the means are too large, -1 where too small, 0 where all limits are met.

        Raises:
            UserError: one limit asks for more and another for less.
        """
        means = self.at(prob)
        sides = {limit: _side(limit, means[str(limit)]) for limit in self._budget.limits}
        over, under = ([limit for limit, side in sides.items() if side == sign] for sign in (1, -1))
        if over and under:
            raise UserError(
                f"no identity probability meets {over[0]} and {under[0]} together; at {prob:.2f} the means of "
                f"{self._space.name} are {_told(over[0], means)} and {_told(under[0], means)}. Change one limit."
            )
        return 1 if over else -1 if under else 0

    def _time(self, target: str, genes: Matrix) -> float:
        total = 0.0
        rows = genes[: self._num_measured]
        for row in rows.tolist():
            arch = self._space.decode(row)
            if (target, arch) not in self._timed:
                self._timed[target, arch] = self._measures[target](arch)
            total += self._timed[target, arch]
        return total / len(rows)


def _side(limit: Limit, value: float) -> int:
    if limit.high is not None and value > limit.high:
        return 1
    return -1 if limit.low is not None and value < limit.low else 0


def _told(limit: Limit, means: Mapping[str, float]) -> str:
    return f"{format_quantity(means[str(limit)], limit.quantity)} {limit.name}"


def _unreachable(space: Space, budget: Budget, means: _Means) -> UserError:
    ends = means.at(_MOST * STEP), means.at(0.0)
    spans = "; ".join(
        f"the mean of {limit.name} goes from {format_quantity(ends[0][str(limit)], limit.quantity)} (probability "
        f"{_MOST * STEP:.2f}) to {format_quantity(ends[1][str(limit)], limit.quantity)} (probability 0)"
        for limit in budget.limits
    )
    return UserError(
        f"no identity probability brings the mean cost of {space.name} to {budget.text}; {spans}. Choose a window "
        "within, a space that reaches it, or the sampler 'uniform'."
    )
