"""2-D relative attention against its equations, written out with the N x N x K gather that our code avoids."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import Tensor

from vitnas.grids import Grid
from vitnas.mixers import Softmax
from vitnas.testing import randomize_

HEADS, WIDTH, DIM = 2, 5, 7


def vectors(rows: Tensor, cols: Tensor, grid: Grid, num_prefix: int, limit: int) -> Tensor:
    """(N, N, K): r_ij = rows[a] + cols[b], a and b the clipped steps from i to j, entry 0 for the class token."""
    num_tokens = prod(grid) + num_prefix
    found = torch.empty(num_tokens, num_tokens, rows.shape[1], dtype=rows.dtype)
    for i in range(num_tokens):
        for j in range(num_tokens):
            if i < num_prefix or j < num_prefix:
                a = b = 0
            else:
                (row_i, col_i), (row_j, col_j) = (
                    divmod(i - num_prefix, grid[1]),
                    divmod(j - num_prefix, grid[1]),
                )
                a = max(-limit, min(limit, row_j - row_i)) + limit + 1
                b = max(-limit, min(limit, col_j - col_i)) + limit + 1
            found[i, j] = rows[a] + cols[b]
    return found


def attention(mixer: Softmax, x_BND: Tensor, grid: Grid, num_prefix: int, limit: int) -> Tensor:
    """The equations of layers/relative_position.py, one head and one query at a time."""
    keys, values = mixer.rel_pos_k, mixer.rel_pos_v
    assert keys is not None
    assert values is not None
    rel_k = vectors(keys.rows, keys.cols, grid, num_prefix, limit)
    rel_v = vectors(values.rows, values.cols, grid, num_prefix, limit)
    out = torch.empty(*x_BND.shape[:2], HEADS * WIDTH, dtype=x_BND.dtype)
    for image, x_ND in enumerate(x_BND):
        qkv = x_ND @ mixer.qkv.weight.T + mixer.qkv.bias
        q, k, v = (qkv[:, part * HEADS * WIDTH : (part + 1) * HEADS * WIDTH] for part in range(3))
        for head in range(HEADS):
            cut = slice(head * WIDTH, (head + 1) * WIDTH)
            for i in range(len(x_ND)):
                logits = WIDTH**-0.5 * ((k[:, cut] + rel_k[i]) @ q[i, cut])
                out[image, i, cut] = logits.softmax(0) @ (v[:, cut] + rel_v[i])
    return out @ mixer.proj.weight.T + mixer.proj.bias


@pytest.mark.parametrize("num_prefix", [0, 1], ids=["no class token", "class token"])
@pytest.mark.parametrize("limit", [1, 2, 14])
@pytest.mark.parametrize("grid", [(2, 2), (3, 3), (4, 4), (5, 5), (2, 5), (4, 1)])
def test_relative_attention_equals_its_equations(
    grid: Grid, limit: int, num_prefix: int, generator: torch.Generator
) -> None:
    mixer = Softmax(
        DIM, HEADS, head_dim=WIDTH, relative_position=limit, grid=grid, num_prefix_tokens=num_prefix
    ).double()
    randomize_(mixer, generator)
    x_BND = torch.randn(2, prod(grid) + num_prefix, DIM, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(
            mixer(x_BND), attention(mixer, x_BND, grid, num_prefix, limit), rtol=1e-12, atol=1e-12
        )


def test_gradients_are_those_of_the_equations(generator: torch.Generator) -> None:
    mixer = Softmax(DIM, HEADS, head_dim=WIDTH, relative_position=1, grid=(3, 3)).double()
    randomize_(mixer, generator)
    x_BND = torch.randn(1, 10, DIM, dtype=torch.float64, generator=generator)
    weights = list(mixer.parameters())
    got = torch.autograd.grad(mixer(x_BND).square().sum(), weights)
    want = torch.autograd.grad(attention(mixer, x_BND, (3, 3), 1, 1).square().sum(), weights)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
