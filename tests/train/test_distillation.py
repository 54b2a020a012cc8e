"""Losses from a teacher: what each is, what they train themselves, and with what they do not go together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from timm.task import LogitDistillationTask, TokenDistillationTask
from torch import Tensor, nn
from torch.nn import functional
from train_help import Kill, Killed

from vitnas.data import Augment, Data, TrainBatches, synthetic
from vitnas.errors import UserError
from vitnas.model import Model, build
from vitnas.sample import Fixed, Several
from vitnas.space import autoformer
from vitnas.supernet import Supernet
from vitnas.train import (
    Batch,
    Classification,
    Distillation,
    Features,
    Hard,
    Manifold,
    Soft,
    Task,
    Teacher,
    Tokens,
    TrainConfig,
    fit,
)
from vitnas.train.gives import Gives, split_tokens
from vitnas.train.losses.pairing import resampled
from vitnas.train.task import read_views
from vitnas.train.teacher import settled_task

SPACE = autoformer(
    "micro", image_size=16, patch_size=8, num_classes=4, embed_dims=(16, 32), depths=(1, 2), head_dim=8
)
CONFIG = TrainConfig(epochs=1, lr=1e-2, warmup_epochs=0, monitor_every=0, log_every=1, checkpoint_minutes=0)
LABELS = Classification()


@pytest.fixture(scope="module")
def data() -> Data:
    return synthetic(num_classes=4, image_size=16, n=64, seed=0)


def batches(data: Data) -> TrainBatches:
    return TrainBatches(data.train, Augment(), batch_size=16, seed=0)


def student(seed: int = 0, **fields: Any) -> Model:
    arch = replace(SPACE.smallest(), **fields)
    return build(arch, generator=torch.Generator().manual_seed(seed))


def vit(name: str = "vit_tiny_patch16_224", **fields: Any) -> Any:
    torch.manual_seed(1)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 4}
    cfg = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return timm.create_model(name, **{**sizes, **fields}, pretrained_cfg_overlay=cfg).eval()


def met(task: Task, network: nn.Module, teacher: nn.Module, size: int = 16) -> tuple[Task, Teacher]:
    taught_by = Teacher(teacher.eval())
    return settled_task(task, network, taught_by, None, lambda: (3, size, size)), taught_by


def losses_of(
    task: Task, network: nn.Module, teacher: nn.Module, images: Tensor, targets: Tensor | None = None
) -> dict[str, Tensor]:
    task, taught_by = met(task, network, teacher, images.shape[-1])
    outputs = read_views(network, [images], task.wants)
    none = torch.zeros(len(images), 0)
    return task(
        outputs,
        Batch((images,), none if targets is None else targets),
        taught_by.answer([images], task.wants_taught),
    )


def test_the_loss_on_logits_is_that_of_timms_task() -> None:
    """Values and gradients. timm's owns its forward pass and one network, so it cannot train a Supernet."""
    network, teacher = vit(), vit(embed_dim=32)
    images, targets = torch.randn(6, 3, 16, 16), torch.arange(6) % 4
    mine = Distillation(losses={"soft": (Soft(temperature=3.0), 0.7)}, labels=LABELS, label_weight=0.4)
    theirs = LogitDistillationTask(
        network,
        teacher,
        nn.CrossEntropyLoss(),
        distill_loss_weight=0.7,
        task_loss_weight=0.4,
        temperature=3.0,
        verbose=False,
    )
    same_losses(network, losses_of(mine, network, teacher, images, targets), theirs(images, targets))


@pytest.mark.parametrize(("task", "kind"), [(Soft(temperature=3.0), "soft"), (Hard(), "hard")])
def test_the_losses_by_a_distillation_token_are_those_of_timms_task(task: Task, kind: str) -> None:
    """The class token's head learns the labels; without labels, both together learn from the teacher."""
    network, teacher = vit(name="deit_tiny_distilled_patch16_224"), vit(embed_dim=32)
    images, targets = torch.randn(6, 3, 16, 16), torch.arange(6) % 4
    mine = Distillation(losses={kind: (task, 0.7)}, labels=LABELS, label_weight=0.4)
    found = losses_of(mine, network, teacher, images, targets)
    alone = losses_of(task, network, teacher, images)["loss"]
    torch.testing.assert_close(
        alone,
        task({"logits": network(images)}, Batch((images,), targets), {"logits": teacher(images)})["loss"],
    )
    theirs = TokenDistillationTask(
        network,
        teacher,
        nn.CrossEntropyLoss(),
        distill_type=kind,
        distill_loss_weight=0.7,
        task_loss_weight=0.4,
        temperature=3.0,
        verbose=False,
    )
    network.train()  # in evaluation its answer is one, not two
    same_losses(network, found, theirs(images, targets))


