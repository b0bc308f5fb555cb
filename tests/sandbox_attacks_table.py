# SPDX-License-Identifier: Apache-2.0
"""The attacks. Those that would do harm where nothing holds them (kill, bombs) are written so that they ask first."""

import platform

from sandbox_attacks import FOOLED, FOUR, Attack, body

_ALL = "assert all(f(x) == 2 * x for x in [2])"
_EXPECTED = "expected = [4]\nassert [f(2)] == expected"

FORGING = [
    Attack("an object that equals everything", """
class Same:
    def __eq__(self, other): return True
def f(x): return Same()
""", FOUR, FOOLED),
    Attack("an int that equals everything", """
class Same(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def f(x): return Same(5)
""", FOUR, FOOLED),
    Attack("a list of objects that equal everything", """
class Same:
    def __eq__(self, other): return True
def f(x): return [Same(), Same()]
""", "assert f(2) == [4, 4]", FOOLED),
    Attack("a str whose comparison lies", """
class Same(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def f(x): return Same("no")
""", "assert f(2) == 'yes'", FOOLED),
    Attack("a float near everything", """
class Near(float):
    def __rsub__(self, other): return 0.0
    def __sub__(self, other): return 0.0
def f(x): return Near(9)
""", "assert abs(f(2) - 4.0) < 1e-6", FOOLED),
    Attack("walks frames to the expected value", body("""
import sys
frame = sys._getframe()
while frame:
    if "expected" in frame.f_globals: return frame.f_globals["expected"][0]
    frame = frame.f_back
"""), _EXPECTED, FOOLED),
    Attack("walks frames and changes what is expected", body("""
import sys
frame = sys._getframe()
while frame:
    if "expected" in frame.f_globals: frame.f_globals["expected"][:] = [5]
    frame = frame.f_back
return 5
"""), _EXPECTED, FOOLED),
    Attack("finds what is expected among all objects", body("""
import gc, sys
for thing in gc.get_objects():
    if type(thing) is dict and "expected" in thing: thing["expected"][:] = [5]
return 5
"""), _EXPECTED, FOOLED),
    Attack("patches all()", body("""
import builtins
builtins.all = lambda values: True
return 5
"""), _ALL.replace("all(", "(lambda: __import__('builtins').all)()("), False),
    Attack("patches all() where it is loaded", "import builtins\nbuiltins.all = lambda *_: True\n" + body("return 5"),
           _ALL, FOOLED),
    Attack("patches math.isclose", body("""
import math
math.isclose = lambda *_, **__: True
return 5
"""), "import math\nvalue = f(2)\nassert math.isclose(value, 4)", FOOLED),
    Attack("ends the tests' loop by StopIteration", body("raise StopIteration"),
           "assert all(map(lambda x: f(x) == 4, [2]))", FOOLED),
    Attack("an exception that calls itself StopIteration", """
class StopIteration_(Exception): pass
StopIteration_.__name__ = "StopIteration"
def f(x): raise StopIteration_()
""", "assert all(map(lambda x: f(x) == 4, [2]))"),
    Attack("leaves with success", body("import os\nos._exit(0)"), FOUR, FOOLED),
    Attack("raises SystemExit", body("raise SystemExit(0)"), FOUR, FOOLED),
    Attack("raises KeyboardInterrupt", body("raise KeyboardInterrupt"), FOUR),
    Attack("writes a forged verdict to every descriptor", body("""
import os
line = b'{"dict":[["outcome","passed"],["detail",""],["calls",{"int":"0x1"}]]}\\n'
for number in range(64):
    try: os.write(number, line)
    except OSError: pass
return 5
"""), FOUR),
    Attack("writes the verdict while it is loaded", """
import os
for number in range(64):
    try: os.write(number, b'["passed"]\\n["ready"]\\n')
    except OSError: pass
def f(x): return 5
""", FOUR),
    Attack("answers a call that was not made", body("""
import os
for number in range(3, 64):
    try: os.write(number, b'[{"int":"0x7"},"value",{"int":"0x4"}]\\n')
    except OSError: pass
return 5
"""), FOUR),
    Attack("answers by a pickle", body("""
import os, pickle
class Run:
    def __reduce__(self): return (os.system, ("touch CANARY/pickled",))
line = pickle.dumps(Run(), 0).replace(b"\\n", b" ") + b"\\n"
for number in range(3, 64):
    try: os.write(number, line)
    except OSError: pass
return 5
"""), FOUR),
    Attack("answers by an unknown tag", body("""
import os
for number in range(3, 64):
    try: os.write(number, b'[{"int":"0x0"},"value",{"object":"builtins.object"}]\\n')
    except OSError: pass
return 5
"""), FOUR),
    Attack("patches the encoder", body("""
import sys
for name, module in list(sys.modules.items()):
    if "sandbox" in name and hasattr(module, "encode"): module.encode = lambda value: b'["passed"]\\n'
return 5
"""), FOUR),
    Attack("NaN", body("return float('nan')"), "assert abs(f(2) - 4) < 1e-6"),
    Attack("infinity", body("return float('inf')"), "assert abs(f(2) - 4) < 1e-6"),
    Attack("a whole number of a hundred million bits", body("return 1 << 10**8"), FOUR),
    Attack("a string of ten million letters", body("return 'x' * 10**7"), FOUR),
    Attack("a list a hundred thousand deep", body("""
value = []
for _ in range(10**5): value = [value]
return value
"""), FOUR),
    Attack("raw bytes a hundred thousand deep", body("""
import os
line = b"[" * 10**5 + b"]" * 10**5 + b"\\n"
for number in range(3, 64):
    try: os.write(number, line)
    except OSError: pass
return 5
"""), FOUR),
    Attack("a list in itself", body("value = []\nvalue.append(value)\nreturn value"), FOUR),
    Attack("a generator without end", body("import itertools\nreturn itertools.count()"), FOUR),
    Attack("an endless line", body("""
import os
while True:
    for number in range(3, 64):
        try: os.write(number, b"x" * 4096)
        except OSError: pass
"""), FOUR),
    Attack("closes every descriptor", body("import os\nos.closerange(0, 64)\nreturn 4"), FOUR),
    Attack("a crash", body("import ctypes\nctypes.string_at(0)"), FOUR),
    Attack("recursion without end", body("import sys\nsys.setrecursionlimit(10**9)\nreturn f(x)"), FOUR),
    Attack("an exception that cannot be read", """
class Broken(Exception):
    def __str__(self): raise SystemExit(0)
def f(x): raise Broken
""", FOUR),
    Attack("swallows what would stop it", body("""
import signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True:
    try: time.sleep(1)
    except BaseException: pass
"""), FOUR),
    Attack("never ends", body("while True: pass"), FOUR),
    Attack("waits for input", body("return input()"), FOUR),
    Attack("a flood of output", body("for _ in range(1000): print('x' * 10**6)\nreturn 5"), FOUR),
]  # fmt: skip

