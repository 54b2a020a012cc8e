"""Steps that the equations of several mixers share, spelt out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def heads_of(mixer: Any, x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (B, A, N, K), turned where the mixer has rotary positions."""
    inner = mixer.num_heads * mixer.head_dim
    rows = x_BND @ mixer.qkv.weight.t() + mixer.qkv.bias
    q, k, v = (apart(mixer, rows[..., i * inner : (i + 1) * inner]) for i in range(3))
    return turned(mixer, q), turned(mixer, k), v


def apart(mixer: Any, x_BNI: Tensor, heads: int | None = None) -> Tensor:
    """Heads apart: (B, N, A K) to (B, A, N, K)."""
    K = mixer.head_dim
    return torch.stack([x_BNI[..., a * K : (a + 1) * K] for a in range(heads or mixer.num_heads)], dim=1)


def joined(mixer: Any, out_BANK: Tensor) -> Tensor:
    """Heads side by side and the output projection."""
    return torch.cat(list(out_BANK.unbind(1)), dim=-1) @ mixer.proj.weight.t() + mixer.proj.bias


def attention(mixer: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax(q @ k.transpose(-1, -2) / math.sqrt(mixer.head_dim)) @ v


def softmax(logits: Tensor) -> Tensor:
    weights = (logits - logits.max(-1, keepdim=True).values).exp()
    return weights / weights.sum(-1, keepdim=True)


def turned(mixer: Any, x_BANK: Tensor) -> Tensor:
    """Rotary positions one token and one pair at a time."""
    kind, grid, prefix = mixer.rotary.kind, mixer.grid, mixer.num_prefix_tokens
    if kind == "none":
        return x_BANK
    out, K = x_BANK.clone(), x_BANK.shape[-1]
    for token in range(x_BANK.shape[2]):
        for pair in range(K // 2):
            if kind == "rotary":
                angle = token * 10000.0 ** (-2 * pair / K)
            elif token < prefix:
                angle = 0.0
            else:
                row, col = divmod(token - prefix, grid[1])
                first = pair < K // 4
                angle = (row if first else col) * 10000.0 ** (
                    -2 * (pair - (0 if first else K // 4)) / (K // 2)
                )
            a, b = x_BANK[:, :, token, 2 * pair], x_BANK[:, :, token, 2 * pair + 1]
            out[:, :, token, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
            out[:, :, token, 2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out
