"""Does the supernet rank Archs? Found out before the search relies on its scores.

A few Archs of about equal cost are trained briefly. Of Archs of unequal cost the larger ones are mostly better and
score better, which any supernet gets right and no search needs it for. Where the order by score is not the order by
training, the run does not rely on the supernet: the search trains Archs instead, of which these are the first
(searcher guided_halving), or, where what is used has inherited weights, finals choose by training.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import combinations

import numpy as np
import torch

from vitnas.arch import Arch
from vitnas.budget import Cost
from vitnas.data.augment import seed_from
from vitnas.model import build
from vitnas.records import RankedArch, Ranking, Rung, Spent
from vitnas.reporting.tables import number
from vitnas.searching import Feasibility, Goal, SearchRecord, kendall_interval, rank_correlation
from vitnas.searching.choosing import LOSS, error_of, standing
from vitnas.searching.predictor import normal_scores
from vitnas.space import Genes
from vitnas.stages.finals import begin, first_rung
from vitnas.stages.models import Models
from vitnas.stages.outlook import LEAST_RANKED, Otherwise
from vitnas.stages.searching import RANKING, Inherited, Searches
from vitnas.train.evaluate import Z95

IMAGES = 4  # of noise, for expressivity
CROWD = 16  # Archs that are looked at per Arch that is taken
ORDERS = {"accuracy": "accuracy", LOSS: "loss, beside blocks and parameters"}  # what a search goes by
LEAST_APART = 5  # pairs; with fewer that training tells apart its order is chance
COSTLY = 0.75  # of the Archs within the budget that share is cheaper than those that are taken


def of_equal_cost(searches: Searches, n: int) -> list[Genes]:
    """`n` random Archs within the counted limits whose costs are about alike, near the upper end of what the budget
    allows; fewer where it allows fewer. A function of the run's seed, without clocks."""
    goal = Goal(searches.space, searches.budget)
    rng, pool = random.Random(seed_from(searches.work.seed, RANKING)), set[Genes]()
    while len(pool) < CROWD * n and (genes := goal.draw(rng, pool)) is not None:
        pool.add(genes)
    drawn = sorted(pool)
    costs = goal.costs(drawn)
    log_N = np.log(costs[searches.budget.counted.quantity].astype(float))
    folder = searches.work.folder
    most = Feasibility.read(folder).most_macs if Feasibility.exists(folder) else float("inf")
    fast_N = costs["macs"] <= most
    aim = np.quantile(log_N[fast_N], COSTLY) if fast_N.any() else log_N.min()
    return [drawn[place] for place in np.argsort(np.abs(log_N - aim), kind="stable")[:n].tolist()]


def measure_ranking(models: Models, searches: Searches, inherited: Inherited, otherwise: Otherwise) -> None:
    """ranking.json, unless it is there; nothing where the run asks for none.

    Args:
        otherwise: how the run goes on where its supernet does not rank.
    """
    config, work = models.config, models.work
    if not config.rank_archs or work.engine.from_first(lambda: Ranking.exists(work.folder)):
        return
    if work.engine.from_first(lambda: SearchRecord.exists(work.folder)):
        found = _unknown(searches, "The search is older than this measurement")
    else:
        start = begin(models, inherited, config.start)
        rungs, costs, scores, archs = list[Rung](), list[Cost](), list[Mapping[str, float]](), list[Arch]()
        for place, genes in enumerate(of_equal_cost(searches, config.rank_archs)):
            work.progress.note(f"ranking: Arch {place + 1} of {config.rank_archs}")
            archs.append(searches.space.arch_of(genes))
            costs.append(Goal(searches.space, searches.budget).cost(genes))
            scores.append(inherited.evaluator(archs[-1]))
            rungs.append(first_rung(models, archs[-1], config.rank_epochs, RANKING, start))
        places = standing(
            -np.array([score["loss"] for score in scores]),
            np.array([cost.value(searches.budget.counted.quantity) for cost in costs]),
            [(cost.params, arch.depth) for cost, arch in zip(costs, archs, strict=True)],
        )
        points = [
            RankedArch(
                arch.id,
                cost.macs,
                score["accuracy"],
                rung.accuracy,
                score["loss"],
                float(place),
                params=cost.params,
                depth=arch.depth,
                expressivity=expressivity(arch),
            )
            for arch, cost, score, rung, place in zip(archs, costs, scores, rungs, places, strict=True)
        ]
        found = judged(points, rungs, models, searches, otherwise)
    work.once(Ranking.path(work.folder), lambda: found.write(work.folder))
    work.progress.note(Ranking.read(work.folder).says)


def _unknown(searches: Searches, why: str) -> Ranking:
    return Ranking(
        kendall_tau=None, spearman=None, n=0, how="", points=(), note=why, ci95=None, alike=0, told_apart=0,
        least_tau=searches.config.least_tau, spent=Spent(),
    )  # fmt: skip


