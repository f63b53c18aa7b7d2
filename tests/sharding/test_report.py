import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from mtl_jax.sharding import Rules, digest, format_report, make_mesh, report


def boxed(shape, dtype, names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, dtype), names)


def variables():
    return {
        "experts": boxed((8, 6, 10), jnp.float32, ("expert", "embed", "mlp")),
        "router": boxed((3, 6, 8), jnp.bfloat16, ("task", None, "expert_logits")),
        "scale": boxed((6,), jnp.float32, ("mlp",)),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }


def rows():
    return report(variables(), make_mesh(fsdp=2, expert=4), Rules())


def test_bytes_and_reasons():
    experts, router, scale, step = rows()
    assert experts.spec == PartitionSpec("expert", "fsdp", "model")
    # 8·6·10 floats of 4 bytes, over 4 expert and 2 fsdp devices.
    assert (experts.total_bytes, experts.bytes_per_device) == (1920, 240)
    assert experts.note == ""
    assert (router.dtype, router.bytes_per_device) == ("bfloat16", 288)
    assert router.note == "replicated: no rule shards task, None, expert_logits"
    assert scale.note == "replicated: mesh axis model has size 1"
    assert (step.bytes_per_device, step.shape) == (4, ())
    assert step.note == "replicated: no logical axis names"


def test_table_is_aligned_and_totalled():
    *table, totals = format_report(rows()).splitlines()
    column = table[0].index("dtype")
    assert [line[column:].split()[0] for line in table[1:]] == [
        "float32",
        "bfloat16",
        "float32",
        "int32",
    ]
    assert "8×6×10" in table[1]
    assert "(expert, fsdp, model)" in table[1]
    # 1920 + 288 + 24 + 4, and 240 + 288 + 24 + 4 of which all but 240 replicated.
    assert totals == "total 2,236 bytes; 556 bytes/device, of them 316 replicated"


def test_digest_changes_with_the_sharding_alone():
    reference = digest(rows())
    assert reference == "dd640fa323fd7e1c"
    reworded = [dataclasses.replace(row, note="") for row in reversed(rows())]
    assert digest(reworded) == reference
    other_rules = report(variables(), make_mesh(fsdp=2, expert=4), Rules(expert=None))
    assert digest(other_rules) != reference
    other_mesh = report(variables(), make_mesh(fsdp=4, expert=2), Rules(embed=None))
    assert digest(other_mesh) != reference
