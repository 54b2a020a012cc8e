"""The loop: what it averages, what it refuses, and that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset
from train_help import Kill, Killed

from vitnas.arch import Arch
from vitnas.data import Augment, Data, EvalBatches, TrainBatches, synthetic
from vitnas.errors import UserError
from vitnas.model import build
from vitnas.sample import Draw, Fixed, Moment, Sandwich, Several, Uniform
from vitnas.space import AutoFormerSpace, autoformer
from vitnas.supernet import Supernet
from vitnas.train import (
    Batch,
    Classification,
    Monitor,
    NonFiniteLossError,
    Task,
    TrainConfig,
    convergence_warning,
    evaluate,
    fit,
    loop,
    metrics,
    step_rng,
)
from vitnas.train.checkpoint import load_checkpoint
from vitnas.train.task import Outputs

CONFIG = TrainConfig(
    epochs=2, lr=1e-3, warmup_epochs=0.5, monitor_every=0, log_every=1, checkpoint_minutes=0, drop_path=0.1
)


@pytest.fixture(scope="module")
def data() -> Data:
    return synthetic(num_classes=4, image_size=16, n=96, seed=0)


@pytest.fixture(scope="module")
def space(data: Data) -> AutoFormerSpace:
    return autoformer(
        "micro",
        image_size=16,
        patch_size=8,
        in_chans=data.in_chans,
        num_classes=4,
        embed_dims=(16, 32),
        depths=(1, 2),
        num_heads=(1, 2),
        mlp_ratios=(1.0, 2.0),
        head_dim=8,
    )


def make(space: AutoFormerSpace, seed: int = 0) -> Supernet:
    return Supernet(space, drop_path=0.1, generator=torch.Generator().manual_seed(seed))


def batches(data: Data, batch_size: int = 16) -> TrainBatches:
    return TrainBatches(data.train, Augment(shift=0.1), batch_size=batch_size, seed=3)


@pytest.mark.parametrize(("ema", "log_every"), [(None, 1), (0.9, 2)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    data: Data, space: AutoFormerSpace, tmp_path: Path, ema: float | None, log_every: int
) -> None:
    config = replace(CONFIG, ema=ema, log_every=log_every)
    augment = Augment(mixup=0.5, label_smoothing=0.1)
    whole = make(space)
    common: dict[str, Any] = {"config": config, "augment": augment, "num_classes": 4}
    want = fit(whole, Classification(), Uniform(space), batches(data), **common, folder=tmp_path / "whole")
    first = make(space)
    common["folder"] = tmp_path / "killed"
    with pytest.raises(Killed):
        fit(first, Classification(), Uniform(space), batches(data), **common, hooks=[Kill(at=5)])
    torch.manual_seed(99)  # whatever happened to the global generator must not matter
    second = make(space, seed=1)  # its weights come from the checkpoint
    got = fit(second, Classification(), Uniform(space), batches(data), **common)
    assert got.steps == want.steps
    assert got.images == want.images == 16 * want.steps, "images before the kill count too"
    for name, value in want.network.state_dict().items():
        torch.testing.assert_close(got.network.state_dict()[name], value, rtol=0, atol=0, msg=name)
    told = [
        [
            replace(line, images_per_s=0)
            for line in metrics.read_lines(tmp_path / name)
            if isinstance(line, metrics.Step)
        ]
        for name in ("whole", "killed")
    ]
    steps = [line.step for line in told[1]]
    assert steps == list(range(log_every, want.steps + 1, log_every)), (
        "lines of the killed part must not stay"
    )
    assert told[0] == told[1], "means over steps before the kill and after it"


def test_a_checkpoint_of_another_run_is_refused(data: Data, space: AutoFormerSpace, tmp_path: Path) -> None:
    def train(config: TrainConfig = CONFIG, **options: Any) -> None:
        sampler = Uniform(space)
        fit(make(space), Classification(), sampler, batches(data), config=config, folder=tmp_path, **options)

    with pytest.raises(Killed):
        train(hooks=[Kill(at=3)])
    with pytest.raises(UserError, match=r"another config \(lr: 0\.001 then, 0\.01 now\)"):
        train(replace(CONFIG, lr=0.01))
    with pytest.raises(UserError, match="another seed"):
        train(seed=1)


def test_a_damaged_checkpoint_is_named(data: Data, space: AutoFormerSpace, tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "train.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"train\.safetensors cannot be read"):
        fit(make(space), Classification(), Uniform(space), batches(data), config=CONFIG, folder=tmp_path)


class Exploding(Task):
    """A Task whose loss becomes no number at a step."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        losses = Classification()(outputs, batch, taught)
        self.calls += 1
        return {"loss": losses["loss"] * (math.nan if self.calls > self.at else 1)}


