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

Shapes: B images, A heads, N tokens, K head_dim, R rows, C columns, G the longer of both, T table entries in use,
F = R + C + (1 with a class token) features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

from vitnas.grids import Grid
from vitnas.layers.axes import Axes


class RelativePosition2d(nn.Module):
    """Two tables of `2 * max_distance + 2` vectors: entry 0 for the class token, the rest for clipped distances."""

    def __init__(self, head_dim: int, grid: Grid, max_distance: int, *, num_prefix_tokens: int) -> None:
        super().__init__()
        self.grid, self.max_distance, self.num_prefix_tokens = grid, max_distance, num_prefix_tokens
        self.rows = nn.Parameter(torch.empty(2 * max_distance + 2, head_dim))
        self.cols = nn.Parameter(torch.empty(2 * max_distance + 2, head_dim))

    @property
    def head_dim(self) -> int:
        return self.rows.shape[1]

    def axes(self) -> dict[str, Axes]:
        axes: Axes = (("distances", 2 * self.max_distance + 2), ("head_dim", self.head_dim))
        return {"rows": axes, "cols": axes}

    def scores(self, q_BANK: Tensor, rows_BN: Tensor | None = None) -> Tensor:
        """q_i . r_ij as features of the query.

        Args:
            rows_BN: numbers of the tokens that are left of the grid's, if some were dropped.

        Returns:
            (B, A, N, F): per query its products with each row's vector, each column's, and the class token's.
        """
        products_BANT = q_BANK @ self._table().t()
        index = of_rows(self._index(q_BANK.device), rows_BN).expand(*q_BANK.shape[:2], -1, -1)
        lines = products_BANT.gather(-1, index)
        if not self.num_prefix_tokens:
            return lines
        rows, cols = products_BANT.chunk(2, dim=-1)
        return torch.cat([lines, rows[..., :1] + cols[..., :1]], dim=-1)

    def combine(self, weights_BANF: Tensor, rows_BN: Tensor | None = None) -> Tensor:
        """sum_j A_ij r_ij, from the attention weight that each row, column and the class token received.

        Args:
            weights_BANF: sums of attention over the keys of each row, of each column, and on the class token.
            rows_BN: as for `scores`.

        Returns:
            (B, A, N, K), to be added to the output of attention.
        """
        table_TK, lines = self._table(), weights_BANF[..., : sum(self.grid)]
        index = of_rows(self._index(weights_BANF.device), rows_BN)
        out: Tensor = summed_entries(lines, index, table_TK)
        if not self.num_prefix_tokens:
            return out
        return out + weights_BANF[..., sum(self.grid) :] * (self.rows[0] + self.cols[0])

    def _reach(self) -> int:
        """The largest distance that this grid has and the tables tell apart."""
        return min(self.max_distance, max(self.grid) - 1)

    def _table(self) -> Tensor:
        """(T, K): entry 0 and the distances in reach of the row table, then of the column table."""
        middle, reach = self.max_distance + 1, self._reach()
        parts = ((table[:1], table[middle - reach : middle + reach + 1]) for table in (self.rows, self.cols))
        return torch.cat([part for pair in parts for part in pair])

    def _index(self, device: torch.device) -> Tensor:
        """(N, R + C): the entry of `_table` for the step from every token to every row, then to every column.

        The class token is nowhere, so its entries are those of entry 0.
        """
        (rows, cols), reach = self.grid, self._reach()
        line = torch.arange(max(self.grid), device=device)
        step_GG = (line[None, :] - line[:, None]).clamp(-reach, reach) + reach + 1
        nowhere = step_GG.new_zeros(self.num_prefix_tokens, max(self.grid))
        rows_NR = torch.cat([nowhere[:, :rows], step_GG[:rows, :rows].repeat_interleave(cols, 0)])
        cols_NC = torch.cat([nowhere[:, :cols], step_GG[:cols, :cols].repeat(rows, 1)])
        return torch.cat([rows_NR, cols_NC + (2 * reach + 2)], dim=1)


@wrap_torch_function(lambda lines_BANF, index, table_TK: (lines_BANF, index, table_TK))
def summed_entries(lines_BANF: Tensor, index: Tensor, table_TK: Tensor) -> Tensor:
    """(B, A, N, K): the entries of a table, of which token n's line f counts for entry index[n, f].

    It can be overridden, as functions of torch can: an exporter says it in another way.

    Args:
        index: (N, F), or (B, 1, N, F).
    """
    index = index.expand(*lines_BANF.shape[:2], -1, -1)
    weights_BANT = lines_BANF.new_zeros(*lines_BANF.shape[:3], len(table_TK)).scatter_add(
        -1, index, lines_BANF
    )
    return weights_BANT @ table_TK


def of_rows(table_NX: Tensor, rows_BN: Tensor | None) -> Tensor:
    """The rows of a table with one per token of the grid, for tokens that are left: (B, 1, N, X); or all, (N, X)."""
    return table_NX if rows_BN is None else table_NX[rows_BN].unsqueeze(1)


def line_features(grid: Grid, num_prefix_tokens: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(N, F) one-hot features of each token: its row, its column, or being the class token."""
    rows, cols = grid
    eye = torch.eye(max(grid), device=device, dtype=dtype)
    patches = torch.cat(
        [eye[:rows, :rows].repeat_interleave(cols, 0), eye[:cols, :cols].repeat(rows, 1)], dim=1
    )
    if not num_prefix_tokens:
        return patches
    patches = torch.cat([patches, patches.new_zeros(rows * cols, 1)], dim=1)
    prefix = patches.new_zeros(num_prefix_tokens, rows + cols + 1)
    prefix[:, -1] = 1
    return torch.cat([prefix, patches])
