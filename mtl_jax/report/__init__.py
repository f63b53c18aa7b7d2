"""From a run's folder to pages and tables that show what it learned."""

from mtl_jax.report.compare import comparison_table, write_comparison
from mtl_jax.report.delta_m import delta_m_metrics, delta_m_tasks
from mtl_jax.report.page import write_report
from mtl_jax.report.results import format_table, results_table

__all__ = [
    "comparison_table",
    "delta_m_metrics",
    "delta_m_tasks",
    "format_table",
    "results_table",
    "write_comparison",
    "write_report",
]
