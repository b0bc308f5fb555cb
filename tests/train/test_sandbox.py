# SPDX-License-Identifier: Apache-2.0
"""The sandbox against what tries to get out of it, and with what is honest in it."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import sandbox_attacks
from sandbox_attacks import load

from jpeft.train.sandbox import _seccomp, _syscalls
from jpeft.train.sandbox._values import MOST_DEEP, ValueRefused, decode, encode
from jpeft.train.sandbox.box import NEEDED, Problem, Sandbox

pytestmark = pytest.mark.usefixtures("confined")

ROOT = Path(__file__).parents[2]
ATTACKS = load()
ADD = Problem("def f(x):\n    return x + 2", "f", "assert f(1) == 3")


def others_python() -> str | None:
    """An interpreter that any user may start."""
    for path in (sys.executable, "/usr/bin/python3"):
        try:
            if as_nobody([path, "-c", "import sys; assert sys.version_info >= (3, 11)"]).returncode == 0:
                return path
        except OSError:
            continue
    return None


def as_nobody(command):
    """A command run as the user 65534."""
    return subprocess.run(
        command, user=65534, group=65534, extra_groups=[], capture_output=True, text=True, check=False, cwd="/"
    )


@pytest.fixture(scope="module", params=["as myself", pytest.param("as nobody", marks=pytest.mark.slow)])
def found(request, tmp_path_factory):
    """What became of every attack."""
    if request.param == "as myself":
        return sandbox_attacks.run(tmp_path_factory.mktemp("attacks") / "run", ATTACKS)
    if os.getuid() != 0:
        pytest.skip("absent: the right to become another user, which root has")
    python = others_python()
    if python is None:
        pytest.skip("absent: a Python of 3.11 or newer that another user may start")
    folder = f"/tmp/jpeft-attacks-{os.getpid()}"
    done = as_nobody([python, str(ROOT / "tests" / "sandbox_attacks.py"), folder])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [attack.name for attack in ATTACKS])
def test_an_attack_is_held(found, name):
    assert not found[name]["passed"], found[name]
    assert not found[name]["touched"], found[name]


def test_attacks_leave_nothing_behind(found):
    assert found["left"] == []
    assert found["processes"] == []
    assert not found["connected"]
    assert all(not found["layers"][layer].startswith("missing") for layer in NEEDED)


@pytest.mark.parametrize("attack", [a for a in ATTACKS if a.fools], ids=lambda attack: attack.name)
def test_the_attack_works_where_nothing_holds_it(attack, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert sandbox_attacks.fooled(attack, tmp_path, server.getsockname()[1])


# ------------------------------------------------------------------------------------------------ what is honest


def humaneval(data, every):
    rows = [json.loads(line) for line in (data / "humaneval" / "test.jsonl").read_text().splitlines()]
    return [
        Problem(
            row["prompt"] + row["canonical_solution"],
            row["entry_point"],
            f"{row['test']}\ncheck({row['entry_point']})",
            row["prompt"] + "    pass\n",
        )
        for row in rows[::every]
    ]


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_canonical_solutions_pass(data, every):
    problems = humaneval(data, every)
    verdicts = list(Sandbox(seconds=60.0).judge_all(problems))
    assert [v for v in verdicts if not v.passed] == []
    assert len(verdicts) == -(-164 // every)


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_a_wrong_solution_does_not(data, every):
    problems = humaneval(data, every)
    wrong = [Problem(f"def {p.entry_point}(*_):\n    return 'no'", p.entry_point, p.tests, p.setup) for p in problems]
    assert [v for v in Sandbox(seconds=60.0).judge_all(wrong) if v.passed] == []


def test_values_and_exceptions_cross_as_they_are():
    program = """
def f(x):
    if x == "raise":
        raise ValueError("as asked")
    return x
"""
    tests = """
import math
for value in (None, True, -7, 10**400, 0.1, -0.0, 1j, "\\ud800\\n", b"\\0\\xff", [1, [2]], (1,), {1, "a"},
              frozenset({2}), {(1, 2): [None], "k": {}}, float("inf")):
    got = f(value)
    assert got == value and type(got) is type(value), value
assert math.isnan(f(float("nan"))) and math.copysign(1, f(-0.0)) == -1
assert f(x=3) == 3
try:
    f("raise")
except ValueError as error:
    assert "as asked" in str(error)
else:
    assert False
