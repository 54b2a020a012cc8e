"""specialize: the best Arch for another budget, from what a run has learned. Nothing is trained."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from vitnas.arch import Arch
from vitnas.budget import Budget, Cost
from vitnas.errors import UserError
from vitnas.exporting import load_timm
from vitnas.records import Answer, ExportRecord, Family
from vitnas.reporting import write_cards
from vitnas.searching import SEARCHERS, SearchRecord
from vitnas.searching.choosing import LOSS
from vitnas.searching.goal import Goal
from vitnas.searching.latency import measure_ms
from vitnas.stages.results import export_files
from vitnas.stages.run import ExportConfig, SearchConfig
from vitnas.stages.sampler import NUM_DRAWS, RunSampler, answers, is_quantity
from vitnas.stages.searching import Inherited, Searches
from vitnas.stages.work import quick_meter

Found: TypeAlias = tuple[
    Arch, Mapping[str, float], Cost, int
]  # what it scored, its Cost, how many were scored
LOOKS_SHARE = 20  # the policy's answers cost at most one of so many of another search's evaluations


def specialize(
    searches: Searches,
    sampler: RunSampler,
    inherited: Inherited,
    files: ExportConfig,
    budgets: Sequence[Budget],
) -> list[tuple[Arch, Answer]]:
    """One answer per budget, each saved and exported (front/<arch id>/), and family.json with all of them.

    A run with a learned sampler is asked directly: it draws, keeps what meets the budget, and the best guesses are
    ranked on held-out images. Any other run answers from its finished search.

    Args:
        files: what is exported, see `export_files`.
        budgets: without shares.

    Raises:
        UserError: a budget that cannot be met or asked for.
    """
    folder = searches.work.folder
    parsed = {budget.text: budget for budget in budgets}
    found = [_answer(searches, sampler, inherited, budget) for budget in parsed.values()]
    known = Family.read(folder).answers if Family.exists(folder) else ()
    for arch, _ in found:  # only now, so that a budget that cannot be met leaves nothing behind
        where = inherited.save(arch)
        if not ExportRecord.exists(where):
            export_files(inherited.images, load_timm(where), where, files).write(where)
    kept = [answer for answer in known if answer.budget not in parsed]
    Family((*kept, *(answer for _, answer in found))).write(folder)
    write_cards(folder)
    return found


def _answer(
    searches: Searches, sampler: RunSampler, inherited: Inherited, budget: Budget
) -> tuple[Arch, Answer]:
    start, asks = time.monotonic(), sampler.has_answers
    arch, values, cost, evaluated = (
        _by_sampler(searches, sampler, inherited, budget) if asks else _by_study(searches, sampler, budget)
    )
    return arch, Answer(
        budget=budget.text,
        arch_id=arch.id,
        accuracy=values["accuracy"],
        error=values.get("error"),
        cost=cost,
        path=f"front/{arch.id}",
        source="sampler" if asks else "search",
        evaluated=evaluated,
        seconds=time.monotonic() - start,
    )


def _by_study(searches: Searches, sampler: RunSampler, budget: Budget) -> Found:
    folder = searches.work.folder
    if not SearchRecord.exists(folder):
        raise UserError(
            f"{folder} has neither a learned sampler (sampler.kind is {sampler.config.kind!r}) nor a finished search "
            f"that could answer. Run `vitnas train {folder}` and `vitnas search` first."
        )
    unknown = [target for target in budget.latency_targets if target not in searches.meters]
    if unknown:
        raise UserError(
            f"the budget {budget.text!r} limits latency on {', '.join(unknown)}, which the search did not measure (it "
            f"measured: {', '.join(searches.meters) or 'none'}). Limit macs, params or memory, or search with that "
            "budget in another folder."
        )
    with searches.open() as study:
        trial = searches.best(study, budget)
    return trial.arch, trial.values, trial.cost, 0


def _by_sampler(searches: Searches, sampler: RunSampler, inherited: Inherited, budget: Budget) -> Found:
    focus = sampler.load()
    trained_for = focus.config.quantity
    if not all(is_quantity(limit, trained_for) for limit in budget.limits if limit.quantity == "latency"):
        raise UserError(
            f"the budget {budget.text!r} limits latency, for which the sampler was not trained. Limit "
            f"{trained_for}, or ask the finished search."
        )
    num_looks = num_looks_of(searches.config)
    goal, meters = Goal(focus.space, budget), {name: quick_meter(name) for name in budget.latency_targets}
    scored: list[tuple[Mapping[str, float], Arch, Cost]] = []
    for genes in answers(focus, budget, seed=searches.work.seed):
        arch = focus.space.arch_of(genes)
        # Where the budget limits latency it is measured: the policy only has a model of it.
        latency_ms = {name: measure_ms(meter, arch) for name, meter in meters.items()}
        cost = replace(goal.cost(genes), latency_ms=latency_ms)
        if not budget.misses(cost):
            scored.append((inherited.evaluator(arch), arch, cost))
        if len(scored) == num_looks:
            break
    if not scored:
        raise UserError(
            f"none of the {NUM_DRAWS} Archs that the sampler drew meets {budget.text!r}, and none near them was found. "
            "Widen the budget, or ask the finished search."
        )
    by_loss = searches.config.score == LOSS
    values, arch, cost = max(scored, key=lambda found: -found[0][LOSS] if by_loss else found[0]["accuracy"])
    return arch, values, cost, len(scored)


def num_looks_of(search: SearchConfig) -> int:
    """Answers of the policy that are scored on held-out images: as many as where the run's own search asks it, else
    a twentieth of what that search scores."""
    own = SEARCHERS[search.searcher].asks_sampler
    return search.num_trials if own else max(1, search.num_trials // LOOKS_SHARE)
