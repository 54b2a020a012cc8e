"""Stages of a run folder. Each reads files, writes files, and does nothing when its result is there.

`STAGES` lists them in order; `vitnas run` does them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vitnas.stages.context import Context
from vitnas.stages.finish import export_chosen, final_table, measure
from vitnas.stages.models import train_models
from vitnas.stages.prepare import prepare
from vitnas.stages.run import Run
from vitnas.stages.searching import search_archs
from vitnas.stages.supernet import train_supernet

STAGES: dict[str, Callable[[Context], Any]] = {
    "prepare": prepare,
    "train": train_supernet,
    "search": search_archs,
    "retrain": train_models,
    "export": export_chosen,
    "bench": measure,
    "evaluate": final_table,
}

__all__ = ["STAGES", "Context", "Run"]
