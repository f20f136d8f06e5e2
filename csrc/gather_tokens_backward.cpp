// gather_tokens_backward: every row of the gradient is written once, as the sum of the rows that were taken of it.

#include <cstring>
#include <type_traits>

#include "ops.h"
#include "parallel.h"
#include "rows.h"
#include "token_index.h"

namespace fastjepa {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements

// Tokens sorted by the row of the result that they belong to, ascending in each.
struct Sorted {
  std::vector<int64_t> starts;  // [rows + 1]
  std::vector<int64_t> tokens;
};

Sorted sort_tokens(const std::vector<int64_t>& row_of_token, int64_t rows) {
  Sorted sorted{std::vector<int64_t>(rows + 2, 0), {}};
  // Counted two places further on: what the second loop advances ends as the starts.
  for (const int64_t row : row_of_token) {
    if (row >= 0) ++sorted.starts[row + 2];
  }
  for (int64_t row = 0; row < rows; ++row) sorted.starts[row + 2] += sorted.starts[row + 1];
  sorted.tokens.resize(sorted.starts[rows + 1]);
  for (size_t token = 0; token < row_of_token.size(); ++token) {
    if (row_of_token[token] >= 0) {
      sorted.tokens[sorted.starts[row_of_token[token] + 1]++] = static_cast<int64_t>(token);
    }
  }
  sorted.starts.pop_back();
  return sorted;
}

}  // namespace

at::Tensor gather_tokens_backward(
    const at::Tensor& grad, const at::Tensor& index, const std::optional<at::Tensor>& cu_seqlens,
    int64_t images, int64_t patches, int64_t images_per_sum, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(
      images >= 0 && patches >= 0 && images_per_sum > 0,
      "images and patches must be 0 or more, and images_per_sum above 0, got ", images, ", ", patches, " and ",
      images_per_sum);
  TORCH_CHECK_VALUE(
      is_floating(grad.scalar_type()) && is_floating(dtype), "grad and dtype must be floating point, got ",
      grad.scalar_type(), " and ", dtype);
  TORCH_CHECK_VALUE(
      grad.dim() == index.dim() + 1 && grad.sizes().slice(0, index.dim()) == index.sizes(),
      "grad must be [B, K, D] or [T, D] as index is, got ", grad.sizes(), " and ", index.sizes());
  const int64_t width = grad.size(-1);
  const at::Tensor flat = checked_index(index, patches);
  std::vector<int64_t> row_of_token = image_of_tokens(flat, cu_seqlens, images);
  const int64_t* const patch = flat.const_data_ptr<int64_t>();
  for (size_t t = 0; t < row_of_token.size(); ++t) {
    if (row_of_token[t] >= 0) row_of_token[t] = row_of_token[t] / images_per_sum * patches + patch[t];
  }
  const int64_t sums = (images + images_per_sum - 1) / images_per_sum;
  const at::Tensor out = grad.new_empty({sums, patches, width}, dtype);
  if (out.numel() == 0) return out;
  const Sorted sorted = sort_tokens(row_of_token, sums * patches);

  const at::Tensor rows = grad.contiguous();
  const at::ScalarType from = grad.scalar_type();
  const char* const source = static_cast<const char*>(rows.const_data_ptr());
  char* const target = static_cast<char*>(out.mutable_data_ptr());
  const int64_t source_bytes = width * c10::elementSize(from), target_bytes = width * c10::elementSize(dtype);
  const auto sum_rows = [&](auto zero, int64_t begin, int64_t end) {
    using Work = decltype(zero);
    std::vector<Work> sum(width), scratch(width);
    for (int64_t row = begin; row < end; ++row) {
      char* const to = target + row * target_bytes;
      const int64_t first = sorted.starts[row], last = sorted.starts[row + 1];
      if (first == last) {
        int64_t next = row + 1;
        while (next < end && sorted.starts[next + 1] == first) ++next;
        std::memset(to, 0, (next - row) * target_bytes);
        row = next - 1;
        continue;
      }
      const Work* total = read_row(source + sorted.tokens[first] * source_bytes, from, sum.data(), width);
      if (last > first + 1 && total != sum.data()) {
        std::memcpy(sum.data(), total, width * sizeof(Work));
        total = sum.data();
      }
      for (int64_t i = first + 1; i < last; ++i) {
        add_row(
            read_row(source + sorted.tokens[i] * source_bytes, from, scratch.data(), width), sum.data(), width);
      }
      write_row(total, to, dtype, width);
    }
  };
  const bool in_double = from == at::kDouble || dtype == at::kDouble;
  parallel_for(sums * patches, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
    in_double ? sum_rows(double{}, begin, end) : sum_rows(float{}, begin, end);
  });
  return out;
}

}  // namespace fastjepa
