"""An estimate as text, and as JSON."""

import json
from pathlib import Path

from mtl_jax.scaling.compile import Estimate


def write_estimate(estimate: Estimate, path: Path, config: str) -> None:
    """Saves an estimate as JSON.

    Args:
      estimate: The estimate.
      path: The file; its folder is made.
      config: Name of the config, which is saved too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"config": config, **estimate.to_document()}
    path.write_text(json.dumps(document, indent=2) + "\n")


def format_estimate(estimate: Estimate) -> str:
    """Lays an estimate out for a terminal."""
    bytes_, roofline = estimate.bytes, estimate.roofline
    mesh = " ".join(f"{axis}={size}" for axis, size in estimate.mesh.items())
    lines = [
        f"{estimate.topology}: {estimate.chips:,} chips, mesh {mesh}",
        f"{estimate.total_parameters:,} parameters, {estimate.active_parameters:,} "
        "active for one task's example",
        f"batch of {estimate.batch_size:,} examples, "
        f"{estimate.batch_size / estimate.chips:g} a chip"
        + (", blocks recomputed" if estimate.remat else ""),
        "",
        "memory of a chip, in GiB",
    ]
    for name in ("parameters", "optimizer_state", "aggregator_state", "batch"):
        lines.append(_row(name.replace("_", " "), getattr(bytes_, name) / 2**30))
    lines += [
        _row("temporaries", bytes_.temporaries / 2**30),
        _row("peak", bytes_.peak / 2**30)
        + f"  of {bytes_.capacity / 2**30:g} ({bytes_.peak / bytes_.capacity:.0%})",
        "",
        "operations of a step, in TFLOP",
        _row("all chips", estimate.flops / 1e12),
        _row("  none recomputed", estimate.useful_flops / 1e12),
        _row("a chip, its share", estimate.flops / estimate.chips / 1e12),
        _row("a chip, as compiled", estimate.chip_flops / 1e12),
        "",
        "collectives of a chip in a step                  count            MB",
    ]
    for item in estimate.collectives:
        name = f"{item.kind} over {'+'.join(item.axes)}"
        note = "  overlapped" if item.overlapped else ""
        lines.append(f"  {name:<42}{item.count:>10,}{item.bytes / 1e6:>14,.3f}{note}")
    if not estimate.collectives:
        lines.append("  none")
    lines += [
        "",
        "least time of a step at peak rates, in ms",
        _row("compute", roofline.compute * 1e3),
        _row("memory", roofline.memory * 1e3)
        + f"  {estimate.memory_bytes / 1e9:,.3f} GB a chip",
    ]
    for note, times in (
        ("exposed", roofline.exposed),
        ("overlapped", roofline.overlapped),
    ):
        for axes, seconds in times.items():
            lines.append(_row(f"links of {axes}", seconds * 1e3) + f"  {note}")
    lines += [
        _row("total", roofline.total * 1e3) + f"  bound by {roofline.bound}",
        "",
        f"at most {estimate.batch_size / roofline.total:,.0f} examples a second; "
        f"model FLOP utilization at most {estimate.utilization:.1%}",
    ]
    if not estimate.optimized:
        lines.append(
            "compiled quickly: a full compilation moves fewer bytes and overlaps more"
        )
    return "\n".join(lines)


def _row(name: str, value: float) -> str:
    return f"  {name:<32}{value:>14,.3f}"
