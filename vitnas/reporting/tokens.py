"""Which patches were kept, or merged into which, drawn on images: for the report of a run and `vitnas show-tokens`.

Patches that are gone are dark; those that share a token with others have its colour, and lines lie between tokens.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import torch
from markupsafe import Markup, escape
from PIL import Image
from torch import Tensor

from vitnas.errors import UserError
from vitnas.grids import Grid
from vitnas.model import Model
from vitnas.model.modes import evaluating
from vitnas.runs import RunFile

SIDE = 224  # pixels of the larger side of a picture
SHOWN = 12  # images


@dataclass(frozen=True)
class TokenMap:
    """One image, and per place the place on the grid of the token that each of its patches is in; -1 in none."""

    name: str
    jpeg: str  # base64
    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TokenMaps(RunFile):
    """What a Model kept of some images, in front of the blocks of these numbers."""

    FILE: ClassVar[str] = "token_maps.json"
    COMMAND: ClassVar[str] = "vitnas evaluate"

    selector: str
    grid: Grid
    blocks: tuple[int, ...]
    keeps: tuple[int, ...]
    images: tuple[TokenMap, ...]


@torch.no_grad()
def token_maps(
    model: Model, images_BCHW: Tensor, names: Sequence[str], *, mean: Sequence[float], std: Sequence[float]
) -> TokenMaps:
    """What `model` keeps of normalised images.

    Args:
        names: of the images.
        mean, std: by which they were normalised.

    Raises:
        UserError: the model keeps all patches.
    """
    arch = model.arch
    if arch.selector is None:
        raise UserError(
            f"{arch.id} keeps all patches, so that there is nothing to show; a network that keeps fewer is made by "
            "vitnas.with_selections, or by a run with space.keep. Give one of those."
        )
    with evaluating(model):
        groups_BSP = model(images_BCHW, want=("groups",))["groups"].cpu()
    kept = [(index, block.keep) for index, block in enumerate(arch.blocks) if block.keep is not None]
    return TokenMaps(
        selector=arch.selector,
        grid=arch.grids[-1],
        blocks=tuple(index for index, _ in kept),
        keeps=tuple(keep for _, keep in kept),
        images=tuple(
            TokenMap(name, _jpeg(image, mean, std), tuple(tuple(place) for place in groups.tolist()))
            for name, image, groups in zip(names, images_BCHW.cpu(), groups_BSP, strict=True)
        ),
    )


def draw_tokens(maps: TokenMaps) -> Markup:
    """A row of pictures per image: itself, and what was kept at each place."""
    rows, columns = maps.grid
    scale = SIDE / max(maps.grid)
    width, height = round(columns * scale), round(rows * scale)
    parts = [
        f"<p>Patches in front of blocks {', '.join(map(str, maps.blocks))}: {'/'.join(map(str, maps.keeps))} of "
        f"{rows * columns}, by {escape(maps.selector)}. Dark: gone. Of one colour: in one token.</p>"
    ]
    for number, image in enumerate(maps.images):
        whole, size = len(maps.blocks) + 1, f'width="{width}" height="{height}"'
        parts.append(
            f'<svg class="tokens" role="img" aria-label="{escape(image.name)}" style="max-width:100%" '
            f'width="{whole * (width + 8)}" viewBox="0 0 {whole * (width + 8)} {height + 18}">'
            f'<defs><image id="tokens-{number}" {size} preserveAspectRatio="none" '
            f'href="data:image/jpeg;base64,{image.jpeg}"/></defs>'
        )
        for place in range(whole):
            title = image.name if place == 0 else f"block {maps.blocks[place - 1]}"
            drawn = "" if place == 0 else "".join(_overlay(image.groups[place - 1], maps.grid, scale))
            parts.append(
                f'<g transform="translate({place * (width + 8)} 0)"><use href="#tokens-{number}"/>{drawn}'
                f'<text y="{height + 13}" font-size="11" fill="currentColor">{escape(title)}</text></g>'
            )
        parts.append("</svg>")
    return Markup("".join(parts))


def token_page(maps: TokenMaps, title: str) -> str:
    """One HTML page that works offline."""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>body{{font:14px system-ui,sans-serif;margin:1.5rem}}"
        f"svg{{display:block;margin:0 0 .8rem}}</style></head><body><h1>{escape(title)}</h1>{draw_tokens(maps)}"
        "</body></html>\n"
    )


def _overlay(groups: Sequence[int], grid: Grid, scale: float) -> Iterator[str]:
    """Dark and coloured patches, and lines between tokens where some hold several."""
    rows, columns = grid
    shared = {place for place in groups if place >= 0 and groups.count(place) > 1}
    for row in range(rows):
        line = groups[row * columns : (row + 1) * columns]
        start = 0
        for place, run in groupby(line):
            length = len(list(run))
            if place < 0 or place in shared:
                look = 'fill="#000" opacity=".78"'
                if place >= 0:
                    look = f'fill="hsl({place * 137 % 360},85%,50%)" opacity=".5"'
                yield (
                    f'<rect x="{start * scale:.1f}" y="{row * scale:.1f}" width="{length * scale:.1f}" '
                    f'height="{scale:.1f}" {look}/>'
                )
            start += length
    if shared:
        yield f'<path d="{"".join(_borders(groups, grid, scale))}" stroke="#fff" fill="none" stroke-width=".7"/>'


def _borders(groups: Sequence[int], grid: Grid, scale: float) -> Iterator[str]:
    rows, columns = grid
    for row in range(rows):
        for column in range(columns):
            here = groups[row * columns + column]
            if column + 1 < columns and groups[row * columns + column + 1] != here:
                yield f"M{(column + 1) * scale:.1f} {row * scale:.1f}v{scale:.1f}"
            if row + 1 < rows and groups[(row + 1) * columns + column] != here:
                yield f"M{column * scale:.1f} {(row + 1) * scale:.1f}h{scale:.1f}"


def _jpeg(image_CHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> str:
    """A normalised image as a picture of at most SIDE pixels."""
    shift, factor = (torch.tensor(tuple(values)).view(-1, 1, 1) for values in (mean, std))
    pixels = (image_CHW.float() * factor + shift).clamp(0, 1).mul(255).round().to(torch.uint8)
    picture = Image.fromarray((pixels.permute(1, 2, 0) if len(pixels) == 3 else pixels[0]).numpy())
    ratio = SIDE / max(picture.size)
    size = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
    resample = Image.Resampling.NEAREST if ratio >= 2 else Image.Resampling.BICUBIC
    text = io.BytesIO()
    picture.resize(size, resample).save(text, "JPEG", quality=80)
    return base64.b64encode(text.getvalue()).decode()
