"""search: score Archs with the supernet's weights within the budget; save every member of the front."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean

from optuna.exceptions import StorageInternalError
from torch import Tensor

from vitnas.arch import Arch
from vitnas.budget import DEFAULT_LATENCY_TARGET, Budget
from vitnas.data import EvalBatches, require_not_test
from vitnas.errors import UserError
from vitnas.exporting import save_timm
from vitnas.extraction import extract
from vitnas.measure.latency import LatencyMeter
from vitnas.model import Model
from vitnas.model.named import ArchFile, Chosen
from vitnas.records import Finals, Spent
from vitnas.reporting.tables import share
from vitnas.runs import writing
from vitnas.searching import (
    SEARCHERS,
    Evaluator,
    Objective,
    SearchRecord,
    Study,
    TokenClock,
    TokenSpeed,
    TokenSpeeds,
    Trial,
    search,
    withdraw_slower,
)
from vitnas.searching.choosing import cannot_order, choose
from vitnas.searching.halving import GuidedHalving
from vitnas.searching.passwords import reason, shown
from vitnas.space import Genes, Space
from vitnas.stages.lock import one_at_a_time
from vitnas.stages.run import FinalsConfig, SearchConfig
from vitnas.stages.work import RunImages, Work, load_weights, quick_meter
from vitnas.supernet import Supernet
from vitnas.train import Score, evaluate


class SupernetEvaluator:
    """Scores an Arch on held-out train images with inherited weights. The test split is refused.

    Args:
        batches: `EvalBatches`, or any re-iterable of (images, targets), such as a DataLoader of images that are held
            out.
    """

    def __init__(self, supernet: Supernet, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        if isinstance(batches, EvalBatches):
            require_not_test(batches.images, "search")
        self.supernet, self.batches = supernet, batches
        self.split = batches.images.split if isinstance(batches, EvalBatches) else "holdout"

    def score(self, arch: Arch) -> Score:
        """All that was found."""
        return evaluate(self.supernet, self.batches, arch)

    def __call__(self, arch: Arch) -> Mapping[str, float]:
        return self.score(arch).values


class FoldsEvaluator:
    """Scores an Arch on the holdouts of several Supernets, none of which has seen its own: the mean over all images."""

    def __init__(self, folds: Sequence[SupernetEvaluator]) -> None:
        self.folds, self.split = folds, folds[0].split

    def __call__(self, arch: Arch) -> Mapping[str, float]:
        scores = [fold.score(arch) for fold in self.folds]
        counts, found = [score.n for score in scores], [score.values for score in scores]
        means = {name: fmean((values[name] for values in found), counts) for name in found[0]}
        if "error" in means:  # of the mean of so many more images
            means["error"] /= math.sqrt(len(scores))
        return means


WEIGHTS = "supernet.safetensors"
FOLDS = "folds"  # a folder of folders, for each supernet but the first
RANKING = "ranking"  # of Archs by which the supernet was measured: a search that trains goes on from them


def fold_folder(folder: Path, number: int) -> Path:
    """Where the supernet of a fold lies; the first is the run's own."""
    return folder / FOLDS / str(number) if number else folder


class Inherited:
    """The trained supernet of a run, read when it is first used, and the Archs with its weights (front/<arch id>/).

    Args:
        folds: Supernets that score an Arch together; only the first gives weights.
    """

    def __init__(
        self, work: Work, images: RunImages, make: Callable[[], Supernet], *, folds: int = 1
    ) -> None:
        self.work, self.images, self._make, self.folds = work, images, make, folds

    @cached_property
    def supernet(self) -> Supernet:
        return self._trained(0)

    def _trained(self, fold: int) -> Supernet:
        supernet = self._make()
        load_weights(supernet, fold_folder(self.work.folder, fold) / WEIGHTS, "vitnas train")
        return supernet.to(self.work.engine.device).eval()

    @cached_property
    def evaluator(self) -> SupernetEvaluator | FoldsEvaluator:
        own = SupernetEvaluator(self.supernet, self.images.holdout)
        if self.folds == 1:
            return own
        others = (
            SupernetEvaluator(self._trained(fold), self.images.fold(fold).holdout)
            for fold in range(1, self.folds)
        )
        return FoldsEvaluator((own, *others))

    def model(self, arch: Arch) -> Model:
        """With inherited weights."""
        return extract(self.supernet, arch)

    def save(self, arch: Arch) -> Path:
        """Inherited weights, config and Arch; returns their folder."""
        folder = self.work.folder / "front" / arch.id
        if not ArchFile.exists(folder):
            with writing(folder):
                save_timm(self.model(arch), folder, **self.images.about)
            ArchFile(arch).write(folder)
        return folder


