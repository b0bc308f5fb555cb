# SPDX-License-Identifier: Apache-2.0
"""A stand-in for Slurm's `srun` and `scontrol`: as many local processes as the batch script asks for, one a task.

python tests/slurm_stand_in.py FOLDER TASKS srun [OPTION ...] COMMAND ...   # what the script `srun` on PATH calls

A file `FOLDER/time-is-up` stands for the end of the job's time: every task gets SIGTERM, as by `--signal=TERM@...`.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path


def install(folder: Path, batch: Path) -> Path:
    """Writes `srun` and `scontrol` into `folder`/bin, for PATH; the batch script says how many tasks there are."""
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", batch.read_text(), re.MULTILINE))
    tasks = int(options["nodes"]) * int(options["ntasks-per-node"])
    programs = folder / "bin"
    programs.mkdir(parents=True)
    scripts = {
        "srun": f'exec {sys.executable} {Path(__file__).resolve()} {folder} {tasks} srun "$@"',
        "scontrol": f'echo "$@" >> "{folder}/scontrol.log"',
        "jpeft": f"exec {sys.executable} -c 'from jpeft.train.program import run; run()' \"$@\"",
        "activate": "",
    }
    for name, body in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    return programs


def main() -> None:
    """Runs the command in every task; the first that ends leaves the others as long as `--wait` says."""
    folder, tasks, _, *words = sys.argv[1:]
    options = {word for word in words if word.startswith(("--kill", "--wait"))}
    command = [word for word in words if word not in options]
    assert "--kill-on-bad-exit=0" in options, "the first to be interrupted would have the others killed"
    (wait,) = (float(word.partition("=")[2]) for word in options if word.startswith("--wait="))
    shared = {
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": tasks,
        "SLURM_LOCALID": "0",
    }
    running = [
        subprocess.Popen(command, env={**os.environ, **shared, "SLURM_PROCID": str(task)}) for task in range(int(tasks))
    ]
    told, end, first = False, Path(folder) / "time-is-up", None
    while any(task.poll() is None for task in running):
        if end.exists() and not told:
            told = True
            for task in running:
                task.send_signal(signal.SIGTERM)
        if first is None and any(task.poll() is not None for task in running):
            first = time.monotonic()
        if first is not None and time.monotonic() > first + wait:
            for task in running:
                task.kill()
        time.sleep(0.1)
    sys.exit(max(128 - task.returncode if task.returncode < 0 else task.returncode for task in running))


if __name__ == "__main__":
    main()
