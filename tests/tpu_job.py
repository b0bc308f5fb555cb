# SPDX-License-Identifier: Apache-2.0
"""A job for the TPU scripts' tests: processes that sum over all devices, step by step, and go on from a checkpoint.

python tests/tpu_job.py FOLDER STEPS SECONDS_A_STEP
"""

import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def main(folder: Path, steps: int, seconds: float) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize()
    place = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P("data"))
    ranks = np.arange(1, jax.device_count() + 1, dtype=np.float32)
    own = jax.make_array_from_callback(ranks.shape, place, lambda index: ranks[index])
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(place.mesh, P()))

    file = folder / "checkpoint.json"
    saved = json.loads(file.read_text()) if file.exists() else {"step": 0, "sum": 0.0}
    print(f"process {jax.process_index()} of {jax.process_count()} from step {saved['step']}", flush=True)
    for step in range(saved["step"], steps):
        saved = {"step": step + 1, "sum": saved["sum"] + float(total(own))}
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / "partial"
            partial.write_text(json.dumps(saved))
            partial.rename(file)
        time.sleep(seconds)
    print(f"process {jax.process_index()} done: {saved}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
