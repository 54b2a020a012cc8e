"""`vitnas swap MODEL mixer=WORD`: another mixer in a trained model, optionally won back by distillation, exported."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveFloat, PositiveInt
from rich.console import Console

from vitnas.cli.options import options
from vitnas.data import AUGMENTS, DataConfig, EvalBatches, TrainBatches, open_data
from vitnas.errors import UserError, check_word
from vitnas.exporting import export_onnx
from vitnas.exporting.networks import load_network, untrained
from vitnas.mixers import MIXERS
from vitnas.model.swap import known_attention, swap_attention
from vitnas.model.trained import find_trained
from vitnas.reporting.cards import write_file_card
from vitnas.runs import write_json
from vitnas.stages.work import save_weights
from vitnas.train import ConsoleProgress
from vitnas.train.imitate import SHORT, agreement, imitate

USAGE = (
    "`vitnas swap` takes a model and mixer=WORD, as in `vitnas swap deit_tiny_patch16_224 mixer=nystrom`; size, "
    "layers, pretrained, dataset, epochs, lr, batch_size and folder may follow."
)


@dataclass(frozen=True, kw_only=True)
class SwapOptions:
    """`model` is a timm name, NAME@FILE or a folder of ours; `dataset`, `epochs`, `lr` and `batch_size` are for winning
    back; `folder` gets the weights, swap.json and model.onnx."""

    model: str
    mixer: str = ""
    size: PositiveInt | None = None
    layers: tuple[int, ...] | None = None
    pretrained: bool = True
    dataset: str | None = None
    epochs: PositiveFloat = SHORT.epochs
    lr: PositiveFloat = SHORT.lr
    batch_size: PositiveInt = 64
    folder: Path | None = None


def swap_command(words: list[str], console: Console) -> None:
    """Another mixer in a trained timm model, its projections kept."""
    asked = options(SwapOptions, words, USAGE)
    if not asked.mixer:
        raise UserError(USAGE)
    check_word("mixer", asked.mixer, MIXERS)  # before a model is fetched
    folder = asked.folder or Path(f"runs/swap_{Path(asked.model).name}_{asked.mixer}")
    model = _load(asked.model, asked.pretrained)
    teacher = copy.deepcopy(model).eval()
    swap_attention(model, asked.mixer, asked.layers, size=asked.size)
    for row in model.swapped:
        gone = f", gone: {', '.join(row['gone'])}" if row["gone"] else ""
        told = f"{row['layer']}: {row['was']} to {row['is']}, {row['new_params']:,} new parameters{gone}"
        console.print(told, markup=False)
    record: dict[str, Any] = {
        "model": asked.model,
        "mixer": asked.mixer,
        "size": asked.size,
        "layers": model.swapped,
    }
    if asked.dataset is not None:
        record |= _win_back(model, teacher, asked, console)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(model, folder / "model.safetensors")
    record["onnx"] = export_onnx(model.eval(), folder / "model.onnx")
    write_json(folder / "swap.json", record)
    made = f"attention of {len(model.swapped)} layers became {asked.mixer}"
    if asked.dataset is not None:
        made += f"; it then learned from what it was, with which it agrees on {record['agreement_after']:.1%} of images"
    write_file_card(folder, model, f"{Path(asked.model).name} with {asked.mixer}", made)
    console.out(f"  {folder / 'model.onnx'}\n  {folder / 'model.safetensors'}\n  {folder / 'swap.json'}")


def _load(name: str, pretrained: bool) -> Any:
    if pretrained:
        return load_network(name, what="the model", check=known_attention)
    given = find_trained(name, what="the model")
    if kind := "folder" if given.folder else "file" if given.file else "":
        raise UserError(
            f"pretrained=false and {name} is a {kind}; a {kind} always brings its weights. Leave pretrained out."
        )
    return untrained(given, name, what="the model").eval()


def _win_back(model: Any, teacher: Any, asked: SwapOptions, console: Console) -> dict[str, Any]:
    """Distil on the images of `dataset`; says how often both networks agree on its holdout split, before and after."""
    cfg = model.pretrained_cfg
    data = open_data(
        DataConfig(
            dataset=asked.dataset or "",
            image_size=tuple(cfg["input_size"][1:]),
            in_chans=cfg["input_size"][0],
            mean=tuple(cfg["mean"]),
            std=tuple(cfg["std"]),
        )
    )
    holdout = EvalBatches(data.holdout, batch_size=asked.batch_size)
    config = replace(SHORT, epochs=asked.epochs, lr=asked.lr)
    before, count = agreement(model, teacher, holdout)
    batches = TrainBatches(data.train, AUGMENTS["none"], batch_size=asked.batch_size, seed=0)
    with ConsoleProgress(console) as progress:
        imitate(model, teacher, batches, config=config, progress=progress)
    after, _ = agreement(model, teacher, holdout)
    console.out(f"agrees with the original on {before:.1%} of {count} images before, {after:.1%} after")
    return {"agreement_before": before, "agreement_after": after, "n": count, "epochs": config.epochs}
