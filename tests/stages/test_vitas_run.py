"""A whole ViTAS run on the digits (bilateral, private tensors, identities, two patch sizes), and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stage_help import refused, words

from vitnas.budget import Budget
from vitnas.cli import main
from vitnas.cli.fields import make_run
from vitnas.data import Augment
from vitnas.errors import UserError
from vitnas.model.named import ArchFile
from vitnas.recipes import RECIPES
from vitnas.records import Results
from vitnas.sample import Found
from vitnas.searching import feasibility
from vitnas.space import VitasSpace
from vitnas.stages.context import Context, make_space
from vitnas.supernet import Supernet

VITAS: dict[str, str | None] = {
    "space__kind": "vitas",
    "space__patch_sizes": "[2,4]",
    "space__embed_dims": "[8,16,24]",
    "space__inner_dims": "[8,16,24]",
    "space__mlp_hiddens": "[16,32,48]",
    "space__num_heads": "[1,2]",
    "space__num_slots": "3",
    "space__depths": None,
    "space__head_dim": None,
    "sharing__coupling": "bilateral",
    "sharing__private_tokens": "true",
    "sharing__private_heads": "true",
    "sampler__kind": "identity",
    "budget": "60K<=macs<=90K",
    "retrain__rank_archs": "0",
    "retrain__baselines": "[hand_scaled]",
    "export__formats": "[]",
    "export__latency": "[]",
    "supernet__epochs": "1",
    "supernet__checkpoint_minutes": "10",
    "search__num_trials": "4",
}
SIDES: set[int] = set()  # on which the supernet was trained


def vitas_words(folder: Path, **changes: str | None) -> list[str]:
    """The recipe `vitas_tour`, made tiny."""
    run, _, *rest = words(folder, **{**VITAS, **changes})
    return [run, "vitas_tour", *rest]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vitas") / "run"
    forward = Supernet.forward

    def spied(self: Supernet, *args: Any, side: int = 0, **options: Any) -> Any:
        if self.training:
            SIDES.add(side)
        return forward(self, *args, side=side, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Supernet, "forward", spied)
        assert main(vitas_words(folder)) == 0
    return folder


def test_the_whole_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = Results.read(finished).rows
    assert [row.role for row in rows] == ["chosen", "hand_scaled"]
    found = Found.read(finished)
    assert 0 <= found.prob < 1
    (mean,) = found.means.values()
    assert 60_000 <= mean <= 90_000
    assert 60_000 <= rows[0].macs <= 90_000
    arch = ArchFile.read(finished / "models" / "chosen").arch
    assert main(["show", str(finished / "models" / "chosen")]) == 0
    assert arch.id in capsys.readouterr().out


def test_the_supernet_has_the_private_tensors(finished: Path) -> None:
    from safetensors.torch import load_file

    names = load_file(finished / "supernet.safetensors").keys()
    assert {n.split(".")[1] for n in names if n.startswith("private.")} == {
        "patch_size_2",
        "patch_size_4",
        "num_heads_1",
        "num_heads_2",
    }


def test_both_sides_were_trained_with_the_probability_found(finished: Path) -> None:
    assert SIDES == {0, 1}
    context = Context(make_run(str(finished / "run.yaml"), {}), finished)
    assert context.inherited.supernet.sides == 2
    assert getattr(context.sampler.make(), "prob", None) == Found.read(finished).prob


def test_a_second_run_of_the_same_does_nothing(finished: Path) -> None:
    files = ("identity.json", "supernet.safetensors", "results.json")
    before = [(finished / name).stat().st_mtime_ns for name in files]
    assert main(vitas_words(finished)) == 0
    assert before == [(finished / name).stat().st_mtime_ns for name in files]


def test_a_window_out_of_reach_is_refused_before_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    text = refused(vitas_words(folder, budget="230K<=macs<=300K"), capsys)
    assert "no identity probability brings the mean cost of vitas_" in text
    assert "the mean of macs goes from" in text
    assert not any((folder / name).exists() for name in ("identity.json", "space.json", "feasibility.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "macs<=1K"}, "macs<=1K cannot be met; vitas_micro ranges from"),
        ({"space__inner_dims": "[8,15]"}, "inner_dims has 15; it must be a multiple of every num_heads"),
        ({"space__patch_sizes": "[2,3]"}, "patch_sizes has 3; it must divide image_size 8"),
        (
            {"space__depths": "[1,2]"},
            "space.depths belongs to space.kind autoformer and mixers and unified and vit_resnas, but",
        ),
        ({"space__num_slots": "0"}, "num_slots is 0; a network has at least 1"),
    ],
)
def test_spaces_and_budgets_that_cannot_be(
    changes: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    text = refused(vitas_words(folder, **changes), capsys)
    assert message in text
    assert not (folder / "supernet.safetensors").exists()
    assert not (folder / "space.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sharing__coupling": "cyclic"}, "is no vitas space; coupling cyclic of sharing need"),
        ({"sampler__kind": "identity"}, "has no identity; there is no probability to set"),
        (
            {"space__num_slots": "3"},
            "space.num_slots belongs to space.kind vitas, but space.kind is 'autoformer'",
        ),
    ],
)
def test_other_spaces_refuse_what_is_for_vitas(
    changes: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(words(tmp_path / "run", **changes), capsys)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"sampler.identity_prob": "0.5"},
            r"identity_prob belongs to sampler\.kind identity, but",
        ),
        (
            {"sampler.kind": "identity", "sampler.identity_prob": "1"},
            r"identity_prob is 1\.0; it must be from 0 to below 1",
        ),
        (
            {"sharing.coupling": "bilateral", "pretrained": "vit_tiny"},
            r"'bilateral' with pretrained, whose most",
        ),
        (
            {"sharing.coupling": "left"},
            "sharing.coupling is 'left'; it must be one of prefix, bilateral, cyclic",
        ),
    ],
    ids=["kind", "one", "pretrained", "word"],
)
def test_runs_that_cannot_be_are_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_run("tour", fields)


@pytest.mark.parametrize(("name", "size", "chans"), [("vitas", 224, 3), ("vitas_tour", 8, 1)])
def test_the_recipes_fit_their_spaces(name: str, size: int, chans: int) -> None:
    run = RECIPES[name]()
    data = type("Fake", (), {"image_size": size, "in_chans": chans, "num_classes": 10})()
    space = make_space(run.space, data, run.task)
    assert isinstance(space, VitasSpace)
    assert len(space.patch_sizes) > 1
    assert run.sampler.kind == "identity"
    table = feasibility(space, Budget.parse(run.budget), n=2000)
    assert table.rows[-1].share_feasible > 0.005


def test_the_recipe_is_the_paper_s() -> None:
    """Facts of the authors' training: weak augmentation, no mixing, no stochastic depth in the supernet."""
    run = RECIPES["vitas"]()
    train, augment = run.supernet, run.data.augment
    assert isinstance(augment, Augment)
    assert (train.epochs, train.lr, train.weight_decay, train.warmup_epochs) == (300, 1e-3, 0.05, 5)
    assert (train.drop_path or 0.0, train.min_lr, train.ema, run.data.batch_size) == (0.0, 0.0, None, 1024)
    assert (augment.hflip, augment.scale, augment.re_prob) == (0.5, (0.08, 1.0), 0.25)
    assert (augment.label_smoothing, augment.mixup, augment.cutmix) == (0.1, 0, 0)
    assert not any((augment.color_jitter, augment.auto_augment))
    assert (run.search.searcher, run.search.num_trials, run.search.objectives) == (
        "vitas",
        2000,
        ("accuracy",),
    )
    assert run.retrain.train == replace(train, drop_path=0.1, monitor_every=0)
    assert (run.sharing.coupling, run.sharing.private_tokens, run.sharing.private_heads) == (
        "bilateral",
        True,
        True,
    )
