"""Teachers: what they see, what stays as it was, what is refused before training; averages; several views."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional
from train_help import Kill, Killed

from vitnas.data import Augment, Data, TrainBatches, synthetic
from vitnas.errors import UserError
from vitnas.exporting import load_timm, save_timm
from vitnas.model import Model, build
from vitnas.sample import Draw, Fixed, Sampler, Sandwich, Several, Uniform
from vitnas.space import autoformer
from vitnas.supernet import Supernet
from vitnas.train import (
    AverageTeacher,
    Batch,
    Classification,
    Hard,
    Soft,
    Task,
    Teacher,
    TokenMixup,
    TrainConfig,
    cosine,
    fit,
)
from vitnas.train.task import Outputs, read_views
from vitnas.train.teacher import Pixels, settled_task

SPACE = autoformer(
    "micro", image_size=16, patch_size=8, num_classes=4, embed_dims=(16, 32), depths=(1, 2), head_dim=8
)
CONFIG = TrainConfig(epochs=1, lr=1e-2, warmup_epochs=0, monitor_every=0, log_every=1)
ONE_STEP = replace(CONFIG, epochs=1e-9)


@pytest.fixture(scope="module")
def data() -> Data:
    return synthetic(num_classes=4, image_size=16, n=96, seed=0)


def batches(data: Data) -> TrainBatches:
    return TrainBatches(data.train, Augment(), batch_size=16, seed=0)


def student(seed: int = 0) -> Model:
    return build(SPACE.smallest(), generator=torch.Generator().manual_seed(seed))


def seen_by(network: nn.Module) -> list[Tensor]:
    """What `network` is given from now on."""
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    return seen


def timm_vit(**cfg: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", pretrained_cfg_overlay=cfg, **sizes)


@pytest.mark.parametrize("size", [32, 16])
def test_a_teacher_is_given_the_pixels_that_it_was_made_for(data: Data, size: int) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    network = timm_vit(mean=mean, std=std, input_size=(3, size, size))
    if size == 16:
        network.set_input_size(img_size=16)
    seen, images = seen_by(network), next(batches(data).from_step(0))[0]
    fit(student(), Soft(), Fixed(), batches(data), config=ONE_STEP, teacher=Teacher(network))
    raw = images * torch.tensor(data.std).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1)
    want = (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    if size != 16:
        want = functional.interpolate(want, size=(size, size), mode="bicubic", antialias=True)
    assert data.mean != mean
    torch.testing.assert_close(seen, [want], rtol=1e-5, atol=1e-5)


def test_images_of_any_type_are_renormalised_in_their_own() -> None:
    """Also where the same teacher has seen another type before."""
    given = Pixels((0.1, 0.2, 0.3), (0.7, 0.8, 0.9)), Pixels((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    teacher, images = Teacher(student(), pixels=given[1]), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    teacher.see(given[0])
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        here = images.to(dtype)
        old_mean, old_std, mean, std = (
            here.new_tensor(values).view(3, 1, 1) for each in given for values in (each.mean, each.std)
        )
        want = (here * old_std + old_mean - mean) / std
        torch.testing.assert_close(teacher.convert(here), want, rtol=0, atol=0)


def test_a_saved_model_of_the_same_images_is_given_them_unchanged(data: Data, tmp_path: Path) -> None:
    save_timm(student(1), tmp_path, data_config={"mean": data.mean, "std": data.std})
    # Of the second nobody said how its images are normalised.
    for network in (load_timm(tmp_path), student(1)):
        seen, images = seen_by(network), next(batches(data).from_step(0))[0]
        fit(student(), Soft(), Fixed(), batches(data), config=ONE_STEP, teacher=Teacher(network))
        torch.testing.assert_close(seen, [images], rtol=0, atol=0)


def test_without_a_loader_that_knows_the_students_description_counts() -> None:
    torch.manual_seed(0)
    learner, network = timm_vit(), timm_vit(mean=(0.1,) * 3, std=(1.0,) * 3)
    images, seen = torch.randn(4, 3, 32, 32), seen_by(network)
    network.pretrained_cfg["input_size"] = learner.pretrained_cfg["input_size"] = (3, 32, 32)
    loader = [(images, torch.arange(4))]
    fit(learner, Soft(), Fixed(), loader, config=ONE_STEP, teacher=Teacher(network))
    torch.testing.assert_close(seen, [images * 0.5 + 0.5 - 0.1])


def test_a_teacher_stays_as_it_was(data: Data) -> None:
    network = timm_vit(input_size=(3, 32, 32)).train()
    network.blocks[0].eval()
    before = copy.deepcopy(network)
    modes: list[bool] = []
    network.register_forward_pre_hook(
        lambda module, given: modes.append(module.training or torch.is_grad_enabled())
    )
    fit(student(), Soft(), Fixed(), batches(data), config=CONFIG, teacher=Teacher(network))
    assert modes == [False] * batches(data).steps_per_epoch
    assert [m.training for m in network.modules()] == [m.training for m in before.modules()]
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    torch.testing.assert_close(dict(network.state_dict()), dict(before.state_dict()), rtol=0, atol=0)


class Noting(Classification):
    """Notes what it was given."""

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        GIVEN.append((outputs, batch, taught))
        return super().__call__(outputs, batch, taught)


GIVEN: list[tuple[Outputs, Batch, Outputs]] = []


@pytest.mark.parametrize("kind", [Several, Sandwich])
def test_one_answer_is_shared_by_all_archs_of_a_step(data: Data, kind: Any) -> None:
    GIVEN.clear()
    network = student(1)
    seen = seen_by(network)
    sampler = kind(SPACE, 2)
    net = Supernet(SPACE, generator=torch.Generator().manual_seed(0))
    fit(net, Noting(), sampler, batches(data), config=ONE_STEP, teacher=Teacher(network))
    assert [len(images) for images in seen] == [16]
    for _, batch, taught in GIVEN:
        torch.testing.assert_close(taught["logits"], network.eval()(batch.images_BCHW))


@pytest.mark.parametrize(
    ("task", "teacher", "words"),
    [
        (Hard(), None, r"Hard learns from a teacher's logits and there is none"),
        (TokenMixup(num_classes=4, grid=(2, 2)), "same", "TokenMixup learns nothing from a teacher"),
        (Soft(), "grey", "takes images of 1 channels, the student's have 3; both must see the same"),
        (Soft(), "classes", "the teacher has 7 classes, the network 4"),
        ("tokns", "same", r"the output 'tokns' is wanted; .*Nearest: 'tokens'"),
        ("head_dist", "same", "the output 'head_dist' is wanted"),
    ],
)
def test_what_cannot_be_taught_is_refused_before_training(
    data: Data, task: Any, teacher: str | None, words: str, tmp_path: Path
) -> None:
    networks = {
        "same": student(1),
        "grey": timm.create_model("resnet10t", in_chans=1, num_classes=4),
        "classes": timm.create_model("resnet10t", num_classes=7),
    }
    if isinstance(task, str):
        task = Wanting(task)
    learner = student()
    before = copy.deepcopy(learner.state_dict())
    taught_by = None if teacher is None else Teacher(networks[teacher])
    with pytest.raises(UserError, match=words):
        fit(learner, task, Fixed(), batches(data), config=CONFIG, teacher=taught_by, folder=tmp_path)
    torch.testing.assert_close(learner.state_dict(), before, rtol=0, atol=0)


def test_what_no_arch_of_a_supernet_gives_is_refused_before_training(data: Data) -> None:
    """What some Arch gives may be wanted: the last block, or the places where any keeps fewer patches."""
    space = replace(SPACE, keep=(1.0, 0.5), keep_places=(1,))
    learner, drawn = Supernet(space), []

    class Drawing(Uniform):
        def draw(self, rng: Any) -> list[Draw]:
            drawn.append(rng)
            return super().draw(rng)

    def train(*wants: str) -> None:
        task = Classification()
        object.__setattr__(task, "wants", ("logits", *wants))
        fit(learner, task, Drawing(space), batches(data), config=ONE_STEP)

    for name, words in [
        ("blocks.2", "blocks.0 to blocks.1"),
        ("places.0", "keep, logits"),
        ("tokns", "'tokens'"),
    ]:
        with pytest.raises(UserError, match=f"the output {name!r} is wanted; .*{words}"):
            train(name)
    assert not drawn
    train("blocks.0", "blocks.1?", "places.1?", "keep?")
    assert drawn


class Wanting(Soft):
    """Wants something else of its teacher."""

    def __init__(self, name: str) -> None:
        super().__init__()
        object.__setattr__(self, "wants_taught", (name,))


def test_a_supernet_teaches_as_an_arch_that_is_given() -> None:
    largest = SPACE.largest()
    for teacher, want, message in [
        (Teacher(Supernet(SPACE)), "logits", "Supernet teaches as one of its Archs.*Give arch"),
        (Teacher(build(largest), arch=largest), "logits", "Leave out arch"),
        (AverageTeacher(Supernet(SPACE), arch=largest), "token", "'token' is wanted.*Nearest: 'tokens'"),
    ]:
        with pytest.raises(UserError, match=message):
            settled_task(Wanting(want), student(), teacher, None, lambda: (3, 16, 16))


def test_an_averaging_teacher_follows_its_schedule(data: Data) -> None:
    learner = student()
    teacher = AverageTeacher(learner, cosine(0.5, 1.0))
    want = {name: value.clone() for name, value in learner.state_dict().items()}
    steps: list[int] = []

    class Following(AverageTeacher):
        def after(self, step: int, steps_: int, network: nn.Module) -> None:
            super().after(step, steps_, network)
            steps.append(step)
            share = 1.0 - 0.25 * (1 + float(torch.cos(torch.tensor(torch.pi * step / steps_))))
            for name, value in network.state_dict().items():
                want[name] = share * want[name] + (1 - share) * value

    teacher.__class__ = Following
    fit(learner, Soft(), Fixed(), batches(data), config=CONFIG, teacher=teacher)
    assert steps == [*range(1, batches(data).steps_per_epoch + 1)]
    moved = teacher.network.state_dict()
    torch.testing.assert_close(dict(moved), want)
    assert not torch.equal(moved["head.weight"], learner.state_dict()["head.weight"])


@pytest.mark.parametrize("arch", [None, "supernet"])
def test_a_resumed_average_equals_an_uninterrupted_one(data: Data, tmp_path: Path, arch: str | None) -> None:
    config = replace(CONFIG, checkpoint_minutes=0, ema=0.9)

    def run(folder: Path | None, seed: int, *hooks: Kill) -> tuple[nn.Module, AverageTeacher]:
        learner: nn.Module
        sampler: Sampler
        if arch is None:
            learner, sampler = student(seed), Fixed()
            teacher = AverageTeacher(learner, cosine(0.9))
        else:
            learner, sampler = Supernet(SPACE, generator=torch.Generator().manual_seed(seed)), Sandwich(SPACE)
            teacher = AverageTeacher(learner, 0.8, arch=SPACE.largest())
        options: dict[str, Any] = {"config": config, "teacher": teacher, "folder": folder, "hooks": hooks}
        return fit(learner, Classification(), sampler, batches(data), **options).network, teacher

    whole, average = run(None, 0)
    with pytest.raises(Killed):
        run(tmp_path, 0, Kill(at=2))
    resumed, again = run(tmp_path, 1)
    torch.testing.assert_close(dict(resumed.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)
    states = dict(again.network.state_dict()), dict(average.network.state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


class Consistency(Task):
    """Both views shall look alike: the smaller's features as the average's of the larger, and the larger's class."""

    wants = ("logits", "views.1.pooled", "views.2.pooled")
    wants_taught = ("pooled",)

    def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
        assert set(outputs) == {*self.wants}
        assert [view.shape[-1] for view in batch.views] == [64, 32, 32]
        VIEWS.append(batch.views)
        far = sum(functional.mse_loss(outputs[f"views.{v}.pooled"], taught["pooled"]) for v in (1, 2))
        ce = functional.cross_entropy(outputs["logits"], batch.targets)
        return {"loss": ce + far, "ce": ce, "far": torch.as_tensor(far)}


