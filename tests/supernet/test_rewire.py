"""Rewiring: the best heads and units come first, the widest Arch computes the same, and the optimizer follows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.errors import UserError
from vitnas.sample import Moment
from vitnas.space import autoformer, vit_resnas
from vitnas.supernet import Supernet
from vitnas.supernet.rewire import rewire
from vitnas.testing import randomize_
from vitnas.train import Rewiring

SPACES = {
    "vit_resnas": vit_resnas(
        "micro",
        image_size=16,
        patch_size=4,
        num_classes=3,
        depths=(2, 2),
        embed_dims=(8, 12),
        num_heads=(1, 3),
    ),
    "autoformer": autoformer("micro", image_size=16, patch_size=4, num_classes=3, depths=(1, 2)),
}


@pytest.fixture(params=SPACES)
def supernet(request: pytest.FixtureRequest, generator: torch.Generator) -> Supernet:
    net = Supernet(SPACES[request.param]).double().eval()
    randomize_(net, generator)
    return net


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 3, (4,), generator=generator)


def importance(net: Supernet, block: int) -> tuple[Tensor, Tensor]:
    """By the paper's words: of each hidden unit and of each head."""
    p = {name.removeprefix(f"blocks.{block}."): t.detach().abs() for name, t in net.named_parameters()}
    hidden = p["mlp.fc1.weight"].sum(1) + p["mlp.fc1.bias"] + p["mlp.fc2.weight"].sum(0)
    heads = dict(net.axes[f"blocks.{block}.attn.qkv.bias"])["heads"]
    each = p["attn.qkv.weight"].sum(1).view(3, heads, -1).sum((0, 2)) + p["attn.qkv.bias"].view(
        3, heads, -1
    ).sum((0, 2))
    return hidden, each + p["attn.proj.weight"].sum(0).view(heads, -1).sum(1)


def test_the_widest_arch_computes_the_same_and_units_are_sorted(supernet: Supernet) -> None:
    space, (images, _) = supernet.space, batch(0)
    before = supernet(images, space.largest()), supernet(images, space.smallest())
    sums = {name: p.detach().sum() for name, p in supernet.named_parameters()}
    assert rewire(supernet) > 0
    torch.testing.assert_close(supernet(images, space.largest()), before[0], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(supernet(images, space.smallest()), before[1])
    for block in range(space.largest().depth):
        for scores in importance(supernet, block):
            assert bool((scores.diff() <= 0).all())
    for name, p in supernet.named_parameters():
        torch.testing.assert_close(p.detach().sum(), sums[name], msg=name)
    assert rewire(supernet) == 0  # sorted is sorted


def test_training_at_full_width_goes_on_as_if_nothing_had_happened(supernet: Supernet) -> None:
    """Moments that did not move with their weights would push other units."""
    arch = supernet.space.largest()

    def losses(sort: bool) -> list[float]:
        net = Supernet(supernet.space).double().eval()
        net.load_state_dict(supernet.state_dict())
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
        found = []
        for step in range(6):
            if sort:
                rewire(net, optimizer)
            images, targets = batch(step)
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(images, arch), targets)
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        return found

    torch.testing.assert_close(losses(True), losses(False), rtol=1e-8, atol=1e-10)


def test_moments_that_are_not_per_weight_are_refused(supernet: Supernet) -> None:
    optimizer = torch.optim.AdamW(supernet.parameters())
    name = "blocks.0.mlp.fc1.weight"
    optimizer.state[supernet.get_parameter(name)] = {"row": torch.zeros(3), "step": torch.tensor(1.0)}
    with pytest.raises(UserError, match=rf"the optimizer keeps row of shape \(3,\) for {name}, .* Use adamw"):
        rewire(supernet, optimizer)


def test_the_hook_sorts_at_the_start_of_the_first_epochs(supernet: Supernet) -> None:
    hook, optimizer = Rewiring(2), torch.optim.AdamW(supernet.parameters())

    def at(epoch: float, network: nn.Module = supernet) -> object:
        return hook.before(Moment(0, 9, epoch, 0, network, optimizer, lambda tensor: None))

    assert at(0.5) is None
    assert at(3.0) is None
    told = at(2.0)
    assert isinstance(told, dict)
    assert told["moved"] > 0
    with pytest.raises(
        UserError, match="rewiring was asked for a Linear; it sorts the weights of a Supernet"
    ):
        at(1.0, nn.Linear(1, 1))
