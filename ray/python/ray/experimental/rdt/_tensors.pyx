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

cdef extern from "ray/rdt/strided.h" namespace "ray::rdt":
    cppclass Runs:
        uint64_t nbytes
        vector[uint64_t] starts
        vector[int64_t] strides
        uint64_t total()

    bint FindRuns(const int64_t *, const int64_t *, int, uint64_t, uint64_t, Runs *)

cdef extern from *:
    """
    #include <stdint.h>
    #include <stdlib.h>

    #include <tuple>

    // The part of DLPack's interface that is used here; the layouts are DLPack's.
    struct DlDevice {
      int32_t type;
      int32_t index;
    };

    struct DlType {
      uint8_t code;
      uint8_t bits;
      uint16_t lanes;
    };

    struct DlTensor {
      void *data;
      DlDevice device;
      int32_t ndim;
      DlType dtype;
      int64_t *shape;
      int64_t *strides;
      uint64_t byte_offset;
    };

    struct DlManaged {
      uint32_t version[2];
      void *context;
      void (*deleter)(DlManaged *);
      uint64_t flags;
      DlTensor tensor;
    };

    struct DlExchange {
      uint32_t version[2];
      void *previous;
      void *allocate;
      void *managed_from_python;
      int (*managed_to_python)(DlManaged *, void **);
      int (*view_of_python)(void *, DlTensor *);
      void *current_stream;
    };

    // One tensor, as it is pickled: little-endian, eight-byte aligned.
    struct Row {
      uint64_t offset;
      uint32_t region;
      uint32_t dims;  // where its shape begins among all dimensions; its strides follow
      uint8_t dtype;
      uint8_t flags;
      uint8_t ndim;
      uint8_t is_dense;
      uint32_t unused;
    };

    // The bytes of one tensor, within a storage.
    struct TensorSpan {
      uint64_t storage;
      uint64_t start;
      uint64_t end;
      size_t index;
      bool is_host;
      bool operator<(const TensorSpan &other) const {
        return std::tie(storage, start, end, index) <
               std::tie(other.storage, other.start, other.end, other.index);
      }
    };

    // How many bytes there are from a tensor's first to its last. False if no memory is that large.
    static bool ExtentOf(const int64_t *shape, const int64_t *strides, int ndim, uint64_t itemsize,
                         uint64_t *extent) {
      uint64_t last = 0, step = 0;
      *extent = 0;
      for (int i = 0; i < ndim; ++i) {
        if (shape[i] < 0 || strides[i] < 0) return false;
        if (shape[i] == 0) return true;
      }
      for (int i = 0; i < ndim; ++i) {
        if (__builtin_mul_overflow(uint64_t(shape[i] - 1), uint64_t(strides[i]), &step) ||
            __builtin_add_overflow(last, step, &last)) {
          return false;
        }
      }
      return !__builtin_mul_overflow(last + 1, itemsize, extent);
    }

    // A tensor on its way to Python, and what keeps its memory alive.
    struct Handover {
      DlManaged managed;
      PyObject *owner;
      int64_t dims[];
    };

    // Runs on: any thread, when the last tensor over the memory dies.
    static void EndHandover(DlManaged *managed) {
      Handover *handover = reinterpret_cast<Handover *>(managed);
      if (Py_IsInitialized()) {
        PyGILState_STATE state = PyGILState_Ensure();
        Py_DECREF(handover->owner);
        PyGILState_Release(state);
      }
      free(handover);
    }

    static PyObject *TensorOver(const DlExchange *api, PyObject *owner, void *memory,
                                DlDevice device, DlType dtype, const int64_t *shape,
                                const int64_t *strides, int ndim) {
      size_t nbytes = sizeof(Handover) + 2 * size_t(ndim) * sizeof(int64_t);
      Handover *handover = static_cast<Handover *>(malloc(nbytes));
      if (handover == nullptr) return PyErr_NoMemory();
      for (int i = 0; i < ndim; ++i) {
        handover->dims[i] = shape[i];
        handover->dims[ndim + i] = strides[i];
      }
      handover->managed = {{1, 0}, nullptr, EndHandover, 0,
                           {memory, device, ndim, dtype, handover->dims,
                            handover->dims + ndim, 0}};
      handover->owner = owner;
      Py_INCREF(owner);
      void *made = nullptr;
      if (api->managed_to_python(&handover->managed, &made) != 0) {
        EndHandover(&handover->managed);
        return nullptr;
      }
      return static_cast<PyObject *>(made);
    }
    """
    ctypedef struct DlType:
        uint8_t code
        uint8_t bits
        uint16_t lanes

    ctypedef struct DlDevice:
        int32_t type
        int32_t index

    ctypedef struct DlTensor:
        void *data
        DlDevice device
        int32_t ndim
        DlType dtype
        int64_t *shape
        int64_t *strides
        uint64_t byte_offset

    ctypedef struct DlExchange:
        uint32_t version[2]
        int (*view_of_python)(void *, DlTensor *) except -1

    cppclass Row:
        uint64_t offset
        uint32_t region
        uint32_t dims
        uint8_t dtype
        uint8_t flags
        uint8_t ndim
        uint8_t is_dense
        uint32_t unused

    cppclass TensorSpan:
        uint64_t storage
        uint64_t start
        uint64_t end
        size_t index
        cbool is_host

    bint ExtentOf(const int64_t *, const int64_t *, int, uint64_t, uint64_t *)
    object TensorOver(const DlExchange *, PyObject *, void *, DlDevice, DlType, const int64_t *,
                      const int64_t *, int)

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

