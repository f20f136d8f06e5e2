// ema_update_cuda_: the tensors' pointers, in tables of those of the same types, to as few launches as they fit.

#include "ema_update.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

#include <map>
#include <memory>
#include <utility>

#include "ops.h"

namespace fastjepa {
namespace {

Float type_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Float::fp32;
    case at::kBFloat16: return Float::bf16;
    case at::kHalf: return Float::fp16;
    default: return Float::none;
  }
}

// Launches a table when it is full, and what is left at the end.
class Launcher {
 public:
  Launcher(Float source, Float working, Weight weight)
      : source_(source), working_(working), weight_(weight) {}

  void add(const at::Tensor& shadow, const at::Tensor& source, void* working) {
    const int64_t numel = shadow.numel();
    const int64_t chunks = (numel + kChunk - 1) / kChunk;
    if (numel == 0) return;
    TORCH_CHECK_VALUE(chunks <= INT32_MAX, "a tensor of ", numel, " elements is too large");
    if (table_->tensors == kTableTensors || table_->first_chunk[table_->tensors] + chunks > INT32_MAX) launch();
    const int i = table_->tensors++;
    table_->shadow[i] = shadow.mutable_data_ptr<float>();
    table_->source[i] = source.const_data_ptr();
    table_->working[i] = working;
    table_->numel[i] = numel;
    table_->first_chunk[i + 1] = table_->first_chunk[i] + static_cast<uint32_t>(chunks);
  }

  void launch() {
    if (table_->tensors == 0) return;
    const cudaError_t error =
        launch_ema_update(*table_, source_, working_, weight_, c10::cuda::getCurrentCUDAStream());
    TORCH_CHECK(error == cudaSuccess, "ema_update_cuda_ could not be launched: ", cudaGetErrorString(error));
    table_->tensors = 0;
  }

 private:
  Float source_, working_;
  Weight weight_;
  std::unique_ptr<Table> table_ = std::make_unique<Table>();  // of zeros: the first chunk is number 0
};

}  // namespace

void ema_update_cuda_(
    at::TensorList shadow, at::TensorList source, double weight, const std::optional<at::Tensor>& weight_tensor,
    at::TensorList working) {
  if (shadow.empty()) return;
  const at::Device device = shadow[0].device();
  const bool copies = !working.empty();
  TORCH_CHECK_VALUE(
      source.size() == shadow.size() && (!copies || working.size() == shadow.size()),
      "shadow, source and working must have as many tensors, got ", shadow.size(), ", ", source.size(),
      " and ", working.size());
  TORCH_CHECK_VALUE(
      !weight_tensor || (weight_tensor->device() == device && weight_tensor->dim() == 0 &&
                         weight_tensor->scalar_type() == at::kFloat),
      "weight_tensor must be 0-d, float32, on the device of shadow");
  const auto is_taken = [&](const at::Tensor& tensor, const at::Tensor& like) {
    return tensor.device() == device && tensor.is_contiguous() && type_of(tensor) != Float::none &&
        tensor.sizes() == like.sizes();
  };
  for (size_t i = 0; i < shadow.size(); ++i) {
    TORCH_CHECK_VALUE(
        is_taken(shadow[i], shadow[i]) && shadow[i].scalar_type() == at::kFloat &&
            is_taken(source[i], shadow[i]) && (!copies || is_taken(working[i], shadow[i])),
        "tensors ", i, " must be contiguous, of one shape, on one device, and float32, bfloat16 "
        "or float16, shadow float32");
  }
  const c10::cuda::CUDAGuard guard(device);
  const Weight towards{
      static_cast<float>(weight), weight_tensor ? weight_tensor->const_data_ptr<float>() : nullptr};
  std::map<std::pair<Float, Float>, Launcher> launchers;  // mostly one: the tensors of a model are alike
  for (size_t i = 0; i < shadow.size(); ++i) {
    const Float from = type_of(source[i]), to = copies ? type_of(working[i]) : Float::none;
    const auto launcher = launchers.try_emplace({from, to}, from, to, towards).first;
    launcher->second.add(shadow[i], source[i], copies ? working[i].mutable_data_ptr() : nullptr);
  }
  for (auto& [types, launcher] : launchers) launcher.launch();
}

}  // namespace fastjepa
