"""Parameters placed by ordered rules, and what is said of it."""

import jax
import numpy as np
import pytest

from mtl_jax.layers.patch import resize_positions
from mtl_jax.models.transfer import account, print_account, transfer


def params(seed, heads, **trunk):
    """A small trunk, and a kernel and a bias a head."""
    random = np.random.default_rng(seed)
    shapes = {"kernel": (2, 3), **trunk}
    return {
        "trunk": {
            name: random.normal(size=shape).astype(np.float32)
            for name, shape in shapes.items()
        },
        "heads": {
            name: {
                "bias": random.normal(size=2).astype(np.float32),
                "kernel": random.normal(size=(3, 2)).astype(np.float32),
            }
            for name in heads
        },
    }


RULES = (("heads/left", "heads/digit"), ("heads", None), ("", ""))


def test_the_first_rule_that_speaks_of_a_parameter_holds():
    fresh, saved = params(0, ["left", "leftmost"]), params(1, ["digit", "leftmost"])
    made = transfer(fresh, saved, rules=RULES)
    assert jax.tree.structure(made) == jax.tree.structure(fresh)
    np.testing.assert_array_equal(made["trunk"]["kernel"], saved["trunk"]["kernel"])
    for name in ("bias", "kernel"):
        left = made["heads"]["left"][name]
        np.testing.assert_array_equal(left, saved["heads"]["digit"][name])
        # Its name begins with letters of another's, and it is not inside of that.
        assert made["heads"]["leftmost"][name] is fresh["heads"]["leftmost"][name]
    assert account(fresh, saved, made) == [
        "as they are: 1 (trunk/kernel)",
        "made of those of other names: 2 (heads/left/bias, heads/left/kernel)",
        "stay fresh: 2 (heads/leftmost/bias, heads/leftmost/kernel)",
        "of the other model, without a place of that name: 2 (heads/digit/bias, "
        "heads/digit/kernel)",
    ]


def test_positions_of_another_grid_are_resized():
    fresh, saved = (
        params(0, [], positions=(4, 2, 3)),
        params(1, [], positions=(2, 2, 3)),
    )
    made = transfer(fresh, saved, rules=(("", ""),))
    np.testing.assert_array_equal(
        made["trunk"]["positions"],
        resize_positions(saved["trunk"]["positions"], 4, 2),
    )
    assert account(fresh, saved, made) == [
        "as they are: 1 (trunk/kernel)",
        "of another shape: 1 (trunk/positions (2, 2, 3) -> (4, 2, 3))",
    ]


def test_what_no_rule_speaks_of_stays_fresh_and_many_are_counted():
    fresh = params(0, ["a", "b", "c"])
    made = transfer(fresh, params(1, []), rules=(("trunk", "trunk"),))
    assert account(fresh, params(1, []), made)[-1] == (
        "stay fresh: 6 (heads/a/bias, heads/a/kernel, heads/b/bias and 3 more)"
    )


@pytest.mark.parametrize(
    ("saved", "rules", "expected"),
    [
        (
            params(1, ["b"]),
            (("", ""),),
            r"by the rule \('', ''\), heads/a/bias starts as heads/a/bias, which the "
            "other model lacks",
        ),
        (
            params(1, ["a"], kernel=(2, 4)),
            (("", ""),),
            r"trunk/kernel is \(2, 3\), and trunk/kernel of the other model \(2, 4\)",
        ),
        (
            params(1, ["a"]),
            (("", ""), ("heads", None)),
            "the rule of 'heads' holds for no parameter; .* the narrower before",
        ),
        (params(1, ["a"]), (("head", None), ("", "")), "the rule of 'head' holds for"),
    ],
)
def test_rules_that_lead_nowhere_are_named(saved, rules, expected):
    with pytest.raises(ValueError, match=expected):
        transfer(params(0, ["a"]), saved, rules=rules)


def test_it_is_printed_where_there_are_parameters(capsys):
    fresh, saved = params(0, ["left"]), params(1, ["digit"])

    def start(fresh):
        made = transfer(fresh, saved, rules=RULES[::2])
        print_account("step 3 of runs/a", fresh, saved, made)
        return made

    jax.eval_shape(start, fresh)
    assert capsys.readouterr().out == ""
    start(fresh)
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "parameters from step 3 of runs/a"
    assert second == "  as they are: 1 (trunk/kernel)"
