"""PNG files inside the page: what can be seen, and what a listener is told of it."""

import base64
import dataclasses
import io

import matplotlib.image
import numpy as np
from matplotlib.figure import Figure

PIXELS_PER_INCH = 105


@dataclasses.dataclass(frozen=True)
class Image:
    """A PNG that a page carries inside itself.

    Attributes:
      source: A ``data:`` URI.
      alt: The same for those who can't see it.
      caption: What is said beside it; may be empty.
      max_width: The width in CSS pixels beyond which its text would look too large;
        None where the page decides.
    """

    source: str
    alt: str
    caption: str = ""
    max_width: int | None = None


def figure_image(figure: Figure, alt: str, caption: str = "") -> Image:
    """Renders a Matplotlib figure at twice the resolution of a plain screen.

    Args:
      figure: The figure.
      alt: Text alternative.
      caption: Text beside the image.

    Returns:
      The image; equal figures give equal bytes.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    width = round(PIXELS_PER_INCH * figure.get_figwidth())
    return Image(_data_uri(buffer.getvalue()), alt, caption, width)


def pixel_image(pixels: np.ndarray, alt: str, caption: str = "") -> Image:
    """Encodes pixels as they are; the page enlarges them.

    Args:
      pixels: uint8 ``[height, width, 3]``.
      alt: Text alternative.
      caption: Text beside the image.

    Returns:
      The image.
    """
    buffer = io.BytesIO()
    matplotlib.image.imsave(buffer, pixels, format="png")
    return Image(_data_uri(buffer.getvalue()), alt, caption)


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
