"""The page that answers: which Model, why this one, can it be trusted, where are its files; and cards beside models."""

from pathlib import Path

from vitnas.reporting.cards import write_cards
from vitnas.reporting.html import report
from vitnas.reporting.tables import front_table

__all__ = ["front_table", "report", "tell", "write_cards"]


def tell(folder: Path) -> None:
    """Cards beside the models of a run, and its page."""
    write_cards(folder)
    report(folder)
