"""specialize: the best Arch for another budget, from what a run has learned. Nothing is trained."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vitnas.arch import Arch
from vitnas.budget import Budget, Cost
from vitnas.errors import UserError
from vitnas.exporting import load_timm
from vitnas.measure.latency import LatencyMeter
from vitnas.records import Answer, ExportRecord, Family
from vitnas.searching import SEARCHERS, SearchRecord
from vitnas.searching.goal import Goal
from vitnas.searching.latency import measure_ms
from vitnas.space import Genes
from vitnas.stages.finish import export_files
from vitnas.stages.run import SearchConfig
from vitnas.stages.sampler import NUM_DRAWS, RunSampler, answers, is_quantity
from vitnas.stages.searching import Inherited, Searches

LOOKS_SHARE = 20  # the policy's answers cost at most one of so many of another search's evaluations


def specialize(
    searches: Searches, sampler: RunSampler, inherited: Inherited, formats: Sequence[str], budgets: list[str]
) -> list[tuple[Arch, Answer]]:
    """One answer per budget, each saved and exported (front/<arch id>/), and family.json with all of them.

    A run with a learned sampler is asked directly: it draws, keeps what meets the budget, and the best guesses are
    ranked on held-out images. Any other run answers from its finished search.

    Args:
        formats: files to export, see `export_files`.

    Raises:
        UserError: a budget that cannot be met or asked for.
    """
    folder = searches.work.folder
    parsed = {budget.text: budget for budget in map(Budget.parse, budgets)}
    asks = sampler.has_answers
    found = [
        _by_sampler(searches, sampler, inherited, budget) if asks else _by_study(searches, sampler, budget)
        for budget in parsed.values()
    ]
    known = Family.read(folder) if Family.exists(folder) else Family()
    for arch, _ in found:  # only now, so that a budget that cannot be met leaves nothing behind
        where = inherited.save(arch)
        if not ExportRecord.exists(where):
            ExportRecord(export_files(inherited.images, load_timm(where), where, formats)).write(where)
    answers = [answer for _, answer in found]
    kept = [answer for answer in known.answers if answer.budget not in {each.budget for each in answers}]
    Family((*kept, *answers)).write(folder)
    return found


def _answer(
    budget: Budget, arch: Arch, accuracy: float, cost: Cost, source: str, evaluated: int, start: float
) -> tuple[Arch, Answer]:
    return arch, Answer(
        budget=budget.text,
        arch_id=arch.id,
        accuracy=accuracy,
        cost=cost,
        path=f"front/{arch.id}",
        source=source,
        evaluated=evaluated,
        seconds=time.monotonic() - start,
    )


def _by_study(searches: Searches, sampler: RunSampler, budget: Budget) -> tuple[Arch, Answer]:
    start = time.monotonic()
    folder = searches.work.folder
    if not SearchRecord.exists(folder):
        raise UserError(
            f"{folder} has neither a learned sampler (sampler.kind is {sampler.config.kind!r}) nor a finished search "
            f"that could answer. Run `vitnas train {folder}` and `vitnas search` first."
        )
    with searches.open() as study:
        trial = study.best(budget)
    return _answer(budget, trial.arch, trial.values["accuracy"], trial.cost, "search", 0, start)


def _by_sampler(
    searches: Searches, sampler: RunSampler, inherited: Inherited, budget: Budget
) -> tuple[Arch, Answer]:
    start, focus = time.monotonic(), sampler.load()
    trained_for = focus.config.quantity
    if not all(is_quantity(limit, trained_for) for limit in budget.limits if limit.quantity == "latency"):
        raise UserError(
            f"the budget {budget.text!r} limits latency, for which the sampler was not trained. Limit "
            f"{trained_for}, or ask the finished search."
        )
    num_looks = num_looks_of(searches.config)
    ranked = answers(focus, budget, seed=searches.work.seed)
    goal = Goal(focus.space, budget)
    scored: list[tuple[Mapping[str, float], Genes, Cost]] = []
    for genes in ranked:
        cost = measured(goal, genes)
        if not budget.misses(cost):
            scored.append((inherited.evaluator(focus.space.arch_of(genes)), genes, cost))
        if len(scored) == num_looks:
            break
    if not scored:
        raise UserError(
            f"none of the {NUM_DRAWS} Archs that the sampler drew meets {budget.text!r}, and none near them was found. "
            "Widen the budget, or ask the finished search."
        )
    values, genes, cost = max(scored, key=lambda found: (found[0]["accuracy"], -found[0]["loss"]))
    return _answer(
        budget, focus.space.arch_of(genes), values["accuracy"], cost, "sampler", len(scored), start
    )


def num_looks_of(search: SearchConfig) -> int:
    """Answers of the policy that are scored on held-out images: as many as where the run's own search asks it, else
    a twentieth of what that search scores."""
    own = SEARCHERS[search.searcher].asks_sampler
    return search.num_trials if own else max(1, search.num_trials // LOOKS_SHARE)


def measured(goal: Goal, genes: Genes) -> Cost:
    """The counted Cost, with latency measured where the budget limits it: the policy only has a model of it."""
    cost = goal.cost(genes)
    targets = goal.budget.latency_targets
    if not targets:
        return cost
    arch = goal.space.arch_of(genes)
    meters = {target: LatencyMeter(target, runs=30, seconds=0.5, cache={}) for target in targets}
    return replace(cost, latency_ms={name: measure_ms(meter, arch, None) for name, meter in meters.items()})
