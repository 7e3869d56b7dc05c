"""The layer rule for ray.experimental.rdt: a module imports its own layer or a lower one.

Counts every import, also those inside functions and for types only. Module-level imports must
form no cycle. A module that no layer names is an error: decide where it belongs.
"""

import ast
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = "ray.experimental.rdt"
SOURCES = Path(__file__).resolve().parents[2] / "ray" / "python"

# From the bottom up. A folder stands for all modules in it; "" is the package's __init__.
LAYERS: list[set[str]] = [
    {"real_threads"},
    {
        "_tensors",
        "accelerators",
        "cancellation",
        "config",
        "daemon_threads",
        "descriptor",
        "device_failures",
        "errors",
        "interrupts",
        "processes",
        "tensor_transport_manager",
    },
    {"_agent"},
    {"session"},
    {"checksums"},
    {"transports", "groups"},
    {
        "arguments",
        "arrays",
        "capture",
        "core_worker",
        "deferred",
        "device_lanes",
        "directory",
        "dynamic",
        "fetch",
        "gauges",
        "hints",
        "holder",
        "landing",
        "lanes",
        "lineage",
        "links",
        "method_calls",
        "owners",
        "reasons",
        "remake",
        "room",
        "serialized",
        "serve",
        "snapshots",
        "spread",
        "store",
        "streams",
        "targets",
        "unclaimed",
    },
    {"manager"},
    {
        "api",
        "collective_tensor_transport",
        "explain_api",
        "guarded",
        "nixl_api",
        "nixl_memory_pool",
        "nixl_tensor_transport",
        "observe",
        "rdt_manager",
        "util",
        "",
    },
]


def layer_of(module: str) -> int | None:
    """The layer of a module of the package, named within it ('transports.gloo')."""
    head = module.partition(".")[0]
    return next((n for n, names in enumerate(LAYERS) if module in names or head in names), None)


def imported(node: ast.AST, known: set[str]) -> Iterator[str]:
    """The package's modules that one statement imports, named within the package."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [name if within(name) in known else node.module for name in inner]
    for name in names:
        if name == PACKAGE or name.startswith(PACKAGE + "."):
            yield within(name)


def within(name: str) -> str:
    return name.removeprefix(PACKAGE).removeprefix(".")


def higher(module: str, tree: ast.AST, known: Iterable[str]) -> Iterator[str]:
    """What a module imports from a layer above its own."""
    ours = layer_of(module)
    for node in ast.walk(tree):
        for name in imported(node, set(known)):
            theirs = layer_of(name)
            if ours is not None and theirs is not None and theirs > ours:
                yield name


def check(sources: Path = SOURCES) -> list[str]:
    """What breaks the rule, a line each."""
    files = {}
    for file in sorted((sources / Path(*PACKAGE.split("."))).rglob("*.py*")):
        if file.suffix in (".py", ".pyx"):
            dotted = ".".join(file.relative_to(sources).with_suffix("").parts)
            files[within(dotted.removesuffix(".__init__"))] = file
    found = [f"{files[m]}: no layer names it" for m in files if layer_of(m) is None]
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        if file.suffix == ".pyx":
            continue
        tree = ast.parse(file.read_text(), str(file))
        graph[module] = {name for node in tree.body for name in imported(node, set(files))}
        found += [
            f"{file}: imports {name}, of a higher layer" for name in higher(module, tree, files)
        ]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"modules import each other: {' -> '.join(error.args[1])}")
    return found


if __name__ == "__main__":
    problems = check()
    print("\n".join(problems) or "layers: no import goes up, and none goes round")
    sys.exit(bool(problems))