def test_a_non_finite_loss_stops_before_the_weights_are_touched(data: Data, space: AutoFormerSpace) -> None:
    want, got = make(space), make(space)
    three_steps = replace(CONFIG, schedule="none", warmup_epochs=0)
    with pytest.raises(
        NonFiniteLossError, match=r"loss of Arch d\d+-l\d-\w+ is nan at step 3 \(epoch 0\.\d\)"
    ):
        fit(got, Exploding(at=3), Uniform(space), batches(data), config=three_steps)
    per_epoch = batches(data).steps_per_epoch
    fit(
        want,
        Classification(),
        Uniform(space),
        batches(data),
        config=replace(three_steps, epochs=3 / per_epoch),
    )
    for name, value in want.state_dict().items():
        torch.testing.assert_close(got.state_dict()[name], value, rtol=0, atol=0, msg=name)


def one_step(space: AutoFormerSpace, loader: object, sampler: object, **options: object) -> dict[str, Tensor]:
    """Gradients of one step, read back from plain SGD with rate 1."""
    net = make(space)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    config = TrainConfig(
        epochs=1e-9,
        optimizer="sgd",
        lr=1.0,
        weight_decay=0,
        schedule="none",
        clip_grad=None,
        monitor_every=0,
        **options,
    )
    fit(net.eval(), Classification(), sampler, loader, config=config)  # type: ignore[arg-type]
    return {name: before[name] - value for name, value in net.state_dict().items()}


