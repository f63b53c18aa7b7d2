"""A run's metrics as TensorBoard reads them, without TensorFlow."""

import errno
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from jaxtyping import Float
from tensorboardX.proto.event_pb2 import (  # classes that are made on import
    Event,  # type: ignore[attr-defined]
    SessionLog,  # type: ignore[attr-defined]
)
from tensorboardX.proto.summary_pb2 import (
    HistogramProto,  # type: ignore[attr-defined]
    Summary,  # type: ignore[attr-defined]
)
from tensorboardX.record_writer import masked_crc32c

from mtl_jax.train.metric_values import cosine_picture, png, split_by_shape
from mtl_jax.train.run_folder import refuse_links
from mtl_jax.train.telling import tell

COSINE = "all/cosine"
VERSION = "brain.Event:2"


class TensorBoard:
    """Writes each line of metrics to a folder that TensorBoard opens.

    Numbers have the names that they have in ``metrics.jsonl``, and those of
    ``timings.jsonl`` the same after ``timing/``. At evaluations, the loads of experts
    are histograms with a bar for each expert, and the cosines of task gradients a
    picture.

    A part of a run that was continued has a file of its own, whose beginning tells
    TensorBoard to forget what an earlier part wrote of the same steps. Every event is
    on its way to the disk before the next step. If one cannot be written, that is
    reported, no more are, and the run goes on.

    Args:
      folder: Where the files are; made if absent, in a folder that is there.
      tasks: Names of the tasks, in the order of the experiment.

    Raises:
      RunFolderError: If the folder is a symbolic link or holds one.
    """

    def __init__(self, folder: Path, tasks: Sequence[str]):
        refuse_links(folder)
        self._folder, self._tasks = folder, tuple(tasks)
        self._file: BinaryIO | None = None
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def phase(self, step: int, name: str) -> None:
        """Nothing of it is logged."""

    def begin(self, step: int) -> None:
        """Nothing is logged of a step that is not done."""

    def update(
        self,
        step: int,
        metrics: Mapping[str, Any],
        timing: Mapping[str, float],
        evaluated: bool,
    ) -> None:
        """Writes the line of a step."""
        if self._ended:
            return
        try:
            if self._file is None:
                self._file = self._open(step)
            summary = self._summary(metrics, timing, evaluated)
            self._write(self._file, Event(step=step, summary=summary))
        except OSError as error:
            self._ended = True
            tell(
                f"cannot write to {self._folder}: {error.strerror}; nothing more is "
                "logged there, and the run goes on"
            )

    def _open(self, step: int) -> BinaryIO:
        """A file whose reader forgets what others say of a step and of later ones."""
        self._folder.mkdir(exist_ok=True)
        file = next_file(self._folder, time.time()).open("xb", buffering=0)
        self._write(file, Event(file_version=VERSION))
        start = SessionLog(status=SessionLog.START)
        self._write(file, Event(step=step, session_log=start))
        return file

    def _write(self, file: BinaryIO, event: Event) -> None:
        event.wall_time = time.time()
        data = record(event.SerializeToString())
        if file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _summary(
        self, metrics: Mapping[str, Any], timing: Mapping[str, float], evaluated: bool
    ) -> Summary:
        scalars, vectors, matrices = split_by_shape(metrics)
        times = {f"timing/{name}": v for name, v in timing.items() if name != "step"}
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in {**scalars, **times}.items()
        ]
        if evaluated:
            values += [
                Summary.Value(tag=name, histo=bars(vector))
                for name, vector in vectors.items()
                if np.isfinite(vector).all()
            ]
            if COSINE in matrices:
                picture = cosine_picture(matrices[COSINE], self._tasks)
                image = Summary.Image(
                    width=picture.width,
                    height=picture.height,
                    colorspace=3,
                    encoded_image_string=png(picture),
                )
                values.append(Summary.Value(tag=COSINE, image=image))
        return Summary(value=values)


def bars(heights: Float[np.ndarray, " bars"]) -> HistogramProto:
    """A histogram whose bar ``i``, from ``i`` to ``i + 1``, has the height given."""
    return HistogramProto(
        min=0.0,
        max=float(len(heights)),
        num=float(np.sum(heights)),
        sum=float(np.sum(heights * (np.arange(len(heights)) + 0.5))),
        sum_squares=float(np.sum(heights * (np.arange(len(heights)) + 0.5) ** 2)),
        bucket_limit=[float(end) for end in range(1, len(heights) + 1)],
        bucket=heights.tolist(),
    )


def record(data: bytes) -> bytes:
    """Data as TFRecord files hold it: length and data, each with a checksum."""
    length = struct.pack("<Q", len(data))
    return b"".join(
        (
            length,
            struct.pack("<I", masked_crc32c(length)),
            data,
            struct.pack("<I", masked_crc32c(data)),
        )
    )


def next_file(folder: Path, now: float) -> Path:
    """A file that TensorBoard, which goes by names, reads after all that are there.

    Args:
      folder: Where files of events are.
      now: Seconds since 1970.
    """
    start = "events.out.tfevents."
    stamps = [path.name.removeprefix(start)[:10] for path in folder.glob(f"{start}*")]
    last = max((int(stamp) for stamp in stamps if stamp.isdecimal()), default=0)
    return folder / f"{start}{max(int(now), last + 1):010d}.{socket.gethostname()}"
