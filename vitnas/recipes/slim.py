"""slim: a trained network made smaller, to a budget; as a recipe, and as the one call of a library's user."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from vitnas.budget import Budget
from vitnas.data import AUGMENTS, DataConfig
from vitnas.data.given import Given, as_data
from vitnas.exporting import load_timm, save_timm
from vitnas.model import Model
from vitnas.model.timm_keys import from_timm
from vitnas.records import Effort, SlimResults
from vitnas.space import AroundConfig
from vitnas.stages.claim import go_through
from vitnas.stages.run import ExportConfig, RetrainConfig, Run, SearchConfig, SlimConfig
from vitnas.stages.slim.context import SlimContext
from vitnas.stages.slim.original import images_for, load_original
from vitnas.train import Progress, Silent, TrainConfig


def slim() -> Run:
    """A trained ViT (pretrained=NAME) made smaller to a budget, on any images; `vitnas slim NAME` is the same."""
    train = TrainConfig(epochs=10, lr=1e-4, warmup_epochs=0.5, monitor_every=0)
    return Run(
        recipe="slim",
        data=DataConfig(dataset="", batch_size=64, augment=AUGMENTS["weak"]),
        space=AroundConfig(),
        supernet=train,
        slim=SlimConfig(),
        search=SearchConfig(searcher="evolution", num_trials=100),
        retrain=RetrainConfig(train=train, baselines=(), rank_archs=0),
        export=ExportConfig(formats=("onnx",), latency=("onnxruntime,batch=1",)),
    )


@dataclass(frozen=True)
class Slimmed:
    """What became of a network.

    Args:
        model: the chosen one, in evaluation mode; it has timm's interface.
        results: the original, the chosen one and the front on images that nothing else used: cost, agreement, latency.
        folder: the run folder, with all of it as files and a report; every command takes it.
    """

    model: Model
    results: SlimResults
    folder: Path


def slim_network(
    model: nn.Module | str,
    images: Given,
    *,
    budget: str | Budget,
    effort: Effort | None = None,
    time: str = "30m",
    folder: Path | str | None = None,
    run: Run | None = None,
    progress: Progress | None = None,
) -> Slimmed:
    """Make a trained network smaller, to a budget (`vitnas.slim`).

    Args:
        model: a ViT of timm, a Model, or what `load_network` takes; it stays as it is.
        images: of the kind that it is for; labels are not needed. See `as_data`.
        budget: text such as `macs<=50%` or `latency<=8ms@onnxruntime,batch=1`, or a Budget.
        effort, time: see `SlimConfig`.
        folder: the run folder; the same call goes on in it. None makes one among temporary files.
        run: all other fields; the recipe `slim` by default.
        progress: told how it goes; silent by default.

    Raises:
        UserError: a network that cannot be slimmed, images that do not fit it, or a budget that cannot be met.

    >>> network = timm.create_model("deit_tiny_patch16_224", pretrained=True)  # doctest: +SKIP
    >>> vitnas.slim(network, "path/to/images", budget="macs<=50%").model  # doctest: +SKIP
    """
    run, where = run or slim(), Path(folder or tempfile.mkdtemp(prefix="vitnas-slim-"))
    config = run.slim or SlimConfig()
    if isinstance(model, str):
        name, original = model, load_original(model)
    else:
        original = model if isinstance(model, Model) else from_timm(model)
        name = str(where / "original")
        if not (where / "run.yaml").exists():
            save_timm(original, name)
    form = images_for(replace(run.data, image_size=None), original, config)
    named = isinstance(images, str | Path)  # is opened at the network's size; others have one
    data = as_data(images, form if named else replace(run.data, mean=form.mean, std=form.std))
    run = replace(
        run,
        budget=budget if isinstance(budget, str) else budget.text,
        pretrained=name,
        data=data.config,
        slim=replace(config, effort=effort, time=time),
    )
    context = SlimContext(run, where, progress or Silent(), data)
    go_through(context)
    chosen = load_timm(where / "models" / "chosen")
    assert isinstance(chosen, Model)
    return Slimmed(chosen, SlimResults.read(where), where)
