// gather_tokens: out[b, k] = x[b, index[b, k]] (+ pos[index[b, k]]), each row read and written once.

#include <cstring>

#include "ops.h"
#include "parallel.h"
#include "rows.h"
#include "token_index.h"

namespace fastjepa {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements

struct Rows {
  const char* x;
  const char* pos;  // or nullptr
  char* out;
  int64_t image_bytes, row_bytes;  // from one image, and one row, of x to the next
  int64_t width;
  at::ScalarType x_type, pos_type, out_type;
  const int64_t* index;
  const int64_t* image;  // -1: a row of zeros
};

template <typename Work>
void gather(const Rows& rows, int64_t begin, int64_t end) {
  const int64_t width = rows.width;
  const int64_t out_bytes = width * c10::elementSize(rows.out_type);
  const int64_t pos_bytes = width * c10::elementSize(rows.pos_type);
  const bool is_copy = rows.pos == nullptr && rows.x_type == rows.out_type;
  std::vector<Work> sum(width), scratch(width);
  for (int64_t t = begin; t < end; ++t) {
    char* const out = rows.out + t * out_bytes;
    if (rows.image[t] < 0) {
      std::memset(out, 0, out_bytes);
      continue;
    }
    const char* const x = rows.x + rows.image[t] * rows.image_bytes + rows.index[t] * rows.row_bytes;
    if (is_copy) {
      std::memcpy(out, x, out_bytes);
      continue;
    }
    const Work* token = read_row(x, rows.x_type, sum.data(), width);
    if (rows.pos != nullptr) {
      if (token != sum.data()) std::memcpy(sum.data(), token, width * sizeof(Work));
      add_row(
          read_row(rows.pos + rows.index[t] * pos_bytes, rows.pos_type, scratch.data(), width), sum.data(),
          width);
      token = sum.data();
    }
    write_row(token, out, rows.out_type, width);
  }
}

}  // namespace

at::Tensor gather_tokens(
    const at::Tensor& x, const at::Tensor& index, const std::optional<at::Tensor>& pos,
    const std::optional<at::Tensor>& cu_seqlens, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(
      x.dim() == 3 && is_floating(x.scalar_type()) && is_floating(dtype),
      "x must be [B, N, D] and, as dtype, floating point, got ", x.sizes(), ", ", x.scalar_type(), " and ", dtype);
  TORCH_CHECK_VALUE(
      !pos.has_value() || (pos->sizes() == x.sizes().slice(1) && is_floating(pos->scalar_type())),
      "pos must be floating point [N, D] as x is");
  const int64_t width = x.size(2);
  const at::Tensor flat = checked_index(index, x.size(1));
  const std::vector<int64_t> image = image_of_tokens(flat, cu_seqlens, x.size(0));

  auto shape = index.sizes().vec();
  shape.push_back(width);
  const at::Tensor out = x.new_empty(shape, dtype);
  if (out.numel() == 0) return out;
  const at::Tensor tokens = x.stride(2) == 1 ? x : x.contiguous();
  const at::Tensor added = pos.has_value() ? pos->contiguous() : at::Tensor();
  const auto size = static_cast<int64_t>(x.element_size());
  const Rows rows{
      static_cast<const char*>(tokens.const_data_ptr()),
      pos.has_value() ? static_cast<const char*>(added.const_data_ptr()) : nullptr,
      static_cast<char*>(out.mutable_data_ptr()), tokens.stride(0) * size, tokens.stride(1) * size, width,
      x.scalar_type(), pos.has_value() ? added.scalar_type() : x.scalar_type(), dtype,
      flat.const_data_ptr<int64_t>(), image.data()};
  const bool in_double = x.scalar_type() == at::kDouble || dtype == at::kDouble || rows.pos_type == at::kDouble;
  parallel_for(flat.numel(), std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
    in_double ? gather<double>(rows, begin, end) : gather<float>(rows, begin, end);
  });
  return out;
}

}  // namespace fastjepa
