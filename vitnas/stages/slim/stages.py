"""The stages of a slim run that are its own: order, sensitivity, search, fold, bench, retrain, evaluate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vitnas.budget import DEFAULT_LATENCY_TARGET, Budget, Cost
from vitnas.counting import count
from vitnas.data import Readings
from vitnas.errors import UserError
from vitnas.exporting import load_timm
from vitnas.measure.latency import Latency
from vitnas.model import Model
from vitnas.records import (
    Allocation,
    LatencyRecord,
    Member,
    Order,
    Place,
    Result,
    SlimFront,
    SlimResults,
    SlimRow,
    Tables,
)
from vitnas.reporting import tell
from vitnas.reporting.slimming import cosine
from vitnas.searching import TokenClock, TokenSpeeds
from vitnas.slimming import IMPORTANCE, PredictedDamage, Sensitivity, ordered, sensitivity
from vitnas.slimming.images import LOOKED_AT
from vitnas.stages.results import files, measure_together
from vitnas.stages.searching import WEIGHTS
from vitnas.stages.slim.allocate import Allocator, fit_tables, share_out
from vitnas.stages.slim.context import SlimContext
from vitnas.stages.slim.folded import Told
from vitnas.stages.slim.learned import as_result, learn_elastic, recovered
from vitnas.stages.work import quick_meter, save_weights

ORIGINAL = "original"
ORDERED = "ordered.safetensors"  # what a supernet that learns starts from


def order(context: SlimContext) -> None:
    """order.json and supernet.safetensors: the network, its units sorted by importance on every axis; where the effort
    says so it has learned to be good at every size."""
    folder, word, learns = context.folder, context.slim.importance, context.effort == "search"
    target = folder / (ORDERED if learns else WEIGHTS)

    def make() -> None:
        images, generator = context.inherited.calibration, context.work.generator("importance")
        scores = IMPORTANCE[word](context.original, images, generator)
        width = torch.argsort(scores.width[0], descending=True, stable=True).tolist()
        moves = len(scores.width) == 1 and "embed_dim" in context.slim.axes
        looked = min(context.num_images, LOOKED_AT)
        Order(importance=word, images=looked, width=tuple(width) if moves else ()).write(folder)
        save_weights(ordered(context.original, context.space, scores), target)

    context.work.once(target, make)
    if learns:
        learn_elastic(context, target, folder / WEIGHTS)


def measure_damage(context: SlimContext) -> None:
    """sensitivity.json: what each option of each gene costs alone."""
    folder = context.folder

    def make() -> None:
        inherited, progress = context.inherited, context.work.progress
        sensitivity(inherited.supernet, inherited.calibration, progress=progress).write(folder)

    context.work.once(Sensitivity.path(folder), make)


def share_out_budgets(context: SlimContext) -> None:
    """latency_tables.json and allocation.json: which Archs are worth folding, for every budget of the front."""
    folder = context.folder

    def make() -> None:
        if not Tables.exists(folder):
            Tables(fit_tables(context.space, context.meters, context.run.seed)).write(folder)
        asked = allocator(context)
        found = share_out(asked, context.budget, context.slim.front)
        if asked.tokens.speeds:
            TokenSpeeds(tuple(asked.tokens.speeds)).write(folder)
        found.write(folder)

    context.work.once(Allocation.path(folder), make)


def allocator(context: SlimContext) -> Allocator:
    """What proposes Archs within a budget, from what was measured once."""
    damage = PredictedDamage(context.space, Sensitivity.read(context.folder))
    tables = Tables.read(context.folder).models
    tokens = TokenClock(
        {target: quick_meter(target) for target in context.targets or (DEFAULT_LATENCY_TARGET,)}
    )
    return Allocator(context.work, damage, context.run.search, context.meters, tables, tokens)


def fold_front(context: SlimContext) -> None:
    """front/NN/ and front.json: for every budget the best of the proposals, folded, exported, measured."""
    context.work.once(SlimFront.path(context.folder), lambda: _fold_front(context))


def _fold_front(context: SlimContext) -> None:
    plan, folder, progress = Allocation.read(context.folder), context.folder, context.work.progress
    members: list[Member] = []
    for place in plan.places:
        where = folder / "front" / f"{place.number:02d}"
        if not Member.exists(where):
            fold_place(context, where, place)
        members.append(Member.read(where))
        progress.update("fold", len(members), len(plan.places), in_words(members[-1]))
    SlimFront(tuple(members)).write(folder)


def fold_place(context: SlimContext, where: Path, place: Place) -> None:
    """The best of a budget's proposals into `where`."""
    archs = {each.arch_id: context.space.arch_of(each.genes) for each in place.candidates}
    candidate, model, found = context.inherited.best(place.candidates, archs)
    context.inherited.member(where, place.budget, candidate, model, found, context.run.export)


