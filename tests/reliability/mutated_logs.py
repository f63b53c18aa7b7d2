"""Mutated files of a run, and commands that look at it while it trains."""

from hypothesis import strategies as st

LOGS = ("heartbeat.json", "metrics.jsonl", "timings.jsonl", "config.json")
LINES = (
    *("", "{", "[]", "3", "null", "\0", "[" * 5000, '{"step": "x"}', '{"step": 1e999}'),
    *(
        '{"step": -1}',
        '{"step": 3, "left/loss": "x"}',
        '{"step": 3, "left/loss": null}',
    ),
    *('{"step": 4, "left/loss": 0.5}', '{"step": 2, "left/loss": [1]}', '{"step": []}'),
    *('{"pid": "x", "time": "y"}', '{"pid": -1, "host": 3, "time": 1e300, "step": 1}'),
    *('{"state": {}, "time": 0, "num_steps": 0}', '{"headlines": [1], "time": null}'),
    *('{"headlines": {"left": 3}, "state": "\x1b[31m"}', '{"fields": 3}', "NaN"),
    *('{"step": 3, "seconds_per_step": "x"}', '{"step": 3, "wall_time_seconds": -1}'),
)


@st.composite
def watching(draw):
    """A command that looks at a run once, and what there is of the run."""
    folders = ["run", "run", "run", ".", "taken", "no_such", "a\0b", "x" * 300, ""]
    named = draw(st.lists(st.sampled_from(folders), min_size=0, max_size=2))
    names = draw(st.lists(st.sampled_from(LOGS), max_size=3, unique=True))
    lines = st.lists(st.sampled_from(LINES), max_size=4).map("\n".join)
    return (
        ["watch", "--once", *named],
        {f"run/{name}": draw(lines) + "\n" for name in names},
    )
