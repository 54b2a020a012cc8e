"""Token MLP: a two-layer network along the tokens, the same for every channel.

Source: Tolstikhin et al., "MLP-Mixer" (arXiv 2105.01601), section 2: W2 gelu(W1 x) over tokens. The weights belong to a
fixed number of tokens: another number is an error, another image size resamples them.

Shapes: B images, N tokens, D dim, H hidden units.
"""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from vitnas.grids import NO_GRID, Grid
from vitnas.layers.axes import Axes
from vitnas.layers.resample import resample_tokens
from vitnas.mixers.mixer import Convention, Mixer, MixerShape, check_grid, check_tokens

HIDDEN = 256


class TokenMlp(Mixer):
    """MLP-Mixer's token mixing. `size` is the number of hidden units, 256 (Mixer-S) by default; needs `grid`."""

    word = "token_mlp"
    size_means = "hidden units"
    fixed_tokens = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        size: int | None = None,
        grid: Grid = NO_GRID,
        num_prefix_tokens: int = 1,
        **options: object,
    ) -> None:
        super().__init__()
        check_grid(self.word, grid)
        self.grid, self.num_prefix_tokens = grid, num_prefix_tokens
        tokens = prod(grid) + num_prefix_tokens
        self.size = self.resolve_size(size, 1, tokens)
        self.fc1 = nn.Linear(tokens, self.size)
        self.fc2 = nn.Linear(self.size, tokens)

    @staticmethod
    def default_size(head_dim: int) -> int:
        return HIDDEN

    @staticmethod
    def size_for(tokens: int) -> int:
        return min(64, max(4, tokens))

    def axes(self) -> dict[str, Axes]:
        tokens: Axes = (("tokens", self.fc1.in_features),)
        hidden: Axes = (("token_hidden", self.size),)
        return {
            "fc1.weight": hidden + tokens,
            "fc1.bias": hidden,
            "fc2.weight": tokens + hidden,
            "fc2.bias": tokens,
        }

    def set_grid(self, grid: Grid) -> None:
        sizes: dict[str, Any] = {
            "old_grid": self.grid,
            "new_grid": grid,
            "num_prefix_tokens": self.num_prefix_tokens,
        }
        turned = nn.Parameter(self.fc1.weight.detach().t(), requires_grad=self.fc1.weight.requires_grad)
        fc1 = resample_tokens(turned, **sizes, keep_sum=True)
        bias = nn.Parameter(self.fc2.bias.detach()[:, None], requires_grad=self.fc2.bias.requires_grad)
        fc2_bias = resample_tokens(bias, **sizes, keep_sum=False)
        self.fc1.weight = nn.Parameter(fc1.detach().t().contiguous(), requires_grad=fc1.requires_grad)
        self.fc2.weight = resample_tokens(self.fc2.weight, **sizes, keep_sum=False)
        self.fc2.bias = nn.Parameter(fc2_bias.detach()[:, 0], requires_grad=fc2_bias.requires_grad)
        self.grid = grid
        self.fc1.in_features = self.fc2.out_features = prod(grid) + self.num_prefix_tokens

    def mix(self, x_BND: Tensor) -> Tensor:
        check_tokens(self.word, x_BND.shape[1], self.grid, self.num_prefix_tokens)
        out_BND: Tensor = self.fc2(functional.gelu(self.fc1(x_BND.transpose(1, 2)))).transpose(1, 2)
        return out_BND

    @staticmethod
    def macs(shape: MixerShape, convention: Convention = "executed") -> int:
        return 2 * shape.tokens * shape.dim * shape.size

    @staticmethod
    def params(shape: MixerShape) -> int:
        return 2 * shape.tokens * shape.size + shape.size + shape.tokens

    @staticmethod
    def memory(shape: MixerShape) -> int:
        hidden = shape.dim * shape.size
        return hidden + max(hidden, shape.dim * shape.tokens)
