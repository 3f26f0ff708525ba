"""The rules of the house, as docs/architecture.md has them: one direction of imports, one name for one thing."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("partitioning", "models", "serving", "benchmarks")
MODULES = {
    path.relative_to(ROOT): ast.parse(path.read_text())
    for folder in (*FOLDERS, "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def lint_imports(*options: str) -> tuple[bool, str]:
    """Whether import-linter finds all contracts kept, and what it prints; run apart from pytest's capture."""
    run = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", run, "--no-cache", *options]
    done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode == 0, done.stdout


def test_imports_have_one_direction():
    kept, said = lint_imports()
    assert kept, said


def test_a_wrong_import_is_noticed(tmp_path):
    contract = "[importlinter]\nroot_package = toruslab\n[importlinter:contract:1]\nname = upside down\ntype = layers\n"
    layers = "layers =\n  toruslab.partitioning.torus\n  toruslab.partitioning.layouts\n"
    (tmp_path / "rules.ini").write_text(contract + layers)
    kept, said = lint_imports("--config", str(tmp_path / "rules.ini"))
    assert not kept
    assert "upside down BROKEN" in said


def test_every_name_of_a_type_is_there_once():
    found = defaultdict(list)
    for path, module in MODULES.items():
        for name in map(_type_name, module.body):
            if name:
                found[name].append(str(path))
    assert not {name: paths for name, paths in found.items() if len(paths) > 1}


def _type_name(statement: ast.stmt) -> str | None:
    """The name of a class, or of a type alias: an assignment to a name in CamelCase."""
    if isinstance(statement, ast.ClassDef):
        return statement.name
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
        name = statement.targets[0].id
        return name if name[0].isupper() and not name.isupper() else None
    return None


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_name_the_package(folder):
    imported = {
        (str(path), name)
        for path, module in MODULES.items()
        for node in ast.walk(module)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or "", "." * node.level]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert not [(path, name) for path, name in imported if name.split(".")[0] == folder or name.startswith(".")]
