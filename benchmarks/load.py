# SPDX-License-Identifier: Apache-2.0
"""Loading a checkpoint of a Llama shape against `transformers.from_pretrained`: time, memory, and bytes read.

    python benchmarks/load.py [--layers 12] [--cores 2] [--repeats 3] [--folder DIR] [--json FILE]
    python benchmarks/load.py --preset llama-2-7b --sparse --sides "jpeft nf4" "jpeft mesh of 8 nf4" --repeats 1

Writes a random checkpoint in bfloat16 shards (deleted afterwards), then loads it in processes of their own that take
turns, each once: by transformers in the same dtype, with its weights touched, since it maps files that are read when
they are used; and by jpeft onto one device, onto a mesh of eight (fake ones of this CPU), in float32, and quantized
("transformers nf4" needs bitsandbytes). With --sparse the shards are holes, whose zeros take no place on the disk. With
--cold the system forgets the shards before each load, so that they come from the disk, as after a start of the machine.

Memory is counted from when the libraries are imported: the highest resident memory, in which a mapped file's pages
count, and the highest anonymous memory, which is what a machine must have. Beside it stand the model that came out and
the largest slice in floats that one device gets of a leaf; the last column is the anonymous memory over 1.2 times that
slice and the model. Bytes read are those of read calls (`/proc/self/io`); a mapped file is read by page faults, which
do not count there.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SIDES = (
    *("transformers", "jpeft", "jpeft mesh of 8", "transformers float32", "jpeft float32", "jpeft mesh of 8 float32"),
    *("transformers nf4", "jpeft nf4", "jpeft mesh of 8 nf4"),
)
SHAPE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 2048,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192, "hidden_act": "silu",
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": False,
    "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def shape_of(preset: str | None, layers: int | None) -> dict[str, Any]:
    """config.json of a preset, or of `SHAPE`; with another number of layers, if one is given."""
    from jpeft.models._families import preset as named

    own = {key: SHAPE[key] for key in ("architectures", "dtype")}
    config = SHAPE | {"num_hidden_layers": 12} if preset is None else named(preset).to_hf() | own
    return config if layers is None else config | {"num_hidden_layers": layers}


def write_checkpoint(folder: Path, config: dict[str, Any], shard_bytes: int, sparse: bool) -> int:
    """Writes the checkpoint with small random values, or with holes; its bytes."""
    import jax
    import ml_dtypes
    import numpy as np

    from jpeft import models
    from jpeft.models import _safetensors
    from jpeft.models._checkpoint import write_checkpoint
    from jpeft.models._weights import fill, rules

    layers = config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    model = jax.eval_shape(lambda: models.build(config, key=jax.random.key(0), dtype="bfloat16"))
    leaves = models._flatten(model)[1]
    rng = np.random.default_rng(0)
    # Signs and mantissas are random, magnitudes about those of weights: nothing that a machine could share or skip.
    bits = (rng.integers(0, 2**16, 2**24, np.uint16) & 0x807F | 0x3C80).view(ml_dtypes.bfloat16)

    def values(shape: tuple[int, ...]) -> Any:
        return np.resize(bits, shape)

    sources: dict[str, Any] = {}
    for rule in rules(models.weights(model)):
        stacked = "{i}" in rule.hf
        shape = leaves[rule.path].shape[1:] if stacked else leaves[rule.path].shape
        shape = tuple(shape[axis] for axis in rule.how.to_hf or range(len(shape)))
        for name in [fill(rule.hf, i) for i in range(layers)] if stacked else [rule.hf]:
            sources[name] = _safetensors.Source(shape, bits.dtype, lambda shape=shape: values(shape))
    if sparse:
        _safetensors.write = write_holes
    write_checkpoint(folder, dict(sorted(sources.items())), shard_bytes)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def write_holes(file: Path, sources: dict[str, Any], metadata: dict[str, str]) -> None:
    """A safetensors file of zeros that are not there."""
    import numpy as np

    entries: dict[str, Any] = {"__metadata__": metadata}
    stop = 0
    for name, source in sources.items():
        start, stop = stop, stop + int(np.prod(source.shape)) * 2
        entries[name] = {"dtype": "BF16", "shape": list(source.shape), "data_offsets": [start, stop]}
    text = json.dumps(entries).encode()
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + stop)


class Memory(threading.Thread):
    """The highest resident and anonymous memory, above what was there, looked at every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before, self.most, self._over = self.now(), {"resident": 0, "anonymous": 0}, threading.Event()
        self.start()

    @staticmethod
    def now() -> dict[str, int]:
        """Bytes now."""
        lines = Path("/proc/self/status").read_text().splitlines()
        fields = {
            key: int(value.split()[0]) * 1024
            for key, _, value in (line.partition(":") for line in lines)
            if "kB" in value
        }
        return {"resident": fields["VmRSS"], "anonymous": fields["RssAnon"]}

    def run(self) -> None:
        """Looks until it is stopped."""
        while not self._over.wait(0.003):
            self.look()

    def look(self) -> None:
        """Looks once."""
        now = self.now()
        self.most = {key: max(self.most[key], now[key] - self.before[key]) for key in now}

    def stop(self) -> dict[str, int]:
        """What was found."""
        self._over.set()
        self.join()
        self.look()
        return self.most