class Loader:
    """The same batches in order, and endless."""

    def __init__(self, *batches: tuple[Tensor, Tensor]) -> None:
        self.batches, self.steps_per_epoch = batches, len(batches)

    def from_step(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield self.batches[step % len(self.batches)]
            step += 1


@pytest.fixture
def still(space: AutoFormerSpace, monkeypatch: pytest.MonkeyPatch) -> AutoFormerSpace:
    """No stochastic depth, so that slices and whole batches can be compared."""
    monkeypatch.setitem(
        globals(),
        "make",
        lambda space, seed=0: Supernet(space, generator=torch.Generator().manual_seed(seed)),
    )
    return space


class Pair:
    """Two given Archs, each on half of the batch."""

    def __init__(self, *archs: Arch) -> None:
        self.archs = archs

    def draw(self, rng: object) -> list[Draw]:
        n = len(self.archs)
        return [Draw(arch=arch, part=(i, n), weight=1 / n) for i, arch in enumerate(self.archs)]


def test_several_archs_on_slices_give_the_mean_of_their_gradients(still: AutoFormerSpace) -> None:
    torch.manual_seed(0)
    images, targets = torch.randn(8, 3, 16, 16), torch.randint(0, 4, (8,))
    archs = still.smallest(), still.largest()
    got = one_step(still, Loader((images, targets)), Pair(*archs))
    half = [
        one_step(still, Loader((images[i : i + 4], targets[i : i + 4])), Fixed(a))
        for i, a in zip((0, 4), archs, strict=True)
    ]
    for name, value in got.items():
        torch.testing.assert_close(value, (half[0][name] + half[1][name]) / 2, rtol=1e-4, atol=1e-6, msg=name)


def test_accumulated_batches_give_the_gradient_of_their_union(still: AutoFormerSpace) -> None:
    torch.manual_seed(0)
    images, targets = torch.randn(8, 3, 16, 16), torch.randint(0, 4, (8,))
    whole = one_step(still, Loader((images, targets)), Fixed(still.largest()))
    halves = Loader((images[:4], targets[:4]), (images[4:], targets[4:]))
    got = one_step(still, halves, Fixed(still.largest()), accumulate=2)
    for name, value in got.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_clipping_bounds_the_gradient(still: AutoFormerSpace) -> None:
    torch.manual_seed(0)
    loader = Loader((torch.randn(8, 3, 16, 16), torch.randint(0, 4, (8,))))
    net = make(still)
    before = [p.detach().clone() for p in net.parameters()]
    config = TrainConfig(
        epochs=1e-9,
        optimizer="momentum",
        lr=1.0,
        weight_decay=0,
        schedule="none",
        clip_grad=0.01,
        monitor_every=0,
    )
    fit(net, Classification(), Fixed(still.largest()), loader, config=config)
    norm = torch.stack(
        [(p.detach() - q).norm() for p, q in zip(net.parameters(), before, strict=True)]
    ).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_training_learns(data: Data, space: AutoFormerSpace) -> None:
    net = Supernet(space, generator=torch.Generator().manual_seed(0))
    loader = TrainBatches(data.train, Augment(), batch_size=16, seed=0)
    fit(
        net, Classification(), Uniform(space), loader, config=TrainConfig(epochs=15, lr=5e-3, monitor_every=0)
    )
    assert evaluate(net, EvalBatches(data.train, batch_size=64), space.largest()).accuracy > 0.6


def test_a_batch_smaller_than_the_number_of_archs_is_refused(data: Data, space: AutoFormerSpace) -> None:
    loader = TrainBatches(data.train, Augment(), batch_size=2, seed=0)
    with pytest.raises(UserError, match="the batch has 2 images; 3 Archs per step"):
        fit(make(space), Classification(), Several(space, 3), loader, config=CONFIG)


def test_a_batch_that_the_archs_cannot_share_is_refused(data: Data, space: AutoFormerSpace) -> None:
    loader = TrainBatches(data.train, Augment(), batch_size=16, seed=0)
    with pytest.raises(
        UserError, match=r"has 16 images; 3 Archs .* equal shares\. Use a batch_size of 15 or 18"
    ):
        fit(make(space), Classification(), Several(space, 3), loader, config=CONFIG)


def test_distillation_uses_the_largest_archs_logits(space: AutoFormerSpace) -> None:
    seen: list[tuple[Outputs, Outputs]] = []

    class Noting(Classification):
        def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
            seen.append((outputs, taught))
            return super().__call__(outputs, batch, taught)

    images = torch.randn(4, 3, 16, 16)
    loader = Loader((images, torch.randint(0, 4, (4,))))
    network = make(space).eval()
    config = replace(CONFIG, epochs=1e-9, drop_path=0.0)
    want = [network(images, arch) for arch in (space.largest(), space.smallest())]
    fit(network, Noting(), Sandwich(space, num_random=1), loader, config=config)
    assert [set(taught) for _, taught in seen] == [set(), {"logits"}, {"logits"}]
    torch.testing.assert_close([seen[0][0]["logits"], seen[2][0]["logits"]], want)
    for _, taught in seen[1:]:
        torch.testing.assert_close(taught["logits"], seen[0][0]["logits"], rtol=0, atol=0)
        assert not taught["logits"].requires_grad


def test_monitor_and_metrics(data: Data, space: AutoFormerSpace, tmp_path: Path) -> None:
    monitor = Monitor.of(space, EvalBatches(data.holdout, batch_size=64), num_random=2)
    config = replace(CONFIG, monitor_every=1)
    fit(
        make(space),
        Classification(),
        Uniform(space),
        batches(data),
        config=config,
        monitor=monitor,
        folder=tmp_path,
    )
    first, *lines = metrics.read_lines(tmp_path)
    watched = [line for line in lines if isinstance(line, metrics.Monitored)]
    assert [round(line.epoch) for line in watched] == [1, 2]
    assert [a.role for a in watched[0].archs] == ["smallest", "middle", "largest", "random", "random"]
    assert isinstance(first, metrics.Step)
    assert first.losses["loss"] > 0


def test_monitoring_refuses_the_test_split(data: Data, space: AutoFormerSpace, tmp_path: Path) -> None:
    test = data.open_test(tmp_path / "reads.json")
    with pytest.raises(UserError, match="test"):
        Monitor.of(space, EvalBatches(test, batch_size=64))


@pytest.mark.parametrize(
    ("accuracies", "words"),
    [
        ([[0.1, 0.1]], "has not learned"),
        ([[0.3, 0.3], [0.4, 0.4], [0.5, 0.5], [0.6, 0.6]], "has not converged"),
        ([[0.9, 0.5]], "unbalanced"),
        ([[0.9, 0.7]], None),  # of ten images
        ([[0.9, 0.9], [0.9, 0.9], [0.9, 0.9], [0.9, 0.91]], None),
    ],
)
def test_convergence_warning(accuracies: list[list[float]], words: str | None) -> None:
    history = [
        [
            metrics.MonitoredArch(role=role, arch_id="", macs=1, accuracy=accuracy, loss=1, n=10)
            for role, accuracy in zip(("smallest", "largest"), row, strict=True)
        ]
        for row in accuracies
    ]
    warning = convergence_warning(history, num_classes=10)
    assert (warning is None) if words is None else (warning is not None and words in warning)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"ema": 1.5}, "ema is 1.5"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"weight_decay": -1}, "weight_decay is -1"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        TrainConfig(**options)  # type: ignore[arg-type]


