"""The report of a comparison: from run folders to a verdict and one self-contained page."""

from fp8train.report.document import build_report

__all__ = ["build_report"]
