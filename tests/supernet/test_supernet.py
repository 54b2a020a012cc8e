"""Supernet: which entries an Arch uses, modes, gradients, copies and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vitnas.arch import Arch
from vitnas.errors import UserError
from vitnas.extraction import extract
from vitnas.layers.axes import named_axes
from vitnas.model.modes import evaluating
from vitnas.space import autoformer
from vitnas.supernet import AUTOFORMER_OFFICIAL, Place, Prefix, Sharing, Supernet, select
from vitnas.supernet import supernet as module
from vitnas.testing import randomize_

SPACE = autoformer(
    "tiny",
    image_size=16,
    patch_size=8,
    num_classes=5,
    embed_dims=(8, 12),
    depths=(1, 2),
    num_heads=(1, 3),
    mlp_ratios=(1.0, 2.0),
    head_dim=4,
    relative_position=1,
)
SMALL, LARGE = SPACE.smallest(), SPACE.largest()


@pytest.fixture
def supernet(generator: torch.Generator) -> Supernet:
    made = Supernet(SPACE).eval()
    randomize_(made, generator)
    return made


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=generator)


def numbered(supernet: Supernet) -> dict[str, Tensor]:
    """Give every entry of every shared tensor its own number, so that a cut shows where it was made."""
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter))
    return {name: parameter.detach() for name, parameter in supernet.named_parameters()}


def test_an_arch_uses_the_first_entries_of_every_axis(supernet: Supernet) -> None:
    shared, got = numbered(supernet), select(supernet, SMALL)  # width 8 of 12, 1 head of 3, hidden 8 of 24
    want = {
        "cls_token": shared["cls_token"][:, :, :8],
        "pos_embed": shared["pos_embed"][:, :, :8],
        "patch_embed.proj.weight": shared["patch_embed.proj.weight"][:8],
        "patch_embed.proj.bias": shared["patch_embed.proj.bias"][:8],
        "norm.weight": shared["norm.weight"][:8],
        "head.weight": shared["head.weight"][:, :8],
        "head.bias": shared["head.bias"],
        "blocks.0.norm1.weight": shared["blocks.0.norm1.weight"][:8],
        "blocks.0.norm2.bias": shared["blocks.0.norm2.bias"][:8],
        "blocks.0.mlp.fc1.weight": shared["blocks.0.mlp.fc1.weight"][:8, :8],
        "blocks.0.mlp.fc1.bias": shared["blocks.0.mlp.fc1.bias"][:8],
        "blocks.0.mlp.fc2.weight": shared["blocks.0.mlp.fc2.weight"][:8, :8],
        "blocks.0.attn.proj.weight": shared["blocks.0.attn.proj.weight"][:8, :4],
        "blocks.0.attn.rel_pos_k.rows": shared["blocks.0.attn.rel_pos_k.rows"],
        "blocks.0.attn.rel_pos_v.cols": shared["blocks.0.attn.rel_pos_v.cols"],
        # q, k and v are 12 rows each in the widest block; the first head is 4 rows of each.
        "blocks.0.attn.qkv.weight": shared["blocks.0.attn.qkv.weight"][
            [*range(4), *range(12, 16), *range(24, 28)], :8
        ],
        "blocks.0.attn.qkv.bias": shared["blocks.0.attn.qkv.bias"][
            [*range(4), *range(12, 16), *range(24, 28)]
        ],
    }
    torch.testing.assert_close({name: got[name].detach() for name in want}, want, rtol=0, atol=0)
    assert not any(name.startswith("blocks.1.") for name in got)


def test_the_authors_cut_the_qkv_bias_as_one_run() -> None:
    made = Supernet(SPACE, sharing=AUTOFORMER_OFFICIAL)
    shared, got = numbered(made), select(made, SMALL)
    torch.testing.assert_close(
        got["blocks.0.attn.qkv.bias"], shared["blocks.0.attn.qkv.bias"][:12], rtol=0, atol=0
    )
    rows = [*range(4), *range(12, 16), *range(24, 28)]
    torch.testing.assert_close(
        got["blocks.0.attn.qkv.weight"], shared["blocks.0.attn.qkv.weight"][rows, :8], rtol=0, atol=0
    )


class Last(Prefix):
    """The last n entries."""

    def __call__(self, size: int, largest: int, place: Place) -> tuple[slice, ...]:
        return (slice(largest - size, largest),)


def test_a_rule_per_axis_is_followed(images: Tensor) -> None:
    made = Supernet(SPACE, sharing=Sharing(per_axis={"hidden": Last()}))
    shared, got = numbered(made), select(made, SMALL)
    torch.testing.assert_close(
        got["blocks.0.mlp.fc1.weight"], shared["blocks.0.mlp.fc1.weight"][-8:, :8], rtol=0, atol=0
    )
    torch.testing.assert_close(
        got["blocks.0.mlp.fc2.weight"], shared["blocks.0.mlp.fc2.weight"][:8, -8:], rtol=0, atol=0
    )
    randomize_(made, torch.Generator().manual_seed(0))
    torch.testing.assert_close(extract(made.eval(), SMALL)(images), made(images, SMALL), rtol=0, atol=0)


def test_selected_weights_are_views_where_they_can_be(supernet: Supernet) -> None:
    shared = dict(supernet.named_parameters())
    copies = [
        name
        for name, tensor in select(supernet, SMALL).items()
        if tensor.untyped_storage().data_ptr() != shared[name].untyped_storage().data_ptr()
    ]
    assert sorted(copies) == ["blocks.0.attn.qkv.bias", "blocks.0.attn.qkv.weight"]


def test_gradients_outside_of_an_arch_are_zero(supernet: Supernet, images: Tensor) -> None:
    supernet(images, SMALL).square().sum().backward()
    grads = {name: p.grad for name, p in supernet.named_parameters()}
    assert all(grad is None for name, grad in grads.items() if name.startswith("blocks.1."))
    fc1, qkv = grads["blocks.0.mlp.fc1.weight"], grads["blocks.0.attn.qkv.weight"]
    assert fc1 is not None
    assert qkv is not None
    assert fc1[:8, :8].ne(0).all()
    assert not fc1[8:].any()
    assert not fc1[:, 8:].any()
    assert qkv[:4, :8].ne(0).all()
    assert not qkv[4:12].any()


@pytest.mark.parametrize("arch", [SMALL, LARGE], ids=["small", "large"])
def test_gradients_of_several_steps_accumulate(supernet: Supernet, images: Tensor, arch: Arch) -> None:
    supernet(images, arch).sum().backward()
    once = {name: p.grad.clone() for name, p in supernet.named_parameters() if p.grad is not None}
    supernet(images, arch).sum().backward()
    twice = {name: p.grad for name, p in supernet.named_parameters() if p.grad is not None}
    torch.testing.assert_close(twice, {name: 2 * grad for name, grad in once.items()}, rtol=0, atol=0)


def test_without_gradients_nothing_is_kept(supernet: Supernet, images: Tensor) -> None:
    with torch.no_grad():
        assert not supernet(images, LARGE).requires_grad
    assert all(parameter.grad is None for parameter in supernet.parameters())


def test_frozen_parameters_get_no_gradient(supernet: Supernet, images: Tensor) -> None:
    supernet.head.requires_grad_(False)
    supernet(images, LARGE).sum().backward()
    frozen = [name for name, parameter in supernet.named_parameters() if parameter.grad is None]
    assert frozen == ["head.weight", "head.bias"]


def test_training_mode_reaches_the_skeletons(images: Tensor, generator: torch.Generator) -> None:
    made = Supernet(SPACE, drop_path=0.5)
    randomize_(made, generator)
    torch.manual_seed(0)
    made.train()
    drawn = [made(images, LARGE).detach() for _ in range(8)]
    assert any(not torch.equal(drawn[0], other) for other in drawn)
    made.eval()
    torch.testing.assert_close(made(images, LARGE), made(images, LARGE), rtol=0, atol=0)
    assert not extract(made, LARGE).training
    assert extract(made.train(), LARGE).training


def test_archs_train_on_after_they_were_evaluated(images: Tensor) -> None:
    made = Supernet(SPACE)
    made(images, LARGE)
    with evaluating(made):
        made(images, LARGE)
        skeleton = made.subnet(LARGE).skeleton
        assert not any(part.training for part in skeleton.modules())
    assert made.subnet(LARGE).skeleton is skeleton
    assert all(part.training for part in skeleton.modules())


def test_drop_path_follows_the_place_in_the_supernet() -> None:
    made = Supernet(autoformer("micro", image_size=8, patch_size=4), drop_path=0.5)
    rates = [
        [getattr(block.drop_path1, "drop_prob", 0.0) for block in made.subnet(arch).skeleton.blocks]
        for arch in (made.space.smallest(), made.space.largest())
    ]
    assert rates[1] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert rates[0] == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_extraction_copies(supernet: Supernet, images: Tensor, generator: torch.Generator) -> None:
    before = supernet(images, SMALL)
    model = extract(supernet, SMALL, drop_path=0.3)
    randomize_(model, generator)
    torch.testing.assert_close(supernet(images, SMALL), before, rtol=0, atol=0)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    assert sum(p.untyped_storage().nbytes() for p in model.parameters()) == 4 * sum(
        p.numel() for p in model.parameters()
    )


def test_double_precision(supernet: Supernet, images: Tensor) -> None:
    single = supernet(images, LARGE)
    double = supernet.double()(images.double(), LARGE)
    assert double.dtype == torch.float64
    torch.testing.assert_close(extract(supernet, LARGE)(images.double()), double, rtol=0, atol=0)
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-4)


def test_a_full_cache_forgets_the_oldest(
    supernet: Supernet, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CACHE_SIZE", 2)
    want = {arch: extract(supernet, arch)(images) for arch in SPACE.corners()}
    for arch in SPACE.corners() * 2:
        torch.testing.assert_close(supernet(images, arch), want[arch], rtol=0, atol=0)
        assert len(supernet._cache._kept) <= 2
    assert supernet.subnet(arch) is supernet.subnet(arch)


def test_the_same_generator_gives_the_same_weights() -> None:
    made = [Supernet(SPACE, generator=torch.Generator().manual_seed(seed)).state_dict() for seed in (1, 1, 2)]
    torch.testing.assert_close(dict(made[0]), dict(made[1]), rtol=0, atol=0)
    assert not torch.equal(made[0]["head.weight"], made[2]["head.weight"])


def test_state_dict_round_trip(supernet: Supernet, images: Tensor) -> None:
    other = Supernet(SPACE).eval()
    other.load_state_dict(supernet.state_dict())
    torch.testing.assert_close(other(images, SMALL), supernet(images, SMALL), rtol=0, atol=0)


def test_no_weight_decay_is_the_models(supernet: Supernet) -> None:
    assert supernet.no_weight_decay() == {"pos_embed", "cls_token"}


def wider(arch: Arch) -> Arch:
    return replace(arch, num_classes=6, stages=(replace(arch.stages[0], embed_dim=10),))


@pytest.mark.parametrize(
    "call", [lambda s, x, a: s(x, a), lambda s, x, a: select(s, a), lambda s, x, a: extract(s, a)]
)
def test_an_arch_outside_of_the_space_is_refused(supernet: Supernet, images: Tensor, call: Any) -> None:
    with pytest.raises(
        UserError,
        match=r"is not in autoformer_tiny: num_classes is 6, must be 5; .*embed_dim is 10; allowed are 8, 12",
    ):
        call(supernet, images, wider(LARGE))


def test_a_parameter_without_axes_is_a_mistake_that_is_named() -> None:
    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(3))

    class Wrong(Bare):
        def axes(self) -> dict[str, Any]:
            return {"gain": (("dim", 4),)}

    with pytest.raises(LookupError, match="parameter gain has no named axes"):
        named_axes(Bare())
    with pytest.raises(LookupError, match=r"axes .* of gain do not fit its shape \(3,\)"):
        named_axes(Wrong())


def test_zero_grad_between_forward_and_backward_is_harmless(generator: torch.Generator) -> None:
    """The order loss, zero_grad, backward is common; gradients must bind when backward begins."""
    space = autoformer("micro", image_size=8, patch_size=4, in_chans=1, num_classes=3)
    supernet = Supernet(space, generator=generator)
    images, arch = torch.randn(2, 1, 8, 8, generator=generator), space.middle()
    supernet(images, arch).square().sum().backward()
    want = {name: p.grad.clone() for name, p in supernet.named_parameters() if p.grad is not None}
    loss = supernet(images, arch).square().sum()
    supernet.zero_grad(set_to_none=True)
    loss.backward()
    for name, parameter in supernet.named_parameters():
        assert (parameter.grad is None) == (name not in want), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, want[name], rtol=0, atol=0, msg=name)


def test_a_forward_alone_leaves_no_gradients(generator: torch.Generator) -> None:
    space = autoformer("micro", image_size=8, patch_size=4, in_chans=1, num_classes=3)
    supernet = Supernet(space, generator=generator)
    supernet(torch.randn(2, 1, 8, 8), space.middle())
    assert all(parameter.grad is None for parameter in supernet.parameters()), "AdamW would decay them"


def test_a_second_derivative_is_refused(generator: torch.Generator) -> None:
    space = autoformer("micro", image_size=8, patch_size=4, in_chans=1, num_classes=3)
    supernet = Supernet(space, generator=generator)
    loss = supernet(torch.randn(2, 1, 8, 8), space.middle()).sum()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        loss.backward(create_graph=True)


def test_a_change_of_mode_reaches_blocks_that_archs_share(generator: torch.Generator) -> None:
    """Archs take over the mode one by one; one that did so must not leave a shared block behind for another."""
    made = Supernet(SPACE, drop_path=0.5)
    deep, images = LARGE, torch.randn(2, 3, 16, 16, generator=generator)
    shallow = SPACE.decode([1, 0, 1, 1, 0, 0])  # its block is the first of the deep one
    made.train()
    made(images, deep)
    made(images, shallow)
    made.eval()
    made(images, shallow)
    made.train()
    made(images, deep)
    assert all(part.training for part in made.subnet(deep).skeleton.modules())
    made.eval()
    made(images, shallow)
    assert not any(part.training for part in made.subnet(shallow).skeleton.modules())
