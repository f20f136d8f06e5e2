// Which row of a token grid each token is: indices of any integer type and strides, checked.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <vector>

namespace fastjepa {

// As contiguous int64, each in 0..bound-1.
inline at::Tensor checked_index(const at::Tensor& index, int64_t bound) {
  TORCH_CHECK_VALUE(
      c10::isIntegralType(index.scalar_type(), /*includeBool=*/false), "index must hold integers, got ",
      index.scalar_type());
  const at::Tensor flat = index.to(at::kLong).contiguous();
  const int64_t* const values = flat.const_data_ptr<int64_t>();
  int64_t low = 0, high = -1;
  for (int64_t i = 0; i < flat.numel(); ++i) {
    low = std::min(low, values[i]);
    high = std::max(high, values[i]);
  }
  TORCH_CHECK_VALUE(low >= 0 && high < bound, "index must lie in 0..", bound - 1, ", got ", low, "..", high);
  return flat;
}

// The image of each token, -1 past the last: b for index [B, K], by cu_seqlens for packed [T].
inline std::vector<int64_t> image_of_tokens(
    const at::Tensor& index, const std::optional<at::Tensor>& cu_seqlens, int64_t images) {
  std::vector<int64_t> image(index.numel(), -1);
  if (!cu_seqlens.has_value()) {
    TORCH_CHECK_VALUE(
        index.dim() == 2 && index.size(0) == images, "index must be [B, K] with B = ", images, ", got ",
        index.sizes());
    for (int64_t t = 0; t < index.numel(); ++t) image[t] = t / index.size(1);
    return image;
  }
  TORCH_CHECK_VALUE(
      index.dim() == 1 && cu_seqlens->dim() == 1 && cu_seqlens->numel() == images + 1 &&
          cu_seqlens->scalar_type() == at::kInt && cu_seqlens->device().is_cpu(),
      "index must be [T] and cu_seqlens int32 [B + 1] with B = ", images, ", got ", index.sizes(), " and ",
      cu_seqlens->sizes());
  const at::Tensor ends = cu_seqlens->contiguous();
  const int32_t* const end = ends.const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(end[0] == 0, "cu_seqlens must start at 0, got ", end[0]);
  for (int64_t b = 0; b < images; ++b) {
    TORCH_CHECK_VALUE(
        end[b] <= end[b + 1] && end[b + 1] <= index.numel(), "cu_seqlens must never decrease, nor pass T = ",
        index.numel());
    std::fill(image.begin() + end[b], image.begin() + end[b + 1], b);
  }
  return image;
}

}  // namespace fastjepa
