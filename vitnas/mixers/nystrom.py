"""Nystromformer: softmax attention through a few landmark tokens, linear in the number of tokens.

Source: Xiong et al., "Nystromformer" (arXiv 2102.03902), sections 3.2 to 3.4. Landmarks are means of runs of tokens:

    out = softmax(s q K~^T) pinv(softmax(s Q~ K~^T)) softmax(s Q~ k^T) v + conv(v)

with the inverse by six iterations of equation (13) and a depth-wise convolution of 33 tokens along the values
(section 3.4), one filter per head.

What differs from the packages in use, all on purpose (PAPERS.md): tokens that do not divide into equal segments make
segments whose lengths differ by one, instead of zero tokens in front that leak into landmarks, softmax and convolution;
the inverse starts from sums of its own matrix instead of the whole batch's, so that images do not mix. `official` does
both the other way, for the authors' numbers.

How it is computed. Both N-sized factors are fused attention calls, and the product is taken from the right, so that
nothing of size N x landmarks is kept.

Shapes: B images, A heads, N tokens, K head_dim, R landmarks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.layers.axes import Axes
from vitnas.mixers.mixer import (
    Convention,
    HeadMixer,
    MixerShape,
    heads_memory,
    in_full_precision,
    quarter_of,
    shared_params,
)

ITERATIONS = 6
KERNEL = 33


class Nystrom(HeadMixer):
    """Nystrom attention. `size` is the number of landmarks, 64 by default and never more than there are tokens."""

    word = "nystrom"
    size_means = "landmarks"
    size_below_tokens = True

    def __init__(self, dim: int, num_heads: int, **options: object) -> None:
        super().__init__(dim, num_heads, **options)  # type: ignore[arg-type]
        self.conv = nn.Conv2d(
            num_heads, num_heads, (KERNEL, 1), padding=(KERNEL // 2, 0), groups=num_heads, bias=False
        )
        self.official = False

    @staticmethod
    def default_size(head_dim: int) -> int:
        return 64

    @staticmethod
    def size_for(tokens: int) -> int:
        return quarter_of(tokens)

    def axes(self) -> dict[str, Axes]:
        one: Axes = (("one", 1),)
        heads: Axes = (("heads", self.num_heads),)
        return super().axes() | {"conv.weight": (*heads, *one, ("kernel", KERNEL), *one)}

    def mix(self, x_BND: Tensor) -> Tensor:
        if not self.official:
            return super().mix(x_BND)
        tokens = x_BND.shape[1]
        return super().mix(functional.pad(x_BND, (0, 0, -tokens % self.size, 0)))[:, -tokens:]

    def core(self, q_BANK: Tensor, k_BANK: Tensor, v_BANK: Tensor) -> Tensor:
        attend = functional.scaled_dot_product_attention
        q_BARK, k_BARK = landmarks(q_BANK, self.size), landmarks(k_BANK, self.size)
        inverse_BARR = in_full_precision(self._inverse, q_BARK, k_BARK)
        summary_BARK = inverse_BARR @ attend(q_BARK, k_BANK, v_BANK, scale=self.scale)
        del inverse_BARR, q_BARK
        nearby = self._near(v_BANK)
        return nearby.add_(attend(q_BANK, k_BARK, summary_BARK, scale=self.scale))

    def _near(self, v_BANK: Tensor) -> Tensor:
        """The convolution along tokens, as one of A x K channels that lie side by side in memory: several times as fast
        as with heads for channels, whose backward pass also writes out of bounds for one head and few tokens."""
        inside = (self.num_heads, v_BANK.shape[3])
        v_BIN1 = v_BANK.transpose(1, 2).flatten(2).transpose(1, 2).unsqueeze(3)
        weight_I1T1 = self.conv.weight.repeat_interleave(inside[1], 0)
        out_BIN1 = functional.conv2d(
            v_BIN1, weight_I1T1, padding=(KERNEL // 2, 0), groups=inside[0] * inside[1]
        )
        return out_BIN1.squeeze(3).transpose(1, 2).unflatten(2, inside).transpose(1, 2)

    def _inverse(self, q_BARK: Tensor, k_BARK: Tensor) -> Tensor:
        weights_BARR = (q_BARK @ (k_BARK * self.scale).transpose(2, 3)).softmax(-1)
        return pseudo_inverse(weights_BARR, joint=self.official)

    @staticmethod
    def macs(shape: MixerShape, convention: Convention = "executed") -> int:
        marks = min(shape.size, shape.tokens)
        return (
            4 * shape.tokens * shape.dim * shape.inner
            + 4 * shape.tokens * marks * shape.inner
            + 2 * marks**2 * shape.inner
            + 4 * ITERATIONS * shape.num_heads * marks**3
            + KERNEL * shape.tokens * shape.inner
        )

    @staticmethod
    def params(shape: MixerShape) -> int:
        return shared_params(shape) + KERNEL * shape.num_heads

    @staticmethod
    def memory(shape: MixerShape) -> int:
        tokens, inner, heads = shape.tokens, shape.inner, shape.num_heads
        marks = min(shape.size, tokens)
        matrix, mark = heads * marks**2, marks * inner
        inverting = 2 * mark + 6 * matrix + 2 * marks**2
        summing = 3 * mark + matrix + max(mark, heads * marks)
        attending = 2 * mark + tokens * (2 * inner + heads)
        nearby = 2 * mark + KERNEL * inner + tokens * inner
        merging = tokens * (inner + 2 * shape.dim)  # channels lie before tokens, so the bias is added apart
        return max(heads_memory(shape, max(inverting, summing, nearby, attending), copies=False), merging)


def landmarks(x_BANK: Tensor, count: int) -> Tensor:
    """(B, A, R, K): means of `count` runs of consecutive tokens, the first ones longer by one where they must be."""
    tokens = int(x_BANK.shape[2])  # while tracing, shapes are tensors
    count = min(count, tokens)
    length, longer = divmod(tokens, count)
    if not longer:
        return x_BANK.unflatten(2, (count, length)).mean(3)
    cut = longer * (length + 1)
    first = x_BANK[:, :, :cut].unflatten(2, (longer, length + 1)).mean(3)
    return torch.cat([first, x_BANK[:, :, cut:].unflatten(2, (count - longer, length)).mean(3)], dim=2)


def pseudo_inverse(a_BARR: Tensor, iterations: int = ITERATIONS, *, joint: bool = False) -> Tensor:
    """The Moore-Penrose inverse of each matrix, by equation (13) of the paper.

    It converges from Z = A^T / (|A|_1 |A|_inf) for any A. Singular values far below the largest need more iterations
    than six; until then they are damped.

    Args:
        joint: norms over the whole batch, as the packages in use take them.
    """
    z_BARR = a_BARR.transpose(2, 3) / _norms(a_BARR, joint)
    eye_RR = torch.eye(a_BARR.shape[-1], dtype=a_BARR.dtype, device=a_BARR.device)
    for _ in range(iterations):
        az_BARR = a_BARR @ z_BARR
        inner = 7 * eye_RR - az_BARR
        inner = 15 * eye_RR - az_BARR @ inner
        inner = 13 * eye_RR - az_BARR @ inner
        z_BARR = 0.25 * (z_BARR @ inner)
    return z_BARR


def _norms(a_BARR: Tensor, joint: bool) -> Tensor:
    """|A|_1 |A|_inf of each matrix, or of all together."""
    over = tuple(range(4)) if joint else (2, 3)
    sizes = a_BARR.abs()
    return sizes.sum(3, keepdim=True).amax(over, True) * sizes.sum(2, keepdim=True).amax(over, True)
