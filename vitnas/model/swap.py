"""swap_attention: another token mixer in a trained timm model, with its query, key, value and output weights.

What can be swapped: timm's `Attention` (ViT, DeiT, PiT, and others built from it), LeViT's attention (its projections
with their batch norms stay; its attention bias goes), CaiT's talking-heads attention (the mixing of heads goes). What
cannot, and why, is said for each layer: class attention has one query and is linear already; Swin's windows are shorter
than any mixer pays for, with a bias and a mask on the weights; subsampled attention has fewer queries than keys.

New weights start where the mixer is nearest to softmax: Nystrom's convolution at 0, Linformer's mixtures as means of
runs of tokens. Dropout behind the output projection stays; dropout of attention weights goes, as no mixer has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from timm.layers import Attention
from timm.models import cait, levit, swin_transformer
from torch import Tensor, nn

from vitnas.arch import Arch
from vitnas.errors import UserError, check_word
from vitnas.mixers import MIXERS, HeadMixer, Mixer, Softmax
from vitnas.model.blocks import check_mixer_sizes
from vitnas.model.conv_projection import ConvProjection
from vitnas.model.modes import evaluating
from vitnas.model.vit import Model

# Layers that attend, and why no mixer takes their place.
FIXED: dict[type[nn.Module], str] = {
    cait.ClassAttn: "its one query, the class token, already costs no more than the tokens",
    levit.AttentionDownsample: "it has fewer queries than keys",
    ConvProjection: "convolutions make its queries, keys and values; give the mixer when the model is made",
    swin_transformer.WindowAttention: "its windows are too short for a mixer to pay, and carry a bias and a mask",
}


class SwappedLevit(nn.Module):
    """LeViT's projections around another mixer: (B, N, D) to (B, N, D)."""

    def __init__(self, old: levit.Attention, mixer: HeadMixer) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.val_dim = old.num_heads, old.key_dim, old.val_dim
        self.qkv, self.proj = old.qkv, old.proj
        del mixer.qkv, mixer.proj
        self.mixer = mixer

    def forward(self, x_BND: Tensor) -> Tensor:
        rows = self.qkv(x_BND).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        q_BANK, k_BANK, v_BANK = rows.split([self.key_dim, self.key_dim, self.val_dim], dim=3)
        out_BANK = self.mixer.core(q_BANK, k_BANK, v_BANK)
        out_BND: Tensor = self.proj(out_BANK.transpose(1, 2).flatten(2))
        return out_BND


def known_attention(model: nn.Module) -> dict[str, nn.Module]:
    """`attention_layers` of a model that has some.

    Raises:
        UserError: it has none.
    """
    found = attention_layers(model)
    if not found:
        raise UserError(
            f"{type(model).__name__} has no attention that is known here; timm's Attention, LeViT's and CaiT's are. "
            "Choose another model."
        )
    return found


