"""Stages of a run folder. Each is given the parts of a run that it needs, reads files and writes files.

`plan_of` gives a run's, in order; `vitnas run` does them all.
"""

from __future__ import annotations

from vitnas.stages.context import Context
from vitnas.stages.prepare import prepare
from vitnas.stages.run import Run
from vitnas.stages.table import STAGES, Stage, go_on, plan_of

__all__ = ["STAGES", "Context", "Run", "Stage", "go_on", "plan_of", "prepare"]
