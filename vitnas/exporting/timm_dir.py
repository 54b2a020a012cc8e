"""A folder that timm loads: `config.json`, `model.safetensors` and a `README.md` that says how.

    import timm, vitnas
    model = timm.create_model("local-dir:FOLDER", pretrained=True)

The import makes vitnas's models known to timm. What timm has itself needs no vitnas to load: models of timm's own, and
Models of Archs that one of timm's functions makes. Weights are safetensors; nothing is pickled.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from vitnas.arch import Arch
from vitnas.errors import UserError, first_line
from vitnas.exporting.card import CARD, UNKNOWN, card_of, licence_in, with_licence, write_card
from vitnas.exporting.describe import images_of, names_of
from vitnas.exporting.verify import ExportError, example_images
from vitnas.measure.convert import model_device, quiet
from vitnas.model.modes import evaluating
from vitnas.model.timm_cfg import IMAGES_KNOWN, OWN_ARCH, OWN_KEYS, SCALE, SEVERAL
from vitnas.model.timm_plain import plain_timm
from vitnas.runs import load_tensors, read_json, remove_stale, save_tensors, write_with, writing
from vitnas.version import VERSION

ENTRY_POINT = "vitnas_arch"  # timm's name for "the Model of whatever Arch the config holds"
WEIGHTS = "model.safetensors"


def save_timm(
    model: nn.Module,
    folder: Path | str,
    *,
    class_names: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `model` as a folder that timm loads, load it back, and compare every tensor bit for bit.

    Other files in `folder` stay. A new folder appears in one step. In a folder that exists, the three files
    are replaced one by one, the weights first.

    Args:
        class_names: names of the classes in order; those that the model brings, by default.
        data_config: `mean`, `std`, `interpolation`, `crop_pct` that the model was trained with, where they
            differ from the model's `pretrained_cfg`. Where neither knows them, the config says so.

    Returns:
        The record: path, architecture, params, tensors, bytes.

    Raises:
        ExportError: timm cannot rebuild the model from the folder. What was there before is untouched.
        UserError: wrong class names, a model without `pretrained_cfg`, or `folder` cannot be written.
    """
    folder = Path(folder)
    names = names_of(model, class_names)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; the folder for timm needs its own name. Choose another.")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(folder)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
            new = Path(beside) / "new"
            _write_checked(model, new, names, data_config or {})
            size = sum(file.stat().st_size for file in new.iterdir())
            _move(new, folder)
    said = read_json(folder / "config.json")["architecture"]
    return {
        "path": str(folder),
        "architecture": said,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "tensors": len(model.state_dict()),
        "bytes": size,
        "bit_exact": True,
        "needs_import": "vitnas" if said == ENTRY_POINT else None,
        "versions": {"timm": timm.__version__, "torch": str(torch.__version__), "vitnas": VERSION},
    }


def load_timm(folder: Path | str) -> nn.Module:
    """The model of a folder that `save_timm` wrote, in evaluation mode.

    Only safetensors are read: a folder whose weights are in another format is refused, not unpickled.

    Raises:
        UserError: the folder lacks a file, or timm cannot rebuild the model.
    """
    folder = Path(folder)
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}; a saved model is a folder with config.json and {WEIGHTS}."
            )
    config = read_json(folder / "config.json")
    name = config.get("architecture")
    if not isinstance(name, str) or not timm.is_model(name):
        raise UserError(f"{folder / 'config.json'} names the architecture {name!r}; timm does not know it.")
    own_arch = config.get(OWN_ARCH)

    def make() -> Any:
        if own_arch is None:
            return timm.create_model(f"local-dir:{folder}", pretrained=True)
        told = {key: config[key] for key in ("num_classes", "label_names") if key in config}
        place = {"architecture": ENTRY_POINT, "file": str(folder), "source": "local-dir"}
        cfg = {**config["pretrained_cfg"], **told, **place}
        return timm.create_model(ENTRY_POINT, pretrained=True, pretrained_cfg=cfg, arch=own_arch)

    model = _by_timm(folder, make)
    own = {key: config[key] for key in OWN_KEYS if key in config}
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, **own}
    return model.eval()


def _by_timm(folder: Path, make: Callable[[], Any]) -> Any:
    """What `make` makes of a folder's files."""
    try:
        load_tensors(folder / WEIGHTS)  # for its checksum, which timm does not know
        with quiet():
            return make()
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{folder} cannot be loaded by timm ({first_line(error)}); save the model again."
        ) from error


