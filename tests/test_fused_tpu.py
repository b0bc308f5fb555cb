# SPDX-License-Identifier: Apache-2.0
"""The kernels of quantized products compiled for TPUs that are not there, by libtpu on this machine's CPU."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, Mesh, PartitionSpec
import numpy as np
import jpeft

device = topologies.get_topology_desc(sys.argv[1], platform="tpu").devices[:1]
there = NamedSharding(Mesh(np.array(device), ("x",)), PartitionSpec())
found = {}
for scheme, dtype, rows, d_in, d_out in json.loads(sys.argv[2]):
    def make():
        rngs = nnx.Rngs(0)
        module = nnx.Linear(d_in, d_out, dtype=dtype, param_dtype=dtype, use_bias=False, rngs=rngs)
        return jpeft.quantize(module, scheme, targets=".*")
    module = nnx.eval_shape(make)
    def step(module, x):
        return jax.value_and_grad(lambda x: (module(x).astype(jnp.float32) ** 2).sum())(x)
    at = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there)
    inputs = jax.tree.map(at, (module, jax.ShapeDtypeStruct((rows, d_in), dtype)))
    with jpeft.quantized_products("pallas"):
        compiled = jax.jit(step).lower(*inputs).compile()
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    found[f"{scheme} {dtype} {rows}"] = [memory.temp_size_in_bytes, costs["flops"]]
print(json.dumps(found))
"""

#: What overlaps with other users of libtpu, and what keeps it quiet.
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_LOG_DIR": "disabled",
}
#: Training and decoding of a 7B's projections, whose d_in is a multiple of no block, and an odd one in float32.
CASES = [
    ("nf4_double", "bfloat16", 2048, 11008, 4096),
    ("nf4", "bfloat16", 1, 4096, 11008),
    ("int8", "bfloat16", 2048, 11008, 4096),
    ("nf4", "float32", 37, 192, 130),
]


@pytest.mark.parametrize("topology", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1"])
def test_the_kernels_compile_for_a_tpu_and_write_no_weights_down(topology):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is absent: pip install 'jpeft[tpu-plan]'")
    clean = {name: value for name, value in os.environ.items() if name != "JAX_DISABLE_MOST_OPTIMIZATIONS"} | SETTINGS
    command = [sys.executable, "-c", COMPILE, topology, json.dumps(CASES)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    for scheme, dtype, rows, d_in, d_out in CASES:
        temporary, flops = found[f"{scheme} {dtype} {rows}"]
        assert flops >= 4 * rows * d_in * d_out  # both products, by the kernels' own word
        rows_moved = 4 * rows * (d_in + d_out) * 4
        scales = 3 * 4 * (d_in // 64) * d_out if scheme == "nf4_double" else 0
        assert temporary < max(rows_moved + scales, 2**20)
        assert rows > 1000 or d_in < 1000 or temporary < 2 * d_in * d_out / 4
