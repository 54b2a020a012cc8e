"""prepare: open everything that can be wrong, say what can be met, write down where and how the run is made."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vitnas.measure.environment import environment, git_commit
from vitnas.runs import read_json, write_json
from vitnas.searching import feasibility
from vitnas.stages.context import Context
from vitnas.stages.sampler import SETTLED, check_sampler, settle_sampler
from vitnas.stages.searching import open_study
from vitnas.stages.tasks import make_task
from vitnas.train.optim import make_optimizer, make_schedule
from vitnas.train.teacher import Pixels


def prepare(context: Context) -> list[dict[str, Any]]:
    """Check the data, the Space and the Budget before any expensive work; write manifest, space and feasibility.

    Returns:
        The rows of feasibility.json; a run that was prepared before is not prepared again.

    Raises:
        UserError: whatever is wrong, in one sentence; an impossible budget comes with the feasible range.
    """
    run, folder = context.run, context.folder
    written = folder / "feasibility.json"
    made = (
        "run.yaml",
        "manifest.json",
        "space.json",
        written.name,
        *([] if run.sampler.is_settled else [SETTLED]),
    )
    if all((folder / name).exists() for name in made):
        known: list[dict[str, Any]] = read_json(written)
        return known
    space, budget = context.space, context.budget
    for config in (run.supernet, run.retrain.train):  # what is unknown shows now, not in an hour
        make_schedule(make_optimizer(context.new_supernet(), config), config, 100, 10)
    task, teacher = make_task(
        run,
        augment=context.augment,
        num_classes=context.data.num_classes,
        grid=space.largest().grids[-1],
    )
    if teacher is not None:
        teacher.check(task.wants_taught, Pixels(context.data.mean, context.data.std))
    if run.search.storage is not None:
        with open_study(context, "search"):
            pass
    # One process, so that clocks are not disturbed by the others'.
    rows: list[dict[str, Any]] = context.engine.from_first(
        lambda: feasibility(space, budget, seed=run.seed, latency_meter=context.meters or None).to_json()
    )
    settle_sampler(context)
    check_sampler(context)

    def write() -> None:
        write_json(
            folder / "space.json",
            {
                **space.to_json(),
                "name": space.name,
                "genes": [{"name": gene.name, "options": list(gene.options)} for gene in space.genes],
                "size": float(space.size()),
            },
        )
        write_json(written, rows)
        if not (folder / "manifest.json").exists():
            write_json(folder / "manifest.json", manifest(context))

    context.engine.from_first(write)
    return rows


def manifest(context: Context) -> dict[str, object]:
    """What a number needs beside it: versions, host, seed, data, command."""
    return {
        **environment(),
        "seed": context.run.seed,
        "data": context.data.fingerprint(),
        "git": git_commit(Path.cwd()),
        "command": " ".join(["vitnas", *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": context.engine.world,
        "device": str(context.engine.device),
    }
