"""The command line: fields are checked before any work, errors are one sentence, help teaches."""

from __future__ import annotations

import io
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import yaml
from jsonargparse.typing import PositiveInt
from optuna.storages import JournalStorage
from rich.console import Console

from vitnas.cli import doctor, main
from vitnas.cli.fields import make_run, open_run, split_budgets
from vitnas.cli.options import options, split
from vitnas.data import Augment
from vitnas.errors import UserError
from vitnas.recipes import RECIPES
from vitnas.sample import SeveralConfig
from vitnas.space import SPACES, VitasConfig
from vitnas.stages.claim import claim_folder
from vitnas.stages.run import changes, field_names, in_words, plain, save_run
from vitnas.train import progress


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_yaml(name: str, tmp_path: Path) -> None:
    run = RECIPES[name]()
    save_run(run, tmp_path / "run.yaml")
    assert make_run(str(tmp_path / "run.yaml"), {}) == run
    assert open_run(tmp_path) == run


def test_overrides_are_typed_and_nested() -> None:
    run = make_run(
        "tour",
        {
            "supernet.epochs": "7",
            "budget": "macs<=2M and params<=90K",
            "space.embed_dims": "[16, 32]",
            "data.augment.rotate": "3",
            "data.max_images": "null",
            "retrain.baselines": "[hand_scaled]",
        },
    )
    assert run.supernet.epochs == 7
    assert run.budget == "macs<=2M and params<=90K"
    assert run.space.embed_dims == (16, 32)
    assert isinstance(run.data.augment, Augment)
    assert run.data.augment.rotate == 3
    assert run.retrain.baselines == ("hand_scaled",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "tuor"], r"'tuor' is no recipe.*Nearest: 'tour'"),
        (["run", "tour", "supernet.epoch=3"], r"no field 'supernet\.epoch'.*Nearest: 'supernet\.epochs'"),
        (["run", "tour", "supernet.epochs=many"], "supernet.epochs is 'many'; it must be a number"),
        (["run", "tour", "budget=macs<=1Q"], r"1Q|unit"),
        (["run", "tour", "supernet.lr=-1"], r"lr is -1\.0; it must be above 0"),
        (["run"], "takes one recipe"),
        (["rum", "tour"], r"'rum' is no command.*Nearest: 'run'"),
        (["train", "nowhere"], "nowhere is not a folder"),
        (["run", "nowhere.yaml"], r"nowhere\.yaml does not exist"),
        (["show", "autoformer_tini"], r"Nearest: 'autoformer_tiny'"),
        (["specialize", "x"], "takes a run folder and budget=TEXT"),
        (["list", "x"], "takes nothing"),
        (["show", ""], "takes one name"),
        (
            ["count", "vit_tiny_patch16_224.none"],
            r"the model 'vit_tiny_patch16_224.none' cannot be made \(Inv.*tag",
        ),
        (["show", "."], r"the model '\.' cannot be made \(Config file not found"),
        (["run", "tour", "data.dataset=no/such/folder"], "no/such/folder"),
        (["run", "tour", "budget=macs<=1K"], r"macs<=1K.*ranges from"),
        (["run", "tour", "space.patch_size=3"], r"image_size is 8; it must be a multiple of patch_size 3"),
        (["run", "tour", "supernet.optimizer=adamv"], "optimizer is 'adamv'"),
        (["run", "tour", "search.searcher=evolve"], "search.searcher is 'evolve'"),
        (["run", "tour", "export.latency=[tensorrt]"], "tensorrt"),
        (["run", "tour", "dataset=nowhere"], "dataset is 'nowhere'; it must be an existing folder"),
        (["run", "tour", "epochs=3"], "epochs may be supernet.epochs, .* a field is named in full"),
        (
            ["run", "tour", "dataset=a", "data.dataset=b"],
            "data.dataset is given twice, once in short",
        ),
        (["run", "tour", "seed=-1"], "seed is -1; it must be from 0 to 4294967295"),
        (["run", "tour", "seed=99999999999999999999"], "seed is 9+; it must be from 0"),
        (["run", "tour", "threads=100000"], "threads is 100000 on a machine of"),
        (["run", "tour", "data.workers=9999"], "workers is 9999; it must be at most 512"),
        (["run", "tour", "supernet.lr=.inf"], "supernet.lr is '.inf'; it must be a number"),
        (["run", "tour", "supernet.lr=1e400"], "supernet.lr is '1e400'; it must be a number"),
        (["run", "tour", "data.holdout=nan"], "data.holdout is 'nan'; it must be"),
        (["run", "tour", "data.std=[-1]"], r"std \(-1.0,\); both are finite, and std is above 0"),
        (["run", "tour", "budget=;"], "budget is ';', which says no limit"),
        (["run", "tour", "budget=macs<=1__0M"], "the number '1__0'"),
        (["run", "tour", "folder="], "folder is ''; it must be a path"),
        (["run", "tour", "supernet=3"], "supernet is '3'; it must be fields, such as epochs below it"),
        (["run", "images"], "no images are named; data.dataset is a folder"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("vitnas: ")
    assert "Traceback" not in error
    assert re.search(message, " ".join(error.split())), error
    assert not (tmp_path / "runs" / "tour" / "run.yaml").exists(), (
        "a refused run leaves no run folder to trip over"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 2020-01-01", "seed is .*2020-01-01.*; it must be a whole number"),
        ("space: !!set {a, b}", "space is {.*; it must be fields"),
        ("space: &a {depths: *a}", "cannot be read as YAML .Circular reference"),
        pytest.param(
            f"space: {'[' * 1200}{']' * 1200}", "cannot be read as YAML .maximum recursion", id="deep"
        ),
        ("seed: 1\nseed: 2", "cannot be read as YAML .line 3: 'seed' is given twice"),
        ("? [a, b]\n: 1", "cannot be read as YAML .unhashable"),
        ("budget: {a: 1}", "budget has the field 'budget.a'; it is a value"),
        ("search: {objectives: {accuracy: 1}}", "search.objectives has the field"),
    ],
)
def test_yaml_that_no_run_is_made_of(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"recipe: tour\n{text}\n")
    with pytest.raises(UserError, match=message) as caught:
        make_run(str(tmp_path / "mine.yaml"), {})
    assert len(str(caught.value)) < 500


