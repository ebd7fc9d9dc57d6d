// csrc/common/scalar.h: 16-bit floats against the definition of their formats.
#include "common/scalar.h"

#include <cmath>
#include <limits>

#include "check.h"

using glance::BFloat16;
using glance::bits_to_float;
using glance::Half;
using glance::narrow;
using glance::widen;
using glance_test::context;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The value of a bit pattern from sign, exponent and fraction, by arithmetic alone.
double value_of(uint32_t bits, int exponent_bits, int fraction_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const uint32_t fraction = bits & ((1u << fraction_bits) - 1);
  const int exponent = static_cast<int>(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const double sign = bits >> (exponent_bits + fraction_bits) ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - fraction_bits);
  return sign *
         std::ldexp(fraction + std::ldexp(1.0, fraction_bits), exponent - bias - fraction_bits);
}

template <typename T>
void every_pattern_widens_and_comes_back(int exponent_bits, int fraction_bits) {
  for (uint32_t bits = 0; bits <= 0xffffu; ++bits) {
    context = "pattern " + std::to_string(bits);
    const T narrow_value{static_cast<uint16_t>(bits)};
    const float wide = widen(narrow_value);
    EXPECT_NEAR(wide, value_of(bits, exponent_bits, fraction_bits), 0);
    const uint16_t back = narrow<T>(wide).bits;
    if (std::isnan(wide)) {
      EXPECT(std::isnan(widen(T{back})));  // the payload may differ
    } else {
      EXPECT(back == bits);  // the sign of zero included
    }
  }
  context.clear();
}

// Between two neighbours: below the middle goes down, above goes up, the middle to the even one.
template <typename T>
void rounds_to_nearest_even(uint32_t largest_finite) {
  for (uint32_t bits = 0; bits < largest_finite; ++bits) {
    context = "above pattern " + std::to_string(bits);
    const T low{static_cast<uint16_t>(bits)}, high{static_cast<uint16_t>(bits + 1)};
    // The middle of two neighbours has one more bit, which float has room for.
    const float middle = widen(low) / 2 + widen(high) / 2;
    if (!(middle > widen(low) && middle < widen(high))) continue;  // float's own subnormal end
    const float below = std::nextafter(middle, -kInfinity),
                above = std::nextafter(middle, kInfinity);
    const uint16_t even = bits % 2 == 0 ? low.bits : high.bits;
    EXPECT(narrow<T>(middle).bits == even);
    EXPECT(narrow<T>(below).bits == low.bits);
    EXPECT(narrow<T>(above).bits == high.bits);
    EXPECT(narrow<T>(-middle).bits == (even | 0x8000u));
  }
  context.clear();
}

void half_overflows_to_infinity() {
  EXPECT(narrow<Half>(65504.0f).bits == 0x7bff);
  EXPECT(narrow<Half>(std::nextafter(65520.0f, 0.0f)).bits == 0x7bff);
  EXPECT(narrow<Half>(65520.0f).bits == 0x7c00);  // the middle; infinity counts as even
  EXPECT(narrow<Half>(-1e30f).bits == 0xfc00);
  EXPECT(narrow<Half>(kInfinity).bits == 0x7c00);
  EXPECT(std::isnan(widen(narrow<Half>(NAN))));
}

void half_underflows_to_subnormals_and_zero() {
  const float smallest = std::ldexp(1.0f, -24);
  EXPECT(narrow<Half>(smallest).bits == 1);
  EXPECT(narrow<Half>(smallest / 2).bits == 0);  // the middle of 0 and 1 goes to the even 0
  EXPECT(narrow<Half>(std::nextafter(smallest / 2, 1.0f)).bits == 1);
  EXPECT(narrow<Half>(-smallest / 4).bits == 0x8000);  // minus zero
  EXPECT(narrow<Half>(std::ldexp(1023.0f, -24)).bits == 0x03ff);
  EXPECT(narrow<Half>(std::ldexp(1.0f, -14)).bits == 0x0400);
}

void bfloat16_overflows_to_infinity() {
  const float largest = bits_to_float(0x7f7f0000u);
  EXPECT(narrow<BFloat16>(largest).bits == 0x7f7f);
  EXPECT(narrow<BFloat16>(bits_to_float(0x7f7f7fffu)).bits == 0x7f7f);
  EXPECT(narrow<BFloat16>(bits_to_float(0x7f7f8000u)).bits == 0x7f80);
  EXPECT(narrow<BFloat16>(-std::numeric_limits<float>::max()).bits == 0xff80);
  EXPECT(narrow<BFloat16>(kInfinity).bits == 0x7f80);
}

void bfloat16_keeps_nan_whose_payload_lies_in_the_lost_bits() {
  EXPECT(std::isnan(widen(narrow<BFloat16>(bits_to_float(0x7f800001u)))));
  EXPECT(std::isnan(widen(narrow<BFloat16>(bits_to_float(0xffffffffu)))));
}

void dispatch_reaches_the_named_type() {
  const auto size_of = [](glance::ScalarType dtype) {
    size_t size = 0;
    glance::dispatch_cpu(dtype, [&](auto tag) { size = sizeof(typename decltype(tag)::type); });
    return size;
  };
  EXPECT(size_of(glance::ScalarType::kFloat32) == 4);
  EXPECT(size_of(glance::ScalarType::kFloat64) == 8);
  EXPECT(size_of(glance::ScalarType::kFloat16) == 2);
  EXPECT(size_of(glance::ScalarType::kBFloat16) == 2);
}

}  // namespace

int main() {
  every_pattern_widens_and_comes_back<Half>(5, 10);
  every_pattern_widens_and_comes_back<BFloat16>(8, 7);
  rounds_to_nearest_even<Half>(0x7bff);
  rounds_to_nearest_even<BFloat16>(0x7f7f);
  half_overflows_to_infinity();
  half_underflows_to_subnormals_and_zero();
  bfloat16_overflows_to_infinity();
  bfloat16_keeps_nan_whose_payload_lies_in_the_lost_bits();
  dispatch_reaches_the_named_type();
  return glance_test::finish("scalar");
}
