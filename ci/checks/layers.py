"""Check the layers of ray.experimental.rdt: a module imports only its own layer or lower ones.

Every import counts, also inside functions and for types only. Import cycles are errors. So are a
module that no layer names, and a name without a module. Only
``common/ray_core.py`` uses the private state of Ray's worker.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = "ray.experimental.rdt"
RAY_ADAPTER = "common.ray_core"
RAY_STATE = {"ray._private.state", "ray._private.worker", "ray.experimental.internal_kv"}
SOURCES = Path(__file__).resolve().parents[2] / "ray" / "python"

# From bottom to top. A folder includes all its modules; "" is the package's __init__.
LAYERS: list[set[str]] = [
    {"common", "tensor_transport_manager"},
    {"accelerators", "_tensors"},
    {"_agent"},
    {"rpc"},
    {"groups", "transports"},
    {"serialization"},
    {"producer"},
    {"owner"},
    {"consumer"},
    {"observe"},
    {"session_parts"},
    {"manager"},
    {
        "api",
        "collective_tensor_transport",
        "explain_api",
        "hooks",
        "nixl_api",
        "nixl_memory_pool",
        "nixl_tensor_transport",
        "rdt_manager",
        "util",
        "",
    },
]


def layer_of(module: str) -> int | None:
    """Return the layer of a module, given its name within the package ("transports.gloo")."""
    folder = module.partition(".")[0]
    return next((n for n, names in enumerate(LAYERS) if folder in names), None)


def imported(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """Yield the package's modules that a module imports anywhere, by name within the package."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if within(name) in known else node.module for name in inner]
        for name in names:
            if name == PACKAGE or name.startswith(PACKAGE + "."):
                yield within(name)


def ray_state(tree: ast.AST) -> Iterator[str]:
    """The modules with private state of Ray's that a module imports or reads as attributes."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        yield from RAY_STATE.intersection(names)


def within(name: str) -> str:
    return name.removeprefix(PACKAGE).removeprefix(".")


def modules(sources: Path) -> dict[str, Path]:
    """Return the files of the package's modules, including Cython's, by name within the package."""
    found = {}
    for file in sorted((sources / Path(*PACKAGE.split("."))).rglob("*.py*")):
        if file.suffix in (".py", ".pyx"):
            dotted = ".".join(file.relative_to(sources).with_suffix("").parts)
            found[within(dotted.removesuffix(".__init__"))] = file
    return found


def check(sources: Path = SOURCES) -> list[str]:
    """Return the violations of the rule, one line each."""
    files = modules(sources)
    found = [f"{files[m]}: no layer names it" for m in files if layer_of(m) is None]
    folders = {module.partition(".")[0] for module in files}
    found += [
        f"LAYERS names {name!r}, which is not there"
        for name in sorted(set().union(*LAYERS) - folders)
    ]
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        if file.suffix == ".pyx":
            continue
        tree = ast.parse(file.read_text(), str(file))
        if module != RAY_ADAPTER:
            found += [
                f"{file}: uses {name}, only {RAY_ADAPTER} may" for name in set(ray_state(tree))
            ]
        graph[module] = set(imported(tree, set(files)))
        for name in sorted(graph[module]):
            ours, theirs = layer_of(module), layer_of(name)
            if ours is not None and theirs is not None and theirs > ours:
                found.append(f"{file}: imports {name}, of a higher layer")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"import cycle: {' -> '.join(error.args[1])}")
    return found
