"""The identity sampler: its probability, found so that the mean cost meets a window, or the range that can be met."""

from __future__ import annotations

import random
import statistics
import time

import numpy as np
import pytest

from vitnas.arch import Arch
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.sample import SAMPLERS, Given, Identity, identity_probability
from vitnas.sample.identity import _Draws
from vitnas.space import Space, VitasSpace, autoformer, vitas

SMALL = vitas("micro", image_size=8, num_classes=10, in_chans=1)
SLOTS = vitas("micro", image_size=8, num_classes=10, in_chans=1, shifted=False)


def mean_macs(sampler: Identity, n: int = 300) -> float:
    rng = random.Random(0)
    return statistics.mean(count(draw.arch).macs for _ in range(n) for draw in sampler.draw(rng) if draw.arch)


@pytest.mark.parametrize("space", [SMALL, SLOTS], ids=["shifted", "in slots"])
def test_the_mean_depth_is_what_the_probability_says(space: VitasSpace) -> None:
    rng = random.Random(0)
    for prob in (0.0, 0.3, 0.7):
        archs = [Identity(space, prob).draw(rng)[0].arch for _ in range(400)]
        depths = [arch.depth for arch in archs if arch is not None]
        wanted = 5 * (1 - prob) + prob**5  # where all five would go, one stays
        assert statistics.mean(depths) == pytest.approx(wanted, abs=4 * (5 * 0.25 / 400) ** 0.5)
        assert all(arch in space for arch in archs)


def test_other_genes_stay_uniform() -> None:
    rng = random.Random(0)
    archs = [arch for _ in range(600) if (arch := Identity(SLOTS, 0.5).draw(rng)[0].arch)]
    for options in (
        [a.patch_size for a in archs],
        [a.embed_dim for a in archs],
        [a.blocks[0].mlp_hidden for a in archs],
    ):
        kinds = sorted(set(options))
        for kind in kinds:
            assert options.count(kind) / len(options) == pytest.approx(1 / len(kinds), abs=0.09)


def test_draws_follow_the_generator_only() -> None:
    sampler = Identity(SMALL, 0.4)
    first, again = (
        [s.draw(random.Random(7))[0].arch for s in (sampler, Identity(SMALL, 0.4))] for _ in range(2)
    )
    assert first == again
    assert first[0] == first[1]
    assert SAMPLERS["identity"](identity_prob=0.4).build(SMALL, Given()) == sampler  # type: ignore[call-arg]


# Means in the authors' convention (no class token, classifier once per token), from their code; see PAPERS.md.
PUBLISHED_MEANS = {0.0: 1.85e9, 0.1: 1.67e9, 0.3: 1.32e9, 0.5: 0.96e9, 0.7: 0.60e9}


@pytest.mark.parametrize("prob", PUBLISHED_MEANS)
def test_means_of_the_published_space(prob: float) -> None:
    """The mean by our count of 20,000 draws, plus what the authors' convention adds on average to 200 of them."""
    space = vitas("1g")
    genes = _Draws.of(space, 20_000, np.random.default_rng(0)).genes(prob)
    costs = space.cost_table().costs(genes)["macs"]
    archs = [space.decode(row) for row in genes[:200].tolist()]
    added = statistics.mean(count(a, convention="patch_tokens").macs - count(a).macs for a in archs)
    assert added < 0.06 * costs.mean()
    assert float(costs.mean()) + added == pytest.approx(PUBLISHED_MEANS[prob], rel=0.02)


def test_the_search_stops_at_once_in_the_authors_window() -> None:
    found = identity_probability(vitas("1g"), "0.85G<=macs<=1.0G")
    assert found.prob == 0.5
    (mean,) = found.means.values()
    assert 0.85e9 <= mean <= 1.0e9