def test_unknown_optimizer_and_schedule(data: Data, space: AutoFormerSpace) -> None:
    with pytest.raises(UserError, match=r"optimizer is 'adamv'.*Nearest"):
        fit(
            make(space),
            Classification(),
            Uniform(space),
            batches(data),
            config=replace(CONFIG, optimizer="adamv"),
        )
    with pytest.raises(UserError, match=r"schedule is 'cosin'.*Nearest: 'cosine'"):
        fit(
            make(space),
            Classification(),
            Uniform(space),
            batches(data),
            config=replace(CONFIG, schedule="cosin"),
        )


def test_the_stream_of_archs_is_fixed_by_seed_step_and_rank(space: AutoFormerSpace) -> None:
    uniform = Uniform(space)
    draws = [uniform.draw(step_rng(0, step, rank))[0].arch for step in range(20) for rank in range(2)]
    again = [uniform.draw(step_rng(0, step, rank))[0].arch for step in range(20) for rank in range(2)]
    assert draws == again
    assert draws[::2] != draws[1::2], "ranks draw different Archs"


class SteepTask(Task):
    """A finite loss whose gradient is not: the square root at 0."""

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        losses = Classification()(outputs, batch, taught)
        return {"loss": losses["loss"] + (outputs["logits"] * 0).sum().abs().sqrt()}


@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_a_non_finite_gradient_stops_before_the_weights_are_touched(
    data: Data, space: AutoFormerSpace, clip_grad: float | None
) -> None:
    net = make(space)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(
        NonFiniteLossError, match=r"gradient's norm is nan at step 0 .*although the loss is finite"
    ):
        fit(net, SteepTask(), Uniform(space), batches(data), config=replace(CONFIG, clip_grad=clip_grad))
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, msg=name)


class Counts:
    """A Sampler that counts its own steps and trains the largest Arch from the third on."""

    def __init__(self, space: AutoFormerSpace) -> None:
        self.space, self.count, self.seen = space, torch.zeros(1), []

    def draw(self, rng: object) -> list[Draw]:
        return [Draw(arch=self.space.largest() if self.count > 2 else self.space.smallest())]

    def before(self, moment: Moment) -> dict[str, object]:
        self.count += 1
        self.seen.append((moment.step, moment.steps, moment.epoch))
        assert isinstance(moment.optimizer, torch.optim.AdamW)
        return {"count": float(self.count)}

    def tensors(self) -> dict[str, Tensor]:
        return {"count": self.count}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.count.copy_(tensors["count"])


