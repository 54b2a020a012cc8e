"""retrain: train the chosen Arch and its baselines in the same way, and see how well the supernet ranked Archs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

from vitnas.arch import Arch
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.extraction import extract
from vitnas.model.named import ArchFile
from vitnas.records import Correlation, Finals, RankedArch, Ranking, Result, Spent, TrainedSupernet
from vitnas.searching import rank_correlation
from vitnas.searching.latency import measure_ms
from vitnas.stages.finals import BriefTraining, Entrant, finalists, folder_of, from_scratch, hold
from vitnas.stages.hand_scaled import patch_sizes, three_shapes
from vitnas.stages.models import Models
from vitnas.stages.searching import FOLDS, Inherited, Searches


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
            return Pick(trial.arch, None, self.trained_spent())
        with self.searches.open() as study:
            spent = self.searches.spent(study)
        if self.searches.finals.archs:
            spent += Finals.read(folder).spent
        return Pick(trial.arch, trial.values["accuracy"], self.with_supernet(spent))

    def random_search(self) -> Pick:
        """The best of as many random Archs, by the same scores and, where there are some, the same finals.

        Where the search trains, the best of as many as can be trained to the last rung in the epochs that the search,
        its rungs, and a supernet that was not relied on took.
        """
        searches = self.searches
        if searches.config.trains:
            brief = BriefTraining(self.models, searches, whole=True)
            loader = self.models.images.train_batches("random_search")
            per_epoch = (
                loader.steps_per_epoch * loader.batch_size * loader.world
            )  # what is left over is not learned
            num_trials = max(1, round(self.trained_spent().learned / per_epoch / brief.epochs))
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
        """The best of three plain ViTs per patch size, by a brief training (finals/hand_scaled-*.json)."""
        models, work = self.models, self.models.work
        like = self.searches.chosen().arch
        path = work.folder / "finals" / f"hand_scaled-{like.id}.json"
        if not work.engine.from_first(path.exists):  # clocks would not find the same three again
            clocks = {target: partial(measure_ms, meter) for target, meter in self.searches.meters.items()}
            archs: Sequence[Arch] = work.engine.from_first(
                lambda: three_shapes(like, self.searches.budget, clocks, patch_sizes(self.searches.space))
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
        """And what training the supernet, or one per fold, and holding it against trained Archs took; None where the
        first is not on record."""
        folder = self.models.work.folder
        if not TrainedSupernet.exists(folder):
            return None
        for trained in (folder, *sorted((folder / FOLDS).glob("*"))):
            spent += TrainedSupernet.read(trained).spent
        return spent + (Ranking.read(folder).spent if Ranking.exists(folder) else Spent())

    def trained_spent(self) -> Spent:
        """What a search that trains took, a supernet that was not relied on included."""
        folder = self.models.work.folder
        finals = Finals.read(folder)
        if not Ranking.exists(folder):
            return finals.spent
        ranked = {
            point.arch_id for point in Ranking.read(folder).points
        }  # their first rungs are counted there
        rungs = [rung for each in finals.finalists for rung in each.rungs[each.arch_id in ranked :]]
        spent = sum((rung.spent for rung in rungs), Spent())
        return self.with_supernet(spent) or spent


def train_models(models: Models, searches: Searches, inherited: Inherited) -> None:
    """Train `chosen` and the baselines into models/<role>/, then correlation.json. Skips what is there."""
    picks, rivals = Picks(models, searches, inherited), models.teacher.rivals()
    alike: dict[tuple[str, bool], tuple[str, Pick]] = {}  # who has which Arch, by how it starts
    for role in models.own_roles:
        pick = picks(role)
        inherits = models.config.start == "inherited" and pick.accuracy is not None
        first = None if role in rivals else alike.setdefault((pick.arch.id, inherits), (role, pick))
        if Result.exists(models.folder(role)):
            if Result.read(models.folder(role)).arch_id == pick.arch.id:
                continue
            models.work.progress.note(f"{role} is another Arch now, and is trained anew")
            models.forget(role)
        if first is not None and first[0] != role:
            models.copy(first[0], role, first[1].spent, pick.spent)
            continue
        stage = f"retrain/{role}"
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
    """How the supernet's scores order Archs that were trained briefly (correlation.json): those of before the search
    or, where there are none, those of the finals behind their first rung."""
    work = models.work
    if Correlation.exists(work.folder):
        return
    if Ranking.exists(work.folder):
        known = Ranking.read(work.folder)
        record = Correlation(**{item.name: getattr(known, item.name) for item in fields(Correlation)})
        work.once(Correlation.path(work.folder), lambda: record.write(work.folder))
        return
    points, how = list[RankedArch](), ""
    if searches.finals.archs and not searches.config.trains:
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
