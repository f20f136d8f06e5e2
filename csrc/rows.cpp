#include "rows.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <cstring>
#include <type_traits>

namespace fastjepa {
namespace {

#define FASTJEPA_CONVERT(From, To)                                 \
  FASTJEPA_CLONES void convert(const From* from, To* to, int64_t n) { \
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]); \
  }

FASTJEPA_CONVERT(float, double)
FASTJEPA_CONVERT(double, float)

FASTJEPA_CLONES void convert(const c10::BFloat16* from, float* to, int64_t n) {
  const auto* bits = reinterpret_cast<const uint16_t*>(from);
  auto* wide = reinterpret_cast<uint32_t*>(to);
  for (int64_t i = 0; i < n; ++i) wide[i] = static_cast<uint32_t>(bits[i]) << 16;
}

FASTJEPA_CLONES void convert(const float* from, c10::BFloat16* to, int64_t n) {
  const auto* bits = reinterpret_cast<const uint32_t*>(from);
  auto* narrow = reinterpret_cast<uint16_t*>(to);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t rounded = (bits[i] + 0x7FFF + ((bits[i] >> 16) & 1)) >> 16;
    const bool is_nan = (bits[i] & 0x7FFF'FFFF) > 0x7F80'0000;  // rounding could turn it into infinity
    narrow[i] = static_cast<uint16_t>(is_nan ? 0x7FC0 : rounded);
  }
}

FASTJEPA_CONVERT(c10::Half, float)
FASTJEPA_CONVERT(float, c10::Half)
FASTJEPA_CONVERT(c10::BFloat16, double)
FASTJEPA_CONVERT(c10::Half, double)

// As torch rounds them: by way of float.
FASTJEPA_CONVERT(double, c10::BFloat16)
FASTJEPA_CONVERT(double, c10::Half)

template <typename F>
void with_type(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kDouble: return f(static_cast<double*>(nullptr));
    case at::kFloat: return f(static_cast<float*>(nullptr));
    case at::kBFloat16: return f(static_cast<c10::BFloat16*>(nullptr));
    case at::kHalf: return f(static_cast<c10::Half*>(nullptr));
    default: TORCH_CHECK_VALUE(false, "must be float64, float32, bfloat16 or float16, got ", dtype);
  }
}

}  // namespace

bool is_floating(at::ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

template <typename Work>
const Work* read_row(const void* row, at::ScalarType dtype, Work* scratch, int64_t n) {
  const Work* found = scratch;
  with_type(dtype, [&](auto* type) {
    using From = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<From, Work>) {
      found = static_cast<const Work*>(row);
    } else {
      convert(static_cast<const From*>(row), scratch, n);
    }
  });
  return found;
}

template <typename Work>
void write_row(const Work* from, void* row, at::ScalarType dtype, int64_t n) {
  with_type(dtype, [&](auto* type) {
    using To = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<To, Work>) {
      if (from != row && n > 0) std::memcpy(row, from, n * sizeof(Work));
    } else {
      convert(from, static_cast<To*>(row), n);
    }
  });
}

FASTJEPA_CLONES void add_row(const float* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

FASTJEPA_CLONES void add_row(const double* from, double* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

template const float* read_row(const void*, at::ScalarType, float*, int64_t);
template const double* read_row(const void*, at::ScalarType, double*, int64_t);
template void write_row(const float*, void*, at::ScalarType, int64_t);
template void write_row(const double*, void*, at::ScalarType, int64_t);

}  // namespace fastjepa
