"""A network by what a user types, an exported file among it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitnas.data.images import Form
from vitnas.errors import UserError, first_line
from vitnas.exporting.describe import form_of, names_of
from vitnas.exporting.executorch import (
    MAX_SIDE,
    executorch_about,
    executorch_runner,
    require_executorch,
)
from vitnas.exporting.networks import load_network
from vitnas.exporting.onnx import onnx_session
from vitnas.exporting.pixels import choice_of, pixels_of
from vitnas.measure.convert import input_shape
from vitnas.model.scale import scale_of
from vitnas.model.timm_cfg import DATA_KEYS, SCALE, SEVERAL
from vitnas.runs import parse_json


class FileNetwork(nn.Module):
    """A file that vitnas wrote, as a network: prepared images in, logits out, on the CPU."""

    kind: str  # in words

    def __init__(self, file: Path) -> None:
        super().__init__()
        if not file.is_file():
            raise UserError(
                f"there is no file {str(file)!r}; it should be {self.kind} file. Correct the path."
            )
        self.takes_pixels = self.is_half = self.fixed_batch = False
        self.max_side: int | None = None  # pixels

    def _describe(self, file: Path, about: Mapping[str, str], num_classes: int) -> None:
        given = {
            key: _value(about[key])
            for key in (*DATA_KEYS, SCALE, "input_size", "class_names")
            if key in about
        }
        if "input_size" not in given:
            raise UserError(
                f"{file} does not say which images it takes; files that vitnas writes do. Export it by "
                "vitnas.export(model, path)."
            )
        self.num_classes = num_classes
        self.pretrained_cfg = {
            **{key: given[key] for key in DATA_KEYS if key in given},
            "input_size": tuple(given["input_size"]),
            "label_names": given.get("class_names") or [],
            SEVERAL: about.get(SEVERAL) == "true",
            SCALE: given.get(SCALE),
        }
        self.form = form_of(self, self.pretrained_cfg["input_size"])

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits, or what has the same probabilities."""
        scale = scale_of(self)
        if not self.takes_pixels:
            answers_BY = self.ask(images_BCHW.half() if self.is_half else images_BCHW)
            return answers_BY if scale is None else scale.standardised(answers_BY)
        answers_BY = self.ask(pixels_of(images_BCHW, self.form))
        if scale is not None:
            return scale.standardised(answers_BY)
        choice = choice_of(self)
        if choice == "none":
            return answers_BY
        return answers_BY.clamp(1e-30, 1).log() if choice == "softmax" else answers_BY.logit(1e-7)

    def ask(self, images: Tensor) -> Tensor:
        """What the file gives for what it takes."""
        parts = images.split(1) if self.fixed_batch else (images,)
        return torch.cat([self._run(part.cpu()) for part in parts]).float()

    def _run(self, images: Tensor) -> Tensor:
        raise NotImplementedError


class OnnxNetwork(FileNetwork):
    """An ONNX file, by ONNX Runtime.

    Raises:
        UserError: no such file, one that ONNX Runtime cannot read, or that does not say how images are prepared.
    """

    kind = "an ONNX"

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        try:
            self.session = onnx_session(file)
        except Exception as error:  # ONNX Runtime raises many kinds
            raise UserError(
                f"{file} cannot be read by ONNX Runtime ({first_line(error)}); it must be an ONNX file. Export it anew."
            ) from error
        about = self.session.get_modelmeta().custom_metadata_map
        node, answer = self.session.get_inputs()[0], self.session.get_outputs()[0]
        self.takes_pixels, self.input_name = node.type == "tensor(uint8)", node.name
        self.is_half, self.fixed_batch = "float16" in node.type, isinstance(node.shape[0], int)
        said = about.get("num_classes", answer.shape[-1])  # a float file's logits may be features
        self._describe(file, about, 0 if answer.name == "features" else int(said))

    def _run(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {self.input_name: images.numpy()})[0])


class ExecuTorchNetwork(FileNetwork):
    """A `.pte` file, by ExecuTorch.

    Raises:
        MissingExtra: that is not installed.
        UserError: no such file, one that it cannot read, or that does not say how images are prepared.
    """

    kind = "an ExecuTorch"

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        require_executorch()
        try:
            self._asked, about = executorch_runner(file), parse_json(executorch_about(file))
        except Exception as error:  # its runtime raises many kinds
            raise UserError(
                f"{file} cannot be read by ExecuTorch ({first_line(error)}); it must be a .pte file. Export it anew."
            ) from error
        self.fixed_batch = True
        self.takes_pixels = MAX_SIDE in about
        self.max_side = int(about[MAX_SIDE]) if self.takes_pixels else None
        self._describe(file, about, int(about.get("num_classes", 0)))

    def _run(self, images: Tensor) -> Tensor:
        return self._asked(images)


def _value(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return text


FILES: Mapping[str, type[OnnxNetwork | ExecuTorchNetwork]] = {".onnx": OnnxNetwork, ".pte": ExecuTorchNetwork}


def open_network(text: str, *, what: str = "MODEL") -> nn.Module:
    """The network that `text` stands for: an ONNX or ExecuTorch file of vitnas's, or what `load_network` takes.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    file = FILES.get(Path(text).suffix)
    return load_network(text, what=what) if file is None else file(Path(text))


def form_and_names(network: nn.Module) -> tuple[Form, list[str]]:
    """How images are prepared for it, and what its classes are called.

    Raises:
        UserError: the first is not known.
    """
    size = network.form.input_size if isinstance(network, FileNetwork) else input_shape(network)
    return form_of(network, size), names_of(network)
