"""finals: the Archs that a search proposes are trained briefly, in rungs of rising length, and the best is chosen.

Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): all begin, and behind each rung the better half goes
on with the weights it has. All of a rung are trained before any is dropped. Optuna's pruners judge one trial after
the other and let the first pass, so what they keep depends on the order of the shortlist. Each rung has a learning
rate that falls to its end, so that what is compared has settled. Rungs are files (finals/search/<arch id>/): a
killed run loses at most what one rung has learned since its checkpoint, and an Arch of several shortlists trains
once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vitnas.arch import Arch
from vitnas.budget import Cost
from vitnas.errors import UserError
from vitnas.extraction import extract
from vitnas.model import Model, build
from vitnas.records import Finalist, Finals, Rung, Spent
from vitnas.searching import Goal, Study
from vitnas.searching.choosing import cost_objective, error_of, shortlist
from vitnas.stages.models import Models
from vitnas.stages.run import FinalsConfig
from vitnas.stages.searching import Inherited, Searches
from vitnas.stages.work import Work, load_weights, save_weights
from vitnas.supernet import Supernet
from vitnas.train import TrainConfig, evaluate

MOST_RUNGS = 3  # so that the first is no shorter than a quarter of the last: shorter ones tell nothing
SHARE = 5  # finals train for this part of the whole training, unless they are told


@dataclass(frozen=True)
class Entrant:
    """An Arch of a shortlist, its Cost, and what the search gave it."""

    arch: Arch
    cost: Cost
    score: float | None = None


def lengths(config: FinalsConfig, train: TrainConfig, archs: int) -> tuple[float, ...]:
    """Epochs that an Arch has trained for behind each rung: doubling, as many as bring `archs` down to two, but few.

    >>> lengths(FinalsConfig(), TrainConfig(epochs=40), 8)
    (2.0, 4.0, 8.0)
    """
    epochs = config.epochs or train.epochs / SHARE
    rungs = min(MOST_RUNGS, max(1, math.ceil(math.log2(archs))))
    return tuple(epochs / 2 ** (rungs - 1 - number) for number in range(rungs))


def epochs_in_all(config: FinalsConfig, train: TrainConfig, archs: int) -> float:
    """Epochs that `archs` train for in all rungs, together.

    >>> epochs_in_all(FinalsConfig(), TrainConfig(epochs=40), 8)  # 8 * 2 + 4 * 2 + 2 * 4
    32.0
    """
    total, before = 0.0, 0.0
    for epochs in lengths(config, train, archs) if archs else ():
        total += archs * (epochs - before)
        archs, before = math.ceil(archs / 2), epochs
    return total


def hold(
    models: Models,
    config: FinalsConfig,
    entrants: Sequence[Entrant],
    group: str,
    start: str,
    begin: Callable[[Arch], Model],
    *,
    planned: int = 0,
) -> Finals:
    """Train `entrants` in rungs; the best first, those that went further before those that did not.

    Args:
        group: where the rungs are; an Arch trains once in a group.
        planned: Archs that the rungs are made for; 0: as many as there are.
        start: which weights they begin with, for people.
        begin: an Arch's Model with these.
    """
    found: dict[str, list[Rung]] = {entrant.arch.id: [] for entrant in entrants}
    left = list({entrant.arch.id: entrant for entrant in entrants}.values())
    order = {entrant.arch.id: place for place, entrant in enumerate(left)}

    def better(entrant: Entrant) -> tuple[float, float, int]:
        rungs = found[entrant.arch.id]
        return (-len(rungs), -rungs[-1].accuracy if rungs else 0.0, order[entrant.arch.id])

    every, before = list(left), 0.0
    for number, epochs in enumerate(lengths(config, models.config.train, planned or len(entrants))):
        if number and len(left) == 1:
            break  # nothing is left to decide
        for entrant in left:
            rung = _rung(models, entrant.arch, number, (before, epochs), group, begin)
            found[entrant.arch.id].append(rung)
        left, before = sorted(left, key=better)[: math.ceil(len(left) / 2)], epochs
    return Finals(
        start=start,
        finalists=tuple(
            Finalist(each.arch.id, each.cost, each.score, tuple(found[each.arch.id]))
            for each in sorted(every, key=better)
        ),
    )


def _rung(
    models: Models,
    arch: Arch,
    number: int,
    span: tuple[float, float],
    group: str,
    begin: Callable[[Arch], Model],
) -> Rung:
    """Train an Arch from the epoch of the last rung to that of this one, unless it was."""
    work, folder = models.work, folder_of(models.work, group, arch)
    done = folder / f"rung{number}.json"
    weights = [folder / f"rung{each}.safetensors" for each in (number - 1, number)]
    if not done.exists():
        whole, epochs = models.config.train, span[1] - span[0]
        # A warm-up as long as the whole training's would be all that a rung does.
        warmup = min(1.0, epochs / whole.epochs) * whole.warmup_epochs
        config = replace(whole, epochs=epochs, warmup_epochs=warmup, monitor_every=0)
        model = build(arch) if number else begin(arch)
        if number:
            load_weights(model, weights[0], "vitnas finals")
        stage = f"finals/{group}/{arch.id}/{number}"
        model, spent = models.train(model, config, stage)
        score = evaluate(model, models.images.holdout)
        spent += Spent(looked=score.n)
        rung = Rung(epochs=span[1], accuracy=score.accuracy, n=score.n, spent=spent, error=score.error)
        work.once(weights[1], partial(save_weights, model, weights[1]))
        work.once(done, partial(rung.save, done))
        work.engine.from_first(partial(_tidy, weights[0], models.checkpoint(stage)))
    return Rung.load(done)


def first_rung(models: Models, arch: Arch, epochs: float, group: str, begin: Callable[[Arch], Model]) -> Rung:
    """Train an Arch for a first rung of `epochs`, unless it was; arguments as of `hold`."""
    return _rung(models, arch, 0, (0.0, epochs), group, begin)


def folder_of(work: Work, group: str, arch: Arch) -> Path:
    """Where an Arch's rungs are."""
    return work.folder / "finals" / group / arch.id


