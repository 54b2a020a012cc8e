"""What a Supernet lends: kept views follow tensors that move, nothing is kept beyond, gradients land in shared ones."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vitnas.extraction import extract
from vitnas.space import autoformer
from vitnas.supernet import Supernet
from vitnas.testing import randomize_

SPACE = autoformer("micro", image_size=8, patch_size=4, in_chans=1, num_classes=3, depths=(1, 2))
ARCHS = (SPACE.smallest(), SPACE.middle(), SPACE.largest())


@pytest.fixture
def supernet(generator: torch.Generator) -> Supernet:
    made = Supernet(SPACE)
    randomize_(made, generator)
    return made


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.randn(3, 1, 8, 8, generator=generator)


def load(supernet: Supernet, assign: bool) -> None:
    other = Supernet(SPACE)
    randomize_(other, torch.Generator().manual_seed(7))
    supernet.load_state_dict(other.state_dict(), assign=assign)


def swap_data(supernet: Supernet) -> None:
    for parameter in supernet.parameters():
        parameter.data = parameter.data * 1.5


def new_parameter(supernet: Supernet) -> None:
    supernet.head.weight = torch.nn.Parameter(torch.randn_like(supernet.head.weight))


CHANGES: dict[str, Callable[[Supernet], object]] = {
    "to": lambda supernet: supernet.double().float(),
    "load_state_dict": lambda supernet: load(supernet, assign=False),
    "load_state_dict(assign)": lambda supernet: load(supernet, assign=True),
    "data": swap_data,
    "a new parameter": new_parameter,
    "in place": lambda supernet: randomize_(supernet, torch.Generator().manual_seed(5)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_kept_follows_the_shared_tensors(supernet: Supernet, images: Tensor, change: str) -> None:
    for arch in ARCHS:
        supernet(images, arch).sum().backward()
    CHANGES[change](supernet)
    for arch in ARCHS:
        supernet.zero_grad(set_to_none=True)
        answer = supernet(images, arch)
        torch.testing.assert_close(answer, extract(supernet, arch)(images), rtol=1e-5, atol=1e-5)
        answer.sum().backward()
        fresh = Supernet(SPACE)
        fresh.load_state_dict(supernet.state_dict())
        fresh(images, arch).sum().backward()
        for (name, got), (_, want) in zip(supernet.named_parameters(), fresh.named_parameters(), strict=True):
            torch.testing.assert_close(got.grad, want.grad, rtol=0, atol=0, msg=name)


def test_a_copy_runs_on_its_own_tensors(supernet: Supernet, images: Tensor) -> None:
    before = [supernet(images, arch) for arch in ARCHS]
    other = copy.deepcopy(supernet)
    randomize_(other, torch.Generator().manual_seed(3))
    for arch, answer in zip(ARCHS, before, strict=True):
        torch.testing.assert_close(other(images, arch), extract(other, arch)(images), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(supernet(images, arch), answer, rtol=0, atol=0)


def test_tensors_that_moved_are_freed(supernet: Supernet, images: Tensor) -> None:
    for arch in ARCHS:
        supernet(images, arch)
    before = [
        parameter.data for parameter in supernet.parameters()
    ]  # kept, so that no place is given to others
    places = {tensor.data_ptr() for tensor in before}
    supernet.double()
    supernet(images.double(), ARCHS[0])
    views = [
        loan._view
        for subnet in supernet._blocks._kept.values()
        for loan in subnet.loans.values()
        if loan._view is not None
    ]
    assert views
    assert not places & {view.untyped_storage().data_ptr() for view in views}


def test_nothing_is_lent_when_a_pass_is_over(supernet: Supernet, images: Tensor) -> None:
    """Also when it ends in an error: else every Arch that is kept would keep copies of its weights."""
    skeleton = supernet.subnet(ARCHS[0]).skeleton
    supernet(images, ARCHS[0])
    with torch.no_grad():
        supernet(images, ARCHS[0])
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    with pytest.raises((RuntimeError, ValueError, AssertionError)):
        supernet(images[:, :, :5], ARCHS[0])
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    supernet(images, ARCHS[0]).sum().backward()


def test_evaluation_runs_on_aligned_weights_without_gaps(supernet: Supernet, images: Tensor) -> None:
    seen: list[tuple[bool, bool]] = []

    def look(module: torch.nn.Module, inputs: object) -> None:
        seen.extend((p.is_contiguous(), p.data_ptr() % 64 == 0) for p in module.parameters())

    block = supernet.eval().subnet(ARCHS[0]).skeleton.blocks[0]  # type: ignore[index]
    block.register_forward_pre_hook(look)
    with torch.no_grad():
        supernet(images, ARCHS[0])
    assert seen
    assert all(all(each) for each in seen)


def test_a_pass_that_is_done_again_in_backward(supernet: Supernet, images: Tensor) -> None:
    supernet(images, ARCHS[1]).square().sum().backward()
    want = {name: p.grad.clone() for name, p in supernet.named_parameters() if p.grad is not None}
    supernet.zero_grad(set_to_none=True)
    again = checkpoint(supernet, images, ARCHS[1], use_reentrant=False)
    again.square().sum().backward()
    found = {name: p.grad for name, p in supernet.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, want, rtol=0, atol=0)


def test_outputs_that_are_not_used_leave_no_gradient(supernet: Supernet, images: Tensor) -> None:
    supernet(images, ARCHS[0], want=("tokens",))["tokens"].sum().backward()
    assert supernet.head.weight.grad is None
    assert supernet.get_parameter("blocks.0.norm1.weight").grad is not None
