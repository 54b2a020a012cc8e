"""What a share of a budget is a share of: the cost of the network that a run's Space stands around."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vitnas.arch import Arch
from vitnas.budget import Cost
from vitnas.counting import count
from vitnas.measure.latency import LatencyMeter
from vitnas.model import build
from vitnas.runs import RunFile
from vitnas.stages.work import Work


@dataclass(frozen=True, kw_only=True)
class FullCost(RunFile):
    """The cost of the Space's largest Arch, measured once, so that a budget stays the same when the run goes on."""

    FILE = "full_cost.json"

    arch_id: str
    cost: Cost


def full_cost(work: Work, arch: Arch, targets: Sequence[str]) -> Cost:
    """The cost of `arch`, with its latency on `targets`, from the run folder or else measured and written there.

    Latency is that of its exported file. All processes ask; one measures.
    """

    def find() -> Cost:
        known = FullCost.read(work.folder) if FullCost.exists(work.folder) else None
        cost = known.cost if known is not None and known.arch_id == arch.id else count(arch)
        missing = [target for target in dict.fromkeys(targets) if target not in cost.latency_ms]
        if missing or known is None or known.cost is not cost:
            model = build(arch).eval()
            times = {target: LatencyMeter(target).measure(model).median_ms for target in missing}
            cost = replace(cost, latency_ms={**cost.latency_ms, **times})
            FullCost(arch_id=arch.id, cost=cost).write(work.folder)
        return cost

    found: Cost = work.engine.from_first(find)
    return found
