"""A hundred thousand steps of a tiny model, watched from outside.

    python benchmarks/soak.py

Prints a table in Markdown, for docs/reliability.md: memory, open files, threads and
checkpoints while the run goes on, and how often it compiled. It is a run like any
other, with frequent checkpoints, log lines and evaluations.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "trunk.width": 8,
    "trunk.depth": 1,
    "trunk.num_heads": 1,
    "trunk.mlp_ratio": 2,
    "trunk.moe.num_experts": 2,
    "trunk.moe.expert_hidden": 8,
    "mixture.batch_size": 8,
    "evaluation_batch_size": 64,
    "log_every": 20,
    "evaluate_every": 10_000,
    "checkpoint_every": 500,
}
SECONDS_BETWEEN = 1.0
WARM_UP = 0.1
"""Share of the steps after which all has been seen once and nothing may grow."""


class Sample(NamedTuple):
    """What a process has at one moment."""

    step: int
    resident_megabytes: float
    open_files: int
    threads: int
    checkpoints: int
    checkpoint_megabytes: float
    compilations: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        samples = watch(Path(folder), options.steps)
        print_table(samples, options.steps, time.monotonic() - began)


def watch(folder: Path, num_steps: int) -> list[Sample]:
    """Runs the training and looks at it every second until it ends."""
    run, errors = folder / "run", folder / "errors.txt"
    settings = SETTINGS | {"num_steps": num_steps}
    command = [sys.executable, str(ROOT / "run.py"), "train"]
    command += ["earth_digits:single_digit", "--workdir", str(run)]
    for path, value in settings.items():
        command += ["--set", f"{path}={value}"]
    samples = []
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=os.environ | {"JAX_LOG_COMPILES": "1", "JAX_PLATFORMS": "cpu"},
        )
        while process.poll() is None:
            time.sleep(SECONDS_BETWEEN)
            # Files come and go while they are counted.
            with contextlib.suppress(FileNotFoundError):
                samples.append(look(process.pid, run, errors))
    if process.returncode:
        sys.exit(
            f"the run ended with status {process.returncode}:\n{errors.read_text()}"
        )
    return samples


def look(pid: int, run: Path, errors: Path) -> Sample:
    status = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{pid}/status").read_text().split("\n")
        if ":" in line
    )
    beat = json.loads((run / "heartbeat.json").read_text())
    files = [path for path in (run / "checkpoints").rglob("*") if path.is_file()]
    return Sample(
        step=beat["step"] or 0,
        # A process that has just ended has no memory.
        resident_megabytes=int(status.get("VmRSS", "0 kB").split()[0]) / 1024,
        open_files=len(os.listdir(f"/proc/{pid}/fd")),
        threads=int(status["Threads"]),
        checkpoints=sum(p.name.isdecimal() for p in (run / "checkpoints").iterdir()),
        checkpoint_megabytes=sum(path.stat().st_size for path in files) / 1e6,
        compilations=errors.read_text().count("Finished XLA compilation"),
    )


def print_table(samples: list[Sample], num_steps: int, seconds: float) -> None:
    later = np.array(
        [row for row in samples if WARM_UP * num_steps <= row.step < num_steps], float
    )
    print(
        f"\n{num_steps:,} steps in {seconds:.0f} s; from step "
        f"{WARM_UP * num_steps:,.0f} on, {len(later)} samples\n"
    )
    print(
        "| | least | most | change by a straight line, whole run | scatter about it |"
    )
    print("|---|---|---|---|---|")
    steps = later[:, 0]
    for name in Sample._fields[1:]:
        values = later[:, Sample._fields.index(name)]
        slope, start = np.polyfit(steps, values, 1)
        scatter = np.std(values - slope * steps - start)
        print(
            f"| {name.replace('_', ' ')} | {values.min():.5g} | {values.max():.5g} "
            f"| {slope * num_steps:+.2f} | {scatter:.2f} |"
        )


if __name__ == "__main__":
    main()
