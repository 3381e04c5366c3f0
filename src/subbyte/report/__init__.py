"""What came out: sizes and pictures."""

from subbyte.report.size import LayerSize, SizeReport, size_report, table

__all__ = ["LayerSize", "SizeReport", "size_report", "table"]
