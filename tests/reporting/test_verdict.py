"""The verdict: the chosen model against the baselines on the same images, and what each took."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vitnas.budget import Cost
from vitnas.records import (
    Finalist,
    Finals,
    FinalScores,
    Ranking,
    Result,
    Results,
    Rung,
    Spent,
    TrainedSupernet,
    Versus,
)
from vitnas.reporting.files import read_run
from vitnas.reporting.headline import why
from vitnas.reporting.tables import comparison, finals
from vitnas.reporting.verdict import missed, sentence, took
from vitnas.stages.results import versus
from vitnas.train import Score
from vitnas.train.evaluate import evaluate_each, paired


def test_the_interval_of_a_difference_covers_it() -> None:
    """By hand for 13 and 5 of 102, and by simulation at least as often as it says."""
    half = 1.959964 * ((18 / 102 - (8 / 102) ** 2) / 102) ** 0.5
    assert paired(12, 4, 100) == (pytest.approx(8 / 102 - half), pytest.approx(8 / 102 + half))
    assert paired(0, 0, 50)[0] < 0 < paired(0, 0, 50)[1]
    rng, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        first, second, _ = rng.multinomial(360, (0.045, 0.015, 0.94))
        low, high = paired(int(first), int(second), 360)
        covered += low <= 0.03 <= high
    assert 0.94 < covered / 2000 < 0.98
    with pytest.raises(ValueError, match="only_first is 3 and only_second 8 of n = 10"):
        paired(3, 8, 10)


def scores(**right: list[bool]) -> FinalScores:
    return FinalScores.of(
        {
            role: (Score(accuracy=float(np.mean(each)), top5=1, loss=0, n=len(each)), torch.tensor(each))
            for role, each in right.items()
        }
    )


def test_which_images_are_right_is_kept_image_by_image(tmp_path: Path) -> None:
    chosen, other = [True] * 9 + [False, True], [False] * 3 + [True] * 7 + [False]
    scores(chosen=chosen, other=other).write(tmp_path)
    read = FinalScores.read(tmp_path)
    assert read.is_right("chosen").tolist() == chosen
    found = versus(read, "other")
    assert (found.only_chosen, found.only_other, found.n) == (4, 1, 11)
    assert found.difference == pytest.approx(3 / 11)
    assert found.ci95 == paired(4, 1, 11)


def test_of_images_with_several_classes_the_likeliest_is_compared(tmp_path: Path) -> None:
    """Two networks that say the same of every image; the first image has two classes."""
    has_NY = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 1, 0]], dtype=torch.bool)

    class Says(nn.Module):
        def __init__(self, logits: list[float]) -> None:
            super().__init__()
            self.logits_Y = nn.Parameter(torch.tensor(logits))

        def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            return self.logits_Y.expand(len(images_BCHW), 3)

    found = {
        role: evaluate_each(Says(logits), [(torch.zeros(3, 1, 2, 2), has_NY)])
        for role, logits in (("chosen", [0.0, 2.0, 1.0]), ("hand_scaled", [0.0, 1.0, 2.0]))
    }
    assert found["chosen"][1].tolist() == [True, False, True]
    FinalScores.of(found, several=True).write(tmp_path)
    known = versus(FinalScores.read(tmp_path), "hand_scaled")
    assert (known.only_chosen, known.only_other, known.n, known.several) == (2, 1, 3, True)
    told = sentence(Results((), "x", {}, (known,)))
    assert "(points are of images whose likeliest class is one of theirs; 95 % intervals of images;" in told


@pytest.mark.parametrize(
    ("only_chosen", "only_other", "said"),
    [
        (20, 5, "3.8 points better than the hand-scaled ViT (1.2 to 6.2)"),
        (5, 20, "3.8 points worse than the hand-scaled ViT (1.2 to 6.2)"),
        (8, 6, "the same within the noise as the hand-scaled ViT (+0.5 points, -1.5 to +2.4)"),
    ],
)
def test_one_sentence_says_better_the_same_or_worse(only_chosen: int, only_other: int, said: str) -> None:
    n = 400
    each = Versus(
        role="hand_scaled",
        difference=(only_chosen - only_other) / n,
        ci95=paired(only_chosen, only_other, n),
        n=n,
        only_chosen=only_chosen,
        only_other=only_other,
    )
    told = sentence(Results((), "x", {}, (each,)))
    assert said in told
    assert told.startswith("On the same 400 test images")
    assert " and the same within the noise as random search" in sentence(
        Results((), "x", {}, (each, replace(each, role="random_search", difference=0.0, ci95=(-0.1, 0.1))))
    )
    assert sentence(Results((), "x", {})) == ""


def test_a_run_says_what_it_was_worth_and_what_it_took(finished: Path) -> None:
    results, read = Results.read(finished), FinalScores.read(finished)
    assert [each.role for each in results.verdict] == ["hand_scaled", "random_search"]
    rows = {row.role: row for row in results.rows}
    for each in results.verdict:
        mine, other = rows["chosen"].test_accuracy, rows[each.role].test_accuracy
        assert each.difference == pytest.approx(mine - other)
        assert read.is_right(each.role).mean() == pytest.approx(other)
    page = (finished / "report.html").read_text()
    assert sentence(results)[:60] in page
    table = comparison(read_run(finished))
    took_s = table.headers.index("Took")
    assert all(row[took_s].endswith(" s") for row in table.rows)
    assert "hand-scaled ViT" in took(rows)


def test_what_is_over_the_budget_in_the_end_is_told(finished: Path) -> None:
    """A network that a search timed as fast enough may be slower beside others."""
    run = read_run(finished)
    assert missed(run) == ""
    assert run.search is not None
    tight = replace(run, search=replace(run.search, budget="latency<=1us@onnxruntime and macs<=1K"))
    assert run.latency is not None
    for trusted, how in ((True, "at the end"), (False, "at the end on a busy machine")):
        rows = tuple(replace(row, latency=replace(row.latency, trusted=trusted)) for row in run.latency.rows)
        told = missed(replace(tight, latency=replace(run.latency, rows=rows)))
        assert told.startswith(f"Over the budget, as measured {how}: chosen (macs are ")
        assert told.count("latency on onnxruntime is ") == len(run.models) > 1
        assert "the budget allows at most" in told


def test_why_an_arch_off_the_front_was_chosen(finished: Path) -> None:
    """By the finals where there were some, whatever the search would have taken."""
    run = read_run(finished)
    assert run.search is not None
    off = replace(run, search=replace(run.search, front=(), chosen=run.chosen_id))
    assert "scores of few images are drawn to" in why(off)
    held = Finals.of_one(run.chosen_id, Cost(1, 1, 1))
    assert "the finals chose it, though by scores it is not on" in why(replace(off, finals=held))


def test_finals_tell_what_there_is_to_tell() -> None:
    """Of Archs that were only trained no inherited score, of a latency budget what each takes."""
    rung = Rung(epochs=2, accuracy=0.5, n=100, spent=Spent())
    plain = Finals(start="scratch", finalists=(Finalist("a", Cost(1_000_000, 1, 1), None, (rung,)),))
    assert finals(plain).headers == ("Arch", "MACs", "2 epochs", "95 % CI of the last")
    cost = Cost(1_000_000, 1, 1, {"torch,batch=1": 2.5})
    full = finals(replace(plain, finalists=(Finalist("a", cost, 0.25, (rung,)),)))
    assert full.headers[1:4] == ("MACs", "ms, torch,batch=1", "Inherited accuracy")
    assert full.rows[0][1:5] == ("1.00M", "2.50", "25.0 %", "50.0 %")
    assert {len(row) for row in full.rows} == {len(full.headers)}


def test_the_cost_of_a_way_is_all_that_it_took(finished: Path) -> None:
    """Images of the tiny run: 204 of train in batches of 32, 36 held out."""
    supernet = TrainedSupernet.read(finished).spent
    chosen, hand, random = (
        Result.read(finished / "models" / role).spent for role in ("chosen", "hand_scaled", "random_search")
    )
    assert chosen is not None
    assert hand is not None
    assert random is not None
    own = 6 * 32  # of one epoch
    assert supernet.learned == 12 * 32
    ranking = Ranking.read(finished).spent  # of two Archs
    assert (ranking.learned, ranking.looked) == (2 * own, 4 * 36)
    assert chosen.learned == random.learned == supernet.learned + ranking.learned + own
    assert chosen.looked == random.looked == 6 * 36 + 36 + ranking.looked
    (record,) = finished.glob("finals/hand_scaled-*.json")
    tried = Finals.load(record).spent
    assert hand.learned == tried.learned + own
    assert hand.seconds > tried.seconds
    assert Spent(learned=1, looked=2, seconds=0.5) + Spent(looked=1) == Spent(
        learned=1, looked=3, seconds=0.5
    )