@dataclass(frozen=True)
class Searches:
    """The searches of a run: what they are asked, and where their Studies are kept.

    Args:
        num_images: held-out images that a score is of.
        mark: of the run, for a storage that runs may share: another supernet's scores are not comparable.
        finals: the Arch is chosen there, where there are some.
    """

    work: Work
    config: SearchConfig
    space: Space
    budget: Budget
    meters: Mapping[str, LatencyMeter]
    num_images: Callable[[], int]
    mark: str
    finals: FinalsConfig

    @property
    def group(self) -> str:
        """Where brief trainings of this search lie in finals/, beside others of the same Archs."""
        return RANKING if self.config.searcher == GuidedHalving.word else "search"

    @property
    def has_finals(self) -> bool:
        """The Arch is chosen by training a few."""
        return bool(self.finals.archs) or self.config.trains

    def name_of(self, study: str) -> str:
        """A Study's name in the storage: its own in the run's own file."""
        return study if self.config.storage is None else f"{study}-{self.mark}"

    @contextmanager
    def open(self, name: str = "search") -> Iterator[Study]:
        """The Study of that name.

        Raises:
            UserError: the storage cannot be read or written, now or while the Study is open.
        """
        storage = self.config.storage or self.work.folder / "study.db"
        try:
            with Study.open(
                self.space,
                self.budget,
                storage=storage,
                name=self.name_of(name),
                objectives=[
                    Objective(each, "maximize" if each == "accuracy" else "minimize")
                    for each in self.config.named(self.budget)
                ],
                seed=self.work.seed,
            ) as study:
                yield study
        except StorageInternalError as error:
            if self.config.storage is not None:
                raise UserError(
                    f"search.storage {shown(storage)} cannot be used ({reason(error)}); the database must take what a "
                    "search writes. Mend that, and run the same command again."
                ) from None  # its cause may hold the password
            raise UserError(
                f"{storage} cannot be used ({reason(error)}); it must be a whole study on a disk with free space. Mend "
                "that, or delete it and search.json to search anew, and run the same command again."
            ) from error

    @contextmanager
    def run(
        self,
        name: str,
        searcher: str,
        evaluator: Evaluator,
        answers: Callable[[], list[Genes]] | None = None,
        num_trials: int | None = None,
    ) -> Iterator[Study]:
        """Continue a Study until it has the run's number of scored Archs, and give it, still open.

        Several processes may do so together; all of them are done when this yields.

        Args:
            answers: of a learned sampler, for a Searcher that asks one.
            num_trials: in place of the run's.
        """
        wanted = num_trials or self.config.num_trials

        def report(study: Study, trial: Trial) -> None:
            trials = study.trials()
            scored = [t.values for t in trials if t.state == "scored"]
            text = f"{sum(t.state == 'rejected' for t in trials)} rejected"
            if scored:
                best = max(scored, key=lambda values: values["accuracy"])
                text = f"best {share(best['accuracy'], best.get('error'))}, {text}"
            self.work.progress.update(name.replace("_", " "), len(scored), wanted, text)
            self.work.engine.heed()

        with self.open(name) as study:
            with self.work.engine.together():
                search(
                    study,
                    evaluator,
                    searcher=SEARCHERS[searcher].sized(wanted, answers),
                    num_trials=wanted,
                    latency_meter=self.meters,
                    on_trial=report,
                )
            yield study

    def withdraw_slower(self, study: Study, pick: Callable[[], Sequence[Trial]]) -> list[TokenSpeed]:
        """Withdraw what `pick` gives and keeps fewer tokens without being faster, on the targets of the run or, where
        it names none, on a budget's default.

        Raises:
            UserError: nothing is left.
        """
        meters = self.meters or {DEFAULT_LATENCY_TARGET: quick_meter(DEFAULT_LATENCY_TARGET)}
        clock = TokenClock(meters)
        withdraw_slower(study, pick, clock)
        if not study.scored():
            raise UserError(
                f"none of the Archs that keep fewer tokens is faster than with all on {', '.join(meters)}, and nothing "
                "else was scored. Give space.keep a 1.0, or choose another selector, batch or lower shares."
            )
        return clock.speeds

    def met(self, study: Study, budget: Budget | None = None) -> list[Trial]:
        """The scored Trials of a Study within `budget`, by default the run's own.

        Raises:
            UserError: there is none.
        """
        study.best(budget)  # says so
        return [trial for trial in study.scored() if not (budget or self.budget).misses(trial.cost)]

    def answer(self, study: Study, budget: Budget | None = None) -> Trial:
        """The Trial to take, as search.prefer has it (see `vitnas.searching.choosing`)."""
        return choose(self.met(study, budget), study.goal, self.num_images(), self.config.prefer)

    def best(self, study: Study, budget: Budget | None = None) -> Trial:
        """The answer of a Study, not one that keeps fewer tokens without being faster. One process times."""

        def number() -> int:
            self.withdraw_slower(study, lambda: [self.answer(study, budget)])
            return self.answer(study, budget).number

        best = self.work.engine.from_first(number)
        return next(trial for trial in study.trials() if trial.number == best)

    def tell(self, best: Trial, *, kind: str, recipe: str) -> None:
        """chosen.json: the answer, for people; `kind` is the Space's, `recipe` the run's."""
        Chosen.of(
            best.arch,
            kind,
            macs=best.cost.macs,
            params=best.cost.params,
            supernet_accuracy=best.values["accuracy"],
            budget=self.budget.text,
            recipe=recipe,
        ).write(self.work.folder)

    def spent(self, study: Study) -> Spent:
        """What scoring the Archs of a Study took."""
        return Spent(looked=len(study.scored()) * self.num_images(), seconds=study.seconds())

    def chosen(self) -> Trial:
        """The Trial that the finals chose or, without any, search.json.

        Raises:
            UserError: the study does not hold it, or one of the files cannot be read.
        """
        chosen = SearchRecord.read(self.work.folder).chosen
        if self.has_finals:
            chosen = Finals.read(self.work.folder).chosen
        with self.open() as study:
            for trial in study.scored():
                if trial.arch.id == chosen:
                    return trial
        raise UserError(
            f"{SearchRecord.path(self.work.folder)} chose Arch {chosen}, which the study does not hold; they must be "
            f"of one search. Delete {SearchRecord.FILE} and run `vitnas search` again."
        )