def test_a_hooks_state_is_in_the_checkpoint(data: Data, space: AutoFormerSpace, tmp_path: Path) -> None:
    def run(folder: Path, stop: int | None) -> tuple[Counts, Supernet]:
        sampler = Counts(space)
        network = Supernet(space, generator=torch.Generator().manual_seed(0))
        loader = TrainBatches(data.train, Augment(), batch_size=16, seed=0)
        config = TrainConfig(
            epochs=6 / loader.steps_per_epoch, checkpoint_minutes=0, warmup_epochs=0, log_every=1
        )
        hooks = [] if stop is None else [Kill(stop)]
        fit(network, Classification(), sampler, loader, config=config, folder=folder, hooks=hooks)
        return sampler, network

    whole, network = run(tmp_path / "whole", None)
    assert whole.seen[0][:2] == (0, 6)
    with pytest.raises(Killed):
        run(tmp_path / "cut", 4)
    resumed, again = run(tmp_path / "cut", None)
    assert [step for step, *_ in resumed.seen] == [4, 5]
    assert float(resumed.count) == float(whole.count) == 6
    for name, value in network.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    lines = [
        line.said["count"]
        for line in metrics.read_lines(tmp_path / "cut")
        if isinstance(line, metrics.Hooked)
    ]
    assert lines == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are read as seldom as on an accelerator."""
    monkeypatch.setattr(loop, "steps_between_readings", lambda device: 4)


def checkpoint_of(folder: Path) -> tuple[dict[str, Tensor], int]:
    parts, meta = load_checkpoint(folder / "checkpoints" / "train.safetensors")
    return parts["network"], meta["step"]


@pytest.mark.parametrize(("minutes", "calls"), [(0, 2), (9, 4)])
def test_an_accelerator_hears_of_it_steps_later_and_writes_nothing_between(
    data: Data, space: AutoFormerSpace, tmp_path: Path, accelerator: None, minutes: float, calls: int
) -> None:
    task, config = Exploding(at=1), replace(CONFIG, checkpoint_minutes=minutes, log_every=100)
    with pytest.raises(
        NonFiniteLossError, match=r"is nan at step 1 .* What is on disk is from before this step"
    ):
        fit(make(space), task, Uniform(space), batches(data), config=config, folder=tmp_path)
    assert task.calls == calls
    if not minutes:
        weights, step = checkpoint_of(tmp_path)
        assert step == 1
        assert all(bool(value.isfinite().all()) for value in weights.values())


class Waits(TorchFunctionMode):
    """Counts what a host waits for: numbers read from tensors."""

    reads = frozenset(
        {Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.cpu}
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func in self.reads
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_no_step_waits_for_the_device(
    data: Data, space: AutoFormerSpace, accelerator: None, clip_grad: float | None
) -> None:
    """The losses of 4 steps with 4 Archs each come in one transfer, the last gradient's norm in another."""
    found = []
    for steps in (4, 12):
        epochs = steps / batches(data).steps_per_epoch
        config = replace(CONFIG, epochs=epochs, log_every=100, checkpoint_minutes=9, clip_grad=clip_grad)
        with Waits() as waits:
            fit(make(space), Classification(), Sandwich(space), batches(data), config=config)
        found.append(waits.count)
    assert found[1] - found[0] == 2 * 2, "eight more steps are two more readings"


