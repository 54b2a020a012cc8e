"""A second opinion on multiply-accumulates: torch's counter, which is also told what a Fourier transform costs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from vitnas.layers.axes import named_tensors


def counted_macs(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of `module` on an input of `shape`, by torch's counter.

    On the meta device: fused attention counts as nothing on the CPU in some versions of torch.
    """
    empty = {name: torch.empty_like(t, device="meta") for name, t in named_tensors(module).items()}
    formulas = {torch.ops.aten._fft_r2c: _real, torch.ops.aten._fft_c2c: _complex}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        functional_call(module, empty, (torch.empty(shape, device="meta"),))
    flops: int = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


def _complex(x_shape: Any, dims: list[int], *args: Any, out_shape: Any = None, **options: Any) -> int:
    """4 n log2(n) operations per complex transform of n numbers, log2 rounded up."""
    return sum(4 * math.prod(x_shape) * (x_shape[dim] - 1).bit_length() for dim in dims)


def _real(x_shape: Any, dims: list[int], *args: Any, out_shape: Any = None, **options: Any) -> int:
    """Half of that over the last of `dims`, then complex transforms of the half that is kept over the others."""
    half = [*x_shape]
    half[dims[-1]] = x_shape[dims[-1]] // 2 + 1
    return _complex(x_shape, dims[-1:]) // 2 + _complex(half, dims[:-1])


def random_input(shape: tuple[int, ...], seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise from a generator of its own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
