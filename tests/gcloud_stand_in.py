# SPDX-License-Identifier: Apache-2.0
"""A stand-in for `gcloud`: it writes its calls down, keeps queued resources in a folder, and runs local processes.

A TPU VM is a folder with one home per worker, and its workers are shells on this machine with that home. They find each
other as processes of a Slurm job do, so `jax.distributed.initialize()` works in them as it does on a TPU.

python tests/gcloud_stand_in.py FOLDER WORKERS gcloud ARGUMENT ...   # what the script `gcloud` on PATH calls
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

#: Set in every process of a TPU VM; its value is the VM's folder, which no other process has.
MARK = "GCLOUD_STAND_IN_VM"


def install(folder: Path, workers: int = 2) -> Path:
    """Writes `gcloud` (and what a TPU VM has: gcsfuse, mountpoint, python3) into `folder`/bin, for PATH."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    scripts = {
        "gcloud": f'exec {sys.executable} {Path(__file__).resolve()} {folder} {workers} gcloud "$@"',
        "gcsfuse": f'mkdir -p "{folder}/buckets/$2"; rmdir "$3"; ln -s "{folder}/buckets/$2" "$3"',
        "mountpoint": '[ -L "$2" ]',
        "python3": f'mkdir -p "$3/bin"; cp "{programs}/pip" "$3/bin/pip"; cp "{programs}/python" "$3/bin/python"',
        "pip": f'echo "$@" >> "{folder}/pip.log"',
        "python": f'exec {sys.executable} "$@"',
        "jpeft": f"exec {sys.executable} -c 'from jpeft.train.program import run; run()' \"$@\"",
    }
    for name, body in scripts.items():
        script = programs / name
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
    return programs


def calls(folder: Path) -> list[list[str]]:
    """The arguments of all calls so far."""
    log = folder / "calls.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def preempt(folder: Path, name: str) -> None:
    """Takes a TPU away: its processes are killed, its disks are gone, its state is SUSPENDED."""
    for vm in sorted(folder.glob(f"vms/{name}*")):
        kill(vm)
        shutil.rmtree(vm)
    (folder / "resources" / name).write_text("SUSPENDED")


def kill(vm: Path) -> None:
    """Ends every process of a TPU VM, found by what its environment says."""
    mark = f"{MARK}={vm}\0".encode()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in environment.read_bytes() + b"\0":
                os.kill(int(environment.parent.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # gone meanwhile, or another user's


class Gcloud:
    """One call."""

    def __init__(self, folder: Path, workers: int, arguments: list[str]):
        self.folder, self.workers = folder, workers
        self.words = [a for a in arguments if not a.startswith("--")]
        options = [a[2:].partition("=") for a in arguments if a.startswith("--")]
        self.options = {name: value for name, _, value in options}

    def run(self) -> int:
        kind, verb = self.words[2:4]
        if kind == "queued-resources":
            return {"create": self.create, "describe": self.describe, "delete": self.delete}[verb]()
        return {"ssh": self.ssh, "scp": self.scp, "describe": self.address}[verb]()

    @property
    def resource(self) -> Path:
        return self.folder / "resources" / self.words[4]

    def create(self) -> int:
        if self.resource.exists():
            return self.error("ALREADY_EXISTS")
        count = int(self.options.get("node-count", 1))
        names = [f"{self.options['node-prefix']}-{i}" for i in range(count)] if count > 1 else [self.options["node-id"]]
        for name in names:
            for worker in range(self.workers):
                (self.folder / "vms" / name / f"worker-{worker}").mkdir(parents=True)
        self.resource.parent.mkdir(exist_ok=True)
        self.resource.write_text("WAITING_FOR_RESOURCES")
        return 0

    def describe(self) -> int:
        """The state; one that is waited for is ACTIVE at the next look."""
        if not self.resource.exists():
            return self.error("NOT_FOUND")
        state = self.resource.read_text()
        print(state)
        if state == "WAITING_FOR_RESOURCES":
            self.resource.write_text("ACTIVE")
        return 0

    def delete(self) -> int:
        if not self.resource.exists():
            return self.error("NOT_FOUND")
        for vm in sorted(self.folder.glob(f"vms/{self.resource.name}*")):
            kill(vm)
            shutil.rmtree(vm)
        self.resource.unlink()
        return 0

    def ssh(self) -> int:
        """The line on one worker or on all at once."""
        vm = self.folder / "vms" / self.words[4]
        if not vm.is_dir():
            return self.error("NOT_FOUND")
        started = [self.shell(vm, worker) for worker in self.chosen()]
        return max(process.wait() for process in started)

    def shell(self, vm: Path, worker: int) -> subprocess.Popen[bytes]:
        slurm = {
            "SLURM_JOB_ID": str(vm.stat().st_ino),  # of which the port is made
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_NTASKS": str(self.workers),
            "SLURM_PROCID": str(worker),
            "SLURM_LOCALID": "0",
        }
        environment = {**os.environ, **slurm, MARK: str(vm), "HOME": str(vm / f"worker-{worker}")}
        line = ["bash", "-c", self.options["command"]]
        return subprocess.Popen(line, env=environment, cwd=environment["HOME"])

    def scp(self) -> int:
        source, target = self.words[4:6]
        name, _, path = (source if ":" in source else target).partition(":")
        for worker in self.chosen():
            home = self.folder / "vms" / name / f"worker-{worker}"
            pair = (source, home / path) if ":" in target else (home / path.removeprefix("~/"), target)
            subprocess.run(["cp", "-r", *map(str, pair)], check=True)
        return 0

    def address(self) -> int:
        print("127.0.0.1")
        return 0

    def chosen(self) -> list[int]:
        worker = self.options["worker"]
        return [*range(self.workers)] if worker == "all" else [int(worker)]

    def error(self, what: str) -> int:
        print(f"ERROR: (gcloud) {what}: {' '.join(self.words[4:])}", file=sys.stderr)
        return 1


def main() -> None:
    folder, workers, _, *arguments = sys.argv[1:]
    with (Path(folder) / "calls.jsonl").open("a") as log:
        log.write(json.dumps(arguments) + "\n")
    if os.environ.get("GCLOUD_STATUS"):
        sys.exit(int(os.environ["GCLOUD_STATUS"]))
    if arguments[:2] == ["storage", "rsync"]:
        source = Path(folder) / "buckets" / arguments[-2].removeprefix("gs://")
        sys.exit(subprocess.run(["cp", "-r", f"{source}/.", arguments[-1]], check=False).returncode)
    sys.exit(Gcloud(Path(folder), int(workers), arguments).run())


def wait_for(condition, seconds: float, what: str) -> None:
    """Until `condition()`, but no longer than `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.1)


if __name__ == "__main__":
    main()