@pytest.mark.parametrize(
    ("budget", "direction"),
    [("0.7G<=macs<=0.8G", 1), ("1.4G<=macs<=1.5G", -1), ("params<=3M", 1), ("macs>=1.2G", -1)],
)
def test_what_is_found_meets_the_window(budget: str, direction: int) -> None:
    space = vitas("1g")
    found = identity_probability(space, budget)
    assert (found.prob - 0.5) * direction > 0
    assert found.prob == pytest.approx(round(found.prob, 2))
    again = identity_probability(space, budget, n=4000, seed=1)
    assert again.prob == pytest.approx(found.prob, abs=0.06)  # 1,000 draws leave two or three hundredths
    if "macs" in budget:
        (mean,) = found.means.values()
        assert mean_macs(Identity(space, found.prob)) == pytest.approx(mean, rel=0.08)


def test_windows_narrower_than_a_step_are_met() -> None:
    found = identity_probability(vitas("1g"), "1.2000G<=macs<=1.2005G")
    (mean,) = found.means.values()
    assert 1.2e9 <= mean <= 1.2005e9
    assert found.prob != round(found.prob, 2)


def test_means_fall_as_the_probability_rises() -> None:
    probs = [
        identity_probability(vitas("1g"), f"{g}G<=macs<={g + 0.05}G").prob for g in (0.3, 0.6, 0.9, 1.2, 1.5)
    ]
    assert probs == sorted(probs, reverse=True)
    assert len(set(probs)) == len(probs)


def test_unreachable_windows_name_the_range() -> None:
    with pytest.raises(
        UserError,
        match=r"no identity probability brings the mean cost of vitas_1g to 2\.7G<=macs<=2\.8G; the mean of macs goes "
        r"from \d[\d.]* ?[MG].* \(probability 0\.99\) to 1\.[78]\d* ?G.* \(probability 0\)\. Choose",
    ):
        identity_probability(vitas("1g"), "2.7G<=macs<=2.8G")
    with pytest.raises(UserError, match=r"no identity probability brings"):
        identity_probability(vitas("1g"), "macs<=10M")


def test_limits_that_pull_apart_are_refused() -> None:
    with pytest.raises(UserError, match=r"no identity probability meets params<=2M and macs>=1\.5G together"):
        identity_probability(vitas("1g"), "macs>=1.5G and params<=2M")


def test_latency_is_measured() -> None:
    measured: list[Arch] = []

    def milliseconds(arch: Arch) -> float:
        measured.append(arch)
        return float(arch.depth)

    target = "onnxruntime,batch=1"
    found = identity_probability(SMALL, f"latency<=1.5ms@{target}", measures=measures(target, milliseconds))
    (mean,) = found.means.values()
    assert mean <= 1.5
    assert found.prob > 0.6
    assert len(measured) == len(set(measured)), "no Arch is timed twice"
    with pytest.raises(UserError, match=r"latency on .* has no measure"):
        identity_probability(SMALL, f"latency<=1.5ms@{target}")


def measures(target: str, function: object) -> dict[str, object]:
    from vitnas.budget import Budget

    (name,) = Budget.parse(f"latency<=1ms@{target}").latency_targets
    return {name: function}


def test_the_search_is_quick() -> None:
    """1,000 draws per step; the vectorised cost table."""
    space = vitas("1g")
    space.cost_table()
    start = time.perf_counter()
    identity_probability(space, "0.3G<=macs<=0.31G", n=1000)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("space", "prob", "message"),
    [
        (autoformer("tiny"), 0.5, r"has no identity; .* Use the sampler 'uniform', or a vitas"),
        (vitas("1.3g"), 0.5, r"vitas_1.3g has no identity"),
        (SMALL, 1.0, r"probability is 1\.0; it must be from 0 to below 1\. Use 0\.5"),
        (SMALL, -0.1, r"probability is -0\.1"),
    ],
    ids=["autoformer", "1.3g", "1", "-0.1"],
)
def test_what_cannot_be_is_refused(space: Space, prob: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Identity(space, prob)
