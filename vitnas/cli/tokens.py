"""`vitnas tokens MODEL dataset=IMAGES`: a trained ViT becomes its DynamicViT, trained on images, exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveFloat, PositiveInt
from rich.console import Console

from vitnas.budget import format_quantity
from vitnas.cli.options import options
from vitnas.counting import count
from vitnas.data import AUGMENTS, DataConfig, EvalBatches, TrainBatches, open_data
from vitnas.errors import UserError, check_word
from vitnas.exporting import export_onnx, save_timm
from vitnas.exporting.networks import load_network
from vitnas.model import Model, from_timm
from vitnas.model.selections import keeps_of
from vitnas.runs import write_json
from vitnas.train import ConsoleProgress, evaluate
from vitnas.train.fewer_tokens import dynamicvit_config, fewer_tokens
from vitnas.train.imitate import agreement

USAGE = (
    "`vitnas tokens` takes a trained network and dataset=IMAGES, as in `vitnas tokens deit_small_patch16_224 "
    "dataset=images keep=0.7`; places, epochs, lr, batch_size, augment, weights and folder may follow."
)


@dataclass(frozen=True, kw_only=True)
class TokensOptions:
    """`model` is a timm name, NAME@FILE or a folder of a saved model; `keep` the share of patches that goes on at each
    of `places` (or one share of all per place), `weights` those of the share kept, of logits and of tokens."""

    model: str
    dataset: str = ""
    keep: PositiveFloat | tuple[PositiveFloat, ...] = 0.7
    places: tuple[int, ...] | None = None
    epochs: PositiveFloat = 30.0
    lr: PositiveFloat = 1e-3
    batch_size: PositiveInt = 64
    weights: tuple[float, float, float] = (2.0, 0.5, 0.5)
    augment: str = "weak"
    folder: Path | None = None


def tokens_command(words: list[str], console: Console) -> None:
    """A trained ViT that learns which patches it can do without."""
    asked = options(TokensOptions, words, USAGE)
    if not asked.dataset:
        raise UserError(USAGE)
    check_word("augment", asked.augment, AUGMENTS)
    augment = AUGMENTS[asked.augment]
    folder = asked.folder or Path(f"runs/tokens_{Path(asked.model.partition('@')[0]).name}")
    network: Any = load_network(asked.model, what="the model")
    model = network if isinstance(network, Model) else from_timm(network)
    keeps_of(model.arch, asked.keep, asked.places)  # refused before images are opened
    cfg = model.pretrained_cfg
    data = open_data(
        DataConfig(
            dataset=asked.dataset,
            image_size=model.arch.image_size,
            in_chans=cfg["input_size"][0],
            mean=tuple(cfg["mean"]),
            std=tuple(cfg["std"]),
            interpolation=cfg["interpolation"],
        )
    )
    labels = 0 < data.num_classes == model.num_classes
    if not labels:
        console.print(
            f"the images have {data.num_classes} classes and the model {model.num_classes}: labels are left out"
        )
    holdout = EvalBatches(data.holdout, batch_size=asked.batch_size)
    batches = TrainBatches(data.train, augment, batch_size=asked.batch_size, seed=0)
    with ConsoleProgress(console) as progress:
        fitted = fewer_tokens(
            model,
            batches,
            asked.keep,
            asked.places,
            config=dynamicvit_config(asked.epochs, asked.lr),
            weights=asked.weights,
            labels=labels,
            augment=augment if labels else None,
            folder=folder,
            stage="tokens",
            progress=progress,
        )
    made = fitted.network.cpu().eval()
    assert isinstance(made, Model)
    record = _compared(model, made, holdout, labels, console)
    folder.mkdir(parents=True, exist_ok=True)
    names = data.class_names if labels else None
    saved = save_timm(made, folder / "model", class_names=names or None)
    record |= {"model": asked.model, "timm": saved}
    record["onnx"] = export_onnx(made, folder / "model.onnx")
    write_json(folder / "tokens.json", record)
    console.print(f"  {folder / 'model'}\n  {folder / 'model.onnx'}\n  {folder / 'tokens.json'}")


def _compared(
    before: Model, after: Model, holdout: EvalBatches, labels: bool, console: Console
) -> dict[str, Any]:
    """What the networks cost, and how often they are right, or agree, on held-out images."""
    costs = {"before": count(before.arch), "after": count(after.arch)}
    record: dict[str, Any] = {"macs": {name: cost.macs for name, cost in costs.items()}}
    shown = {name: format_quantity(cost.macs, "macs") for name, cost in costs.items()}
    console.print(f"{shown['before']} MACs before, {shown['after']} after ({after.arch.describe()})")
    if labels:
        scores = {name: evaluate(net.eval(), holdout) for name, net in (("before", before), ("after", after))}
        record["accuracy"] = {name: score.accuracy for name, score in scores.items()} | {
            "n": scores["after"].n
        }
        console.print(
            f"accuracy {scores['before'].accuracy:.1%} before, {scores['after'].accuracy:.1%} after, on "
            f"{scores['after'].n} held-out images"
        )
    if before.num_classes:
        same, n = agreement(after, before, holdout)
        record["agreement"] = {"after": same, "n": n}
        console.print(f"both give the same class to {same:.1%} of {n} images")
    return record
