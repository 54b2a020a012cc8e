"""Finals: Archs of a shortlist are trained in rungs, and the best of what was trained is chosen."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stage_help import Warm, has_step, outcome, words
from torch import nn

from vitnas.arch import Arch
from vitnas.budget import Budget, Cost
from vitnas.cli import main
from vitnas.cli.fields import open_run
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.model import build
from vitnas.model.named import Chosen
from vitnas.records import Correlation, Finalist, Finals, Ranking, Result, Rung, Spent
from vitnas.searching import Goal, Objective, SearchRecord
from vitnas.space import autoformer
from vitnas.stages import Context, finals
from vitnas.stages.compare import rank_archs
from vitnas.stages.finals import Entrant, cheapest_first, epochs_in_all, hold, lengths
from vitnas.stages.run import FinalsConfig
from vitnas.stages.table import STAGES, go_on
from vitnas.train import Score, TrainConfig

SPACE = autoformer("micro", image_size=8, patch_size=2, num_classes=10)


def with_finals(finished: Path, folder: Path, archs: int = 4) -> Context:
    """A finished run as if it had finals, before them."""
    shutil.copytree(finished, folder)
    run = replace(open_run(folder), finals=FinalsConfig(archs=archs, epochs=1))
    return Context(run, folder)


def test_rungs_double_up_to_the_last() -> None:
    train = TrainConfig(epochs=40)
    assert lengths(FinalsConfig(epochs=4), train, 8) == (1, 2, 4)
    assert lengths(FinalsConfig(), train, 4) == (4, 8)
    assert [len(lengths(FinalsConfig(), train, n)) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 1, 2, 2, 3, 3, 3]
    with pytest.raises(UserError, match=r"finals.archs is 1; it takes two Archs at least"):
        FinalsConfig(archs=1)
    with pytest.raises(UserError, match=r"finals.epochs is 0; it must be above 0"):
        FinalsConfig(epochs=0)


def test_the_worse_half_leaves_behind_each_rung(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By planted accuracies: one is ahead in the first rung and behind in the next."""
    context = with_finals(finished, tmp_path / "run")
    archs = [SPACE.arch_of(genes) for genes in SPACE.random_matrix(6, np.random.default_rng(0))]
    planted = {arch.id: score for arch, score in zip(archs, (0.5, 0.9, 0.6, 0.8, 0.7, 0.4), strict=True)}
    trained: list[tuple[str, float]] = []

    def train(self: object, model: nn.Module, config: TrainConfig, stage: str) -> tuple[nn.Module, Spent]:
        trained.append((stage.split("/")[2], config.epochs))
        return model, Spent(learned=10, seconds=1.0)

    def judge(model: nn.Module, images: object) -> Score:
        arch: Arch = model.arch  # type: ignore[assignment]
        late = sum(name == arch.id for name, _ in trained) > 1
        accuracy = 0.1 if late and planted[arch.id] == 0.9 else planted[arch.id]
        return Score(accuracy=accuracy, top5=1, loss=0, n=20)

    monkeypatch.setattr(finals, "evaluate", judge)
    monkeypatch.setattr("vitnas.stages.models.Models.train", train)
    config = FinalsConfig(archs=6, epochs=4)
    entrants = [Entrant(arch, count(arch)) for arch in archs]
    found = hold(context.models, config, entrants, "search", "scratch", build)
    went = {each.arch_id: [rung.accuracy for rung in each.rungs] for each in found.finalists}
    assert [went[arch.id] for arch in archs] == [
        [0.5], [0.9, 0.1], [0.6], [0.8, 0.8, 0.8], [0.7, 0.7, 0.7], [0.4]
    ]  # fmt: skip
    assert found.chosen == archs[3].id
    assert [each.arch_id for each in found.finalists[:3]] == [archs[3].id, archs[4].id, archs[1].id]
    assert [epochs for name, epochs in trained if name == archs[3].id] == [1, 1, 2]
    whole = context.models.config.train
    assert sum(epochs for _, epochs in trained) == epochs_in_all(config, whole, len(entrants))
    assert found.spent == Spent(learned=110, looked=220, seconds=11.0)
    before = len(trained)
    assert hold(context.models, config, entrants, "search", "scratch", build) == found
    assert len(trained) == before, "what was trained is not trained again"


def finals_of(*told: tuple[int, float, int]) -> Finals:
    """Finals of Archs of so many MACs, by their accuracy behind the last of so many rungs, of 400 images."""
    return Finals(
        start="scratch",
        finalists=tuple(
            Finalist(
                f"arch{macs}",
                Cost(macs, 1, 1),
                None,
                (Rung(epochs=1, accuracy=accuracy, n=400, spent=Spent()),) * rungs,
            )
            for macs, accuracy, rungs in told
        ),
    )