def _tidy(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def finalists(models: Models, searches: Searches, inherited: Inherited, study: Study) -> Finals:
    """The finals of a search: its shortlist, trained."""
    config = searches.finals
    if searches.config.trains:
        every = [Entrant(trial.arch, trial.cost) for trial in searches.met(study)]
        planned, fresh = searches.config.num_trials, from_scratch(models)
        found = hold(models, config, every, searches.group, "scratch", fresh, planned=planned)
    else:
        trials = shortlist(searches.met(study), study.goal, searches.num_images(), config.archs)
        entrants = [Entrant(trial.arch, trial.cost, trial.values["accuracy"]) for trial in trials]
        start = begin(models, inherited, config.start)
        found = hold(models, config, entrants, searches.group, config.start, start)
    return cheapest_first(found, study.goal) if searches.config.prefer == "cost" else found


def cheapest_first(found: Finals, goal: Goal) -> Finals:
    """Finals that choose the cheapest of those that came as far as the best and are within a standard error of it."""
    best, cost = found.finalists[0], cost_objective(goal.objectives, goal.budget)
    last = best.rungs[-1]
    least = last.accuracy - error_of(last.accuracy, last.n, last.error)
    near = [
        each
        for each in found.finalists
        if len(each.rungs) == len(best.rungs) and each.rungs[-1].accuracy >= least
    ]
    chosen = min(near, key=lambda each: cost.value({}, each.cost))
    return replace(found, finalists=(chosen, *(each for each in found.finalists if each is not chosen)))


def begin(models: Models, inherited: Inherited, start: str) -> Callable[[Arch], Model]:
    """An Arch's Model as a brief training begins with it."""
    scratch = start == "scratch"
    return from_scratch(models) if scratch else lambda arch: extract(inherited.supernet, arch).cpu()


def from_scratch(models: Models) -> Callable[[Arch], Model]:
    """New weights, which depend on the run's seed and the Arch only."""
    return lambda arch: models.fresh(arch, f"finals/{arch.id}")


def choose_by_training(
    models: Models, searches: Searches, inherited: Inherited, *, kind: str, recipe: str
) -> None:
    """finals.json, and chosen.json as it decides; nothing where the run has no finals.

    Args:
        kind, recipe: of the Space and the run, for people.
    """
    if not searches.has_finals:
        return
    folder = models.work.folder
    with searches.open() as study:
        found = finalists(models, searches, inherited, study)
        best = next(trial for trial in study.scored() if trial.arch.id == found.chosen)

    def write() -> None:
        inherited.save(best.arch)
        searches.tell(best, kind=kind, recipe=recipe)
        found.write(folder)

    models.work.engine.from_first(write)
    models.work.progress.note(found.says)


class BriefTraining:
    """Scores an Arch by training it from new weights, to the first rung of the finals or, if `whole`, to the last."""

    def __init__(self, models: Models, searches: Searches, *, whole: bool = False) -> None:
        self.models, self.split = models, models.images.data.holdout.split
        self.group = "random_search" if whole else searches.group
        train = models.config.train
        epochs = lengths(searches.finals, train, searches.config.num_trials)
        self.epochs = epochs[-1] if whole else epochs[0]

    def __call__(self, arch: Arch) -> dict[str, float]:
        rung = self.rung(arch)
        return {"accuracy": rung.accuracy, **({} if rung.error is None else {"error": rung.error})}

    def rung(self, arch: Arch) -> Rung:
        """What came of it."""
        return first_rung(self.models, arch, self.epochs, self.group, from_scratch(self.models))


class Brief(Inherited):
    """In place of a supernet, in a run without: Archs with the weights that a brief training gave them."""

    def __init__(self, models: Models, searches: Searches) -> None:
        super().__init__(models.work, models.images, self._none)
        self.evaluator = BriefTraining(models, searches)  # type: ignore[assignment]
        self.group = searches.group

    def _none(self) -> Supernet:
        raise UserError("this run uses no supernet: its search trains Archs. Search with another searcher.")

    def model(self, arch: Arch) -> Model:
        """With the weights of the last rung that it reached."""
        model, folder = build(arch), folder_of(self.work, self.group, arch)
        load_weights(model, max(folder.glob("rung*.safetensors")), "vitnas search")
        return model
