#include "check.h"
#include "ray/rdt/strided.h"

namespace ray::rdt {
namespace {

using Numbers = std::vector<int64_t>;

struct Tensor {
  Numbers shape;
  Numbers strides;
  uint64_t itemsize;
};

bool Find(const Tensor &tensor, Runs *runs, uint64_t max_count = 1000) {
  return FindRuns(tensor.shape.data(),
                  tensor.strides.data(),
                  static_cast<int>(tensor.shape.size()),
                  tensor.itemsize,
                  max_count,
                  runs);
}

TEST("strided: a dense tensor is one run") {
  Runs runs;
  CHECK(Find({{4, 1, 6}, {6, 6, 1}, 8}, &runs));
  CHECK(runs.starts == std::vector<uint64_t>{0});
  CHECK_EQ(runs.nbytes, 4u * 6 * 8);
  CHECK(runs.strides == (Numbers{6, 6, 1}));
  CHECK(Find({{}, {}, 2}, &runs));
  CHECK_EQ(runs.total(), 2u);
}

TEST("strided: one block of a cache is a run for each layer") {
  Runs runs;
  CHECK(Find({{3, 2, 10}, {1000, 10, 1}, 4}, &runs));
  CHECK(runs.starts == (std::vector<uint64_t>{0, 4000, 8000}));
  CHECK_EQ(runs.nbytes, 80u);
  CHECK(runs.strides == (Numbers{20, 10, 1}));
}

TEST("strided: runs are in the order of memory, whatever the order of dimensions") {
  Runs runs;
  CHECK(Find({{2, 10, 3}, {500, 1, 20}, 4}, &runs));
  CHECK(runs.starts == (std::vector<uint64_t>{0, 80, 160, 2000, 2080, 2160}));
  CHECK_EQ(runs.nbytes, 40u);
  CHECK(runs.strides == (Numbers{30, 1, 10}));
}

TEST("strided: what is expanded is there once") {
  Runs runs;
  CHECK(Find({{5, 2, 10}, {0, 100, 1}, 1}, &runs));
  CHECK_EQ(runs.total(), 20u);
  CHECK(runs.strides == (Numbers{0, 10, 1}));
}

TEST("strided: rows that overlap, and too many of them, have no runs") {
  Runs runs;
  CHECK(!Find({{2, 2}, {1, 1}, 4}, &runs));
  CHECK(!Find({{3, 10}, {9, 1}, 4}, &runs));
  CHECK(!Find({{11, 100}, {50, 7}, 4}, &runs));
  CHECK(Find({{10, 100}, {1000, 2}, 4}, &runs));
  CHECK(!Find({{10, 101}, {1000, 2}, 4}, &runs));
  CHECK(!Find({{int64_t{1} << 40, int64_t{1} << 20}, {int64_t{1} << 21, 2}, 4}, &runs));
}

}  // namespace
}  // namespace ray::rdt