def swap_attention(
    model: nn.Module,
    mixer: str,
    layers: Sequence[int] | None = None,
    *,
    size: int | None = None,
    generator: torch.Generator | None = None,
) -> Any:
    """Put `mixer` in the place of attention in a timm model, keeping trained weights; the same model is returned.

    `model.swapped` then says per layer what was there, what was kept, and what is new.

    Args:
        mixer: a word of `MIXERS`.
        layers: which attention layers, counted from 0 in the model's order (negative: from the end); None for all
            that can be swapped. Layers that were swapped before keep their numbers.
        size: the mixer's own number (landmarks, rank, features, ...).
        generator: source of new weights.

    Raises:
        UserError: unknown mixer or layer; a layer that cannot be swapped, with the reason.

    >>> import timm
    >>> model = swap_attention(timm.create_model("vit_tiny_patch16_224"), "nystrom", layers=[0, 1])
    >>> print(*(row["layer"] for row in model.swapped))
    blocks.0.attn blocks.1.attn
    """
    check_word("mixer", mixer, MIXERS)
    found = known_attention(model)
    names = list(found)
    reasons = {name: reason for name in names if (reason := _why_not(found[name], mixer))}
    if layers is not None and not len(layers):
        raise UserError(
            "layers is empty; it must name at least one layer. Leave it out to swap all that can be."
        )
    if layers is None:
        chosen = [name for name in names if name not in reasons]
    else:
        for layer in layers:
            if not -len(names) <= layer < len(names):
                raise UserError(
                    f"layers has {layer}; the model has attention layers 0 to {len(names) - 1}. Choose some of these."
                )
        chosen = [names[layer] for layer in layers]
    refused = [name for name in chosen if name in reasons] or ([] if chosen else names)
    if refused:
        told = "; ".join(f"{name}: {reasons[name]}" for name in refused[:3])
        more = f"; and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise UserError(
            f"{mixer} cannot take the place of attention in {told}{more}. Leave these layers out."
        )
    arch = _arch_of_swapped(model, chosen, mixer, size) if isinstance(model, Model) else None
    grids = _grids(model, chosen, mixer) if _needs_grid(mixer) else {}
    made = {name: _swapped(found[name], mixer, size, grids.get(name, {}), generator) for name in chosen}
    rows = []
    for name, new in made.items():
        parent, _, leaf = name.rpartition(".")
        old = found[name]
        setattr(model.get_submodule(parent), leaf, new.train(old.training))
        rows.append(_row(name, old, new))
    if arch is not None and isinstance(model, Model):
        model.record_arch(arch)
    model.swapped = [*getattr(model, "swapped", []), *rows]  # type: ignore[assignment]
    return model


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of `model` that attends or was swapped, swappable or not, by name."""
    kinds = (Attention, levit.Attention, cait.TalkingHeadAttn, Mixer, SwappedLevit, *FIXED)
    found = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    inner = (SwappedLevit, ConvProjection)  # their mixers are parts of them
    return {
        name: module
        for name, module in found.items()
        if not isinstance(found.get(name.rpartition(".")[0]), inner)
    }


def _arch_of_swapped(model: Model, names: Sequence[str], mixer: Any, size: int | None) -> Arch:
    """The Arch of one of our own Models with `mixer` in the layers of these names."""
    numbers = {int(name.split(".")[1]) for name in names}
    arch = model.arch.with_blocks(
        replace(block, mixer=mixer, mixer_size=size) if index in numbers else block
        for index, block in enumerate(model.arch.blocks)
    )
    check_mixer_sizes(arch)
    return arch


def _why_not(old: nn.Module, mixer: str) -> str:
    """Why `mixer` cannot take the place of `old`; empty if it can."""
    kind = MIXERS[mixer]
    for fixed, reason in FIXED.items():
        if isinstance(old, fixed):
            return reason
    if isinstance(old, (Mixer, SwappedLevit)) and not isinstance(old, Softmax):
        word = old.mixer.word if isinstance(old, SwappedLevit) else old.word
        return f"it is {word} already; start from the model as it was"
    if isinstance(old, levit.Attention):
        if old.use_conv:
            return "it is LeViT's convolutional form; the model without `conv` in its name can be swapped"
        if not issubclass(kind, HeadMixer) or not kind.takes_qkv:
            return f"{mixer} does not work on queries, keys and values that another layer made"
    elif isinstance(old, Softmax) and (old.rel_pos or old.rel_pos_k or old.rotary.kind != "none"):
        return "it has relative or rotary positions, which the trained weights count on"
    elif isinstance(old, Softmax) and (old.has_qk_norm or old.has_qv_bias):
        return "its queries and keys are normalised or its keys have no bias, which no other mixer does"
    elif isinstance(old, Attention):
        if any(not isinstance(norm, nn.Identity) for norm in (old.q_norm, old.k_norm)):
            return "queries and keys are normalised (qk_norm), which no mixer does"
        if not isinstance(old.norm, nn.Identity) or old.gate is not None:
            return "its output is normalised or gated"
        if old.proj.bias is None:
            return "its output projection has no bias"
        if old.proj.out_features != old.qkv.in_features:
            return "its output has another width than its input"
    if issubclass(kind, HeadMixer) and not kind.has_values:
        return f"{mixer} has no values of its own, so trained ones would be lost; use {kind.variant_of}"
    return ""


def _needs_grid(mixer: str) -> bool:
    return MIXERS[mixer].needs_grid or MIXERS[mixer].fixed_tokens


def _grids(model: nn.Module, names: Sequence[str], mixer: str) -> dict[str, dict[str, Any]]:
    """`grid` and `num_prefix_tokens` of each of these layers, found by running the model on one image of its size.

    A grid has as many rows per column as the image.
    """
    seen: dict[str, int] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, given, name=name: seen.__setitem__(name, given[0].shape[1])
        )
        for name in names
    ]
    cfg: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", {})
    like, patches = next(model.parameters()), getattr(model, "patch_embed", None)
    given = (cfg or {}).get("input_size")
    sides = getattr(patches, "img_size", None) or (given and given[1:])
    if not sides:
        raise UserError(
            f"{type(model).__name__} does not say its image size, which the mixer needs. Set "
            "model.pretrained_cfg = {'input_size': (3, height, width)}."
        )
    # What the first convolution takes, as timm's configurations do not follow in_chans.
    convs = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    channels = next((conv.in_channels for conv in convs), given[0] if given else 3)
    try:
        with torch.no_grad(), evaluating(model):
            model(torch.zeros(1, channels, *sides, device=like.device, dtype=like.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    known = getattr(model, "num_prefix_tokens", None)
    return {
        name: _grid_of(name, mixer, tokens, sides, [*([known] if isinstance(known, int) else []), 0, 1, 2])
        for name, tokens in seen.items()
    }


def _grid_of(
    name: str, mixer: str, tokens: int, sides: Sequence[int], prefixes: Sequence[int]
) -> dict[str, Any]:
    height, width = sides
    for prefix in prefixes:
        rows = math.isqrt(max(0, tokens - prefix) * height // width)
        columns = (tokens - prefix) // rows if rows else 0
        if rows and rows * columns == tokens - prefix and rows * width == columns * height:
            return {"grid": (rows, columns), "num_prefix_tokens": prefix}
    raise UserError(
        f"{name} sees {tokens} tokens, which are no grid of the shape of its images ({height} x {width}); {mixer} "
        "needs one. Leave this layer out."
    )


def _swapped(
    old: Any,
    mixer: str,
    size: int | None,
    grid: dict[str, Any],
    generator: torch.Generator | None,
) -> nn.Module:
    """The new layer, with the trained weights of `old`."""
    options: dict[str, Any] = {"size": size, **grid}
    kind: Any = MIXERS[mixer]
    if isinstance(old, levit.Attention):
        dim, head_dim, bias = old.qkv.linear.in_features, old.key_dim, False
        like = old.qkv.linear.weight
    else:
        dim, like = old.qkv.in_features, old.qkv.weight
        head_dim, bias = old.qkv.out_features // (3 * old.num_heads), old.qkv.bias is not None
    with torch.device("meta" if like.is_meta else "cpu"):  # it moves later: a generator belongs to one device
        new: Mixer = kind(
            dim, old.num_heads, head_dim=head_dim, qkv_bias=bias, scale=float(old.scale), **options
        )
        _start(new, generator)
    new = new.to(like)
    if isinstance(old, levit.Attention):
        assert isinstance(new, HeadMixer)
        return SwappedLevit(old, new)
    if isinstance(new, HeadMixer):
        new.qkv.load_state_dict(old.qkv.state_dict())
        new.proj.load_state_dict(old.proj.state_dict())
        trained = dict(old.named_parameters())
        for name, parameter in new.named_parameters():
            if name.startswith(("qkv.", "proj.")):
                parameter.requires_grad_(trained[name].requires_grad)
    if drop := _dropout(old, "proj_drop"):
        new.proj_drop = nn.Dropout(drop)
    return new


def _dropout(old: nn.Module, name: str) -> float:
    """The rate of a dropout of timm's attention, 0 where there is none."""
    layer = getattr(old, name, None)
    return layer.p if isinstance(layer, nn.Dropout) else 0.0


