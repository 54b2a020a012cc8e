"""`vitnas swap MODEL mixer=WORD`: another mixer in a trained model, optionally won back by distillation, exported."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import timm
from rich.console import Console
from safetensors.torch import save_file

from vitnas.cli.fields import number, split_list, split_words, whole_number
from vitnas.data import AUGMENTS, DataConfig, EvalBatches, TrainBatches, open_data
from vitnas.errors import UserError, nearest
from vitnas.exporting import export_onnx, load_timm
from vitnas.model.swap import swap_attention
from vitnas.runs import write_json, write_with
from vitnas.train import ConsoleProgress, TrainConfig
from vitnas.train.imitate import SHORT, agreement, imitate

KNOWN = ("mixer", "size", "layers", "pretrained", "dataset", "epochs", "lr", "batch_size", "folder")


def swap_command(words: list[str], console: Console) -> None:
    """A timm name or a folder of ours; `layers` is a list; `dataset`, `epochs`, `lr` and `batch_size` are for winning
    back; `folder` gets the weights, swap.json and model.onnx."""
    names, pairs = split_words(words)
    unknown = [name for name in pairs if name not in KNOWN]
    if len(names) != 1 or "mixer" not in pairs or unknown:
        told = f" {unknown[0]!r} is no field.{nearest(unknown[0], KNOWN)}" if unknown else ""
        raise UserError(
            f"`vitnas swap` takes a model and mixer=WORD, as in `vitnas swap deit_tiny_patch16_224 mixer=nystrom`; "
            f"fields are {', '.join(KNOWN)}.{told}"
        )
    folder = Path(pairs.get("folder", f"runs/swap_{Path(names[0]).name}_{pairs['mixer']}"))
    model = _load(names[0], pairs.get("pretrained", "true"))
    teacher = copy.deepcopy(model).eval()
    size = whole_number("size", pairs["size"]) if "size" in pairs else None
    parts = split_list(pairs["layers"]) if "layers" in pairs else None
    layers = None if parts is None else [whole_number("layers", part, low=None) for part in parts]
    swap_attention(model, pairs["mixer"], layers, size=size)
    for row in model.swapped:
        gone = f", gone: {', '.join(row['gone'])}" if row["gone"] else ""
        told = f"{row['layer']}: {row['was']} to {row['is']}, {row['new_params']:,} new parameters{gone}"
        console.print(told, markup=False)
    record: dict[str, Any] = {
        "model": names[0],
        "mixer": pairs["mixer"],
        "size": size,
        "layers": model.swapped,
    }
    if "dataset" in pairs:
        record |= _win_back(model, teacher, pairs, console)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_with(folder / "model.safetensors", lambda file: save_file(state, file))
    record["onnx"] = export_onnx(model.eval(), folder / "model.onnx")
    write_json(folder / "swap.json", record)
    console.print(f"  {folder / 'model.onnx'}\n  {folder / 'model.safetensors'}\n  {folder / 'swap.json'}")


def _load(name: str, pretrained: str) -> Any:
    if pretrained not in ("true", "false"):
        raise UserError(f"pretrained is {pretrained!r}; it must be true or false.")
    if Path(name).is_dir():
        if pretrained == "false":
            raise UserError(
                f"pretrained=false and {name} is a folder; a folder always brings its weights. Leave pretrained out."
            )
        return load_timm(name)
    try:
        return timm.create_model(name, pretrained=pretrained == "true").eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"{name} cannot be made ({' '.join(str(error).split())[:160]}); it must be a folder of a saved model or a "
            "timm name whose weights are at hand. Use pretrained=false for a fresh one."
        ) from error


def _win_back(model: Any, teacher: Any, pairs: dict[str, str], console: Console) -> dict[str, Any]:
    """Distil on the images of `dataset`; says how often both networks agree on its holdout split, before and after."""
    cfg = model.pretrained_cfg
    data = open_data(
        DataConfig(
            dataset=pairs["dataset"],
            image_size=cfg["input_size"][1],
            in_chans=cfg["input_size"][0],
            mean=tuple(cfg["mean"]),
            std=tuple(cfg["std"]),
        )
    )
    batch = whole_number("batch_size", pairs.get("batch_size", "64"))
    holdout = EvalBatches(data.holdout, batch_size=batch)
    config = TrainConfig(
        epochs=number("epochs", pairs.get("epochs", str(SHORT.epochs))),
        lr=number("lr", pairs.get("lr", str(SHORT.lr))),
        warmup_epochs=SHORT.warmup_epochs,
        weight_decay=SHORT.weight_decay,
        monitor_every=0,
    )
    before, count = agreement(model, teacher, holdout)
    batches = TrainBatches(data.train, AUGMENTS["none"], batch_size=batch, seed=0)
    with ConsoleProgress(console) as progress:
        imitate(model, teacher, batches, config=config, progress=progress)
    after, _ = agreement(model, teacher, holdout)
    console.print(f"agrees with the original on {before:.1%} of {count} images before, {after:.1%} after")
    return {"agreement_before": before, "agreement_after": after, "n": count, "epochs": config.epochs}