def test_a_name_in_short_is_the_one_field_that_ends_so() -> None:
    run = make_run("tour", {"num_trials": "7", "dataset": "x", "rotate": "3"})
    assert (run.search.num_trials, run.data.dataset) == (7, "x")
    assert isinstance(run.data.augment, Augment)
    assert run.data.augment.rotate == 3


def test_what_a_user_typed_is_no_markup(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("x[/b]", "x[seed=1]"):
        folder = shutil.copytree(finished, tmp_path / name)
        assert main(["evaluate", str(folder)]) == 0
        said = capsys.readouterr().out
        assert f"{folder}/report.html" in said
        assert f"evaluate: done ({folder})" in said
        assert main(["report", str(folder)]) == 0
        assert capsys.readouterr().out == f"{folder}/report.html\n"


@pytest.mark.parametrize("command", ["slim", "run"])
def test_help_answers_at_once(command: str) -> None:
    """It imports no torch."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, "-m", "vitnas", command, "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"vitnas {command} ")
    assert ("supernet.epochs: " in done.stdout) == (command == "run")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1.5


def test_a_machine_that_is_not_ready(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "LEAST_DISK", 1 << 60)
    assert main(["doctor"]) == 2
    said = capsys.readouterr()
    assert "check writing    files and databases can be written" in said.out
    assert re.search(r"check disk +NOT RIGHT: .* GB of disk are free in .*; a run takes 2", said.out)
    assert "this machine is not ready (disk)" in said.err


def test_a_log_says_how_much_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = progress.ConsoleProgress(Console(file=said))
    for now[0], step in ((0.0, 100), (5.0, 105), (20.0, 120), (100.0, 200), (4000.0, 400)):
        shown.update("train", step, 400, "loss 1")
    assert said.getvalue().splitlines() == [
        "train: 120/400  loss 1, 5 min left",
        "train: 200/400  loss 1, 3 min left",
        "train: 400/400  loss 1",
    ]
    assert [progress.duration(s) for s in (40, 100, 5399, 7800)] == ["40 s", "2 min", "90 min", "2.2 h"]


def test_a_bar_of_what_is_not_to_be_relied_on_is_not_green() -> None:
    def drawn(warning: str) -> str:
        said = io.StringIO()
        with progress.ConsoleProgress(
            Console(file=said, force_terminal=True, color_system="standard", width=100)
        ) as shown:
            shown.update("search", 4, 4)
            shown.done("search", warning)
        return said.getvalue().rpartition("search ")[2]

    yellow = "\x1b[33m━"
    assert yellow in drawn("scores tell nothing")
    assert yellow not in drawn("")


def test_a_yaml_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"recipe": "tour", "supernet": {"epoch": 3}}))
    with pytest.raises(UserError, match=r"unknown field 'supernet\.epoch'.*Nearest: 'supernet\.epochs'"):
        make_run(str(tmp_path / "mine.yaml"), {})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"sampler.rewire": "true"},
            r"sampler\.rewire belongs to sampler\.kind spread, but sampler\.kind is 'uniform'",
        ),
        (
            {"sampler.kind": "sandwich", "sampler.num_archs": "2"},
            "belongs to sampler.kind several and spread",
        ),
        ({"sampler.kind": "best_up", "sampler.lr": "1"}, "belongs to sampler.kind focus, but"),
        ({"sampler.kind": "spred"}, r"sampler\.kind is 'spred'; .* Nearest: 'spread'"),
        ({"sampler.rewier": "true"}, r"no field 'sampler\.rewier'.*Nearest: 'sampler\.rewire'"),
        (
            {"space.kind": "autoformer", "space.num_slots": "3"},
            "space.num_slots belongs to space.kind vitas, but space.kind is 'autoformer'",
        ),
        ({"space.kind": "vitass"}, r"space\.kind is 'vitass'; .* Nearest: 'vitas'"),
        ({"task.patch_weight": "2"}, "task.patch_weight belongs to task.kind token_mixup"),
        ({"data.augment.shift": "4"}, "^augment.shift is 4.0; it must be from 0 to 0.5"),
    ],
    ids=str,
)
def test_fields_of_another_kind_are_refused(fields: dict[str, str], message: str, tmp_path: Path) -> None:
    """On the command line and in a file."""
    with pytest.raises(UserError, match=message):
        make_run("tour", fields)
    if "no field" in message or "augment" in message:
        return
    nested: dict[str, Any] = {}
    for name, text in fields.items():
        group, _, leaf = name.partition(".")
        nested.setdefault(group, {})[leaf] = yaml.safe_load(text)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(nested))
    with pytest.raises(UserError, match=message):
        make_run(str(tmp_path / "mine.yaml"), {})


def test_another_kind_brings_its_own_fields() -> None:
    """What the recipe chose for its own kind is gone: nothing is left to have an effect by surprise."""
    run = make_run("vit_resnas_cifar", {"sampler.kind": "several"})
    assert run.sampler == SeveralConfig(num_archs=2)
    assert make_run("tour", {"space.kind": "vitas", "space.size": "mini"}).space == VitasConfig(size="mini")
    same = make_run("vit_resnas_cifar", {"sampler.kind": "spread"})
    assert same.sampler == RECIPES["vit_resnas_cifar"]().sampler


@pytest.mark.parametrize("kind", SPACES)
def test_no_default_of_a_space_overrides_its_preset(kind: str) -> None:
    """Every option left out is the preset's, in every preset."""
    config = SPACES[kind]
    images: dict[str, Any] = {"image_size": 224, "in_chans": 3, "num_classes": 10}
    for size in config.sizes:
        recipe = "vitas_tour" if kind == "vit_resnas" else "tour"  # of another kind
        needed = {"network": "test_vit"} if kind == "around" else {}
        asked = {
            "space.kind": kind,
            "space.size": size,
            **{f"space.{name}": text for name, text in needed.items()},
        }
        made = make_run(recipe, asked).space
        assert made == config(size=size, **needed)
        options = {item.name: None for item in fields(config) if item.name not in ("size", "network")}
        assert made == replace(made, **options)
        assert made.build(**images) == config.make(size, **needed, **images)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("space: 3", r"mine\.yaml: space is 3; it must be fields, of which kind is one of around"),
        ("space: {kind: [vitas]}", r"space\.kind is \['vitas'\]; it must be one of"),
        ("recipe: [tour]", r"recipe is \['tour'\]; it must be one of"),
        (
            "data: {image_size: 2020-01-01}",
            r"data\.image_size is '\"2020-01-01\"'; it must be a whole number or",
        ),
    ],
)
def test_a_yaml_with_values_of_other_types_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        make_run(str(tmp_path / "mine.yaml"), {})


