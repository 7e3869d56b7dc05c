"""Errors of a device: its memory is full, or it has failed for good.

After such a failure every call of the process on that device fails with the same error, whatever it
does. The errors come as types of torch, as codes of CUDA or, from another process, as text.
"""

from __future__ import annotations

import re
import sys

#: CUDA's codes of errors that stay until the process ends, as its runtime numbers them.
_CODES = frozenset({214, 226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721})
_TEXTS = re.compile(
    r"illegal memory access|uncorrectable ECC error|device-side assert|unspecified launch failure"
    r"|misaligned address|illegal instruction|hardware stack error|address space"
    r"|invalid program counter|launch timed out|cudaError(?:IllegalAddress|ECCUncorrectable|Assert"
    r"|LaunchFailure|MisalignedAddress|IllegalInstruction|HardwareStackError|InvalidPc"
    r"|InvalidAddressSpace|LaunchTimeout|Contained)",
    re.IGNORECASE,
)


def is_device_failure(error: BaseException) -> bool:
    """Return whether a device has failed for good."""
    code = getattr(error, "result", getattr(error, "error_code", None))
    is_known = isinstance(code, int) and int(code) in _CODES
    return is_known or _TEXTS.search(str(error)) is not None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation on a device failed because its memory is full."""
    torch = sys.modules.get("torch")
    kind = getattr(torch, "OutOfMemoryError", None)
    return kind is not None and isinstance(error, kind)
