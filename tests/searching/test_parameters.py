"""Trials carry their genes as Optuna parameters, so that tools which know nothing of vitnas can use a Study."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from threading import Thread
from wsgiref.simple_server import WSGIRequestHandler, make_server

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from search_help import BUDGET, MICRO, score, told

from vitnas.arch import Arch
from vitnas.recipes import RECIPES
from vitnas.searching import RandomSearch, Study, Trial, search
from vitnas.searching.parameters import distribution
from vitnas.searching.storage import open_storage
from vitnas.space import Space
from vitnas.space.gene import Gene


def spaces() -> list[Space]:
    given = {"image_size": 32, "in_chans": 3, "num_classes": 10}
    names = ("tour", "autoformer_tour", "vitas_tour", "vision_xformers_tour", "transformer_ls_tour")
    return [RECIPES[name]().space.build(**given) for name in names]


@pytest.mark.parametrize("space", spaces(), ids=lambda space: space.name)
def test_a_distribution_has_exactly_the_options_of_its_gene(space: Space) -> None:
    for gene in space.genes:
        if len(gene.options) < 2:
            continue
        made = distribution(gene)
        back = [made.to_external_repr(made.to_internal_repr(option)) for option in gene.options]
        assert back == [*gene.options], gene.name
        if isinstance(made, IntDistribution | FloatDistribution):
            assert made.step is not None
            assert round((made.high - made.low) / made.step) + 1 == len(gene.options), gene.name
        else:
            assert isinstance(made, CategoricalDistribution)
            assert len(made.choices) == len(gene.options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((12, 13, 14), IntDistribution(12, 14)),
        ((32, 48, 64), IntDistribution(32, 64, step=16)),
        ((160, 176, 192, 224), CategoricalDistribution([160, 176, 192, 224])),
        ((32, 16), CategoricalDistribution([32, 16])),
        ((0.5, 0.75, 1.0), FloatDistribution(0.5, 1.0, step=0.25)),
        ((False, True), CategoricalDistribution([False, True])),
        (((2, 2), "conv"), CategoricalDistribution(["(2, 2)", "conv"])),
    ],
)
def test_rising_steps_are_ranges_and_all_else_categories(
    options: tuple[object, ...], expected: optuna.distributions.BaseDistribution
) -> None:
    assert distribution(Gene("g", options)) == expected


def planted(arch: Arch) -> dict[str, float]:
    """Only the width counts."""
    return {"accuracy": arch.embed_dim / 64}


@pytest.mark.parametrize("kind", ["", "journal:"])
def test_parameters_are_what_the_arch_is(kind: str, tmp_path: Path) -> None:
    storage = f"{kind}{tmp_path / 'study'}"
    with Study.open(MICRO, storage=storage) as study:
        search(study, planted, searcher=RandomSearch(), num_trials=20)
        trials = study.scored()
    seen = optuna.load_study(study_name="search", storage=open_storage(storage))
    for trial, frozen in zip(trials, seen.trials, strict=True):
        arch = trial.arch
        expected = {"embed_dim": arch.embed_dim, "depth": arch.depth}
        for number, block in enumerate(arch.blocks):
            expected[f"num_heads.{number}"] = block.num_heads
            expected[f"mlp_ratio.{number}"] = block.mlp_hidden / arch.embed_dim
        assert frozen.params == expected
    judge = optuna.importance.FanovaImportanceEvaluator(n_trees=8, seed=0)
    found = optuna.importance.get_param_importances(
        seen, evaluator=judge, target=lambda trial: trial.values[0]
    )
    assert next(iter(found)) == "embed_dim"
    assert found["embed_dim"] > 0.9


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="NO BROWSER: Optuna's dashboard was not looked at")
def test_the_dashboard_draws_genes_by_name(tmp_path: Path) -> None:
    """In a browser."""
    optuna_dashboard = pytest.importorskip("optuna_dashboard")
    with Study.open(MICRO, storage=tmp_path / "study.db") as study:
        search(study, planted, searcher=RandomSearch(), num_trials=20)
    app = optuna_dashboard.wsgi(open_storage(tmp_path / "study.db"))
    with make_server("localhost", 0, app, handler_class=Quiet) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        flags = "--headless --no-sandbox --disable-gpu --virtual-time-budget=20000 --dump-dom".split()
        page = f"http://localhost:{server.server_port}/dashboard/studies/1"
        command = ["chromium", *flags, f"--user-data-dir={tmp_path / 'profile'}", page]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        server.shutdown()
    assert "embed_dim" in dom
    assert 'class="main-svg"' in dom


class Quiet(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_study_of_before_goes_on(tmp_path: Path) -> None:
    """Without parameters, with the same proposals."""

    def run(path: Path, num: int) -> list[Trial]:
        with Study.open(MICRO, BUDGET, storage=path) as study:
            search(study, lambda arch: score(arch), searcher=RandomSearch(), num_trials=num)
            return study.scored()

    run(tmp_path / "old.db", 6)
    with closing(sqlite3.connect(tmp_path / "old.db")) as database:
        assert database.execute("SELECT COUNT(*) FROM trial_params").fetchone()[0] > 6
        database.execute("DELETE FROM trial_params")
        database.commit()
    run(tmp_path / "old.db", 10)
    run(tmp_path / "new.db", 10)
    with Study.open(MICRO, BUDGET, storage=tmp_path / "old.db") as old:
        with Study.open(MICRO, BUDGET, storage=tmp_path / "new.db") as new:
            assert told(old) == told(new)