cdef array.array _UINT64 = array.array("Q")

# Set at the first tensor of the process; torch stays for good.
cdef const DlExchange *_exchange = NULL
cdef bint _is_torch_known = False
cdef object _torch = None
# Which words of a storage hold the address and the size of its memory; 0 where they are not known.
cdef size_t _address_word = 0
cdef size_t _size_word = 0


cdef _know_torch():
    """Runs on: any thread that has a tensor, or is to make one. Raises ImportError."""
    global _torch, _exchange, _is_torch_known
    import torch

    _torch = torch
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is not None:
        exchange = <DlExchange *>PyCapsule_GetPointer(capsule, b"dlpack_exchange_api")
        if exchange.version[0] == 1:
            _exchange = exchange
    _find_words()
    _is_torch_known = True


cdef _find_words():
    """Learns how torch's storages are laid out, from two of them."""
    global _address_word, _size_word
    cdef const uint64_t *words
    cdef size_t i
    addresses, sizes = set(range(1, 8)), set(range(1, 8))
    for nbytes in (1009, 2003):
        storage = _torch.UntypedStorage(nbytes, device="cpu")
        words = <const uint64_t *><uintptr_t>storage._cdata
        addresses &= {i for i in range(8) if words[i] == <uint64_t>storage.data_ptr()}
        sizes &= {i for i in range(8) if words[i] == <uint64_t>nbytes}
    # The allocator's own record of the address comes after the first.
    if addresses and len(sizes) == 1:
        _address_word, _size_word = min(addresses), sizes.pop()


cdef inline bint _view(tensor, DlTensor *view) except -1:
    """Reads a tensor through DLPack; False if it cannot be."""
    if not _is_torch_known:
        _know_torch()
    if _exchange == NULL:
        return False
    try:
        _exchange.view_of_python(<void *>tensor, view)
    except Exception:
        return False
    return True


# Reading.


@cython.final
cdef class Table:
    """The layout of an object's tensors, as it travels. Immutable.

    Attributes:
        regions: The bytes of each region, an array of uint64.
        dtypes: Of the tensors, each once.
        devices: The torch device type of each region that is not in host memory. Which of its
            devices it is matters to nobody else: a consumer receives on its own current one.
    """

    cdef readonly array.array regions
    cdef readonly tuple dtypes
    cdef readonly dict devices
    cdef vector[Row] _rows
    cdef vector[int64_t] _dims
    cdef list _as_tuples

    def __cinit__(self):
        self.regions = array.clone(_UINT64, 0, False)
        self.dtypes = ()
        self.devices = {}

    def __len__(self):
        """How many tensors there are."""
        return self._rows.size()

    @property
    def nbytes(self):
        return sum(self.regions)

    @property
    def rows(self):
        """A tuple for each tensor: region, offset in bytes, dtype, shape, stride, flags.

        The stride is None if the tensor is dense, row-major and not empty.
        """
        if self._as_tuples is None:
            self._as_tuples = [self._as_tuple(row) for row in self._rows]
        return self._as_tuples

    cdef tuple _as_tuple(self, Row row):
        cdef const int64_t *dims = self._dims.data() + row.dims
        shape = tuple([dims[i] for i in range(row.ndim)])
        stride = None
        if not row.is_dense:
            stride = tuple([dims[row.ndim + i] for i in range(row.ndim)])
        return row.region, row.offset, self.dtypes[row.dtype], shape, stride, row.flags

    def __reduce__(self):
        rows = PyBytes_FromStringAndSize(
            <const char *>self._rows.data(), self._rows.size() * sizeof(Row)
        )
        dims = PyBytes_FromStringAndSize(
            <const char *>self._dims.data(), self._dims.size() * sizeof(int64_t)
        )
        return load_table, (self.regions.tobytes(), rows, dims, self.dtypes, self.devices)


