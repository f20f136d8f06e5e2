// Multi-tensor EMA: one launch over a table of pointers, 16 bytes at a time where every pointer is aligned.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ema_update.h"

namespace fastjepa {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 8;  // elements: two vectors of float32, one of a 16-bit type

template <typename T, int N>
struct alignas(sizeof(T) * N >= 16 ? 16 : sizeof(T) * N) Vector {
  T at[N];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void put(float x, float& to) { to = x; }
__device__ __forceinline__ void put(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void put(float x, __half& to) { to = __float2half_rn(x); }

// torch.lerp, to the bit: it starts from the nearer end.
__device__ __forceinline__ float lerp(float shadow, float source, float weight) {
  const float way = source - shadow;
  return fabsf(weight) < 0.5f ? fmaf(weight, way, shadow) : fmaf(weight - 1.f, way, source);
}

struct None {};

template <typename Source, typename Working, int N>
__device__ __forceinline__ void update(float* shadow, const Source* source, Working* working, float weight) {
  using Floats = Vector<float, N>;
  using Sources = Vector<Source, N>;
  Floats average = *reinterpret_cast<const Floats*>(shadow);
  const Sources step = *reinterpret_cast<const Sources*>(source);
#pragma unroll
  for (int i = 0; i < N; ++i) average.at[i] = lerp(average.at[i], to_float(step.at[i]), weight);
  *reinterpret_cast<Floats*>(shadow) = average;
  if constexpr (!__is_same(Working, None)) {
    Vector<Working, N> copy;
#pragma unroll
    for (int i = 0; i < N; ++i) put(average.at[i], copy.at[i]);
    *reinterpret_cast<Vector<Working, N>*>(working) = copy;
  }
}

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// One block's chunk of one tensor, n elements from `begin`, which is a multiple of kChunk.
template <typename Source, typename Working>
__device__ __forceinline__ void update_chunk(
    float* shadow, const void* sources, void* workings, int64_t begin, int n, float weight) {
  const Source* source = static_cast<const Source*>(sources) + begin;
  Working* working = workings == nullptr ? nullptr : static_cast<Working*>(workings) + begin;
  shadow += begin;
  int vectors = 0;
  if (is_aligned(shadow) && is_aligned(source) && is_aligned(working)) {
    vectors = n / kVector;
    for (int i = threadIdx.x; i < vectors; i += kThreads) {
      const int at = i * kVector;
      update<Source, Working, kVector>(shadow + at, source + at, working + at, weight);
    }
  }
  for (int i = vectors * kVector + threadIdx.x; i < n; i += kThreads) {
    update<Source, Working, 1>(shadow + i, source + i, working + i, weight);
  }
}

template <typename Source, typename Working>
__global__ void __launch_bounds__(kThreads) ema_update(const __grid_constant__ Table table, Weight weight) {
  // The last tensor whose first chunk is not after this block's.
  int tensor = 0;
  for (int high = table.tensors; high - tensor > 1;) {
    const int middle = (tensor + high) / 2;
    (table.first_chunk[middle] <= blockIdx.x ? tensor : high) = middle;
  }
  const int64_t begin = (blockIdx.x - table.first_chunk[tensor]) * kChunk;
  const int64_t left = table.numel[tensor] - begin;
  update_chunk<Source, Working>(
      table.shadow[tensor], table.source[tensor], table.working[tensor], begin,
      static_cast<int>(left < kChunk ? left : kChunk),
      weight.on_device == nullptr ? weight.value : *weight.on_device);
}

template <typename Source, typename Working>
void launch(const Table& table, Weight weight, cudaStream_t stream) {
  const uint32_t chunks = table.first_chunk[table.tensors];
  ema_update<Source, Working><<<chunks, kThreads, 0, stream>>>(table, weight);
}

template <typename Source>
void launch(const Table& table, Float working, Weight weight, cudaStream_t stream) {
  switch (working) {
    case Float::fp32: return launch<Source, float>(table, weight, stream);
    case Float::bf16: return launch<Source, __nv_bfloat16>(table, weight, stream);
    case Float::fp16: return launch<Source, __half>(table, weight, stream);
    case Float::none: return launch<Source, None>(table, weight, stream);
  }
}

}  // namespace

cudaError_t launch_ema_update(
    const Table& table, Float source, Float working, Weight weight, cudaStream_t stream) {
  switch (source) {
    case Float::fp32: launch<float>(table, working, weight, stream); break;
    case Float::bf16: launch<__nv_bfloat16>(table, working, weight, stream); break;
    case Float::fp16: launch<__half>(table, working, weight, stream); break;
    case Float::none: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace fastjepa
