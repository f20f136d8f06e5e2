// ema_update_: shadow <- lerp(shadow, source, weight) in float32, and working <- shadow, in one pass over memory.

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops.h"
#include "parallel.h"
#include "rows.h"

namespace fastjepa {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements
constexpr int64_t kPiece = 1 << 10;  // elements that stay in the first cache between the loops over them

struct Triple {
  float* shadow;
  const char* source;
  char* working;  // or nullptr
  at::ScalarType source_type, working_type;
};

// torch.lerp, to the bit: it starts from the nearer end. Compiled with -ffp-contract=fast, so that products
// are added unrounded wherever the processor can, as torch's are.
FASTJEPA_CLONES void lerp(float* shadow, const float* source, float weight, int64_t n) {
  if (std::abs(weight) < 0.5f) {
    for (int64_t i = 0; i < n; ++i) shadow[i] = shadow[i] + weight * (source[i] - shadow[i]);
  } else {
    const float rest = weight - 1;
    for (int64_t i = 0; i < n; ++i) shadow[i] = source[i] + rest * (source[i] - shadow[i]);
  }
}

void update(const Triple& tensor, int64_t begin, int64_t end, float weight) {
  float scratch[kPiece];
  const auto source_size = c10::elementSize(tensor.source_type);
  const auto working_size = c10::elementSize(tensor.working_type);
  for (; begin < end; begin += kPiece) {
    const int64_t n = std::min(kPiece, end - begin);
    float* const shadow = tensor.shadow + begin;
    lerp(shadow, read_row(tensor.source + begin * source_size, tensor.source_type, scratch, n), weight, n);
    if (tensor.working != nullptr) {
      write_row(shadow, tensor.working + begin * working_size, tensor.working_type, n);
    }
  }
}

bool is_taken(const at::Tensor& tensor) {
  const at::ScalarType dtype = tensor.scalar_type();
  return tensor.is_contiguous() && tensor.device().is_cpu() &&
      (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf);
}

}  // namespace

void ema_update_(at::TensorList shadow, at::TensorList source, double weight, at::TensorList working) {
  const bool copies = !working.empty();
  TORCH_CHECK_VALUE(
      source.size() == shadow.size() && (!copies || working.size() == shadow.size()),
      "shadow, source and working must have as many tensors, got ", shadow.size(), ", ", source.size(),
      " and ", working.size());
  std::vector<Triple> tensors;
  std::vector<int64_t> starts{0};  // of each tensor among all elements
  for (size_t i = 0; i < shadow.size(); ++i) {
    TORCH_CHECK_VALUE(
        is_taken(shadow[i]) && shadow[i].scalar_type() == at::kFloat && is_taken(source[i]) &&
            source[i].sizes() == shadow[i].sizes() &&
            (!copies || (is_taken(working[i]) && working[i].sizes() == shadow[i].sizes())),
        "tensors ", i, " must be contiguous, of one shape, and float32, bfloat16 or float16, shadow float32");
    tensors.push_back(
        {shadow[i].mutable_data_ptr<float>(), static_cast<const char*>(source[i].const_data_ptr()),
         copies ? static_cast<char*>(working[i].mutable_data_ptr()) : nullptr, source[i].scalar_type(),
         copies ? working[i].scalar_type() : at::kFloat});
    starts.push_back(starts.back() + shadow[i].numel());
  }
  // Over all elements, not tensor by tensor: most tensors of a model are too small to share.
  parallel_for(starts.back(), kGrain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; i < tensors.size() && starts[i] < end; ++i) {
      update(
          tensors[i], std::max(begin, starts[i]) - starts[i], std::min(end, starts[i + 1]) - starts[i],
          static_cast<float>(weight));
    }
  });
}

}  // namespace fastjepa