@torch.no_grad()
def _start(mixer: Mixer, generator: torch.Generator | None) -> None:
    """Values for weights that `mixer` alone has, as near to softmax as it can be."""
    for module in mixer.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    mixer.initialize_own(generator)
    own = dict(mixer.named_parameters(recurse=False))
    if isinstance(conv := getattr(mixer, "conv", None), nn.Conv2d):
        nn.init.zeros_(conv.weight)
    if "bias" in own:  # of long-short attention's steps
        nn.init.zeros_(own["bias"])
    for weight_NR in (own[name] for name in ("proj_k", "proj_v") if name in own):
        tokens, rank = weight_NR.shape
        run = torch.arange(tokens, device=weight_NR.device) * rank // tokens
        means = nn.functional.one_hot(run, rank).to(weight_NR.dtype)
        weight_NR.copy_(means / means.sum(0))


def _row(name: str, old: nn.Module, new: nn.Module) -> dict[str, Any]:
    """What happened to one layer."""
    before = {key for key, _ in old.named_parameters()}
    after = {key: parameter.numel() for key, parameter in new.named_parameters()}
    rate = _dropout(old, "attn_drop")
    return {
        "layer": name,
        "was": type(old).__name__,
        "is": type(getattr(new, "mixer", new)).__name__,
        "kept": sorted(before & set(after)),
        "gone": sorted(before - set(after)) + ([f"attn_drop of {rate:g}"] if rate else []),
        "new_params": sum(size for key, size in after.items() if key not in before),
    }
