// Runs the tests whose names contain the first argument, or all tests.
//
// A test that hangs ends the program after kTestTimeoutS, with its name.
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "check.h"
#include "fixtures.h"

namespace {

constexpr unsigned kTestTimeoutS = 300;

bool Passes(const check::Test &test) {
  auto start = std::chrono::steady_clock::now();
  std::printf("%s ", test.name.c_str());
  std::fflush(stdout);
  alarm(kTestTimeoutS);
  std::string error;
  try {
    test.run();
  } catch (const std::exception &failure) {
    error = failure.what();
  }
  std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  std::printf("%s (%.2f s)\n",
              error.empty() ? "ok" : ("FAILED\n  " + error).c_str(),
              took.count());
  return error.empty();
}

}  // namespace

int main(int argc, char **argv) {
  if (argc == 4 && std::strcmp(argv[1], "--produce") == 0) {
    return fixtures::Producer::Main(std::strtoull(argv[2], nullptr, 10),
                                    static_cast<unsigned>(std::atoi(argv[3])));
  }
  int failed = 0;
  int run = 0;
  for (const check::Test &test : check::AllTests()) {
    if (argc > 1 && test.name.find(argv[1]) == std::string::npos) continue;
    ++run;
    failed += Passes(test) ? 0 : 1;
  }
  std::printf("%d tests, %d failed\n", run, failed);
  return failed == 0 && run > 0 ? 0 : 1;
}
