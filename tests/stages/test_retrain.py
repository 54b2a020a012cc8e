"""`vitnas retrain FOLDER arch=WHAT role=NAME`: any Arch, trained in a run's own way beside the chosen one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import timm
import torch
from stage_help import Warm, has_step, refused

from vitnas.arch import Arch
from vitnas.cli import main
from vitnas.cli.fields import open_run
from vitnas.errors import UserError
from vitnas.model.named import ArchFile, Chosen
from vitnas.records import Result, Results, Spent
from vitnas.reporting import report
from vitnas.reporting.verdict import sentence
from vitnas.runs import write_json
from vitnas.stages import Context
from vitnas.stages.compare import Pick, Picks
from vitnas.stages.hand_scaled import plain_vit
from vitnas.stages.retrain import retrain
from vitnas.stages.table import STAGES


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, whose table is still to be made."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in ("results.json", "report.html", "test_scores.json", "test_reads.json"):
        (folder / name).unlink()
    return folder


def chosen(folder: Path) -> Arch:
    return ArchFile.read(folder / "models" / "chosen").arch


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_the_search_names_its_winner(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, arch = Chosen.read(finished), chosen(finished)
    assert record.arch == arch
    assert record.name == f"autoformer-p2-{arch.id}"
    assert record.about == arch.describe()
    assert len(record.blocks) == arch.depth
    assert main(["show", str(finished / "chosen.json")]) == 0
    assert arch.id in capsys.readouterr().out


def test_the_winner_of_another_run_gets_a_row_in_the_table(
    run: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["retrain", str(run), f"arch={finished / 'chosen.json'}", "role=again"]
    assert main(command) == 0
    assert "of 36 held-out images" in capsys.readouterr().out
    folder = run / "models" / "again"
    result = Result.read(folder)
    assert (result.asked, result.start) == (Chosen.read(finished).name, "scratch")
    assert result.epochs == open_run(run).retrain.train.epochs
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert main(command) == 0, "a second time does nothing"
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert main(["evaluate", str(run)]) == 0
    rows = Results.read(run).rows
    assert [row.role for row in rows] == ["chosen", "hand_scaled", "random_search", "again"]
    assert 0 <= (rows[-1].test_accuracy or -1) <= 1
    assert "again" in report(run).read_text()
    assert main(["retrain", str(run), f"arch={finished / 'chosen.json'}", "role=late"]) == 0
    assert "not in the final table" in capsys.readouterr().out
    assert main(["evaluate", str(run)]) == 0
    assert len(Results.read(run).rows) == 4
    (run / "results.json").unlink()  # as after a kill between the reading and the table
    assert main(["evaluate", str(run)]) == 0
    assert len(Results.read(run).rows) == 4


def test_in_python_with_an_arch(run: Path) -> None:
    arch = plain_vit(chosen(run), 16, 2)
    folder = retrain(Context(open_run(run), run).models, arch)
    assert folder == run / "models" / arch.id
    assert ArchFile.read(folder).arch == arch
    wide = plain_vit(chosen(run), 24, 2)
    with pytest.raises(UserError, match=rf"role '{arch.id}' is taken"):
        retrain(Context(open_run(run), run).models, wide, arch.id)
    assert Result.read(folder).arch_id == arch.id


def test_two_archs_do_not_mix_under_one_role(run: Path) -> None:
    """The first was killed while it trained; its checkpoint must not be continued by the second."""
    first, second = plain_vit(chosen(run), 16, 2), plain_vit(chosen(run), 24, 2)
    ArchFile(first).write(run / "models" / "mine")
    with pytest.raises(UserError, match=r"role 'mine' is taken"):
        retrain(Context(open_run(run), run).models, second, "mine")
    retrain(Context(open_run(run), run).models, first, "mine")
    assert Result.read(run / "models" / "mine").arch_id == first.id


def test_an_arch_of_two_roles_is_trained_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second training would differ by chance, and the verdict would take that for the search's doing."""
    shutil.rmtree(run / "models" / "random_search")
    searching = Spent(looked=7, seconds=1.5)
    monkeypatch.setattr(Picks, "random_search", lambda picks: Pick(picks.chosen().arch, 0.5, searching))
    context = Context(open_run(run), run)
    STAGES["retrain"](context)
    first, same = (Result.read(run / "models" / role) for role in ("chosen", "random_search"))
    weights = [
        (run / "models" / role / "model.safetensors").read_bytes() for role in ("chosen", "random_search")
    ]
    assert weights[0] == weights[1]
    assert (same.role, same.arch_id, same.holdout_accuracy) == (
        "random_search",
        first.arch_id,
        first.holdout_accuracy,
    )
    # What the training took is its own part of what the first took; what finding took is the role's.
    trained = first.spent - Picks(context.models, context.searches, context.inherited).chosen().spent
    assert trained.learned == 6 * 32
    assert same.spent.learned == trained.learned
    assert same.spent.looked == trained.looked + 7
    assert main(["evaluate", str(run)]) == 0
    versus = {each.role: each for each in Results.read(run).verdict}["random_search"]
    assert (versus.difference, versus.only_chosen, versus.only_other) == (0, 0, 0)
    assert "and the very network that random search found (95 %" in sentence(Results.read(run))


