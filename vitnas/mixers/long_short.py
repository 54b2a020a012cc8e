"""Long-short attention: a window of neighbours at full detail and a few mixtures of the whole image, in one softmax.

Source: Zhu et al., "Long-Short Transformer" (arXiv 2107.02192), sections 3.2 to 3.4, and section 4.3 for images:

1. Keys and values, normalised together over all heads (DualLN, first norm; the class token too).
2. Long range: R mixtures per head, weights softmax over tokens of a linear function of x; of the normalised keys and
   values; normalised again (DualLN, second norm).
3. Short range: windows of w x w queries see the w x w keys and floor(w / 2) around them; a learned bias per head and
   step (row, column) is added here only. Outside of the image there are no keys.
4. One softmax over mixtures, window and class token.
5. The class token attends to itself and to the patches' outputs of step 4.

Differs from the authors' code (PAPERS.md): the bias has one entry per step (theirs folds steps of the two axes into one
number, so that different steps share entries; `window_bias` "folded" does so too, which their weights need); grids
that windows do not divide are filled with keys and queries that nobody sees; without a class token step 5 is left out.
w is `window` at most and divides the rows (the columns) as evenly as it can, so that windows may be wider than they are
high.

Shapes: B images, A heads, N tokens, K head_dim, I = A x K, R mixtures, T windows, W queries and S keys per window.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.errors import UserError
from vitnas.grids import Grid
from vitnas.layers.axes import Axes
from vitnas.layers.rotary import rotary_memory
from vitnas.mixers.mixer import Convention, HeadMixer, MixerShape, in_full_precision, shared_params

WINDOW = 7
EPS = 1e-5


class LongShort(HeadMixer):
    """Transformer-LS attention. `size` is the number of mixtures R per head, 8 by default; it needs a grid.

    Args besides those of every mixer:
        window: the longest side of a window, in patches.
        window_bias: "step", an entry per step from query to key; "folded", the authors' shorter table (the module's
            docstring).
    """

    word = "long_short"
    size_means = "mixtures"
    needs_grid = True
    takes_qkv = False  # its windows and mixtures are made from the tokens
    default_window = WINDOW
    has_own_bias = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int | None = None,
        window_bias: str = "step",
        **options: object,
    ) -> None:
        super().__init__(dim, num_heads, **options)  # type: ignore[arg-type]
        inner = num_heads * self.head_dim
        self.window, self.is_folded = window or WINDOW, window_bias == "folded"
        self.steps = steps_of(self.window)
        self.dynamic = nn.Linear(dim, num_heads * self.size)
        self.norm_full = nn.LayerNorm(inner, eps=EPS)
        self.norm_dynamic = nn.LayerNorm(inner, eps=EPS)
        table = (folded_rows(self.window),) if self.is_folded else (self.steps, self.steps)
        self.bias = nn.Parameter(torch.empty(*table, num_heads))

    @staticmethod
    def default_size(head_dim: int) -> int:
        return 8

    def axes(self) -> dict[str, Axes]:
        dim: Axes = (("dim", self.proj.out_features),)
        heads: Axes = (("heads", self.num_heads),)
        rows: Axes = (*heads, ("mixtures", self.size))
        norms = {f"norm_{n}.{k}": self.inner_axes for n in ("full", "dynamic") for k in ("weight", "bias")}
        return (
            super().axes()
            | norms
            | {
                "dynamic.weight": rows + dim,
                "dynamic.bias": rows,
                "bias": (*(("distances", size) for size in self.bias.shape[:-1]), *heads),
            }
        )

    def _attended(self, x_BND: Tensor) -> Tensor:
        tokens, prefix = self.count_tokens(x_BND, 1), self.num_prefix_tokens
        q, k, v = self.qkv(x_BND).chunk(3, dim=-1)
        heads = (self.num_heads, self.head_dim)
        q_BANK, k_BANK, v_BANK = (
            part.unflatten(2, heads).transpose(1, 2) for part in (q, self.norm_full(k), self.norm_full(v))
        )
        del q, k, v
        q_BANK, k_BANK = self.rotary(q_BANK, k_BANK)
        scores = self.dynamic(x_BND[:, prefix:]).unflatten(2, (self.num_heads, self.size))
        weights_BARn = in_full_precision(lambda s: s.softmax(1), scores).permute(0, 2, 3, 1)
        del scores
        mixtures = [
            self._normed_mixture(weights_BARn, part[:, :, prefix:tokens]) for part in (k_BANK, v_BANK)
        ]
        del weights_BARn
        patches = self._windows(q_BANK, k_BANK, v_BANK, mixtures)
        if not prefix:
            return patches
        classes = functional.scaled_dot_product_attention(
            q_BANK[:, :, :prefix],
            torch.cat([k_BANK[:, :, :prefix], patches], dim=2),
            torch.cat([v_BANK[:, :, :prefix], patches], dim=2),
            scale=self.scale,
        )
        return torch.cat([classes, patches], dim=2)

    def core(self, q_BANK: Tensor, k_BANK: Tensor, v_BANK: Tensor) -> Tensor:
        raise UserError(
            "long_short makes its mixtures from the tokens, not from queries, keys and values. Choose another mixer."
        )

    def _normed_mixture(self, weights_BARn: Tensor, part_BAnK: Tensor) -> Tensor:
        mixed = (weights_BARn @ part_BAnK).transpose(1, 2).flatten(2)
        return self.norm_dynamic(mixed).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _windows(self, q_BANK: Tensor, k_BANK: Tensor, v_BANK: Tensor, mixtures: list[Tensor]) -> Tensor:
        """Output of the patches, (B, A, n, K). Windows and heads share one axis, heads running faster."""
        prefix, (rows, cols) = self.num_prefix_tokens, self.grid
        lines = windows(rows, self.window), windows(cols, self.window)
        (down, height), (across, width) = lines
        q_BTWK = _tiles(q_BANK[:, :, prefix:], self.grid, lines, halo=False)
        parts = []
        for part_BANK, mixture_BARK in zip((k_BANK, v_BANK), mixtures, strict=True):
            near = _tiles(part_BANK[:, :, prefix:], self.grid, lines, halo=True)
            far = torch.cat([mixture_BARK, part_BANK[:, :, :prefix]], dim=2)
            parts.append(torch.cat([far.repeat(1, down * across, 1, 1), near], dim=2))
            del near, far
        keys = parts[0].shape[2]
        mask_TWS = self._steps_bias(height, width, keys, q_BTWK) + _outside(self.grid, lines, keys, q_BTWK)
        out = functional.scaled_dot_product_attention(
            q_BTWK, parts[0], parts[1], attn_mask=mask_TWS.flatten(0, 1)[None], scale=self.scale
        )
        del parts, mask_TWS
        out = out.unflatten(2, (height, width)).unflatten(1, (down, across, self.num_heads))
        out = out.permute(0, 3, 1, 4, 2, 5, 6)
        out = out.reshape(-1, self.num_heads, down * height, across * width, self.head_dim)
        return out[:, :, :rows, :cols].flatten(2, 3)

    def _steps_bias(self, height: int, width: int, keys: int, like: Tensor) -> Tensor:
        """(A, W, S): the bias of the step from each query to each key of its window, 0 for all other keys."""
        longer = max(height, width)
        by_step_SSA = self._by_step().to(like.dtype)
        query = torch.arange(longer, device=like.device)
        key = torch.arange(_span(longer), device=like.device) - longer // 2
        step = key[None, :] - query[:, None] + self.steps // 2
        step_hy, step_wx = (
            step[:side, longer // 2 - side // 2 :][:, : _span(side)] for side in (height, width)
        )
        bias_hwyxA = by_step_SSA[step_hy[:, None, :, None], step_wx[None, :, None, :]]
        del by_step_SSA
        bias_AWz = bias_hwyxA.permute(4, 0, 1, 2, 3).flatten(3, 4).flatten(1, 2)
        return functional.pad(bias_AWz, (keys - bias_AWz.shape[-1], 0))

    def _by_step(self) -> Tensor:
        """(S, S, A): the bias of each step from query to key, in rows and in columns."""
        if not self.is_folded:
            return self.bias
        # Their steps go from key to query, and their rows are as long as a window's keys are wide.
        line = torch.arange(self.steps - 1, -1, -1, device=self.bias.device)
        return self.bias[line[:, None] * _span(self.window) + line]

    @staticmethod
    def macs(shape: MixerShape, convention: Convention = "executed") -> int:
        patches, prefix = prod(shape.grid), shape.num_prefix_tokens
        lines = tuple(windows(side, shape.window or WINDOW) for side in shape.grid)
        seen = shape.size + prefix + prod(_span(width) for _, width in lines)
        return (
            4 * shape.tokens * shape.dim * shape.inner
            + patches * shape.dim * shape.num_heads * shape.size
            + 2 * patches * shape.size * shape.inner
            + 2 * prod(count * width for count, width in lines) * seen * shape.inner
            + 2 * prefix * shape.tokens * shape.inner
        )

    @staticmethod
    def params(shape: MixerShape) -> int:
        window = shape.window or WINDOW
        table = folded_rows(window) if shape.window_bias == "folded" else steps_of(window) ** 2
        own = shape.num_heads * (shape.size * (shape.dim + 1) + table) + 4 * shape.inner
        return shared_params(shape) + own

    @staticmethod
    def memory(shape: MixerShape) -> int:
        tokens, inner, prefix = shape.tokens, shape.inner, shape.num_prefix_tokens
        patches, low = prod(shape.grid), shape.size
        turned, turning = rotary_memory(shape.rotary, tokens, shape.head_dim, inner, inner)
        held = (3 if turned else 5) * tokens * inner  # turning lets go of the projections
        scores, mixture = patches * shape.num_heads * low, low * inner
        before = max(
            5 * tokens * inner + max(2 * tokens, turning),
            held + scores + max(scores, 3 * mixture + 2 * low),
        )
        held += 2 * mixture
        outputs = patches * inner + prefix * ((2 * tokens + 1) * inner + shape.num_heads)
        merging = tokens * (inner + max(shape.dim, inner))
        return max(before, held + max(_windows_memory(shape), outputs), merging)


def windows(side: int, window: int) -> tuple[int, int]:
    """Windows along the rows (or columns) of a grid, and their width: `window` at most, as even as can be."""
    count = -(-side // window)
    return count, -(-side // count)


def steps_of(window: int) -> int:
    """Different steps between a query and a key of a window, along one axis."""
    return 2 * (window + window // 2) - 1


def folded_rows(window: int) -> int:
    """Rows of the authors' table.

    >>> steps_of(7) ** 2, folded_rows(7)
    (361, 253)
    """
    return (steps_of(window) - 1) * (_span(window) + 1) + 1


_Lines = tuple[tuple[int, int], tuple[int, int]]  # windows and their width, along rows and along columns


def _span(width: int) -> int:
    """Keys that a window of `width` queries sees, along one axis."""
    return width + 2 * (width // 2)


def _tiles(x_BAnK: Tensor, grid: Grid, lines: _Lines, *, halo: bool) -> Tensor:
    """(B, T x A, S, K): the patches of each window, with `halo` those around it too, 0 outside of the image."""
    (down, height), (across, width) = lines
    above, left = (height // 2, width // 2) if halo else (0, 0)
    below, right = down * height - grid[0] + above, across * width - grid[1] + left
    x_BAHWK = x_BAnK.unflatten(2, grid)
    if above or below or left or right:
        x_BAHWK = functional.pad(x_BAHWK, (0, 0, left, right, above, below))
    high, wide = height + 2 * above, width + 2 * left
    if torch.onnx.is_in_onnx_export():  # which knows no unfold
        for dim, (count, step, span) in ((2, (down, height, high)), (3, (across, width, wide))):
            line = torch.arange(count * span, device=x_BAnK.device)
            x_BAHWK = x_BAHWK.index_select(dim, line // span * step + line % span)
        tiles = x_BAHWK.unflatten(3, (across, wide)).unflatten(2, (down, high))  # (B, A, t, y, s, x, K)
        return tiles.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(1, 3)
    tiles = x_BAHWK.unfold(2, high, height).unfold(3, wide, width)  # (B, A, t, s, K, y, x)
    return tiles.permute(0, 2, 3, 1, 5, 6, 4).flatten(4, 5).flatten(1, 3)


def _outside(grid: Grid, lines: _Lines, keys: int, like: Tensor) -> Tensor:
    """(T, 1, 1, S): -inf for keys of a window that lie outside of the image, 0 for all other keys."""
    inside = []
    for side, (count, width) in zip(grid, lines, strict=True):
        key = torch.arange(_span(width), device=like.device) - width // 2
        place_tz = torch.arange(count, device=like.device)[:, None] * width + key
        inside.append((place_tz >= 0) & (place_tz < side))
    inside_TS = (inside[0][:, None, :, None] & inside[1][None, :, None, :]).flatten(2).flatten(0, 1)
    outside_TS = torch.zeros_like(inside_TS, dtype=like.dtype).masked_fill_(~inside_TS, float("-inf"))
    return functional.pad(outside_TS, (keys - outside_TS.shape[-1], 0))[:, None, None]


def _windows_memory(shape: MixerShape) -> int:
    """Peak elements of `LongShort._windows`, besides what it is given."""
    window = shape.window or WINDOW
    lines = tuple(windows(side, window) for side in shape.grid)
    (down, height), (across, width) = lines
    inner, heads, far = shape.inner, shape.num_heads, shape.size + shape.num_prefix_tokens
    high, wide, count = _span(height), _span(width), down * across
    places = down * height * across * width
    queries = places * inner
    copied = count > 1 and (across > 1 or heads > 1)  # windows below each other are a view of one head
    cropped = places > prod(shape.grid)
    own = queries if copied or cropped else 0
    haloed = height > 1 or width > 1
    padded = (down * height + high - height) * (across * width + wide - width) * inner if haloed else 0
    near = down * high * across * wide * inner if copied else padded
    cutting = near + padded if copied else padded
    seen = count * (high * wide + far) * inner
    joining = near + (1 + count) * far * inner + seen
    made = own + 2 * seen
    keys, rows = high * wide + far, heads * height * width
    mask = count * rows * keys
    longer = max(height, width)
    folded = steps_of(window) ** 2 * heads if shape.window_bias == "folded" else 0
    # 64-bit integers of the steps, and the bias that they pick.
    integers = 2 * ((longer + 1) * (_span(longer) + 1) - 1)
    attending = made + max(
        folded + 2 * steps_of(window) * (steps_of(window) + 1) if folded else 0,
        folded + integers + rows * high * wide,
        rows * (high * wide + keys) + integers,
        rows * keys + count * keys + mask,
        mask + queries + count * rows,
    )
    sorting = own + 2 * queries if copied else own + queries
    return max(
        own + (queries if cropped and copied else 0),
        own + cutting,
        own + seen + max(cutting, joining),
        attending,
        sorting,
        own + queries + (prod(shape.grid) * inner if across * width > shape.grid[1] else 0),
    )
