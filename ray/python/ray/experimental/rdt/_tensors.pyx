# cython: language_level=3, embedsignature=True
# distutils: language = c++
"""All that is done once for each tensor of an object, of which there may be ten thousand.

Pickles a value and takes its tensors out, reads how they lie in memory, and makes tensors over
memory that holds their bytes. ``capture`` says what these steps are for.

Tensors are read and made through the C functions that their class offers to other libraries
(DLPack 1.3, ``DLPackExchangeAPI``, https://dmlc.github.io/dlpack/latest/c_api.html). Where torch has
none yet, and for tensors that DLPack does not know, its Python functions do the same at a tenth of
the speed.
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

#: A view that leaves out more than half of the bytes that it spans is gathered, if what it has is
#: in runs of at least so many bytes: more and smaller ones take longer than the bytes between them.
cdef enum: MIN_RUN_NBYTES = 512
#: Of one region; the agent keeps the address of each.
cdef enum: MAX_RUNS = 65536

#: Regions start at a multiple of this from their storage's start: every dtype stays aligned.
cdef enum: REGION_ALIGNMENT = 16
cdef enum: UINT = 1
cdef enum: COMPLEX = 5
cdef enum: CPU = 1

# What a row's flags say of its tensor.
cdef enum: _REQUIRES_GRAD = 1
cdef enum: _PARAMETER = 2
cdef enum: _CONJUGATED = 4
cdef enum: _NEGATED = 8

REQUIRES_GRAD, PARAMETER = _REQUIRES_GRAD, _PARAMETER
CONJUGATED, NEGATED = _CONJUGATED, _NEGATED

# One module, so that its parts call each other's C functions directly.
include "_tensors_dlpack.pxi"
include "_tensors_table.pxi"
include "_tensors_layout.pxi"
include "_tensors_build.pxi"
include "_tensors_pickle.pxi"