def load_table(bytes regions, bytes rows, bytes dims, tuple dtypes, dict devices):
    """A pickled ``Table``. Raises ValueError if it contradicts itself."""
    cdef Table table = Table()
    cdef uint64_t extent = 0
    cdef const int64_t *first
    cdef Row row
    if len(regions) % 8 or len(rows) % sizeof(Row) or len(dims) % 8:
        raise ValueError("the table of an RDT value is cut off")
    table.regions.frombytes(regions)
    table._rows.resize(len(rows) // sizeof(Row))
    memcpy(table._rows.data(), PyBytes_AS_STRING(rows), len(rows))
    table._dims.resize(len(dims) // 8)
    memcpy(table._dims.data(), PyBytes_AS_STRING(dims), len(dims))
    table.dtypes, table.devices = dtypes, devices
    itemsizes = [dtype.itemsize for dtype in dtypes]
    for row in table._rows:
        if (
            row.region >= <size_t>len(table.regions)
            or row.dtype >= len(itemsizes)
            or row.dims + 2 * <size_t>row.ndim > table._dims.size()
        ):
            raise ValueError("the table of an RDT value names what it does not hold")
        first = table._dims.data() + row.dims
        if (
            not ExtentOf(first, first + row.ndim, row.ndim, itemsizes[row.dtype], &extent)
            or row.offset + extent < extent
            or row.offset + extent > table.regions.data.as_ulonglongs[row.region]
        ):
            raise ValueError("a tensor of an RDT value reaches beyond its region")
    return table


@cython.final
cdef class Layout:
    """How an object's tensors lie in the memory of its producer.

    Attributes:
        table: What travels of it.
        addresses: For each region its address, as uint64.
        owners: For each region the storage that it lies in, which keeps its memory; None for one
            without bytes.
        offsets: For each region how far into its storage it begins, as uint64.
        runs: For regions that are gathered, where the runs of bytes begin that make one up, as
            uint64 from its address on, and the bytes of each run.
        storages: The addresses of the storages that have bytes in a region, sorted, as uint64.
        guards: For ``Agent.register``: what shows that a storage in host memory was freed, resized
            or moved.
    """

    cdef readonly Table table
    cdef readonly array.array addresses
    cdef readonly list owners
    cdef readonly array.array offsets
    cdef readonly dict runs
    cdef readonly array.array storages
    cdef readonly array.array guards

    def __cinit__(self):
        self.table = Table()
        self.addresses = self.offsets = self.storages = self.guards = _as_array(vector[uint64_t]())
        self.owners, self.runs = [], {}

    def is_unchanged(self):
        """Whether each storage has its memory at the address that it had, and as much of it."""
        cdef uint64_t nbytes, base
        cdef size_t region
        for region in range(len(self.owners)):
            storage = self.owners[region]
            if storage is None:
                continue
            nbytes = self.table.regions.data.as_ulonglongs[region]
            if self.runs and region in self.runs:
                starts, run = self.runs[region]
                nbytes = starts[-1] + run
            nbytes += self.offsets.data.as_ulonglongs[region]
            base = storage.data_ptr()
            if base + self.offsets.data.as_ulonglongs[region] \
                    != self.addresses.data.as_ulonglongs[region] \
                    or <uint64_t>storage.nbytes() < nbytes:
                return False
        return True


def lay_out(list tensors, is_parameter=None, bint may_gather=True):
    """Finds the regions of tensors and how each lies in its region: a Layout.

    Spans of one storage that overlap or touch are one region. Where they leave out more than half
    of their region, each is one that is gathered. An address means one thing in all of a process,
    on whichever device. Copies nothing.

    Args:
        tensors: The tensors; any that torch has dense, strided memory for.
        is_parameter: For each whether it is a ``torch.nn.Parameter``; None if none is.
        may_gather: Whether regions may be gathered.
    """
    cdef Table table = Table()
    cdef vector[TensorSpan] spans
    cdef list dtypes = []
    cdef size_t i
    spans.resize(len(tensors))
    table._rows.resize(len(tensors))
    for i in range(spans.size()):
        spans[i].index = i
        spans[i].is_host = _read(tensors[i], table, &table._rows[i], &spans[i], dtypes)
        if is_parameter is not None and is_parameter[i]:
            table._rows[i].flags |= _PARAMETER
    table.dtypes = tuple(dtypes)
    sort(spans.begin(), spans.end())
    layout = _merge(table, spans, tensors, may_gather)
    for i in range(spans.size()):
        if not spans[i].is_host:
            index = spans[i].index
            table.devices[table._rows[index].region] = tensors[index].device.type
    return layout


def check_storage(tensor):
    """Raises ValueError for a tensor that reaches beyond its storage, as one that was freed."""
    cdef Row row
    cdef TensorSpan span
    _read(tensor, Table(), &row, &span, [])
    if span.start < span.end:
        _check_storage(tensor, span, tensor.untyped_storage())


cdef _check_storage(tensor, const TensorSpan &span, storage):
    if <uint64_t>storage.nbytes() < span.end - span.storage:
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} needs {span.end - span.storage} bytes of a "
            f"storage that has {storage.nbytes()}: it was freed or shrunk (resize_)"
        )


