# SPDX-License-Identifier: Apache-2.0
"""The house rules, read from the sources: who may import whom, what a file looks like, what is documented."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def _package() -> Path:
    spec = importlib.util.find_spec("jpeft")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


PACKAGE = _package()
FILES = {
    ".".join(("jpeft", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
TREES = {module: ast.parse(file.read_text()) for module, file in FILES.items()}
#: Every file that a person wrote, for the rules on text; those of the package are read where it is installed.
SOURCES = [
    *FILES.values(),
    *(f for folder in ("tests", "benchmarks", "examples") for f in sorted((ROOT / folder).rglob("*.py"))),
]
LIMIT = 400
#: The bottom: a method, a model or the core may build on these, which know nothing of them.
_BASE = "_given _method _site seams _projections _grouped _matching _fields _scope _dropout _stack _stream _rows _text"
_CODES = "_wide _freed _quantized _schemes _groups _nf4 _fused _fused_rule _fused_kernels _mersenne _neftune"
FOUNDATION = {f"jpeft.{name}" for name in f"{_BASE} {_CODES}".split()}
DISTRIBUTION = {"PIL": "pillow", "orbax": "orbax-checkpoint", "sklearn": "scikit-learn", "yaml": "pyyaml"}  # on PyPI


@dataclasses.dataclass(frozen=True)
class Import:
    """`source` imports the module `target`; `names` are what it takes out of it (none: the module itself)."""

    source: str
    target: str
    names: tuple[str, ...]
    executed: bool  # False under `if TYPE_CHECKING:`

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}" + (f" ({', '.join(self.names)})" if self.names else "")


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """The absolute name of what `from ... import` names, relative dots resolved."""
    if not node.level:
        return node.module or ""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for _ in range(node.level - 1):
        package = package.rpartition(".")[0]
    return ".".join(part for part in (package, node.module) if part)


def _imports(module: str) -> Iterator[Import]:
    """All imports of a module, those inside functions too."""
    typing_only = {
        id(inner)
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(TREES[module]):
        executed = id(node) not in typing_only
        if isinstance(node, ast.Import):
            yield from (Import(module, alias.name, (), executed) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            target = _absolute(module, node)
            submodules = [alias.name for alias in node.names if f"{target}.{alias.name}" in FILES]
            yield from (Import(module, f"{target}.{name}", (), executed) for name in submodules)
            names = tuple(alias.name for alias in node.names if alias.name not in submodules)
            if names:
                yield Import(module, target, names, executed)


IMPORTS = [edge for module in FILES for edge in _imports(module)]
INTERNAL = [edge for edge in IMPORTS if edge.target.split(".")[0] == "jpeft"]


def _part(module: str) -> str:
    """Which part of the package a module belongs to."""
    if module == "jpeft":
        return "root"
    top = module.split(".")[1]
    if top in ("methods", "models", "train", "io"):
        return top
    return "foundation" if module in FOUNDATION else "core"


def _concrete_methods() -> set[str]:
    return {module for module in FILES if re.fullmatch(r"jpeft\.methods\.[a-z]\w*", module)}


def _refuse(edges: list[Import], rule: str) -> None:
    assert not edges, f"{rule}:\n" + "\n".join(f"  {edge}" for edge in edges)


# ------------------------------------------------------------------------------------------------ who may import whom


def test_the_sources_are_found():
    assert {
        "jpeft",
        "jpeft.seams",
        "jpeft._adapt",
        "jpeft.methods.lora",
        "jpeft.models.bert",
        "jpeft.train.cli",
    } <= set(FILES)
    assert set(FILES) >= FOUNDATION
    assert {str(edge) for edge in INTERNAL} >= {
        "jpeft.methods.lora -> jpeft.seams",
        "jpeft.models.bert -> jpeft._stack",
    }


def test_the_foundation_imports_only_itself():
    _refuse(
        [e for e in INTERNAL if _part(e.source) == "foundation" and _part(e.target) != "foundation"],
        "the foundation knows nothing above it",
    )


def test_a_method_imports_the_foundation_and_no_other_method():
    def allowed(edge):
        private = re.fullmatch(r"jpeft\.methods\._\w+", edge.target)
        return _part(edge.target) == "foundation" or private or edge.source == "jpeft.methods"

    _refuse(
        [e for e in INTERNAL if _part(e.source) == "methods" and not allowed(e)],
        "a method stands on the foundation alone",
    )


def test_a_model_imports_the_foundation_and_no_other_model():
    def allowed(edge):
        private = re.fullmatch(r"jpeft\.models\._\w+", edge.target)
        below = edge.target in FOUNDATION - {"jpeft._method"}
        return below or private or edge.source == "jpeft.models"

    _refuse(
        [e for e in INTERNAL if _part(e.source) == "models" and not allowed(e)], "a model stands on the seams alone"
    )


def test_private_model_files_import_no_model():
    _refuse(
        [
            e
            for e in INTERNAL
            if re.match(r"jpeft\.models\._", e.source) and re.match(r"jpeft\.models(\.[a-z]|$)", e.target)
        ],
        "what models share knows no model",
    )


def test_the_core_names_no_concrete_method_and_no_model():
    """Adapters' files (`io`) may read the models' tables of names, which know no method and no model either."""

    def broken(edge):
        if _part(edge.source) not in ("core", "io"):
            return False
        if edge.target == "jpeft.methods":
            return set(edge.names) - {"METHODS"}
        tables = _part(edge.source) == "io" and re.fullmatch(r"jpeft\.models(\._\w+)?", edge.target)
        return edge.target in _concrete_methods() or (_part(edge.target) == "models" and not tables)

    _refuse([e for e in INTERNAL if broken(e)], "the core finds methods in METHODS and sees models through seams")


def test_the_core_names_no_method_class():
    methods = {
        node.name
        for module in _concrete_methods()
        for node in TREES[module].body
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Method") for base in node.bases)
    }
    assert "LoRA" in methods
    named = [
        f"{module}:{node.lineno} {node.id}"
        for module in FILES
        if _part(module) in ("core", "foundation")
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Name) and node.id in methods
    ]
    assert not named


def test_only_the_program_imports_the_program():
    _refuse(
        [
            e
            for e in INTERNAL
            if _part(e.target) == "train" and _part(e.source) != "train" and (e.source != "jpeft" or e.executed)
        ],
        "train stands on top",
    )


def test_nothing_below_the_program_imports_the_public_surface():
    _refuse(
        [e for e in INTERNAL if e.target == "jpeft" and _part(e.source) != "train"],
        "inside the package, import from the file that defines the name",
    )


def test_no_import_cycle():
    """Neither at import time nor through an import hidden in a function."""
    graph = {module: {e.target for e in INTERNAL if e.source == module and e.executed} - {module} for module in FILES}
    finished: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, "import cycle: " + " -> ".join((*above[above.index(module) :], module))
        if module not in finished:
            for target in sorted(graph.get(module, ())):
                visit(target, (*above, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


# ---------------------------------------------------------------------------------------------- what may be imported


def _distribution(requirement: str) -> str:
    name, *_ = re.split(r"[\s<>=!~\[;]", requirement)
    return name.lower().replace("_", "-")


def _foreign() -> list[Import]:
    return [e for e in IMPORTS if (top := e.target.split(".")[0]) != "jpeft" and top not in sys.stdlib_module_names]


def test_torch_and_peft_are_imported_nowhere():
    _refuse(
        [
            e
            for e in IMPORTS
            if e.target.split(".")[0] in ("torch", "peft", "torchvision", "sentence_transformers", "accelerate")
        ],
        "PyTorch is what the tests compare with",
    )


def test_transformers_is_imported_by_the_program_only():
    _refuse(
        [e for e in IMPORTS if e.target.split(".")[0] == "transformers" and _part(e.source) != "train"],
        "transformers reads tokenizers, in the program",
    )


def test_every_foreign_import_is_a_declared_dependency():
    core = {_distribution(r) for r in PROJECT["dependencies"]}
    program = core | {_distribution(r) for e in "hub train eval harness".split() for r in EXTRAS[e]}

    def declared(edge: Import) -> bool:
        name = DISTRIBUTION.get(top := edge.target.split(".")[0], top).replace("_", "-").lower()
        return name in (program if _part(edge.source) == "train" or edge.source == "jpeft.models._hub" else core)

    _refuse([e for e in _foreign() if not declared(e)], "not declared in pyproject.toml for this part of the package")


def test_every_direct_dependency_is_pinned_to_the_tested_version():
    pinned = {_distribution(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    asked = [*PROJECT["dependencies"], *(r for extra in EXTRAS.values() for r in extra)]
    assert {_distribution(r) for r in asked} - {"jpeft"} - pinned == set()


# ------------------------------------------------------------------------------------------- what a file looks like


def _ids(file: Path) -> str:
    return str(file.relative_to(PACKAGE.parent if file.is_relative_to(PACKAGE) else ROOT))


@pytest.mark.parametrize("file", SOURCES, ids=_ids)
def test_a_file_follows_the_conventions(file):
    text = file.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= LIMIT, f"more than {LIMIT} lines: one idea per file"
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(tree), "no module docstring"
    lines = [ast.unparse(node) for node in tree.body]
    assert "from __future__ import annotations" not in lines, "jaxtyping needs the types"
    assert not re.search("|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")), text), (
        "unfinished work is marked in the file"
    )
    assert not re.search(r"^(utils?|helpers?|commons?|misc)$", file.stem.strip("_")), "a name that says nothing"
    assert not re.search(r"#\s*(noqa|type: ignore|pyright: ignore)(?![:\[])", text), "an ignore must name its rule"


@pytest.mark.parametrize("file", SOURCES, ids=_ids)
def test_no_class_is_a_base_or_a_manager_and_no_error_is_swallowed(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef):
            assert not re.match(r"_?Base[A-Z]|.*Manager$", node.name), node.name
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            assert raises or caught not in ("everything", "Exception", "BaseException"), (
                f"line {node.lineno} hides errors"
            )


@pytest.mark.parametrize("file", [f for f in SOURCES if f.is_relative_to(ROOT / "tests")], ids=_ids)
def test_a_test_is_skipped_only_where_data_is_absent(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and re.search(r"\b(skip|skipif|xfail|importorskip)$", ast.unparse(node.func)):
            assert "absent" in ast.unparse(node), f"line {node.lineno}: a test that does not run proves nothing"


def test_the_links_at_the_root_lead_into_the_package():
    for name in ("models", "train"):
        assert (ROOT / name).is_symlink()
        assert (ROOT / name).readlink() == Path("jpeft") / name


# ------------------------------------------------------------------------------------------------ the public surface


def _public() -> list[str]:
    import jpeft

    return list(jpeft.__all__)


@pytest.mark.parametrize("name", _public())
def test_a_public_name_exists_and_is_documented(name):
    import jpeft

    value = getattr(jpeft, name)
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    assert any(re.search(rf"\bjpeft\.{name}\b|`{name}\b", page.read_text()) for page in pages), (
        "in no page of README and docs"
    )
    if inspect.ismodule(value) or inspect.isclass(value) or inspect.isroutine(value):
        doc = inspect.getdoc(value) if not inspect.isclass(value) else value.__dict__.get("__doc__")
        assert doc, "no docstring"
        assert not doc.startswith(f"{name}("), "the docstring is the one that dataclass wrote"
    else:  # a constant: documented where it is defined
        defined = [f.read_text() for f in FILES.values() if re.search(rf"^{name}\b.*=", f.read_text(), re.MULTILINE)]
        assert any(re.search(rf"^#: .*(\n#.*)*\n{name}\b", text, re.MULTILINE) for text in defined), (
            "no `#:` comment above it"
        )


def test_the_lazy_names_are_what_type_checkers_see():
    seen = {
        name
        for e in INTERNAL
        if e.source == "jpeft" and not e.executed
        for name in (e.names or (e.target.split(".")[-1],))
    }
    methods = {"METHODS", *(method.__name__ for method in importlib.import_module("jpeft").METHODS.values())}
    assert sorted(_public()) == sorted(seen - {"*"} | methods)


def test_the_version_is_the_distributions():
    import jpeft

    assert jpeft.__version__ == PROJECT["version"]


HELP = """
import sys
from jpeft.train.cli import main
sys.argv = ["jpeft", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "datasets", "sklearn", "matplotlib"}
assert not heavy & set(sys.modules), sorted(heavy & set(sys.modules))
"""


def test_help_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("train", "predict", "merge", "demo"):
        assert command in done.stdout
