"""Predictor: which classes images are of, or which numbers, by any trained network.

Legend: N images, Y classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitnas.data.images import UNREADABLE, Store, quiet_pillow, upright, with_channels
from vitnas.data.sources import NO_LABEL, ListSource, Pixels, from_pil, to_pil
from vitnas.errors import UserError, first_line
from vitnas.exporting.pixels import Choose
from vitnas.measure.convert import model_device, model_dtype
from vitnas.predicting.networks import FileNetwork, form_and_names, open_network

Picture: TypeAlias = str | Path | Image.Image | Pixels


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, the first one first, with their probabilities; or its numbers by name, of a
    network that tells numbers; none where it cannot be read, and then `error` says why."""

    name: str
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)


class Predictor:
    """Asks a network about images of any size: files, Pillow's pictures, or uint8 arrays (H, W) or (H, W, C).

    Args:
        network: what `vitnas predict` takes (an ONNX or ExecuTorch file, a folder of a saved model, RUN, RUN@ROLE, a
            timm name, NAME@FILE), or a network that knows how its images are prepared.
        batch_size: images at once.

    Raises:
        UserError: no such network, or it is not known how images are prepared for it.

    >>> Predictor("runs/mine").predict(["photo.jpg"])[0].classes[0]  # doctest: +SKIP
    """

    def __init__(self, network: nn.Module | str | Path, *, batch_size: int = 32) -> None:
        self.network = network if isinstance(network, nn.Module) else open_network(str(network))
        self.network.eval()
        self.form, self.class_names = form_and_names(self.network)
        self.batch_size = batch_size
        self._choose = Choose.of(self.network)

    def probabilities(self, images: Sequence[Picture]) -> np.ndarray[Any, Any]:
        """(N, Y) float32: of all classes; of a network that tells numbers these, of one without classes features.

        Raises:
            UserError: one of the images cannot be read.
        """
        found: list[Tensor] = []
        for some in _batches(images, self.batch_size):
            pictures = [self._opened(image) for image in some]
            for picture in pictures:
                if isinstance(picture, str):
                    raise UserError(f"{picture}. Mend or remove it.")
            found.append(self._ask([picture for picture in pictures if not isinstance(picture, str)]))
        return torch.cat(found).numpy()

    def predict(self, images: Iterable[Picture], *, top: int = 5) -> list[Prediction]:
        """The `top` likeliest classes of each image, in order; or all of its numbers."""
        return list(self.each(images, top=top))

    def each(
        self, images: Iterable[Picture], *, top: int = 5, told: Callable[[int], object] | None = None
    ) -> Iterator[Prediction]:
        """As `predict`, one after the other.

        Args:
            told: hears how many are done.

        Raises:
            UserError: a network without classes.
        """
        if self._choose.choice == "none":
            raise UserError(
                "MODEL gives features and no classes; nothing can be said of an image's class. Give another network, "
                "or use Predictor.probabilities."
            )
        done = 0
        with ThreadPoolExecutor(8) as pool:
            for some in _batches(images, self.batch_size):
                pictures = list(pool.map(self._opened, some))
                good = [picture for picture in pictures if not isinstance(picture, str)]
                rows = iter(self._ask(good) if good else torch.empty(0))
                for number, (image, picture) in enumerate(zip(some, pictures, strict=True), done):
                    name = str(image) if isinstance(image, str | Path) else str(number)
                    if isinstance(picture, str):
                        yield Prediction(name, error=picture)
                        continue
                    yield self._told(name, next(rows), top)
                done += len(some)
                if told is not None:
                    told(done)

    def _told(self, name: str, answer_Y: Tensor, top: int) -> Prediction:
        names = self.class_names or [str(number) for number in range(len(answer_Y))]
        if self._choose.choice == "numbers":
            values = (float(f"{value:.7g}") for value in answer_Y.tolist())
            return Prediction(name, numbers=dict(zip(names, values, strict=True)))
        best, places = answer_Y.topk(min(top, len(answer_Y)))
        named = tuple(names[place] for place in places.tolist())
        return Prediction(name, named, tuple(round(float(value), 6) for value in best))

    def _opened(self, image: Picture) -> Image.Image | str:
        """A picture in the network's channels, or why there is none."""
        try:
            with quiet_pillow():
                if isinstance(image, str | Path):
                    with Image.open(image) as opened:
                        opened.load()
                        return with_channels(upright(opened.copy()), self.form.in_chans)
                picture = image if isinstance(image, Image.Image) else _as_picture(image)
                return with_channels(upright(picture), self.form.in_chans)
        except UserError:
            raise
        except UNREADABLE as error:
            return f"{image if isinstance(image, str | Path) else 'an image'} cannot be read ({first_line(error)})"

    @torch.no_grad()
    def _ask(self, pictures: Sequence[Image.Image]) -> Tensor:
        if isinstance(self.network, FileNetwork) and self.network.takes_pixels:
            # As the file gives them: probabilities, or numbers in units of theirs.
            longest = self.network.max_side
            return torch.cat(
                [
                    self.network.ask(
                        torch.from_numpy(from_pil(one))[None]
                        if longest is None or max(one.size) <= longest
                        else self._prepared([one]).permute(0, 2, 3, 1)
                    )
                    for one in pictures
                ]
            )
        images_BCHW = self.form.normalise(self._prepared(pictures))
        there, dtype = model_device(self.network), model_dtype(self.network)
        answers_BY: Tensor = self._choose(self.network(images_BCHW.to(there, dtype)).float())
        return answers_BY.cpu()

    def _prepared(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(B, C, H, W) uint8, of the network's sides."""
        source = ListSource(pictures, [NO_LABEL] * len(pictures), (), "image")
        store = Store(source, self.form, whole=False, on_corrupt="raise")
        rows = [store.decode(row) for row in range(len(pictures))]
        return torch.stack([torch.from_numpy(row).permute(2, 0, 1) for row in rows if row is not None])


def _batches(images: Iterable[Picture], size: int) -> Iterator[tuple[Picture, ...]]:
    left = iter(images)
    while some := tuple(islice(left, size)):
        yield some


def _as_picture(pixels: Pixels) -> Image.Image:
    array = np.asarray(pixels)
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or (array.ndim == 3 and array.shape[2] not in (1, 3))
    ):
        raise UserError(
            f"an image is {array.dtype} of shape {array.shape}; it must be uint8, (height, width) or (height, width, 1 "
            "or 3). Convert it."
        )
    return to_pil(array[:, :, None] if array.ndim == 2 else array)
