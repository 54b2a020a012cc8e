"""The Model's contract for several Archs: plain, relative, without class token, with unequal blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from vitnas.arch import Arch, Block, Stage
from vitnas.model import Model, build
from vitnas.model.transformer_ls import transformer_ls
from vitnas.testing import ModelContract

PLAIN = Arch(
    image_size=16,
    patch_size=4,
    num_classes=5,
    stages=(
        Stage(
            embed_dim=32,
            blocks=(
                Block(num_heads=2, head_dim=16, mlp_hidden=64),
                Block(num_heads=2, head_dim=16, mlp_hidden=64),
            ),
        ),
    ),
)
UNEQUAL = Stage(
    embed_dim=24,
    blocks=(
        Block(num_heads=1, head_dim=16, mlp_hidden=40),
        Block(num_heads=3, head_dim=16, mlp_hidden=17),
        Block(num_heads=2, head_dim=8, mlp_hidden=64),
    ),
)

STAGED = Arch(
    image_size=16,
    patch_size=2,
    num_classes=5,
    stages=(
        Stage(embed_dim=12, blocks=UNEQUAL.blocks[:2]),
        Stage(embed_dim=20, blocks=UNEQUAL.blocks[1:]),
        Stage(embed_dim=20, blocks=PLAIN.blocks),
    ),
    stem="conv",
    stem_width=6,
    patch_head=True,
)


def made(arch: Arch) -> Model:
    return build(arch, generator=torch.Generator().manual_seed(0)).eval()


class TestPlain(ModelContract):
    @pytest.fixture
    def model(self) -> Model:
        return made(PLAIN)


class TestAutoFormerLike(ModelContract):
    """Mean pooling with a class token: the token takes part through attention."""

    @pytest.fixture
    def model(self) -> Model:
        return made(replace(PLAIN, stages=(UNEQUAL,), relative_position=2, global_pool="avg", in_chans=1))


class TestMeanPooled(ModelContract):
    @pytest.fixture
    def model(self) -> Model:
        return made(replace(PLAIN, class_token=False, global_pool="avg", fc_norm=True, position="none"))


class TestRelativeWithoutClassToken(ModelContract):
    @pytest.fixture
    def model(self) -> Model:
        return made(
            replace(PLAIN, class_token=False, global_pool="avg", position="none", relative_position=14)
        )


class TestStaged(ModelContract):
    """ViT-ResNAS: convolutional stem, residual reductions, patch head."""

    @pytest.fixture
    def model(self) -> Model:
        return made(STAGED)


class TestStagedOtherwise(ModelContract):
    """Plain reductions that also narrow, relative positions on every grid, no class token."""

    @pytest.fixture
    def model(self) -> Model:
        return made(
            replace(
                STAGED,
                stages=STAGED.stages[::-1],
                stem="linear",
                stem_width=0,
                reduction="conv",
                patch_head=False,
                class_token=False,
                global_pool="avg",
                relative_position=2,
                position="none",
            )
        )


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple")  # timm's interpolation
class TestTransformerLs(ModelContract):
    """A class token per stage but the last, windows, biases, and a row and a column left out on the way."""

    @pytest.fixture
    def model(self) -> Model:
        text = "l1,h2,d12,n1,s1,g1,p2,f3,a0,r2_l2,h2,d16,n2,s0,g1,p2,a0_l3,h2,d20,n1,g0,p2,a0"
        return made(transformer_ls(text, image_size=20, num_classes=5))


class TestPatchReductionsAndPositions(ModelContract):
    @pytest.fixture
    def model(self) -> Model:
        text = "l1,h2,d12,n1,s1,g1,p2,f3,a1,r2_l2,h2,d16,n1,s1,g1,p2,f3,a1,r2"
        return made(transformer_ls(text, image_size=14, num_classes=5))


class TestDistilled(ModelContract):
    @pytest.fixture
    def model(self) -> Model:
        return made(replace(STAGED, patch_head=False, distill_token=True))


class TestPartsOfPretrainedNets(ModelContract):
    """Register tokens, positions of patches alone, a norm before the blocks, layer scale, a gated MLP with a norm."""

    @pytest.fixture
    def model(self) -> Model:
        return made(
            replace(
                PLAIN,
                stages=(UNEQUAL,),
                reg_tokens=3,
                no_embed_class=True,
                pre_norm=True,
                layer_scale=True,
                act="swiglu",
                scale_mlp_norm=True,
            )
        )


class TestAttentionPooling(ModelContract):
    @pytest.fixture
    def model(self) -> Model:
        return made(replace(PLAIN, global_pool="map", pool_num_heads=4, pool_mlp_hidden=24, act="silu"))


class TestPartsInStages(ModelContract):
    """Register tokens go through the reductions; a packed gate."""

    @pytest.fixture
    def model(self) -> Model:
        parts = {"reg_tokens": 2, "layer_scale": True, "act": "swiglu_packed"}
        return made(replace(STAGED, distill_token=True, patch_head=False, **parts))


def mixed(*words: str, **sizes: int) -> Stage:
    """Blocks of these mixers, of the sizes given."""
    return Stage(
        embed_dim=24,
        blocks=tuple(
            Block(num_heads=2, head_dim=8, mlp_hidden=40, mixer=word, mixer_size=sizes.get(word))  # type: ignore[arg-type]
            for word in words
        ),
    )


class TestMixersWithRotary(ModelContract):
    @pytest.fixture
    def model(self) -> Model:
        stage = mixed("performer", "nystrom", "linformer", "long_short", nystrom=3, linformer=5)
        return made(replace(PLAIN, stages=(stage,), position="rotary", stem="hybrid"))


class TestMixersWithoutClassToken(ModelContract):
    """CCT's tokenizer, pooling and place of the norm."""

    @pytest.fixture
    def model(self) -> Model:
        stage = mixed(
            "linformer_shared",
            "linformer_one_head",
            "fourier2d",
            "token_mlp",
            "fourier",
            "softmax",
            linformer_shared=4,
            linformer_one_head=4,
        )
        return made(
            replace(
                PLAIN,
                stages=(stage,),
                position="rotary_2d",
                stem="cct",
                global_pool="seq",
                class_token=False,
                mlp_norm="stream",
            )
        )


