"""`vitnas tokens MODEL dataset=IMAGES`: a trained ViT becomes one that keeps fewer patches, learns from what it was,
and is exported.

By default its DynamicViT; `selector=` names another way to choose, Patch Slimming among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from rich.console import Console

from vitnas.budget import Budget, format_quantity
from vitnas.cli.options import options
from vitnas.counting import count
from vitnas.data import AUGMENTS, Data, DataConfig, EvalBatches, TrainBatches, open_data
from vitnas.errors import UserError, check_word
from vitnas.exporting import export_onnx, save_timm
from vitnas.exporting.networks import load_network
from vitnas.layers.choose import DynamicPatchSlimming, PredictorSelection
from vitnas.layers.selectors import SELECTIONS
from vitnas.model import Model, from_timm
from vitnas.model.selections import keeps_of, selecting, with_selections
from vitnas.model.timm_keys import arch_in
from vitnas.reporting.cards import write_file_card
from vitnas.runs import write_json
from vitnas.slimming import BlockTuning, slim_patches
from vitnas.slimming.patch_scores import Blocks
from vitnas.train import ConsoleProgress, Engine, evaluate
from vitnas.train.fewer_tokens import fewer_tokens_config, learn_from_whole
from vitnas.train.imitate import agreement

USAGE = (
    "`vitnas tokens` takes a trained network and dataset=IMAGES, as in `vitnas tokens deit_small_patch16_224 "
    "dataset=images keep=0.7`; selector, places, epochs, lr, batch_size, augment, weights and folder may follow, and "
    "with selector=patch_slimming budget or tolerance, step, tuning and images."
)
HOW_MANY = ("keep", "places")
HOW_FAR = ("budget", "tolerance", "step", "tuning", "images")


@dataclass(frozen=True, kw_only=True)
class TokensOptions:
    """`model` is a timm name, NAME@FILE or a folder of a saved model, `selector` what chooses patches.

    `keep` is the share of the patches that goes on at each of `places` (0.7), or one share of all per place. Patch
    Slimming finds both: to a `budget` or an error of each block (`tolerance`), by so many `images` (256), in steps of
    so many patches (`step`, 10), each block tuned for so many epochs (`tuning`, none).

    Then the network learns from what it was, for `epochs` (0 for none). `weights` are the predictor's: of the share
    kept, of logits and of tokens. `lr` is 1e-3 for the predictor, 1e-4 else.
    """

    model: str
    dataset: str = ""
    selector: str = PredictorSelection.word
    keep: PositiveFloat | tuple[PositiveFloat, ...] | None = None
    places: tuple[int, ...] | None = None
    budget: str | None = None
    tolerance: float | None = None
    step: PositiveInt | None = None
    tuning: PositiveInt | None = None
    images: PositiveInt | None = None
    epochs: float = 30.0
    lr: PositiveFloat | None = None
    batch_size: PositiveInt = 64
    weights: tuple[float, float, float] | None = None
    augment: str = "weak"
    folder: Path | None = None

    def __post_init__(self) -> None:
        check_word("augment", self.augment, AUGMENTS)
        check_word("selector", self.selector, SELECTIONS)
        learns = self.selector == PredictorSelection.word
        strange = [name for name in (HOW_MANY if self.slims else HOW_FAR) if getattr(self, name) is not None]
        if strange and self.slims:
            raise UserError(
                f"{strange[0]} is given beside selector={self.selector}, which finds by itself where and how many "
                "patches leave. Give budget='macs<=55%' or tolerance=0.02 instead."
            )
        if strange:
            raise UserError(
                f"{strange[0]} is given beside selector={self.selector}, which keeps the share of patches that keep "
                "says. Give keep=0.7 instead, or use selector=patch_slimming."
            )
        if self.slims and bool(self.budget) == (self.tolerance is not None):
            raise UserError(
                f"budget is {self.budget!r} and tolerance {self.tolerance}; one of them says how far patches are "
                "slimmed. Give budget='macs<=55%', or tolerance=0.02."
            )
        if self.tolerance is not None and self.tolerance < 0:
            raise UserError(f"tolerance is {self.tolerance}; an error is at least 0. Use 0.02.")
        if self.budget and Budget.parse(self.budget).latency_targets:
            raise UserError(
                f"budget is {self.budget!r}; patches are slimmed to what is counted, and latency is measured. Use "
                "macs, for example macs<=55%."
            )
        if self.weights is not None and min(self.weights) < 0:
            raise UserError(f"weights is {list(self.weights)}; a loss counts 0 or more. Use 2, 0.5 and 0.5.")
        if self.weights is not None and not learns:
            raise UserError(
                f"weights is given beside selector={self.selector}; they are those of the predictor's losses. Leave "
                "weights out."
            )
        if self.epochs < 0 or (learns and not self.epochs):
            raise UserError(
                f"epochs is {self.epochs:g}; it must be above 0, or 0 with a selector that need not be trained. Use "
                "epochs=30."
            )

    @property
    def slims(self) -> bool:
        """Whether it is a kind of Patch Slimming."""
        return SELECTIONS[self.selector].keeps_keys

    @property
    def shares(self) -> tuple[Any, Any]:
        """As `with_selections` takes them."""
        return self.keep or 0.7, self.places


def tokens_command(words: list[str], console: Console) -> None:
    """A trained ViT that does without some of its patches."""
    asked = options(TokensOptions, words, USAGE)
    if not asked.dataset:
        raise UserError(USAGE)
    folder = asked.folder or Path(f"runs/tokens_{Path(asked.model.partition('@')[0]).name}")
    network: Any = load_network(asked.model, what="the model", check=arch_in)
    model = network if isinstance(network, Model) else from_timm(network)
    if asked.slims:  # what cannot be is refused before images are opened
        Blocks(model)
    else:
        selecting(model.arch, keeps_of(model.arch, *asked.shares), asked.selector)
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
    made, record = _slimmed(model, asked, data) if asked.slims else (_selecting(model, asked), {})
    if asked.epochs:
        made = _trained(made, model, asked, data, labels, folder, console)
    made, model = made.cpu().eval(), model.cpu().eval()
    holdout = EvalBatches(data.holdout, batch_size=asked.batch_size)
    record |= _compared(model, made, holdout, labels, console)
    folder.mkdir(parents=True, exist_ok=True)
    names = data.class_names if labels else None
    saved = save_timm(made, folder / "model", class_names=names or None)
    record |= {"model": asked.model, "selector": asked.selector, "timm": saved}
    record["onnx"] = export_onnx(made, folder / "model.onnx", class_names=names or None)
    write_json(folder / "tokens.json", record)
    learned = ", and learned from what it was" if asked.epochs else ""
    did = f"it keeps fewer patches, chosen by {asked.selector}{learned}"
    write_file_card(folder, made, f"{Path(asked.model).name} with fewer tokens", did)
    console.out(f"  {folder / 'model'}\n  {folder / 'model.onnx'}\n  {folder / 'tokens.json'}")


def _selecting(model: Model, asked: TokensOptions) -> Model:
    """It keeps the share of patches that is asked for."""
    generator = torch.Generator().manual_seed(0)
    return with_selections(model, *asked.shares, selector=asked.selector, generator=generator)


def _slimmed(model: Model, asked: TokensOptions, data: Data) -> tuple[Model, dict[str, Any]]:
    """Patch Slimming's network, by some train images, and what was found."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    images = data.train.subset(sorted(order[: asked.images or 256].tolist()))
    found = slim_patches(
        model.to(Engine().device),
        EvalBatches(images, batch_size=asked.batch_size),
        budget=asked.budget or None,
        tolerance=asked.tolerance,
        dynamic=asked.selector == DynamicPatchSlimming.word,
        step=asked.step or 10,
        tuning=BlockTuning(epochs=asked.tuning) if asked.tuning else None,
    )
    places = [len(places) for places in found.places]
    return found.model, {
        "patches": places,
        "errors": [*found.errors],
        "tolerance": found.tolerance,
        "images": len(images),
    }


