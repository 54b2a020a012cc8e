"""vitnas: images and a budget in, the Pareto-best vision transformers out.

    import vitnas
    space    = vitnas.spaces.autoformer("tiny", image_size=32, patch_size=4, num_classes=10)
    supernet = vitnas.Supernet(space)
    vitnas.fit(supernet, task, sampler, loader)
    study    = vitnas.search(supernet, evaluator, budget=vitnas.Budget(macs=(0.9e9, 1.0e9)))
    model    = vitnas.extract(supernet, study.best().arch)
    vitnas.export(model, "model.onnx")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vitnas import space as spaces
    from vitnas.arch import Arch, Block, Stage
    from vitnas.budget import Budget, Cost
    from vitnas.count import count
    from vitnas.data import Augment, Data, DataConfig, EvalBatches, TrainBatches, open_data
    from vitnas.errors import UserError
    from vitnas.export import export_model as export
    from vitnas.extract import extract
    from vitnas.measure.latency import LatencyMeter
    from vitnas.model import Model, build
    from vitnas.report import report
    from vitnas.sample import Fixed, Sandwich, Several, Uniform
    from vitnas.search import Study, search
    from vitnas.stages.searching import SupernetEvaluator
    from vitnas.supernet import Supernet, select
    from vitnas.train import Classification, Engine, Monitor, TrainConfig, evaluate, fit

_HOME = {
    "Arch": "arch",
    "Augment": "data",
    "Block": "arch",
    "Budget": "budget",
    "Classification": "train",
    "Cost": "budget",
    "Data": "data",
    "DataConfig": "data",
    "Engine": "train",
    "EvalBatches": "data",
    "Fixed": "sample",
    "LatencyMeter": "measure.latency",
    "Model": "model",
    "Monitor": "train",
    "Sandwich": "sample",
    "Several": "sample",
    "Stage": "arch",
    "Study": "search",
    "Supernet": "supernet",
    "SupernetEvaluator": "stages.searching",
    "TrainBatches": "data",
    "TrainConfig": "train",
    "Uniform": "sample",
    "UserError": "errors",
    "build": "model",
    "count": "count",
    "evaluate": "train",
    "export": "export",
    "extract": "extract",
    "fit": "train",
    "open_data": "data",
    "report": "report",
    "search": "search",
    "select": "supernet",
}

import vitnas.model.registry  # noqa: E402, F401 - makes the models known to timm
