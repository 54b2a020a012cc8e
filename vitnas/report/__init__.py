"""The page that answers: which Model, why this one, can it be trusted, where are its files."""

from vitnas.report.html import report
from vitnas.report.tables import front_table

__all__ = ["front_table", "report"]
