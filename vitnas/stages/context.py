"""Context: a run opened for work. Each part is made once, when first asked for; stages are given parts of it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from vitnas.budget import Budget, split_target
from vitnas.data import Data
from vitnas.errors import UserError
from vitnas.measure.latency import LatencyMeter
from vitnas.space import SPACES, Space, SpaceConfig
from vitnas.stages.finals import Brief
from vitnas.stages.full import full_cost
from vitnas.stages.models import Models
from vitnas.stages.outlook import settled
from vitnas.stages.run import OWN, Run, check_shares, lasting, plain
from vitnas.stages.sampler import RunSampler
from vitnas.stages.searching import Inherited, Searches
from vitnas.stages.work import RunImages, Work, quick_meter
from vitnas.supernet import Supernet, make_sharing
from vitnas.train import Engine, Progress, Silent, TaskConfig, TeacherConfig


class Context:
    """A Run and its folder. `run` in the command line, and the table of stages, are what holds one.

    Args:
        data: images that are open already, where the run takes such.
    """

    def __init__(
        self, run: Run, folder: Path, progress: Progress | None = None, data: Data | None = None
    ) -> None:
        self.asked, self.folder, self.given = run, folder, data
        self.run = settled(run, folder)
        self._progress: Progress = progress or Silent()
        self.check_folder: Callable[[], None] = lambda: None  # raises where the folder has been removed
        check_counts(run)
        if run.threads is not None:
            torch.set_num_threads(run.threads)

    def settle(self) -> None:
        """Take up what `time` leaves of the run, once that is known; parts that hang on it are made anew."""
        self.run = settled(self.asked, self.folder)
        for part in ("searches", "models", "inherited"):
            vars(self).pop(part, None)

    @cached_property
    def engine(self) -> Engine:
        run = self.run
        return Engine(
            precision=run.supernet.precision,
            cpu=run.device == "cpu",
            trackers=run.trackers,
            folder=self.folder,
        )

    @cached_property
    def work(self) -> Work:
        """The first process tells; the others are silent."""
        progress = self._progress if self.engine.is_main else Silent()
        return Work(self.folder, self.engine, progress, self.run.seed)

    @cached_property
    def images(self) -> RunImages:
        return RunImages(self.run.data, self.work, self.run.pretrained)

    @property
    def data(self) -> Data:
        """The images' data, opened when first asked for."""
        return self.images.data

    @cached_property
    def space(self) -> Space:
        config = self.run.space.starting_from(self.run.pretrained)
        return make_space(config, self.data, self.run.task, self.teacher)

    @property
    def teacher(self) -> TeacherConfig:
        """Who teaches, by a name that leads to it."""
        given = self.run.teacher
        return replace(given, network=self.run.pretrained) if given.network == OWN else given

    @cached_property
    def budget(self) -> Budget:
        return self.resolved(Budget.parse(self.run.budget))

    def resolved(self, budget: Budget) -> Budget:
        """A Budget with shares as numbers, by what the Space's largest Arch costs; all processes ask.

        Raises:
            UserError: the Space stands around no network.
        """
        check_shares(budget, self.run.space)
        if not budget.has_shares:
            return budget
        timed = [limit.target for limit in budget.limits if limit.is_share and limit.target]
        return budget.resolved(full_cost(self.work, self.space.largest(), timed))

    @cached_property
    def meters(self) -> dict[str, LatencyMeter]:
        """One meter per latency target that the budget or the objectives name, quick enough for a search."""
        named = [target for _, target in map(split_target, self.run.search.named(self.budget)) if target]
        targets = dict.fromkeys((*self.budget.latency_targets, *named))
        return {target: quick_meter(target) for target in targets}

    def new_supernet(self) -> Supernet:
        sharing = make_sharing(
            self.space,
            self.run.sharing.coupling,
            private_tokens=self.run.sharing.private_tokens,
            private_heads=self.run.sharing.private_heads,
        )
        return Supernet(self.space, sharing=sharing, generator=self.work.generator("supernet"))

    @cached_property
    def inherited(self) -> Inherited:
        if self.run.search.trains:
            return Brief(self.models, self.searches)
        return Inherited(self.work, self.images, self.new_supernet, folds=self.run.search.folds)

    @cached_property
    def sampler(self) -> RunSampler:
        return RunSampler(self.work, self.run.sampler, self.space, self.images, self.budget)

    @cached_property
    def searches(self) -> Searches:
        fields = json.dumps(lasting(plain(self.run)), sort_keys=True)
        return Searches(
            self.work,
            self.run.search,
            self.space,
            self.budget,
            self.meters,
            lambda: self.run.search.folds * len(self.data.holdout),
            finals=self.run.finals,
            mark=hashlib.sha256(fields.encode()).hexdigest()[:12],
        )

    @cached_property
    def models(self) -> Models:
        return Models(
            self.work,
            self.images,
            self.run.task,
            self.teacher,
            self.run.retrain,
            cells=lambda: self.space.largest().grids[-1],
        )


PER_CORE, AT_LEAST = 8, 64  # threads or worker processes that a machine is still taken to have been meant for
# Open at most, at once: a run's own, and what a worker hands over and is led by.
FILES, FILES_OF_WORKER = 64, 16


def check_counts(run: Run) -> None:
    """Refuse far more threads or worker processes than this machine has cores, and more workers than the limit on open
    files lets work: met while they start it would end in tracebacks of theirs.

    Raises:
        UserError: one of them.
    """
    cores = os.cpu_count() or 1
    most = max(AT_LEAST, PER_CORE * cores)
    for name, count in (("threads", run.threads or 1), ("data.workers", run.data.workers)):
        if count > most:
            raise UserError(
                f"{name} is {count} on a machine of {cores} cores; more than {most} only wait for each other. Use "
                f"{cores}, or leave it out."
            )
    needs, limit = FILES + FILES_OF_WORKER * run.data.workers, most_files()
    if run.data.workers and needs > limit:
        raise UserError(
            f"data.workers is {run.data.workers} where this process may open {limit:.0f} files; so many need {needs}. "
            "Raise the limit (`ulimit -n 4096`) or lower data.workers."
        )


def most_files() -> float:
    """How many files this process may have open."""
    if sys.platform == "win32":
        return math.inf
    import resource  # there is none elsewhere

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return math.inf if limit == resource.RLIM_INFINITY else limit


def make_space(
    config: SpaceConfig, data: Data, task: TaskConfig | None = None, teacher: TeacherConfig | None = None
) -> Space:
    """The Space for these images, with the heads that the task and the teacher's losses learn by.

    Raises:
        UserError: the Space's Archs have no such head, or what the Space refuses.
    """
    heads = task.heads if task else ()
    known = SPACES[config.kind].space.__dataclass_fields__
    if task and task.needs_heads and not set(heads) <= set(known):
        able = [word for word, kind in SPACES.items() if set(heads) <= set(kind.space.__dataclass_fields__)]
        raise UserError(
            f"task.kind is {task.kind!r}; it needs Archs with a {' and a '.join(heads)}, which space.kind "
            f"{config.kind!r} has not. Use {', '.join(able)}, or task.kind 'classification'."
        )
    return config.build(
        image_size=data.image_size,
        in_chans=data.in_chans,
        num_classes=data.num_classes,
        **{head: True for head in (*heads, *(teacher.heads if teacher else ())) if head in known},
    )
