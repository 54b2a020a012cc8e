"""Rounds: which held-out images a look sees."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vitnas.errors import UserError
from vitnas.sample.held_out import Rounds


class Numbers:
    """Images 0 to n - 1 in batches of `batch`; counts how often they were read."""

    def __init__(self, n: int, batch: int) -> None:
        self.n, self.batch, self.reads = n, batch, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.reads += 1
        for start in range(0, self.n, self.batch):
            numbers = torch.arange(start, min(start + self.batch, self.n))
            yield numbers.float()[:, None], numbers


@pytest.mark.parametrize("batch", [3, 4, 7, 10, 50])
def test_looks_go_round_whatever_the_batches(batch: int) -> None:
    looks = Numbers(10, batch)
    rounds = Rounds(looks, 4)
    seen = [rounds.at(number)[1].tolist() for number in range(5)]
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2 + [[0, 1, 2, 3]]
    assert looks.reads == 1 + 3  # once to count, then once per round
    images, targets = rounds.at(1)
    assert torch.equal(images[:, 0].long(), targets)


def test_a_resumed_look_is_the_same() -> None:
    whole, resumed = Rounds(Numbers(10, 4), 3), Rounds(Numbers(10, 4), 3)
    want = [whole.at(number)[1].tolist() for number in range(12)]
    assert [resumed.at(number)[1].tolist() for number in range(7, 12)] == want[7:]


def test_fewer_images_than_a_look_are_all_looked_at() -> None:
    rounds = Rounds(Numbers(3, 2), 8)
    assert rounds.at(0)[1].tolist() == rounds.at(5)[1].tolist() == [0, 1, 2]


@pytest.mark.parametrize("looks", [None, Numbers(0, 2)])
def test_no_images_are_refused(looks: Numbers | None) -> None:
    with pytest.raises(UserError, match="no held-out images"):
        Rounds(looks, 4).at(0)