def _write_checked(
    model: nn.Module, folder: Path, names: Sequence[str], data_config: Mapping[str, Any]
) -> None:
    """Write it, as timm's own network where that gives back the same, bit for bit, and look."""
    arch = _arch_of(model)
    said = plain_timm(arch) if arch is not None else None
    if said is not None:
        try:
            _write(model, folder, names, data_config, said)
            _check(model, folder)
            return
        except ExportError:
            shutil.rmtree(folder)
    _write(model, folder, names, data_config, None)
    _check(model, folder)


def _write(
    model: nn.Module,
    folder: Path,
    names: Sequence[str],
    data_config: Mapping[str, Any],
    said: tuple[str, Any] | None,
) -> None:
    """Write the three files.

    Args:
        said: by which name and arguments timm makes the network of the Model's Arch, if it does.
    """
    arch = _arch_of(model)
    config = getattr(model, "pretrained_cfg", None)
    if not config or (arch is None and "architecture" not in config):
        raise UserError(
            f"{type(model).__name__} has no pretrained_cfg with an architecture; timm could not rebuild it. "
            "Make it with timm.create_model or vitnas.build."
        )
    known = images_of(model, data_config)
    shown: Any = copy.copy(model)  # shares the weights; only its pretrained_cfg is another
    shown.pretrained_cfg = {key: value for key, value in config.items() if key not in OWN_KEYS} | known
    if arch is not None:
        shown.pretrained_cfg["architecture"] = said[0] if said else ENTRY_POINT
    about: dict[str, Any] = {"label_names": list(names)} if names else {}
    if not {"mean", "std"} <= set(known):  # what timm writes in their place are placeholders
        about[IMAGES_KNOWN] = False
    if config.get(SEVERAL):
        about[SEVERAL] = True
    if config.get(SCALE):
        about[SCALE] = config[SCALE]
    with quiet():
        save_for_hf(shown, str(folder), model_config=about, safe_serialization=True)
    save_tensors(folder / WEIGHTS, *load_tensors(folder / WEIGHTS))  # with a checksum
    if arch is not None:
        # timm adds what it finds on the model (image size, classes); the Arch says all of that, once.
        own = {"arch": arch.to_json()}
        path = folder / "config.json"
        changed = {"model_args": said[1], OWN_ARCH: own["arch"]} if said else {"model_args": own}
        path.write_text(json.dumps({**read_json(path), **changed}, indent=1) + "\n", encoding="utf-8")
    write_card(folder, card_of(folder))


def _check(model: nn.Module, folder: Path) -> None:
    try:
        rebuilt = [load_timm(folder)]
        if OWN_ARCH in read_json(folder / "config.json"):  # what those get who have no vitnas
            rebuilt.append(
                _by_timm(folder, lambda: timm.create_model(f"local-dir:{folder}", pretrained=True))
            )
    except UserError as error:
        raise ExportError(f"timm cannot rebuild this {type(model).__name__}: {error}") from error
    for each in rebuilt:
        _compare(model, each)


def _compare(model: nn.Module, rebuilt: nn.Module) -> None:
    want, loaded = model.state_dict(), rebuilt.state_dict()
    wrong = sorted(set(want) ^ set(loaded))
    wrong += [
        name for name in want if name in loaded and not torch.equal(want[name].cpu(), loaded[name].cpu())
    ]
    if wrong:
        raise ExportError(
            f"timm rebuilds this {type(model).__name__} with {len(wrong)} different tensors, e.g. {wrong[0]}; "
            "the folder must give back the same model. Make it with timm.create_model or vitnas.build."
        )
    if model_device(model).type == "cpu":  # another device rounds differently; the tensors were compared
        images, _ = example_images(model, None)
        with evaluating(model), torch.no_grad():
            same = torch.equal(model(images), rebuilt.eval()(images))
        if not same:
            raise ExportError(
                f"timm rebuilds this {type(model).__name__} so that it computes something else with the same weights; "
                "the folder must give back the same model. Make it with timm.create_model or vitnas.build."
            )


def _move(new: Path, folder: Path) -> None:
    """Put the finished files in place; the config last, as it is what makes a folder a model."""
    if not folder.exists():
        for file in new.iterdir():
            with open(file, "r+b") as stream:
                os.fsync(stream.fileno())
        os.replace(new, folder)
        return
    if (kept := licence_in(folder / CARD)) != UNKNOWN:  # somebody chose it
        card = new / CARD
        card.write_text(with_licence(card.read_text(encoding="utf-8"), kept), encoding="utf-8")
    for name in (WEIGHTS, CARD, "config.json"):
        write_with(folder / name, partial(shutil.copyfile, new / name))


def _arch_of(model: nn.Module) -> Arch | None:
    arch = getattr(model, "arch", None)
    return arch if isinstance(arch, Arch) else None