def search_archs(
    searches: Searches,
    inherited: Inherited,
    answers: Callable[[], list[Genes]],
    *,
    kind: str,
    recipe: str,
) -> None:
    """The search of a run: study.db, search.json, chosen.json and front/<arch id>/ for every member of the front.

    Args:
        answers: of a learned sampler, for a Searcher that asks one.
        kind, recipe: of the Space and the run, for people.
    """
    work, config = searches.work, searches.config
    with searches.run("search", config.searcher, inherited.evaluator, answers) as study:
        if not study.scored():
            raise UserError(
                f"the search scored no Arch: {study.num_rejected()} missed {searches.budget.text!r}. Widen the budget."
            )

        def write() -> None:
            with one_at_a_time(work.folder):
                if SearchRecord.exists(work.folder) and Chosen.exists(work.folder):
                    return  # another worker of this search was done first
                speeds = searches.withdraw_slower(study, lambda: [*study.front(), searches.answer(study)])
                if speeds:
                    TokenSpeeds(tuple(speeds)).write(work.folder)
                best = searches.answer(study)
                for trial in (*study.front(), best):
                    inherited.save(trial.arch)
                searches.tell(best, kind=kind, recipe=recipe)
                found = replace(study.summary(), chosen=best.arch.id, num_images=searches.num_images())
                found.write(work.folder)

        work.engine.from_first(write)
    found = SearchRecord.read(work.folder)
    work.progress.done("search", cannot_order(found, finals=searches.has_finals))
