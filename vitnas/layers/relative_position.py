"""2-D relative positions on keys and values, at the price of one fused attention call.

Source: AutoFormer (arXiv 2107.00651), section 4, after Shaw et al. (arXiv 1803.02155):

    logits_ij = s (q_i . k_j + q_i . r^K_ij)        out_i = sum_j A_ij (v_j + r^V_ij)
    r_ij = rows[row_j - row_i] + cols[col_j - col_i], distances clipped to +-max_distance,
    and table entry 0 whenever i or j is the class token.

How it is computed. r_ij is a row part plus a column part, so q_i . r^K_ij depends on j only through its row and its
column. Write both parts, and the class token's, as extra *features*: the query gets its scores against every row,
every column and the class token; the key gets 1 in its own row, its own column, or the class entry. Their dot product
adds exactly q_i . r^K_ij to the logit. Likewise one-hot features appended to the values make attention return, per
query, how much weight each row, column and the class token received, from which r^V follows by one small product.
So the N x N x head_dim gather of a direct implementation never exists, and fused attention can be used.

Shapes: B images, A heads, N tokens, K head_dim, G patches along one side, F = 2G + (1 with a class token) features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitnas.layers.axes import Axes


class RelativePosition2d(nn.Module):
    """Two tables of `2 * max_distance + 2` vectors: entry 0 for the class token, the rest for clipped distances."""

    def __init__(self, head_dim: int, grid_size: int, max_distance: int, *, num_prefix_tokens: int) -> None:
        super().__init__()
        self.grid_size, self.max_distance, self.num_prefix_tokens = grid_size, max_distance, num_prefix_tokens
        self.rows = nn.Parameter(torch.empty(2 * max_distance + 2, head_dim))
        self.cols = nn.Parameter(torch.empty(2 * max_distance + 2, head_dim))

    @property
    def head_dim(self) -> int:
        return self.rows.shape[1]

    def axes(self) -> dict[str, Axes]:
        axes: Axes = (("distances", 2 * self.max_distance + 2), ("head_dim", self.head_dim))
        return {"rows": axes, "cols": axes}

    def scores(self, q_BANK: Tensor) -> Tensor:
        """q_i . r_ij as features of the query.

        Returns:
            (B, A, N, F): per query its products with each row's vector, each column's, and the class token's.
        """
        G, prefix = self.grid_size, self.num_prefix_tokens
        grid = q_BANK[:, :, prefix:].unflatten(2, (G, G))
        rows_GGK, cols_GGK = self._tables()
        rows = torch.einsum("bxrck,rjk->bxrcj", grid, rows_GGK).flatten(2, 3)
        cols = torch.einsum("bxrck,cjk->bxrcj", grid, cols_GGK).flatten(2, 3)
        if not prefix:
            return torch.cat([rows, cols], dim=-1)
        zero_BAN2 = q_BANK @ torch.stack([self.rows[0], self.cols[0]], dim=-1)
        both = zero_BAN2.sum(-1, keepdim=True)
        patches = torch.cat([rows, cols, both[:, :, prefix:]], dim=-1)
        first = zero_BAN2[:, :, :prefix].repeat_interleave(
            G, dim=-1
        )  # the class token is nowhere: entry 0 for all
        return torch.cat([torch.cat([first, both[:, :, :prefix]], dim=-1), patches], dim=2)

    def combine(self, weights_BANF: Tensor) -> Tensor:
        """sum_j A_ij r_ij, from the attention weight that each row, column and the class token received.

        Args:
            weights_BANF: sums of attention over the keys of each row, of each column, and on the class token.

        Returns:
            (B, A, N, K), to be added to the output of attention.
        """
        G, prefix = self.grid_size, self.num_prefix_tokens
        grid = weights_BANF[:, :, prefix:].unflatten(2, (G, G))
        rows_GGK, cols_GGK = self._tables()
        out = torch.einsum("bxrcj,rjk->bxrck", grid[..., :G], rows_GGK)
        out = (out + torch.einsum("bxrcj,cjk->bxrck", grid[..., G : 2 * G], cols_GGK)).flatten(2, 3)
        if not prefix:
            return out
        zero_K = self.rows[0] + self.cols[0]
        patches = out + weights_BANF[:, :, prefix:, 2 * G :] * zero_K
        # Attention sums to 1, so entry 0 for every key is just entry 0.
        first = zero_K.expand(*out.shape[:2], prefix, -1)
        return torch.cat([first, patches], dim=2)

    def _tables(self) -> tuple[Tensor, Tensor]:
        """(G, G, K) each: the vector from every row (column) to every row (column)."""
        index = distance_index(self.grid_size, self.max_distance, self.rows.device)
        return self.rows[index], self.cols[index]


def distance_index(grid_size: int, max_distance: int, device: torch.device) -> Tensor:
    """(G, G) table entries for the step from line i to line j: clip(j - i) + max_distance + 1."""
    line = torch.arange(grid_size, device=device)
    return (line[None, :] - line[:, None]).clamp(-max_distance, max_distance) + max_distance + 1


def line_features(grid_size: int, num_prefix_tokens: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(N, F) one-hot features of each token: its row, its column, or being the class token."""
    eye = torch.eye(grid_size, device=device, dtype=dtype)
    patches = torch.cat([eye.repeat_interleave(grid_size, 0), eye.repeat(grid_size, 1)], dim=1)
    if not num_prefix_tokens:
        return patches
    patches = torch.cat([patches, patches.new_zeros(grid_size**2, 1)], dim=1)
    prefix = patches.new_zeros(num_prefix_tokens, 2 * grid_size + 1)
    prefix[:, -1] = 1
    return torch.cat([prefix, patches])
