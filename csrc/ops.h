// The ops of torch.ops.fastjepa_native; their schemas are in module.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace fastjepa {

void ema_update_(at::TensorList shadow, at::TensorList source, double weight, at::TensorList working);

// Only where CUDA sources were compiled.
void ema_update_cuda_(
    at::TensorList shadow, at::TensorList source, double weight, const std::optional<at::Tensor>& weight_tensor,
    at::TensorList working);

at::Tensor random_words(
    const at::Tensor& index, at::IntArrayRef key, int64_t stream, int64_t epoch, int64_t count, int64_t attempt);

at::Tensor gather_tokens(
    const at::Tensor& x, const at::Tensor& index, const std::optional<at::Tensor>& pos,
    const std::optional<at::Tensor>& cu_seqlens, at::ScalarType dtype);

at::Tensor gather_tokens_backward(
    const at::Tensor& grad, const at::Tensor& index, const std::optional<at::Tensor>& cu_seqlens,
    int64_t images, int64_t patches, int64_t images_per_sum, at::ScalarType dtype);

std::tuple<at::Tensor, at::Tensor> jepa_loss(
    const at::Tensor& prediction, const at::Tensor& hidden, const at::Tensor& index,
    const std::optional<at::Tensor>& norm_weight, const std::optional<at::Tensor>& norm_bias,
    double norm_eps, double target_eps, double beta, bool need_gradient);

std::tuple<at::Tensor, at::Tensor, at::Tensor> multiblock_masks(
    const at::Tensor& image_index, at::IntArrayRef key, int64_t epoch, at::IntArrayRef grid,
    at::IntArrayRef target, at::IntArrayRef context, int64_t target_blocks, int64_t min_keep,
    std::string_view mode, int64_t context_tokens, int64_t target_tokens);

std::tuple<at::Tensor, at::Tensor> packed_attention(
    const at::Tensor& qkv, const at::Tensor& cu_seqlens, double scale);

at::Tensor packed_attention_backward(
    const at::Tensor& dout, const at::Tensor& qkv, const at::Tensor& out, const at::Tensor& lse,
    const at::Tensor& cu_seqlens, double scale);

}  // namespace fastjepa
