"""The order of the package's folders: imports run one way, read from the source."""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the ground up: a folder knows those before it, and nothing of those behind it.
FLOORS = (
    *("version", "strategies", "config", "recipes", "trials", "backbone"),
    *("data.lists", "data.video", "data.cache", "data", "model", "training", "inference"),
    *("results", "tracking", "cluster", "cluster.submit", "tuning", "ablation", "commands", "__init__", "__main__"),
)
HEAVY = {"torch", "torchvision", "timm", "open_clip", "ray", "mlflow", "pandas", "matplotlib", "scipy", "av", "decord"}
LONGEST_CHAIN = 12  # files; imports for type checkers count, late ones do not
MOST_FILES = 12
KNOWS_RAY = ("cluster", "tuning")
KNOWS_MLFLOW = ("tracking", "inference/mlflow_pyfunc.py")
# Models in MLflow stores name this module; it hands out the one that took its place.
ALIASES = {"stadapter/ablation/mlflow_model.py"}

FILES = {
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path
    for path in sorted((ROOT / "stadapter").rglob("*.py"))
}


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """Return each imported module, of the package or not, and True if it is imported only inside a function."""

    def below(node: ast.AST, late: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, late) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.module is not None and child.level == 0, f"{module}: a relative import"
                names = [f"{child.module}.{alias.name}" for alias in child.names]
                yield from ((name if name in FILES else child.module, late) for name in names)
            yield from below(child, late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    yield from below(ast.parse(FILES[module].read_text()), False)


@functools.cache
def known(module: str) -> frozenset[str]:
    """Return the modules of the package that a module imports, anywhere in its file."""
    return frozenset(name for name, _ in imports(module) if name in FILES and name != "stadapter")


def floor(module: str) -> int:
    room = module.removeprefix("stadapter").strip(".") or "__init__"
    while room not in FLOORS:
        assert "." in room, f"{module}: give its folder a place in FLOORS"
        room = room.rpartition(".")[0]
    return FLOORS.index(room)


def test_imports_run_downwards_only() -> None:
    up = [
        f"{module} -> {name}"
        for module in FILES
        for name in known(module)
        if floor(name) > floor(module) and str(FILES[module].relative_to(ROOT)) not in ALIASES
    ]
    assert not up


@functools.cache
def chain(module: str, late: bool) -> tuple[str, ...]:
    """Return the longest chain of imports that starts at a module. Raises RecursionError if there is a circle."""
    below = {name for name, is_late in imports(module) if name in known(module) and (late or not is_late)}
    return (module, *max((chain(name, late) for name in sorted(below)), key=len, default=()))


def at_import(module: str) -> frozenset[str]:
    """Return the modules loaded by importing a module, without late imports and those for type checkers."""
    tree = ast.parse(FILES[module].read_text())
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in FILES else node.module for a in node.names
            }
    return frozenset(found)


@functools.cache
def is_heavy(module: str) -> bool:
    """Return True if importing a module loads a library that takes long to load."""
    loaded = at_import(module)
    return bool({name.partition(".")[0] for name in loaded} & HEAVY) or any(
        is_heavy(name) for name in loaded if name in FILES and name != "stadapter"
    )


def test_there_is_no_circle() -> None:
    assert all(chain(module, late=True) for module in FILES)


def test_no_chain_of_imports_is_long() -> None:
    longest = max((chain(module, late=False) for module in FILES), key=len)
    assert len(longest) <= LONGEST_CHAIN, " > ".join(longest)


def test_an_import_is_late_only_where_it_keeps_a_library_from_loading() -> None:
    late = [(module, name) for module in FILES for name, is_late in imports(module) if is_late and name in FILES]
    light = [f"{module} -> {name}" for module, name in late if name != "stadapter" and not is_heavy(name)]
    assert late and not light


def test_ray_and_mlflow_are_known_to_their_folders_alone() -> None:
    for library, folders in (("ray", KNOWS_RAY), ("optuna", KNOWS_RAY), ("mlflow", KNOWS_MLFLOW)):
        users = [
            str(path.relative_to(ROOT / "stadapter"))
            for module, path in FILES.items()
            if any(name.partition(".")[0] == library for name, _ in imports(module))
        ]
        assert users and [user for user in users if not user.startswith(folders)] == []


def test_no_folder_holds_more_than_a_dozen_files() -> None:
    counts = Counter(path.parent for path in FILES.values())
    assert {str(folder.relative_to(ROOT)): n for folder, n in counts.items() if n > MOST_FILES} == {}


def test_every_folder_of_tests_has_its_folder_in_the_package() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {name for name in folders - {"helpers", "faults"} if not (ROOT / "stadapter" / name).is_dir()} == set()
