# Reading tensors: the regions of an object.

def lay_out(list tensors, is_parameter=None, bint may_gather=True):
    """Find the regions of tensors and the place of each tensor in its region: a Layout.

    Spans of one storage that overlap or touch are one region. If they use less than half of it,
    each is gathered into a region of its own. Addresses are unique in a process, across all its
    devices. Copies nothing.

    Args:
        tensors: Tensors with the strided layout.
        is_parameter: Whether each is a ``torch.nn.Parameter``; None if none is.
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
    """Raise ValueError if a tensor exceeds its storage, for example because it was freed."""
    cdef Row row
    cdef TensorSpan span
    _read(tensor, Table(), &row, &span, [])
    if span.start < span.end:
        _check_storage(tensor, span, tensor.untyped_storage())


cdef _check_storage(tensor, const TensorSpan &span, storage):
    if <uint64_t>storage.nbytes() < span.end - span.storage:
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} needs {span.end - span.storage} bytes of a "
            f"storage that has {storage.nbytes()}: it was freed or made smaller (resize_)"
        )


cdef bint _read(tensor, Table table, Row *row, TensorSpan *span, list dtypes) except -1:
    """Read a tensor's layout into its row and span. Return whether it is in host memory."""
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
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has strides that are not supported")
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
    """Merge sorted spans into regions."""
    cdef vector[uint64_t] starts, sizes, offsets, storages, guards
    cdef vector[Runs] runs
    cdef list owners = []
    cdef dict gathered = {}
    cdef size_t first = 0, last, i, widest
    cdef uint64_t start, end, storage
    while first < spans.size():
        last, widest = first + 1, first
        start, end, storage = spans[first].start, spans[first].end, spans[first].storage
        # An empty span is not merged: its address may have any value.
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
    """Tell whether the tensors of one region are gathered, and find the runs of each.

    Tensors that share only a part of their bytes are not gathered: their copies must share it as
    well. Tensors that share all their bytes become one region.
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
    """Make a tensor's row refer to the whole of a gathered region."""
    cdef Row *row = &table._rows[index]
    cdef int64_t *dims = table._dims.data() + row.dims
    cdef int i
    row.region, row.offset = region, 0
    for i in range(row.ndim):
        dims[row.ndim + i] = runs.strides[i]
    row.is_dense = _is_dense(dims, row.ndim)


cdef _owner(tensor, const TensorSpan &span, vector[uint64_t] &guards):
    """Return a tensor's storage and add its guards. Raises ValueError if it is too small."""
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
