"""Left and right logits together: sum or mean, gradients to both ends, and nothing new where there is one side."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.extraction import extract
from vitnas.sample import Sandwich
from vitnas.space import vitas
from vitnas.supernet import Supernet, make_sharing
from vitnas.testing.random import randomize_
from vitnas.train import Batch, Classification, CombinedSides, Task, TokenMixup, TrainConfig, evaluate, fit
from vitnas.train.task import Outputs, read_views

SPACE = vitas("micro", image_size=8, num_classes=5, in_chans=1, num_slots=2, widest=(16, 16, 32))


def supernet_of(coupling: str) -> Supernet:
    supernet = Supernet(SPACE, sharing=make_sharing(SPACE, coupling))  # type: ignore[arg-type]
    randomize_(supernet, torch.Generator().manual_seed(0))
    return supernet


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch((torch.randn(6, 1, 8, 8, generator=generator),), torch.tensor([0, 1, 2, 3, 4, 0]))


def losses_of(task: Task, supernet: Supernet, batch: Batch, arch: Arch) -> tuple[dict[str, Tensor], Outputs]:
    outputs = read_views(supernet, batch.views, task.wants, arch=arch)
    return task(outputs, batch, {}), outputs


@pytest.mark.parametrize(("combine", "factor"), [("sum", 1.0), ("mean", 0.5)])
def test_one_loss_on_the_logits_of_both_sides(batch: Batch, combine: str, factor: float) -> None:
    supernet, arch = supernet_of("bilateral"), SPACE.smallest()
    task = CombinedSides(Classification(label_smoothing=0.1), combine)  # type: ignore[arg-type]
    losses, _ = losses_of(task, supernet, batch, arch)
    sides = [supernet(batch.images_BCHW, arch, side=side) for side in (0, 1)]
    wanted: Tensor = (sides[0] + sides[1]) * factor
    assert not torch.allclose(sides[0], sides[1])
    torch.testing.assert_close(
        losses["loss"], functional.cross_entropy(wanted, batch.targets, label_smoothing=0.1)
    )


def test_gradients_reach_both_ends_and_not_between(batch: Batch) -> None:
    supernet, arch = supernet_of("bilateral"), SPACE.smallest()
    losses, _ = losses_of(CombinedSides(Classification()), supernet, batch, arch)
    losses["loss"].backward()
    grad = supernet.get_parameter("blocks.0.norm1.weight").grad
    assert grad is not None
    width, most = arch.embed_dim, SPACE.largest().embed_dim
    assert 2 * width < most
    assert grad[:width].all()
    assert grad[-width:].all()
    assert not grad[width:-width].any()


@pytest.mark.parametrize("coupling", ["prefix", "cyclic"])
def test_one_side_trains_as_by_the_task_alone(batch: Batch, coupling: str) -> None:
    supernet, arch, task = supernet_of(coupling), SPACE.middle(), Classification()
    found = []
    for each in (task, CombinedSides(task), CombinedSides(task, "mean")):
        supernet.zero_grad(set_to_none=True)
        losses, outputs = losses_of(each, supernet, batch, arch)
        losses["loss"].backward()
        grads = {n: p.grad.clone() for n, p in supernet.named_parameters() if p.grad is not None}
        found.append(([output.detach() for output in outputs.values()], grads))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=0)


def test_all_outputs_are_combined(batch: Batch) -> None:
    supernet, arch = supernet_of("bilateral"), SPACE.middle()
    names = ("head", "tokens", "blocks.0")
    found = read_views(supernet, batch.views, [f"sides.sum.{name}" for name in names], arch=arch)
    sides = [supernet(batch.images_BCHW, arch, want=names, side=side) for side in (0, 1)]
    for name in names:
        torch.testing.assert_close(found[f"sides.sum.{name}"], sides[0][name] + sides[1][name])


def test_sides_together_teach_in_the_same_step(batch: Batch) -> None:
    """In-place distillation: what the first Draw's sides give together is what the others learn."""
    seen: list[tuple[Outputs, Outputs]] = []

    class Noting(Classification):
        def __call__(self, outputs: Outputs, batch: Batch, taught: Outputs) -> dict[str, Tensor]:
            seen.append((outputs, taught))
            return super().__call__(outputs, batch, taught)

    class Fitting:
        steps_per_epoch = 1

        def from_step(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
            yield batch.images_BCHW, batch.targets

    config = TrainConfig(epochs=1, monitor_every=0, warmup_epochs=0)
    supernet = supernet_of("bilateral")
    fit(supernet, CombinedSides(Noting()), Sandwich(SPACE, num_random=0), Fitting(), config=config)
    (first, none), (_, taught) = seen
    assert not none
    torch.testing.assert_close(taught["logits"], first["logits"].detach(), rtol=0, atol=0)


def test_a_task_that_mixes_images_still_does(batch: Batch) -> None:
    mixing = CombinedSides(TokenMixup(num_classes=5, grid=(4, 4)))
    assert mixing.mix(batch).patch_targets is not None
    assert CombinedSides(Classification()).mix(batch) is batch


def test_an_unknown_combination_is_refused() -> None:
    with pytest.raises(UserError, match=r"combine is 'max'; it must be one of sum, mean\. Use 'sum'"):
        CombinedSides(Classification(), "max")  # type: ignore[arg-type]


def test_an_arch_is_scored_by_the_mean_of_its_sides() -> None:
    """ViTAS's search: accuracy of left and right, each by itself; extraction gives the left."""
    supernet = supernet_of("bilateral")
    arch, generator = SPACE.smallest(), torch.Generator().manual_seed(0)
    size = arch.input_size
    batches = [
        (
            torch.randn(n, *size, generator=generator),
            torch.randint(0, arch.num_classes, (n,), generator=generator),
        )
        for n in (5, 3)
    ]
    found = evaluate(supernet, batches, arch)
    with torch.no_grad():
        each = [
            torch.cat(
                [
                    functional.cross_entropy(supernet.eval()(x, arch, side=side), y, reduction="none")
                    for x, y in batches
                ]
            )
            for side in (0, 1)
        ]
        right = [
            torch.cat([supernet(x, arch, side=side).argmax(1) == y for x, y in batches]) for side in (0, 1)
        ]
    assert not torch.equal(each[0], each[1])
    assert found.loss == pytest.approx(float(torch.cat(each).mean()), rel=1e-6)
    second = torch.cat([loss_N[1::2] for loss_N in each])
    assert found.loss_odd == pytest.approx(float(second.mean()), rel=1e-6)
    assert found.accuracy == float(torch.cat(right).double().mean())
    assert found.n == 8, "images, not passes"
    left = evaluate(extract(supernet, arch), batches)
    assert left.loss == pytest.approx(float(each[0].mean()), rel=1e-6)
    assert left.loss != found.loss
