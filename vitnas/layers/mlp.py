"""MLPs of a block: timm's, by an Arch's word for the activation, with named axes and exact cost.

The gated ones (Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202) multiply the hidden units by silu of a
second projection: `swiglu` has it beside the first (EVA-02), `swiglu_packed` in one weight, gate first (DINOv2).

Shapes: D dim, H hidden units.
"""

from __future__ import annotations

from functools import partial

from timm.layers import GELUTanh, GluMlp, Mlp, QuickGELU, SwiGLU
from torch import nn

from vitnas.layers.axes import Axes
from vitnas.layers.cost import LayerCost

ACTS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": GELUTanh,
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
}
"""Activations of a plain MLP, by an Arch's word."""


def make_mlp(dim: int, hidden: int, act: str, *, norm_eps: float | None = None) -> nn.Module:
    """The MLP of that word; with `norm_eps` its hidden units are normed (`norm`)."""
    norm = None if norm_eps is None else partial(nn.LayerNorm, eps=norm_eps)
    if act == "swiglu":
        made: nn.Module = SwiGLU(dim, hidden, norm_layer=norm)
    elif act == "swiglu_packed":
        made = GluMlp(dim, 2 * hidden, act_layer=nn.SiLU, gate_last=False, norm_layer=norm)
    else:
        made = Mlp(dim, hidden, act_layer=ACTS[act], norm_layer=norm)
    return made


def mlp_ratio(dim: int, hidden: int) -> float:
    """The ratio by which timm's classes make `hidden` units: they round width times ratio down, and half a unit more
    keeps the quotient's error out of it."""
    return hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim


def mlp_axes(mlp: nn.Module, units: str = "hidden") -> dict[str, Axes]:
    """Axes of the parameters of what `make_mlp` made, whose hidden units' axis is called `units`."""
    last = mlp.fc2
    assert isinstance(last, nn.Linear)
    dim: Axes = (("dim", last.out_features),)
    hidden: Axes = ((units, last.in_features),)
    first: Axes = (("gate", 2), *hidden) if isinstance(mlp, GluMlp) else hidden
    axes: dict[str, Axes] = {}
    for name in ("fc1_g", "fc1_x") if isinstance(mlp, SwiGLU) else ("fc1",):
        axes |= {f"{name}.weight": first + dim, f"{name}.bias": first}
    if isinstance(mlp.norm, nn.LayerNorm):
        axes |= {"norm.weight": hidden, "norm.bias": hidden}
    return axes | {"fc2.weight": dim + hidden, "fc2.bias": dim}


def mlp_cost(dim: int, hidden: int, act: str, *, has_norm: bool = False) -> LayerCost:
    """Of what `make_mlp` makes, for one token; memory without its input."""
    inputs = 2 if act in ("swiglu", "swiglu_packed") else 1
    # Alive: inputs of the activation, it and the product of a gate; then what is left of them beside the output.
    most, left = {"swiglu": (4, 2), "swiglu_packed": (4, 3), "quick_gelu": (3, 1)}.get(act, (2, 1))
    norm = (left + 1) * hidden + 2 if has_norm else 0  # with the mean and the deviation
    return LayerCost(
        macs=(inputs + 1) * dim * hidden,
        params=(inputs + 1) * dim * hidden + inputs * hidden + dim + (2 * hidden if has_norm else 0),
        memory=max(most * hidden, norm, left * hidden + dim),
    )
