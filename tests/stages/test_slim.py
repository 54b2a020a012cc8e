"""`vitnas slim`: a trained network made smaller to a budget, as a run folder that everything else works on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from slim_help import ARCH, digits, slim_words
from stage_help import refused

import vitnas
from vitnas.arch import Arch, Block, Stage
from vitnas.budget import Budget
from vitnas.cli import main
from vitnas.cli.fields import open_run
from vitnas.counting import count
from vitnas.data import EvalBatches, Readings, open_data
from vitnas.errors import UserError
from vitnas.exporting import load_timm
from vitnas.model import Model, build
from vitnas.recipes.slim import slim
from vitnas.records import (
    Allocation,
    ExportRecord,
    Forecast,
    Original,
    Result,
    SlimFront,
    SlimResults,
    Spent,
    Tables,
)
from vitnas.reporting import report
from vitnas.runs import RunFile
from vitnas.searching import Feasibility, TokenClock
from vitnas.searching.latency import LatencyModel
from vitnas.slimming import IMPORTANCE, PredictedDamage, Sensitivity, agreement, ordered, sensitivity
from vitnas.space import AroundConfig
from vitnas.stages import plan_of
from vitnas.stages.claim import begin, opened
from vitnas.stages.full import FullCost
from vitnas.stages.models import Models
from vitnas.stages.run import ExportConfig, SlimConfig
from vitnas.stages.slim import stages
from vitnas.stages.slim.allocate import Allocator, share_out
from vitnas.stages.slim.context import SlimContext
from vitnas.stages.slim.folded import restored
from vitnas.stages.slim.original import load_original, space_around
from vitnas.stages.slim.prepare import _said
from vitnas.train import Engine, Silent, TrainConfig, evaluate


def test_a_network_is_slimmed_to_a_budget(slimmed: Path) -> None:
    """Every file says what the weights beside it do, on images that nothing else used."""
    results, first = SlimResults.read(slimmed), Original.read(slimmed)
    original, chosen, *front = results.rows
    assert (original.role, original.arch_id, original.agreement.top1) == ("original", first.arch_id, 1.0)
    assert chosen.cost.macs <= 180_000 < original.cost.macs
    assert results.met
    assert len(front) >= 5
    assert [row.cost.macs for row in front] == sorted((row.cost.macs for row in front), reverse=True)
    assert len({row.arch_id for row in front}) == len(front)
    assert len(Readings.read(slimmed).readings) == 1
    test = EvalBatches(digits().open_test(slimmed.parent / "log.json"), batch_size=64)
    network = load_timm(original_of(slimmed))
    for row in (chosen, *front):
        model = load_timm(slimmed / row.folder)
        found = agreement(model, network, test)
        assert found.top1 == pytest.approx(row.agreement.top1)
        assert found.tokens == pytest.approx(row.agreement.tokens, abs=1e-6)
        assert evaluate(model, test).accuracy == pytest.approx(row.accuracy)
        assert count(model.arch).macs == row.cost.macs  # type: ignore[arg-type]
    assert chosen.agreement.tokens is not None
    assert chosen.agreement.tokens > 0.9


def original_of(folder: Path) -> Path:
    return Path(Original.read(folder).name)


def test_what_is_smaller_agrees_less_and_the_chosen_is_the_best_that_fits(slimmed: Path) -> None:
    members = SlimFront.read(slimmed).members
    result = Result.read(slimmed / "models" / "chosen")
    met = [member for member in members if member.cost.macs <= 180_000]
    best = min(met, key=lambda member: member.measured)
    assert (result.start, result.arch_id) == (best.folder, best.arch_id)
    assert result.agreement == best.agreement
    assert members[0].measured < members[-1].measured


def test_the_forecast_says_what_each_effort_takes(slimmed: Path) -> None:
    forecast = Forecast.read(slimmed)
    seconds = [row.seconds for row in forecast.efforts]
    assert seconds == sorted(seconds)
    assert (forecast.effort, forecast.asked) == ("fold", True)
    assert forecast.measured["train"] > forecast.measured["forward"] > 0


def test_the_same_command_does_nothing_again(
    original: Path, slimmed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in slimmed.rglob("*") if path.is_file()}
    assert main(slim_words(original, slimmed)) == 0
    assert before == {path: path.stat().st_mtime_ns for path in slimmed.rglob("*") if path.is_file()}


class Stop(BaseException):
    """As a kill: nothing is told."""


@pytest.mark.slow
@pytest.mark.parametrize("file", ["order.json", "sensitivity.json", "allocation.json", "front/02/member.json",
                                  "front.json", "export/latency.json", "models/chosen/result.json", "slimmed.json",
                                  "report.html"])  # fmt: skip
def test_a_run_cut_short_goes_on_to_the_same(
    file: str, original: Path, slimmed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each file is written; weights and choices are then those of a run in one go."""
    save_file = RunFile.save

    def stopping(self: RunFile, path: Path) -> None:
        if str(path).endswith(file):
            raise Stop
        save_file(self, path)

    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(RunFile, "save", stopping)
        patched.setattr("vitnas.stages.slim.stages.tell", lambda folder: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            main(slim_words(original, folder))
    assert not (folder / file).exists()
    assert main(slim_words(original, folder)) == 0
    for path in slimmed.rglob("*.safetensors"):
        assert (folder / path.relative_to(slimmed)).read_bytes() == path.read_bytes(), path
    assert Allocation.read(folder) == Allocation.read(slimmed)
    assert Result.read(folder / "models/chosen").agreement == Result.read(slimmed / "models/chosen").agreement


def test_the_commands_for_run_folders_work_on_it(slimmed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(slimmed)
    assert list(plan_of(run).stages)[:3] == ["train", "sensitivity", "search"]
    for command in ("train", "search", "retrain", "export", "bench", "evaluate", "report"):
        assert main([command, str(slimmed)]) == 0
    assert "chosen" in capsys.readouterr().out


def test_an_arch_of_ones_own_is_trained_anew_not_as_recovery_is(
    slimmed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the rate that new weights need, whatever recovery has."""
    folder = Path(shutil.copytree(slimmed, tmp_path / "run"))
    assert open_run(folder).retrain.train.lr == 1e-4
    learned = list[TrainConfig]()

    def train(self: Models, model: Model, config: TrainConfig, *_: object) -> tuple[Model, Spent]:
        learned.append(config)
        return model.eval(), Spent()

    monkeypatch.setattr(Models, "train", train)
    assert main(["retrain", str(folder), f"arch={folder / 'front' / '01'}", "role=mine"]) == 0
    assert [config.lr for config in learned] == [TrainConfig().lr]
    assert Result.read(folder / "models" / "mine").train["epochs"] == TrainConfig().epochs


def test_further_budgets_come_from_the_same_run(
    slimmed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is sorted or measured anew; a share is of what MODEL costs."""
    folder = tmp_path / "run"
    shutil.copytree(slimmed, folder)
    made = {file: (folder / file).stat().st_mtime_ns for file in ("supernet.safetensors", "sensitivity.json")}
    whole = Original.read(folder).cost
    assert main(["specialize", str(folder), "budget=[macs<=40%, params<=9K]"]) == 0
    said = capsys.readouterr().out
    *_, first, second = SlimFront.read(folder).members
    assert (first.folder, second.folder) == ("front/06", "front/07")
    assert first.cost.macs <= 0.4 * whole.macs
    assert second.cost.params <= 9000
    for member in (first, second):
        assert f"{folder / member.folder}" in said
        assert load_timm(folder / member.folder).arch.id == member.arch_id  # type: ignore[union-attr]
    assert made == {file: (folder / file).stat().st_mtime_ns for file in made}
    assert main(["specialize", str(folder), "budget=macs<=40%"]) == 0
    assert len(SlimFront.read(folder).members) == 7
    assert "latency on torch, of which this run made no table" in refused(
        ["specialize", str(folder), "budget=latency<=1ms@torch"], capsys
    )


def test_one_call_of_a_library(
    original: Path, slimmed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network stays as it is; images without labels are enough, and the same call goes on in its folder."""
    network = load_timm(original)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    images = digits().train.pixels(torch.arange(200))
    assert images is not None
    run, closed = open_run(slimmed), list[bool]()
    monkeypatch.setattr(Engine, "finish", lambda self: closed.append(True))
    done = vitnas.slim(network, images, budget="macs<=50%", effort="fold", folder=tmp_path / "run", run=run)
    model, row = done.model, done.results.rows[1]
    assert count(model.arch).macs <= 0.5 * count(ARCH).macs
    assert row.accuracy is None
    assert row.agreement.top1 is not None
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    again = vitnas.slim(network, images, budget="macs<=50%", effort="fold", folder=tmp_path / "run", run=run)
    assert again.results == done.results
    assert closed == [True, True]


def features_of(images: int, **options: Any) -> Model:
    """What became of a network like DINOv2's, in small: layer scale, registers, no classes."""
    torch.manual_seed(0)
    made = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0}
    network = timm.create_model("vit_small_patch14_reg4_dinov2", **made)
    for block in network.blocks:
        for scale in (block.ls1, block.ls2):
            torch.nn.init.uniform_(scale.gamma, 0.2, 1)
    pixels = torch.randint(0, 256, (images, 3, 16, 16), dtype=torch.uint8)
    run = slim()
    run = replace(run, device="cpu", threads=1, export=ExportConfig(formats=(), latency=()), **options)
    run = replace(run, slim=replace(run.slim, images=images // 2))
    done = vitnas.slim(network, pixels, budget="macs<=60%", effort="fold", run=run)
    assert done.results.rows[1].agreement.top1 is None
    saved = timm.create_model(f"local-dir:{done.folder / 'models' / 'chosen'}", pretrained=True).eval()
    images_BCHW = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        pooled_BD, wanted_BD = saved(images_BCHW), network.eval()(images_BCHW)
        torch.testing.assert_close(pooled_BD, done.model(images_BCHW), rtol=0, atol=0)
        maps = saved.forward_intermediates(images_BCHW, indices=1, intermediates_only=True)
    if pooled_BD.shape == wanted_BD.shape:  # its channels are those of the network's
        assert torch.nn.functional.cosine_similarity(pooled_BD, wanted_BD).mean() > 0.8
    assert [tuple(each.shape[2:]) for each in maps] == [(4, 4)]
    shutil.rmtree(done.folder)
    return done.model


@pytest.mark.slow
def test_features_of_a_backbone_keep_timms_interface() -> None:
    model = features_of(64)
    assert (model.num_classes, model.arch.reg_tokens, model.num_features) == (0, 4, 32)
    assert model.arch.layer_scale


@pytest.mark.slow
def test_a_narrower_embedding_keeps_the_order_of_its_channels() -> None:
    """Channels are sorted by importance inside; what comes out has them as the network has."""
    config = SlimConfig(axes=("embed_dim", "hidden"))
    run = replace(slim(), slim=config)
    assert features_of(64, slim=run.slim).arch.embed_dim <= 32


def test_channels_in_another_order_compute_the_same(generator: torch.Generator) -> None:
    model = build(ARCH, generator=generator).eval()
    images_BCHW = torch.randn(4, 1, 8, 8, generator=generator)
    with torch.no_grad():
        wanted_BY = model(images_BCHW)
        order_D = torch.randperm(24, generator=generator)
        got_BY = restored(model, order_D)(images_BCHW)
        torch.testing.assert_close(got_BY, wanted_BY, rtol=1e-5, atol=1e-5)
        restored(model, torch.argsort(order_D))
        torch.testing.assert_close(model(images_BCHW), wanted_BY, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_latency_budget_is_met_by_the_clock(original: Path, tmp_path: Path) -> None:
    """By files, timed beside the original; each is verified against its weights."""
    folder = tmp_path / "run"
    changes = {"budget": "latency<=0.8x@onnxruntime", "export__formats": "[onnx]", "data__labels": "false"}
    assert main(slim_words(original, folder, **changes)) == 0
    results = SlimResults.read(folder)
    first, chosen, *front = results.rows
    (target,) = first.latency_ms
    assert chosen.latency_ms[target].median_ms <= 0.8 * first.latency_ms[target].median_ms
    assert results.met
    assert chosen.accuracy is None
    for row in front:
        (file,) = ExportRecord.read(folder / row.folder).files.values()
        assert (folder / file.path).exists()
        assert file.max_abs_diff < 1e-4
        assert file.top1_agreement == 1
    allocation = Allocation.read(folder)
    assert allocation.tried
    assert allocation.latency_error[target] >= 0
    assert (folder / "export" / "model.onnx").exists()
    page = report(folder, tmp_path / "page.html").read_text()
    assert "table of latencies off by" in page
    assert "Time" in page


def test_a_latency_that_no_network_reaches_comes_with_the_fastest(slimmed: Path) -> None:
    context, target = SlimContext(open_run(slimmed), slimmed), "onnxruntime,batch=1"
    damage = PredictedDamage(context.space, Sensitivity.read(slimmed))
    table = LatencyModel((0.05, 1.0, 0.0, 0.0, 0.0), (1.0, 1e12, 1.0, 1.0, 1.0), 0.0, 2)
    allocator = Allocator(context.work, damage, context.run.search, {}, {target: table}, TokenClock({}))
    message = (
        rf"meets 'latency<=0.01ms@{target}'; by the table of latencies the fastest takes 0.05ms on {target}\."
    )
    with pytest.raises(UserError, match=message):
        allocator.propose(Budget.parse(f"latency<=0.01ms@{target}"))


def test_a_budget_may_be_another_one_until_networks_are_searched_for(
    original: Path, slimmed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So a budget that no network is found for can be mended in its folder; what was measured of the network stays."""
    folder = Path(shutil.copytree(slimmed, tmp_path / "run"))
    said = refused(slim_words(original, folder, budget="macs<=150K"), capsys)
    assert "holds another run (budget: 'macs<=180K' then, 'macs<=150K' now)" in said
    Allocation.path(folder).unlink()
    kept = [folder / name for name in ("supernet.safetensors", "sensitivity.json", "forecast.json")]
    before = [path.stat().st_mtime_ns for path in kept]
    context = SlimContext(replace(open_run(folder), budget="macs<=150K"), folder)
    begin(context)
    assert open_run(folder).budget == Original.read(folder).budget == "macs<=150K"
    assert Feasibility.read(folder).rows[0].requested == "macs<=150K"
    assert Original.read(folder).notes == ()
    easy = SlimContext(replace(context.run, budget="macs<=1G"), folder)
    assert _said(easy, Original.read(folder).cost) == [
        "MODEL meets macs<=1G as it is, so nothing need go; a smaller budget makes it smaller."
    ]
    assert not Tables.exists(folder)
    assert [path.stat().st_mtime_ns for path in kept] == before


def test_where_each_block_has_one_head_no_heads_are_chosen() -> None:
    block = Block(num_heads=1, head_dim=8, mlp_hidden=32)
    arch = Arch(image_size=8, patch_size=2, stages=(Stage(embed_dim=16, blocks=(block,) * 2),))
    genes = space_around(arch, AroundConfig(), ("heads", "hidden"), "net").genes
    assert {gene.name.split(".")[0] for gene in genes if len(gene.options) > 1} == {"mlp_hidden"}
    with pytest.raises(UserError, match="leaves nothing to choose"):
        space_around(arch, AroundConfig(heads=(0.5, 1.0)), ("heads", "hidden"), "net")


@pytest.mark.parametrize("selector", ["attention", "merge"])
def test_a_block_of_the_last_stage_stays_where_tokens_leave(selector: str) -> None:
    blocks = (Block(num_heads=2, head_dim=8, mlp_hidden=32),) * 2
    stages = (Stage(embed_dim=16, blocks=blocks), Stage(embed_dim=16, blocks=(*blocks, *blocks)))
    arch = Arch(image_size=32, patch_size=2, stages=stages)
    space = space_around(arch, AroundConfig(selector=selector), ("blocks", "tokens"), "net")
    assert {gene.name for gene in space.genes if gene.field == "exists"} == {
        "exists.0.1",
        *(f"exists.1.{n}" for n in (1, 2, 3)),
    }
    assert space.keep_places == (1, 2, 3)


@pytest.mark.parametrize("budget", ["macs<=85%", "macs<=92%"])
def test_a_front_has_five_different_networks(budget: str, original: Path, slimmed: Path) -> None:
    """In a Space of seven sizes too, where the best within one limit is often that within the next."""
    model, context = load_original(str(original)), SlimContext(open_run(slimmed), slimmed)
    space = space_around(model.arch, AroundConfig(), ("heads",), "net")
    images = [x for x, _ in EvalBatches(digits().train.subset(range(64)), batch_size=64)]
    scores = IMPORTANCE["magnitude"](model, images, torch.Generator())
    damage = PredictedDamage(space, sensitivity(ordered(model, space, scores), images))
    allocator = Allocator(context.work, damage, context.run.search, {}, {}, TokenClock({}))
    found = share_out(allocator, Budget.parse(budget).resolved(count(model.arch)), 5)
    chosen = found.places[found.chosen - 1].candidates
    others = [place.candidates[0] for place in found.places if place.candidates is not chosen]
    archs = [*others, *chosen]
    assert len({each.arch_id for each in archs}) == len(archs)


def test_a_share_of_latency_is_of_the_original_timed_beside(
    slimmed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of what it took earlier, when the machine was slower."""
    folder = Path(shutil.copytree(slimmed, tmp_path / "run"))
    shutil.rmtree(folder / "models")
    target, last = "onnxruntime,batch=1", SlimFront.read(folder).members[-1].folder
    context = SlimContext(replace(open_run(folder), budget=f"latency<=0.8x@{target}"), folder)
    cost = replace(count(context.original.arch), latency_ms={target: 1.0})
    FullCost(arch_id=context.original.arch.id, cost=cost).write(folder)
    ms = {"original": 0.5, **{member.folder: 0.45 for member in SlimFront.read(folder).members}, last: 0.3}
    times = {role: {target: SimpleNamespace(median_ms=took)} for role, took in ms.items()}
    monkeypatch.setattr(stages, "timed", lambda _: times)
    stages.choose(context)
    assert Result.read(folder / "models" / "chosen").start == last


def test_images_that_are_open_already_are_held_against_those_of_before(slimmed: Path) -> None:
    run, progress = open_run(slimmed), Silent()
    other = vitnas.data.synthetic(image_size=8, in_chans=1, num_classes=10)
    with pytest.raises(UserError, match="has other images than when"):
        SlimContext(run, slimmed, progress, other).images.data
    assert SlimContext(run, slimmed, progress, open_data(run.data)).images.data.num_classes == 10


def test_an_error_leaves_no_process_group_behind(
    slimmed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = list[Engine]()
    monkeypatch.setattr(Engine, "close", lambda engine: closed.append(engine))

    def fail(joins: bool) -> None:
        with opened(open_run(slimmed), tmp_path, Silent(), joins=joins):
            raise RuntimeError("planted")

    for joins in (False, True):
        with pytest.raises(RuntimeError, match="planted"):
            fail(joins)
    assert len(closed) == 1, "none is made to be closed"
