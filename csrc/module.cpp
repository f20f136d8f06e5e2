// Registers torch.ops.fastjepa_native when Python imports fastjepa_kernels._C, which itself holds nothing.

#include <Python.h>
#include <torch/library.h>

#include "ops.h"

TORCH_LIBRARY(fastjepa_native, m) {
  m.def("ema_update_(Tensor(a!)[] shadow, Tensor[] source, float weight, Tensor(b!)[] working) -> ()");
  m.def(
      "gather_tokens(Tensor x, Tensor index, Tensor? pos, Tensor? cu_seqlens, ScalarType dtype) -> Tensor");
  m.def(
      "gather_tokens_backward(Tensor grad, Tensor index, Tensor? cu_seqlens, int images, int patches, "
      "int images_per_sum, ScalarType dtype) -> Tensor");
  m.def(
      "jepa_loss(Tensor prediction, Tensor hidden, Tensor index, Tensor? norm_weight, Tensor? norm_bias, "
      "float norm_eps, float target_eps, float beta, bool need_gradient) -> (Tensor, Tensor)");
  m.def(
      "multiblock_masks(Tensor image_index, int[2] key, int epoch, int[2] grid, int[2] target, "
      "int[2] context, int target_blocks, int min_keep, str mode, int context_tokens, int target_tokens) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("packed_attention(Tensor qkv, Tensor cu_seqlens, float scale) -> (Tensor, Tensor)");
  m.def(
      "packed_attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, "
      "float scale) -> Tensor");
  m.def(
      "random_words(Tensor index, int[2] key, int stream, int epoch, int count, int attempt) -> Tensor");
#ifdef FASTJEPA_WITH_CUDA
  m.def(
      "ema_update_cuda_(Tensor(a!)[] shadow, Tensor[] source, float weight, Tensor? weight_tensor, "
      "Tensor(b!)[] working) -> ()");
#endif
}

TORCH_LIBRARY_IMPL(fastjepa_native, CPU, m) {
  m.impl("ema_update_", fastjepa::ema_update_);
  m.impl("gather_tokens", fastjepa::gather_tokens);
  m.impl("gather_tokens_backward", fastjepa::gather_tokens_backward);
  m.impl("jepa_loss", fastjepa::jepa_loss);
  m.impl("multiblock_masks", fastjepa::multiblock_masks);
  m.impl("packed_attention", fastjepa::packed_attention);
  m.impl("packed_attention_backward", fastjepa::packed_attention_backward);
  m.impl("random_words", fastjepa::random_words);
}

#ifdef FASTJEPA_WITH_CUDA
TORCH_LIBRARY_IMPL(fastjepa_native, CUDA, m) { m.impl("ema_update_cuda_", fastjepa::ema_update_cuda_); }
#endif

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
