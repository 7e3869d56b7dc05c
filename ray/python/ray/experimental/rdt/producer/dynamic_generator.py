"""Generators that are called with ``num_returns="dynamic"``.

Ray runs such a generator to its end and gives its caller one reference, to a
``DynamicObjectRefGenerator`` of references. The core creates those and does not flag them as RDT
objects. RDT's call therefore asks for a single return. The producer puts each item with the
transport, owns it, and returns the same ``DynamicObjectRefGenerator``.
"""

from __future__ import annotations

import inspect
import traceback
from typing import Any, NamedTuple

from ray._private.object_ref_generator import DynamicObjectRefGenerator
from ray.exceptions import RayTaskError

from ray.experimental.rdt.producer.streams import STREAM_KEYWORD


class DynamicSpec(NamedTuple):
    """The description of a call that its producer receives.

    Attributes:
        retried: The exceptions that make Ray run the task again.
    """

    transport: str
    retried: tuple[type[BaseException], ...]

    def items_of(self, generator: Any) -> DynamicObjectRefGenerator:
        """Return references to the items of a generator, and to the error that ended it.

        Runs on: producer, the thread of the task.

        Raises:
            ValueError: It is not a generator. Ray refuses async generators as well.
        """
        if not inspect.isgenerator(generator):
            raise ValueError(
                'a function with num_returns="dynamic" must return a generator, and this is '
                f'{type(generator).__name__}; async generators go with num_returns="streaming"'
            )
        import ray

        refs = []
        try:
            for value in generator:
                refs.append(ray.put(value, _tensor_transport=self.transport))
        except self.retried:
            raise
        except Exception as error:  # of the user's code, for the caller
            name = generator.__name__
            refs.append(ray.put(RayTaskError(name, traceback.format_exc(), error)))
        return DynamicObjectRefGenerator(refs)


class DynamicCall:
    """One call of such a generator, at its caller."""

    num_returns = 1

    def __init__(self, transport: str, retry_exceptions: Any):
        if isinstance(retry_exceptions, (list, tuple)):
            retried = tuple(retry_exceptions)
        else:
            retried = (Exception,) if retry_exceptions else ()
        self.spec = DynamicSpec(transport.lower(), retried)

    def add_to(self, flat_arguments: list[Any]) -> list[Any]:
        return [*flat_arguments, STREAM_KEYWORD, self.spec]

    def attach(self, ref: Any, actor: Any = None) -> Any:
        """Return the result for the user. The items end with their owner, the actor."""
        return ref