VIEWS: list[tuple[Tensor, ...]] = []


COLOURS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, 1]])


class Crops:
    """Whole pictures and two corners of each."""

    steps_per_epoch = 8

    def from_step(self, step: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        generator = torch.Generator().manual_seed(step)
        while True:
            targets = torch.arange(8) % 4
            whole = torch.randn(8, 3, 64, 64, generator=generator) * 0.3 + COLOURS[targets][:, :, None, None]
            yield [whole, whole[..., :32, :32], whole[..., 32:, 32:]], targets


def convnext() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=4)


def test_several_views_of_a_batch_train_together(tmp_path: Path) -> None:
    """The student sees all views, the teacher the first; views of one size run as one batch."""
    VIEWS.clear()
    learner = convnext()
    teacher = AverageTeacher(learner, 0.9)
    given, taught = seen_by(learner), seen_by(teacher.network.stem)  # type: ignore[arg-type]
    stem = seen_by(learner.stem)  # type: ignore[arg-type]
    fit(
        learner,
        Consistency(),
        Fixed(),
        Crops(),
        config=replace(CONFIG, epochs=4),
        teacher=teacher,
        folder=tmp_path,
    )
    assert len(VIEWS) == 32
    assert [tuple(images.shape) for images in stem[:2]] == [(8, 3, 64, 64), (16, 3, 32, 32)]
    assert [tuple(images.shape) for images in taught[:2]] == [(8, 3, 64, 64)] * 2
    torch.testing.assert_close(stem[1], torch.cat(VIEWS[0][1:]), rtol=0, atol=0)
    torch.testing.assert_close(taught[0], VIEWS[0][0], rtol=0, atol=0)
    assert len(given) == 32, "only the first view's logits were wanted as a whole"
    images, targets = next(Crops().from_step(100))
    assert float((learner.eval()(images[0]).argmax(-1) == targets).float().mean()) > 0.9


