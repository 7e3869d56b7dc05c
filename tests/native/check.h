// A test framework of the size that these tests need.
#pragma once

#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace check {

struct Test {
  std::string name;
  std::function<void()> run;
};

inline std::vector<Test> &AllTests() {
  static std::vector<Test> tests;
  return tests;
}

struct Registered {
  Registered(const char *name, std::function<void()> run) {
    AllTests().push_back({name, std::move(run)});
  }
};

[[noreturn]] inline void Fail(const char *file, int line, const std::string &text) {
  std::ostringstream out;
  out << file << ":" << line << ": " << text;
  throw std::runtime_error(out.str());
}

template <class A, class B>
void Equal(const A &a, const B &b, const char *what, const char *file, int line) {
  if (a == b) return;
  std::ostringstream out;
  out << what << ": " << a << " is not " << b;
  Fail(file, line, out.str());
}

}  // namespace check

// The name is a sentence: what the code does.
#define TEST_NAME_(line) Test_##line
#define TEST_AT_(name, line)                                                 \
  static void TEST_NAME_(line)();                                            \
  static const check::Registered Registered_##line(name, &TEST_NAME_(line)); \
  static void TEST_NAME_(line)()
#define TEST_LINE_(name, line) TEST_AT_(name, line)
#define TEST(name) TEST_LINE_(name, __LINE__)

#define CHECK(condition) \
  ((condition) ? void() : check::Fail(__FILE__, __LINE__, #condition))
#define CHECK_EQ(a, b) check::Equal((a), (b), #a " == " #b, __FILE__, __LINE__)
