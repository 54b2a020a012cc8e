"""The networks of Vision X-formers (Jeevan and Sethi, arXiv 2107.02239; WACV 2022) that an Arch can say, by name.

A plain ViT of 4 blocks on every pixel of a CIFAR image, with one of five mixers, a linear or convolutional ("hybrid")
stem and learned or rotary positions; compact transformers (CCT, CCN, CCP) on 64-pixel images; MLP-Mixer. Sizes are
those of the authors' scripts. Rotary networks have no table of positions here; the authors' keep one, unused.

`vision_xformer_like` gives the same at other sizes. Networks that no Arch can say are in `fnet2d.py` and
`convolutional.py`.
"""

from __future__ import annotations

from math import prod
from typing import Any, Literal

from vitnas.arch import Arch, Block, Stage
from vitnas.grids import ImageSize, sides_of

Kind = Literal["vit", "vip", "vil", "vin", "fnet", "mixer", "cct", "ccn", "ccp"]
MIXER_OF: dict[str, str] = {
    "vit": "softmax",
    "vip": "performer",
    "vil": "linformer_one_head",
    "vin": "nystrom",
    "fnet": "fourier",
    "mixer": "token_mlp",
    "cct": "softmax",
    "ccn": "nystrom",
    "ccp": "performer",
}


def vision_xformer_like(
    kind: Kind,
    *,
    hybrid: bool = False,
    rotary: bool = False,
    image_size: ImageSize = 32,
    patch_size: int = 1,
    num_classes: int = 10,
    dim: int = 128,
    depth: int = 4,
    heads: int = 4,
    mlp_hidden: int = 256,
    in_chans: int = 3,
) -> Arch:
    """One of the paper's networks at any size.

    Args:
        hybrid: three convolutions as a stem (and, for `vil`, keys per head, as the authors have it there).
        rotary: rotary positions along the row of tokens instead of learned ones.
    """
    compact, is_mixer = kind in ("cct", "ccn", "ccp"), kind == "mixer"
    mixer = MIXER_OF[kind]
    if kind == "vil" and (hybrid or rotary):
        mixer = "linformer_shared"
    patches = prod(side // patch_size for side in sides_of(image_size))
    size = patches if is_mixer else 64 if kind in ("vil", "vin", "ccn") else None
    block = Block(num_heads=heads, head_dim=dim // heads, mlp_hidden=mlp_hidden, mixer=mixer, mixer_size=size)
    fields: dict[str, Any] = {}
    if compact or is_mixer:
        fields = {"class_token": False, "global_pool": "seq" if compact else "avg"}
    return Arch(
        image_size=image_size,
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=num_classes,
        stages=(Stage(embed_dim=dim, blocks=(block,) * depth),),
        stem="cct" if compact else "hybrid" if hybrid else "linear",
        position="none" if is_mixer else "rotary" if rotary else "learned",
        mlp_norm="stream" if compact else "branch",
        qkv_bias=mixer == "performer",
        norm_eps=1e-5,
        **fields,
    )


def _published() -> dict[str, Arch]:
    found: dict[str, Arch] = {}
    plain: tuple[Kind, ...] = ("vit", "vip", "vil", "vin", "fnet")
    for kind in plain:
        for hybrid in (False, True):
            for rotary in (False, True) if kind != "fnet" else (False,):
                name = f"vix_{'hybrid_' if hybrid else ''}{kind}{'_rope' if rotary else ''}"
                found[name] = vision_xformer_like(kind, hybrid=hybrid, rotary=rotary)
    sizes: dict[str, Any] = {"image_size": 64, "patch_size": 2, "num_classes": 200}
    compact: tuple[Kind, ...] = ("cct", "ccn", "ccp")
    for kind in compact:
        found[f"vix_{kind}"] = vision_xformer_like(kind, mlp_hidden=512, **sizes)
    for hybrid in (False, True):
        name = f"vix_{'hybrid_' if hybrid else ''}mixer"
        found[name] = vision_xformer_like("mixer", hybrid=hybrid, mlp_hidden=128, **sizes)
    return found


VISION_XFORMERS = _published()
