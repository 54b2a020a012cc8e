"""retrain: train the chosen Arch and its baselines in the same way, and see how well the supernet ranked Archs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from vitnas.arch import Arch
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.extraction import extract
from vitnas.model.named import ArchFile
from vitnas.records import Correlation, Finals, RankedArch, Result, Spent, TrainedSupernet
from vitnas.searching import Trial, rank_correlation
from vitnas.searching.latency import measure_ms
from vitnas.stages.finals import BriefTraining, Entrant, finalists, folder_of, from_scratch, hold
from vitnas.stages.hand_scaled import three_shapes
from vitnas.stages.models import Models
from vitnas.stages.searching import Inherited, Searches
from vitnas.train import evaluate


@dataclass(frozen=True)
class Pick:
    """An Arch that is to be trained, the accuracy that the supernet gives it where it is of this run's search, and what
    finding it took, where that is known."""

    arch: Arch
    accuracy: float | None
    spent: Spent | None


@dataclass(frozen=True)
class Picks:
    """The Archs that a run trains, by role."""

    models: Models
    searches: Searches
    inherited: Inherited

    def __call__(self, role: str) -> Pick:
        """The Arch of a role; a baseline's is found now, unless it was."""
        if role == "hand_scaled":
            return self.hand_scaled()
        return self.random_search() if role == "random_search" else self.chosen()

    def chosen(self) -> Pick:
        """What the search found."""
        trial, folder = self.searches.chosen(), self.models.work.folder
        if self.searches.config.trains:
            return Pick(trial.arch, None, Finals.read(folder).spent)
        with self.searches.open() as study:
            spent = self.searches.spent(study)
        if self.searches.finals.archs:
            spent += Finals.read(folder).spent
        return Pick(trial.arch, trial.values["accuracy"], self.with_supernet(spent))

    def random_search(self) -> Pick:
        """The best of as many random Archs, by the same scores and, where there are some, the same finals.

        Without a supernet the best of as many as can be trained to the last rung in the epochs that all rungs took.
        """
        searches = self.searches
        if searches.config.trains:
            brief = BriefTraining(self.models, searches, whole=True)
            finals = Finals.read(self.models.work.folder)
            epochs = sum(each.rungs[-1].epochs for each in finals.finalists)
            num_trials = max(1, round(epochs / brief.epochs))
            with searches.run("random_search", "random", brief, num_trials=num_trials) as study:
                spent = sum((brief.rung(trial.arch).spent for trial in study.scored()), Spent())
                return Pick(searches.best(study).arch, None, spent)
        with searches.run("random_search", "random", self.inherited.evaluator) as study:
            best, spent = searches.best(study), searches.spent(study)
            if searches.finals.archs:
                found = finalists(self.models, searches, self.inherited, study)
                best = next(trial for trial in study.scored() if trial.arch.id == found.chosen)
                spent += found.spent
        return Pick(best.arch, best.values["accuracy"], self.with_supernet(spent))

    def hand_scaled(self) -> Pick:
        """The best of three plain ViTs that a person would draw, by a brief training (finals/hand_scaled-*.json)."""
        models, work = self.models, self.models.work
        like = self.searches.chosen().arch
        path = work.folder / "finals" / f"hand_scaled-{like.id}.json"
        if not work.engine.from_first(path.exists):  # clocks would not find the same three again
            clocks = {target: partial(measure_ms, meter) for target, meter in self.searches.meters.items()}
            archs: Sequence[Arch] = work.engine.from_first(
                lambda: three_shapes(like, self.searches.budget, clocks)
            )
            entrants = [Entrant(arch, count(arch)) for arch in archs]
            if len(entrants) == 1:  # then there is nothing to decide
                found = Finals.of_one(entrants[0].arch.id, entrants[0].cost)
            else:
                config, begin = self.searches.finals, from_scratch(models)
                found = hold(models, config, entrants, "hand_scaled", "scratch", begin)
            for arch in archs:
                folder = folder_of(work, "hand_scaled", arch)
                work.once(ArchFile.path(folder), partial(ArchFile(arch).write, folder))
            work.once(path, partial(found.save, path))
        known = Finals.load(path)
        return Pick(ArchFile.read(path.parent / "hand_scaled" / known.chosen).arch, None, known.spent)

    def with_supernet(self, spent: Spent) -> Spent | None:
        """And what training the supernet took; None where that is not on record."""
        folder = self.models.work.folder
        return spent + TrainedSupernet.read(folder).spent if TrainedSupernet.exists(folder) else None


