// Rows of numbers of any floating point type, as the type that is computed in: float, or double for float64.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <cstdlib>  // defines __GLIBC__ where it is

// Loops over rows are compiled for x86 with and without AVX2, of which the running one's is taken: a wheel
// travels, so nothing may be compiled for the machine that builds it. Vectors of 512 bits were slower.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FASTJEPA_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define FASTJEPA_CLONES
#endif

namespace fastjepa {

bool is_floating(at::ScalarType dtype);  // one of float64, float32, bfloat16, float16

// The row itself where it is in Work already, else converted into `scratch`. [n]
template <typename Work>
const Work* read_row(const void* row, at::ScalarType dtype, Work* scratch, int64_t n);

// Rounds to the nearest, ties to even.
template <typename Work>
void write_row(const Work* from, void* row, at::ScalarType dtype, int64_t n);

void add_row(const float* from, float* to, int64_t n);  // to += from
void add_row(const double* from, double* to, int64_t n);

}  // namespace fastjepa
