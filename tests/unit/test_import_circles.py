"""No import circles between the modules of the benchmarks and of the tests' shared code; no test imports another test.

`lint-imports` checks the modules of the package itself (`.importlinter`). Imports under TYPE_CHECKING count too.
"""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imported_modules(path: Path) -> set[str]:
    """Return the last part of the name of each module that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.rpartition(".")[2] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module.rpartition(".")[2], *(alias.name for alias in node.names)}
    return found


@pytest.mark.parametrize("folder", ["benchmarks", "tests/support"])
def test_modules_import_each_other_without_circles(folder: str) -> None:
    modules = {path.stem: path for path in (ROOT / folder).glob("*.py")}
    assert len(modules) > 10
    graph = {name: imported_modules(path) & set(modules) for name, path in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


def test_no_test_imports_another_test() -> None:
    """Scripts that tests keep as strings count too: shared code belongs in `tests/support/`."""
    importing = re.compile(r"^[ \t]*(?:from|import)[ \t].*\btest_\w+", re.MULTILINE)
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    found = {
        str(path.relative_to(ROOT)): match.group() for path in files if (match := importing.search(path.read_text()))
    }
    assert not found