def judged(
    points: list[RankedArch], rungs: list[Rung], models: Models, searches: Searches, otherwise: Otherwise
) -> Ranking:
    """What the points say of the supernet, and whether the run relies on it."""
    least, macs, n = searches.config.least_tau, [point.macs for point in points], len(points)
    looked = Spent(looked=n * searches.num_images())
    score_N, trained_N = [_score(p, searches) for p in points], [p.trained_accuracy for p in points]
    tau, rho, note = None, None, ""
    alike, told_apart = _pairs(score_N, rungs)
    if len(set(score_N)) > 1 and len(set(trained_N)) > 1:
        found = rank_correlation(score_N, trained_N)
        tau, rho = found["kendall_tau"], found["spearman"]
    is_clear = n >= LEAST_RANKED and told_apart >= LEAST_APART
    relies = least == -1 or (tau or 0.0) >= least or (not is_clear and least < 1)
    if n < LEAST_RANKED:
        note = f"{n} Archs of about equal cost are too few to tell whether the supernet ranks them right"
    elif not is_clear and relies:
        note = (
            f"Whether the supernet ranks Archs of about equal cost is not known, as brief trainings tell {told_apart} "
            f"of {n * (n - 1) // 2} pairs apart on {rungs[0].n} images"
        )
    elif tau is None:
        note = f"The supernet scores all {n} Archs of about equal cost alike"
    return Ranking(
        kendall_tau=tau,
        spearman=rho,
        n=n,
        how=(
            f"{n} random Archs of about equal cost ({number(min(macs))} to {number(max(macs))} MACs), each "
            f"trained from {'new' if models.config.start == 'scratch' else 'inherited'} weights for "
            f"{models.config.rank_epochs:g} epochs (seed {models.work.seed}), before the search, and the supernet's "
            f"{ORDERS[searches.config.score]}; both on the {rungs[0].n} images of the holdout split"
        ),
        points=tuple(points),
        note=note,
        ci95=None if tau is None else kendall_interval(tau, n),
        alike=alike,
        told_apart=told_apart,
        least_tau=least,
        otherwise="" if relies else otherwise,
        rulers=rulers(points),
        spent=sum((rung.spent for rung in rungs), looked),
    )


def _score(point: RankedArch, searches: Searches) -> float:
    """What the search would order the Arch by; larger is better."""
    if searches.config.score == LOSS and point.standing is not None:
        return point.standing
    return point.supernet_accuracy


def rulers(points: list[RankedArch]) -> dict[str, float]:
    """Kendall's tau of each ruler with what training says, and of the mean of all; of those that have an order."""
    named: Mapping[str, list[float | None]] = {
        "loss": [None if p.supernet_loss is None else -p.supernet_loss for p in points],
        "accuracy": [p.supernet_accuracy for p in points],
        "MACs": [p.macs for p in points],
        "params": [p.params for p in points],
        "depth": [p.depth for p in points],
        "expressivity": [p.expressivity for p in points],
    }
    trained_N = [point.trained_accuracy for point in points]
    known = {name: np.array(values, dtype=float) for name, values in named.items() if None not in values}
    known = {name: value_N for name, value_N in known.items() if len(set(value_N.tolist())) > 1}
    if len(set(trained_N)) < 2 or not known:
        return {}
    known["their mean"] = np.sum([normal_scores(value_N) for value_N in known.values()], axis=0)
    known = {name: value_N for name, value_N in known.items() if np.ptp(value_N) > 0}
    return {
        name: float(rank_correlation(value_N.tolist(), trained_N)["kendall_tau"])
        for name, value_N in known.items()
    }


@torch.no_grad()
def expressivity(arch: Arch) -> float:
    """How many directions the tokens of a new network take for noise: the effective rank of their covariance."""
    generator = torch.Generator().manual_seed(0)
    model = build(arch, generator=generator).eval()
    tokens_BND = model(torch.randn(IMAGES, *arch.input_size, generator=generator), want=("tokens",))["tokens"]
    covariance_DD = torch.atleast_2d(
        torch.cov(tokens_BND.flatten(0, 1).T)
    )  # torch's of one dimension is a number
    share = torch.linalg.eigvalsh(covariance_DD).clamp_min(1e-12)
    share = share / share.sum()
    return float(torch.exp(-(share * share.log()).sum()))


def _pairs(score_N: list[float], rungs: list[Rung]) -> tuple[int, int]:
    """Pairs that training tells apart and the scores order alike, and all that training tells apart."""
    alike, told_apart = 0, 0
    for (one, first), (two, second) in combinations(zip(score_N, rungs, strict=True), 2):
        ahead = first.accuracy - second.accuracy
        errors = [error_of(each.accuracy, each.n, each.error) for each in (first, second)]
        if abs(ahead) > Z95 * np.hypot(errors[0], errors[1]):
            told_apart += 1
            alike += ahead * (one - two) > 0
    return alike, told_apart
