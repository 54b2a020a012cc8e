"""`vitnas show-tokens MODEL IMAGES`: which patches a network keeps, or merges, drawn on images of a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm.data
import torch
from jsonargparse.typing import PositiveInt
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from vitnas.cli.options import options
from vitnas.data.images import UNREADABLE, quiet_pillow, upright, with_channels
from vitnas.errors import UserError, first_line
from vitnas.exporting.networks import load_network
from vitnas.model import Model
from vitnas.reporting.tokens import SHOWN, token_maps, token_page
from vitnas.runs import write_atomic

USAGE = (
    "`vitnas show-tokens` takes a model and a folder of images, then out=FILE.html and number=N: a folder of a saved "
    "model, RUN, RUN@ROLE or a name."
)
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class ShowTokensOptions:
    """A model, a folder of images (or one image), the page to write, and how many images it shows."""

    model: str
    images: Path
    out: Path = Path("tokens.html")
    number: PositiveInt = SHOWN


def show_tokens_command(words: list[str], console: Console) -> None:
    """A page of pictures."""
    asked = options(ShowTokensOptions, words, USAGE)
    files = image_files(asked.images)[: asked.number]

    def check(network: nn.Module) -> None:
        if not isinstance(network, Model):
            raise UserError(
                f"MODEL is {asked.model!r}, which keeps all patches; there is nothing to show. Give a network of "
                "vitnas that keeps fewer, for example one that vitnas.with_selections made and save_timm wrote."
            )

    model = cast(Model, load_network(asked.model, what="MODEL", check=check))
    config = timm.data.resolve_model_data_config(model)
    images = torch.stack([_read(file, config) for file in files])
    names = [file.name for file in files]
    maps = token_maps(model, images, names, mean=config["mean"], std=config["std"])
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(asked.out, token_page(maps, f"What {asked.model} keeps"))
    console.print(f"{len(files)} images of {asked.images} in {asked.out}", markup=False)


def image_files(folder: Path) -> list[Path]:
    """The images below a folder, in order; or the one that it is.

    Raises:
        UserError: there is no such folder, or none in it.
    """
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise UserError(f"images is {str(folder)!r}, but there is no such folder. Correct the path.")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(
            f"images is {str(folder)!r}, which holds no image ({', '.join(sorted(SUFFIXES))}). Give another folder."
        )
    return found


def _read(file: Path, config: dict[str, Any]) -> Tensor:
    """One image as the model takes it."""
    transform: Any = timm.data.create_transform(**config, is_training=False)
    try:
        with quiet_pillow(), Image.open(file) as image:
            pixels: Tensor = transform(with_channels(upright(image), config["input_size"][0]))
    except UNREADABLE as error:
        raise UserError(
            f"{file} cannot be read as an image ({first_line(error)}). Mend or remove it."
        ) from error
    return pixels