"""
    verdict = Sandbox().judge(Problem(program, "f", tests))
    assert verdict.passed, verdict
    assert verdict.calls == 19


@pytest.mark.parametrize(
    "problem, outcome, detail",
    [
        (Problem("def g(): pass", "f", "f()"), "broken", "KeyError"),
        (Problem("def f(:", "f", "f()"), "broken", "SyntaxError"),
        (Problem("def f(): return object()", "f", "f()"), "failed", "a value of type object"),
        (Problem("def f(): return 1", "f", "assert f() == 2, 'two'"), "failed", "AssertionError: two"),
        (Problem("def f(): return 1", "f", "pass"), "failed", "never called f"),
        (Problem("def f(): return 1", "f", "f(print)"), "failed", "builtin_function_or_method"),
        (Problem("#" * 2**21, "f", "f()"), "broken", "bytes"),
    ],
)
def test_a_verdict_says_why(problem, outcome, detail):
    verdict = Sandbox().judge(problem)
    assert (verdict.outcome, verdict.passed) == (outcome, False)
    assert detail in verdict.detail


def test_a_message_is_a_value_or_an_error():
    wrong = ("1", "1.5", "NaN", "{}", '{"a":1,"b":2}', '{"int":"1.0"}', '{"set":[[]]}', '{"dict":[1]}', "\xff")
    for line in wrong:
        with pytest.raises(ValueRefused):
            decode(line.encode("latin-1"))
    deep = []
    for _ in range(MOST_DEEP + 1):
        deep = [deep]
    with pytest.raises(ValueRefused, match="deep"):
        encode(deep)
    with pytest.raises(ValueRefused, match="deep"):
        decode(b"[" * 70 + b"]" * 70)


# ------------------------------------------------------------------------------------------------ layers that lack


def under(*steps, run="box.judge(ADD)", setup=""):
    """(exit code, output) of a process whose kernel refuses what a filter says, and that uses the sandbox then."""
    machine = os.uname().machine
    source = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
import ctypes
from jpeft.train.sandbox import _seccomp
from jpeft.train.sandbox._linux import prctl
from jpeft.train.sandbox.box import Problem, Sandbox
{setup}
steps = [_seccomp.Instruction(*step) for step in {[tuple(step) for step in steps]!r}]
_seccomp.program = lambda machine, pid: steps
prctl(38, 1)
_seccomp.install()
box, ADD = Sandbox(), Problem("def f(x): return x + 2", "f", "assert f(1) == 3")
print({run})
"""
    assert machine in _syscalls.ARCHITECTURES
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def refusing(number, error, argument=None):
    """A filter that refuses one call, or that call with a first argument."""
    load, equal, leave = _seccomp._LOAD, _seccomp._EQUAL, _seccomp._RETURN
    only = [] if argument is None else [(load, 0, 0, 16), (equal, 0, 1, argument)]
    return [
        (load, 0, 0, 0),
        (equal, 0, len(only) + 1, number),
        *only,
        (leave, 0, 0, _seccomp._ERRNO | error),
        (leave, 0, 0, _seccomp._ALLOW),
    ]


X86 = os.uname().machine == "x86_64"


@pytest.mark.parametrize(
    "filter, layer",
    [
        (refusing(444, 38), "landlock"),
        (refusing(157 if X86 else 167, 22, argument=22), "system calls"),
        (refusing(302 if X86 else 261, 1), "limits"),
    ],
)
def test_without_a_needed_layer_nothing_is_run(filter, layer):
    code, said = under(*filter)
    assert code != 0
    assert re.search(rf"Unconfined: code of a model is not run here, for a layer.*: {layer} \(missing", said), said


def test_where_namespaces_are_not_allowed_the_rest_holds():
    attack = 'box.judge(Problem("def f(x):\\n import socket\\n socket.socket()", "f", "f(1)"))'
    code, said = under(*refusing(272 if X86 else 97, 1), run=f"box.layers(), box.judge(ADD), {attack}")
    assert code == 0, said
    assert "'namespaces': 'missing: Operation not permitted'" in said
    assert "passed=True" in said
    assert "PermissionError" in said


JAIL = """#!/bin/sh
echo "$@" > {log}
while [ "$1" != -- ]; do shift; done
shift
exec "$@"
"""


@pytest.mark.parametrize("name", ["bwrap", "nsjail"])
def test_a_jail_is_used_where_one_works(name, tmp_path, monkeypatch):
    """With a stand-in that runs what stands behind `--`: the command line is tested, not the tool."""
    tool, log = tmp_path / name, tmp_path / "log"
    tool.write_text(JAIL.format(log=log))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    box = Sandbox()
    assert box.layers()["jail"] == str(tool)
    assert box.layers()["namespaces"] == "the jail's"
    assert box.judge(ADD).passed
    assert ("--ro-bind" if name == "bwrap" else "--bindmount_ro") in log.read_text()
    assert "/etc " not in log.read_text()
    assert Sandbox(jail=False).layers()["jail"].startswith("missing")


def test_a_jail_that_does_not_run_is_named_and_left(tmp_path, monkeypatch):
    tool = tmp_path / "bwrap"
    tool.write_text("#!/bin/sh\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    box = Sandbox()
    assert f"{tool} does not run here" in box.layers()["jail"]
    assert box.layers()["landlock"].startswith("version")
    assert box.judge(ADD).passed


@pytest.mark.parametrize(
    "machine, header",
    [("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "/usr/include/asm-generic/unistd.h")],
)
def test_numbers_of_system_calls_are_the_kernels(machine, header):
    if not Path(header).exists():
        pytest.skip(f"the kernel's headers are absent: no {header}")
    said = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text()))
    said |= {"newfstatat": said.get("newfstatat", said.get("fstatat"))}
    wrong = {n: number for n, number in _syscalls.names(machine).items() if said.get(n) != str(number)}
    assert not wrong
