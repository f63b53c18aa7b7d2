"""One of two processes that write checkpoints, damage one, and restore together.

python checkpoint_of_several.py COORDINATOR PROCESS FOLDER
"""

import sys
from pathlib import Path

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from mtl_jax.train import RunFolderError
from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.state import TrainState


def placed(mesh, array, *axes):
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def state(mesh, step):
    """A state of which each process holds and writes a half."""
    large = np.arange(2**20, dtype=np.float32) + step
    key = placed(mesh, np.asarray(jax.random.key_data(jax.random.key(0))))
    return TrainState(
        placed(mesh, np.int32(step)),
        {"large": placed(mesh, large, "data")},
        (),
        (),
        jax.random.wrap_key_data(key),
    )


def flip_a_bit(folder):
    """Damages what the second process wrote."""
    path = max(
        (folder / "state" / "ocdbt.process_1").rglob("*"),
        key=lambda path: path.stat().st_size,
    )
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def main(coordinator, process, folder):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(coordinator, 2, int(process))
    folder = Path(folder)
    mesh = jax.make_mesh((4,), ("data",))
    data = iter(grain.MapDataset.range(9).to_iter_dataset())
    checkpoints = Checkpoints(folder)
    for step in (2, 4):
        checkpoints.save(step, state(mesh, step), data)
    checkpoints.close()
    if jax.process_index() == 0:
        flip_a_bit(folder / "4")
    multihost_utils.sync_global_devices("damaged")
    for read_only in (True, False):
        checkpoints = Checkpoints(folder, read_only=read_only)
        step, restored = checkpoints.restore_newest(lambda: state(mesh, 0))
        for shard in restored.params["large"].addressable_shards:
            wanted = np.arange(2**20, dtype=np.float32)[shard.index] + step
            np.testing.assert_array_equal(shard.data, wanted)
        print(f"restored {step}, and there are {checkpoints.steps}")
        checkpoints.close()
    if jax.process_index() == 0:
        (folder / "2" / "state" / "_METADATA").unlink()
    multihost_utils.sync_global_devices("damaged again")
    checkpoints = Checkpoints(folder)
    try:
        checkpoints.restore_newest(lambda: state(mesh, 0))
    except RunFolderError as error:
        print(error)
    checkpoints.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
