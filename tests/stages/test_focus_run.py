"""A run with a learned sampler: it answers its own budget, and others afterwards."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from stage_help import FOCUS, refused, words

from vitnas.budget import Budget
from vitnas.cli import main
from vitnas.cli.fields import make_run, open_run
from vitnas.records import ExportRecord, Family, SamplerSummary
from vitnas.reporting import report
from vitnas.reporting.files import read_run
from vitnas.reporting.sampler_plots import preferences
from vitnas.sample import Focus
from vitnas.searching import SearchRecord
from vitnas.searching.goal import Goal
from vitnas.searching.latency import LatencyModel
from vitnas.space import Space
from vitnas.stages import Context
from vitnas.stages.sampler import answers, is_quantity


@pytest.fixture
def copy(learned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(learned, tmp_path / "run"))


def test_the_sampler_is_kept_and_watched(learned: Path) -> None:
    assert (learned / "sampler.safetensors").exists()
    summary = SamplerSummary.read(learned)
    assert summary.quantity == "macs"
    assert [row.policy.n for row in summary.compared] == [8, 8, 8]
    looks = [look for _, look in read_run(learned).looks]
    assert len(looks) >= 3
    first = looks[0]
    assert None not in (first.gain, first.miss, first.score, first.reward)
    assert len(first.cost_ratio) == len(first.budgets) == len(first.entropy["depth"]) == 8
    assert not looks[1].cost_ratio, "what it would draw is recorded at every fourth look"
    search = SearchRecord.read(learned)
    assert search.num_scored == 3
    assert all(trial.costs.macs <= 200_000 for trial in search.trials)


def test_a_family_of_answers(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["specialize", str(copy), "--budget", "[macs<=120K, macs<=200K and params<=1M]"]) == 0
    said = capsys.readouterr().out
    family = Family.read(copy).answers
    assert [row.budget for row in family] == ["macs<=120K", "macs<=200K and params<=1M"]
    for row, most in zip(family, (120_000, 200_000), strict=True):
        assert row.arch_id in said
        assert row.cost.macs <= most
        assert row.source == "sampler"
        assert row.evaluated == 3, "as many as the run's own search, which asks the sampler too"
        folder = copy / row.path
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert sum(p.numel() for p in model.parameters()) == row.cost.params
        assert not ExportRecord.read(folder).files, "the run's export.formats are none"
    page = report(copy).read_text()
    assert "What the sampler learned" in page
    assert "Answers to other budgets" in page
    assert main(["specialize", str(copy), "budget=macs<=120K"]) == 0
    assert len(Family.read(copy).answers) == 2, "an answer replaces the one to the same budget"


@pytest.mark.slow
def test_an_answer_is_exported_as_the_run_says(copy: Path) -> None:
    path = copy / "run.yaml"
    path.write_text(path.read_text().replace("formats: []", "formats: [onnx]"))
    assert main(["specialize", str(copy), "budget=macs<=120K"]) == 0
    (answer,) = Family.read(copy).answers
    record = ExportRecord.read(copy / answer.path).files["onnx"]
    assert record.max_abs_diff < 1e-4
    assert (copy / answer.path / "model.onnx").stat().st_size > 1000


def test_bad_questions_get_one_sentence(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside = refused(["specialize", str(copy), "budget=macs<=1"], capsys)
    assert "'macs<=1' is outside what the sampler learned: macs from " in outside
    other = refused(["specialize", str(copy), "budget=params<=1M"], capsys)
    assert "has no upper bound on macs, which is what the sampler was trained for" in other
    path = copy / "run.yaml"
    path.write_text(path.read_text().replace("num_heads:\n  - 1\n  - 2", "num_heads:\n  - 2\n  - 3"))
    changed = refused(["specialize", str(copy), "budget=macs<=120K"], capsys)
    assert "was trained on other genes than those of" in changed
    assert not (copy / "family.json").exists()


def test_a_list_that_fails_leaves_nothing(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(copy.rglob("*"))
    assert "outside what" in refused(["specialize", str(copy), "budget=[macs<=120K, macs<=1]"], capsys)
    for text, why in (
        ("[macs<=120K", "it must end with ']'"),
        ("[ , ]", "is empty"),
        ("[latency<=1ms@onnxruntime,batch=1, macs<=120K]", "limits latency, for which the sampler was not"),
    ):
        assert why in refused(["specialize", str(copy), f"budget={text}"], capsys)
    assert set(copy.rglob("*")) == before


def test_a_sampler_of_another_quantity_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "run.yaml"
    text = path.read_text()
    for old, new in (("quantity: macs", "quantity: params"), ("anchors: 8", "anchors: 9")):
        path.write_text(text.replace(old, new))
        assert "was trained for macs with 8 anchors" in refused(
            ["specialize", str(copy), "budget=macs<=120K and params<=20K"], capsys
        )


def test_a_window_that_no_draw_meets_is_reached_by_moving_genes(copy: Path) -> None:
    focus = Context(open_run(copy), copy).sampler.load()
    draws = {tuple(row) for row in focus.ask(torch.linspace(focus.low, focus.high, 2000)).tolist()}
    rare = next(
        genes
        for genes in focus.space.random_matrix(2000, np.random.default_rng(0)).tolist()
        if tuple(genes) not in draws and 100_000 < focus.cost_of(np.array([genes]))[0] < 150_000
    )
    cost = Goal(focus.space, Budget()).cost(tuple(rare))
    window = Budget(macs=(cost.macs, cost.macs), params=(cost.params, cost.params))
    found = answers(focus, window, num_draws=1)
    assert found
    assert all(not window.misses(Goal(focus.space, window).cost(genes)) for genes in found)


def test_what_a_kill_left_out_is_written(copy: Path) -> None:
    """A kill between the weights and sampler.json."""
    wanted = SamplerSummary.read(copy)
    (copy / "sampler.json").unlink()
    assert main(["train", str(copy)]) == 0
    assert SamplerSummary.read(copy) == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "params<=1M"}, "has no upper bound on macs, which is what the sampler was trained for"),
        ({"budget": ""}, "has no upper bound on macs"),
        ({"budget": "macs<=100M"}, "is outside what the sampler learned: macs from"),
        ({"sampler__quantity": "mac"}, "sampler.quantity is 'mac'; known are macs,"),
        ({"sampler__quantity": "latency"}, "sampler.quantity is 'latency'; known are"),
        ({"sampler__quantity": "latency@onxruntime"}, "runtime is 'onxruntime'"),
    ],
)
def test_what_it_could_not_answer_is_refused_before_work(
    changes: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(words(tmp_path / "run", **{**FOCUS, **changes}), capsys)
    assert not (tmp_path / "run").exists()


def test_neither_a_sampler_nor_a_search(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("sampler.safetensors", "search.json", "study.db"):
        (copy / name).unlink()
    error = refused(["specialize", str(copy), "budget=macs<=120K"], capsys)
    assert "has neither a learned sampler (sampler.kind is 'focus') nor a finished search" in error
    assert not (copy / "study.db").exists()


def test_times_of_another_space_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def fit(space: Space, *_: object, **__: object) -> LatencyModel:
        timed.append(space)
        return LatencyModel((0.1, 1.0, 0.0, 0.0, 0.0), (1.0, 1e5, 1.0, 1.0, 1.0), 0.0, 2)

    monkeypatch.setattr(LatencyModel, "fit", fit)
    tiny = {name.replace("__", "."): value for name, value in FOCUS.items()} | {
        "sampler.quantity": "latency@onnxruntime,batch=1",
        "budget": "latency<=1ms@onnxruntime",
    }
    for depths in ("[1,2]", "[1,2]", "[2,3]"):
        run = make_run("tour", {**tiny, "space.depths": depths})
        focus = Context(run, tmp_path).sampler.make(learns=False)
        assert isinstance(focus, Focus)
    assert len(timed) == 2
    assert is_quantity(Budget.parse(run.budget).limits[0], run.sampler.quantity), "one target, two spellings"
    assert focus.low > 0.1


def test_an_empty_cell_where_there_is_no_block() -> None:
    summary = SamplerSummary(
        quantity="macs",
        low=1e5,
        high=2e5,
        budgets=(1e5, 2e5),
        options={"num_heads.1": (1, 2)},
        preferences={"num_heads.1": ((0.0, 0.0), (0.5, 0.5))},
        compared=(),
    )
    assert preferences(summary)["data"][0]["z"] == [[None, 0.5]]


def test_a_run_without_a_sampler_cannot_ask_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(words(tmp_path / "run", search__searcher="sampler"), capsys)
    assert "search.searcher is 'sampler' but sampler.kind is 'uniform', which learns nothing" in error
    assert not (tmp_path / "run").exists()
