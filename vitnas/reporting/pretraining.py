"""A pretraining in tables: its forecast, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator

from vitnas.probing import Judged, Pretrained, PretrainForecast, Probed
from vitnas.reporting.tables import MISSING, Table, interval, number, percent, room, significant
from vitnas.train.progress import duration


def forecast(found: PretrainForecast) -> Table:
    """What is done, and how long it takes."""
    rows = [
        ("images", f"{found.images:,}"),
        ("batch", f"{found.batch_size}, {found.steps_per_epoch} steps per epoch"),
        ("epochs", f"{significant(found.epochs)} ({found.steps:,} steps), {_why(found)}"),
        ("takes about", f"{duration(found.seconds)}, {significant(1000 * found.step_s)} ms a step"),
    ]
    if found.disk_bytes:
        rows.append(("and", room(found.disk_bytes, found.memory_bytes)))
    return Table(("Pretraining", "Here"), tuple(rows))


def _why(found: PretrainForecast) -> str:
    return "asked for" if found.asked else f"of {duration(found.time_s)}"


def outcome(found: Pretrained, probed: Probed | None) -> Table:
    """The features before and after, and on test images where there are labels."""
    rows = list(_rows(found))
    if probed:
        rows += [
            (f"{name}, test", "", _judged(each))
            for name, each in (("nearest neighbours", probed.knn), ("linear classifier", probed.linear))
        ]
    return Table(("Features", "Before", "After"), tuple(rows), numeric=(1, 2))


def _rows(found: Pretrained) -> Iterator[tuple[str, str, str]]:
    first, last = found.first, found.last
    if last.knn is not None:
        before = percent(first.knn) if first else MISSING
        yield (
            "nearest neighbours, held-out",
            before,
            f"{percent(last.knn)} ({interval(last.knn, last.n)}, n = {last.n})",
        )
    before = significant(first.rank) if first else MISSING
    yield f"effective rank (of {found.width})", before, significant(last.rank)
    before = significant(first.information) if first else MISSING
    yield "nats that tell images apart", before, significant(last.information)


def _judged(each: Judged) -> str:
    return f"{percent(each.accuracy)} ({interval(each.accuracy, each.n)}, n = {each.n})"


def described(found: Pretrained) -> str:
    """`vit: ...`, its cost and how it learned."""
    macs = "" if found.macs is None else f", {number(found.macs, 'MACs')}"
    return (
        f"{found.network}, {number(found.params)} params{macs}, pretrained on {found.images:,} images for "
        f"{significant(found.epochs)} epochs in {duration(found.seconds)}"
    )
