// jepa_loss: final norm, layer norm, smooth L1 and its slope, row by row: nothing normalised is ever held.

#include <ATen/ops/full.h>

#include <cmath>
#include <numeric>

#include "ops.h"
#include "parallel.h"
#include "rows.h"
#include "token_index.h"

namespace fastjepa {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements

template <typename Work>
struct Norm {
  const Work* weight;  // [D]
  const Work* bias;
  Work norm_eps, target_eps, beta;
};

template <typename Work>
struct Moments {
  Work mean, scale;  // of x: (x - mean) * scale has mean 0 and variance 1
};

#define FASTJEPA_ROW(Work)                                                                      \
  FASTJEPA_CLONES Moments<Work> moments(const Work* x, int64_t n, Work eps) {                   \
    Work sum = 0, squares = 0;                                                                  \
    _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < n; ++i) sum += x[i];         \
    const Work mean = sum / static_cast<Work>(n);                                               \
    _Pragma("omp simd reduction(+ : squares)") for (int64_t i = 0; i < n; ++i) {                \
      squares += (x[i] - mean) * (x[i] - mean);                                                 \
    }                                                                                           \
    return {mean, 1 / std::sqrt(squares / static_cast<Work>(n) + eps)};                         \
  }                                                                                             \
  FASTJEPA_CLONES void normalise(                                                               \
      const Work* x, Moments<Work> by, const Work* weight, const Work* bias, Work* y, int64_t n) { \
    for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - by.mean) * by.scale * weight[i] + bias[i];   \
  }                                                                                             \
  /* The sum of smooth L1 over a row, and its slope. */                                         \
  FASTJEPA_CLONES Work smooth_l1(                                                               \
      const Work* prediction, const Work* target, Moments<Work> by, Work beta, Work* slopes,    \
      int64_t n) {                                                                              \
    const Work inverse = 1 / beta;                                                              \
    Work sum = 0;                                                                               \
    _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < n; ++i) {                    \
      const Work difference = prediction[i] - (target[i] - by.mean) * by.scale;                 \
      const Work steep = difference * inverse;                                                  \
      const Work below = Work(1) < steep ? Work(1) : steep; /* NaN stays NaN */                 \
      const Work slope = below < Work(-1) ? Work(-1) : below;                                   \
      sum += slope * (difference - Work(0.5) * beta * slope); /* both branches, without one */  \
      slopes[i] = slope;                                                                        \
    }                                                                                           \
    return sum;                                                                                 \
  }

FASTJEPA_ROW(float)
FASTJEPA_ROW(double)

template <typename Work>
std::tuple<at::Tensor, at::Tensor> run(
    const at::Tensor& prediction, const at::Tensor& hidden, const at::Tensor& index, const Norm<Work>& norm,
    bool need_gradient) {
  const int64_t batch = prediction.size(1), tokens = prediction.size(2), width = prediction.size(3);
  const int64_t rows = prediction.size(0) * batch * tokens;
  const at::Tensor at_hidden = hidden.stride(2) == 1 ? hidden : hidden.contiguous();
  const at::Tensor at_prediction = prediction.contiguous();
  const at::Tensor flat = checked_index(index, hidden.size(1));
  const int64_t* const patch = flat.const_data_ptr<int64_t>();

  const at::ScalarType from = hidden.scalar_type(), type = prediction.scalar_type();
  const int64_t image_bytes = at_hidden.stride(0) * c10::elementSize(from);
  const int64_t row_bytes = at_hidden.stride(1) * c10::elementSize(from);
  const int64_t bytes = width * c10::elementSize(type);
  const char* const hidden_from = static_cast<const char*>(at_hidden.const_data_ptr());
  const char* const prediction_from = static_cast<const char*>(at_prediction.const_data_ptr());
  const at::Tensor slope = need_gradient ? prediction.new_empty(prediction.sizes()) : prediction.new_empty({0});
  char* const slope_to = static_cast<char*>(slope.mutable_data_ptr());

  // Added up in order afterwards: the loss does not depend on the number of threads.
  std::vector<double> sums(rows);
  parallel_for(rows, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
    std::vector<Work> target(width), scratch(width);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / tokens % batch;
      const void* const h_row = hidden_from + b * image_bytes + patch[row] * row_bytes;
      const Work* const h = read_row(h_row, from, scratch.data(), width);
      normalise(h, moments(h, width, norm.norm_eps), norm.weight, norm.bias, target.data(), width);
      const Moments<Work> again = moments(target.data(), width, norm.target_eps);
      const Work* const z = read_row(prediction_from + row * bytes, type, scratch.data(), width);
      // The slope goes to its place if it needs no rounding, else to where the target was.
      const bool in_place = need_gradient && type == c10::CppTypeToScalarType<Work>::value;
      Work* const slopes = in_place ? reinterpret_cast<Work*>(slope_to + row * bytes) : target.data();
      sums[row] = smooth_l1(z, target.data(), again, norm.beta, slopes, width);
      if (need_gradient && !in_place) write_row(slopes, slope_to + row * bytes, type, width);
    }
  });
  const double total = std::accumulate(sums.begin(), sums.end(), 0.0);
  const at::Tensor loss = prediction.new_empty({}, c10::CppTypeToScalarType<Work>::value);
  *loss.mutable_data_ptr<Work>() = static_cast<Work>(total / (static_cast<double>(rows) * width));
  return {loss, slope};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> jepa_loss(
    const at::Tensor& prediction, const at::Tensor& hidden, const at::Tensor& index,
    const std::optional<at::Tensor>& norm_weight, const std::optional<at::Tensor>& norm_bias,
    double norm_eps, double target_eps, double beta, bool need_gradient) {
  TORCH_CHECK_VALUE(
      prediction.dim() == 4 && hidden.dim() == 3 && hidden.size(0) == prediction.size(1) &&
          hidden.size(2) == prediction.size(3) && prediction.numel() > 0,
      "prediction must be [M, B, P, D], not empty, and hidden [B, N, D], got ", prediction.sizes(), " and ",
      hidden.sizes());
  TORCH_CHECK_VALUE(
      is_floating(prediction.scalar_type()) && is_floating(hidden.scalar_type()),
      "prediction and hidden must be floating point");
  TORCH_CHECK_VALUE(
      index.sizes() == prediction.sizes().slice(0, 3), "index must be [M, B, P], got ", index.sizes());
  TORCH_CHECK_VALUE(beta > 0, "beta must be above 0, got ", beta);
  const bool in_double = prediction.scalar_type() == at::kDouble || hidden.scalar_type() == at::kDouble;
  const auto affine = [&](const std::optional<at::Tensor>& given, double otherwise) {
    const at::ScalarType work = in_double ? at::kDouble : at::kFloat;
    if (!given.has_value()) return at::full({hidden.size(2)}, otherwise, hidden.options().dtype(work));
    TORCH_CHECK_VALUE(
        given->dim() == 1 && given->size(0) == hidden.size(2), "norm_weight and norm_bias must be [D], got ",
        given->sizes());
    return given->to(work).contiguous();
  };
  const at::Tensor weight = affine(norm_weight, 1), bias = affine(norm_bias, 0);
  const auto run_in = [&](auto zero) {
    using Work = decltype(zero);
    const Norm<Work> norm{
        weight.const_data_ptr<Work>(), bias.const_data_ptr<Work>(), static_cast<Work>(norm_eps),
        static_cast<Work>(target_eps), static_cast<Work>(beta)};
    return run(prediction, hidden, index, norm, need_gradient);
  };
  return in_double ? run_in(double{}) : run_in(float{});
}

}  // namespace fastjepa
