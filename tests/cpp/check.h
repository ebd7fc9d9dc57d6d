// All the test framework that these tests need: checks that count, and numbers from a seed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "common/scalar.h"

namespace glance_test {

inline int failures = 0;
inline std::string context;  // what is being tested, for messages

inline void report(const char* file, int line, const std::string& what) {
  if (++failures <= 20) {
    std::cerr << file << ":" << line << ": " << what << (context.empty() ? "" : "  in ") << context
              << "\n";
  }
}

#define EXPECT(condition)                                                             \
  do {                                                                                \
    if (!(condition)) glance_test::report(__FILE__, __LINE__, "failed: " #condition); \
  } while (false)

// Equal, both NaN, or within `tolerance` of each other.
#define EXPECT_NEAR(got, expected, tolerance)                        \
  do {                                                               \
    const double got_ = static_cast<double>(got);                    \
    const double expected_ = static_cast<double>(expected);          \
    if (!glance_test::near(got_, expected_, (tolerance))) {          \
      std::ostringstream message_;                                   \
      message_ << #got " is " << got_ << ", expected " << expected_; \
      glance_test::report(__FILE__, __LINE__, message_.str());       \
    }                                                                \
  } while (false)

inline bool near(double got, double expected, double tolerance) {
  if (std::isnan(got) || std::isnan(expected)) return std::isnan(got) && std::isnan(expected);
  return got == expected || std::abs(got - expected) <= tolerance;
}

inline int finish(const char* name) {
  if (failures == 0) {
    std::printf("%s: all well\n", name);
    return 0;
  }
  std::fprintf(stderr, "%s: %d checks failed\n", name, failures);
  return 1;
}

// The same numbers on every machine (a 64-bit linear congruential generator).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  double uniform(double low, double high) { return low + (high - low) * bits() / 4294967296.0; }
  int64_t below(int64_t limit) { return static_cast<int64_t>(bits() % limit); }

 private:
  uint64_t state_;
};

// The name of an element type as scalar.h has it, and what one rounding of it can be off by.
template <typename T>
struct Type;
template <>
struct Type<float> {
  static constexpr glance::ScalarType kDtype = glance::ScalarType::kFloat32;
  static constexpr double kEpsilon = 1.2e-7;
};
template <>
struct Type<double> {
  static constexpr glance::ScalarType kDtype = glance::ScalarType::kFloat64;
  static constexpr double kEpsilon = 2.3e-16;
};
template <>
struct Type<glance::Half> {
  static constexpr glance::ScalarType kDtype = glance::ScalarType::kFloat16;
  static constexpr double kEpsilon = 9.8e-4;
};
template <>
struct Type<glance::BFloat16> {
  static constexpr glance::ScalarType kDtype = glance::ScalarType::kBFloat16;
  static constexpr double kEpsilon = 7.9e-3;
};

template <typename T>
std::vector<T> random_values(Random& random, int64_t count, double low = -2, double high = 2) {
  std::vector<T> values(count);
  for (T& value : values) {
    value = glance::narrow<T>(static_cast<glance::accumulate_t<T>>(random.uniform(low, high)));
  }
  return values;
}

// `count` values that no kernel should leave in place.
template <typename T>
std::vector<T> poison(int64_t count) {
  return std::vector<T>(count, glance::narrow<T>(static_cast<glance::accumulate_t<T>>(-777)));
}

}  // namespace glance_test