cdef bint _read(tensor, Table table, Row *row, TensorSpan *span, list dtypes) except -1:
    """Fills in what a tensor says about itself. Returns whether it is in host memory."""
    cdef DlTensor view
    cdef uint64_t itemsize, extent = 0
    cdef bint is_complex, is_host
    row.dims = table._dims.size()
    if _view(tensor, &view):
        span.start = <uint64_t>view.data + view.byte_offset
        itemsize = view.dtype.bits * view.dtype.lanes // 8
        is_complex = view.dtype.code == COMPLEX
        is_host = view.device.type == CPU
        row.ndim = view.ndim
        table._dims.insert(table._dims.end(), view.shape, view.shape + view.ndim)
        table._dims.insert(table._dims.end(), view.strides, view.strides + view.ndim)
    else:
        span.start = tensor.data_ptr()
        itemsize = tensor.element_size()
        is_complex = tensor.is_complex()
        is_host = tensor.is_cpu
        row.ndim = tensor.dim()
        for length in (*tensor.shape, *tensor.stride()):
            table._dims.push_back(length)
    cdef const int64_t *dims = table._dims.data() + row.dims
    if not ExtentOf(dims, dims + row.ndim, row.ndim, itemsize, &extent):
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is no memory")
    span.end = span.start + extent
    span.storage = span.start - <uint64_t>tensor.storage_offset() * itemsize
    row.is_dense = extent > 0 and _is_dense(dims, row.ndim)
    row.dtype = _index_of(tensor.dtype, dtypes)
    row.flags = 0
    if tensor.requires_grad:
        row.flags |= _REQUIRES_GRAD
    if is_complex and tensor.is_conj():
        row.flags |= _CONJUGATED
    if tensor.is_neg():
        row.flags |= _NEGATED
    return is_host


cdef bint _is_dense(const int64_t *dims, int ndim) noexcept:
    cdef int64_t step = 1
    cdef int i
    for i in range(ndim - 1, -1, -1):
        if dims[ndim + i] != step:
            return False
        step *= dims[i]
    return True


cdef int _index_of(dtype, list dtypes) except -1:
    cdef int i
    for i in range(len(dtypes)):
        if dtypes[i] is dtype:
            return i
    dtypes.append(dtype)
    return len(dtypes) - 1


