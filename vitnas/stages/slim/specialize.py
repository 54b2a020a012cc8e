"""specialize: a slimmed network for further budgets, from what was measured once; nothing is sorted anew."""

from __future__ import annotations

from collections.abc import Sequence

from vitnas.budget import Budget
from vitnas.records import Member, Place, SlimFront
from vitnas.stages.slim.context import SlimContext
from vitnas.stages.slim.stages import allocator, fold_place


def specialize_slim(context: SlimContext, budgets: Sequence[Budget]) -> list[Member]:
    """One network per budget, folded, exported and held against the original in front/NN, behind those that are there.

    A budget that was answered before is not answered again.

    Args:
        budgets: without shares.

    Raises:
        UserError: a run whose front is not made yet, or a budget that cannot be met or was not measured for.
    """
    folder, propose = context.folder, allocator(context)
    known = list(SlimFront.read(folder).members)
    answered = {member.budget: member for member in known}
    fresh = {budget.text: budget for budget in budgets if budget.text not in answered}
    # All are proposed first, so that a budget that cannot be met leaves nothing behind.
    found = {text: propose.within(budget, []) for text, budget in fresh.items()}
    for text, candidates in found.items():
        number = len(known) + 1
        where = folder / "front" / f"{number:02d}"
        fold_place(context, where, Place(number=number, budget=text, candidates=candidates))
        known.append(Member.read(where))
        SlimFront(tuple(known)).write(folder)
    answered = {member.budget: member for member in known}
    return [answered[budget.text] for budget in budgets]
