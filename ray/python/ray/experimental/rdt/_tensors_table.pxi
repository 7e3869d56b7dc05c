# The layout of an object's tensors: the table for consumers, and the producer's part.

@cython.final
cdef class Table:
    """The layout of an object's tensors, as it is sent to consumers. Immutable.

    Attributes:
        regions: The size of each region in bytes, an array of uint64.
        dtypes: The dtypes of the tensors, each once.
        devices: The torch device type of each region that is not in host memory. The index of
            the device is not sent: a consumer receives on its current device.
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
        """Return the number of tensors."""
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
    """Load a pickled ``Table``. Raises ValueError if it is inconsistent."""
    cdef Table table = Table()
    cdef uint64_t extent = 0
    cdef const int64_t *first
    cdef Row row
    if len(regions) % 8 or len(rows) % sizeof(Row) or len(dims) % 8:
        raise ValueError("the tensor table of an RDT value is truncated")
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
            raise ValueError("the tensor table of an RDT value refers to an entry that it does not have")
        first = table._dims.data() + row.dims
        if (
            not ExtentOf(first, first + row.ndim, row.ndim, itemsizes[row.dtype], &extent)
            or row.offset + extent < extent
            or row.offset + extent > table.regions.data.as_ulonglongs[row.region]
        ):
            raise ValueError("a tensor of an RDT value exceeds its region")
    return table


@cython.final
cdef class Layout:
    """The layout of an object's tensors in the memory of its producer.

    Attributes:
        table: The part that is sent to consumers.
        addresses: The address of each region, as uint64.
        owners: The storage of each region, which owns its memory; None for an empty region.
        offsets: The offset of each region within its storage in bytes, as uint64.
        runs: For each gathered region the offsets of its runs from its address, as uint64, and
            the bytes of a run.
        storages: The addresses of the storages that have bytes in a region, sorted, as uint64.
        guards: For ``Agent.register``: words that change when a storage in host memory is freed,
            resized or moved.
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
        """Tell whether no storage was moved or made smaller."""
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
