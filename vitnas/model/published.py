"""Published Archs by name. `registry.py` makes timm know them.

AutoFormer-T, -S and -B: Chen et al., "AutoFormer: Searching Transformers for Visual Recognition" (arXiv 2107.00651),
the subnets of the authors' configurations. T has MLP ratios of 3, which its own space leaves out. Parameters as
published (5.868, 22.891 and 53.692 million); multiply-accumulates are in PAPERS.md by convention.

ViT-ResNAS-Tiny, -Small, -Medium and the hand-made ViT-Res-Tiny: Liao, Karaman, Sze, "Searching for Efficient
Multi-Stage Vision Transformers" (arXiv 2109.00642), the authors' network definitions, without the patch head that they
train with (`patch_head=True` adds it); Medium also for 280, 336 and 392 pixels.

ViTAS-A, -B, -C, -E and -F (there is no D): Su et al., "ViTAS: Vision Transformer Architecture Search" (arXiv
2106.13700), from the `net_id`s of the authors' configurations (C from its widths, which are the same in every
block).

DynamicViT on DeiT-256, -S and -B at keep ratios 0.5 to 0.9: Rao et al., "DynamicViT: Efficient Vision Transformers with
Dynamic Token Sparsification" (arXiv 2106.02034); `dynamicvit_deit_small_07` keeps 0.7 of the patches at each of three
places.

Transformer-LS-Medium and -Base for images, and Medium at 384 pixels (arXiv 2107.02192): `transformer_ls.py`.

Vision X-formers (arXiv 2107.02239), names that begin with `vix_`: `vision_xformers.py`.
"""

from __future__ import annotations

from dataclasses import replace

from vitnas.arch import Arch, Block, Stage
from vitnas.model.net_id import arch_of_net_id, vitas_arch
from vitnas.model.selections import keeps_of, selecting
from vitnas.model.transformer_ls import TRANSFORMER_LS
from vitnas.model.vision_xformers import VISION_XFORMERS


def _autoformer(embed_dim: int, num_heads: tuple[int, ...], mlp_ratios: tuple[float, ...]) -> Arch:
    blocks = tuple(
        Block(num_heads=heads, head_dim=64, mlp_hidden=int(embed_dim * ratio))
        for heads, ratio in zip(num_heads, mlp_ratios, strict=True)
    )
    return Arch(
        image_size=224,
        patch_size=16,
        stages=(Stage(embed_dim=embed_dim, blocks=blocks),),
        relative_position=14,
        global_pool="avg",
        norm_eps=1e-5,
    )


def _resnas(
    dims: tuple[int, ...], head_dims: tuple[int, ...], blocks: tuple[tuple[tuple[int, int], ...], ...]
) -> Arch:
    """Per stage its width, the width of its heads, and (heads, hidden units) per block."""
    stages = (
        Stage(
            embed_dim=dim,
            blocks=tuple(Block(num_heads=heads, head_dim=size, mlp_hidden=hidden) for heads, hidden in each),
        )
        for dim, size, each in zip(dims, head_dims, blocks, strict=True)
    )
    return Arch(image_size=224, patch_size=14, stages=tuple(stages), stem="conv", stem_width=24)