def in_words(member: Member) -> str:
    """How a member agrees with the original."""
    found = member.agreement
    same = "" if found.top1 is None else f", {found.top1:.1%} same first class"
    return f"{member.folder}: cosine {cosine(found)}{same}"


def measure_side_by_side(context: SlimContext) -> None:
    """export/latency.json: the original and the whole front, each as an exported file, timed in the same rounds."""

    def load() -> dict[str, Model]:
        members = SlimFront.read(context.folder).members
        front = {member.folder: load_model(context.folder / member.folder) for member in members}
        return {ORIGINAL: context.original.cpu(), **front}

    measure_together(context.work, load, context.targets)


def load_model(folder: Path) -> Model:
    """A network of the run, on the CPU."""
    model = load_timm(folder)
    assert isinstance(model, Model)
    return model


def timed(folder: Path) -> dict[str, dict[str, Latency]]:
    """Latencies by role and target."""
    return LatencyRecord.read(folder / "export").by_role


def as_measured(member: Member, times: Mapping[str, Mapping[str, Latency]]) -> Cost:
    """What a member costs, latency as it was timed beside the original."""
    latency_ms = {target: latency.median_ms for target, latency in times.get(member.folder, {}).items()}
    return replace(member.cost, latency_ms=latency_ms)


def as_asked(context: SlimContext, times: Mapping[str, Mapping[str, Latency]]) -> Budget:
    """The budget with its shares as numbers: of latency, those of the original timed beside it."""
    latency_ms = {target: latency.median_ms for target, latency in times.get(ORIGINAL, {}).items()}
    return Budget.parse(context.run.budget).resolved(
        replace(count(context.original.arch), latency_ms=latency_ms)
    )


def pick(members: Sequence[Member], budget: Budget, times: Mapping[str, Mapping[str, Latency]]) -> Member:
    """The least damaged member that meets the budget as measured: what the clock says too slow gives way to the next.

    Raises:
        UserError: none does.
    """
    timed = [m for m in members if set(budget.latency_targets) <= times.get(m.folder, {}).keys()]
    met = [member for member in timed if not budget.misses(as_measured(member, times))]
    if not met:
        raise UserError(
            f"none of the {len(members)} networks made meets {budget.text!r} as measured beside MODEL; the machine was "
            "busier than while they were chosen. Free it, delete allocation.json, front.json and front/, and run the "
            "same command again."
        )
    return min(met, key=lambda member: member.measured)


def choose(context: SlimContext) -> None:
    """models/chosen/: the member that meets the budget, and has learned from the original where the effort says so."""
    models, members = context.models, SlimFront.read(context.folder).members
    times = timed(context.folder)
    try:  # a share is one of what MODEL takes beside them
        member = pick(members, as_asked(context, times), times)
    except UserError:  # by the clock as it was when they were made
        member = pick(members, context.budget, times)
    model = load_model(context.folder / member.folder)
    result = as_result(member) if context.effort == "fold" else recovered(context, member, model)
    context.work.once(Result.path(models.folder("chosen")), lambda: models.write(model, result))


def evaluate_front(context: SlimContext) -> None:
    """slimmed.json and report.html: original, chosen one and front on the test split, which is read once."""
    folder = context.folder
    context.work.once(SlimResults.path(folder), lambda: _final(context).write(folder))
    context.models.show_tokens()
    context.engine.from_first(lambda: tell(folder))  # also over one from before the end


def _final(context: SlimContext) -> SlimResults:
    folder, folded, times = context.folder, context.inherited, timed(context.folder)
    result, members = Result.read(context.models.folder("chosen")), SlimFront.read(folder).members
    start = next(member for member in members if member.folder == result.start)
    test = context.images.data.open_test(Readings.path(folder), purpose="final table of a slimmed network")
    made = {each.folder: (load_model(folder / each.folder), each.cost) for each in members}
    made = {ORIGINAL: (context.original, count(context.original.arch)), **made}
    if result.train:  # else it is the member itself
        made["chosen"] = (context.models.load("chosen"), start.cost)
    batches = Told(folded.batches(test), context.work.progress, "results")
    found = folded.compared([model for model, _ in made.values()], batches)
    rows = {
        role: SlimRow(
            role=role,
            folder="" if role == ORIGINAL else role,
            arch_id=model.arch.id,
            cost=cost,
            agreement=each.agreement,
            accuracy=each.accuracy,
            latency_ms=times.get(role, {}),
        )
        for (role, (model, cost)), each in zip(made.items(), found, strict=True)
    }
    as_member = rows[start.folder]
    chosen = rows.pop("chosen", as_member)
    chosen = replace(chosen, role="chosen", folder="models/chosen", latency_ms=as_member.latency_ms)
    first, *front = rows.values()
    budget = as_asked(context, times)
    met = not budget.misses(as_measured(start, times))
    return SlimResults(rows=(first, chosen, *front), budget=budget.text, met=met, files=files(folder))
