"""What the page on launching says of times, against the times that are set."""

import pathlib
import re

from mtl_jax.sharding import distributed

PAGE = pathlib.Path(__file__).parents[2] / "docs/launch.md"


def test_the_page_names_the_time_after_which_a_silent_process_is_given_up():
    (seconds,) = re.findall(
        r"after (\d+) seconds without a sign of life", PAGE.read_text()
    )
    assert int(seconds) == distributed.SILENT_SECONDS
