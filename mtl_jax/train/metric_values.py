"""The values in a line of metrics by their shape, and a picture of a matrix."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

# So small that TensorBoard need not shrink the cosines of seven tasks.
CELL, MARGIN, TEXT_SIZE = 32, 8, 11
POSITIVE, NEGATIVE, ABSENT = (0, 114, 178), (213, 94, 0), (200, 200, 200)
INK = (51, 51, 51)


def split_by_shape(
    metrics: Mapping[str, Any],
) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Scalars, vectors and matrices of a line, by name.

    Args:
      metrics: A line of metrics as in ``metrics.jsonl``; None stands for a number that
        is not finite, and becomes NaN.

    Returns:
      Scalars, vectors ``[n]`` (float64) and matrices ``[n, m]`` (float64).
    """
    values = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
    scalars = {name: float(value) for name, value in values.items() if not value.ndim}
    vectors = {name: value for name, value in values.items() if value.ndim == 1}
    matrices = {name: value for name, value in values.items() if value.ndim == 2}
    return scalars, vectors, matrices


def cosine_picture(
    cosines: Float[np.ndarray, "tasks tasks"], names: Sequence[str]
) -> Image.Image:
    """A heat map of cosines: blue above zero, orange below, grey where there is none.

    Args:
      cosines: From -1 to 1, or NaN.
      names: Names of the tasks, written beside the rows.
    """
    font = ImageFont.load_default(TEXT_SIZE)
    left = int(max((font.getlength(name) for name in names), default=0)) + 2 * MARGIN
    side = CELL * len(cosines)
    picture = Image.new("RGB", (left + side + MARGIN, side + 2 * MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    for row, (name, values) in enumerate(zip(names, cosines, strict=True)):
        middle = MARGIN + CELL * row + CELL // 2
        draw.text((left - MARGIN, middle), name, INK, font, anchor="rm")
        for column, value in enumerate(values):
            corner = left + CELL * column, MARGIN + CELL * row
            end = corner[0] + CELL - 2, corner[1] + CELL - 2
            draw.rectangle((corner, end), _color(value))
            if np.isfinite(value):
                place = corner[0] + CELL // 2 - 1, middle - 1
                ink = "white" if abs(value) > 0.6 else INK
                text = f"{value:.2f}".replace("0.", ".")
                draw.text(place, text, ink, font, anchor="mm")
    return picture


def _color(cosine: float) -> tuple[int, int, int]:
    if not np.isfinite(cosine):
        return ABSENT
    share = min(abs(cosine), 1.0)
    red, green, blue = POSITIVE if cosine > 0 else NEGATIVE
    return (
        round(255 + share * (red - 255)),
        round(255 + share * (green - 255)),
        round(255 + share * (blue - 255)),
    )


def png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
