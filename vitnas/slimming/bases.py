"""Bases of heads: queries, keys and values of a head may be told in any basis, and in a good one few entries suffice.

Queries and keys meet in their product alone, values and the rows of the output projection in theirs. With Q and K the
queries and keys of a head over many tokens (keys about their mean, as a softmax does not see what all of them share),
and L L' = Q'Q, M M' = K'K, the singular vectors of L'M say in which basis the first entries tell most of Q K'; with
L L' the covariance of what a head gives and W its output weights, those of W L say the same of W. At its full width a
head computes what it did, up to rounding.

Shapes: B images, N tokens, A heads, K head_dim, D dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitnas.mixers.mixer import HeadMixer
from vitnas.model import Model
from vitnas.model.blocks import TransformerBlock
from vitnas.model.modes import evaluating
from vitnas.slimming.images import Images, pairs_of
from vitnas.slimming.regression import require_finite
from vitnas.space.around import narrows_heads

MOST_IMAGES = 128
RIDGE = 1e-5  # of the mean variance of an entry


@dataclass(frozen=True, eq=False)
class Bases:
    """What rows of queries, keys and values are multiplied by from the right, head by head: (A, K, K), float64."""

    queries: Tensor
    keys: Tensor
    values: Tensor


class _Moments:
    """Of one block's heads: Q'Q, K'K and the covariance of what they give, (A, K, K)."""

    def __init__(self, heads: int, head_dim: int) -> None:
        self.heads, self.head_dim, self.tokens = heads, head_dim, 0
        self.queries, self.keys, self.given = torch.zeros(3, heads, head_dim, head_dim, dtype=torch.float64)
        self.mean_keys, self.mean_given = torch.zeros(2, heads, head_dim, dtype=torch.float64)

    def see_rows(self, attn: HeadMixer, inputs: tuple[Tensor, ...]) -> None:
        rows_BNR = attn.project(inputs[0])
        q_AMK, k_AMK, _ = (
            rows_BNR.flatten(0, 1).unflatten(1, (3, self.heads, self.head_dim)).permute(1, 2, 0, 3)
        )
        self.tokens += q_AMK.shape[1]
        self.queries += (q_AMK.transpose(1, 2) @ q_AMK).cpu()
        self.keys += (k_AMK.transpose(1, 2) @ k_AMK).cpu()
        self.mean_keys += k_AMK.sum(1).cpu()

    def see_given(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        h_AMK = inputs[0].flatten(0, 1).unflatten(1, (self.heads, self.head_dim)).transpose(0, 1)
        self.given += (h_AMK.transpose(1, 2) @ h_AMK).cpu()
        self.mean_given += h_AMK.sum(1).cpu()

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        n = self.tokens
        keys, given = (
            total / n - mean[:, :, None] @ mean[:, None] / n**2
            for total, mean in ((self.keys, self.mean_keys), (self.given, self.mean_given))
        )
        return self.queries / n, keys, given


@torch.no_grad()
def bases_of(model: Model, images: Images | None) -> tuple[Bases | None, ...]:
    """The bases of each block's heads; None for heads that need all their entries.

    Args:
        images: unlabelled, of which the first are looked at; None to go by the weights, as if their inputs were white.
    """
    blocks = dict(_narrowed(model))
    moments = {index: _Moments(block.attn.num_heads, block.attn.head_dim) for index, block in blocks.items()}
    if images is None:
        for index, found in moments.items():
            weight = blocks[index].attn.qkv.weight.double().cpu()
            rows_3AKD = weight.unflatten(0, (3, found.heads, found.head_dim))
            found.queries, found.keys, found.given = (rows_3AKD @ rows_3AKD.transpose(2, 3)).unbind(0)
            found.tokens = 1
    else:
        with evaluating(model), ExitStack() as hooks:
            for index, found in moments.items():
                attn = blocks[index].attn
                hooks.callback(attn.register_forward_pre_hook(found.see_rows).remove)
                hooks.callback(attn.proj.register_forward_pre_hook(found.see_given).remove)
            for images_BCHW, _ in pairs_of(images, model, MOST_IMAGES):
                model(images_BCHW)
    return tuple(
        _bases(blocks[index], *moments[index].centred()) if index in blocks else None
        for index in range(model.arch.depth)
    )


def _narrowed(model: Model) -> Iterator[tuple[int, TransformerBlock]]:
    for index, (block, told) in enumerate(zip(model.blocks, model.arch.blocks, strict=True)):
        if narrows_heads(model.arch, told):
            assert isinstance(block, TransformerBlock)
            yield index, block


def _bases(block: TransformerBlock, queries: Tensor, keys: Tensor, given: Tensor) -> Bases:
    heads, head_dim = block.attn.num_heads, block.attn.head_dim
    of_queries, of_keys, of_given = (_root(each) for each in (queries, keys, given))
    left_AKK, sizes_AK, right_AKK = torch.linalg.svd(of_queries.transpose(1, 2) @ of_keys)
    root_A1K = sizes_AK.sqrt()[:, None]
    gamma_D = getattr(block.ls1, "gamma", torch.ones(1)).detach().double().cpu()
    weight = block.attn.proj.weight.double().cpu() * gamma_D[:, None]
    weight_ADK = weight.unflatten(1, (heads, head_dim)).transpose(0, 1)
    *_, turned_AKK = torch.linalg.svd(weight_ADK @ of_given, full_matrices=False)
    if turned_AKK.shape[1] < head_dim:  # a stream narrower than a head
        *_, turned_AKK = torch.linalg.svd(weight_ADK @ of_given)
    return Bases(
        torch.linalg.solve(of_queries.transpose(1, 2), left_AKK) * root_A1K,
        torch.linalg.solve(of_keys.transpose(1, 2), right_AKK.transpose(1, 2)) * root_A1K,
        torch.linalg.solve(of_given.transpose(1, 2), turned_AKK.transpose(1, 2)),
    )


def _root(matrix_AKK: Tensor) -> Tensor:
    """Lower triangular, times its transpose the matrix."""
    require_finite(matrix_AKK)
    mean_A = matrix_AKK.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-20)
    eye_KK = torch.eye(matrix_AKK.shape[1], dtype=matrix_AKK.dtype)
    ridge = RIDGE
    while True:
        root_AKK, failed = torch.linalg.cholesky_ex(matrix_AKK + ridge * mean_A[:, None, None] * eye_KK)
        if not bool(failed.any()):
            return root_AKK
        ridge *= 10


