"""Where a network is wrong: by class, and pictures of its surest mistakes."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from vitnas.predicting.examine import ClassScore, Evaluation, NumberScore
from vitnas.reporting.tables import Table, interval, percent

SHOWN = 20  # classes of a table


def by_class(found: Evaluation, most: int = SHOWN) -> Table:
    """Every class that has images, the worst first; the rest of many are left out."""
    rows = []
    for each in sorted(_seen(found), key=lambda each: (each.recall or 0.0, each.name))[:most]:
        taken = [f"{wrong.said} ({wrong.count})" for wrong in found.confusions if wrong.true == each.name]
        precision = percent(each.precision) if each.said else ""
        rows.append(
            (
                each.name,
                str(each.n),
                percent(each.recall),
                interval(each.recall, each.n),
                precision,
                ", ".join(taken[:2]),
            )
        )
    headers = ("Class", "n", "Found", "95 % CI", "Precision", "Taken for")
    return Table(headers, tuple(rows), numeric=(1, 2, 3, 4))


def by_number(found: Evaluation) -> Table:
    """Every number that is told."""
    rows = tuple(
        (each.name, f"{each.r2:.3f}", f"{each.mae:.4g}", f"{each.mae_of_mean:.4g}") for each in found.numbers
    )
    headers = ("Number", "R²", "Mean absolute error", "of always saying the mean")
    return Table(headers, rows, numeric=(1, 2, 3))


def errors_text(numbers: Sequence[NumberScore]) -> str:
    """Mean absolute errors in units of their own: "3.2 (age), 120 (income)"."""
    return ", ".join(f"{each.mae:.4g} ({each.name})" for each in numbers)


def left_out(found: Evaluation, most: int = SHOWN) -> int:
    """Classes that `by_class` does not show."""
    return max(0, len(_seen(found)) - most)


def _seen(found: Evaluation) -> list[ClassScore]:
    return [each for each in found.classes if each.n]


def gallery(found: Evaluation) -> Markup:
    """Pictures of mistakes, each with what it is and what it was taken for."""
    figures = [
        f'<figure class="mistake"><img alt="{escape(each.name)}" title="{escape(each.name)}" '
        f'src="data:image/jpeg;base64,{each.jpeg}"><figcaption>{escape(each.true)}, taken for {escape(each.said)}'
        f"{'' if found.numbers else f' ({percent(each.probability)})'}</figcaption></figure>"
        for each in found.mistakes
    ]
    return Markup(f'<div class="mistakes">{"".join(figures)}</div>') if figures else Markup("")
