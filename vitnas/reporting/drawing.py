"""An Arch drawn block by block as an inline SVG: one row per block, widths to one scale.

A row holds two bars: attention (heads x head_dim wide, a tick between heads) and the MLP (its hidden units).
The header of a stage shows the embedding width to the same scale, so that a bottleneck is seen, not computed.
Colours come from the page's style sheet (classes), so the drawing follows its light and dark schemes.
"""

from __future__ import annotations

from html import escape
from math import prod

from vitnas.arch import Arch, Block

WIDTH = 460  # user units; the page scales the drawing to the column
LABEL = 56  # room for the block's number at the left
GAP = 62  # room between the bars for the "heads x head_dim" label
TAIL = 46  # room for the label of the longest MLP bar
ROW = 22
BAR = 13


def draw(arch: Arch, whole: Arch | None = None) -> str:
    """Return the SVG element, with a tooltip on every part; all text is escaped.

    Args:
        whole: what `arch` was cut out of, which is shown behind it: every block that it has, each as wide as there.
    """
    scale = _scale(whole or arch)
    mlp_left = LABEL + scale * max(block.inner_dim for block in (whole or arch).blocks) + GAP
    parts: list[str] = []
    y = _band(parts, 4, "stem", _stem_text(arch))
    y = _legend(parts, y + 4, mlp_left)
    number = 0
    behind = list(whole.blocks) if whole else []
    for index, stage in enumerate(arch.stages):
        y = _stage_header(
            parts, y, f"stage {index + 1}" if len(arch.stages) > 1 else "width", stage.embed_dim, scale
        )
        for block in stage.blocks:
            number += 1
            while behind and number <= (block.slot or 0):
                y = _block_row(parts, y, number, None, scale, mlp_left, behind[number - 1])
                number += 1
            if block.keep is not None:
                y = _band(
                    parts, y, "keep", f"{block.keep} of {prod(arch.grids[index])} patches ({arch.selector})"
                )
            y = _block_row(parts, y, number, block, scale, mlp_left, behind[number - 1] if behind else None)
    for index in range(number, len(behind)):
        y = _block_row(parts, y, index + 1, None, scale, mlp_left, behind[index])
    y = _band(parts, y + 6, "head", f"{arch.stages[-1].embed_dim} features → {arch.num_classes} classes")
    label = escape(f"Architecture {arch.id}: {len(arch.blocks)} blocks", quote=True)
    return (
        f'<svg class="drawing" viewBox="0 0 {WIDTH} {y + 4:.0f}" role="img" aria-label="{label}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _scale(arch: Arch) -> float:
    """User units per channel such that the widest attention, the widest MLP and every embedding width fit."""
    attention = max(block.inner_dim for block in arch.blocks)
    mlp = max(block.mlp_hidden for block in arch.blocks)
    embed = max(stage.embed_dim for stage in arch.stages)
    return min((WIDTH - LABEL - GAP - TAIL) / max(1, attention + mlp), (WIDTH - LABEL - 100) / max(1, embed))


def _stem_text(arch: Arch) -> str:
    channels, height, width = arch.input_size
    image = f"{height}×{width}×{channels}"
    return f"image {image} → patches {arch.patch_size}×{arch.patch_size} → {arch.num_tokens} tokens"


def _text(x: float, y: float, text: str, css: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, css: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 1):.1f}" height="{height}" rx="2" class="{css}"/>'
    )


def _group(title: str, *parts: str) -> str:
    return f"<g><title>{escape(title)}</title>{''.join(parts)}</g>"


def _band(parts: list[str], y: float, name: str, text: str) -> float:
    box = _box(LABEL, y, WIDTH - LABEL - 4, ROW, "band")
    parts.append(
        _group(
            f"{name}: {text}",
            box,
            _text(LABEL - 8, y + 15, name, "name", "end"),
            _text(LABEL + 8, y + 15, text),
        )
    )
    return y + ROW


def _legend(parts: list[str], y: float, mlp_left: float) -> float:
    parts.append(_text(LABEL, y + 13, "attention", "key-attention"))
    parts.append(_text(mlp_left, y + 13, "MLP hidden units", "key-mlp"))
    return y + 20


def _stage_header(parts: list[str], y: float, name: str, embed_dim: int, scale: float) -> float:
    width = embed_dim * scale
    parts.append(
        _group(
            f"embedding width {embed_dim}",
            _box(LABEL, y + 7, width, 7, "embed"),
            _text(LABEL - 8, y + 15, name, "name", "end"),
            _text(LABEL + width + 6, y + 15, f"embedding {embed_dim}"),
        )
    )
    return y + ROW


def _block_row(
    parts: list[str],
    y: float,
    number: int,
    block: Block | None,
    scale: float,
    mlp_left: float,
    whole: Block | None = None,
) -> float:
    """A block, in front of the one that it was cut out of; None where that is left out."""
    top, row = y + (ROW - BAR) / 2, [_text(LABEL - 8, y + 15, str(number), "name", "end")]
    title, was = f"block {number}: left out", ""
    if whole is not None:
        row += [_box(LABEL, top, whole.inner_dim * scale, BAR, "gone")]
        row += [_box(mlp_left, top, whole.mlp_hidden * scale, BAR, "gone")]
        was = f"; MODEL has {whole.num_heads} heads and {whole.mlp_hidden} hidden units"
    if block is None:
        row.append(_text(LABEL + 5, y + 15, "left out"))
    else:
        width = block.inner_dim * scale
        row.append(_box(LABEL, top, width, BAR, "attention"))
        for head in range(1, block.num_heads):
            x = LABEL + head * block.head_dim * scale
            row.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + BAR}" class="tick"/>')
        widest = max(width, whole.inner_dim * scale if whole else 0)
        row.append(_text(LABEL + widest + 5, y + 15, f"{block.num_heads}×{block.head_dim}"))
        row.append(_box(mlp_left, top, block.mlp_hidden * scale, BAR, "mlp"))
        widest = max(block.mlp_hidden, whole.mlp_hidden if whole else 0) * scale
        row.append(_text(mlp_left + widest + 5, y + 15, str(block.mlp_hidden)))
        title = (
            f"block {number}: {block.mixer}, {block.num_heads} heads × {block.head_dim} = {block.inner_dim} channels; "
            f"MLP with {block.mlp_hidden} hidden units"
        )
    parts.append(_group(title + was, *row))
    return y + ROW