@torch.no_grad()
def turn(model: Model, bases: tuple[Bases | None, ...]) -> None:
    """Tell the heads of `model` in these bases, in place."""
    for block, found in zip(model.blocks, bases, strict=True):
        if found is None:
            continue
        assert isinstance(block, TransformerBlock)
        attn = block.attn
        assert isinstance(attn, HeadMixer)
        heads = attn.num_heads, attn.head_dim
        into = torch.stack([found.queries, found.keys, found.values]).to(attn.qkv.weight.device)
        rows_3AKD = attn.qkv.weight.unflatten(0, (3, *heads))
        attn.qkv.weight.copy_((into.transpose(2, 3) @ rows_3AKD.double()).flatten(0, 2))
        if attn.qkv.bias is not None:
            bias_3AK = attn.qkv.bias.unflatten(0, (3, *heads)).double()
            attn.qkv.bias.copy_((bias_3AK[:, :, None] @ into).flatten())
        for name, place in (("q_bias", 0), ("v_bias", 2)):
            if (bias := getattr(attn, name, None)) is not None:
                bias.copy_((bias.unflatten(0, heads).double()[:, None] @ into[place]).flatten())
        weight_ADK = attn.proj.weight.unflatten(1, heads).transpose(0, 1).double()
        turned_ADK = torch.linalg.solve(into[2], weight_ADK.transpose(1, 2)).transpose(1, 2)
        attn.proj.weight.copy_(turned_ADK.transpose(0, 1).flatten(1))
