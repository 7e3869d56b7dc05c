# The layout of an object's tensors: what travels of it, and what its producer keeps.

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