RESNAS: dict[str, Arch] = {
    "vit_resnas_tiny": _resnas(
        (176, 352, 704),
        (32, 48, 64),
        (
            ((3, 704), (3, 576), (3, 640), (4, 576), (4, 704)),
            ((10, 1408), (8, 1408), (8, 1280), (8, 1408), (10, 1280), (10, 1024)),
            ((10, 2560), (10, 1792), (10, 2816), (8, 2816), (8, 2560)),
        ),
    ),
    "vit_resnas_small": _resnas(
        (220, 440, 880),
        (32, 48, 64),
        (
            ((5, 880), (5, 880), (7, 800), (5, 720), (5, 720), (5, 720)),
            ((10, 1760), (10, 1440), (10, 1920), (10, 1600), (12, 1600), (12, 1440)),
            ((16, 3200), (12, 3200), (16, 2880), (12, 2240), (14, 2560)),
        ),
    ),
    "vit_resnas_medium": _resnas(
        (240, 640, 880),
        (32, 48, 64),
        (
            ((7, 960), (6, 960), (7, 800), (8, 960), (7, 880), (8, 880), (6, 800)),
            ((10, 1120), (14, 1760), (14, 1920), (16, 1760), (14, 1440), (16, 1760), (16, 1920)),
            ((16, 3200), (10, 3840), (16, 3840), (12, 3200), (16, 3520), (14, 3520)),
        ),
    ),
    "vit_res_tiny": _resnas(
        (192, 384, 768), (64, 64, 64), (((3, 768),) * 4, ((6, 1536),) * 4, ((12, 3072),) * 4)
    ),
}
RESNAS |= {
    f"vit_resnas_medium_{size}": replace(RESNAS["vit_resnas_medium"], image_size=size)
    for size in (280, 336, 392)
}


def _deit(embed_dim: int) -> Arch:
    block = Block(num_heads=embed_dim // 64, head_dim=64, mlp_hidden=4 * embed_dim)
    return Arch(image_size=224, patch_size=16, stages=(Stage(embed_dim=embed_dim, blocks=(block,) * 12),))


DYNAMICVIT: dict[str, Arch] = {
    f"dynamicvit_deit_{name}_0{tenths}": selecting(deit, keeps_of(deit, tenths / 10), "predictor")
    for name, deit in (("256", _deit(256)), ("small", _deit(384)), ("base", _deit(768)))
    for tenths in (5, 6, 7, 8, 9)
}

PUBLISHED: dict[str, Arch] = {
    "autoformer_tiny": _autoformer(
        192,
        (3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 3, 3),
        (3.5, 3.5, 3, 3.5, 3, 3, 4, 4, 3.5, 4, 3.5, 4, 3.5),
    ),
    "autoformer_small": _autoformer(
        384,
        (6, 6, 5, 7, 5, 5, 5, 6, 6, 7, 7, 6, 7),
        (3, 3.5, 3, 3.5, 4, 4, 4, 4, 4, 4, 4, 3.5, 4),
    ),
    "autoformer_base": _autoformer(
        576,
        (9, 9, 9, 9, 9, 10, 9, 9, 10, 9, 10, 9, 9, 10),
        (3.5, 3.5, 4, 3.5, 4, 3.5, 3.5, 3, 4, 4, 3, 4, 3, 3.5),
    ),
    "vitas_a": arch_of_net_id(
        "1 2 4 3 4 4 1 3 4 3 4 4 4 4 3 3 4 0 0 3 1 6 7 9 4 3 6 8 4 9 1 8 6 4 9 2 7 6 8 9 3 0 3 8 7 0 5 7 9 8 4 4"
    ),
    "vitas_b": arch_of_net_id(
        "1 3 4 4 3 4 3 4 4 2 2 4 2 3 4 4 1 0 0 4 1 5 1 6 2 2 2 3 2 9 2 6 3 9 5 7 7 5 6 4 8 1 5 3 2 8 5 9 2 4 5 5"
    ),
    "vitas_c": vitas_arch(16, 230, (Block(num_heads=3, head_dim=48, mlp_hidden=720),) * 12),
    "vitas_e": arch_of_net_id(
        "1 3 4 3 4 3 1 4 0 4 2 1 2 4 2 1 2 0 0 8 4 4 1 7 6 5 3 8 5 6 5 6 3 6 3 4 4 4 8 8 8 7 4 0 4 5 9 5 3 6 7 8"
    ),
    "vitas_f": arch_of_net_id(
        "1 3 3 3 3 3 3 3 3 3 3 3 3 3 0 0 3 2 5 0 7 5 2 3 6 6 2 4 4 8 7 4 6 7 2 6 1 6 6 4 7 5 7"
    ),
}
PUBLISHED |= RESNAS
PUBLISHED |= DYNAMICVIT
PUBLISHED |= TRANSFORMER_LS
PUBLISHED |= VISION_XFORMERS