cdef Layout _merge(Table table, vector[TensorSpan] &spans, list tensors, bint may_gather):
    """Joins spans, which are sorted, into regions."""
    cdef vector[uint64_t] starts, sizes, offsets, storages, guards
    cdef vector[Runs] runs
    cdef list owners = []
    cdef dict gathered = {}
    cdef size_t first = 0, last, i, widest
    cdef uint64_t start, end, storage
    while first < spans.size():
        last, widest = first + 1, first
        start, end, storage = spans[first].start, spans[first].end, spans[first].storage
        # An empty span takes part in no merge: its address may be anything.
        while (
            start < end and last < spans.size() and spans[last].storage == storage
            and spans[last].start < spans[last].end and spans[last].start <= end
        ):
            if spans[last].end > end:
                widest, end = last, spans[last].end
            last += 1
        if start < end and (storages.empty() or storages.back() != storage):
            storages.push_back(storage)
        if may_gather and _is_sparse(table, spans, first, last, end, runs):
            for i in range(first, last):
                if i == first or runs[i - first].starts != runs[i - first - 1].starts \
                        or spans[i].start != spans[i - 1].start:
                    gathered[starts.size()] = (
                        _as_array(runs[i - first].starts), runs[i - first].nbytes
                    )
                    owners.append(_owner(tensors[spans[i].index], spans[i], guards))
                    starts.push_back(spans[i].start)
                    sizes.push_back(runs[i - first].total())
                    offsets.push_back(spans[i].start - storage)
                _gather_row(table, spans[i].index, starts.size() - 1, runs[i - first])
        else:
            owners.append(
                _owner(tensors[spans[widest].index], spans[widest], guards) if start < end else None
            )
            if start < end:
                start -= (start - storage) % REGION_ALIGNMENT
            starts.push_back(start)
            sizes.push_back(end - start)
            offsets.push_back(start - storage)
            for i in range(first, last):
                table._rows[spans[i].index].region = starts.size() - 1
                table._rows[spans[i].index].offset = spans[i].start - start
        first = last
    table.regions = _as_array(sizes)
    layout = Layout()
    layout.table = table
    layout.addresses = _as_array(starts)
    layout.owners = owners
    layout.offsets = _as_array(offsets)
    layout.runs = gathered
    layout.storages = _as_array(storages)
    layout.guards = _as_array(guards)
    return layout


cdef bint _is_sparse(
    Table table, vector[TensorSpan] &spans, size_t first, size_t last, uint64_t end,
    vector[Runs] &runs,
) except -1:
    """Whether tensors that span one region are to be gathered, and the runs of each.

    They are not where two share some of their bytes: each byte moves once, and what is written to
    one shows in the other. Two that have all their bytes in common become one region.
    """
    cdef bint is_dense = True
    cdef uint64_t used = 0, at
    cdef size_t count = 0, i
    cdef vector[pair[uint64_t, uint64_t]] ends
    cdef pair[uint64_t, uint64_t] one
    cdef Row *row
    for i in range(first, last):
        if not spans[i].is_host:
            return False
        is_dense = is_dense and table._rows[spans[i].index].is_dense
    if is_dense:
        return False
    runs.resize(last - first)
    for i in range(first, last):
        row = &table._rows[spans[i].index]
        itemsize = table.dtypes[row.dtype].itemsize
        dims = table._dims.data() + row.dims
        if not FindRuns(
            dims, dims + row.ndim, row.ndim, itemsize, MAX_RUNS, &runs[i - first]
        ) or runs[i - first].nbytes < MIN_RUN_NBYTES:
            return False
        if i > first and spans[i].start == spans[i - 1].start \
                and runs[i - first].starts == runs[i - first - 1].starts \
                and runs[i - first].nbytes == runs[i - first - 1].nbytes:
            continue
        used += runs[i - first].total()
        count += runs[i - first].starts.size()
        if 2 * used > end - spans[first].start or count > MAX_RUNS:
            return False
        for at in runs[i - first].starts:
            one.first = spans[i].start + at
            one.second = one.first + runs[i - first].nbytes
            ends.push_back(one)
    sort(ends.begin(), ends.end())
    for i in range(1, ends.size()):
        if ends[i].first < ends[i - 1].second:
            return False
    return True


