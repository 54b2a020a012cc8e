"""Every mixer against its contract, with the equations of its paper in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from equations import apart, attention, heads_of, joined, softmax, turned
from torch import Tensor
from torch.nn import functional

from vitnas.grids import Grid
from vitnas.mixers import MIXERS, MixerShape
from vitnas.testing import MixerContract


class TestSoftmax(MixerContract):
    word = "softmax"

    def equations(self, mixer: Any, x_BND: Tensor) -> Tensor:
        return joined(mixer, attention(mixer, *heads_of(mixer, x_BND)))


class TestPerformer(MixerContract):
    word, size = "performer", 11

    def equations(self, mixer: Any, x_BND: Tensor) -> Tensor:
        q, k, v = heads_of(mixer, x_BND)
        root, eps = mixer.head_dim**-0.25, 1e-4

        def exponent(x: Tensor) -> tuple[Tensor, Tensor]:
            products = (root * x) @ mixer.features.t()
            return products, ((root * x) ** 2).sum(-1, keepdim=True) / 2

        (pq, nq), (pk, nk) = exponent(q), exponent(k)
        phi_q = (pq - nq - pq.max(-1, keepdim=True).values).exp() + eps
        phi_k = (pk - nk - pk.flatten(2).max(-1).values[..., None, None]).exp() + eps
        weights = phi_q @ phi_k.transpose(-1, -2)
        return joined(mixer, weights @ v / weights.sum(-1, keepdim=True))


class TestLinformer(MixerContract):
    word, size = "linformer", 4

    def equations(self, mixer: Any, x_BND: Tensor) -> Tensor:
        q, k, v = heads_of(mixer, x_BND)
        mixed_k = torch.einsum("nr,bank->bark", mixer.proj_k, k)
        return joined(mixer, attention(mixer, q, mixed_k, torch.einsum("nr,bank->bark", mixer.proj_v, v)))


class TestLinformerShared(MixerContract):
    word, size = "linformer_shared", 4

    def equations(self, mixer: Any, x_BND: Tensor) -> Tensor:
        q = apart(mixer, x_BND @ mixer.q.weight.t() + mixer.q.bias)
        k = apart(mixer, x_BND @ mixer.k.weight.t() + mixer.k.bias, mixer.kv_heads)
        mixed_k = torch.einsum("nr,bank->bark", mixer.proj_k, turned(mixer, k))
        mixed_v = torch.einsum("nr,bank->bark", mixer.proj_k, k)
        return joined(mixer, attention(mixer, turned(mixer, q), mixed_k, mixed_v))


class TestLinformerOneHead(TestLinformerShared):
    word = "linformer_one_head"


class TestNystrom(MixerContract):
    word, size = "nystrom", 4

    def equations(self, mixer: Any, x_BND: Tensor) -> Tensor:
        q, k, v = heads_of(mixer, x_BND)
        tokens, scale = q.shape[2], mixer.head_dim**-0.5
        count = min(4, tokens)
        lengths = [tokens // count + (index < tokens % count) for index in range(count)]
        marks_q, marks_k = (
            torch.stack([part.mean(2) for part in x.split(lengths, dim=2)], dim=2) for x in (q, k)
        )
        left = softmax(scale * q @ marks_k.transpose(-1, -2))
        middle = softmax(scale * marks_q @ marks_k.transpose(-1, -2))
        right = softmax(scale * marks_q @ k.transpose(-1, -2))
        # One matrix at a time.
        inverse = torch.stack([torch.stack([self.inverse(matrix) for matrix in image]) for image in middle])
        padded = functional.pad(v, (0, 0, 16, 16))
        taps = mixer.conv.weight[:, 0, :, 0]
        near = sum(taps[None, :, i, None, None] * padded[:, :, i : i + tokens] for i in range(33))
        return joined(mixer, left @ inverse @ right @ v + near)

    @staticmethod
    def inverse(a: Tensor) -> Tensor:
        z = a.t() / (a.sum(0).max() * a.sum(1).max())
        eye = torch.eye(len(a), dtype=a.dtype)
        for _ in range(6):
            z = z @ (13 * eye - a @ z @ (15 * eye - a @ z @ (7 * eye - a @ z))) / 4
        return z


def dft(size: int) -> Tensor:
    line = torch.arange(size, dtype=torch.float64)
    angle = -2 * math.pi * line[:, None] * line[None, :] / size
    return torch.complex(angle.cos(), angle.sin())


class TestFourier(MixerContract):
    word = "fourier"

    def equations(self, mixer: Any, x_BND: Tensor) -> Tensor:
        tokens, dim = x_BND.shape[1:]
        return (dft(tokens) @ x_BND.to(torch.complex128) @ dft(dim)).real


def test_the_gradient_of_transforms() -> None:
    for kind, grid in ((TestFourier, (3, 3)), (TestFourier2d, (2, 3))):
        mixer = kind().make(grid, 0)
        x = torch.randn(2, math.prod(grid), 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(mixer, (x,))
        assert torch.autograd.gradgradcheck(mixer, (x,))


class TestFourier2d(MixerContract):
    word, prefixes = "fourier2d", (0,)

    def equations(self, mixer: Any, x_BND: Tensor) -> Tensor:
        x = x_BND.unflatten(1, mixer.grid).to(torch.complex128)
        down, across = (dft(side) for side in mixer.grid)
        return torch.einsum("bxyd,xr,yc,de->brce", x, down, across, dft(x.shape[-1])).real.flatten(1, 2)


class TestTokenMlp(MixerContract):
    word, size = "token_mlp", 7

    def equations(self, mixer: Any, x_BND: Tensor) -> Tensor:
        hidden = torch.einsum("hn,bnd->bhd", mixer.fc1.weight, x_BND) + mixer.fc1.bias[:, None]
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        return torch.einsum("nh,bhd->bnd", mixer.fc2.weight, hidden) + mixer.fc2.bias[:, None]


class TestLongShort(MixerContract):
    word, size = "long_short", 3
    # 8: two windows of 4 a side; 9: two of 5, one row over
    grids: ClassVar[tuple[Grid, ...]] = ((3, 3), (8, 8), (9, 9), (3, 9), (8, 2), (15, 7))
    own: ClassVar[dict[str, Any]] = {}  # window and kind of bias

    def options(self, grid: Grid, prefix: int, rotary: str = "none") -> dict[str, Any]:
        return super().options(grid, prefix, rotary) | self.own

    def shape(self, grid: Grid, prefix: int, rotary: str, bias: bool = True) -> MixerShape:
        return super().shape(grid, prefix, rotary, bias)._replace(**self.own)

    def bias_of(self, mixer: Any, down: int, across: int) -> Tensor:
        """Of the step from a query to a key."""
        step: Tensor = mixer.bias[down + 9, across + 9]
        return step

    def equations(self, mixer: Any, x_BND: Tensor) -> Tensor:
        """Query by query."""
        heads, K, prefix, (high, wide) = mixer.num_heads, mixer.head_dim, mixer.num_prefix_tokens, mixer.grid
        inner = heads * K
        rows = x_BND @ mixer.qkv.weight.t() + mixer.qkv.bias
        q = turned(mixer, apart(mixer, rows[..., :inner]))
        k, v = (
            apart(mixer, functional.layer_norm(part, (inner,), mixer.norm_full.weight, mixer.norm_full.bias))
            for part in (rows[..., inner : 2 * inner], rows[..., 2 * inner :])
        )
        k = turned(mixer, k)
        weights = softmax((x_BND[:, prefix:] @ mixer.dynamic.weight.t() + mixer.dynamic.bias).transpose(1, 2))
        weights = weights.unflatten(1, (heads, 3))
        low_k, low_v = (self.low_rank(mixer, weights @ part[:, :, prefix:]) for part in (k, v))
        height, width = (-(-side // -(-side // mixer.window)) for side in mixer.grid)
        patches = torch.empty_like(q[:, :, prefix:])
        for row in range(high):
            for col in range(wide):
                top, left = row // height * height, col // width * width
                near = [
                    (r, c)
                    for r in range(top - height // 2, top + height + height // 2)
                    for c in range(left - width // 2, left + width + width // 2)
                    if 0 <= r < high and 0 <= c < wide
                ]
                keys = torch.cat(
                    [low_k, k[:, :, :prefix], k[:, :, [prefix + r * wide + c for r, c in near]]], dim=2
                )
                values = torch.cat(
                    [low_v, v[:, :, :prefix], v[:, :, [prefix + r * wide + c for r, c in near]]], dim=2
                )
                bias = torch.zeros(heads, keys.shape[2], dtype=x_BND.dtype)
                for place, (r, c) in enumerate(near):
                    bias[:, 3 + prefix + place] = self.bias_of(mixer, r - row, c - col)
                query = q[:, :, prefix + row * wide + col, None]
                logits = query @ keys.transpose(-1, -2) * K**-0.5 + bias[:, None]
                patches[:, :, row * wide + col, None] = softmax(logits) @ values
        if not prefix:
            return joined(mixer, patches)
        own_k, own_v = (torch.cat([part[:, :, :1], patches], dim=2) for part in (k, v))
        return joined(mixer, torch.cat([attention(mixer, q[:, :, :1], own_k, own_v), patches], dim=2))

    @staticmethod
    def low_rank(mixer: Any, mixed: Tensor) -> Tensor:
        norm, inner = mixer.norm_dynamic, mixer.num_heads * mixer.head_dim
        flat = torch.cat(list(mixed.unbind(1)), dim=-1)
        return apart(mixer, functional.layer_norm(flat, (inner,), norm.weight, norm.bias))


class FoldedLongShort(TestLongShort):
    """The authors' table, in which a step in rows counts as many entries as a window's keys are wide."""

    __test__ = False
    grids: ClassVar[tuple[Grid, ...]] = ((8, 8), (3, 5))
    own: ClassVar[dict[str, Any]] = {"window": 4, "window_bias": "folded"}

    def bias_of(self, mixer: Any, down: int, across: int) -> Tensor:
        step: Tensor = mixer.bias[(5 - down) * 8 + 5 - across]
        return step


@pytest.mark.parametrize(
    "promise",
    [
        "the_equations_of_the_paper",
        "macs_are_those_of_the_counter",
        "params",
        "memory_is_what_is_alive_at_the_peak",
    ],
)
def test_windows_of_another_size_and_the_authors_table(promise: str) -> None:
    getattr(FoldedLongShort(), f"test_{promise}")()


CONTRACTS = [
    kind for kind in list(globals().values()) if isinstance(kind, type) and issubclass(kind, MixerContract)
]


def test_every_mixer_has_a_contract() -> None:
    assert {kind.word for kind in CONTRACTS if kind is not MixerContract} == set(MIXERS)


@pytest.mark.parametrize("word", MIXERS)
def test_export_by_tracing(word: str, tmp_path: Path) -> None:
    next(kind for kind in CONTRACTS[1:] if kind.word == word)().check_export(tmp_path, "legacy")


@pytest.mark.slow
@pytest.mark.parametrize("word", MIXERS)
def test_export(word: str, tmp_path: Path) -> None:
    next(kind for kind in CONTRACTS[1:] if kind.word == word)().check_export(tmp_path, "dynamo")
