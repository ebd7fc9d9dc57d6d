// Element types without torch: what a kernel may be asked to compute in, and how to widen it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

// Marks what device code may call too; nothing to a plain C++ compiler.
#ifdef __CUDACC__
#define GLANCE_HOST_DEVICE __host__ __device__
#else
#define GLANCE_HOST_DEVICE
#endif

// Marks the body of a kernel that the C++ tests run too, where it is an ordinary function.
#ifdef __CUDACC__
#define GLANCE_DEVICE __device__ __forceinline__
#define GLANCE_DEVICE_UNROLL _Pragma("unroll")
#define GLANCE_DEVICE_ROLL _Pragma("unroll 1")
#else
#define GLANCE_DEVICE inline
#define GLANCE_DEVICE_UNROLL
#define GLANCE_DEVICE_ROLL
#endif

namespace glance {

enum class ScalarType : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

// 16-bit floats as the CPU kernels see them: storage only, arithmetic happens in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// The type that a kernel accumulates in: float, or double for double.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) {
  return bits_to_float(static_cast<uint32_t>(value.bits) << 16);
}
inline float widen(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Shifting the exponent into place and scaling by 2^112 handles normal and subnormal alike.
  const float scaled = bits_to_float(magnitude << 13) * bits_to_float(0x77800000u);
  return bits_to_float(sign | float_to_bits(scaled));
}

// Rounds to nearest even, as IEEE 754 and torch do.
template <typename T>
inline T narrow(accumulate_t<T> value) {
  return value;
}
template <>
inline BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = float_to_bits(value);
  if (value != value) return BFloat16{static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return BFloat16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
inline Half narrow<Half>(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // rounds to infinity
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {
    // Subnormal: adding 0.5 lets the float adder round at the right bit.
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  }
  return Half{static_cast<uint16_t>(sign | half)};
}

// From one element type to another, through the accumulate type.
template <typename To, typename From>
inline To convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else {
    return narrow<To>(widen(value));
  }
}

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls `body` with a TypeTag of the CPU element type that `dtype` names.
template <typename Body>
inline void dispatch_cpu(ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::kFloat32:
      return body(TypeTag<float>{});
    case ScalarType::kFloat64:
      return body(TypeTag<double>{});
    case ScalarType::kFloat16:
      return body(TypeTag<Half>{});
    case ScalarType::kBFloat16:
      return body(TypeTag<BFloat16>{});
  }
}

}  // namespace glance
