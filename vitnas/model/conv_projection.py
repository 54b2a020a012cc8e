"""CvT's convolutional projection: queries, keys and values see their neighbours before any mixer does.

Source: Wu et al., "CvT: Introducing Convolutions to Vision Transformers" (arXiv 2103.15808), section 3.2: in the place
of the linear projections of the row of tokens stand, on the map, for q, k and v each,

    depth-wise 3x3 convolution -> batch norm -> 1x1 convolution (which is a linear layer)

with a stride for keys and values ("squeezed", 2 in the paper's networks), which leaves a quarter of them. Vision
X-formers (arXiv 2107.02239) left all this out of its CvT-like networks.

Shapes: B images, C channels, H x W map, h x w map of keys, N = H x W and n = h x w tokens, A heads, K head_dim.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitnas.errors import UserError, nearest
from vitnas.mixers import MIXERS, HeadMixer, Mixer

Projection = Literal["linear", "conv"]
KINDS = ("linear", "conv")


class ConvProjection(nn.Module):
    """A mixer behind convolutional projections: (B, C, H, W) to (B, N, C). Weights of q, k, v and output are its own.

    Args:
        kv_stride: of the convolutions of keys and values; on odd sides the last row counts, h = ceil(H / kv_stride).

    Raises:
        UserError: a mixer that does not take queries, keys and values, or not fewer keys than queries.
    """

    def __init__(self, mixer: Mixer, *, kv_stride: int = 1) -> None:
        super().__init__()
        if not _takes_map(type(mixer)) or not isinstance(mixer, HeadMixer):
            able = [word for word, kind in MIXERS.items() if _takes_map(kind)]
            raise UserError(
                f"projection is 'conv' and mixer {mixer.word!r}; a convolutional projection gives queries, keys and "
                f"values of a map, which {', '.join(able)} take. Use projection='linear', or one of these."
            )
        if kv_stride < 1:
            raise UserError(f"kv_stride is {kv_stride}; it must be at least 1. Nearest: 1.")
        if kv_stride > 1 and not mixer.takes_fewer_keys:
            able = [w for w, kind in MIXERS.items() if issubclass(kind, HeadMixer) and kind.takes_fewer_keys]
            raise UserError(
                f"kv_stride is {kv_stride} and mixer {mixer.word!r}; it needs as many keys as queries. Use "
                f"kv_stride=1, or {' or '.join(able)}."
            )
        dim = mixer.proj.out_features
        self.mixer = mixer
        for name, stride in (("q", 1), ("k", kv_stride), ("v", kv_stride)):
            conv = nn.Conv2d(dim, dim, 3, stride=stride, padding=1, groups=dim, bias=False)
            self.add_module(f"conv_{name}", conv)
            self.add_module(f"norm_{name}", nn.BatchNorm2d(dim))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        mixer = self.mixer
        biases = (None,) * 3 if mixer.qkv.bias is None else mixer.qkv.bias.chunk(3)
        parts = []
        for name, weight, bias in zip("qkv", mixer.qkv.weight.chunk(3), biases, strict=True):
            near_BCHW: Tensor = self.get_submodule(f"norm_{name}")(self.get_submodule(f"conv_{name}")(x_BCHW))
            rows = functional.linear(near_BCHW.flatten(2).transpose(1, 2), weight, bias)
            parts.append(rows.unflatten(2, (mixer.num_heads, mixer.head_dim)).transpose(1, 2))
        q_BANK, k_BAnK, v_BAnK = parts
        return mixer.merge(mixer.core(q_BANK, k_BAnK, v_BAnK))


def _takes_map(mixer: type[Mixer]) -> bool:
    """Works on queries, keys and values of a map of any size."""
    fixed = mixer.fixed_tokens or mixer.needs_grid
    return issubclass(mixer, HeadMixer) and mixer.takes_qkv and not fixed


def projected(mixer: Mixer, projection: Projection, kv_stride: int) -> nn.Module:
    """`mixer` as it is, or behind convolutional projections.

    Raises:
        UserError: an unknown projection; a stride without convolutions; see `ConvProjection`.
    """
    if projection not in KINDS:
        raise UserError(
            f"projection is {projection!r}; it must be 'linear' or 'conv'.{nearest(projection, KINDS)}"
        )
    if projection == "conv":
        return ConvProjection(mixer, kv_stride=kv_stride)
    if kv_stride != 1:
        raise UserError(
            f"kv_stride is {kv_stride} and projection 'linear'; only convolutions have a stride. Use projection='conv'."
        )
    return mixer


def mixed(attn: nn.Module, x_BCHW: Tensor) -> Tensor:
    """What `attn` makes of a map, as a map."""
    given = x_BCHW if isinstance(attn, ConvProjection) else x_BCHW.flatten(2).transpose(1, 2)
    out_BNC: Tensor = attn(given)
    return torch.unflatten(out_BNC.transpose(1, 2), 2, tuple(x_BCHW.shape[2:]))
