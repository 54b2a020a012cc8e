"""Models with mixers, stems, positions and pooling of every kind: their counts are torch's."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from vitnas.arch import Arch, Block, Stage
from vitnas.counting import count
from vitnas.errors import UserError
from vitnas.measure.memory import peak_activation_bytes
from vitnas.mixers import MIXERS
from vitnas.model import build
from vitnas.space import mixer_space
from vitnas.testing.flops import counted_macs

WORDS: tuple[Any, ...] = tuple(MIXERS)


def wild(rng: random.Random, word: Any) -> Arch:
    """An Arch of any shape with this mixer in its first block and any other in its second."""
    class_token = rng.random() < 0.5
    words = [word, rng.choice(WORDS)]
    if "fourier2d" in words:
        class_token = False
    placeless = {"fourier", "fourier2d", "token_mlp"}
    positions = ["learned", "none"] + ([] if set(words) <= placeless else ["rotary", "rotary_2d"])
    patch, grid = rng.choice([1, 2, 4]), (rng.choice([3, 4, 6, 8]), rng.choice([3, 4, 6, 9]))
    blocks = tuple(
        Block(
            num_heads=rng.choice([1, 2, 3]),
            head_dim=rng.choice([4, 8, 12]),
            mlp_hidden=rng.choice([3, 16, 100]),
            mixer=each,
            mixer_size=None if each in ("softmax", "fourier", "fourier2d") else rng.choice([1, 3, 9]),
        )
        for each in words
    )
    return Arch(
        image_size=(patch * grid[0], patch * grid[1]),
        patch_size=patch,
        in_chans=rng.choice([1, 3]),
        num_classes=rng.choice([0, 10, 300]),
        stages=(Stage(embed_dim=rng.choice([8, 17, 48]), blocks=blocks),),
        stem=rng.choice(["linear", "hybrid", "cct"]),
        class_token=class_token,
        position=rng.choice(positions),
        global_pool=rng.choice(["token", "avg", "seq"] if class_token else ["avg", "seq"]),
        mlp_norm=rng.choice(["branch", "stream"]),
        qkv_bias=rng.random() < 0.5,
    )


def check_counts(word: str, seed: str, archs: int) -> None:
    rng = random.Random(seed)
    for _ in range(archs):
        arch = wild(rng, word)
        shape, cost, model = arch.input_size, count(arch), build(arch).eval()
        assert cost.macs == counted_macs(model, (1, *shape)), arch
        assert cost.params == sum(parameter.numel() for parameter in model.parameters()), arch
        for device in ("meta", None):
            assert cost.memory_bytes == peak_activation_bytes(model, shape, device=device), (arch, device)


@pytest.mark.parametrize("word", WORDS)
def test_counts_are_those_of_torch(word: str) -> None:
    check_counts(word, word, 2)


@pytest.mark.slow
@pytest.mark.parametrize("word", WORDS)
def test_counts_of_more_archs_are_those_of_torch(word: str) -> None:
    check_counts(word, f"{word}, more", 12)


def changed(block: dict[str, Any], **fields: Any) -> Arch:
    blocks = (Block(**{"num_heads": 2, "head_dim": 8, "mlp_hidden": 16, **block}),)
    return Arch(
        **{
            "image_size": 16,
            "patch_size": 4,
            "stages": (Stage(embed_dim=16, blocks=blocks),),
            **fields,
        }
    )


@pytest.mark.parametrize(
    ("block", "fields", "sentence"),
    [
        ({"mixer": "nystrm"}, {}, r"mixer is 'nystrm'; it must be one of .*nystrom"),
        ({"mixer_size": 0, "mixer": "nystrom"}, {}, r"mixer_size is 0; it must be a whole number of at least 1"),
        ({"mixer": "fourier2d"}, {}, r"block 0: mixer is 'fourier2d'; .* Use class_token=False and"),
        ({"mixer": "performer"}, {"relative_position": 3}, r"only softmax has relative positions\. Use rel"),
        ({}, {"position": "rotary", "relative_position": 3}, r"one kind of distances is enough"),
        ({"head_dim": 7}, {"position": "rotary"}, r"head_dim is 7; .* in groups of 2\. Nearest: 8"),
        ({"head_dim": 6}, {"position": "rotary_2d"}, r"head_dim is 6; .* in groups of 4\. Nearest: 8"),
        ({}, {"stem": "hybrid", "patch_size": 16}, r"patch_size is 16; stem 'hybrid' .* Nearest: 8"),
        ({}, {"stem": "cct", "image_size": 15, "patch_size": 3}, r"patch_size is 3; .* Nearest: 2"),
    ],
)  # fmt: skip
def test_an_arch_that_cannot_be_is_refused(
    block: dict[str, Any], fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        changed(block, **fields)


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        (
            {"mixer": "softmax", "mixer_size": 3},
            r"mixer_size is 3; softmax has no such number\. Leave it out",
        ),
        ({"mixer": "fourier", "mixer_size": 3}, r"mixer_size is 3; fourier has no such number"),
        ({"mixer": "linformer"}, r"mixer_size is 64; linformer compresses 17 tokens .* Nearest: 17"),
        ({"mixer": "nystrom", "mixer_size": 18}, r"more landmarks than tokens\. Nearest: 17"),
    ],
)
def test_sizes_that_cannot_work_are_refused_by_building_and_counting(
    block: dict[str, Any], sentence: str
) -> None:
    arch = changed(block)
    for call in (build, count):
        with pytest.raises(UserError, match=sentence):
            call(arch)


@pytest.mark.parametrize("word", ["linformer", "nystrom"])
def test_a_grid_too_small_for_a_mixer_is_refused(word: Any) -> None:
    """The Arch would say what nobody can build; the Model stays as it was."""
    block = Block(num_heads=1, head_dim=4, mlp_hidden=8, mixer=word, mixer_size=16)
    model = build(
        Arch(image_size=16, patch_size=2, num_classes=2, stages=(Stage(embed_dim=8, blocks=(block,)),))
    ).eval()
    with pytest.raises(UserError, match=r"mixer_size is 16; .* Nearest: 10"):
        model.set_input_size(6)
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 2)
    model.set_input_size(8)
    assert build(model.arch).eval()(torch.zeros(1, 3, 8, 8)).shape == (1, 2)


def test_rotary_2d_needs_its_grid() -> None:
    """Without one it would turn nothing, and say nothing."""
    for grid, tokens in ((0, 10), (4, 10)):
        mixer = MIXERS["softmax"](8, 2, rotary="rotary_2d", grid=(grid, grid))
        with pytest.raises(UserError, match=r"'rotary_2d' was given 10 tokens; it was made for"):
            mixer(torch.zeros(1, tokens, 8))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"positions": ("learned", "rotray", "none")}, r"position is 'rotray'; .*Nearest: 'rotary'"),
        ({"positions": ("none", "rotary_2d", "learned"), "head_dim": 18}, r"head_dim is 18; position 'rotary_2d'"),
        ({"patch_size": 0}, r"patch_size is 0; it must be"),
    ],
)  # fmt: skip
def test_spaces_that_cannot_be_are_refused(options: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        mixer_space(**options)


def test_images_of_another_size_are_refused() -> None:
    for stem in ("linear", "hybrid", "cct"):
        model = build(changed({}, stem=stem))
        with pytest.raises(UserError, match=r"the images are \(20, 16\); the model takes 16 x 16 pixels"):
            model(torch.zeros(1, 3, 20, 16))
