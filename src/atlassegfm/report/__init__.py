"""Pages of a cohort and of each case, which open without a server or a network, and overview pictures."""

from .case import CaseOptions
from .cohort import ReportOptions, Written, write_report
from .overview import Note, draw_overview, require_report_extra

__all__ = ["CaseOptions", "Note", "ReportOptions", "Written", "draw_overview", "require_report_extra", "write_report"]