def test_weights_that_a_finite_gradient_ruins_are_not_kept(
    data: Data, space: AutoFormerSpace, tmp_path: Path
) -> None:
    config = TrainConfig(
        epochs=1e-9, optimizer="sgd", lr=1e38, weight_decay=1e6, warmup_epochs=0, schedule="none"
    )
    with pytest.raises(NonFiniteLossError, match=r"\w+ is not finite after step 1; training stops"):
        fit(make(space), Classification(), Uniform(space), batches(data), config=config)
    config = replace(config, epochs=1, checkpoint_minutes=0)
    with pytest.raises(NonFiniteLossError, match="is not finite after step 1; training stops"):
        fit(make(space), Classification(), Uniform(space), batches(data), config=config, folder=tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_drop_path_is_set_by_the_training(data: Data, space: AutoFormerSpace) -> None:
    config = replace(CONFIG, epochs=1e-9, drop_path=0.4)
    net, model = Supernet(space, drop_path=0.1), build(space.largest())
    for network, sampler in ((net, Uniform(space)), (model, Fixed())):
        fit(network, Classification(), sampler, batches(data), config=config)
    skeleton = net.subnet(space.largest()).skeleton
    for network in (skeleton, model):
        assert [getattr(block.drop_path2, "drop_prob", 0.0) for block in network.blocks] == [0.0, 0.4]
    fit(model, Classification(), Fixed(), batches(data), config=replace(config, drop_path=None))
    assert model.blocks[1].drop_path1.drop_prob == 0.4, "None leaves it"
    fit(model, Classification(), Fixed(), batches(data), config=replace(config, drop_path=0.0))
    assert not hasattr(model.blocks[1].drop_path1, "drop_prob")
    with pytest.raises(UserError, match=r"drop_path is 0\.4; training sets it in a Model or a Supernet"):
        fit(nn.Linear(2, 2), Classification(), Fixed(), batches(data), config=config)


def test_a_model_is_monitored_by_itself(data: Data, space: AutoFormerSpace, tmp_path: Path) -> None:
    model, holdout = build(space.largest()), EvalBatches(data.holdout, batch_size=64)
    monitor = Monitor((("model", None),), holdout)
    config = replace(CONFIG, monitor_every=1)
    fitted = fit(
        model, Classification(), Fixed(), batches(data), config=config, monitor=monitor, folder=tmp_path
    )
    lines = [line for line in metrics.read_lines(tmp_path) if isinstance(line, metrics.Monitored)]
    assert [(line.epoch, line.archs[0].role, line.archs[0].arch_id) for line in lines] == [
        (1.0, "model", model.arch.id),
        (2.0, "model", model.arch.id),
    ]
    assert lines[-1].archs[0].accuracy == evaluate(model, holdout).accuracy
    assert fitted.warning is None, "of a Supernet only"


def test_mixing_leaves_an_odd_image_out(space: AutoFormerSpace) -> None:
    torch.manual_seed(0)
    images, targets = torch.randn(19, 3, 16, 16), torch.randint(0, 4, (19,))
    sizes: list[int] = []

    class Noting(Classification):
        def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
            sizes.append(len(batch))
            return super().__call__(outputs, batch, taught)

    def train(batch_size: int) -> None:
        loader = DataLoader(TensorDataset(images, targets), batch_size=batch_size)
        config = replace(CONFIG, epochs=1)
        options: dict[str, Any] = {"augment": Augment(mixup=0.8), "num_classes": 4, "config": config}
        fit(build(space.smallest()), Noting(), Fixed(), loader, **options)

    train(8)
    assert sizes == [8, 8, 2]
    sizes.clear()
    train(6)
    assert sizes == [6, 6, 6, 1], "a single image stays as it is"
    with pytest.raises(UserError, match=r"batch_size is 7; .* so it must be even\. Use 6"):
        train(7)


def test_sums_become_float64_on_the_cpu(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    """Apple's GPUs have none."""
    on_cpu, cpu, double = list[int](), torch.Tensor.cpu, torch.Tensor.double

    def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
        on_cpu.append(id(moved := cpu(tensor).clone()))
        held.append(moved)
        return moved

    def to_double(tensor: torch.Tensor) -> torch.Tensor:
        assert id(tensor) in on_cpu, "float64 on the device"
        return double(tensor)

    held: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "cpu", to_cpu)
    monkeypatch.setattr(torch.Tensor, "double", to_double)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    targets = torch.tensor([0, 1, 2, 0])
    assert evaluate(network, [(torch.randn(4, 1, 2, 2, generator=generator), targets)]).n == 4
