# DLPack: declarations, reading a tensor, and exporting memory to torch as a tensor.

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

    // The bytes from a tensor's first to its last. False if that exceeds the address space.
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

    // A tensor that is exported to torch, and the object that keeps its memory alive.
    struct ExportedTensor {
      DlManaged managed;
      PyObject *owner;
      int64_t dims[];
    };

    // Runs on: any thread, when the last tensor over the memory is deleted.
    static void DeleteExported(DlManaged *managed) {
      ExportedTensor *exported = reinterpret_cast<ExportedTensor *>(managed);
      if (Py_IsInitialized()) {
        PyGILState_STATE state = PyGILState_Ensure();
        Py_DECREF(exported->owner);
        PyGILState_Release(state);
      }
      free(exported);
    }

    static PyObject *TensorOver(const DlExchange *api, PyObject *owner, void *memory,
                                DlDevice device, DlType dtype, const int64_t *shape,
                                const int64_t *strides, int ndim) {
      size_t nbytes = sizeof(ExportedTensor) + 2 * size_t(ndim) * sizeof(int64_t);
      ExportedTensor *exported = static_cast<ExportedTensor *>(malloc(nbytes));
      if (exported == nullptr) return PyErr_NoMemory();
      for (int i = 0; i < ndim; ++i) {
        exported->dims[i] = shape[i];
        exported->dims[ndim + i] = strides[i];
      }
      exported->managed = {{1, 0}, nullptr, DeleteExported, 0,
                           {memory, device, ndim, dtype, exported->dims,
                            exported->dims + ndim, 0}};
      exported->owner = owner;
      Py_INCREF(owner);
      void *made = nullptr;
      if (api->managed_to_python(&exported->managed, &made) != 0) {
        DeleteExported(&exported->managed);
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

cdef array.array _UINT64 = array.array("Q")

# Set at the first tensor of the process. torch is never unloaded.
cdef const DlExchange *_exchange = NULL
cdef bint _is_torch_loaded = False
cdef object _torch = None
# Indices of the words of a storage that hold the address and size of its memory; 0 if unknown.
cdef size_t _address_word = 0
cdef size_t _size_word = 0


cdef _load_torch():
    """Import torch and look up its DLPack functions.

    Runs on: any thread that reads or makes a tensor. Raises ImportError.
    """
    global _torch, _exchange, _is_torch_loaded
    import torch

    _torch = torch
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is not None:
        exchange = <DlExchange *>PyCapsule_GetPointer(capsule, b"dlpack_exchange_api")
        if exchange.version[0] == 1:
            _exchange = exchange
    _find_storage_words()
    _is_torch_loaded = True


cdef _find_storage_words():
    """Find the layout of torch's storages by inspecting two of them."""
    global _address_word, _size_word
    cdef const uint64_t *words
    cdef size_t i
    addresses, sizes = set(range(1, 8)), set(range(1, 8))
    for nbytes in (1009, 2003):
        storage = _torch.UntypedStorage(nbytes, device="cpu")
        words = <const uint64_t *><uintptr_t>storage._cdata
        addresses &= {i for i in range(8) if words[i] == <uint64_t>storage.data_ptr()}
        sizes &= {i for i in range(8) if words[i] == <uint64_t>nbytes}
    # The allocator stores the address a second time, after the first.
    if addresses and len(sizes) == 1:
        _address_word, _size_word = min(addresses), sizes.pop()


cdef inline bint _view(tensor, DlTensor *view) except -1:
    """Read a tensor through DLPack. Return False if DLPack does not support it."""
    if not _is_torch_loaded:
        _load_torch()
    if _exchange == NULL:
        return False
    try:
        _exchange.view_of_python(<void *>tensor, view)
    except Exception:
        return False
    return True