cdef _gather_row(Table table, size_t index, uint32_t region, const Runs &runs):
    """Says that a tensor is all of a region that is gathered."""
    cdef Row *row = &table._rows[index]
    cdef int64_t *dims = table._dims.data() + row.dims
    cdef int i
    row.region, row.offset = region, 0
    for i in range(row.ndim):
        dims[row.ndim + i] = runs.strides[i]
    row.is_dense = _is_dense(dims, row.ndim)


cdef _owner(tensor, const TensorSpan &span, vector[uint64_t] &guards):
    """The storage of a tensor; adds what guards it. Raises ValueError if it is too small."""
    storage = tensor.untyped_storage()
    _check_storage(tensor, span, storage)
    if span.is_host and _address_word:
        words = <const uint64_t *><uintptr_t>storage._cdata
        is_known = not guards.empty() and guards[guards.size() - 2] == <uintptr_t>&words[_size_word]
        if words[_address_word] == span.storage and not is_known:
            for word in (_address_word, _size_word):
                guards.push_back(<uintptr_t>&words[word])
                guards.push_back(words[word])
    return storage


cdef array.array _as_array(const vector[uint64_t] &numbers):
    cdef array.array made = array.clone(_UINT64, numbers.size(), False)
    if not numbers.empty():
        memcpy(made.data.as_voidptr, numbers.data(), numbers.size() * 8)
    return made


# Making.


def place(array.array regions, direct, uint64_t own_block_bytes, uint64_t alignment, allocate):
    """Finds memory for the regions of an object.

    Args:
        regions: The bytes of each.
        direct: Tensors that some of the regions go straight into.
        own_block_bytes: Regions of at least so many get a block of their own.
        alignment: Of the others, which share one.
        allocate: Makes a block of so many bytes: a buffer with an ``address``.

    Returns:
        For each region its block and the offset in it, (None, 0) if it is direct; and the address
        of each as an array of uint64.
    """
    cdef array.array addresses = array.clone(_UINT64, len(regions), True)
    cdef list places = [None] * len(regions)
    cdef uint64_t nbytes, base = 0, at = 0, packed = 0
    cdef size_t i, count = len(regions)
    cdef bint has_direct = bool(direct)
    for i in range(count):
        nbytes = regions.data.as_ulonglongs[i]
        if nbytes < own_block_bytes and not (has_direct and i in direct):
            packed += _round_up(nbytes, alignment)
    shared = allocate(packed) if packed else None
    if packed:
        base = shared.address
    for i in range(count):
        nbytes = regions.data.as_ulonglongs[i]
        if has_direct and i in direct:
            places[i] = (None, 0)
            addresses.data.as_ulonglongs[i] = direct[i].data_ptr()
        elif nbytes >= own_block_bytes:
            block = allocate(nbytes)
            places[i] = (block, 0)
            addresses.data.as_ulonglongs[i] = block.address
        else:
            places[i] = (shared, at)
            addresses.data.as_ulonglongs[i] = base + at
            at += _round_up(nbytes, alignment)
    return places, addresses


cdef inline uint64_t _round_up(uint64_t nbytes, uint64_t alignment) noexcept:
    return (nbytes + alignment - 1) // alignment * alignment


def build_tensors(Table table, places, ready=None):
    """Makes the tensors of a table over memory that holds their bytes.

    Args:
        table: The layout.
        places: For each region a writable buffer and the offset in it, or a flat tensor on a
            device and 0. Each region becomes a storage of its own that keeps its buffer alive, so
            that a tensor kept alone does not drag the others' bytes along when it is pickled.
        ready: Tensors that exist already, by their number.

    Raises:
        ValueError: a buffer is too small.
    """
    cdef vector[uint32_t] tenants
    cdef Row row
    cdef _Memory memory = _Memory(places)
    if not _is_torch_known:
        _know_torch()
    tenants.resize(len(table.regions))
    for row in table._rows:
        tenants[row.region] += 1
    kinds = [_kind_of(dtype) for dtype in table.dtypes]
    storages, tensors = {}, []
    for row in table._rows:
        if ready and len(tensors) in ready:
            tensors.append(ready[len(tensors)])
            continue
        kind = <_Kind>kinds[row.dtype]
        if (
            kind.is_known
            and tenants[row.region] == 1
            and table.regions.data.as_ulonglongs[row.region] > 0
            and not (table.devices and row.region in table.devices)
        ):
            tensor = _make(table, row, kind, memory)
        else:
            tensor = _make_over_storage(table, row, places[row.region], storages)
        tensors.append(_finish(tensor, row.flags) if row.flags else tensor)
    return tensors


