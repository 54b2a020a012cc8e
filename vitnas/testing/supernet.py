"""SupernetContract: what every Space and sharing promises as a Supernet. Subclass it and give a fixture `supernet`."""

from __future__ import annotations

import copy
import random

import torch
from torch import Tensor
from torch.func import functional_call

from vitnas.arch import Arch
from vitnas.extraction import extract
from vitnas.layers.axes import named_tensors
from vitnas.model import build
from vitnas.supernet import Supernet, select
from vitnas.supernet.tensors import base_name
from vitnas.testing.model import HEADS_WANTED
from vitnas.testing.random import randomize_

WANTED = (*HEADS_WANTED, "tokens", "blocks.0")  # losses on all of them, as distillation has


class SupernetContract:
    """Tests of one Supernet; a fixture `supernet` gives a small one in evaluation mode, without drop path."""

    num_random = 3

    def archs(self, supernet: Supernet) -> list[Arch]:
        rng = random.Random(0)
        return [*supernet.space.corners(), *(supernet.space.sample(rng) for _ in range(self.num_random))]

    def images(self, supernet: Supernet, n: int = 2) -> Tensor:
        arch = supernet.space.largest()
        shape = (n, *arch.input_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def test_extracted_model_is_the_supernet_bit_for_bit(self, supernet: Supernet) -> None:
        randomize_(supernet, torch.Generator().manual_seed(0))
        images = self.images(supernet)
        for arch in self.archs(supernet):
            model = extract(supernet, arch)
            with torch.no_grad():
                torch.testing.assert_close(model(images), supernet(images, arch), rtol=0, atol=0)
                names = model.output_names
                outputs = model(images, want=names), supernet(images, arch, want=names)
                torch.testing.assert_close(*outputs, rtol=0, atol=0)
            assert model.arch == arch
            assert not model.training

    def test_gradients_equal_autograd_through_select(self, supernet: Supernet) -> None:
        randomize_(supernet, torch.Generator().manual_seed(0))
        images = self.images(supernet)
        for arch in {supernet.space.largest(), supernet.space.smallest(), *self.archs(supernet)[-2:]}:
            supernet.zero_grad(set_to_none=True)
            self.loss(supernet(images, arch, want=WANTED)).backward()
            self.assert_gradients(supernet, self.autograd(supernet, images, arch))

    def test_every_side_is_a_weight_set_of_its_own(self, supernet: Supernet) -> None:
        randomize_(supernet, torch.Generator().manual_seed(0))
        images = self.images(supernet)
        for arch in (supernet.space.middle(), self.archs(supernet)[-1]):
            both = [supernet(images, arch, want=WANTED, side=side) for side in range(supernet.sides)]
            torch.testing.assert_close(supernet(images, arch, want=WANTED), both[0], rtol=0, atol=0)
            grads = [self.autograd(supernet, images, arch, side) for side in range(supernet.sides)]
            want = {name: torch.stack([grad[name] for grad in grads]).sum(0) for name in grads[0]}
            supernet.zero_grad(set_to_none=True)
            sum((self.loss(heads) for heads in both), torch.zeros(())).backward()
            self.assert_gradients(supernet, want, rtol=1e-5, atol=1e-6)

    def test_two_archs_in_one_backward_add_up(self, supernet: Supernet) -> None:
        randomize_(supernet, torch.Generator().manual_seed(0))
        images, ends = self.images(supernet), (supernet.space.largest(), supernet.space.smallest())
        first, second = (self.autograd(supernet, images, arch) for arch in ends)
        for pair in (ends, ends[::-1]):  # backward runs from the last to the first
            supernet.zero_grad(set_to_none=True)
            losses = [self.loss(supernet(images, arch, want=WANTED)) for arch in pair]
            (losses[0] + losses[1]).backward()
            self.assert_gradients(supernet, {name: first[name] + second[name] for name in first})

    def test_state_dict_has_the_names_of_the_largest_model(self, supernet: Supernet) -> None:
        want = {name: value.shape for name, value in build(supernet.space.largest()).state_dict().items()}
        found = {name: value.shape for name, value in supernet.state_dict().items()}
        if len(supernet.space.representatives()) == 1 and not supernet.sharing.private:
            assert found == want
        else:  # sizes of several Archs, and tensors of one option each
            assert {base_name(name) for name in found} >= set(want)

    def test_select_gives_every_parameter_and_buffer_of_the_model(self, supernet: Supernet) -> None:
        for arch in self.archs(supernet):
            model = build(arch, device="meta")
            want = {name: tensor.shape for name, tensor in named_tensors(model).items()}
            assert {name: tensor.shape for name, tensor in select(supernet, arch).items()} == want

    def test_a_copy_shares_nothing(self, supernet: Supernet) -> None:
        randomize_(supernet, torch.Generator().manual_seed(0))
        images, arch = self.images(supernet), supernet.space.middle()
        before = supernet(images, arch).detach()
        other = copy.deepcopy(supernet)
        torch.testing.assert_close(other(images, arch), before, rtol=0, atol=0)
        randomize_(other, torch.Generator().manual_seed(2))
        assert not torch.equal(other(images, arch), before)
        torch.testing.assert_close(supernet(images, arch), before, rtol=0, atol=0)
        supernet.zero_grad(set_to_none=True)
        self.loss(other(images, arch, want=WANTED)).backward()
        assert all(parameter.grad is None for parameter in supernet.parameters())

    def test_the_order_of_calls_does_not_matter(self, supernet: Supernet) -> None:
        randomize_(supernet, torch.Generator().manual_seed(0))
        images, large, small = self.images(supernet), supernet.space.largest(), supernet.space.smallest()
        with torch.no_grad():
            first = supernet(images, large), supernet(images, small)
            second = supernet(images, small), supernet(images, large)
        torch.testing.assert_close(first, second[::-1], rtol=0, atol=0)

    @staticmethod
    def loss(outputs: dict[str, Tensor]) -> Tensor:
        flat = torch.cat([tensor.flatten() for tensor in outputs.values()])
        return (flat * torch.linspace(-1, 1, flat.numel())).sum()

    def autograd(self, supernet: Supernet, images: Tensor, arch: Arch, side: int = 0) -> dict[str, Tensor]:
        """Gradients by the plain way: autograd through views of the shared tensors."""
        names, shared = zip(*supernet.named_parameters(), strict=True)
        skeleton = build(arch, device="meta").eval()
        heads = functional_call(skeleton, select(supernet, arch, side), (images,), {"want": WANTED})
        found = torch.autograd.grad(self.loss(heads), shared, allow_unused=True, materialize_grads=True)
        return dict(zip(names, found, strict=True))

    @staticmethod
    def assert_gradients(
        supernet: Supernet, want: dict[str, Tensor], *, rtol: float = 0, atol: float = 0
    ) -> None:
        for name, parameter in supernet.named_parameters():
            got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close({name: got}, {name: want[name]}, rtol=rtol, atol=atol)
