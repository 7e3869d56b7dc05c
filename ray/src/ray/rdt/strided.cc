#include "ray/rdt/strided.h"

#include <algorithm>

namespace ray::rdt {
namespace {

struct Dim {
  int index;
  uint64_t length;
  uint64_t step;  // in bytes
};

// The dimensions along which the address changes, outermost first.
std::vector<Dim> MovingDims(const int64_t *shape,
                            const int64_t *strides,
                            int ndim,
                            uint64_t itemsize) {
  std::vector<Dim> dims;
  for (int i = 0; i < ndim; ++i) {
    if (shape[i] < 2 || strides[i] == 0) continue;
    dims.push_back({i,
                    static_cast<uint64_t>(shape[i]),
                    static_cast<uint64_t>(strides[i]) * itemsize});
  }
  std::ranges::stable_sort(
      dims, [](const Dim &one, const Dim &two) { return one.step > two.step; });
  return dims;
}

// The strides of a copy without gaps. A dimension of length 1 has the stride of a dense
// tensor.
std::vector<int64_t> DenseStrides(const std::vector<Dim> &dims,
                                  const int64_t *shape,
                                  int ndim) {
  std::vector<int64_t> dense(static_cast<size_t>(ndim), 0);
  int64_t step = 1;
  for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
    dense[static_cast<size_t>(dim->index)] = step;
    step *= static_cast<int64_t>(dim->length);
  }
  for (int i = ndim - 1; i >= 0; --i) {
    auto at = static_cast<size_t>(i);
    if (shape[i] == 1) dense[at] = i + 1 == ndim ? 1 : dense[at + 1] * shape[i + 1];
  }
  return dense;
}

}  // namespace

bool FindRuns(const int64_t *shape,
              const int64_t *strides,
              int ndim,
              uint64_t itemsize,
              uint64_t max_count,
              Runs *runs) {
  std::vector<Dim> dims = MovingDims(shape, strides, ndim, itemsize);
  runs->strides = DenseStrides(dims, shape, ndim);
  runs->nbytes = itemsize;
  while (!dims.empty() && dims.back().step == runs->nbytes) {
    runs->nbytes *= dims.back().length;
    dims.pop_back();
  }
  uint64_t extent = runs->nbytes, count = 1;
  for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
    if (dim->step < extent || dim->length > max_count / count) return false;
    extent += (dim->length - 1) * dim->step;
    count *= dim->length;
  }
  runs->starts.assign(1, 0);
  for (const Dim &dim : dims) {
    std::vector<uint64_t> inner;
    inner.reserve(runs->starts.size() * dim.length);
    for (uint64_t start : runs->starts) {
      for (uint64_t i = 0; i < dim.length; ++i) inner.push_back(start + i * dim.step);
    }
    runs->starts = std::move(inner);
  }
  return true;
}

}  // namespace ray::rdt
