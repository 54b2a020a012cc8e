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
number, so that different steps share entries); grids that windows do not divide are filled with keys and queries that
nobody sees; without a class token step 5 is left out. w is 7 at most and divides the grid as evenly as it can.

Shapes: B images, A heads, N tokens, K head_dim, I = A x K, G patches along one side, R mixtures, T windows, W queries
and S keys per window.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.errors import UserError
from vitnas.layers.axes import Axes
from vitnas.layers.rotary import rotary_memory
from vitnas.mixers.mixer import Convention, HeadMixer, MixerShape, in_full_precision, shared_params

WINDOW = 7
STEPS = 2 * (WINDOW + WINDOW // 2) - 1  # different steps between a query and a key, along one axis
EPS = 1e-5


class LongShort(HeadMixer):
    """Transformer-LS attention. `size` is the number of mixtures R per head, 8 by default; it needs a square grid."""

    word = "long_short"
    size_means = "mixtures"
    needs_grid = True
    takes_qkv = False  # its windows and mixtures are made from the tokens

    def __init__(self, dim: int, num_heads: int, **options: object) -> None:
        super().__init__(dim, num_heads, **options)  # type: ignore[arg-type]
        inner = num_heads * self.head_dim
        self.dynamic = nn.Linear(dim, num_heads * self.size)
        self.norm_full = nn.LayerNorm(inner, eps=EPS)
        self.norm_dynamic = nn.LayerNorm(inner, eps=EPS)
        self.bias = nn.Parameter(torch.empty(STEPS, STEPS, num_heads))

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
                "bias": (("distances", STEPS), ("distances", STEPS), *heads),
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
        prefix, grid = self.num_prefix_tokens, self.grid_size
        count, width = windows(grid)
        q_BTWK = _tiles(q_BANK[:, :, prefix:], grid, count, width, 0)
        parts = []
        for part_BANK, mixture_BARK in zip((k_BANK, v_BANK), mixtures, strict=True):
            near = _tiles(part_BANK[:, :, prefix:], grid, count, width, width // 2)
            far = torch.cat([mixture_BARK, part_BANK[:, :, :prefix]], dim=2)
            parts.append(torch.cat([far.repeat(1, count**2, 1, 1), near], dim=2))
            del near, far
        keys = parts[0].shape[2]
        mask_TWS = self._steps_bias(width, keys, q_BTWK) + _outside(grid, count, width, keys, q_BTWK)
        out = functional.scaled_dot_product_attention(
            q_BTWK, parts[0], parts[1], attn_mask=mask_TWS.flatten(0, 1)[None], scale=self.scale
        )
        del parts, mask_TWS
        side = count * width
        out = out.unflatten(2, (width, width)).unflatten(1, (count, count, self.num_heads))
        out = out.permute(0, 3, 1, 4, 2, 5, 6).reshape(-1, self.num_heads, side, side, self.head_dim)
        return out[:, :, :grid, :grid].flatten(2, 3)

    def _steps_bias(self, width: int, keys: int, like: Tensor) -> Tensor:
        """(A, W, S): the bias of the step from each query to each key of its window, 0 for all other keys."""
        half = width // 2
        query = torch.arange(width, device=like.device)
        key = torch.arange(width + 2 * half, device=like.device) - half
        step_wz = key[None, :] - query[:, None] + STEPS // 2
        bias = self.bias.to(like.dtype)[
            step_wz[:, None, :, None], step_wz[None, :, None, :]
        ]  # (w, w, z, z, A)
        bias_AWz = bias.permute(4, 0, 1, 2, 3).flatten(3, 4).flatten(1, 2)
        return functional.pad(bias_AWz, (keys - bias_AWz.shape[-1], 0))

    @staticmethod
    def macs(shape: MixerShape, convention: Convention = "executed") -> int:
        patches, prefix = shape.grid_size**2, shape.num_prefix_tokens
        count, width = windows(shape.grid_size)
        seen = shape.size + prefix + (width + 2 * (width // 2)) ** 2
        return (
            4 * shape.tokens * shape.dim * shape.inner
            + patches * shape.dim * shape.num_heads * shape.size
            + 2 * patches * shape.size * shape.inner
            + 2 * (count * width) ** 2 * seen * shape.inner
            + 2 * prefix * shape.tokens * shape.inner
        )

    @staticmethod
    def params(shape: MixerShape) -> int:
        own = shape.num_heads * (shape.size * (shape.dim + 1) + STEPS**2) + 4 * shape.inner
        return shared_params(shape) + own

    @staticmethod
    def memory(shape: MixerShape) -> int:
        tokens, inner, prefix = shape.tokens, shape.inner, shape.num_prefix_tokens
        patches, low = shape.grid_size**2, shape.size
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


def windows(grid_size: int) -> tuple[int, int]:
    """Windows along one side of the grid, and their width: 7 at most, as even as can be."""
    count = -(-grid_size // WINDOW)
    return count, -(-grid_size // count)


def _tiles(x_BAnK: Tensor, grid: int, count: int, width: int, halo: int) -> Tensor:
    """(B, T x A, S, K): the patches of each window with `halo` patches around it, 0 outside of the image."""
    beyond = count * width - grid + halo
    x_BAHWK = x_BAnK.unflatten(2, (grid, grid))
    if halo or beyond:
        x_BAHWK = functional.pad(x_BAHWK, (0, 0, halo, beyond, halo, beyond))
    span = width + 2 * halo
    if torch.onnx.is_in_onnx_export():  # which knows no unfold
        line = torch.arange(count * span, device=x_BAnK.device)
        place = line // span * width + line % span
        tiles = x_BAHWK.index_select(2, place).index_select(3, place)
        tiles = tiles.unflatten(3, (count, span)).unflatten(2, (count, span))  # (B, A, t, z, t, z, K)
        return tiles.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(1, 3)
    tiles = x_BAHWK.unfold(2, span, width).unfold(3, span, width)  # (B, A, t, t, K, z, z)
    return tiles.permute(0, 2, 3, 1, 5, 6, 4).flatten(4, 5).flatten(1, 3)


def _outside(grid: int, count: int, width: int, keys: int, like: Tensor) -> Tensor:
    """(T, 1, 1, S): -inf for keys of a window that lie outside of the image, 0 for all other keys."""
    half = width // 2
    key = torch.arange(width + 2 * half, device=like.device) - half
    place_tz = torch.arange(count, device=like.device)[:, None] * width + key
    inside_tz = (place_tz >= 0) & (place_tz < grid)
    inside_TS = (inside_tz[:, None, :, None] & inside_tz[None, :, None, :]).flatten(2).flatten(0, 1)
    outside_TS = torch.zeros_like(inside_TS, dtype=like.dtype).masked_fill_(~inside_TS, float("-inf"))
    return functional.pad(outside_TS, (keys - outside_TS.shape[-1], 0))[:, None, None]


def _windows_memory(shape: MixerShape) -> int:
    """Peak elements of `LongShort._windows`, besides what it is given."""
    count, width = windows(shape.grid_size)
    half, inner, heads = width // 2, shape.inner, shape.num_heads
    span, far = width + 2 * half, shape.size + shape.num_prefix_tokens
    queries = (count * width) ** 2 * inner
    own = queries if count > 1 else 0  # one window is a view
    padded = (count * width + 2 * half) ** 2 * inner if half else 0
    near = (count * span) ** 2 * inner if count > 1 else padded
    cutting = near + padded if count > 1 else padded
    seen = count**2 * (span**2 + far) * inner
    joining = near + (1 + count**2) * far * inner + seen
    made = own + 2 * seen
    keys, rows = span**2 + far, heads * width**2
    mask = count**2 * rows * keys
    attending = made + max(
        rows * (span**2 + keys) + 2 * (width * span + width + span),  # the bias, by 64-bit integers
        rows * keys + count**2 * keys + mask,
        mask + queries + count**2 * rows,
    )
    cropped = count * width > shape.grid_size
    sorting = own + 2 * queries if count > 1 else own + queries
    return max(
        own + (queries if count * width > shape.grid_size else 0),
        own + cutting,
        own + seen + max(cutting, joining),
        attending,
        sorting,
        own + queries + (shape.grid_size**2 * inner if cropped else 0),
    )
