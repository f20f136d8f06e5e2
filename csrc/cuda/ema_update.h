// What the launch of the multi-tensor EMA needs, in plain CUDA: the .cu file is compiled without torch's headers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastjepa {

enum class Float : uint8_t { fp32, bf16, fp16, none };

// Up to so many tensors are updated in one launch: their table travels as an argument of the kernel, of
// which there may be 32764 bytes since CUDA 12.1, and 4 KB before.
#if CUDART_VERSION >= 12010
constexpr int kTableTensors = 900;
#else
constexpr int kTableTensors = 108;
#endif

// Elements of a tensor that one block updates; a multiple of what its threads take at a time.
constexpr int64_t kChunk = 8192;

// Tensors of the same types, each of at least one element.
struct Table {
  float* shadow[kTableTensors];
  const void* source[kTableTensors];
  void* working[kTableTensors];
  int64_t numel[kTableTensors];
  uint32_t first_chunk[kTableTensors + 1];  // of the tensor among the chunks of all; the last is their number
  int tensors;
};
static_assert(sizeof(Table) <= (kTableTensors > 108 ? 32700 : 4000));

// How far a shadow moves towards its source: *on_device where that is given, else value.
struct Weight {
  float value;
  const float* on_device;
};

// Returns without waiting.
cudaError_t launch_ema_update(
    const Table& table, Float source, Float working, Weight weight, cudaStream_t stream);

}  // namespace fastjepa