def read_bytes() -> int:
    """What this process has read by calls so far."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def forget(folder: Path) -> None:
    """Takes the shards out of the system's page cache, as far as no process maps them."""
    for shard in folder.glob("*.safetensors"):
        with open(shard, "rb") as stream:
            os.fsync(stream.fileno())  # a page that is not written yet is kept
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(side: str, folder: Path, cold: bool) -> dict[str, Any]:
    """Loads once, in this process; seconds and bytes."""
    name, _, how = side.partition(" ")
    if cold:
        forget(folder)
    action = _transformers(folder, how) if name == "transformers" else _jpeft(folder, how)
    memory, before = Memory(), read_bytes()
    start = time.perf_counter()
    kept = action()
    seconds = time.perf_counter() - start
    found = {"seconds": seconds, "read": read_bytes() - before, **memory.stop()}
    return found | (
        {"model": sum(p.nbytes for p in kept.parameters())} if name == "transformers" else _sizes(kept, how)
    )


def _sizes(model: Any, how: str) -> dict[str, int]:
    """Bytes of a model, and of the largest slice in floats that a device gets."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jpeft

    shapes = jpeft.models._flatten(jax.eval_shape(lambda: jpeft.models.build(model.config, key=jax.random.key(0))))[1]
    size = 4 if how.endswith("float32") else jnp.dtype(jnp.bfloat16).itemsize
    place = jpeft.placement(jpeft.mesh("fsdp=4,tensor=2")) if "mesh" in how else None
    slices = [x.shape if place is None else place(path, x).shard_shape(x.shape) for path, x in shapes.items()]
    return {
        "model": sum(leaf.nbytes for leaf in jpeft.models._flatten(model)[1].values()),
        "slice": size * max(int(np.prod(shape)) for shape in slices),
    }


def _transformers(folder: Path, how: str) -> Any:
    import torch
    import transformers

    options: dict[str, Any] = {"dtype": torch.float32 if how == "float32" else torch.bfloat16}
    if how == "nf4":
        import bitsandbytes as _  # pyright: ignore[reportMissingImports]  # before the clock, as the others

        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.utils.logging.disable_progress_bar()
    _ = transformers.LlamaForCausalLM  # imported when it is first named

    def action() -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        for weight in model.parameters():  # a byte of every page
            weight.detach().view(torch.uint8).view(-1)[::4096].max()
        return model

    return action


def _jpeft(folder: Path, how: str) -> Any:
    import jax
    import jax.numpy as jnp

    import jpeft

    options: dict[str, Any] = {}
    if how.startswith("mesh of 8"):
        jax.config.update("jax_num_cpu_devices", 8)
        options["sharding"] = jpeft.placement(jpeft.mesh("fsdp=4,tensor=2"))
        how = how.removeprefix("mesh of 8").strip()
    if how == "nf4":
        options["quantize"] = "nf4"
    elif how:
        options["dtype"] = how
    jax.block_until_ready(jnp.ones(3) + 1)
    return lambda: jax.block_until_ready(jpeft.models.load(folder, **options))


def compare(folder: Path, cores: list[int], repeats: int, sides: list[str], cold: bool) -> dict[str, dict[str, float]]:
    """The sides in turns, each time in a new process; medians."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for repeat in range(repeats):
        for side in sides if repeat % 2 == 0 else reversed(sides):
            command = [
                "taskset",
                "-c",
                ",".join(map(str, cores)),
                sys.executable,
                __file__,
                "--worker",
                side,
                str(folder),
                *(["--cold"] if cold else []),
            ]
            environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(len(cores))}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    return {side: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for side, runs in found.items()}


def show(results: dict[str, dict[str, float]], size: int) -> None:
    """Prints a table; ratios are to transformers in the same dtype."""
    print(f"a checkpoint of {size / 1e9:.2f} GB")
    print(
        "| side | s | GB/s | resident MB | anonymous MB | read MB | model MB | largest slice MB | "
        "time ratio | memory ratio, resident | anonymous | of the bound |"
    )
    print("|---|" + "---:|" * 11)
    for side, figures in results.items():
        how = side.split()[-1]
        base = results.get(f"transformers {how}" if how in ("float32", "nf4") else "transformers", {})
        ratios = (f"{figures[key] / base[key]:.2f}" if base else "" for key in ("seconds", "resident", "anonymous"))
        sizes = ("resident", "anonymous", "read", "model", "slice")
        megabytes = (f"{figures[key] / 2**20:,.0f}" if key in figures else "" for key in sizes)
        bound = (
            f"{figures['anonymous'] / (1.2 * figures['slice'] + figures['model']):.2f}" if "slice" in figures else ""
        )
        seconds = figures["seconds"]
        cells = (side, f"{seconds:.2f}", f"{size / 1e9 / seconds:.2f}", *megabytes, *ratios, bound)
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--preset", help="a shape of jpeft.models.presets in the place of this file's own")
    parser.add_argument("--layers", type=int, help="how many of them (12, or the preset's)")
    parser.add_argument("--sparse", action="store_true", help="zeros that take no place on the disk")
    parser.add_argument("--cold", action="store_true", help="from the disk, not from the page cache")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[*SIDES[:3], "jpeft nf4"])
    parser.add_argument("--folder", help="where the checkpoint is written (a temporary folder)")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    if options.worker:
        return print(json.dumps(load(options.worker[0], Path(options.worker[1]), options.cold)))
    folder = Path(tempfile.mkdtemp(prefix="jpeft-load-", dir=options.folder))
    try:
        size = write_checkpoint(folder, shape_of(options.preset, options.layers), 10**9, options.sparse)
        results = compare(
            folder, sorted(os.sched_getaffinity(0))[: options.cores], options.repeats, options.sides, options.cold
        )
    finally:
        shutil.rmtree(folder)
    show(results, size)
    if options.json:
        Path(options.json).write_text(json.dumps({"bytes": size, "sides": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
