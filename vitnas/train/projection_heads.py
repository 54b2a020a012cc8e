"""The projection heads of self-distillation: from features to the prototypes that student and teacher agree on.

Source: DINO (arXiv 2104.14294, section 3.2 and appendix C) and EsViT (arXiv 2106.09785, section 3), in whose code the
parameters have these names.

Shapes: R rows (images, or regions of them), D width of the features, K prototypes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class WeightNormLinear(nn.Module):
    """A linear layer without bias whose rows have the lengths `weight_g`, and the directions of `weight_v`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(nn.Linear(in_features, out_features, bias=False).weight.detach())

    def forward(self, x_RD: Tensor) -> Tensor:
        return functional.linear(x_RD, self.weight_g * functional.normalize(self.weight_v, dim=1))


class ProjectionHead(nn.Module):
    """(R, D) features to (R, K) logits: an MLP, its output brought to length 1, a weight-normalised linear layer.

    Features that are narrower than `in_dim` (smaller Archs of a Supernet) meet the first columns of the first layer.

    Args:
        nlayers: of the MLP.
        use_bn: batch norm behind the hidden layers.
        norm_last_layer: the last layer's rows stay of length 1, which is steadier; else the lengths are trained.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        nlayers: int = 3,
        use_bn: bool = False,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        self.norm_last_layer = norm_last_layer
        dims = [in_dim, *[hidden_dim] * (nlayers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for index, (before, behind) in enumerate(pairwise(dims)):
            layers.append(nn.Linear(before, behind))
            if index < nlayers - 1:
                layers += [nn.BatchNorm1d(behind)] if use_bn else []
                layers.append(nn.GELU())
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.mlp: nn.Module = nn.Sequential(*layers) if nlayers > 1 else layers[0]
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.learn_last(True)

    def learn_last(self, learns: bool) -> None:
        """Train the last layer, or leave it as it is for now."""
        self.last_layer.weight_v.requires_grad_(learns)
        self.last_layer.weight_g.requires_grad_(learns and not self.norm_last_layer)

    def forward(self, x_RD: Tensor) -> Tensor:
        layers: Any = self.mlp if isinstance(self.mlp, nn.Sequential) else [self.mlp]
        first, *others = layers
        x = functional.linear(x_RD, first.weight[:, : x_RD.shape[-1]], first.bias)
        for layer in others:
            x = layer(x)
        logits_RK: Tensor = self.last_layer(functional.normalize(x, dim=-1))
        return logits_RK
