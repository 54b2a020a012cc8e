"""Arch: a frozen, validated value with a stable name and a JSON form."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest

from vitnas.arch import FIRST_FIELDS, Arch, Block, Stage, _naming, round_to
from vitnas.errors import UserError
from vitnas.model.published import PUBLISHED

BLOCK = Block(num_heads=3, head_dim=64, mlp_hidden=768)
ARCH = Arch(image_size=224, patch_size=16, stages=(Stage(embed_dim=192, blocks=(BLOCK,) * 12),))
STAGED = Arch(
    image_size=224,
    patch_size=14,
    stages=tuple(Stage(embed_dim=dim, blocks=(BLOCK,)) for dim in (176, 352, 704)),
    stem="conv",
    stem_width=24,
)
OTHERS: dict[str, Any] = {
    "image_size": 192,
    "patch_size": 14,
    "in_chans": 1,
    "num_classes": 10,
    "stages": (Stage(embed_dim=192, blocks=(BLOCK,) * 11),),
    "class_token": False,
    "stem": "conv",
    "stem_width": 8,
    "reduction": "conv",
    "distill_token": True,
    "patch_head": True,
    "position": "none",
    "relative_position": 14,
    "global_pool": "avg",
    "fc_norm": True,
    "qkv_bias": False,
    "norm_eps": 1e-5,
    "head_norm_eps": 1e-4,
    "attn_scale": "embed_dim",
    "mlp_norm": "stream",
    "selector": "predictor",
    "qk_norm": True,
    "rel_pos_bias": "table",
    "rotary_base": 50.0,
    "rotary_grid": 7,
    "pool_num_heads": 3,
    "pool_mlp_hidden": 32,
    "reg_tokens": 4,
    "no_embed_class": True,
    "pre_norm": True,
    "layer_scale": True,
    "act": "swiglu",
    "scale_mlp_norm": True,
    "patch_norm": True,
    "window_bias": "folded",
    "work_size": 112,
}


def test_sizes_follow_from_the_fields() -> None:
    assert (ARCH.embed_dim, ARCH.depth, ARCH.grids) == (192, 12, ((14, 14),))
    assert (ARCH.num_prefix_tokens, ARCH.num_tokens) == (1, 197)
    assert replace(ARCH, class_token=False, global_pool="avg").num_tokens == 196
    four = replace(ARCH, reg_tokens=4)
    assert (four.num_prefix_tokens, four.num_prefix_positions, four.num_tokens) == (5, 5, 201)
    assert replace(four, no_embed_class=True).num_prefix_positions == 0
    assert ARCH.blocks == (BLOCK,) * 12


def test_an_arch_is_a_value() -> None:
    again = Arch.from_json(ARCH.to_json())
    assert again == ARCH
    assert hash(again) == hash(ARCH)
    assert again.id == ARCH.id
    with pytest.raises(FrozenInstanceError):
        ARCH.image_size = 32  # type: ignore[misc]


@pytest.mark.parametrize("arch", [*PUBLISHED.values(), ARCH, STAGED], ids=lambda arch: arch.id)
def test_json_round_trip(arch: Arch) -> None:
    assert Arch.from_json(json.loads(json.dumps(arch.to_json()))) == arch


def test_every_field_changes_the_name() -> None:
    assert set(OTHERS) == {field.name for field in fields(Arch)}
    along: dict[str, dict[str, Any]] = {
        "rotary_base": {"position": "rotary_dinov3"},
        "rotary_grid": {"position": "learned_rotary_2d"},
        "pool_num_heads": {"global_pool": "map", "pool_mlp_hidden": 768},
        "pool_mlp_hidden": {"global_pool": "map", "pool_num_heads": 1},
        "class_token": {"global_pool": "avg"},
        "stem": {"stem_width": 24},
        "stem_width": {"stem": "conv"},
        "selector": {"stages": (Stage(embed_dim=192, blocks=(BLOCK, replace(BLOCK, keep=98))),)},
    }
    found = {ARCH.id}
    for name, value in OTHERS.items():
        found.add(replace(ARCH, **{name: value, **along.get(name, {})}).id)
    assert len(found) == len(OTHERS) + 1


def test_a_later_field_at_its_default_is_no_part_of_the_name() -> None:
    told = json.dumps(_naming(ARCH.to_json()))
    for name in ("stem_width", "reduction", "distill_token", "patch_head"):
        assert name not in told
    assert '"stem_width": 8' in json.dumps(_naming(replace(ARCH, stem="conv", stem_width=8).to_json()))


def test_json_from_before_a_field_was_added_still_reads() -> None:
    old = {key: value for key, value in ARCH.to_json().items() if key in FIRST_FIELDS | {"schema"}}
    assert len(old) < len(ARCH.to_json())
    assert Arch.from_json(old) == ARCH


def test_the_grid_halves_from_stage_to_stage() -> None:
    assert STAGED.grids == ((16, 16), (8, 8), (4, 4))
    assert (STAGED.num_tokens, STAGED.num_final_tokens) == (257, 17)
    assert replace(STAGED, distill_token=True).num_final_tokens == 18
    assert (STAGED.embed_dim, STAGED.depth) == (704, 3)
    assert STAGED.describe() == "3 blocks, width 176/352/704, 3 heads, MLP 768, patch 14 of 224 px"
    assert STAGED.id.startswith("d176x352x704-l3-")


def test_names_stay_the_same_between_versions() -> None:
    # Run folders are keyed by these names; if this fails, raise arch.SCHEMA and say how old folders are read.
    names = {
        "autoformer_tiny": "d192-l13-b0736f62",
        "autoformer_small": "d384-l13-94128cd8",
        "autoformer_base": "d576-l14-0a97fa10",
        "vitas_a": "d154-l7-9649ee20",
        "vitas_b": "d192-l8-e61d0c91",
        "vitas_c": "d230-l12-c43b6a43",
        "vitas_e": "d346-l11-117e26b2",
        "vitas_f": "d307-l13-44013378",
        "dynamicvit_deit_small_07": "d384-l12-13f6e554",
    }
    assert {name: PUBLISHED[name].id for name in names} == names


def test_description_for_a_person() -> None:
    text = PUBLISHED["autoformer_tiny"].describe()
    assert text == "13 blocks, width 192, 3-4 heads, MLP 576-768, patch 16 of 224 px"
    assert ARCH.describe() == "12 blocks, width 192, 3 heads, MLP 768, patch 16 of 224 px"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 225}, r"image_size is 225; it must be a multiple of patch_size 16\. Nearest: 224\."),
        ({"image_size": 0}, r"image_size is 0; it must be a whole number of at least 1"),
        ({"patch_size": -2}, r"patch_size is -2; it must be a whole number"),
        ({"in_chans": 1.0}, r"in_chans is 1\.0; it must be a whole number"),
        ({"num_classes": -1}, r"num_classes is -1; it must be a whole number, and 0 means none"),
        ({"num_classes": 1.5}, r"num_classes is 1\.5; it must be a whole number, and 0 means none"),
        ({"relative_position": -1}, r"relative_position is -1; it must be a whole number, and 0 means none"),
        ({"norm_eps": None}, r"norm_eps is None; it must be a number above 0"),
        ({"norm_eps": 0.0}, r"norm_eps is 0\.0; it must be a number above 0"),
        ({"head_norm_eps": -1.0}, r"head_norm_eps is -1\.0; it must be a number above 0"),
        (
            {"attn_scale": "embed_dim", "stages": (Stage(embed_dim=2, blocks=(BLOCK,)),)},
            r"more heads than the width 2",
        ),
        ({"attn_scale": "embed"}, r"attn_scale is 'embed'; it must be one of head_dim, embed_dim"),
        ({"norm_eps": "1e-6"}, r"norm_eps is '1e-6'; it must be a number above 0"),
        (
            {"position": "learnt"},
            r"position is 'learnt'; it must be one of learned, rotary, .*\. Nearest: 'learned'",
        ),
        ({"stem": "cnv"}, r"stem is 'cnv'; it must be one of linear, conv.*\. Nearest: 'conv'"),
        ({"reduction": "pool"}, r"reduction is 'pool'; it must be one of residual, conv"),
        ({"stem": "conv"}, r"stem_width is 0 and stem 'conv'; stem 'conv' has a width of at least 1"),
        ({"stem_width": 24}, r"stem_width is 24 and stem 'linear'; .* Use 24 with 'conv', else 0"),
        (
            {"stem": "conv", "stem_width": 8, "patch_size": 7},
            r"patch_size is 7; stem 'conv' halves the image first, so it must be even\. Nearest: 8",
        ),
        ({"distill_token": True, "global_pool": "avg"}, r"distill_token is True; .* Use global_pool='token'"),
        ({"distill_token": True, "patch_head": True}, r"distill_token is True; .* patch_head=False"),
        ({"patch_head": True, "fc_norm": True}, r"patch_head is True but fc_norm too; .* fc_norm=False"),
        ({"global_pool": "max"}, r"global_pool is 'max'; it must be one of token, avg"),
        ({"class_token": False}, r"global_pool is 'token' but class_token is False; use global_pool='avg'"),
        (
            {"global_pool": "map"},
            r"pool_num_heads is 0, pool_mlp_hidden 0 and global_pool 'map'; 'map' has both",
        ),
        ({"pool_num_heads": 3}, r"pool_num_heads is 3, pool_mlp_hidden 0 and global_pool 'token'"),
        (
            {"global_pool": "map", "pool_num_heads": 5, "pool_mlp_hidden": 9},
            r"pool_num_heads is 5; it must divide the last stage's embed_dim 192\. Nearest: 4\.",
        ),
        (
            {"global_pool": "map", "pool_num_heads": 3, "pool_mlp_hidden": 9, "act": "swiglu"},
            r"global_pool is 'map' and act 'swiglu'; the MLP behind the pooling has no gate",
        ),
        (
            {"rel_pos_bias": "mlp", "relative_position": 2},
            r"rel_pos_bias 'mlp'; one kind of distances is enough",
        ),
        (
            {"rel_pos_bias": "table", "reg_tokens": 1},
            r"rel_pos_bias is 'table' with 2 tokens before the patches",
        ),
        (
            {
                "rel_pos_bias": "mlp",
                "selector": "fixed",
                "stages": (Stage(embed_dim=8, blocks=(replace(BLOCK, keep=9),)),),
            },
            r"selector is 'fixed' and rel_pos_bias 'mlp'; the bias is for all patches",
        ),
        ({"qkv_bias": "q"}, r"qkv_bias is 'q'; it must be True, False or 'qv'"),
        (
            {"rotary_base": 50.0},
            r"rotary_base is 50\.0 and rotary_grid 0 with position 'learned'; .*Leave them out",
        ),
        ({"rotary_grid": 4, "position": "rotary_dinov3"}, r"rotary_grid 4 with position 'rotary_dinov3'"),
        ({"rotary_base": 0, "position": "rotary"}, r"rotary_base is 0; it must be a number above 0"),
        (
            {"qk_norm": True, "stages": (Stage(embed_dim=8, blocks=(replace(BLOCK, mixer="performer"),)),)},
            r"mixer is 'performer', which has no qk_norm; only softmax has",
        ),
        ({"reg_tokens": -1}, r"reg_tokens is -1; it must be a whole number, and 0 means none"),
        ({"act": "gleu"}, r"act is 'gleu'; it must be one of gelu, .*\. Nearest: 'gelu'"),
        (
            {"pre_norm": True, "stem": "conv", "stem_width": 8},
            r"pre_norm is True and stem 'conv'; .* Use pre_norm=False or stem='linear'",
        ),
        (
            {"no_embed_class": True, "class_token": False, "global_pool": "avg"},
            r"no_embed_class is True with position 'learned' and 0 tokens .*no_embed_class=False",
        ),
        ({"no_embed_class": True, "position": "none"}, r"no_embed_class is True with position 'none'"),
        ({"stages": ()}, r"there are 0 stages; an Arch needs at least one"),
        (
            {"stages": ARCH.stages * 3},
            r"image_size is 224; it must be a multiple of patch_size 16 times 4 \(2 reductions\), 64\. "
            r"Nearest: 192 and 256\.",
        ),
        (
            {"stages": STAGED.stages, "image_size": 40},
            r"must be a multiple of patch_size 16 times 4 .*\. Nearest: 64\.",
        ),
        (
            {"stages": STAGED.stages[::-1], "image_size": 256},
            r"embed_dims of the stages are \[704, 352, 176\]; a residual reduction cannot make them narrower",
        ),
        (
            {"stages": STAGED.stages, "reduction": "patch", "reg_tokens": 1},
            r"there is a distillation token or register tokens\. Leave them out, or use reduction='conv'",
        ),
        (
            {"stages": STAGED.stages, "reduction": "patch", "image_size": 48},
            r"image_size is 48; patches of 16 pixels and 2 reductions leave nothing of it\. Nearest: 64",
        ),
    ],
    ids=str,
)
def test_bad_fields_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(ARCH, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 0}, r"num_heads is 0; it must be a whole number"),
        ({"head_dim": True}, r"head_dim is True"),
        ({"mlp_hidden": "768"}, r"mlp_hidden is '768'"),
        ({"mixer": "softmx"}, r"mixer is 'softmx'; it must be one of fourier, .*\. Nearest: 'softmax'"),
        ({"slot": -1}, r"slot is -1; it counts from 0"),
        ({"window": 7}, r"window is 7; mixer 'softmax' has no windows\. Leave it out"),
        ({"mixer": "long_short", "window": 0}, r"window is 0; it must be a whole number of at least 1"),
        ({"keep": -1}, r"keep is -1; it must be a whole number, and 0 means none"),
        ({"keep": 0.5}, r"keep is 0\.5; it must be a whole number"),
    ],
    ids=str,
)
def test_bad_blocks_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(BLOCK, **change)


def kept(*keeps: int | None, mixers: str = "", **options: Any) -> Arch:
    """ARCH with a block per number of patches kept, and those of `mixers` (separated by blanks)."""
    words = mixers.split() or ["softmax"] * len(keeps)
    blocks = tuple(replace(BLOCK, keep=keep, mixer=word) for keep, word in zip(keeps, words, strict=True))
    stages = (Stage(embed_dim=192, blocks=blocks),)
    return replace(ARCH, **{"selector": "predictor", **options, "stages": stages})


def test_an_arch_that_keeps_fewer_patches() -> None:
    arch = kept(None, 137, None, 67, selector="attention")
    assert arch.num_final_tokens == 68
    assert arch.describe().endswith(", patch 16 of 224 px, keeps 137/67 of 196 patches (attention)")
    assert Arch.from_json(json.loads(json.dumps(arch.to_json()))) == arch
    assert len({arch.id, kept(None, 137, None, 66).id, kept(None, 137, 67, None).id}) == 3
    assert kept(10, selector="fixed").num_final_tokens == 11
    assert "keep" not in json.dumps(_naming(ARCH.to_json()))
    assert "selector" not in json.dumps(_naming(ARCH.to_json()))


@pytest.mark.parametrize(
    ("keeps", "options", "message"),
    [
        (
            (None, 196),
            {},
            r"block 1: keep is 196, but 196 patches come to it; keep must be lower\. Leave it out",
        ),
        ((None, 100, 100), {}, r"block 2: keep is 100, but 100 patches come to it"),
        ((None, 100, 120), {}, r"block 2: keep is 120, but 100 patches come to it"),
        (
            (None, 9),
            {"selector": None},
            r"selector is None and 1 blocks keep fewer.* Use selector='predictor'",
        ),
        ((None, None), {}, r"selector is 'predictor' and 0 blocks keep fewer.* Use selector=None"),
        ((None, 9), {"selector": "fixd"}, r"selector is 'fixd'; it must be .*\. Nearest: 'fixed'"),
        (
            (9, None),
            {"selector": "attention"},
            r"block 0: selector is 'attention', but no block stands before it",
        ),
        (
            (None, 9),
            {"selector": "attention", "mixers": "performer softmax"},
            r"block 1: selector is 'attention', but mixer 'performer' stands before it; .* softmax tells",
        ),
        (
            (None, 9),
            {"mixers": "softmax linformer"},
            r"block 1: mixer is 'linformer' behind a selection; only performer, softmax can do without",
        ),
        (
            (None, 9, None),
            {"mixers": "softmax softmax token_mlp"},
            r"block 2: mixer is 'token_mlp' behind a selection",
        ),
        (
            (None, 9),
            {"selector": "attention", "relative_position": 3, "class_token": False, "global_pool": "avg"},
            r"selector is 'attention' and relative_position 3 without a class token",
        ),
        ((None, 0), {"global_pool": "avg"}, r"block 1: keep is 0, .* but a classifier reads patches"),
        (
            (None, 9),
            {"selector": "patch_slimming", "mixers": "softmax performer"},
            r"block 1: keep is 9 and selector 'patch_slimming' with mixer 'performer' .*, which softmax without",
        ),
        (
            (None, 9),
            {"selector": "patch_slimming", "relative_position": 3},
            r"relative_position 3; what leaves still gives keys and values",
        ),
    ],
    ids=str,
)
def test_selections_that_cannot_be_are_refused(
    keeps: tuple[int | None, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        kept(*keeps, **options)


def test_selections_stand_in_the_last_stage_behind_its_first_block() -> None:
    def staged(stage: int, block: int) -> Arch:
        stages = [replace(s, blocks=(BLOCK, BLOCK)) for s in STAGED.stages]
        blocks = [BLOCK, BLOCK]
        blocks[block] = replace(BLOCK, keep=3)
        stages[stage] = replace(stages[stage], blocks=tuple(blocks))
        return replace(STAGED, stages=tuple(stages), selector="fixed")

    assert staged(2, 1).num_final_tokens == 4
    for stage, block in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0)):
        with pytest.raises(
            UserError, match=rf"block {2 * stage + block}: keep is 3; a reduction needs all patches"
        ):
            staged(stage, block)


def test_a_usual_base_is_no_base() -> None:
    assert replace(ARCH, position="rotary_dinov3", rotary_base=100.0) == replace(
        ARCH, position="rotary_dinov3"
    )


def test_lists_become_tuples() -> None:
    listed = replace(ARCH, stages=[replace(ARCH.stages[0], blocks=list(ARCH.blocks))])  # type: ignore[arg-type]
    assert listed == ARCH
    assert hash(listed) == hash(ARCH)


def test_bad_stages_are_refused() -> None:
    with pytest.raises(UserError, match=r"blocks is empty; a stage needs at least one block"):
        Stage(embed_dim=192, blocks=())
    with pytest.raises(UserError, match=r"embed_dim is 0; it must be a whole number"):
        Stage(embed_dim=0, blocks=(BLOCK,))
    for slots in ((1, 0), (0, 0), (0, None)):
        with pytest.raises(
            UserError, match=r"slots are .*; they must rise and be given for all blocks or none"
        ):
            Stage(embed_dim=192, blocks=tuple(replace(BLOCK, slot=slot) for slot in slots))
    assert Stage(embed_dim=192, blocks=tuple(replace(BLOCK, slot=slot) for slot in (0, 2))).slots == [0, 2]
    assert Stage(embed_dim=192, blocks=(BLOCK, BLOCK)).slots == [0, 1]


def test_other_blocks_lie_in_stages_of_the_same_depth() -> None:
    arch = PUBLISHED["vit_resnas_tiny"]
    wider = arch.with_blocks(replace(block, mlp_hidden=index + 1) for index, block in enumerate(arch.blocks))
    assert [block.mlp_hidden for block in wider.blocks] == [*range(1, arch.depth + 1)]
    assert [len(stage.blocks) for stage in wider.stages] == [5, 6, 5]
    assert wider.with_blocks(arch.blocks) == arch


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({**ARCH.to_json(), "schema": 99}, r"schema is 99; this version reads schema 1\. Update vitnas"),
        ({"image_size": 224}, r"schema is None"),
        ("text", r"schema is None"),
        ({**ARCH.to_json(), "img_size": 224}, r"Arch has no field 'img_size'; .* Nearest: 'image_size'"),
        ({**ARCH.to_json(), "stages": None}, r"stages cannot be read .*; each needs embed_dim and blocks"),
        ({**ARCH.to_json(), "stages": [{"embed_dim": 192}]}, r"stages cannot be read .*'blocks'"),
        (
            {**ARCH.to_json(), "stages": [{"embed_dim": 192, "blocks": [{"num_heads": 3}]}]},
            r"Block cannot be made from \{'num_heads': 3\}",
        ),
        ({"schema": 1, "stages": ARCH.to_json()["stages"]}, r"Arch cannot be made from"),
    ],
    ids=[
        "newer",
        "no schema",
        "no mapping",
        "unknown field",
        "no stages",
        "no blocks",
        "short block",
        "short",
    ],
)
def test_bad_json_is_refused(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Arch.from_json(value)


def test_round_to_gives_the_nearest_multiple() -> None:
    assert [round_to(value, 16) for value in (1, 16, 23, 25, 225)] == [16, 16, 16, 32, 224]