def train_models(models: Models, searches: Searches, inherited: Inherited) -> None:
    """Train `chosen` and the baselines into models/<role>/, then correlation.json. Skips what is there."""
    picks, rivals = Picks(models, searches, inherited), models.teacher.rivals()
    for role in models.own_roles:
        pick = picks(role)
        if Result.exists(models.folder(role)):
            if Result.read(models.folder(role)).arch_id == pick.arch.id:
                continue
            models.work.progress.note(f"{role} is another Arch now, and is trained anew")
            models.forget(role)
        stage = f"retrain/{role}"
        inherits = models.config.start == "inherited" and pick.accuracy is not None
        weights = "retrain/chosen" if role in rivals else stage  # the same new ones
        models.train_role(
            role,
            extract(inherited.supernet, pick.arch).cpu() if inherits else models.fresh(pick.arch, weights),
            models.config.train,
            stage,
            start="inherited" if inherits else "scratch",
            supernet_accuracy=pick.accuracy,
            teacher=rivals.get(role),
            before=pick.spent,
        )
    rank_archs(models, searches)


def rank_archs(models: Models, searches: Searches) -> None:
    """How the supernet's scores order Archs that were trained briefly (correlation.json): a few that are spread over
    the ranking or, where none are asked for, those of the finals behind their first rung."""
    retrain, work = models.config, models.work
    if Correlation.exists(work.folder):
        return
    if searches.config.trains:
        points, how = [], ""
    elif retrain.rank_archs or not searches.finals.archs:
        points = _trained_evenly(models, searches)
        how = (
            f"{len(points)} scored Archs spread over the supernet's ranking, each trained from scratch for "
            f"{retrain.rank_epochs:g} epochs (seed {work.seed}); both accuracies on the holdout split"
        )
    else:
        finals = Finals.read(work.folder)
        points = [
            RankedArch(each.arch_id, each.cost.macs, each.score or 0.0, each.rungs[0].accuracy)
            for each in finals.finalists
        ]
        how = (
            f"the {len(points)} Archs of the finals, which the search thinks the best or which lie on its front, each "
            f"trained for {finals.finalists[0].rungs[0].epochs:g} epochs from {finals.start} weights (seed "
            f"{work.seed}); both accuracies on the holdout split"
        )
    pairs = ([point.supernet_accuracy for point in points], [point.trained_accuracy for point in points])
    tau, rho, note = None, None, ""
    try:
        found = rank_correlation(*pairs)
        tau, rho = found["kendall_tau"], found["spearman"]
    except UserError as error:  # too few Archs, or all equally good: there is no order to compare
        without = "the run has no supernet, as its search trains Archs."
        note = str(error) if points else without if searches.config.trains else "retrain.rank_archs is 0."
    record = Correlation(
        kendall_tau=tau, spearman=rho, n=len(points), how=how, points=tuple(points), note=note
    )
    work.once(Correlation.path(work.folder), lambda: record.write(work.folder))


def _trained_evenly(models: Models, searches: Searches) -> list[RankedArch]:
    """Archs spread over the supernet's ranking, trained from scratch."""
    retrain, work = models.config, models.work
    with searches.open() as study:
        trials = evenly(study.scored(), retrain.rank_archs)
    config = replace(retrain.train, epochs=retrain.rank_epochs)
    points: list[RankedArch] = []
    for trial in trials:
        done, stage = work.folder / "ranking" / f"{trial.arch.id}.json", f"ranking/{trial.arch.id}"
        if not done.exists():
            model, _ = models.train(models.fresh(trial.arch, stage), config, stage)
            accuracy = evaluate(model, models.images.holdout).accuracy
            point = RankedArch(trial.arch.id, trial.cost.macs, trial.values["accuracy"], accuracy)
            work.once(done, partial(point.save, done))
        points.append(RankedArch.load(done))
    return points


def evenly(trials: list[Trial], n: int) -> list[Trial]:
    """`n` Trials evenly spaced over the ranking by accuracy, best and worst included."""
    ranked = sorted(trials, key=lambda trial: (trial.values["accuracy"], trial.number))
    if len(ranked) <= n or not n:
        return ranked[:n]
    return [ranked[round(i * (len(ranked) - 1) / max(1, n - 1))] for i in range(n)]
