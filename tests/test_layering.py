"""The import rules of the code base, held by reading every file's syntax tree."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vision_scan", "cobra", "train", "eval")

# Belong to extras or load slowly: imported by the function that needs them, never with the package.
LAZY = {
    "av", "causal_conv1d", "datasets", "deepspeed", "fastapi", "fla", "gguf", "mamba_ssm", "matplotlib", "peft",
    "pypdfium2", "sklearn", "skimage", "timm", "tokenizers", "transformers", "triton", "trl", "uvicorn", "wandb",
}  # fmt: skip


class Import(NamedTuple):
    """An imported module: dotted name, line, and whether importing the file imports it."""

    module: str
    line: int
    at_top: bool


def imports(source: str, package: str = "") -> Iterator[Import]:
    """Every import in a file of `package`: statements, and import_module / __import__ of a string.

    `from a import b` gives both a and a.b. Blocks under `if TYPE_CHECKING:` never run and give
    nothing; the bodies of functions do not run as the file is imported.
    """
    yield from _imports(ast.parse(source), package, at_top=True)


def _imports(node: ast.AST, package: str, at_top: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.orelse:
                yield from _imports(ast.Module([statement], []), package, at_top)
            continue
        if isinstance(child, ast.Import | ast.ImportFrom | ast.Call):
            yield from (Import(name, child.lineno, at_top) for name in _modules(child, package))
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports(child, package, at_top and not is_function)


def _modules(node: ast.Import | ast.ImportFrom | ast.Call, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
        return [base, *(f"{base}.{alias.name}" for alias in node.names)]
    called = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
    is_dynamic = called in ("import_module", "__import__")
    names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
    return [str(name) for name in names if is_dynamic]


def found() -> Iterator[tuple[str, Import]]:
    """(file, import) over the packages; the file relative to the root, with forward slashes."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            file = path.relative_to(ROOT)
            for one in imports(path.read_text(encoding="utf-8"), ".".join(file.parent.parts)):
                yield file.as_posix(), one


def breaches(is_breach) -> list[str]:
    return [f"{file}:{one.line} imports {one.module}" for file, one in found()
            if is_breach(file, one.module.split(".")[0], one)]


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("vision_scan", {"cobra", "train", "eval"}),
        ("cobra", {"train", "eval"}),
        ("train", {"eval"}),
    ],
)
def test_packages_depend_downwards(package, forbidden):
    assert not breaches(lambda file, top, _: file.startswith(f"{package}/") and top in forbidden)


def test_references_import_torch_only():
    def is_breach(file: str, top: str, one: Import) -> bool:
        own = one.module.startswith("vision_scan.ops.reference")
        allowed = own or top == "torch" or top in sys.stdlib_module_names
        return file.startswith("vision_scan/ops/reference/") and not allowed

    assert not breaches(is_breach)


@pytest.mark.parametrize(
    ("module", "home"),
    [
        ("deepspeed", "train/engine.py"),
        ("fla", "vision_scan/ops/cuda/gated_delta_rule.py"),
        ("peft", "train/lora.py"),
        ("wandb", "train/metrics.py"),
        ("trl", "tests"),  # whoever trains with it imports it
    ],
)
def test_module_has_one_home(module, home):
    assert not breaches(lambda file, top, _: top == module and file != home)


def test_only_ablations_import_train():
    def is_breach(file: str, top: str, _: Import) -> bool:
        return top == "train" and not file.startswith("train/") and file != "eval/ablations/trials.py"

    assert not breaches(is_breach)


# Written in FastAPI's terms from end to end; what needs a server imports them inside of a function.
WEB = {f"cobra/serve/{name}.py": f"cobra.serve.{name}" for name in ("app", "errors", "limits", "messages")}
HF = "cobra/hf/"  # in transformers' terms likewise


def test_optional_packages_are_imported_where_they_are_used():
    def is_home(file: str) -> bool:
        return file in WEB or file.startswith(HF)

    def is_breach(file: str, top: str, one: Import) -> bool:
        return file.startswith(("cobra/", "vision_scan/")) and one.at_top and top in LAZY and not is_home(file)

    def begins_the_web(file: str, top: str, one: Import) -> bool:
        begins = one.module in WEB.values() or f"{one.module}.".startswith("cobra.hf.")
        return one.at_top and begins and not is_home(file)

    assert not breaches(is_breach) and not breaches(begins_the_web)


def test_importing_is_silent_and_light():
    code = f"import sys, cobra, vision_scan; print(*{LAZY!r} & {{*sys.modules}}, end='')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_the_walk_sees_every_way_to_import():
    source = """
from typing import TYPE_CHECKING
import a.b
from . import c
from ..d import e
if TYPE_CHECKING:
    import unseen
else:
    import f
try:
    import g
except ImportError:
    g = None
class K:
    import h
    def method(self):
        import i
late = lambda: importlib.import_module("j.k")
early = __import__("l")
"""
    seen = list(imports(source, "top.sub"))
    names = {True: set(), False: set()}
    for one in seen:
        names[one.at_top].add(one.module)
    assert names[True] == {
        "typing", "typing.TYPE_CHECKING", "a.b", "top.sub", "top.sub.c", "top.d", "top.d.e",
        "f", "g", "h", "l",
    }  # fmt: skip
    assert names[False] == {"i", "j.k"}
    assert [one.line for one in seen if one.module == "a.b"] == [3]


def test_the_walk_finds_the_packages():
    files = {file for file, _ in found()}
    assert {"vision_scan/orders/curves.py", "vision_scan/scan.py"} <= files
