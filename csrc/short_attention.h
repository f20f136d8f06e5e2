// Attention of one sequence and head in fp32, by products of matrices that fit into the cache. Everything is
// inlined into functions that are compiled for one kind of processor each.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FASTJEPA_X86_VERSIONS 1
#endif
#define FASTJEPA_INLINE inline __attribute__((always_inline))
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to nothing that is not inlined
#endif

namespace fastjepa {

constexpr int64_t kVector = 16;
typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));

// Where the numbers of all heads are, and by `of` those of one.
struct Head {
  const float *query, *key, *value, *dout = nullptr;
  float *out = nullptr, *lse = nullptr, *dqkv = nullptr;
  int64_t row, part_stride, head_stride;  // of qkv, in elements
  int64_t out_row = 0, dqkv_part = 0;     // H * d
  int64_t width, tokens, length = 0;      // d, T, L
  float scale;

  void read(const float* qkv, int64_t rows, int64_t parts, int64_t heads, int64_t d, int64_t t, double by) {
    query = qkv, key = qkv + parts, value = qkv + 2 * parts;
    row = rows, part_stride = parts, head_stride = heads, width = d, tokens = t, scale = static_cast<float>(by);
  }

  Head of(int64_t first, int64_t h, int64_t l) const {
    Head one = *this;
    const int64_t in = first * row + h * head_stride, at = first * out_row + h * width;
    one.query += in, one.key += in, one.value += in;
    one.out += at, one.lse += h * tokens + first, one.length = l;
    if (dout) one.dout += at, one.dqkv += first * 3 * dqkv_part + h * width;
    return one;
  }
};

FASTJEPA_INLINE int64_t padded(int64_t n) { return (n + kVector - 1) / kVector * kVector; }

inline int64_t forward_scratch(int64_t length, int64_t width) { return (width + length) * padded(length); }
inline int64_t backward_scratch(int64_t length, int64_t width) {
  return 2 * (width + length) * padded(length);
}

FASTJEPA_INLINE Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
FASTJEPA_INLINE void store(float* to, Floats x) { *reinterpret_cast<Floats*>(to) = x; }

// c[r, :] = sum over k of a[r, k] * b[k, :], of ROWS rows and VECTORS * 16 columns. `a` is read number by
// number, so it may as well be transposed: row r is at a + r * row, its next number `step` further.
template <int ROWS, int VECTORS>
FASTJEPA_INLINE void tile(
    const float* a, int64_t row, int64_t step, const float* b, int64_t b_row, float* c, int64_t c_row,
    int64_t terms) {
  Floats sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = Floats{};
  }
  for (int64_t k = 0; k < terms; ++k) {
    Floats there[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) there[v] = load(b + k * b_row + v * kVector);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const float factor = a[r * row + k * step];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += factor * there[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) store(c + r * c_row + v * kVector, sums[r][v]);
  }
}

template <int VECTORS>
FASTJEPA_INLINE void columns(
    const float* a, int64_t row, int64_t step, const float* b, int64_t b_row, float* c, int64_t c_row,
    int64_t rows, int64_t terms) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) tile<6, VECTORS>(a + r * row, row, step, b, b_row, c + r * c_row, c_row, terms);
  for (; r + 2 <= rows; r += 2) tile<2, VECTORS>(a + r * row, row, step, b, b_row, c + r * c_row, c_row, terms);
  for (; r < rows; ++r) tile<1, VECTORS>(a + r * row, row, step, b, b_row, c + r * c_row, c_row, terms);
}

// c [rows, width] = a [rows, terms] b [terms, width], `width` a multiple of 16. WIDEST is how many vectors of
// sums for each of 6 rows there are registers for.
template <int WIDEST>
FASTJEPA_INLINE void product(
    const float* a, int64_t row, int64_t step, const float* b, int64_t b_row, float* c, int64_t c_row,
    int64_t rows, int64_t width, int64_t terms) {
  int64_t first = 0;
  if constexpr (WIDEST == 4) {
    for (; first + 4 * kVector <= width; first += 4 * kVector) {
      columns<4>(a, row, step, b + first, b_row, c + first, c_row, rows, terms);
    }
    if (width - first == 3 * kVector) {
      return columns<3>(a, row, step, b + first, b_row, c + first, c_row, rows, terms);
    }
    if (width - first == 2 * kVector) {
      return columns<2>(a, row, step, b + first, b_row, c + first, c_row, rows, terms);
    }
  }
  for (; first < width; first += kVector) {
    columns<1>(a, row, step, b + first, b_row, c + first, c_row, rows, terms);
  }
}

// Rows [length, width] as columns [width, padded length], with zeros after them.
FASTJEPA_INLINE void transpose(const float* from, int64_t row, int64_t length, int64_t width, float* to) {
  const int64_t across = padded(length);
  for (int64_t i = 0; i < length; ++i) {
    for (int64_t k = 0; k < width; ++k) to[k * across + i] = from[i * row + k];
  }
  for (int64_t k = 0; k < width; ++k) {
    for (int64_t i = length; i < across; ++i) to[k * across + i] = 0;
  }
}

