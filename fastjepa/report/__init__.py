"""The report of a run: one page with pictures, `report/index.html` in the run folder."""

from fastjepa.report.write import write_report

__all__ = ["write_report"]