@pytest.mark.slow
def test_killed_and_repeated_it_gives_the_same_weights(run: Path, warm: Warm) -> None:
    chosen_json = run / "chosen.json"
    command = ["retrain", str(run), f"arch={chosen_json}", "role=killed"]
    warm.kill_when(command, has_step(run, "retrain/killed", 2))
    assert not (run / "models" / "killed" / "result.json").exists()
    warm.run(command)
    weights = (run / "models" / "killed" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "models" / "killed")
    (run / "checkpoints" / "retrain-killed.safetensors").unlink()
    retrain(Context(open_run(run), run).models, str(chosen_json), "killed")
    assert (run / "models" / "killed" / "model.safetensors").read_bytes() == weights


def test_heads_are_those_that_the_task_trains(run: Path, tmp_path: Path) -> None:
    headed = Arch.from_json({**plain_vit(chosen(run), 16, 2).to_json(), "distill_token": True})
    folder = retrain(Context(open_run(run), run).models, headed, "headless")
    assert not ArchFile.read(folder).arch.distill_token


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["arch=vitas_a", "role=a"], "vitas_a does not fit the data: image_size is 8"),
        (["arch=vitas:1 2 3", "role=a"], "the net_id has 3 numbers"),
        (["arch=vitas_d", "role=a"], "'vitas_d' is no model"),
        (["arch=CHOSEN", "role=chosen"], "role is 'chosen'; it must be a word"),
        (["arch=CHOSEN", "role=../up"], "role is '../up'; it must be a word"),
        (["arch=CHOSEN", "role=hand_scaled"], "role is 'hand_scaled'; it must be a word"),
        (["arch=OTHER", "role=a"], "is for 16 pixels, 1 channels and 10 classes; the data are 8 pixels"),
        (["arch=CLASSES", "role=a"], "and 7 classes; the data are 8 pixels, 1 channels and 10 classes"),
        (["role=a"], "`vitnas retrain` takes a run folder, and arch=WHAT"),
        (["arch=CHOSEN", "epochs=3"], "`vitnas retrain` takes a run folder, and arch=WHAT"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    pairs: list[str],
    message: str,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = chosen(finished).to_json()
    write_json(tmp_path / "other.json", {**plain, "image_size": 16})
    write_json(tmp_path / "classes.json", {**plain, "num_classes": 7})
    named = {
        "CHOSEN": finished / "chosen.json",
        "OTHER": tmp_path / "other.json",
        "CLASSES": tmp_path / "classes.json",
    }
    for word, path in named.items():
        pairs = [pair.replace(f"arch={word}", f"arch={path}") for pair in pairs]
    before = files(finished)
    assert message in refused(["retrain", str(finished), *pairs], capsys)
    assert files(finished) == before
