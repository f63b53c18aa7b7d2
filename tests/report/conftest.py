"""A made-up run folder in the trainer's format, and a headless browser."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TASKS = {
    "surface": ("accuracy", 0.95, 0.79, "earth"),
    "climate": ("accuracy", 0.71, 0.42, "earth"),
    "elevation": ("r2", 0.62, 0.0, "earth"),
    "slope": ("r2", 0.31, 0.0, "earth"),
    "digit": ("accuracy", 0.97, 0.11, "digits"),
    "left": ("accuracy", 0.93, 0.11, "multi_digits"),
    "right": ("accuracy", 0.91, 0.11, "multi_digits"),
}
CLASSES = {"surface": ["ocean", "land"], "climate": list("ABCDE")}
DENSE_VALUES = ("elevation", "slope")
BLOCKS = ("block_1", "block_3")
NUM_EXPERTS = 8


def _output(task):
    dense = TASKS[task][3] == "earth"
    if task in DENSE_VALUES:
        return {
            "kind": "values",
            "dense": dense,
            "class_names": [],
            "num_classes": None,
        }
    names = CLASSES.get(task, [])
    num_classes = len(names) or 10
    return {
        "kind": "classes",
        "dense": dense,
        "class_names": names,
        "num_classes": num_classes,
    }


def _smooth(random, count, size=32):
    waves = random.normal(size=(count, 5, 4))
    y, x = np.mgrid[:size, :size] / size
    phase = waves[..., 0, None, None] * 4 * x + waves[..., 1, None, None] * 4 * y
    field = waves[..., 2, None, None] * np.sin(phase + 3 * waves[..., 3, None, None])
    return field.sum(1)


def _samples(random, tasks, sources):
    samples = {}
    for source in sources:
        count = 6 if source == "earth" else 9
        field = _smooth(random, count)
        channels = [field, field * 0.5 + 0.3, -field] if source == "earth" else [field]
        image = np.stack(channels, axis=-1)
        samples[f"{source}/image"] = (255 / (1 + np.exp(-image))).astype(np.uint8)
        for task in tasks:
            if TASKS[task][3] != source:
                continue
            guess = field + 0.3 * _smooth(random, count)
            if task in DENSE_VALUES:
                pair = np.where(field < -0.5, np.nan, field), guess
            elif source == "earth":
                edges = np.linspace(-1, 1, len(CLASSES[task]) + 1)[1:-1]
                truth = np.digitize(field, edges)
                truth[:, :4, :4] = -1
                pair = truth, np.digitize(guess, edges)
            else:
                truth = random.integers(0, 10, count)
                pair = truth, (truth + 1) % 10
            samples[f"{source}/{task}/target"] = pair[0]
            samples[f"{source}/{task}/prediction"] = pair[1]
            for block in BLOCKS if source == "earth" else ():
                samples[f"{source}/routing/{task}/{block}"] = random.integers(
                    0, NUM_EXPERTS, (count, 8, 8)
                )
    return samples


def _records(random, tasks, num_steps, dense_trunk):
    records = []
    tasks = list(tasks)
    affinity = np.triu(random.normal(scale=0.25, size=(len(tasks), len(tasks))), 1)
    usage = {
        (task, block): random.dirichlet(np.ones(NUM_EXPERTS))
        for task in tasks
        for block in BLOCKS
    }
    for step in range(1, num_steps + 1):
        progress = step / num_steps
        record = {"step": step, "all/learning_rate": 1e-3}
        for index, task in enumerate(tasks):
            noise = np.exp(0.1 * random.normal())
            record[f"{task}/loss"] = (1.5 * np.exp(-3 * progress) + 0.1) * noise
            record[f"{task}/gradient_norm"] = (1 + index) * np.exp(-progress) * noise
            record[f"{task}/weight"] = 1.0
            if not dense_trunk:
                record[f"{task}/dropped_tokens"] = 0.02 * (1 - progress)
                for block in BLOCKS:
                    load = usage[task, block] * progress + (1 - progress) / NUM_EXPERTS
                    record[f"{task}/expert_load/{block}"] = load.tolist()
        if len(tasks) > 1:
            noisy = affinity + np.triu(random.normal(scale=0.1, size=affinity.shape), 1)
            cosine = np.tanh(noisy + noisy.T) + np.eye(len(tasks))
            rows = cosine.tolist()
            if step % 10 == 0:
                rows[0] = [None] * len(tasks)
                for row in rows:
                    row[0] = None
            record["all/cosine"] = rows
            pairs = cosine[np.triu_indices(len(tasks), 1)]
            record["all/conflict_rate"] = float((pairs < 0).mean())
        if step % max(1, num_steps // 8) == 0:
            for task in tasks:
                metric, final, constant, _ = TASKS[task]
                value = constant + (final - constant) * (1 - np.exp(-4 * progress))
                record[f"{task}/{metric}"] = value
                record[f"{task}/test_loss"] = 1.6 * np.exp(-2.8 * progress) + 0.15
        records.append(record)
    return records


@pytest.fixture
def make_run(tmp_path):
    """A function that writes a made-up run folder and returns its path."""

    def make(
        name,
        tasks=tuple(TASKS),
        scale=1.0,
        num_steps=40,
        dense_trunk=False,
        samples=True,
        seed=0,
    ):
        random = np.random.default_rng(seed)
        folder = tmp_path / name
        folder.mkdir()
        sources = list(dict.fromkeys(TASKS[task][3] for task in tasks))
        fields = {"model.trunk.num_experts": NUM_EXPERTS, "optimizer.rate": 1e-3}
        config = {"config": f"earth_digits:{name}", "fields": fields, "fiddle": {}}
        result = {
            "config": config["config"],
            "seed": seed,
            "num_steps": num_steps,
            "tasks": {
                task: {
                    "metrics": {
                        TASKS[task][0]: {
                            "value": TASKS[task][1] * scale,
                            "higher_is_better": True,
                            "constant_predictor": TASKS[task][2],
                        },
                        "error": {
                            "value": 0.2 / scale,
                            "higher_is_better": False,
                            "constant_predictor": None,
                        },
                    },
                    "headline": TASKS[task][0],
                    "output": _output(task),
                    "sources": [TASKS[task][3]],
                }
                for task in tasks
            },
            "sources": {
                source: {
                    "train_examples": 9000,
                    "test_examples": 1000,
                    "examples_per_step": 32,
                    "tasks": [task for task in tasks if TASKS[task][3] == source],
                    "image_shape": [32, 32, 3 if source == "earth" else 1],
                }
                for source in sources
            },
            "mesh": {"data": 1, "fsdp": 1, "expert": 1, "model": 1},
            "method": {
                "aggregator": "pcgrad",
                "gradients_at": "params",
                "sharpness_rho": None,
            },
            "cost": {
                "parameters": 1234567,
                "active_parameters": 456789,
                "flops_per_step": 1.23e10,
                "examples_per_second": 512.3,
                "peak_memory_bytes": None,
                "input_stall": 0.013,
                "compile_seconds": 14.2,
            },
            "versions": {"jax": "0.10.1", "python": "3.11.7"},
            "device": "cpu",
            "wall_time_seconds": 372.4,
        }
        records = _records(random, tasks, num_steps, dense_trunk)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "metrics.jsonl").write_text(lines)
        seconds = [0.3, 0.1, 0.2]
        timings = [{"step": n, "seconds_per_step": s} for n, s in enumerate(seconds)]
        lines = "".join(json.dumps(timing) + "\n" for timing in timings)
        (folder / "timings.jsonl").write_text(lines)
        (folder / "result.json").write_text(json.dumps(result))
        if samples:
            np.savez(folder / "samples.npz", **_samples(random, tasks, sources))
        return folder

    return make


class Browser:
    """Headless Chromium, spoken to over a pair of pipes in its DevTools protocol."""

    def __init__(self, executable, profile):
        to_browser, self._output = os.pipe()
        self._input, from_browser = os.pipe()
        # The protocol lives on descriptors 3 and 4 of the browser.
        move = (
            "import fcntl, os, sys;"
            "pipes = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]];"
            "os.dup2(pipes[0], 3); os.dup2(pipes[1], 4);"
            "os.execv(sys.argv[3], sys.argv[3:])"
        )
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={profile}",
            "--remote-debugging-pipe",
        ]
        pipes = (to_browser, from_browser)
        self._process = subprocess.Popen(
            [sys.executable, "-c", move, *map(str, pipes), executable, *flags],
            pass_fds=pipes,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for pipe in pipes:
            os.close(pipe)
        self._received = b""
        self._last_id = 0
        self._session = None
        self.events = []

    def connect(self):
        """Opens one tab and listens to it."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """Runs one command and returns its result; events met are kept."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._output, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._last_id:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    def open(self, page: Path, width, dark=False):
        """Loads a page in a window of ``width`` CSS pixels and waits for its end."""
        self.events.clear()
        mobile = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=mobile,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not self.seen("Page.loadEventFired"):
            self.events.append(self._receive())

    def seen(self, method):
        """The parameters of every event of one kind since the page was opened."""
        return [e["params"] for e in self.events if e.get("method") == method]

    def evaluate(self, expression):
        """The value of a JavaScript expression in the page."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"]["value"]

    def screenshot(self):
        """A PNG of the whole page."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    def pdf(self):
        """The printed page."""
        answer = self.call("Page.printToPDF", preferCSSPageSize=True)
        return base64.b64decode(answer["data"])

    def close(self):
        """Ends the browser."""
        self._session = None
        with contextlib.suppress(OSError, AssertionError, ConnectionError):
            self.call("Browser.close")
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._output)
        os.close(self._input)

    def _receive(self):
        while b"\0" not in self._received:
            part = os.read(self._input, 1 << 20)
            if not part:
                raise ConnectionError("the browser ended before it answered")
            self._received += part
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless Chromium or Chrome; without one the tests that need it fail."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.fail(
            "No browser: install Chromium (Debian: apt-get install chromium) to test "
            f"the pages. Looked for {', '.join(names)}."
        )
    opened = Browser(executable, tmp_path_factory.mktemp("profile"))
    try:
        opened.connect()
        yield opened
    finally:
        opened.close()
