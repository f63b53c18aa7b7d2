"""Delta-m: one number for a multitask model against single-task baselines.

The literature calls two incompatible numbers by this name. They differ in sign and in
what they average over, so every place that prints one must say which:

- over metrics: the mean relative *loss* over all metrics, lower is better, as in the
  code of CAGrad (Liu et al., NeurIPS 2021) and Nash-MTL (Navon et al., ICML 2022);
- over tasks: the mean over tasks of the mean relative *gain* over a task's metrics,
  higher is better, as in LibMTL (Lin & Zhang, JMLR 2023).
"""

from collections.abc import Hashable, Sequence

import numpy as np

OVER_METRICS = "Δm over metrics (lower is better; Nash-MTL, CAGrad)"
OVER_TASKS = "Δm over tasks (higher is better; LibMTL)"


def relative_gains(
    values: Sequence[float],
    baselines: Sequence[float],
    higher_is_better: Sequence[bool],
) -> np.ndarray:
    """How much better each metric is than its baseline, as a fraction of the baseline.

    Args:
      values: The multitask model's metrics, ``[metrics]``.
      baselines: The same metrics of the baseline, ``[metrics]``.
      higher_is_better: The direction of each metric, ``[metrics]``.

    Returns:
      float64 ``[metrics]``; positive where the model is better than the baseline.

    Raises:
      ValueError: If the lengths differ, there are no metrics, a value is not finite or
        a baseline is not positive (a gain relative to it has no meaning).
    """
    value = np.asarray(values, np.float64)
    baseline = np.asarray(baselines, np.float64)
    sign = np.where(np.asarray(higher_is_better, bool), 1.0, -1.0)
    if not value.shape == baseline.shape == sign.shape or value.ndim != 1:
        raise ValueError(
            f"values, baselines and higher_is_better have shapes {value.shape}, "
            f"{baseline.shape} and {sign.shape}: give one entry of each per metric."
        )
    if value.size == 0:
        raise ValueError("values is empty: delta-m needs at least one metric.")
    if not np.isfinite(value).all():
        raise ValueError(f"values {values} are not all finite: leave such metrics out.")
    if not (np.isfinite(baseline).all() and (baseline > 0).all()):
        raise ValueError(
            f"baselines {baselines} are not all finite and positive: delta-m is "
            "relative to the baseline, so leave such metrics out."
        )
    return sign * (value - baseline) / baseline


def delta_m_metrics(
    values: Sequence[float],
    baselines: Sequence[float],
    higher_is_better: Sequence[bool],
) -> float:
    """Delta-m as a mean over all metrics; lower is better.

    A task with many metrics counts more than one with few.

    Args:
      values: The multitask model's metrics, ``[metrics]``.
      baselines: The same metrics of the single-task models, ``[metrics]``.
      higher_is_better: The direction of each metric, ``[metrics]``.

    Returns:
      Mean relative loss in per cent; negative where the model beats its baselines.

    Raises:
      ValueError: As :func:`relative_gains`.
    """
    return -100.0 * float(relative_gains(values, baselines, higher_is_better).mean())


def delta_m_tasks(
    values: Sequence[float],
    baselines: Sequence[float],
    higher_is_better: Sequence[bool],
    tasks: Sequence[Hashable],
) -> float:
    """Delta-m as a mean over tasks of the mean over a task's metrics; higher is better.

    Args:
      values: The multitask model's metrics, ``[metrics]``.
      baselines: The same metrics of the single-task models, ``[metrics]``.
      higher_is_better: The direction of each metric, ``[metrics]``.
      tasks: The task that each metric belongs to, ``[metrics]``.

    Returns:
      Mean relative gain in per cent; positive where the model beats its baselines.

    Raises:
      ValueError: As :func:`relative_gains`, or if ``tasks`` has another length.
    """
    gains = relative_gains(values, baselines, higher_is_better)
    if len(tasks) != len(gains):
        raise ValueError(
            f"tasks has {len(tasks)} entries for {len(gains)} metrics: name the task "
            "of each metric."
        )
    by_task = [
        gains[[task == other for other in tasks]].mean()
        for task in dict.fromkeys(tasks)
    ]
    return 100.0 * float(np.mean(by_task))