def test_a_yaml_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="cannot be read as YAML"):
        make_run(str(tmp_path / "bad.yaml"), {})
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(UserError, match="holds no fields"):
        make_run(str(tmp_path / "list.yaml"), {})


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    run = RECIPES["tour"]()
    claim_folder(run, tmp_path)
    claim_folder(run, tmp_path)
    with pytest.raises(UserError, match=r"holds another run \(seed: 0 then, 5 now\)"):
        claim_folder(replace(run, seed=5), tmp_path)


@pytest.mark.parametrize("text", ["null", "sixty"])
def test_a_folder_whose_number_that_may_grow_is_none_is_another_run(text: str, tmp_path: Path) -> None:
    run, file = RECIPES["tour"](), tmp_path / "run.yaml"
    claim_folder(run, tmp_path)
    file.write_text(file.read_text().replace("num_trials: 60", f"num_trials: {text}"))
    with pytest.raises(UserError, match=r"holds another run \(search.num_trials: "):
        claim_folder(run, tmp_path)


@dataclass(frozen=True)
class Some:
    place: str
    count: PositiveInt | None = None
    share: float = 0.5
    words: tuple[str, ...] = ()
    on: bool = False
    mode: Literal["a", "b"] = "a"
    modes: tuple[Literal["a", "b"], ...] = ()
    pair: tuple[PositiveInt, PositiveInt] | None = None
    either: float | tuple[float, ...] | None = None


