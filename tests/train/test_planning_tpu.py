# SPDX-License-Identifier: Apache-2.0
"""The train step compiled for TPUs that are not there, by libtpu on this machine's CPU."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

#: Total by shape against the compiled step's, relative.
CLOSE = 0.10

pytestmark = pytest.mark.slow

#: method, remat, scheme, slice, mesh, rows, tokens
CASES = [
    ("lora", "full", None, "v5e:2x4", "fsdp=8", 8, 512),
    ("lora", "none", None, "v5e:2x4", "fsdp=8", 8, 512),
    ("lora", "full", "nf4", "v5e:2x4", "fsdp=4,tensor=2", 8, 512),
    ("full", "full", None, "v5e:2x4", "fsdp=8", 8, 512),
    ("prefix_tuning", "full", None, "v6e:2x2", "fsdp=4", 4, 1024),
    ("lora", "full", None, "v5e:2x4", "fsdp=2,sequence=4", 4, 2048),
    ("lora", "none", None, "v5e:2x4", "fsdp=4,sequence=2", 4, 512),
    ("lora", "full", None, "v5e:2x4", "fsdp=2,sequence=2,tensor=2", 4, 2048),
    ("full", "full", None, "v5e:2x4", "fsdp=8", 8, 512, "--offload"),
    ("lora", "full", None, "v5e:2x2", "dcn.data=2,fsdp=4", 8, 512, "--slices", "2"),
]

PLAN = """
import sys
from jpeft.train.cli import main
main(["plan", "--model", "llama-2-7b", "--json", *sys.argv[1:]])
"""


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, (*case[:5], *case[7:]))))
def test_a_7b_by_shape_is_what_the_tpu_compiler_says(case):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is absent: pip install 'jpeft[tpu-plan]'")
    method, remat, scheme, where, mesh, rows, tokens, *more = case
    options = {"--method": method, "--remat": remat, "--topology": where, "--mesh": mesh, "--quantize": scheme}
    options |= {"--batch": rows, "--seq": tokens} | ({"--rank": 16} if method == "lora" else {})
    words = [str(word) for pair in options.items() if pair[1] is not None for word in pair] + more
    # a process of its own, as a user's is: libtpu compiles at the level that tests leave out
    clean = {name: value for name, value in os.environ.items() if name != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
    done = subprocess.run([sys.executable, "-c", PLAN, *words], env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert abs(found["by_shape"]["total"] / found["compiled"]["total"] - 1) < CLOSE
    assert found["fits"]
    assert found["compiled"]["collectives"]
    assert [*found["compiled"]["over_dcn"]] == (["all-reduce"] if "dcn" in mesh else [])
    if "--offload" in more:
        assert abs(found["by_shape"]["host"] / found["compiled"]["host"] - 1) < CLOSE
