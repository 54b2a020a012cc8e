"""A run holds its supernet against a few trained Archs before it searches; without one that ranks it goes on alone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from stage_help import Warm, has_step, outcome, words

from vitnas.cli import main
from vitnas.cli.fields import make_run, open_run
from vitnas.errors import UserError
from vitnas.recipes import RECIPES
from vitnas.records import (
    Correlation,
    Finals,
    RankedArch,
    Ranking,
    Result,
    Results,
    Rung,
    Spent,
    TrainedSupernet,
)
from vitnas.reporting import report
from vitnas.reporting.files import read_run
from vitnas.reporting.html import _correlation
from vitnas.searching import SEARCHERS, Feasibility, Goal, SearchRecord, Study, kendall_interval, search
from vitnas.searching.feasibility import FeasibilityRow
from vitnas.searching.halving import GuidedHalving
from vitnas.space import autoformer
from vitnas.stages import Context, forecast
from vitnas.stages.finals import lengths
from vitnas.stages.outlook import distrusting, otherwise
from vitnas.stages.ranking import expressivity, judged, measure_ranking, of_equal_cost, rulers
from vitnas.stages.table import STAGES

SPACE = autoformer("micro", image_size=8, patch_size=2, num_classes=10)
DISTRUST = {
    "retrain__rank_archs": "5",
    "search__least_tau": "1",
    "retrain__baselines": "[random_search]",
    "export__formats": "[]",
    "export__latency": "[]",
}


def ranking(context: Context, scores: list[float], trained: list[float], n: int = 1000) -> Ranking:
    """Of planted accuracies."""
    points = [
        RankedArch(f"d8-l{i}", 100 + i, *pair) for i, pair in enumerate(zip(scores, trained, strict=True))
    ]
    rungs = [Rung(epochs=1, accuracy=each, n=n, spent=Spent(learned=10)) for each in trained]
    return judged(points, rungs, context.models, context.searches, "training")


def test_archs_of_equal_cost_are_within_the_budget_and_near_its_end(finished: Path) -> None:
    searches = Context(open_run(finished), finished).searches
    goal = Goal(searches.space, searches.budget)
    found = of_equal_cost(searches, 6)
    assert found == of_equal_cost(searches, 6), "a killed run goes on with the same"
    assert len(set(found)) == 6
    assert goal.meets(found).all()
    macs, every = (
        goal.costs(found)["macs"],
        goal.costs(searches.space.random_matrix(500, np.random.default_rng(0))),
    )
    assert macs.max() / macs.min() < 1.15
    assert every["macs"].max() / every["macs"].min() > 3
    assert macs.mean() > np.median(every["macs"][every["macs"] <= 200_000])


def test_of_a_latency_budget_archs_of_equal_cost_are_about_fast_enough(
    finished: Path, tmp_path: Path
) -> None:
    """By what the few that were timed before the run began tell."""
    run = replace(open_run(finished), budget="latency<=1ms@torch")
    searches = Context(run, tmp_path).searches
    goal = Goal(searches.space)
    every = goal.costs(of_equal_cost(searches, 6))["macs"]
    row = FeasibilityRow("latency on torch", "ms", 0.5, 2.0, "", 0.5, 6, macs_met=int(every.min() // 2))
    Feasibility((row,)).write(tmp_path)
    found = goal.costs(of_equal_cost(searches, 6))["macs"]
    assert row.macs_met is not None
    assert found.mean() <= row.macs_met
    assert found.max() < every.min()
    assert found.max() / found.min() < 1.3


def test_a_supernet_that_ranks_is_relied_on_and_one_that_does_not_is_not(finished: Path) -> None:
    context = Context(open_run(finished), finished)
    trained = [0.5, 0.6, 0.7, 0.71, 0.8, 0.9]
    good = ranking(context, [0.1, 0.2, 0.3, 0.4, 0.6, 0.5], trained)
    assert good.kendall_tau == pytest.approx(1 - 2 / 15)
    assert good.otherwise == ""
    assert (good.alike, good.told_apart) == (13, 14), "0.70 and 0.71 are alike on 1,000 images"
    assert good.spent == Spent(learned=60, looked=6 * 36)
    assert good.says == (
        "The supernet ranks Archs as training does: Kendall's tau 0.87 (95 % interval -0.23 to 0.99) of 6 Archs of "
        "about equal cost, where 0.6 is asked for; it orders 13 of 14 pairs alike that training tells apart; so the "
        "search relies on its scores."
    )
    bad = ranking(context, [0.5, 0.1, 0.3, 0.4, 0.2, 0.6], trained)
    assert bad.otherwise == "training"
    assert "does not rank Archs as training does: Kendall's tau 0.20" in bad.says
    assert bad.says.endswith("so the search trains Archs instead, and does not use its scores.")
    alike = ranking(context, [0.1] * 6, trained)
    assert alike.otherwise == "training"
    assert alike.says.startswith(
        "The supernet scores all 6 Archs of about equal cost alike; so the search trains"
    )
    assert ranking(context, trained, [0.5] * 6).otherwise == "", "there is nothing to order"
    close = ranking(context, [0.6, 0.5, 0.4, 0.3, 0.2, 0.1], [0.90, 0.902, 0.905, 0.91, 0.912, 0.915])
    assert (close.otherwise, close.told_apart) == ("", 0), "what training orders by chance says nothing of it"
    assert close.says == (
        "Whether the supernet ranks Archs of about equal cost is not known, as brief trainings tell 0 of 15 pairs "
        "apart on 1000 images; the search relies on its scores all the same."
    )
    few = ranking(context, [0.3, 0.2], [0.2, 0.3])
    assert few.otherwise == ""
    assert few.says.startswith("2 Archs of about equal cost are too few to tell")


def test_every_ruler_is_held_against_training(finished: Path) -> None:
    """Those without an order are left out; a new network that is wider says more of noise."""
    points = [
        RankedArch(
            f"d8-l{i}", 100, accuracy, 0.5 + 0.1 * i, 2 - 0.1 * i, params=4 - i, depth=1, expressivity=i // 2
        )
        for i, accuracy in enumerate((0.1, 0.3, 0.2, 0.4))
    ]
    assert rulers(points) == pytest.approx(
        {"loss": 1, "accuracy": 4 / 6, "params": -1, "expressivity": 4 / np.sqrt(24), "their mean": 1}
    )
    assert rulers([replace(point, trained_accuracy=0.5) for point in points]) == {}
    known = Ranking.read(finished)
    assert all(point.params and point.depth and point.expressivity for point in known.points)
    page = replace(read_run(finished), ranking=replace(known, rulers={"loss": 0.5, "depth": -1}))
    how = _correlation(page, {})["correlation_how"]
    assert how.endswith("holdout split. Kendall's tau of each ruler by itself: loss 0.50, depth -1.00.")
    assert expressivity(SPACE.smallest()) < expressivity(SPACE.largest()) <= 64


def test_the_ranking_is_of_what_the_search_goes_by(finished: Path) -> None:
    """Losses that order as training does, beside accuracies that are noise."""
    run = open_run(finished)
    trained = (0.5, 0.6, 0.7, 0.8, 0.9)
    points = [
        RankedArch(f"d8-l{i}", 100, accuracy, trained[i], 2 - 0.1 * i, standing=i)
        for i, accuracy in enumerate((0.4, 0.1, 0.3, 0.2, 0.25))
    ]
    rungs = [Rung(epochs=1, accuracy=each, n=1000, spent=Spent()) for each in trained]
    for score, tau, relies in (("loss", 1.0, True), ("accuracy", -0.2, False)):
        context = Context(replace(run, search=replace(run.search, score=score)), finished)  # type: ignore[arg-type]
        found = judged(points, rungs, context.models, context.searches, "training")
        assert found.kendall_tau == pytest.approx(tau)
        assert (found.otherwise == "") == relies
        assert f"and the supernet's {score}" in found.how
        assert context.run.search.named(context.budget)[0] == score
    assert distrusting(run).search.named(context.budget)[0] == "accuracy", "what is trained has its accuracy"
    assert SearchRecord.read(finished).objectives[0].name == "loss"


def test_an_interval_of_tau_is_honest() -> None:
    """Of random orders, whose true tau is 0, it holds 0 at least 19 times of 20; it has the ends of -1 and 1."""
    rng = np.random.default_rng(0)
    i, j = np.triu_indices(8, 1)
    taus = [np.sign(np.diff(rng.permutation(8)[[i, j]], axis=0)).mean() for _ in range(500)]
    held = [low <= 0 <= high for low, high in (kendall_interval(float(tau), 8) for tau in taus)]
    assert np.mean(held) >= 0.95
    for tau in (-1.0, 0.3, 1.0):
        low, high = kendall_interval(tau, 8)
        wide, narrow = kendall_interval(tau, 5), kendall_interval(tau, 100)
        assert -1 <= low <= tau <= high <= 1 + 1e-9
        assert wide[1] - wide[0] > high - low > narrow[1] - narrow[0]


def test_what_a_run_does_where_its_supernet_does_not_rank(finished: Path, tmp_path: Path) -> None:
    run = RECIPES["images"]()
    other = distrusting(run)
    assert (other.search.searcher, other.search.num_trials) == ("guided_halving", 12)
    first = lengths(other.finals, other.retrain.train, other.entrants)[0]
    assert first == run.retrain.rank_epochs, "what was trained to measure by is the first rung"
    inheriting = replace(run, retrain=replace(run.retrain, start="inherited"))
    assert otherwise(inheriting) == "finals"
    assert distrusting(inheriting).finals.archs == 8
    assert distrusting(inheriting).search == run.search
    shutil.copytree(finished, tmp_path / "run")
    found = Ranking.read(finished)
    context = Context(open_run(finished), tmp_path / "run")
    assert context.run == open_run(finished)
    replace(found, otherwise="training").write(tmp_path / "run")
    context.settle()
    assert context.run.search.searcher == "guided_halving"
    assert Context(open_run(finished), tmp_path / "run").run == context.run
    with pytest.raises(UserError, match=r"search.least_tau is 2; Kendall's tau is between -1 and 1"):
        make_run("tour", {"search.least_tau": "2"})


def test_an_older_search_is_not_thrown_away(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    Ranking.path(folder).unlink()
    context = Context(open_run(finished), folder)
    measure_ranking(context.models, context.searches, context.inherited, "training")
    assert Ranking.read(folder).says == (
        "The search is older than this measurement; the search relies on its scores all the same."
    )


def test_the_longer_way_is_foretold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "_step", lambda *_: 10.0)
    argv = words(
        tmp_path / "run", retrain__baselines="[]", retrain__rank_archs="6", retrain__train__epochs="8"
    )
    fields = dict(word.partition("=")[::2] for word in argv[3:])
    run, epoch_s = make_run("tour", fields), 6 * 10.0
    found = forecast.look_ahead(Context(run, tmp_path / "run"), Feasibility(()))
    # 12 Archs in rungs up to 1, 2 and 4 epochs, of which the first is the search.
    assert found.stages["search"] == 12 * epoch_s
    assert found.stages["finals"] == (6 + 3 * 2) * epoch_s
    assert found.stages["train"] > 6 * epoch_s
    surely = replace(run, search=replace(run.search, least_tau=-1))
    assert forecast.look_ahead(Context(surely, tmp_path / "run"), Feasibility(())).stages["finals"] == 0


def test_guided_halving_proposes_what_was_trained_then_what_the_predictor_thinks_best() -> None:
    """Scores are planted: the more blocks and the wider, the better."""
    goal, rng = Goal(SPACE), np.random.default_rng(0)
    given = [tuple(row) for row in SPACE.random_matrix(8, rng).tolist()]
    given = list(dict.fromkeys(SPACE.canonical(genes) for genes in given))
    study = Study.open(SPACE)
    searcher = GuidedHalving.sized(16, lambda: given)
    search(
        study, lambda arch: {"accuracy": arch.depth + arch.embed_dim / 1000}, searcher=searcher, num_trials=16
    )
    trials = study.scored()
    assert [trial.genes for trial in trials[: len(given)]] == given
    before = max(trial.values["accuracy"] for trial in trials[: len(given)])
    assert np.mean([t.values["accuracy"] >= before - 1 for t in trials[len(given) :]]) > 0.7
    assert SEARCHERS["guided_halving"] is GuidedHalving
    assert goal.meets([trial.genes for trial in trials]).all()


@pytest.mark.slow
def test_a_run_goes_on_without_its_supernet(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main(words(folder, **DISTRUST)) == 0
    known, finals, search_ = Ranking.read(folder), Finals.read(folder), SearchRecord.read(folder)
    assert known.otherwise == "training"
    assert search_.num_scored == len(finals.finalists) == 10
    assert {point.arch_id for point in known.points} == {trial.arch_id for trial in search_.trials[:5]}
    assert Correlation.read(folder).points == known.points
    rows = {row.role: row for row in Results.read(folder).rows}
    own, spent = 6 * 32, rows["chosen"].spent
    assert spent is not None
    # Ten first rungs, the supernet, later rungs of five and of three Archs, the last training; each counted once.
    later = 5 * own + 3 * 2 * own
    assert spent.learned == 10 * own + TrainedSupernet.read(folder).spent.learned + later + own
    assert rows["random_search"].spent is not None
    assert rows["random_search"].spent.learned == pytest.approx(spent.learned, rel=0.2)
    page = report(folder).read_text()
    assert "so the search trains Archs instead" in page
    assert "after a brief training each" in page
    assert "The finals chose" in page
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert main(words(folder, **DISTRUST)) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_measures_goes_on(warm: Warm, tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert main(words(whole, **DISTRUST)) == 0
    for ready in (
        has_step(folder, "finals/ranking/", 2),
        lambda: len([*folder.glob("finals/ranking/*/rung0.json")]) == 3,
        (folder / "ranking.json").exists,
        lambda: len([*folder.glob("finals/ranking/*/rung0.json")]) == 7,
    ):
        warm.kill_when(words(folder, **DISTRUST), ready)
    warm.run(words(folder, **DISTRUST))
    got, want = outcome(folder), outcome(whole)
    for name in ("weights", "trials", "chosen", "correlation"):
        assert got[name] == want[name], name
    assert Result.read(folder / "models" / "chosen").arch_id == Finals.read(whole).chosen


@pytest.mark.slow
def test_where_weights_are_inherited_finals_choose(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fields = {**DISTRUST, "retrain__start": "inherited", "retrain__baselines": "[]", "finals__epochs": "1"}
    assert main(words(folder, **fields)) == 0
    assert Ranking.read(folder).otherwise == "finals"
    assert "inherited weights" in Ranking.read(folder).how
    assert Finals.read(folder).start == "inherited"
    assert Result.read(folder / "models" / "chosen").start == "inherited"
    assert STAGES["finals"].makes(Context(open_run(folder), folder).run) == (Finals.FILE,)


def test_the_expressivity_of_a_network_one_wide() -> None:
    narrow = autoformer("micro", image_size=8, patch_size=2, embed_dims=(1, 24)).smallest()
    assert narrow.stages[0].embed_dim == 1
    assert expressivity(narrow) == pytest.approx(1)
    assert expressivity(SPACE.smallest()) > 1