class TestMixersInStages(ModelContract):
    @pytest.fixture
    def model(self) -> Model:
        stages = (mixed("nystrom", "token_mlp"), mixed("performer"), mixed("long_short"))
        return made(replace(STAGED, stages=stages))


def keeping(*keeps: int | None, **fields: Any) -> Arch:
    """PLAIN with a block per number of patches kept."""
    blocks = tuple(replace(PLAIN.blocks[0], keep=keep) for keep in keeps)
    mixers = fields.pop("mixers", ("softmax",) * len(keeps))
    blocks = tuple(replace(block, mixer=mixer) for block, mixer in zip(blocks, mixers, strict=True))
    return replace(PLAIN, **{"stages": (Stage(embed_dim=32, blocks=blocks),), **fields})


class TestPredictor(ModelContract):
    @pytest.fixture
    def model(self) -> Model:
        return made(keeping(None, 11, None, 5, 3, selector="predictor", layer_scale=True))


class TestPredictorBeforeAllBlocks(ModelContract):
    """Mean pooling, 2-D rotary positions by place, register tokens, an odd width, other mixers before."""

    @pytest.fixture
    def model(self) -> Model:
        arch = keeping(
            9,
            4,
            selector="predictor",
            class_token=False,
            reg_tokens=2,
            global_pool="avg",
            position="rotary_2d",
            image_size=(16, 24),
        )
        return made(replace(arch, stages=(Stage(embed_dim=33, blocks=arch.blocks),)))


class TestFixed(ModelContract):
    """Relative positions by place."""

    @pytest.fixture
    def model(self) -> Model:
        return made(keeping(None, 10, 4, selector="fixed", relative_position=2, global_pool="avg"))


class TestFixedAmongOtherMixers(ModelContract):
    @pytest.fixture
    def model(self) -> Model:
        mixers = ("token_mlp", "linformer", "performer", "softmax")
        arch = keeping(None, None, 10, 4, mixers=mixers, selector="fixed", position="rotary", fc_norm=True)
        blocks = (arch.blocks[0], replace(arch.blocks[1], mixer_size=5), *arch.blocks[2:])
        return made(replace(arch, stages=(Stage(embed_dim=32, blocks=blocks),), global_pool="avg"))


