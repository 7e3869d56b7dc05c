"""The steps of a GPU run, the most important first."""

from __future__ import annotations

from dataclasses import dataclass

from ci.gpu.runner import Program


@dataclass(frozen=True)
class Step:
    """A step of a GPU run.

    Attributes:
        name: Its name on the command line.
        is_alone: Whether it measures, so that nothing else may run. Programs of other steps run
            in parallel with those of adjacent steps.
    """

    name: str
    programs: tuple[Program, ...]
    is_alone: bool = True


def _program(
    module: str, limit_s: float, *arguments: str, name: str = "", **environment: str
) -> Program:
    name = name or " ".join(arguments)
    return Program(name, ("-m", f"ci.gpu.programs.{module}", *arguments), limit_s, environment)


def _tests(selection: str, name: str) -> Program:
    return _program("tests", 100, "tests/gpu", "-k", selection, name=name)


def steps(stock_python: str) -> tuple[Step, ...]:
    """All steps.

    Args:
        stock_python: A Python with stock Ray for comparison, or "".
    """
    transports = ("auto", "cuda_ipc", "nixl", "gloo", "nccl")
    no_transport = " and ".join(f"not {name}" for name in transports)
    stock = ("--stock-python", stock_python) if stock_python else ()
    return (
        Step("check", (_program("check", 90),)),
        Step("ceilings", (_program("ceilings", 60),)),
        Step(
            "gpu-tests",
            (*(_tests(name, name) for name in transports), _tests(no_transport, "others")),
            is_alone=False,
        ),
        Step("busy", tuple(_program("busy", 45, lane) for lane in ("cuda_ipc", "staged", "nixl"))),
        Step(
            "conformance",
            tuple(_program("conformance", 120, name) for name in transports),
            is_alone=False,
        ),
        Step("bench", (_program("bench", 200, *stock, name="pairs"),)),
        Step("nccl", (_program("nccl", 60),), is_alone=False),
        Step("expandable", (_program("expandable", 60),), is_alone=False),
        Step("graph", (_program("graph", 90),), is_alone=False),
        Step("low-memory", (_program("low_memory", 90),)),
    )


def choose(all_steps: tuple[Step, ...], names: list[str]) -> list[Step]:
    """Return the named steps in the given order; all if none is named.

    Raises:
        ValueError: A name is unknown; the text lists the known ones.
    """
    known = {step.name: step for step in all_steps}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no step is called {', '.join(unknown)}; steps are {', '.join(known)}")
    return [known[name] for name in names or known]