// e to the x, of x up to 0, to the last bit but one; below -87 it is next to nothing. A NaN stays one.
FASTJEPA_INLINE Floats exponential(Floats x) {
  const Floats least = Floats{} - 87.0f;
  x = x < least ? least : x;
  const Floats shifted = x * 1.44269504f + 12582912.0f;  // of which the last bits are the nearest integer
  const Floats whole = shifted - 12582912.0f;
  const Floats rest = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  Floats sum = Floats{} + 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  Ints power;
  std::memcpy(&power, &shifted, sizeof(power));
  power = (power << 23) + (127 << 23);
  Floats two;
  std::memcpy(&two, &power, sizeof(two));
  return sum * two;
}

// Which of the 16 columns from `first` on are of the sequence: all bits of them.
FASTJEPA_INLINE Ints within(int64_t first, int64_t length) {
  const Ints column = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return column < Ints{} + static_cast<int32_t>(length - first);
}

// Of both halves at once, down to one number: a chain of 16 dependent operations would cost more than the row.
template <typename Join>
FASTJEPA_INLINE float reduced(Floats x, const Join& join) {
  float y[kVector];
  store(y, x);
#pragma GCC unroll 4
  for (int half = kVector / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) y[i] = join(y[i], y[i + half]);
  }
  return y[0];
}

struct Add {
  FASTJEPA_INLINE float operator()(float a, float b) const { return a + b; }
};
struct Larger {
  FASTJEPA_INLINE float operator()(float a, float b) const { return a > b ? a : b; }
};

template <int WIDEST>
FASTJEPA_INLINE void forward(const Head& at, float* scratch) {
  const int64_t length = at.length, across = padded(length), width = at.width;
  float *const keys = scratch, *const scores = keys + width * across;  // [d, L], [L, L]
  transpose(at.key, at.row, length, width, keys);
  product<WIDEST>(at.query, at.row, 1, keys, across, scores, across, length, across, width);
  for (int64_t i = 0; i < length; ++i) {
    float* const row = scores + i * across;
    const Floats lowest = Floats{} - INFINITY;
    Floats highest = lowest;
    for (int64_t j = 0; j < across; j += kVector) {
      const Floats score = within(j, length) ? load(row + j) * at.scale : lowest;
      highest = score > highest ? score : highest;
      store(row + j, score);
    }
    const float most = reduced(highest, Larger{});
    Floats sums = {};
    for (int64_t j = 0; j < across; j += kVector) {
      const Floats weight = within(j, length) ? exponential(load(row + j) - most) : Floats{};
      sums += weight;
      store(row + j, weight);
    }
    const float sum = reduced(sums, Add{}), inverse = 1 / sum;
    for (int64_t j = 0; j < across; j += kVector) store(row + j, load(row + j) * inverse);
    at.lse[i] = most + std::log(sum);
  }
  product<WIDEST>(scores, across, 1, at.value, at.row, at.out, at.out_row, length, width, length);
}

template <int WIDEST>
FASTJEPA_INLINE void backward(const Head& at, float* scratch) {
  const int64_t length = at.length, across = padded(length), width = at.width, to_row = 3 * at.dqkv_part;
  float *const keys = scratch, *const values = keys + width * across;       // [d, L] each
  float *const weights = values + width * across, *const slopes = weights + length * across;  // [L, L] each
  float *const dquery = at.dqkv, *const dkey = dquery + at.dqkv_part, *const dvalue = dkey + at.dqkv_part;
  transpose(at.key, at.row, length, width, keys);
  transpose(at.value, at.row, length, width, values);
  product<WIDEST>(at.query, at.row, 1, keys, across, weights, across, length, across, width);
  product<WIDEST>(at.dout, at.out_row, 1, values, across, slopes, across, length, across, width);
  for (int64_t i = 0; i < length; ++i) {
    Floats sums = {};
    for (int64_t k = 0; k < width; k += kVector) {
      sums += load(at.dout + i * at.out_row + k) * load(at.out + i * at.out_row + k);
    }
    const float mean = reduced(sums, Add{}), lse = at.lse[i];
    float *const weight_row = weights + i * across, *const slope_row = slopes + i * across;
    for (int64_t j = 0; j < across; j += kVector) {
      const Floats made = exponential(load(weight_row + j) * at.scale - lse);
      const Floats weight = within(j, length) ? made : Floats{};
      store(weight_row + j, weight);
      store(slope_row + j, weight * (load(slope_row + j) - mean) * at.scale);
    }
  }
  product<WIDEST>(weights, 1, across, at.dout, at.out_row, dvalue, to_row, length, width, length);
  product<WIDEST>(slopes, across, 1, at.key, at.row, dquery, to_row, length, width, length);
  product<WIDEST>(slopes, 1, across, at.query, at.row, dkey, to_row, length, width, length);
}

}  // namespace fastjepa