def _trained(
    student: Model,
    model: Model,
    asked: TokensOptions,
    data: Data,
    labels: bool,
    folder: Path,
    console: Console,
) -> Model:
    """The student, taught by `model`."""
    augment = AUGMENTS[asked.augment]
    with ConsoleProgress(console) as progress:
        fitted = learn_from_whole(
            student,
            model,
            TrainBatches(data.train, augment, batch_size=asked.batch_size, seed=0),
            config=fewer_tokens_config(asked.selector, asked.epochs, asked.lr),
            weights=asked.weights or (2.0, 0.5, 0.5),
            labels=labels,
            augment=augment if labels else None,
            folder=folder,
            stage="tokens",
            progress=progress,
        )
    assert isinstance(fitted.network, Model)
    return fitted.network


def _compared(
    before: Model, after: Model, holdout: EvalBatches, labels: bool, console: Console
) -> dict[str, Any]:
    """What the networks cost, and how often they are right, or agree, on held-out images."""
    costs = {"before": count(before.arch), "after": count(after.arch)}
    record: dict[str, Any] = {"macs": {name: cost.macs for name, cost in costs.items()}}
    shown = {name: format_quantity(cost.macs, "macs") for name, cost in costs.items()}
    console.out(f"{shown['before']} MACs before, {shown['after']} after ({after.arch.describe()})")
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
        console.out(f"both give the same class to {same:.1%} of {n} images")
    return record
