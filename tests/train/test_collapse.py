"""The alarm hears what teachers say: of dead ones, of living ones, and of those that seem dead for a while."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vitnas.train.collapse import CollapseAlarm, Vitals
from vitnas.train.losses.esvit import entropies

K, STEPS, IMAGES = 256, 2000, 64


def vitals(step: int, logits: Tensor, rank: float = 9.0, gap: float = 0.0) -> Vitals:
    """Of what a teacher says of some images."""
    said = entropies(logits.double().softmax(-1))
    return Vitals(step, float(said["teacher_entropy"]), float(said["winner_entropy"]), 1.0, gap, IMAGES, rank)


def listen(at: Callable[[int], Vitals], steps: int = STEPS) -> tuple[int, str] | None:
    """When a training is stopped, and why."""
    alarm = CollapseAlarm(steps, K)
    for step in range(0, steps, alarm.every):
        if why := alarm.hear(at(step)):
            return step, why
    return None


@pytest.fixture
def logits(generator: torch.Generator) -> Tensor:
    """Of images that are all told apart, at a temperature of 1."""
    return torch.randn(IMAGES, K, generator=generator)


def test_living_teachers_are_left_alone(logits: Tensor) -> None:
    """From all alike to one prototype per image: as unsure as can be is no collapse while answers differ."""
    for scale in (0.3, 1.0, 30.0):
        assert listen(lambda step, scale=scale: vitals(step, logits * scale)) is None  # type: ignore[misc]


def test_all_prototypes_alike(logits: Tensor) -> None:
    """What a teacher does that is less sure than its student: answers shrink to the middle."""
    found = listen(lambda step: vitals(step, logits * 0.8 ** (step / 2)))
    assert found is not None
    assert found[0] <= STEPS / 20
    assert "all prototypes are alike" in found[1]


def test_one_prototype_takes_all(logits: Tensor) -> None:
    """Without a centre."""
    more = torch.zeros(K).index_fill(0, torch.tensor([3]), 1.0)
    found = listen(lambda step: vitals(step, logits + step * more))
    assert found is not None
    assert found[0] <= STEPS / 20
    assert "one prototype takes all" in found[1]


def test_no_centre_and_answers_that_run_together(logits: Tensor) -> None:
    """Long before one prototype has all; a centre that comes late is no harm while answers differ."""
    more = torch.zeros(K).index_fill(0, torch.tensor([3]), 1.0)
    found = listen(lambda step: vitals(step, 3 * logits + step / 4 * more, gap=1.0))
    assert found is not None
    assert found[0] <= STEPS / 20
    assert "the centre of its logits is not where they are" in found[1]
    assert listen(lambda step: vitals(step, 3 * logits, gap=1.0)) is None
    assert (
        listen(lambda step: vitals(step, 3 * logits + min(step, 40) / 4 * more, gap=float(step < 40))) is None
    )


def test_the_same_of_all_images(logits: Tensor) -> None:
    """After a step that was too large: neither sure nor unsure."""
    found = listen(lambda step: vitals(step, 3 * logits[:1].expand(IMAGES, -1)))
    assert found is not None
    assert "it says the same of all images (0.0000 nats apart)" in found[1]
    assert "prototype" not in found[1]


def test_features_on_one_line(logits: Tensor) -> None:
    found = listen(lambda step: vitals(step, logits, rank=1.02))
    assert found is not None
    assert found[0] <= STEPS / 20
    assert "effective rank 1.02" in found[1]


def test_a_late_death_is_noticed_within_a_twentieth(logits: Tensor) -> None:
    found = listen(lambda step: vitals(step, logits * (step < 1234)))
    assert found is not None
    assert 1234 < found[0] <= 1234 + STEPS / 20


def test_little_that_grows_is_a_beginning(logits: Tensor) -> None:
    """Below what the alarm calls nothing for a long time, but on the way."""
    assert vitals(100, logits * 0.002 * math.exp(100 / 40)).information < 0.01
    assert listen(lambda step: vitals(step, logits * min(1.0, 0.002 * math.exp(step / 40)))) is None


def test_a_dip_is_no_death(logits: Tensor) -> None:
    assert listen(lambda step: vitals(step, logits * (0.01 if 300 <= step < 330 else 1.0))) is None


def test_what_was_heard_is_kept(logits: Tensor) -> None:
    """In a training that was killed."""

    def dead(step: int) -> Vitals:
        return vitals(step, logits * (step < 500))

    alarm = CollapseAlarm(STEPS, K)
    whole = listen(dead)
    assert whole is not None
    for step in range(0, whole[0], alarm.every):
        assert alarm.hear(dead(step)) is None
        other = CollapseAlarm(STEPS, K)
        other.restore(alarm.tensors())
        alarm = other
    assert alarm.hear(dead(whole[0])) == whole[1]
