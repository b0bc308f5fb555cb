# SPDX-License-Identifier: Apache-2.0
"""`jpeft plan`: its arguments, and what it prints. JAX is imported when a plan is made."""

import argparse
import dataclasses
import json
from typing import Any, get_args

from .. import _yaml
from ..config import ConfigError
from ..sections import Optimizer
from ..sections.model import SEEING, Scheme
from ..sections.optimizer import RULES
from . import devices
from .request import TASKS, Request

_EXAMPLES = """
examples:
  jpeft plan --model llama-2-7b --batch 8 --seq 512 --remat full --topology v5e-8
  jpeft plan --model llama-3-70b --quantize nf4 --topology v5p:2x4x4 --batch 32 --seq 2048 --remat full
  jpeft plan --model runs/base --method prefix_tuning --set num_tokens=32 --device a100 --no-compile
"""


def add_arguments(plan: argparse.ArgumentParser) -> None:
    """What is planned."""
    plan.epilog, plan.formatter_class = _EXAMPLES, argparse.RawDescriptionHelpFormatter
    plan.add_argument("--model", required=True, metavar="NAME", help="a preset, a Hugging Face folder or a config.json")
    plan.add_argument("--method", default="lora", metavar="KIND", help="one of jpeft.METHODS (lora)")
    plan.add_argument("--rank", type=int, metavar="R", help="of the method")
    plan.add_argument("--targets", metavar="NAMES", help="of the method: all-linear, or names with commas")
    plan.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="another option of the method")
    plan.add_argument("--task", default="CAUSAL_LM", choices=TASKS, help="(CAUSAL_LM)")
    plan.add_argument("--batch", type=int, default=None, metavar="ROWS", help="over all devices (one each)")
    plan.add_argument("--seq", type=int, metavar="TOKENS", help="of a row of text (512)")
    plan.add_argument("--target-seq", type=int, metavar="TOKENS", help="of a row's target, for SEQ_2_SEQ_LM (as --seq)")
    plan.add_argument("--accumulation", type=int, default=1, metavar="N", help="micro-batches an update (1)")
    plan.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="(bfloat16)")
    plan.add_argument(
        "--remat", default="none", choices=("none", "dots", "full", "names", "offload"), help="what layers keep (none)"
    )
    plan.add_argument("--quantize", choices=get_args(Scheme), help="of the base's linear layers")
    plan.add_argument("--mesh", metavar="AXES", help="such as fsdp=4,tensor=2 (fsdp over all devices)")
    plan.add_argument(
        "--uneven", default="refuse", choices=("refuse", "whole"), help="weights that the mesh does not divide (refuse)"
    )
    where = plan.add_mutually_exclusive_group()
    where.add_argument("--topology", metavar="SLICE", help="TPUs: v5e:2x4, or v5e-8 as Google names it")
    where.add_argument("--device", default="cpu", metavar="KIND", help=f"{', '.join(devices.CHIPS)} (cpu)")
    plan.add_argument("--devices", type=int, default=1, metavar="N", help="how many of --device (1)")
    plan.add_argument("--slices", type=int, default=1, metavar="N", help="of a pod, or hosts, joined by dcn axes (1)")
    plan.add_argument("--optimizer", default="adamw", choices=tuple(RULES), help="(adamw)")
    plan.add_argument("--offload", action="store_true", help="the optimizer's state in the host's memory")
    plan.add_argument("--ema", action="store_true", help="a moving average of what is trained")
    plan.add_argument("--generate", type=int, default=0, metavar="TOKENS", help="count a cache of so many tokens a row")
    plan.add_argument("--share", type=float, default=0.4, metavar="X", help="of the peak that products reach (0.4)")
    plan.add_argument("--no-compile", action="store_true", help="by shape alone")
    plan.add_argument("--effort", default="O0", choices=("O0", "O1", "full"), help="of the compiler (O0, the quickest)")
    plan.add_argument("--json", action="store_true", help="as JSON")


def run(options: argparse.Namespace) -> None:
    """Prints a plan.

    Raises:
      ValueError, OSError: what is asked cannot be planned.
    """
    request = request_of(options)
    import jax

    jax.config.update("jax_platforms", "cpu")  # a plan runs nothing, and takes no accelerator from anyone
    if request.machine.chip.platform == "cpu" and request.machine.count > 1:
        jax.config.update("jax_num_cpu_devices", request.machine.count)
    from . import advice, compiling, report
    from .estimate import estimate
    from .subject import of_images

    request = of_images(request) if request.task in SEEING else request
    found = estimate(request)
    program = None
    if not options.no_compile and request.machine.chip.platform != "cuda":
        effort = None if options.effort == "full" or request.machine.chip.platform == "cpu" else options.effort
        program = compiling.compiled(request, effort=effort)
    has = request.machine.chip.memory
    needed = found.memory.total if program is None else program.total
    other = advice.changes(request) if has is not None and needed > has else []
    if options.json:
        print(json.dumps(report.values(found, program, other), indent=2))
    else:
        print(report.lines(found, program, other))


def request_of(options: argparse.Namespace) -> Request:
    """What the arguments ask.

    Raises:
      ConfigError, ValueError: an argument has a value that cannot be.
    """
    if options.task in SEEING and options.seq is not None:
        raise ConfigError(f"--seq is of texts; what a model for {options.task} reads has the size of its images")
    if options.topology is not None:
        if options.devices != 1:
            raise ConfigError("--topology says how many devices there are; leave --devices out")
        machine = devices.topology(options.topology)
        machine = dataclasses.replace(machine, count=machine.count * options.slices, slices=options.slices)
    else:
        machine = devices.machine(options.device, options.devices)
        machine = dataclasses.replace(machine, slices=options.slices)
    if options.uneven == "whole" and machine.count == 1:
        raise ConfigError("--uneven whole is of a mesh, and the machine is one device")
    return Request(
        model=options.model,
        method=_method(options),
        machine=machine,
        mesh=options.mesh,
        uneven=options.uneven,
        task=options.task,
        batch=machine.count if options.batch is None else options.batch,
        seq=512 if options.seq is None else options.seq,
        target_seq=options.target_seq,
        accumulation=options.accumulation,
        dtype=options.dtype,
        remat=options.remat,
        quantize=options.quantize,
        generate=options.generate,
        share=options.share,
        optimizer=Optimizer(name=options.optimizer, offload=options.offload),
        ema=options.ema,
    )


def _method(options: argparse.Namespace) -> dict[str, Any]:
    method: dict[str, Any] = {"kind": options.method}
    if options.rank is not None:
        method["rank"] = options.rank
    if options.targets is not None:
        names = [name.strip() for name in options.targets.split(",")]
        if not all(names):
            raise ConfigError(f"--targets takes all-linear, or names with commas between them, got {options.targets!r}")
        method["targets"] = names if len(names) > 1 or names[0] != "all-linear" else names[0]
    for option in options.set:
        name, equals, value = option.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set takes OPTION=VALUE, got {option!r}")
        if name in method:
            raise ConfigError(f"--set {option}: the method has {name}={method[name]} already; give it once")
        method[name] = _yaml.read(value)
    return method
