# Making tensors over memory that holds their bytes.

def place(array.array regions, direct, uint64_t own_block_bytes, uint64_t alignment, allocate):
    """Find memory for the regions of an object.

    Args:
        regions: The size of each in bytes.
        direct: Target tensors into which some of the regions are received directly, by region.
        own_block_bytes: Regions of at least this size get a block of their own.
        alignment: Alignment in bytes of the others, which share a block.
        allocate: Returns a block of the given size: a buffer with an ``address``.

    Returns:
        The block and offset of each region, (None, 0) if it is direct; and the address of each as
        an array of uint64.
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
    """Make the tensors of a table over memory that holds their bytes.

    Args:
        table: The layout.
        places: For each region a writable buffer and an offset, or a flat tensor on a device and
            0. Each region becomes its own storage, which keeps its buffer alive. So a pickled
            tensor does not include the bytes of other regions.
        ready: Tensors that exist already, by index.

    Raises:
        ValueError: A buffer is too small.
    """
    cdef vector[uint32_t] tenants
    cdef Row row
    cdef _Memory memory = _Memory(places)
    if not _is_torch_loaded:
        _load_torch()
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
            kind.is_supported
            and tenants[row.region] == 1
            and table.regions.data.as_ulonglongs[row.region] > 0
            and not (table.devices and row.region in table.devices)
        ):
            tensor = _make(table, row, kind, memory)
        else:
            tensor = _make_over_storage(table, row, places[row.region], storages)
        tensors.append(_apply_flags(tensor, row.flags) if row.flags else tensor)
    return tensors


@cython.final
cdef class _Kind:
    """The DLPack type of a dtype, if there is one."""

    cdef DlType dtype
    cdef uint64_t itemsize
    cdef bint is_supported


cdef dict _kinds = {}


cdef _Kind _kind_of(dtype):
    cdef DlTensor view
    cdef _Kind kind = _kinds.get(dtype)
    if kind is None:
        kind = _Kind()
        kind.itemsize = dtype.itemsize
        kind.is_supported = _view(_torch.empty(0, dtype=dtype, device="cpu"), &view)
        if kind.is_supported:
            kind.dtype = view.dtype
        _kinds[dtype] = kind
    return kind


@cython.final
cdef class _Memory:
    """The memory of the regions of one object."""

    cdef list _places
    cdef object buffer
    cdef char *_base
    cdef uint64_t _nbytes

    def __init__(self, places):
        self._places = list(places)

    cdef char *at(self, uint32_t region, uint64_t start, uint64_t nbytes) except NULL:
        """Return the address of some bytes of a region. ``buffer`` keeps them alive."""
        cdef Py_buffer view
        buffer, where = self._places[region]
        cdef uint64_t offset = <uint64_t>where + start
        if buffer is not self.buffer:
            PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
            self._base, self._nbytes = <char *>view.buf, view.len
            PyBuffer_Release(&view)
            self.buffer = buffer
        if offset + nbytes > self._nbytes:
            raise ValueError(f"a buffer of {self._nbytes} bytes is too small: {offset + nbytes} are needed")
        return self._base + offset


cdef _make(Table table, Row row, _Kind kind, _Memory memory):
    """Make a tensor that is alone in its region."""
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
    """Make a flat uint8 tensor over memory that torch has not allocated.

    Args:
        address: The address of the memory.
        nbytes: Its size.
        device_type: DLPack's number for the type of the device that has access to it.
        device_index: The index of that device.
        owner: An object that is kept until the tensor's storage is deleted.

    Raises:
        RuntimeError: The torch version is too old.
    """
    cdef DlDevice device = DlDevice(device_type, device_index)
    cdef DlType dtype = DlType(UINT, 8, 1)
    cdef int64_t stride = 1
    if not _is_torch_loaded:
        _load_torch()
    if _exchange == NULL:
        raise RuntimeError(f"torch {_torch.__version__} does not offer DLPackExchangeAPI")
    return TensorOver(
        _exchange, <PyObject *>owner, <void *>address, device, dtype, &nbytes, &stride, 1
    )


cdef _make_over_storage(Table table, Row row, tuple where, dict storages):
    """Make a tensor that shares its region, is empty or on a device, or that DLPack lacks a type for."""
    cdef const int64_t *dims = table._dims.data() + row.dims
    dtype = table.dtypes[row.dtype]
    shape = [dims[i] for i in range(row.ndim)]
    stride = [dims[row.ndim + i] for i in range(row.ndim)]
    nbytes = table.regions[row.region]
    if not nbytes:
        is_on_device = row.region in table.devices and isinstance(where[0], _torch.Tensor)
        device = where[0].device if is_on_device else "cpu"
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


def apply_flags(tensor, int flags):
    """Return a tensor with the flags of its row applied."""
    return _apply_flags(tensor, flags) if flags else tensor


cdef _apply_flags(tensor, int flags):
    if not _is_torch_loaded:
        _load_torch()
    if flags & _CONJUGATED:
        tensor = tensor.conj()
    if flags & _NEGATED:
        tensor = _torch._neg_view(tensor)
    requires_grad = bool(flags & _REQUIRES_GRAD)
    if flags & _PARAMETER:
        return _torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)