class TestAttention(ModelContract):
    """By the class token's attention, with relative positions and a distillation token."""

    @pytest.fixture
    def model(self) -> Model:
        return made(keeping(None, 9, 4, selector="attention", relative_position=2, distill_token=True))


class TestAttentionOfAll(ModelContract):
    @pytest.fixture
    def model(self) -> Model:
        return made(
            keeping(
                None,
                9,
                None,
                4,
                selector="attention",
                class_token=False,
                global_pool="seq",
                position="rotary",
            )
        )


class TestEvit(ModelContract):
    """With a class token, and rotary positions by place."""

    @pytest.fixture
    def model(self) -> Model:
        return made(keeping(None, 9, None, 4, selector="evit", position="rotary_2d"))


@pytest.mark.slow
class TestEvitOfAll(ModelContract):
    @pytest.fixture
    def model(self) -> Model:
        return made(keeping(None, 10, 3, selector="evit", class_token=False, global_pool="avg"))


class TestMerge(ModelContract):
    """Less than half and more than half at a place, with a class token, register tokens and relative positions."""

    @pytest.fixture
    def model(self) -> Model:
        arch = keeping(None, 11, None, 2, selector="merge", reg_tokens=2, relative_position=2)
        return made(arch)


class TestMergeAndMean(ModelContract):
    """The mean goes by how many patches a token stands for."""

    @pytest.fixture
    def model(self) -> Model:
        mixers = ("softmax", "performer", "softmax", "performer")
        options = {"class_token": False, "global_pool": "avg", "position": "rotary"}
        return made(keeping(None, 11, None, 4, selector="merge", mixers=mixers, **options))


@pytest.mark.slow
class TestMergeAndAttentionPool(ModelContract):
    @pytest.fixture
    def model(self) -> Model:
        pool = {"global_pool": "map", "pool_num_heads": 4, "pool_mlp_hidden": 24, "class_token": False}
        return made(keeping(None, 7, selector="merge", **pool))


class TestPool(ModelContract):
    """Twice, with rotary positions of the upper left patches."""

    @pytest.fixture
    def model(self) -> Model:
        arch = keeping(None, 8, None, 2, selector="pool", position="rotary_2d", image_size=(16, 32))
        return made(arch)


class TestRandom(ModelContract):
    @pytest.fixture
    def model(self) -> Model:
        return made(keeping(None, 10, 4, selector="random", global_pool="avg"))


class TestFirst(ModelContract):
    @pytest.fixture
    def model(self) -> Model:
        return made(keeping(9, 4, selector="first", reg_tokens=1, position="rotary_2d"))


class TestKeepingInTheLastStage(ModelContract):
    @pytest.fixture
    def model(self) -> Model:
        block = UNEQUAL.blocks[0]
        last = Stage(embed_dim=20, blocks=(block, replace(block, keep=7), block, replace(block, keep=2)))
        stages = (STAGED.stages[0], last)
        return made(replace(STAGED, stages=stages, selector="attention", global_pool="avg"))


class TestKeepingWithAttentionPool(ModelContract):
    @pytest.fixture
    def model(self) -> Model:
        pool = {"global_pool": "map", "pool_num_heads": 4, "pool_mlp_hidden": 24, "class_token": False}
        return made(keeping(None, 7, selector="predictor", **pool))


class TestPatchSlimming(ModelContract):
    """The last block gives the tokens before the patches alone; queries have other rotary positions than keys."""

    @pytest.fixture
    def model(self) -> Model:
        parts = {"position": "rotary_2d", "reg_tokens": 2, "layer_scale": True, "qk_norm": True}
        return made(keeping(11, 5, 3, 0, selector="patch_slimming", **parts))


class TestDynamicPatchSlimming(ModelContract):
    @pytest.fixture
    def model(self) -> Model:
        pool = {"class_token": False, "global_pool": "avg", "qkv_bias": "qv"}
        return made(keeping(None, 9, None, 4, selector="dynamic_patch_slimming", **pool))


class TestPredictorThenTheClassToken(ModelContract):
    @pytest.fixture
    def model(self) -> Model:
        return made(keeping(None, 9, 0, selector="predictor"))
