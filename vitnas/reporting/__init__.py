"""The page that answers: which Model, why this one, can it be trusted, where are its files."""

from vitnas.reporting.html import report
from vitnas.reporting.tables import front_table

__all__ = ["front_table", "report"]