def test_outputs_of_views_are_those_of_each_alone() -> None:
    views, network = next(Crops().from_step(0))[0], convnext().eval()
    # Alike, so that they run together.
    pairs = [(view, name) for view in (1, 2) for name in ("logits", "tokens")]
    want = [
        "logits",
        *(f"views.{view}.{name}" for view, name in pairs),
        "views.0.pooled",
        "views.0.head_dist?",
    ]
    found = read_views(network, views, want)
    assert {*found} == {name.removesuffix("?") for name in want[:-1]}
    alone = [read_views(network, [view], ("logits", "tokens", "pooled")) for view in views]
    torch.testing.assert_close(found["logits"], alone[0]["logits"])
    torch.testing.assert_close(found["views.0.pooled"], alone[0]["pooled"])
    for view, name in pairs:
        torch.testing.assert_close(found[f"views.{view}.{name}"], alone[view][name])


def test_views_that_are_not_there_are_refused(data: Data) -> None:
    class Third(Classification):
        wants = ("logits", "views.2.logits")

    with pytest.raises(UserError, match="wants an output of view 2; the batches have 1"):
        fit(student(), Third(), Fixed(), batches(data), config=CONFIG)
    with pytest.raises(UserError, match="the batches have 3 views; mixup and cutmix mix single images"):
        fit(convnext(), Noting(), Fixed(), Crops(), config=CONFIG, augment=Augment(mixup=0.5), num_classes=4)


def test_a_part_of_a_batch_has_all_views() -> None:
    views = torch.arange(8.0).view(4, 2), torch.arange(4.0).view(4, 1)
    part = Batch(views, torch.arange(4), torch.arange(4)).part(slice(1, 3))
    torch.testing.assert_close(part.views, (views[0][1:3], views[1][1:3]))
    assert len(part) == 2
    assert part.patch_targets is not None
    assert part.patch_targets.tolist() == part.targets.tolist() == [1, 2]


def test_a_network_of_timm_that_was_set_to_another_size_takes_that() -> None:
    network = timm.create_model("test_vit", num_classes=4)
    assert Pixels.of(network).size == (160, 160)
    network.set_input_size(img_size=(64, 96))
    assert Pixels.of(network).size == (64, 96)
