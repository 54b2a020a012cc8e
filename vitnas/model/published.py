"""Published Archs by name. `registry.py` makes timm know them.

AutoFormer-T, -S and -B: Chen et al., "AutoFormer: Searching Transformers for Visual Recognition" (arXiv 2107.00651),
the subnets of the authors' configurations. T has MLP ratios of 3, which its own space leaves out. Parameters as
published (5.868, 22.891 and 53.692 million); multiply-accumulates are in PAPERS.md by convention.
"""

from __future__ import annotations

from vitnas.arch import Arch, Block, Stage


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
}
