"""The Supernet of several stages: the contract, shared running statistics, and official supernet checkpoints."""

from __future__ import annotations

import pytest
import torch

from vitnas.extraction import extract
from vitnas.space import vit_resnas
from vitnas.supernet import Supernet, select
from vitnas.testing import SupernetContract, randomize_

SPACE = vit_resnas(
    "micro",
    image_size=16,
    patch_size=2,
    num_classes=5,
    embed_dims=(8, 12),
    num_heads=(1, 2),
    depths=(2, 3),
    patch_head=True,
)


class TestStaged(SupernetContract):
    num_random = 2

    @pytest.fixture
    def supernet(self) -> Supernet:
        return Supernet(SPACE).eval()


class TestStagedLinear(SupernetContract):
    """Linear stem and a distillation token."""

    num_random = 1

    @pytest.fixture
    def supernet(self) -> Supernet:
        space = vit_resnas(
            "micro",
            image_size=8,
            patch_size=2,
            num_classes=3,
            in_chans=1,
            embed_dims=(8, 12),
            num_heads=(1, 2),
            depths=(2, 3),
            stem="linear",
            stem_width=0,
            distill_token=True,
        )
        return Supernet(space).eval()


def test_training_updates_the_shared_statistics() -> None:
    supernet = Supernet(SPACE)
    randomize_(supernet, torch.Generator().manual_seed(0))
    before = {name: buffer.clone() for name, buffer in supernet.named_buffers()}
    assert set(before) == {
        f"patch_embed.norm{i}.{name}"
        for i in (1, 2, 3)
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for arch in (SPACE.largest(), SPACE.smallest()):
        supernet(images, arch)
    for name, buffer in supernet.named_buffers():
        assert not torch.equal(buffer, before[name]), name
    assert int(supernet.get_buffer("patch_embed.norm1.num_batches_tracked")) == 2
    model = extract(supernet.eval(), SPACE.smallest())
    torch.testing.assert_close(dict(model.named_buffers()), dict(supernet.named_buffers()), rtol=0, atol=0)
    model.patch_embed.norm1.running_mean.zero_()
    assert supernet.get_buffer("patch_embed.norm1.running_mean").any()


def test_evaluation_leaves_them_alone() -> None:
    supernet = Supernet(SPACE).eval()
    before = {name: buffer.clone() for name, buffer in supernet.named_buffers()}
    supernet(torch.randn(4, 3, 16, 16), SPACE.largest())
    torch.testing.assert_close(dict(supernet.named_buffers()), before, rtol=0, atol=0)


def test_a_stage_uses_its_own_slots_and_widths() -> None:
    names = [gene.name for gene in SPACE.genes]
    genes = list(SPACE.encode(SPACE.largest()))
    genes[names.index("exists.0.1")] = 0
    arch = SPACE.decode(genes)
    supernet = Supernet(SPACE)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter))
    got, shared = select(supernet, arch), dict(supernet.named_parameters())
    for ours, theirs in (("blocks.0", "blocks.0"), ("blocks.1", "blocks.2"), ("blocks.3", "blocks.4")):
        name = "mlp.fc1.bias"
        torch.testing.assert_close(got[f"{ours}.{name}"], shared[f"{theirs}.{name}"], rtol=0, atol=0)
    small = select(supernet, SPACE.smallest())
    torch.testing.assert_close(
        small["reductions.0.conv.weight"], shared["reductions.0.conv.weight"][:16, :8], rtol=0, atol=0
    )
    torch.testing.assert_close(small["reductions.0.pos_embed"], shared["reductions.0.pos_embed"][:, :, :16])
