"""Performer: softmax attention by positive random features, linear in the number of tokens.

Source: Choromanski et al., "Rethinking Attention with Performers" (arXiv 2009.14794), sections 2.3 and 2.4 (FAVOR+
without causality), with the features per head width K and their number M = K ln K of Vision X-formers
(arXiv 2107.02239):

    phi(x) = exp(w x - |x|^2 / 2 - c) + 1e-4      x = q or k, times scale^(1/2); rows w of an orthogonal Gaussian matrix
    out_i  = sum_j (phi(q_i) . phi(k_j)) v_j / sum_j phi(q_i) . phi(k_j)

c keeps the exponent below 0: the largest product of each query, and of all keys of one head of one image. (The authors
of Vision X-formers take the largest over the whole batch, so that an image's output depends on its batch; `official`
does that.) The factor M^(-1/2) of the paper cancels.

How it is computed. The 1e-4 is never added to an N x M tensor: sum_m (e_m + 1e-4) c_m = sum_m e_m c_m + 1e-4 sum_m c_m.
The denominator is one more column of the values, equal to 1.

Shapes: B images, A heads, N tokens, K head_dim, M features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from vitnas.layers.axes import Axes
from vitnas.layers.select import Kept
from vitnas.mixers.mixer import (
    Convention,
    HeadMixer,
    MixerShape,
    heads_memory,
    in_full_precision,
    shared_params,
)

EPS = 1e-4


class Performer(HeadMixer):
    """FAVOR+ attention. `size` is the number of random features, K ln K by default; they are a buffer."""

    word = "performer"
    takes_selection = True
    takes_fewer_keys = True
    size_means = "random features"
    features: Tensor

    def __init__(self, dim: int, num_heads: int, **options: object) -> None:
        super().__init__(dim, num_heads, **options)  # type: ignore[arg-type]
        self.register_buffer("features", torch.empty(self.size, self.head_dim))
        self.official = False

    @staticmethod
    def default_size(head_dim: int) -> int:
        return max(1, int(head_dim * math.log(head_dim)))

    def axes(self) -> dict[str, Axes]:
        return super().axes() | {"features": (("features", self.size), ("head_dim", self.head_dim))}

    def initialize_own(self, generator: torch.Generator | None) -> None:
        self.features.copy_(orthogonal_features(self.size, self.head_dim, generator))

    def core(self, q_BANK: Tensor, k_BANK: Tensor, v_BANK: Tensor) -> Tensor:
        return in_full_precision(self._favor, q_BANK, k_BANK, v_BANK)

    def core_kept(self, q_BANK: Tensor, k_BANK: Tensor, v_BANK: Tensor, kept: Kept) -> Tensor:
        """Keys and values count as often as their tokens stand for patches, those of dropped tokens not at all; a token
        does not see itself where it was dropped."""
        weights_BN = kept.weights_BP(0)
        if weights_BN is None:
            return self.core(q_BANK, k_BANK, v_BANK)
        favor = self._favor if kept.mask_BN is None else self._favor_kept
        return in_full_precision(favor, q_BANK, k_BANK, v_BANK, weights_BN[:, None, :, None].to(v_BANK.dtype))

    def _favor_kept(self, q_BANK: Tensor, k_BANK: Tensor, v_BANK: Tensor, mask_B1N1: Tensor) -> Tensor:
        return self._favor(q_BANK, k_BANK, v_BANK, mask_B1N1, mask_B1N1)

    def _favor(
        self,
        q_BANK: Tensor,
        k_BANK: Tensor,
        v_BANK: Tensor,
        weights_B1N1: Tensor | None = None,
        mask_B1N1: Tensor | None = None,
    ) -> Tensor:
        """`weights_B1N1` say how often keys and values count, `mask_B1N1` which tokens are there."""
        values = functional.pad(v_BANK, (0, 1), value=1.0)
        if weights_B1N1 is not None:
            values = values * weights_B1N1
        keys_BANM = self._features_of(k_BANK, (0, 1, 2, 3) if self.official else (2, 3), mask_B1N1)
        context_BAMV = keys_BANM.transpose(2, 3) @ values
        del keys_BANM
        context_BAMV.add_(EPS * values.sum(2, keepdim=True))
        del values
        out = self._features_of(q_BANK, (3,)) @ context_BAMV
        out.add_(EPS * context_BAMV.sum(2, keepdim=True))
        sums = out[..., -1:]
        if mask_B1N1 is not None:  # of an image that keeps nothing they are 0
            sums = sums + (sums == 0)
        return out[..., :-1] / sums

    def _features_of(
        self, x_BANK: Tensor, largest_over: tuple[int, ...], mask_B1N1: Tensor | None = None
    ) -> Tensor:
        """exp(w x - |x|^2 / 2 - c), (B, A, N, M); c is the largest of those that the mask keeps."""
        features_KM = (self.features.to(x_BANK.dtype) * self.scale**0.5).t()
        products = x_BANK @ features_KM
        shift = x_BANK.square().sum(-1, keepdim=True).mul_(self.scale / 2)
        seen = products.detach()
        if mask_B1N1 is not None:
            seen = seen.masked_fill(mask_B1N1 == 0, -torch.inf)
        shift = shift + seen.amax(largest_over, keepdim=True)
        del seen
        if mask_B1N1 is not None:  # dropped tokens may exceed the largest
            return (products - shift).clamp(max=0).exp()
        return products.sub_(shift).exp_()  # in place: nothing needs the products themselves

    @staticmethod
    def macs(shape: MixerShape, convention: Convention = "executed") -> int:
        features = shape.size * shape.inner
        return 4 * shape.tokens * shape.dim * shape.inner + shape.tokens * (
            4 * features + 2 * shape.size * shape.num_heads
        )

    @staticmethod
    def params(shape: MixerShape) -> int:
        return shared_params(shape)

    @staticmethod
    def memory(shape: MixerShape) -> int:
        tokens, inner, heads = shape.tokens, shape.inner, shape.num_heads
        values, context = tokens * (inner + heads), shape.size * (inner + heads)
        phi, matrix, sums = tokens * heads * shape.size, shape.size * shape.head_dim, 2 * (inner + heads)
        making = matrix + phi + values  # products, squares and their sums
        keys = values + max(making, phi + context, context + sums)
        queries = context + max(making, phi + values, values + max(sums, tokens * inner))
        return heads_memory(shape, max(keys, queries) + (tokens if shape.sized else 0), copies=True)


def orthogonal_features(rows: int, cols: int, generator: torch.Generator | None = None) -> Tensor:
    """(rows, cols): blocks of orthogonal rows, each scaled to the length of a Gaussian vector (paper, section 2.4)."""
    blocks = []
    for _ in range(-(-rows // cols)):
        square, _ = torch.linalg.qr(torch.randn(cols, cols, generator=generator, dtype=torch.float64))
        blocks.append(square.t())
    lengths = torch.randn(rows, cols, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    return (torch.cat(blocks)[:rows] * lengths).float()
