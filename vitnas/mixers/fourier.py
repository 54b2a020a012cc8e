"""Fourier mixing: the real part of a Fourier transform, without weights.

Source: Lee-Thorp et al., "FNet" (arXiv 2105.03824), section 3.1: Re(F_tokens(F_channels(x))), not normalised.
`Fourier2d` transforms the grid's rows and columns instead of the row of tokens: FNet2D of Vision X-formers
(arXiv 2107.02239, code); it has no place for a class token.

ONNX Runtime's transform is slow and one of torch's exporters has none, so export writes the transforms as products with
cosine and sine matrices.

Cost. A transform of n complex numbers counts 2 n log2(n) multiply-accumulates (radix 2: n/2 log2 n complex products of
four), log2 rounded up; of real ones half of that. Torch's counter takes transforms for nothing.

Shapes: B images, N tokens, D dim, R rows and C columns of patches.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vitnas.errors import UserError
from vitnas.grids import NO_GRID, Grid
from vitnas.layers.axes import Axes
from vitnas.mixers.mixer import Convention, Mixer, MixerShape, check_grid, check_tokens, in_full_precision


class Fourier(Mixer):
    """Re(FFT over tokens of FFT over channels). Takes any number of tokens."""

    word = "fourier"

    def __init__(self, dim: int, num_heads: int = 1, *, size: int | None = None, **options: object) -> None:
        super().__init__()
        self.resolve_size(size, 1, 0)

    def axes(self) -> dict[str, Axes]:
        return {}

    def mix(self, x_BND: Tensor) -> Tensor:
        return in_full_precision(lambda x: real_transform(x, (1, 2)), x_BND)

    @staticmethod
    def macs(shape: MixerShape, convention: Convention = "executed") -> int:
        return transform_macs(shape.dim, shape.tokens)

    @staticmethod
    def params(shape: MixerShape) -> int:
        return 0

    @staticmethod
    def memory(shape: MixerShape) -> int:
        return transform_memory(shape)


class Fourier2d(Mixer):
    """Re(FFT over rows, columns and channels). Needs a grid and no class token."""

    word = "fourier2d"
    needs_grid = True
    takes_class_token = False

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        size: int | None = None,
        grid: Grid = NO_GRID,
        num_prefix_tokens: int = 0,
        **options: object,
    ) -> None:
        super().__init__()
        self.resolve_size(size, 1, 0)
        if num_prefix_tokens:
            raise UserError(
                f"fourier2d was given {num_prefix_tokens} class token; it mixes rows and columns of patches, where "
                "that has no place. Set class_token=False, global_pool='avg'."
            )
        check_grid(self.word, grid)
        self.grid = grid

    def axes(self) -> dict[str, Axes]:
        return {}

    def set_grid(self, grid: Grid) -> None:
        self.grid = grid

    def mix(self, x_BND: Tensor) -> Tensor:
        check_tokens(self.word, x_BND.shape[1], self.grid, 0)
        return in_full_precision(self._transform, x_BND)

    def _transform(self, x_BND: Tensor) -> Tensor:
        x_BRCD = x_BND.unflatten(1, self.grid)
        return real_transform(x_BRCD, (1, 2, 3)).flatten(1, 2)

    @staticmethod
    def macs(shape: MixerShape, convention: Convention = "executed") -> int:
        return transform_macs(shape.dim, *shape.grid)

    @staticmethod
    def params(shape: MixerShape) -> int:
        return 0

    @staticmethod
    def memory(shape: MixerShape) -> int:
        return transform_memory(shape)


def real_transform(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Re(Fourier transform of `x` over `dims`), the last of which is the last of `x`.

    Of a real input's transform half the channels are enough: F at -f is the conjugate of F at f.
    """
    if not torch.onnx.is_in_onnx_export():
        mixed: Tensor = _Mirrored.apply(x, dims) if torch.is_grad_enabled() else _mirrored(x, dims)
        return mixed
    return _by_matrices(x, dims)


class _Mirrored(torch.autograd.Function):
    """The transform by its library routine. Its matrix is symmetric: the gradient is the transform of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        ctx.dims = dims
        return _mirrored(x, dims)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Mirrored.apply(grad, ctx.dims), None


def _mirrored(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    half = torch.fft.rfftn(x, dim=dims).real
    rest = half[..., 1 : (x.shape[-1] + 1) // 2].flip(dims).roll([1] * (len(dims) - 1), dims[:-1])
    return torch.cat([half, rest], dim=-1)


def _by_matrices(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The same by products with cosine and sine matrices."""
    real, imaginary = x, None
    for dim in reversed(dims):
        cos, sin = dft_matrices(x.shape[dim], x)
        # (cos - i sin) (real + i imaginary), along `dim`; of the last one only the real part is wanted
        turned = None if dim == dims[0] else -_along(sin, real, dim)
        if imaginary is None:
            real, imaginary = _along(cos, real, dim), turned
            continue
        real = _along(cos, real, dim) + _along(sin, imaginary, dim)
        imaginary = None if turned is None else turned + _along(cos, imaginary, dim)
    return real


def dft_matrices(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi jk / size, (size, size). In float64 for such numbers alone: ONNX Runtime 1.23 has no
    cosine of these. Angles of at most pi lose least in float32."""
    line = torch.arange(size, device=like.device, dtype=torch.int64)
    turns = (line[:, None] * line + size // 2) % size - size // 2
    angle = turns.to(torch.promote_types(like.dtype, torch.float32)) * (2 * math.pi / size)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def transform_macs(channels: int, *sides: int) -> int:
    """Multiply-accumulates of a real transform over channels, then of half of them over each of `sides`."""
    tokens = math.prod(sides)
    halves = 2 * tokens * (channels // 2 + 1)
    return tokens * channels * _log2(channels) + halves * sum(_log2(side) for side in sides)


def transform_memory(shape: MixerShape) -> int:
    """Peak elements: the complex half, with the mirrored rest and the result beside its real part."""
    half = shape.dim // 2 + 1
    rest = shape.dim - half
    return shape.tokens * max(4 * half, 2 * half + rest + max(rest, shape.dim))


def _log2(size: int) -> int:
    return (size - 1).bit_length()


def _along(matrix: Tensor, x: Tensor, dim: int) -> Tensor:
    """`matrix` (symmetric) times `x` along `dim`."""
    if dim == x.dim() - 1:
        return x @ matrix
    return (matrix @ x.flatten(dim + 1)).unflatten(dim + 1, [int(size) for size in x.shape[dim + 1 :]])
