"""Results to one self-contained HTML page."""

from moe_interp.report.page import isolation_page, write_page

__all__ = ["isolation_page", "write_page"]
