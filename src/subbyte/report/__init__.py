"""What came out: sizes and pictures."""

from subbyte.report.size import LayerSize, SizeReport, size_report
from subbyte.report.size_text import size_text

__all__ = ["LayerSize", "SizeReport", "size_report", "size_text"]
