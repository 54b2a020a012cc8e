"""Arch: a frozen, validated value with a stable name and a JSON form."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest

from vitnas.arch import Arch, Block, Stage, round_to
from vitnas.errors import UserError
from vitnas.model.published import PUBLISHED

BLOCK = Block(num_heads=3, head_dim=64, mlp_hidden=768)
ARCH = Arch(image_size=224, patch_size=16, stages=(Stage(embed_dim=192, blocks=(BLOCK,) * 12),))
OTHERS: dict[str, Any] = {
    "image_size": 192,
    "patch_size": 14,
    "in_chans": 1,
    "num_classes": 10,
    "stages": (Stage(embed_dim=192, blocks=(BLOCK,) * 11),),
    "class_token": False,
    "position": "none",
    "relative_position": 14,
    "global_pool": "avg",
    "fc_norm": True,
    "qkv_bias": False,
    "norm_eps": 1e-5,
}


def test_sizes_follow_from_the_fields() -> None:
    assert (ARCH.embed_dim, ARCH.depth, ARCH.grid_size) == (192, 12, 14)
    assert (ARCH.num_prefix_tokens, ARCH.num_tokens) == (1, 197)
    assert replace(ARCH, class_token=False, global_pool="avg").num_tokens == 196
    assert ARCH.blocks == (BLOCK,) * 12


def test_an_arch_is_a_value() -> None:
    again = Arch.from_json(ARCH.to_json())
    assert again == ARCH
    assert hash(again) == hash(ARCH)
    assert again.id == ARCH.id
    with pytest.raises(FrozenInstanceError):
        ARCH.image_size = 32  # type: ignore[misc]


@pytest.mark.parametrize("arch", [*PUBLISHED.values(), ARCH], ids=lambda arch: arch.id)
def test_json_round_trip(arch: Arch) -> None:
    assert Arch.from_json(json.loads(json.dumps(arch.to_json()))) == arch


def test_every_field_changes_the_name() -> None:
    assert set(OTHERS) | {"stem"} == {field.name for field in fields(Arch)}
    found = {ARCH.id}
    for name, value in OTHERS.items():
        change = {name: value, "global_pool": "avg"} if name == "class_token" else {name: value}
        found.add(replace(ARCH, **change).id)
    assert len(found) == len(OTHERS) + 1


def test_names_stay_the_same_between_versions() -> None:
    # Run folders are keyed by these names; if this fails, raise arch.SCHEMA and say how old folders are read.
    assert {name: arch.id for name, arch in PUBLISHED.items()} == {
        "autoformer_tiny": "d192-l13-b0736f62",
        "autoformer_small": "d384-l13-94128cd8",
        "autoformer_base": "d576-l14-0a97fa10",
    }


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
        ({"num_classes": -1}, r"cannot be negative; 0 means none"),
        ({"relative_position": -1}, r"cannot be negative; 0 means none"),
        (
            {"position": "learnt"},
            r"position is 'learnt'; it must be one of learned, none\. Nearest: 'learned'",
        ),
        ({"stem": "conv"}, r"stem is 'conv'; it must be one of linear"),
        ({"global_pool": "max"}, r"global_pool is 'max'; it must be one of token, avg"),
        ({"class_token": False}, r"global_pool is 'token' but class_token is False; use global_pool='avg'"),
        ({"stages": ARCH.stages * 2}, r"there are 2 stages; .* exactly one"),
        ({"stages": ()}, r"there are 0 stages"),
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
        ({"mixer": "softmx"}, r"mixer is 'softmx'; it must be one of softmax\. Nearest: 'softmax'"),
        ({"slot": -1}, r"slot is -1; it counts from 0"),
    ],
    ids=str,
)
def test_bad_blocks_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(BLOCK, **change)


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
    assert Stage(embed_dim=192, blocks=tuple(replace(BLOCK, slot=slot) for slot in (0, 2)))


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
