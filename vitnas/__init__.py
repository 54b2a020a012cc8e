"""vitnas: images and a budget in, the Pareto-best vision transformers out.

import vitnas
space    = vitnas.spaces.autoformer("tiny", image_size=32, patch_size=4, num_classes=10)
supernet = vitnas.Supernet(space)
vitnas.fit(supernet, task, sampler, loader)
study    = vitnas.search(vitnas.Study.open(space, "0.9G<=macs<=1G"), evaluator)
model    = vitnas.extract(supernet, study.best().arch)
vitnas.export(model, "model.onnx")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_stopping = importlib.import_module("vitnas.stopping")
_stopping.listen()  # before torch is imported, which takes seconds

from vitnas.version import VERSION  # noqa: E402

__version__ = VERSION

if not _stopping.is_command():  # which imports what it needs by itself, so that its help answers at once
    import vitnas.model.registry
    import vitnas.model.registry_xformers  # these make our models known to timm

if TYPE_CHECKING:
    from vitnas import space as spaces
    from vitnas.arch import Arch, Block, Stage
    from vitnas.budget import Budget, Cost
    from vitnas.counting import count
    from vitnas.data import Augment, Data, DataConfig, EvalBatches, TrainBatches, open_data
    from vitnas.errors import UserError
    from vitnas.exporting import export_model as export
    from vitnas.extraction import extract
    from vitnas.measure.latency import LatencyMeter
    from vitnas.model import Model, build
    from vitnas.model.outputs import read_outputs
    from vitnas.model.selections import with_selections
    from vitnas.model.swap import swap_attention
    from vitnas.predicting import Predictor
    from vitnas.probing import probe
    from vitnas.recipes.pretrain import pretrain_network as pretrain
    from vitnas.recipes.slim import slim_network as slim
    from vitnas.reporting import report
    from vitnas.reporting.hub import push
    from vitnas.sample import Fixed, Sandwich, Several, Spread, Uniform
    from vitnas.searching import Study, search
    from vitnas.stages.searching import SupernetEvaluator
    from vitnas.supernet import Supernet, select
    from vitnas.train import Classification, Engine, Monitor, Teacher, TrainConfig, evaluate, fit
    from vitnas.train.fewer_tokens import fewer_tokens

# Where each public name lives: modules load when a name is first used, so that deployment stays light.
_HOME = {
    **dict.fromkeys(("Arch", "Block", "Stage"), "arch"),
    **dict.fromkeys(("Budget", "Cost"), "budget"),
    **dict.fromkeys(("Augment", "Data", "DataConfig", "EvalBatches", "TrainBatches", "open_data"), "data"),
    **dict.fromkeys(("Model", "build"), "model"),
    **dict.fromkeys(("Fixed", "Sandwich", "Several", "Spread", "Uniform"), "sample"),
    **dict.fromkeys(("Study", "search"), "searching"),
    **dict.fromkeys(("Supernet", "select"), "supernet"),
    **dict.fromkeys(
        ("Classification", "Engine", "Monitor", "Teacher", "TrainConfig", "evaluate", "fit"), "train"
    ),
    "LatencyMeter": "measure.latency",
    "Predictor": "predicting",
    "SupernetEvaluator": "stages.searching",
    "UserError": "errors",
    "count": "counting",
    "export": "exporting",
    "fewer_tokens": "train.fewer_tokens",
    "pretrain": "recipes.pretrain",
    "slim": "recipes.slim",
    "extract": "extraction",
    "probe": "probing",
    "push": "reporting.hub",
    "read_outputs": "model.outputs",
    "report": "reporting",
    "swap_attention": "model.swap",
    "with_selections": "model.selections",
    "spaces": "space",
}
_OTHER_NAME = {"export": "export_model", "pretrain": "pretrain_network", "slim": "slim_network"}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vitnas' has no attribute {name!r}")
    module = importlib.import_module(f"vitnas.{_HOME[name]}")
    return module if name == "spaces" else getattr(module, _OTHER_NAME.get(name, name))


def __dir__() -> list[str]:
    return sorted((*globals(), *_HOME))
