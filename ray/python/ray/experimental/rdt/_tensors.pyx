# cython: language_level=3, embedsignature=True
# distutils: language = c++
"""The steps that run once for each tensor of an object, which may have ten thousand.

Pickles a value without its tensors, reads their layout, and makes tensors over memory that holds
their bytes. ``serialization/capture.py`` explains these steps.

Tensors are read and made through DLPack's C functions (DLPack 1.3, ``DLPackExchangeAPI``,
https://dmlc.github.io/dlpack/latest/c_api.html). If torch does not offer them, and for tensors that
DLPack does not support, torch's Python functions do the same at a tenth of the speed.
"""
import pickle
import sys
import threading

from ray import cloudpickle
from ray.experimental.rdt.accelerators import registry as accelerators

cimport cython
from cpython cimport array
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy
from libcpp cimport bool as cbool
from libcpp.algorithm cimport sort
from libcpp.utility cimport pair
from libcpp.vector cimport vector

#: Bytes of the shortest run that is gathered. A view that uses less than half of its span is
#: gathered, unless its runs are shorter: then copying the bytes between them takes less time.
cdef enum: MIN_RUN_NBYTES = 512
#: Runs of one region. The agent keeps the address of each.
cdef enum: MAX_RUNS = 65536

#: Bytes. Regions start at a multiple of it within their storage, so every dtype is aligned.
cdef enum: REGION_ALIGNMENT = 16
cdef enum: UINT = 1
cdef enum: COMPLEX = 5
cdef enum: CPU = 1

# Flags of a row.
cdef enum: _REQUIRES_GRAD = 1
cdef enum: _PARAMETER = 2
cdef enum: _CONJUGATED = 4
cdef enum: _NEGATED = 8

REQUIRES_GRAD, PARAMETER = _REQUIRES_GRAD, _PARAMETER
CONJUGATED, NEGATED = _CONJUGATED, _NEGATED

# One module, so that the parts call each other's C functions directly.
include "_tensors_dlpack.pxi"
include "_tensors_table.pxi"
include "_tensors_layout.pxi"
include "_tensors_build.pxi"
include "_tensors_pickle.pxi"