@cython.final
cdef class _Kind:
    """A dtype in DLPack's words, if it has any."""

    cdef DlType dtype
    cdef uint64_t itemsize
    cdef bint is_known


cdef dict _kinds = {}


cdef _Kind _kind_of(dtype):
    cdef DlTensor view
    cdef _Kind kind = _kinds.get(dtype)
    if kind is None:
        kind = _Kind()
        kind.itemsize = dtype.itemsize
        kind.is_known = _view(_torch.empty(0, dtype=dtype, device="cpu"), &view)
        if kind.is_known:
            kind.dtype = view.dtype
        _kinds[dtype] = kind
    return kind


@cython.final
cdef class _Memory:
    """Where the regions of one object are."""

    cdef list _places
    cdef object buffer
    cdef char *_base
    cdef uint64_t _nbytes

    def __init__(self, places):
        self._places = list(places)

    cdef char *at(self, uint32_t region, uint64_t start, uint64_t nbytes) except NULL:
        """The address of some bytes of a region; ``buffer`` is what keeps them alive."""
        cdef Py_buffer view
        buffer, where = self._places[region]
        cdef uint64_t offset = <uint64_t>where + start
        if buffer is not self.buffer:
            PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
            self._base, self._nbytes = <char *>view.buf, view.len
            PyBuffer_Release(&view)
            self.buffer = buffer
        if offset + nbytes > self._nbytes:
            raise ValueError(f"{offset + nbytes} bytes are meant to be in {self._nbytes}")
        return self._base + offset


cdef _make(Table table, Row row, _Kind kind, _Memory memory):
    """A tensor alone in its region."""
    cdef const int64_t *dims = table._dims.data() + row.dims
    cdef uint64_t extent = 0
    ExtentOf(dims, dims + row.ndim, row.ndim, kind.itemsize, &extent)
    cdef DlDevice host = DlDevice(CPU, 0)
    where = memory.at(row.region, row.offset, extent)
    return TensorOver(
        _exchange, <PyObject *>memory.buffer, where, host, kind.dtype, dims, dims + row.ndim,
        row.ndim,
    )


def tensor_over(uint64_t address, int64_t nbytes, int device_type, int device_index, owner):
    """A flat uint8 tensor over memory that nobody here has allocated.

    Args:
        address: Of the memory.
        nbytes: Of the memory.
        device_type: Of the device that has access to it, as DLPack numbers types.
        device_index: Of that device.
        owner: Is kept until the tensor's storage dies.

    Raises:
        RuntimeError: this torch is too old.
    """
    cdef DlDevice device = DlDevice(device_type, device_index)
    cdef DlType dtype = DlType(UINT, 8, 1)
    cdef int64_t stride = 1
    if not _is_torch_known:
        _know_torch()
    if _exchange == NULL:
        raise RuntimeError(f"torch {_torch.__version__} does not offer DLPack's exchange of tensors")
    return TensorOver(
        _exchange, <PyObject *>owner, <void *>address, device, dtype, &nbytes, &stride, 1
    )


cdef _make_over_storage(Table table, Row row, tuple where, dict storages):
    """A tensor that is empty, on a device, of a rare dtype, or one of several in its region."""
    cdef const int64_t *dims = table._dims.data() + row.dims
    dtype = table.dtypes[row.dtype]
    shape = [dims[i] for i in range(row.ndim)]
    stride = [dims[row.ndim + i] for i in range(row.ndim)]
    nbytes = table.regions[row.region]
    if not nbytes:
        is_away = row.region in table.devices and isinstance(where[0], _torch.Tensor)
        device = where[0].device if is_away else "cpu"
        return _torch.empty_strided(shape, stride, dtype=dtype, device=device)
    if row.region not in storages:
        storages[row.region] = _storage_over(where, nbytes)
    storage = storages[row.region]
    empty = _torch.empty(0, dtype=dtype, device=storage.device)
    return empty.set_(storage, row.offset // dtype.itemsize, shape, stride)


cdef _storage_over(tuple where, nbytes):
    buffer, offset = where
    if isinstance(buffer, _torch.Tensor):
        return buffer.untyped_storage()
    flat = _torch.frombuffer(buffer, dtype=_torch.uint8, count=nbytes, offset=offset)
    return flat.untyped_storage()


def finish(tensor, int flags):
    """A tensor with what its row's flags say."""
    return _finish(tensor, flags) if flags else tensor


cdef _finish(tensor, int flags):
    if not _is_torch_known:
        _know_torch()
    if flags & _CONJUGATED:
        tensor = tensor.conj()
    if flags & _NEGATED:
        tensor = _torch._neg_view(tensor)
    requires_grad = bool(flags & _REQUIRES_GRAD)
    if flags & _PARAMETER:
        return _torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)