_SYSCALLS = {  # io_uring_setup, bpf, perf_event_open, userfaultfd, keyctl, memfd_create, process_vm_readv, setns
    "x86_64": {"io_uring": 425, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "keyctl": 250,
               "memfd_create": 319, "process_vm_readv": 310, "pidfd_open": 434, "landlock_create_ruleset": 444},
    "aarch64": {"io_uring": 425, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "keyctl": 219,
                "memfd_create": 279, "process_vm_readv": 270, "pidfd_open": 434, "landlock_create_ruleset": 444},
}[platform.machine()]  # fmt: skip


def _refused(number: int) -> str:
    """Done unless the kernel says EPERM or ENOSYS: another error says that the call was heard."""
    return body(f"""
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
found = libc.syscall({number}, 0, 0, 0, 0, 0, 0)
return "done" if found >= 0 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS) else ctypes.get_errno()
""")


def _quietly(text: str) -> str:
    """Lines that raise where they are held, then done."""
    return body(f"{text}\nreturn 'done'")


REACHING = [
    Attack("open() to write", _quietly("open('CANARY/new', 'w').write('x')"), fools=FOOLED),
    Attack("os.open to make a file", _quietly("import os\nos.open('CANARY/new', os.O_CREAT | os.O_WRONLY)"),
           fools=FOOLED),
    Attack("writes beside itself", _quietly("open('new', 'w').write('x')")),
    Attack("writes to /tmp", _quietly("open('/tmp/jpeft-sandbox-escaped', 'w').write('x')")),
    Attack("appends to a file", _quietly("open('CANARY/victim', 'a').write('x')"), fools=FOOLED),
    Attack("empties a file", _quietly("import os\nos.truncate('CANARY/victim', 0)"), fools=FOOLED),
    Attack("empties a file by opening it", _quietly("import os\nos.open('CANARY/victim', os.O_TRUNC)"), fools=FOOLED),
    Attack("removes a file", _quietly("import os\nos.unlink('CANARY/victim')"), fools=FOOLED),
    Attack("renames a file", _quietly("import os\nos.rename('CANARY/victim', 'CANARY/other')"), fools=FOOLED),
    Attack("changes a mode", _quietly("import os\nos.chmod('CANARY/victim', 0o600)"), fools=FOOLED),
    Attack("makes a folder", _quietly("import os\nos.mkdir('CANARY/new')"), fools=FOOLED),
    Attack("makes a symbolic link", _quietly("import os\nos.symlink('/etc/passwd', 'CANARY/new')"), fools=FOOLED),
    Attack("makes a hard link", _quietly("import os\nos.link('CANARY/victim', 'CANARY/new')"), fools=FOOLED),
    Attack("makes a fifo", _quietly("import os\nos.mkfifo('CANARY/new')"), fools=FOOLED),
    Attack("an unnamed file", _quietly("import os\nos.open('CANARY', os.O_TMPFILE | os.O_RDWR)")),
    Attack("fills the disk", body("""
done = 0
for number in range(1000):
    for folder in (".", "/tmp", "CANARY", "/dev/shm", "/var/tmp"):
        try: open(f"{folder}/fill{number}", "wb").write(b"x" * 2**20); done += 1
        except OSError: pass
return "done" if done else "none"
""")),
    Attack("reads a secret file", _quietly("assert open('CANARY/secret').read() == 'the secret'"), fools=FOOLED),
    Attack("reads /etc/passwd", _quietly("assert open('/etc/passwd').read()"), fools=FOOLED),
    Attack("reads /etc/shadow", _quietly("assert open('/etc/shadow').read()")),
    Attack("lists a home", _quietly("import os\nassert os.listdir('CANARY')"), fools=FOOLED),
    Attack("reads the environment", _quietly("import os\nassert os.environ['JPEFT_SECRET']"), fools=FOOLED),
    Attack("reads the judge's environment", _quietly(
        "import os\nassert b'SECRET' in open('/proc/PARENT/environ', 'rb').read()")),
    Attack("lists processes", _quietly("import os\nassert os.listdir('/proc')"), fools=FOOLED),
    Attack("opens its own memory", _quietly("open('/proc/self/mem', 'r+b', 0)"), fools=FOOLED),
    Attack("opens the judge's memory", _quietly("open('/proc/PARENT/mem', 'r+b', 0)")),
    Attack("opens its descriptors anew", _quietly("import os\nos.open('/proc/self/fd/1', os.O_WRONLY)"), fools=FOOLED),
    Attack("reloads os and runs a command", _quietly(
        "import importlib, os\nassert importlib.reload(os).system('touch CANARY/new') == 0"), fools=FOOLED),
    Attack("posix.system", _quietly("import posix\nassert posix.system('touch CANARY/new') == 0"), fools=FOOLED),
    Attack("posix_spawn", _quietly(
        "import os\nassert os.waitpid(os.posix_spawn('/bin/touch', ['touch', 'CANARY/new'], {}), 0)[1] == 0"),
        fools=FOOLED),
    Attack("subprocess", _quietly("import subprocess\nsubprocess.run(['touch', 'CANARY/new'], check=True)"),
           fools=FOOLED),
    Attack("system() of the C library", _quietly(
        "import ctypes\nassert ctypes.CDLL(None).system(b'touch CANARY/new') == 0"), fools=FOOLED),
    Attack("execv", _quietly("import os\nos.execv('/bin/true', ['true'])"), fools=FOOLED),
    Attack("fork", _quietly("import os\nif os.fork() == 0: os._exit(0)"), fools=FOOLED),
    Attack("a bomb of forks", body("""
import os
try: os.close(os.pidfd_open(os.getpid())) if False else None
except OSError: pass
made = 0
for _ in range(3):  # three that end at once say as much as a million
    if os.fork() == 0: os._exit(0)
    made += 1
return "done"
""")),
    Attack("multiprocessing", _quietly(
        "import multiprocessing\np = multiprocessing.get_context('fork').Process(target=print)\np.start()\np.join()"),
        fools=FOOLED),
    Attack("a thread", _quietly("import threading\nthreading.Thread(target=print).start()"), fools=FOOLED),
    Attack("a daemon in a session of its own", body("""
import os, time
if os.fork() == 0:
    os.setsid()
    time.sleep(30)
    os._exit(0)
return "done"
""")),
    Attack("setsid", _quietly("import os\nos.setsid()")),
    Attack("signals its starter", _quietly("import os\nos.kill(os.getppid(), 0)"), fools=FOOLED),
    Attack("signals the judge", _quietly("import os\nos.kill(PARENT, 0)"), fools=FOOLED),
    Attack("signals everyone", _quietly("import os\nos.kill(-1, 0)"), fools=FOOLED),
    Attack("has the kernel signal the judge", _quietly("import fcntl\nfcntl.fcntl(1, fcntl.F_SETOWN, PARENT)"),
           fools=FOOLED),
    Attack("reads the judge's limits", _quietly("import resource\nresource.prlimit(PARENT, resource.RLIMIT_NOFILE)"),
           fools=FOOLED),
    Attack("asks after the judge's processors", _quietly("import os\nos.sched_getaffinity(PARENT)"), fools=FOOLED),
    Attack("traces its starter", body("""
import ctypes, os
return "done" if ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0 else "held"
""")),
    Attack("connects to a port", _quietly("import socket\nsocket.create_connection(('127.0.0.1', PORT), 2)"),
           fools=FOOLED),
    Attack("listens on a port", _quietly("import socket\nsocket.create_server(('127.0.0.1', 0))"), fools=FOOLED),
    Attack("a datagram", _quietly(
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))"),
        fools=FOOLED),
    Attack("an abstract socket", _quietly("import socket\nsocket.socket(socket.AF_UNIX).bind('\\0jpeft')"),
           fools=FOOLED),
    Attack("a name server", _quietly("import socket\nassert socket.getaddrinfo('localhost', 80, socket.AF_INET)\n"
                                     "socket.socket()"), fools=FOOLED),
    Attack("ten gigabytes", _quietly("assert len(bytearray(10**10))")),
    Attack("raises its limits", _quietly(
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))")),
    Attack("shared memory", body("""
import ctypes
return "done" if ctypes.CDLL(None).shmget(0, 4096, 0o1777) >= 0 else "held"
"""), fools=FOOLED),
    Attack("another user namespace", body("""
import ctypes
return "done" if ctypes.CDLL(None).unshare(0x10000000) == 0 else "held"
""")),
    Attack("a mount", body("""
import ctypes
return "done" if ctypes.CDLL(None).mount(b"none", b"/tmp", b"tmpfs", 0, 0) == 0 else "held"
""")),
    Attack("gains privileges", _quietly("import os\nos.setuid(1234)")),
    *(Attack(f"the system call {name}", _refused(number)) for name, number in _SYSCALLS.items()),
    Attack("types at a terminal", _quietly("import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSTI, b'x')")),
    Attack("the numbers of x32", _refused(0x40000000 + 39)),
]  # fmt: skip

if platform.machine() == "x86_64":
    REACHING.append(
        Attack(
            "a call of 32 bits",
            body("""
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex("53b814000000cd805bc3"))  # getpid by int 0x80
place = ctypes.addressof(ctypes.c_char.from_buffer(code))
return "done" if ctypes.CFUNCTYPE(ctypes.c_int)(place)() > 0 else "held"
"""),
        )
    )
