"""Check the sizes of our sources; a file with a line ``# Size: REASON`` is exempt.

The limits are 20 methods for a class, 450 lines for a Python or Cython file, 400 lines for a C++
file, and 60 lines for a Python function.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[2] / "ray"
FILE_LINES = {".py": 450, ".pyx": 450, ".pxi": 450, ".cc": 400, ".h": 400}
METHODS = 20
FUNCTION_LINES = 60
REASON = ("# Size: ", "// Size: ")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def oversized(file: Path) -> Iterator[str]:
    """Yield the parts of a file that exceed a limit."""
    text = file.read_text()
    lines = text.count("\n")
    if lines > FILE_LINES[file.suffix]:
        yield f"it has {lines} lines, and {FILE_LINES[file.suffix]} is the limit"
    for node in ast.walk(ast.parse(text)) if file.suffix == ".py" else ():
        if isinstance(node, ast.ClassDef):
            methods = sum(isinstance(each, FUNCTIONS) for each in node.body)
            if methods > METHODS:
                yield f"class {node.name} has {methods} methods, and {METHODS} is the limit"
        elif isinstance(node, FUNCTIONS) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES:
                yield f"{node.name} has {length} lines, and {FUNCTION_LINES} is the limit"


def check(sources: Path = SOURCES) -> list[str]:
    """Return the violations, one line each."""
    files = (file for file in sorted(sources.rglob("*")) if file.suffix in FILE_LINES)
    return [
        f"{file}: {problem}"
        for file in files
        if not any(mark in file.read_text() for mark in REASON)
        for problem in oversized(file)
    ]