def test_words_become_options() -> None:
    usage = "`vitnas x` takes a place."
    want = Some("here", 3, 1e-3, ("a", "b"), True, "b")
    same = ["count=3", "share=1e-3", "on=true", "mode=b"]
    assert options(Some, ["here", *same, "words=[a, b]"], usage) == want
    assert options(Some, [*(f"--{word}" for word in same), "here", "--words=a,b"], usage) == want
    assert options(Some, ["here", "--count", "3", "count=null"], usage) == Some("here")
    for text, value in {"0.5": 0.5, "0.5,1": (0.5, 1.0), "[0.5]": (0.5,), "null": None}.items():
        assert options(Some, ["here", f"either={text}"], usage).either == value
    assert split(Some, ["here", "count=3", "other.field=a=b"]) == (
        ["here", "count=3"],
        {"other.field": "a=b"},
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "^`vitnas x` takes a place.$"),
        (["a", "b"], "^`vitnas x` takes a place.$"),
        (["a", "--count"], "^`vitnas x` takes a place.$"),
        (["a", "cuont=3"], "takes a place. There is no field 'cuont'. Nearest: 'count'"),
        (["a", "count=0"], "count is '0'; it must be a whole number of at least 1 or null"),
        (["a", "count=2.5"], "count is '2.5'; it must be a whole"),
        (["a", "share=many"], "share is 'many'; it must be a number"),
        (["a", "share=nan"], "share is 'nan'; it must be a number"),
        (["a", "share=.inf"], "share is '.inf'; it must be a number"),
        (["a", "on=maybe"], "on is 'maybe'; it must be true or false"),
        (["a", "mode=c"], "mode is 'c'; it must be one of a, b"),
        (["a", "words={"], "words is '{'; it must be a list of texts"),
        (["a", "pair=[1]"], "it must be a list of 2 whole numbers of at least 1 or null"),
        (["a", "modes=[c]"], "it must be a list of one of a, b. "),
    ],
    ids=str,
)
def test_words_that_are_no_options(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        options(Some, words, "`vitnas x` takes a place.")


def test_a_field_is_given_once() -> None:
    with pytest.raises(UserError, match=r"^seed is given twice, as '1' and '2'\. Leave one out\.$"):
        split(Some, ["a", "seed=1", "seed=2"])


def test_the_options_are_frozen() -> None:
    """The command line does not grow by accident: a new field is a decision, made here too."""
    names = set(field_names())
    assert {
        "budget",
        "seed",
        "data.dataset",
        "space.size",
        "supernet.epochs",
        "retrain.train.epochs",
    } <= names
    assert len(names) == NUM_FIELDS, sorted(names)


NUM_FIELDS = 242


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    from vitnas.cli.commands import COMMANDS

    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert f"vitnas {name}" in text
    assert main(["no-such-command"]) == 2
    named = re.findall(r"commands are (.*)\.", capsys.readouterr().err)[0].split(", ")
    assert {*named} == {*COMMANDS}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["list"], "autoformer_base"),
        (["list"], "vit_resnas (sr_tiny_mh, sr_small_mh,"),
        (["count", "vit_resnas_tiny"], "1,782,630,272"),
        (["show", "tour"], "supernet:"),
        (["show", "autoformer_tiny"], "blocks.12.mlp"),
        (["show", "deit_tiny_patch16_224"], "blocks.11.mlp"),
        (["count", "vit_small_patch14_dinov2"], "22,056,192"),
        (["count", "autoformer_tiny"], "5,867,944"),
        (["count", "autoformer_small"], "4,773,"),
        (["doctor"], "torch"),
    ],
)
def test_looking_things_up(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert expected in capsys.readouterr().out


def test_differences_name_the_field() -> None:
    run = RECIPES["tour"]()
    changed = changes(plain(run), plain(replace(run, budget="macs<=9G", threads=3)))
    assert changed == {"budget": (run.budget, "macs<=9G")}
    assert in_words(changed) == f"budget: {run.budget!r} then, 'macs<=9G' now"


def test_help_has_all_lines_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["retrain", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("vitnas retrain FOLDER")
    assert lines[1].strip().startswith("arch=WHAT role=NAME")
    assert not any("finetune" in line for line in lines)


def test_the_help_of_run_names_fields_and_their_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "tour", "--help"]) == 0
    text = capsys.readouterr().out
    for name in ("supernet.epochs", "data.augment.mixup", "retrain.rank_archs", "budget"):
        assert f"  {name}:" in text, name