# Pickling.


class Pickler(cloudpickle.CloudPickler):
    """Ray's pickler, with placeholders for the tensors that RDT carries.

    Attributes:
        tensors: What was taken out, in the order in which ``restore`` puts it back.
        is_parameter: For each torch tensor whether it is a Parameter.
    """

    def __init__(self, stream, buffer_callback, wanted):
        """As ``capture.take``."""
        super().__init__(stream, protocol=5, buffer_callback=buffer_callback)
        self.tensors = []
        self.is_parameter = []
        is_torch = wanted is None or wanted.is_torch
        self._devices = None if wanted is None else wanted.devices
        self._others = None if is_torch else wanted
        # Without torch in the process there is no tensor to look for.
        torch = sys.modules.get("torch") if is_torch else None
        self._tensor_type = getattr(torch, "Tensor", None)
        self._parameter_type = getattr(getattr(torch, "nn", None), "Parameter", None)

    def reducer_override(self, obj):
        kind = type(obj)
        if kind is self._tensor_type:
            if is_carried(obj, self._devices):
                self.tensors.append(obj)
                self.is_parameter.append(False)
                return (*_CALL, obj.__dict__.copy(), None, None, _set_attributes) \
                    if obj.__dict__ else _CALL
        elif kind is self._parameter_type:
            if is_carried(obj, self._devices) and not obj.__dict__:
                self.tensors.append(obj)
                self.is_parameter.append(True)
                return _CALL
        if self._others is not None and self._others.takes(obj):
            self.tensors.append(obj)
            return _CALL
        return super().reducer_override(obj)


cpdef bint is_carried(tensor, devices=None) except -1:
    """Whether RDT moves this tensor's bytes itself: plain, strided, on one of the devices.

    Args:
        tensor: The tensor.
        devices: Those of a user's transport; None for those that RDT's own know.
    """
    cdef DlTensor view
    if not _is_torch_known:
        _know_torch()
    # What DLPack can look at on the CPU is none of the kinds that are ruled out below.
    if devices is None and _view(tensor, &view) and view.device.type == CPU:
        return True
    return (
        tensor.layout is _torch.strided
        and _is_within_reach(tensor, devices)
        and not tensor.is_quantized
        and not tensor.is_nested
        and not _torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


cdef bint _is_within_reach(tensor, devices) except -1:
    if devices is not None:
        return tensor.device.type in devices
    return tensor.is_cpu or accelerators.of(tensor.device.type) is not None


_restoring = threading.local()


def restore(inband, buffers, tensors):
    """Unpickles a value, its placeholders replaced by the tensors, in their order.

    Runs on: consumer, the thread that deserializes.
    """
    before = getattr(_restoring, "tensors", None)
    _restoring.tensors = iter(tensors)
    try:
        return pickle.loads(inband, buffers=buffers)
    finally:
        _restoring.tensors = before


def next_tensor():
    """Stands in the pickled skeleton for each tensor: they are asked for in their order."""
    tensors = getattr(_restoring, "tensors", None)
    if tensors is None:
        raise pickle.UnpicklingError(
            "this is the skeleton of an RDT value; only Ray can restore its tensors"
        )
    for tensor in tensors:
        return tensor
    raise pickle.UnpicklingError("this RDT value has more placeholders than tensors")


def _set_attributes(tensor, attributes):
    tensor.__dict__.update(attributes)


#: How each tensor is pickled. Always the same tuple: ten thousand would keep the collector busy.
cdef tuple _CALL = (next_tensor, ())
