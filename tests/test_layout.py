"""The rules of the repository's shape: who may import whom, names that are unique, no hidden paths."""
import ast
import sys

import pytest
from conftest import ROOT

FOLDERS = ("train", "inference", "retrieval", "model_analysis", "imagenet-4k", "demo", "benchmarks")
MODULES = {folder: {path.stem for path in (ROOT / folder).glob("*.py")} for folder in FOLDERS}
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
SHARED = sorted(ROOT.glob("*.py"))
STAGES = [path for path in FILES if path.parent.name != "benchmarks"]      # a benchmark measures the folder it imports


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, [alias.name for alias in node.names]


@pytest.mark.parametrize("path", STAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_folder_imports_mrl_its_siblings_and_third_parties(path):
    siblings = {name for folder in FOLDERS if folder != path.parent.name for name in MODULES[folder]}
    for module, names in imports(path):
        assert module.split(".")[0] not in siblings, f"{path.name} imports {module} of another folder"
        assert names != ["*"], f"{path.name} imports everything of {module}"
    assert "sys.path" not in path.read_text()


def test_module_names_are_unique():
    names = [name for folder in FOLDERS for name in MODULES[folder]]
    assert len(names) == len(set(names))
    assert not set(names) & sys.stdlib_module_names
    assert "utils" not in names


def test_every_module_says_what_it_is_for():
    for path in [*SHARED, *FILES]:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_the_method_stands_alone():
    """MRL.py is copied into other projects: it needs PyTorch and nothing of ours."""
    assert {module.split(".")[0] for module, _ in imports(ROOT / "MRL.py")} == {"itertools", "torch"}
    assert len((ROOT / "MRL.py").read_text().splitlines()) <= 130
