"""What people look at: a page for a cohort, a page for each case, and pictures.

Everything a page needs is in the page: it opens from a folder, without a server and without a network.
"""

from __future__ import annotations

from .case import CaseOptions
from .cohort import ReportOptions, Written, write_report
from .overview import draw_overview, require_report_extra

__all__ = ["CaseOptions", "ReportOptions", "Written", "draw_overview", "require_report_extra", "write_report"]
