"""The house stays tidy: imports go one way, functions and files stay short, nothing is caught blindly."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "tandem"
FILES = sorted(SOURCE.rglob("*.py"))

# Each room may import those of lower levels, and of its own.
LEVELS = {
    "errors": -1,
    "types": 0,
    "device": 0,
    "value": 1,
    "config": 1,
    "algorithms": 2,
    "rewards": 2,
    "data": 2,
    "model": 2,
    "optimizer": 3,
    "libraries": 3,
    "learner": 4,
    "engine": 4,
    "reward_model": 5,
    "rollout": 5,
    "placement": 6,
    "checkpoint": 6,
    "journal": 6,
    "train": 7,
    "talk": 8,
    "commands": 9,
    "cli": 10,
}
TORCH_ONLY = {"algorithms", "value"}
NAMED_ONCE = ("ray", "vllm", "wandb")


def room(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[str]:
    """Names of all modules that a file imports, anywhere in it, but for type checking."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in outside_type_checking(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def outside_type_checking(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from outside_type_checking(child)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_go_one_way(file):
    here = room(file)
    if here in ("__init__", "__main__"):
        return
    for name in imports(file):
        parts = name.split(".")
        if parts[0] != "tandem" or len(parts) < 2 or parts[1] == here or parts[1].startswith("__"):
            continue
        assert LEVELS[parts[1]] < LEVELS[here], f"{here} must not import {name}"


def test_algorithms_need_torch_only():
    for here in TORCH_ONLY:
        outside = {name.split(".")[0] for name in imports(SOURCE / f"{here}.py")}
        assert outside - set(sys.stdlib_module_names) <= {"torch", "tandem"}


@pytest.mark.parametrize("package", NAMED_ONCE)
def test_heavy_optional_packages_are_imported_in_one_module_and_only_when_used(package):
    users = [f for f in FILES if any(name.split(".")[0] == package for name in imports(f))]
    assert len(users) <= 1
    for file in users:
        top = ast.parse(file.read_text(encoding="utf-8")).body
        names = [alias.name for node in top if isinstance(node, ast.Import) for alias in node.names]
        assert package not in names, f"{file} imports {package} when it is imported itself"


def test_peft_is_imported_where_there_is_an_adapter_only():
    for file in FILES:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            imported = ast.unparse(node) if isinstance(node, ast.Import | ast.ImportFrom) else ""
            assert not imported.startswith(("import peft", "from peft")), f"{file}:{node.lineno}: {imported}"


def test_device_names_stand_in_one_module():
    for file in FILES:
        if room(file) == "device":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if name.startswith(("torch.cuda", "torch.npu", "torch.xpu")):
                raise AssertionError(f"{file}:{node.lineno}: {ast.unparse(node)}")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_files_and_functions_are_short_and_honest(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 400, f"{file} is too long"
    assert file.stem not in ("utils", "util", "common", "helpers", "helper", "misc")
    for node in ast.walk(ast.parse(text)):
        where = f"{file}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{where}: {node.name} is too long"
        if isinstance(node, ast.ExceptHandler):
            names = ast.unparse(node.type) if node.type else "everything"
            allowed = file.name == "worker.py" and room(file) == "rewards"
            assert allowed or names not in ("Exception", "BaseException", "everything"), (
                f"{where}: catches {names}"
            )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"{where}: {node.func.id}"


READS_PICKLES = SOURCE / "checkpoint" / "convert" / "torch_file.py"
"""Reads Megatron's files, tensors only; tests/test_convert_errors.py holds it to that."""


def test_no_pickle():
    for file in FILES:
        if file == READS_PICKLES:
            continue
        names = {name.split(".")[0] for name in imports(file)}
        assert not names & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}, file
        assert "torch.load" not in file.read_text(encoding="utf-8"), file
