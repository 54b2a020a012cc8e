"""specialize: the best Arch for another budget, from what a run has learned. Nothing is trained."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from vitnas.arch import Arch
from vitnas.budget import Budget, Cost
from vitnas.errors import UserError
from vitnas.exporting import load_timm
from vitnas.measure.latency import LatencyMeter
from vitnas.records import Answer, ExportRecord, Family
from vitnas.searching import SEARCHERS, SearchRecord
from vitnas.searching.latency import measure_ms
from vitnas.searching.problem import Problem
from vitnas.space import Genes
from vitnas.stages.context import Context
from vitnas.stages.finish import export_files
from vitnas.stages.run import SearchConfig
from vitnas.stages.sampler import NUM_DRAWS, answers, has_answers, is_quantity, load_sampler
from vitnas.stages.searching import SupernetEvaluator, open_study, save_front_member

LOOKS_SHARE = 20  # the policy's answers cost at most one of so many of another search's evaluations


def specialize(context: Context, budgets: list[str]) -> list[tuple[Arch, Answer]]:
    """One answer per budget, each saved and exported (front/<arch id>/), and family.json with all of them.

    A run with a learned sampler is asked directly: it draws, keeps what meets the budget, and the best guesses are
    ranked on held-out images. Any other run answers from its finished search.

    Raises:
        UserError: a budget that cannot be met or asked for.
    """
    parsed = {budget.text: budget for budget in map(Budget.parse, budgets)}
    find = _by_sampler if has_answers(context) else _by_study
    found = [find(context, budget) for budget in parsed.values()]
    known = Family.read(context.folder) if Family.exists(context.folder) else Family()
    for arch, answer in found:  # only now, so that a budget that cannot be met leaves nothing behind
        save_front_member(context, arch)
        _export(context, context.folder / answer.path)
    answers = [answer for _, answer in found]
    kept = [answer for answer in known.answers if answer.budget not in {each.budget for each in answers}]
    Family((*kept, *answers)).write(context.folder)
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


def _by_study(context: Context, budget: Budget) -> tuple[Arch, Answer]:
    start = time.monotonic()
    if not SearchRecord.exists(context.folder):
        raise UserError(
            f"{context.folder} has neither a learned sampler (sampler.kind is {context.run.sampler.kind!r}) nor a "
            f"finished search that could answer. Run `vitnas train {context.folder}` and `vitnas search` first."
        )
    with open_study(context, "search") as study:
        trial = study.best(budget)
    return _answer(budget, trial.arch, trial.values["accuracy"], trial.cost, "search", 0, start)


def _by_sampler(context: Context, budget: Budget) -> tuple[Arch, Answer]:
    start, focus = time.monotonic(), load_sampler(context)
    trained_for = focus.config.quantity
    if not all(is_quantity(limit, trained_for) for limit in budget.limits if limit.quantity == "latency"):
        raise UserError(
            f"the budget {budget.text!r} limits latency, for which the sampler was not trained. Limit "
            f"{trained_for}, or ask the finished search."
        )
    num_looks = num_looks_of(context.run.search)
    ranked = answers(focus, budget, seed=context.run.seed)
    evaluator, problem = SupernetEvaluator(context.supernet, context.holdout), Problem(focus.space, budget)
    scored: list[tuple[Mapping[str, float], Genes, Cost]] = []
    for genes in ranked:
        cost = measured(context, problem, genes)
        if not budget.misses(cost):
            scored.append((evaluator(focus.space.arch_of(genes)), genes, cost))
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


def measured(context: Context, problem: Problem, genes: Genes) -> Cost:
    """The counted Cost, with latency measured where the budget limits it: the policy only has a model of it."""
    cost = problem.cost(genes)
    targets = problem.budget.latency_targets
    if not targets:
        return cost
    arch = problem.space.arch_of(genes)
    meters = {target: LatencyMeter(target, runs=30, seconds=0.5, cache={}) for target in targets}
    return replace(cost, latency_ms={name: measure_ms(meter, arch, None) for name, meter in meters.items()})


def _export(context: Context, folder: Path) -> None:
    """The files that the run exports, verified, beside the weights."""
    if not ExportRecord.exists(folder):
        ExportRecord(export_files(context, load_timm(folder).eval(), folder)).write(folder)