def test_finals_take_the_cheapest_of_equals_where_the_run_prefers_it() -> None:
    """The standard error of 80 % of 400 is 2 points."""
    goal = Goal(SPACE)
    found = finals_of((30, 0.80, 2), (20, 0.79, 2), (10, 0.77, 2), (5, 0.80, 1))
    cheap = cheapest_first(found, goal)
    assert [each.arch_id for each in cheap.finalists] == ["arch20", "arch30", "arch10", "arch5"]
    assert "chose arch20 of 4 Archs: 79.0% of 400 held-out images" in cheap.says
    assert cheap.says.endswith(
        "1.0 points behind the best that came as far, which costs more and is not surely better."
    )
    assert "1.0 points ahead of the next" in found.says
    assert cheapest_first(finals_of((30, 0.80, 2), (20, 0.77, 2)), goal).chosen == "arch30"
    assert "level with the next" in finals_of((20, 0.80, 2), (30, 0.80, 2)).says
    slow = replace(found.finalists[1], cost=replace(found.finalists[1].cost, latency_ms={"torch": 9.0}))
    fast = replace(found.finalists[0], cost=replace(found.finalists[0].cost, latency_ms={"torch": 2.0}))
    by_time = Goal(SPACE, Budget.parse("latency<=9ms@torch"), (Objective("accuracy"),))
    assert cheapest_first(replace(found, finalists=(fast, slow)), by_time).chosen == "arch30"


def test_finals_of_a_run_prefer_what_the_run_prefers(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = with_finals(finished, tmp_path / "run")
    monkeypatch.setattr(finals, "hold", lambda *_, **__: finals_of((30, 0.80, 2), (20, 0.79, 2)))
    for prefer, chosen in (("accuracy", "arch30"), ("cost", "arch20")):
        config = replace(context.searches.config, prefer=prefer)
        searches = replace(context.searches, config=config)
        with searches.open() as study:
            assert finals.finalists(context.models, searches, context.inherited, study).chosen == chosen


@pytest.mark.slow
def test_a_run_chooses_by_what_was_trained(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = with_finals(finished, tmp_path / "run", archs=3)
    folder, search = context.folder, SearchRecord.read(finished)
    with pytest.raises(UserError, match=r"finals.json does not exist; `vitnas finals` writes it"):
        context.searches.chosen()
    STAGES["finals"](context)
    found = Finals.read(folder)
    assert len(found.finalists) == 3
    assert {each.arch_id for each in found.finalists} <= {trial.arch_id for trial in search.trials}
    assert [len(each.rungs) for each in found.finalists] == [2, 2, 1]
    assert [rung.epochs for rung in found.finalists[0].rungs] == [0.5, 1]
    assert found.finalists[0].rungs[-1].accuracy >= found.finalists[1].rungs[-1].accuracy
    assert context.searches.chosen().arch.id == Chosen.read(folder).arch.id == found.chosen
    assert (folder / "front" / found.chosen).is_dir()
    assert found.spent.learned > 0
    Correlation.path(folder).unlink()
    Ranking.path(folder).unlink()
    models = replace(context.models, config=replace(context.models.config, rank_archs=0))
    rank_archs(models, context.searches)
    known = Correlation.read(folder)
    assert {point.arch_id for point in known.points} == {each.arch_id for each in found.finalists}
    assert known.how.startswith("the 3 Archs of the finals")
    # What is done stays: without the record alone, nothing is trained.
    before = {path: path.stat().st_mtime_ns for path in (folder / "finals").rglob("*") if path.is_file()}
    Finals.path(folder).unlink()
    monkeypatch.setattr("vitnas.stages.models.Models.train", None)
    STAGES["finals"](Context(context.run, folder))
    assert Finals.read(folder) == found
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_longer_search_has_its_finals_again(finished: Path, tmp_path: Path) -> None:
    context = with_finals(finished, tmp_path / "run")
    Finals.of_one("d8-l1", Cost(1, 1, 1)).write(context.folder)
    go_on(context.run, context.folder, "search")
    assert not Finals.exists(context.folder)


@pytest.mark.slow
def test_finals_that_are_killed_go_on(warm: Warm, tmp_path: Path) -> None:
    """In the first rung, between rungs and in the last; as one that was not killed, bit for bit."""
    fields = {"finals__archs": "4", "finals__epochs": "2"}
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert main(words(whole, **fields)) == 0
    steps = [f"finals/search/{each.arch_id}" for each in Finals.read(whole).finalists]
    for ready in (
        has_step(folder, "finals/", 2),
        lambda: len([*folder.glob("finals/search/*/rung0.json")]) == 3,
        has_step(folder, f"{steps[0]}/1", 2),
        (folder / "finals.json").exists,
    ):
        warm.kill_when(words(folder, **fields), ready)
    warm.run(words(folder, **fields))
    got, want = outcome(folder), outcome(whole)
    for name, value in want.items():
        assert got[name] == value, name
    assert Result.read(folder / "models" / "chosen").arch_id == Finals.read(folder).chosen
