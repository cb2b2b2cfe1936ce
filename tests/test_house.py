"""The house: imports point one way in few floors, `paper/` and `measure/` stay light, and `dpa --help` is quick."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dpalign

SOURCE = Path(dpalign.__file__).parent
FLOORS = 10
ENTRIES = 16
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "scipy", "matplotlib", "vllm", "ray"}

Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    named = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def nodes_at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a module, those inside functions too, but not what a type checker alone reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and is_type_checking(node.test):
            for other in node.orelse:
                yield from (other, *nodes_at_run_time(other))
            continue
        yield node
        yield from nodes_at_run_time(node)


@cache
def imports(name: str) -> frozenset[str]:
    """What a module imports by absolute name: `from a import b` is a.b where that is a module, else a."""
    known = modules()
    found = set()
    for node in nodes_at_run_time(ast.parse(known[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            source = str(node.module)
            found |= {f"{source}.{a.name}" if f"{source}.{a.name}" in known else source for a in node.names}
    return frozenset(found - {name})


def module_graph() -> Graph:
    """What each module needs of the package; the package's own `__init__` says a version and needs nothing."""
    known = set(modules()) - {"dpalign"}
    return {name: {other for other in imports(name) if other in known} for name in known}


def entry_of(name: str) -> str:
    """The package or module directly under dpalign that a module lies in."""
    return name.split(".")[1]


def entry_graph() -> Graph:
    graph: Graph = {entry_of(name): set() for name in module_graph()}
    for name, needed in module_graph().items():
        graph[entry_of(name)] |= {entry_of(other) for other in needed} - {entry_of(name)}
    return graph


def reached(graph: Graph, start: str) -> set[str]:
    """All nodes that can be reached from one."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        fresh = graph[waiting.pop()] - seen
        seen |= fresh
        waiting += fresh
    return seen


def circular(graph: Graph) -> set[tuple[str, str]]:
    """The edges that lie on a circle."""
    beyond = {node: reached(graph, node) for node in graph}
    return {(node, needed) for node in graph for needed in graph[node] if node in beyond[needed]}


def outside(package: str) -> dict[str, set[str]]:
    """What the modules of a package import from elsewhere, by module; the standard library left out."""
    inside = {name for name in modules() if name == f"dpalign.{package}" or name.startswith(f"dpalign.{package}.")}
    return {
        name: {other for other in imports(name) - inside if other.split(".")[0] not in sys.stdlib_module_names}
        for name in inside
    }


def floors(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """On which floor each node stands: one above the highest that it imports."""
    floor: dict[str, int] = {}
    for node in TopologicalSorter(graph).static_order():
        floor[node] = 1 + max((floor[needed] for needed in graph[node]), default=0)
    return floor


def test_packages_import_one_way_in_few_floors() -> None:
    graph = entry_graph()
    circles = circular(graph)
    culprits = [
        f"{name} -> {other}"
        for name, needed in module_graph().items()
        for other in needed
        if (entry_of(name), entry_of(other)) in circles
    ]
    assert sorted(culprits) == []
    assert max(floors(graph).values()) <= FLOORS, floors(graph)


def test_modules_import_one_way() -> None:
    assert sorted(f"{name} -> {other}" for name, other in circular(module_graph())) == []


@pytest.mark.parametrize(
    ("package", "allowed"),
    [("paper", {"numpy"}), ("measure", {"numpy", "scipy", "moocore", "pydantic", "dpalign"})],
)
def test_what_the_paper_defines_and_what_is_measured_needs_no_model(package: str, allowed: set[str]) -> None:
    others = {name: {other for other in used if other.split(".")[0] not in allowed} for name, used in
              outside(package).items()}  # fmt: skip
    assert {name: used for name, used in others.items() if used} == {}
    own = {entry_of(other) for used in outside(package).values() for other in used if other.startswith("dpalign.")}
    assert own & {"recipe", "stages", "pipeline", "page", "train", "engines", "rewards", "dial"} == set()


def test_the_top_of_the_package_can_be_read_at_a_glance() -> None:
    entries = {path.stem for path in SOURCE.iterdir() if not path.name.startswith("__") and path.suffix != ".typed"}
    assert len(entries) <= ENTRIES, sorted(entries)


def test_the_lock_has_the_pins_of_the_constraints_each_with_the_hash_of_a_wheel() -> None:
    root = Path(__file__).parents[1]
    pins = {
        line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith(("#", "torch=="))
    }
    locked = [line for line in (root / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert {line.partition(" ")[0] for line in locked} == pins
    assert [line for line in locked if not re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line)] == []
    assert len(locked) == len(pins)


QUICK = """
import sys
from pathlib import Path

def heavy():
    return sorted(set(sys.argv[2].split()) & set(sys.modules))

import dpalign
print("package", *heavy(), *sorted(name for name in sys.modules if name.startswith("dpalign.")))
import dpalign.recipe
print("recipe", *heavy())
from dpalign.runs.modelfolder import weights_files
print("model folder", weights_files(Path(sys.argv[1])) and "", *heavy())
from dpalign import cli
for words in (["--help"], ["run", "--help"], ["sample", "--help"], ["plan", "--help"], ["run", "demo", "--dry-run"]):
    try:
        sys.stdout = open("/dev/null", "w")
        cli.main(words)
    except SystemExit as ended:
        assert not ended.code, words
    finally:
        sys.stdout = sys.__stdout__
    print(*words, *heavy())
"""


def test_help_recipes_and_a_models_folder_need_nothing_heavy() -> None:
    from dpalign.engines.knobs import WORLD_BASE

    command = [sys.executable, "-c", QUICK, str(WORLD_BASE), " ".join(sorted(HEAVY))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [row for row in done.stdout.splitlines() if set(row.split()) & HEAVY] == []
    assert done.stdout.splitlines()[0] == "package"
    assert len(done.stdout.splitlines()) == 8