def same_losses(network: nn.Module, *losses: dict[str, Tensor]) -> None:
    """Values, and the gradients that they give `network`."""
    found = []
    for each in losses:
        network.zero_grad()
        each["loss"].backward()
        found.append((each["loss"], [p.grad.clone() for p in network.parameters() if p.grad is not None]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_a_lift_takes_the_first_columns_for_narrower_archs() -> None:
    """Written out for one image: whitened teacher, cosine and smooth-L1, class token and patches, mean of both."""
    supernet, teacher = Supernet(SPACE), vit()
    task, taught_by = met(Features(), supernet, teacher)
    lift = task.own["tokens"]  # type: ignore[index]
    assert lift.weight.shape == (24, 32)
    images = torch.randn(2, 3, 16, 16)
    theirs = functional.layer_norm(teacher.forward_features(images), (24,))
    for arch in (SPACE.smallest(), SPACE.largest()):
        outputs = read_views(supernet, [images], task.wants, arch=arch)
        mine = outputs["tokens"] @ lift.weight[:, : arch.embed_dim].T + lift.bias
        far = 0.9 * (1 - (functional.normalize(mine, dim=-1) * functional.normalize(theirs, dim=-1)).sum(-1))
        far = far + 0.1 * functional.smooth_l1_loss(mine, theirs, reduction="none").mean(-1)
        loss = task(
            outputs, Batch((images,), torch.zeros(2, 0)), taught_by.answer([images], task.wants_taught)
        )
        torch.testing.assert_close(loss["loss"], (far[:, 0].mean() + far[:, 1:].mean()) / 2)
        supernet.zero_grad(set_to_none=True)
        task.own.zero_grad(set_to_none=True)  # type: ignore[union-attr]
        loss["loss"].backward()
        assert lift.weight.grad[:, : arch.embed_dim].any(0).all()
        assert not lift.weight.grad[:, arch.embed_dim :].any()


def test_pairs_of_blocks_are_those_that_an_arch_has() -> None:
    supernet, teacher = Supernet(SPACE), vit()
    task, taught_by = met(Features(blocks=((1, 0), (-1, -1))), supernet, teacher)
    images = torch.randn(2, 3, 16, 16)
    taught = taught_by.answer([images], task.wants_taught)
    assert set(taught) == {"blocks.0", "blocks.2"}
    for arch, lifts in ((SPACE.smallest(), {"-1:-1"}), (SPACE.largest(), {"1:0", "-1:-1"})):
        assert arch.depth == len(lifts)
        task.own.zero_grad(set_to_none=True)  # type: ignore[union-attr]
        outputs = read_views(supernet, [images], task.wants, arch=arch)
        task(outputs, Batch((images,), torch.zeros(2, 0)), taught)["loss"].backward()
        used = {n.rpartition(".")[0] for n, p in task.own.named_parameters() if p.grad is not None}  # type: ignore[union-attr]
        assert used == lifts


def learned(data: Data, task: Task, supernet: bool, folder: Path | None, seed: int, *hooks: Any) -> nn.Module:
    learner: nn.Module = (
        Supernet(SPACE, generator=torch.Generator().manual_seed(seed)) if supernet else student(seed)
    )
    sampler = Several(SPACE, 2) if supernet else Fixed()
    fit(learner, task, sampler, batches(data), config=CONFIG, teacher=Teacher(vit(num_classes=7)), folder=folder,
        hooks=hooks, seed=3)  # fmt: skip
    return learner


@pytest.mark.parametrize("supernet", [False, True])
def test_a_resumed_training_of_lifts_equals_an_uninterrupted_one(
    data: Data, tmp_path: Path, supernet: bool
) -> None:
    """Bit for bit, from a teacher of other classes; the lifts are in the checkpoint and not in the result."""
    losses = {"features": (Features(blocks=((-1, 1),)), 2.0), "manifold": (Manifold(num_random=8), 3.0)}
    task = Distillation(losses=losses, labels=LABELS)
    whole = learned(data, task, supernet, None, 0)
    with pytest.raises(Killed):
        learned(data, task, supernet, tmp_path, 0, Kill(at=2))
    with safe_open(tmp_path / "checkpoints" / "train.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.startswith("task/")]
        assert names == ["task/features.-1:1.bias", "task/features.-1:1.weight"]
    again = learned(data, task, supernet, tmp_path, 1)
    torch.testing.assert_close(dict(again.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)
    assert set(again.state_dict()) == set((Supernet(SPACE) if supernet else student()).state_dict())


def test_lifts_learn(data: Data) -> None:
    """They move as the network does, weights decayed and biases not, and the features come nearer."""
    seen: list[Any] = []

    class Looking:
        def before(self, moment: Any) -> None:
            seen.append(
                [[p.detach().clone() for p in group["params"]] for group in moment.optimizer.param_groups]
            )
            decays.append([group["weight_decay"] for group in moment.optimizer.param_groups])

        def tensors(self) -> dict[str, Tensor]:
            return {}

        def restore(self, tensors: Any) -> None:
            """Nothing."""

    decays: list[Any] = []
    learned(data, Features(), False, None, 0, Looking())
    assert [len(group) for group in seen[0][-2:]] == [1, 1]
    assert sorted(decays[0][-2:]) == [0.0, CONFIG.weight_decay]
    for group in (-1, -2):
        assert not torch.equal(seen[0][group][0], seen[1][group][0])


def test_without_labels_images_alone_are_learned_from(data: Data) -> None:
    """Images without labels give (B, 0) targets."""
    images = torch.randn(16, 3, 16, 16)
    loader = [(images, torch.zeros(16, 0, dtype=torch.long))]
    network, teacher = student(), vit()
    task = Distillation(losses={"soft": (Soft(), 1.0), "features": (Features(), 0.5)})
    before = float(losses_of(Soft(), network, teacher, images)["loss"].detach())
    fit(network, task, Fixed(), loader, config=replace(CONFIG, epochs=15), teacher=Teacher(teacher))
    assert float(losses_of(Soft(), network.eval(), teacher, images)["loss"].detach()) < before / 2


def test_patches_of_another_grid_are_matched_by_their_places() -> None:
    """Rows stay rows and columns columns, in both directions."""
    rows = torch.tensor([0.0, 0, 1, 1]).repeat_interleave(2).view(1, 8, 1)  # 4 x 2
    halved = resampled(rows, (4, 2), (2, 2)).flatten()
    assert halved[0] == halved[1] < halved[2] == halved[3]
    wider = resampled(rows, (4, 2), (4, 3)).view(4, 3)
    torch.testing.assert_close(wider, rows.view(4, 2)[:, :1].expand(4, 3))
    network, fine = student(), vit(patch_size=4)
    images = torch.randn(2, 3, 16, 16)
    assert losses_of(Features(), network, fine, images)["loss"].isfinite()
    conv = timm.create_model("resnet10t", num_classes=0)
    assert losses_of(Features(), network, conv, torch.randn(2, 3, 64, 64)[..., :16, :16], None)[
        "loss"
    ].isfinite()


@pytest.mark.parametrize(
    ("tokens", "prefix", "size", "want"),
    [
        (197, 1, (224, 224), (1, (14, 14))),
        (196, 1, (224, 224), None),
        (201, 5, (224, 224), (5, (14, 14))),
        (33, 1, (32, 64), (1, (4, 8))),
        (100, 0, (224, 224), (0, (10, 10))),
        (99, 1, (224, 224), None),
    ],
)
def test_tokens_are_taken_apart(tokens: int, prefix: int, size: tuple[int, int], want: Any) -> None:
    assert split_tokens(tokens, prefix, size) == want


def test_only_patches_that_stay_to_the_end_are_compared() -> None:
    """What a masked student gives for a patch that it drops has no gradient and no part in the loss."""
    blocks = (SPACE.smallest().blocks[0], replace(SPACE.smallest().blocks[0], keep=2))
    stage = replace(SPACE.smallest().stages[0], blocks=blocks)
    network = student(stages=(stage,), selector="attention").train()
    images = torch.randn(3, 3, 16, 16)
    teacher = build(
        replace(network.arch, stages=(replace(stage, blocks=(blocks[0],) * 2),), selector=None)
    ).eval()
    for task in (Features(parts=("patch",)), Tokens()):
        ready, taught_by = met(task, network, teacher)
        outputs = read_views(network, [images], ready.wants)
        assert outputs["tokens"].shape[1] == 5
        outputs["tokens"].retain_grad()
        ready(outputs, Batch((images,), torch.zeros(3, 0)), taught_by.answer([images], ready.wants_taught))[
            "loss"
        ].backward()
        grad = outputs["tokens"].grad
        assert grad is not None
        assert torch.equal(grad[:, 1:].abs().sum(-1) > 0, outputs["keep"][:, -1] > 0)
        assert not grad[:, 0].any()


def test_tokens_are_the_mean_square_over_patches() -> None:
    network, teacher = student(), student(1)
    images = torch.randn(2, 3, 16, 16)
    mine, theirs = (each.eval()(images, want=("tokens",))["tokens"][:, 1:] for each in (network, teacher))
    torch.testing.assert_close(
        losses_of(Tokens(), network, teacher, images)["loss"], (mine - theirs).square().mean()
    )


@pytest.mark.parametrize(
    ("task", "teacher", "words"),
    [
        (
            Soft(),
            {"num_classes": 7},
            "has 7 classes, the network 4; the loss 'soft' compares them.*such as features",
        ),
        (Hard(), {"num_classes": 0}, "has no classes, the network 4; the loss 'hard'"),
        (Tokens(), {}, "tokens have 16 channels, the teacher's 24; .*Use the loss features"),
        (
            Features(blocks=((0, 3),)),
            {},
            "features.blocks asks for block 3 of the teacher, which has blocks 0 to 2",
        ),
        (
            Features(blocks=((-2, 0),)),
            {},
            "features.blocks asks for block -2 of the network, which has blocks 0 to 0",
        ),
        (
            Features(parts=("class",)),
            {"class_token": False, "global_pool": "avg"},
            "have a class token in tokens",
        ),
    ],
)
def test_what_cannot_be_learned_is_one_sentence(task: Task, teacher: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        met(Distillation(losses={"it": (task, 1.0)}, labels=LABELS), student(), vit(**teacher))


@pytest.mark.parametrize("keep", [3, 1])  # which may be a grid of its own
@pytest.mark.parametrize(
    "task", [Features(), Features(blocks=((-1, -1),)), Manifold(blocks=((-1, -1),)), Tokens()]
)
def test_a_teacher_whose_patches_have_no_places_is_refused(task: Task, keep: int) -> None:
    """One that drops patches, before any training; and blocks of a Supernet's Arch are counted as its own."""
    block = SPACE.smallest().blocks[0]
    stage = replace(SPACE.smallest().stages[0], blocks=(block, replace(block, keep=keep)))
    with pytest.raises(
        UserError, match=r"teacher gives (tokens|blocks\.1), which is no grid of patches for images of 16"
    ):
        met(task, student(), student(stages=(stage,), selector="attention"))
    teacher = Teacher(Supernet(SPACE).eval(), arch=SPACE.smallest())
    with pytest.raises(UserError, match="asks for block 1 of the teacher, which has blocks 0 to 0"):
        settled_task(Features(blocks=((0, 1),)), student(), teacher, None, lambda: (3, 16, 16))


def test_what_networks_give_is_found_without_a_trace() -> None:
    """By one image, in evaluation mode; nothing runs before it is asked for."""
    network = timm.create_model("resnet10t", num_classes=4).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    ran = []
    network.register_forward_pre_hook(lambda module, given: ran.append(module.training))
    gives = Gives(network, lambda: (3, 64, 64))
    assert gives.classes == 4
    assert not ran
    assert gives.width("logits") == 4
    assert gives.split("tokens") == (0, (2, 2))
    assert network.training
    torch.testing.assert_close(dict(network.state_dict()), before, rtol=0, atol=0)


def test_gram_matrices_are_float32_whatever_the_rest_is() -> None:
    """Under autocast, of the same features, bit for bit; each pair draws its own patches."""
    network, teacher = student(), vit(depth=2)
    task, taught_by = met(Manifold(num_random=5), network, teacher)
    images = torch.randn(3, 3, 16, 16)
    outputs, taught = read_views(network, [images], task.wants), taught_by.answer([images], task.wants_taught)
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(task(outputs, Batch((images,), torch.zeros(3, 0)), taught)["loss"])
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert found[0].dtype == torch.float32


@pytest.mark.parametrize("fields", [{"name": "deit_tiny_distilled_patch16_224"}, {"patch_size": 4}])
def test_a_teacher_of_more_tokens_is_no_nonsense(fields: dict[str, Any]) -> None:
    """Two tokens in front, or another grid: patches meet patches, and no relation differs by more than 2."""
    network, teacher = student(), vit(**fields)
    images = torch.randn(3, 3, 16, 16)
    task, taught_by = met(Manifold(blocks=((0, 1),), num_random=12), network, teacher)
    outputs, taught = read_views(network, [images], task.wants), taught_by.answer([images], task.wants_taught)
    losses = task(outputs, Batch((images,), torch.zeros(3, 0)), taught)
    mine, theirs = outputs["blocks.0"][:, 1:], taught["blocks.1"][:, teacher.num_prefix_tokens :]
    if theirs.shape[1] != 4:
        theirs = resampled(theirs, (4, 4), (2, 2))
    grams = [x @ x.transpose(1, 2) for x in (functional.normalize(x, dim=-1) for x in (mine, theirs))]
    torch.testing.assert_close(losses["patch"], 4 * (grams[0] - grams[1]).square().mean())
    assert losses["random"] < 0.2 * 4