def test_one_precision_serves_the_whole_run() -> None:
    with pytest.raises(
        UserError, match=r"retrain\.train\.precision is 'bf16' and supernet\.precision is 'fp32'"
    ):
        make_run("tour", {"retrain.train.precision": "bf16"})


def test_a_shared_storage_tells_runs_apart_but_not_resumptions() -> None:
    from vitnas.stages import Context

    def name(**pairs: str) -> str:
        fields = {key.replace("__", "."): value for key, value in pairs.items()}
        return Context(make_run("tour", fields), Path("nowhere")).searches.name_of("search")

    assert name() == "search"
    shared = name(search__storage="journal:x")
    assert shared.startswith("search-")
    assert shared == name(search__storage="journal:x", data__workers="3")
    assert shared == name(search__storage="journal:x", search__num_trials="999"), (
        "a longer search is the same"
    )
    assert shared != name(search__storage="journal:x", supernet__epochs="9")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("macs<=1M", ["macs<=1M"]),
        ("[macs<=1M, 1M<=macs<=2M and params<=3M]", ["macs<=1M", "1M<=macs<=2M and params<=3M"]),
        ("latency<=8ms@torch,batch=1", ["latency<=8ms@torch,batch=1"]),
        ("[latency<=8ms@torch,batch=1, macs<=1M]", ["latency<=8ms@torch,batch=1", "macs<=1M"]),
        ("[macs<1M, macs ≤ 2M, macs in 1M..2M,]", ["macs<1M", "macs ≤ 2M", "macs in 1M..2M"]),
    ],
)
def test_lists_of_budgets(text: str, parts: list[str]) -> None:
    assert split_budgets(text) == parts


def test_the_dashboard_shows_the_storage_that_the_run_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that Optuna itself does not know by our words."""
    module, shown = ModuleType("optuna_dashboard"), []
    module.run_server = lambda storage, **where: shown.append(storage)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "optuna_dashboard", module)
    save_run(make_run("tour", {"search.storage": f"journal:{tmp_path / 'log'}"}), tmp_path / "run.yaml")
    assert main(["dashboard", str(tmp_path)]) == 0
    (storage,) = shown
    assert isinstance(storage, JournalStorage)
