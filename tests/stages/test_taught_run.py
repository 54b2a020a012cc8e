"""A run with a teacher: all that it trains is taught, the report compares, what cannot be is said before the work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from stage_help import Warm, has_step, outcome, refused, words

from vitnas.cli import main
from vitnas.cli.fields import make_run
from vitnas.data import DataConfig, open_data
from vitnas.errors import UserError
from vitnas.exporting import save_timm
from vitnas.model import build
from vitnas.recipes import RECIPES
from vitnas.records import Result, Results
from vitnas.space import autoformer
from vitnas.stages.context import make_space
from vitnas.stages.run import changes, plain
from vitnas.train import TeacherConfig, metrics


def teacher(folder: Path, **fields: Any) -> str:
    """A saved Model of the digits, wider than the run's Archs."""
    arch = autoformer(
        "micro", image_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dims=(32,)
    ).middle()
    save_timm(build(replace(arch, **fields)), folder)
    return str(folder)


@pytest.mark.parametrize(
    ("fields", "given", "said"),
    [
        ({"num_classes": 4}, {}, "the teacher has 4 classes, the network 10; the loss 'soft' compares them"),
        ({"in_chans": 3}, {}, "the teacher takes images of 3 channels, the student's have 1"),
        (
            {},
            {"teacher.losses": "[features]", "teacher.features.blocks": "[[0,0],[0,9]]"},
            "features.blocks asks for block 9 of the teacher, which has blocks 0 to",
        ),
        (
            {"num_classes": 4, "image_size": 16},
            {"teacher.losses": "[features,manifold]", "budget": "macs<=1"},
            "cannot be met",  # features do not care for classes or sizes: what follows is refused
        ),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_before_the_run(
    fields: dict[str, Any],
    given: dict[str, str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = [f"{name}={text}" for name, text in given.items() if name != "budget"]
    name = teacher(tmp_path / "teacher", **fields)
    argv = words(tmp_path / "run", budget=given.get("budget", "macs<=200K"), teacher=name)
    assert said in refused([*argv, *more], capsys)
    assert not (tmp_path / "run" / "supernet.safetensors").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"teacher.losses": "[soft]", "teacher.weights": "[1,2]", "teacher": "x"},
            r"has 2 numbers and .* 1; each loss",
        ),
        ({"teacher.losses": "[sotf]", "teacher": "x"}, r"teacher.losses has 'sotf'.*Nearest: 'soft'"),
        ({"teacher.losses": "[]", "teacher": "x"}, "must name at least one, and each once"),
        ({"teacher.losses": "[hard]"}, "teacher.network is not given, but other fields"),
        ({"teacher.soft.temperature": "2", "teacher.losses": "[hard]", "teacher": "x"}, "Add soft to it"),
        ({"teacher": "x", "teacher.soft.temperature": "0"}, "temperature is 0.0; logits are divided by it"),
        ({"teacher": "x", "teacher.label_weight": "-1"}, "that of the labels at least 0"),
        ({"teacher": "x", "teacher.network": "y"}, "teacher and teacher.network are both given"),
        ({"teacher": "x", "sampler.kind": "sandwich"}, "either that teaches or the largest Arch"),
        (
            {"teacher": "x", "teacher.losses": "[manifold]", "teacher.manifold.num_random": "0"},
            "at least one patch",
        ),
        (
            {"teacher": "x", "teacher.losses": "[features]", "teacher.features.parts": "[]"},
            "at least one part",
        ),
        ({"teacher.losss": "[soft]"}, "Nearest: 'teacher.losses'"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_run("tour", fields)


def test_teacher_is_short_for_its_network(tmp_path: Path) -> None:
    """On the command line and in a file."""
    run = make_run(
        "tour", {"teacher": "some_vit", "teacher.losses": "[soft,features]", "teacher.weights": "[1,0.5]"}
    )
    assert run.teacher == TeacherConfig(network="some_vit", losses=("soft", "features"), weights=(1.0, 0.5))
    file = tmp_path / "mine.yaml"
    for given in ("some_vit", {"network": "some_vit"}):
        file.write_text(yaml.safe_dump({"teacher": given}))
        assert make_run(str(file), {}).teacher == TeacherConfig(network="some_vit")


def test_what_a_run_compares_with() -> None:
    """The paper's claim is of the manifold over soft labels, so that is trained too."""
    with_features = RECIPES["manifold_tour"]().teacher
    rivals = with_features.rivals()
    assert list(rivals) == ["without_teacher", "soft_labels"]
    assert rivals["soft_labels"].losses == ("soft",)
    assert rivals["soft_labels"].network == with_features.network
    assert not rivals["without_teacher"].network
    assert list(TeacherConfig(network="x", compare=True).rivals()) == ["without_teacher"]
    # Of a teacher with other classes there are no soft labels.
    assert list(TeacherConfig(network="x", losses=("features",), compare=True).rivals()) == [
        "without_teacher"
    ]
    assert not TeacherConfig(network="x").rivals()


def test_hard_labels_give_archs_a_distillation_token_where_they_can_have_one() -> None:
    data = open_data(DataConfig(dataset="digits", max_images=100))
    config = RECIPES["vit_resnas_cifar"]().space
    for losses, has in ((("hard",), True), (("soft",), False)):
        space = make_space(
            replace(config, depths=(1, 1)), data, None, TeacherConfig(network="x", losses=losses)
        )
        assert space.largest().distill_token is has


@pytest.mark.slow
def test_a_whole_run_is_taught_and_compared(tmp_path: Path) -> None:
    """Supernet, chosen, baseline and finetuning by the teacher; one model beside it without, from the same weights."""
    run = tmp_path / "run"
    argv = words(
        run,
        teacher=teacher(tmp_path / "teacher"),
        retrain__baselines="[hand_scaled]",
        retrain__rank_archs="0",
    )
    argv += ["teacher.losses=[soft,features,manifold]", "teacher.weights=[1,0.5,1]", "teacher.compare=true"]
    argv += ["teacher.manifold.num_random=16"]
    assert main(argv) == 0
    rows = {row.role: row for row in Results.read(run).rows}
    assert list(rows) == ["chosen", "without_teacher", "soft_labels", "hand_scaled"]
    assert rows["without_teacher"].arch_id == rows["chosen"].arch_id
    assert [row.teacher_losses for row in rows.values()] == [
        ("soft", "features", "manifold"), (), ("soft",), ("soft", "features", "manifold"),
    ]  # fmt: skip
    assert main(["finetune", str(run), "image_size=16", "epochs=1"]) == 0
    assert Result.read(run / "models" / "chosen-16px").teacher == rows["chosen"].teacher
    learned: dict[str, set[str]] = {}
    for line in metrics.read_lines(run):
        if isinstance(line, metrics.Step):
            learned[line.stage] = {*line.losses}
    taught = {"loss", "labels", "soft", "features", "manifold"} | {
        f"manifold_{name}" for name in ("patch", "sample", "random")
    }
    assert all(
        learned.pop(stage) == taught for stage in [*learned] if stage.startswith("finals/hand_scaled/")
    )
    assert learned == {
        "supernet": taught, "retrain/chosen": taught, "retrain/hand_scaled": taught, "finetune/chosen-16px": taught,
        "retrain/without_teacher": {"loss"}, "retrain/soft_labels": {"loss", "labels", "soft"},
    }  # fmt: skip
    page = " ".join((run / "report.html").read_text().split())
    assert "(soft, features, manifold): " in page
    assert "the same without the teacher, of equal cost and trained for as many epochs" in page
    assert "the same by soft labels alone" in page


def test_a_cache_may_come_and_go_and_what_is_learned_may_not() -> None:
    def run(**fields: str) -> dict[str, Any]:
        return plain(make_run("tour", {"teacher": "x", **{f"teacher.{k}": v for k, v in fields.items()}}))

    assert not changes(run(), run(cache="true"))
    assert set(changes(run(), run(epoch_views="3", top_k="5"))) == {"teacher.epoch_views", "teacher.top_k"}
    config = make_run("tour", {"teacher": "x", "teacher.cache": "true", "teacher.compare": "true",
                               "teacher.losses": "[soft,features]", "teacher.epoch_views": "3"}).teacher  # fmt: skip
    assert config.rivals()["soft_labels"] == TeacherConfig(network="x", cache=True, epoch_views=3)


@pytest.mark.slow
def test_a_whole_run_ends_with_the_same_bits_with_and_without_a_cache(warm: Warm, tmp_path: Path) -> None:
    """Mixed images, a moving average; the second run is killed, and goes on with its answers and then without."""
    name = teacher(tmp_path / "teacher")

    def argv(folder: str, cache: bool) -> list[str]:
        given = words(
            tmp_path / folder, teacher=name, data__augment__cutmix="1", retrain__baselines="[hand_scaled]"
        )
        more = ["losses=[soft,features]", "epoch_views=3", "compare=true", "top_k=4", f"cache={cache}"]
        return [*given, *(f"teacher.{field}" for field in more)]

    warm.run(argv("without", cache=False))
    folder = tmp_path / "with"
    for stage in ("supernet", "retrain/chosen"):
        warm.kill_when(argv("with", cache=True), has_step(folder, stage, 2))
    warm.run(argv("with", cache=True))
    assert {path.name.partition("-")[0] for path in (folder / "teacher").iterdir()} == {"logits", "tokens"}
    assert len([*(folder / "teacher").iterdir()]) == 2, "all trainings share them"
    warm.kill_when(argv("both", cache=True), has_step(tmp_path / "both", "supernet", 2))
    warm.run(argv("both", cache=False))
    want = outcome(tmp_path / "without")
    for name in ("with", "both"):
        assert outcome(tmp_path / name) == want
