"""The import direction of the four packages, read from the source without importing it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"diffusion_env", "agents", "rewards", "configs", "examples", "tests", "benchmarks"}
# What each package may import of ours, beside itself.
ALLOWED: dict[str, set[str]] = {
    "diffusion_env": set(),
    "agents": {"diffusion_env"},
    "rewards": set(),
    "configs": {"diffusion_env", "agents", "rewards"},
}


def top_level_names(nodes: Iterator[ast.AST]) -> set[str]:
    """The first parts of the modules that `nodes` import absolutely; a relative import stays in its package."""
    modules: list[str] = []
    for node in nodes:
        match node:
            case ast.Import(names=names):
                modules += [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), level=0):
                modules.append(module)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                modules.append(module)
    return {module.split(".")[0] for module in modules} - {""}


def run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and all below it that runs when its module is imported: no function's body."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from run_on_import(child)


def forbidden_imports(package: str, source: str) -> set[str]:
    """The top-level names that a module of `package` with this source must not import."""
    tree = ast.parse(source)
    forbidden = top_level_names(ast.walk(tree)) & OURS - ALLOWED[package] - {package}
    if package == "rewards":
        forbidden |= top_level_names(run_on_import(tree)) - sys.stdlib_module_names - {"torch", "rewards"}
    return forbidden


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package: str):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"no Python file under {package}/"
    found = {str(file.relative_to(ROOT)): forbidden_imports(package, file.read_text("utf-8")) for file in files}
    assert not {file: names for file, names in found.items() if names}


@pytest.mark.parametrize(
    ("package", "source", "expected"),
    [
        ("diffusion_env", "def f():\n    from agents.ppo import x", {"agents"}),
        ("diffusion_env", "import torch, rewards.jpeg as r", {"rewards"}),
        ("diffusion_env", "import importlib\nimportlib.import_module('configs.presets')", {"configs"}),
        ("diffusion_env", "from .agents import x\nfrom . import rewards\nimport diffusion_env", set()),
        ("agents", "from diffusion_env import x\nfrom rewards import y\nimport configs", {"rewards", "configs"}),
        ("rewards", "import math\nimport torch.nn\nfrom .jpeg import x\ndef f():\n    import PIL", set()),
        ("rewards", "try:\n    import PIL\nexcept ImportError:\n    pass", {"PIL"}),
        ("rewards", "class A:\n    from numpy import array\n    def f(self):\n        import peft", {"numpy"}),
        ("rewards", "def f():\n    import diffusion_env", {"diffusion_env"}),
        ("configs", "import agents, rewards, diffusion_env\nfrom examples import x", {"examples"}),
        ("configs", "import tests.helpers, benchmarks", {"tests", "benchmarks"}),
    ],
)
def test_a_wrong_import_is_found(package: str, source: str, expected: set[str]):
    assert forbidden_imports(package, source) == expected
