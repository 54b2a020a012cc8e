"""prepare: everything that can be wrong with images or a network is said before any work, and how long it will take."""

from __future__ import annotations

from vitnas.probing import PretrainForecast
from vitnas.records import Manifest
from vitnas.stages.prepare import check_export, manifest
from vitnas.stages.pretrain.context import PretrainContext
from vitnas.stages.pretrain.forecast import look_ahead


def prepare_pretrain(context: PretrainContext) -> PretrainForecast:
    """Open network and images, do a few steps, and write down what they say.

    Returns:
        pretrain_forecast.json; a run that was prepared before is not prepared again.

    Raises:
        UserError: whatever is wrong, in one sentence.
    """
    folder = context.folder
    if (folder / "run.yaml").exists() and PretrainForecast.exists(folder) and Manifest.exists(folder):
        return PretrainForecast.read(folder)
    check_export(context.run.export)
    mine = look_ahead(context)
    found: PretrainForecast = context.engine.from_first(lambda: mine)

    def write() -> None:
        found.write(folder)
        if not Manifest.exists(folder):
            manifest(context).write(folder)

    context.engine.from_first(write)
    return found
