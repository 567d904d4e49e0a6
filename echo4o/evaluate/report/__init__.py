"""Reports of evaluations: one HTML page, Markdown and JSON."""

from echo4o.evaluate.report.reading import ReportError as ReportError
from echo4o.evaluate.report.writing import write_report as write_report
