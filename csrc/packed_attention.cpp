// packed_attention of short sequences, forward and backward: all scores of a sequence and head stay in the
// cache, operands are read where they lie in the packed stream, and results are written there.

#include <c10/util/Exception.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "ops.h"
#include "parallel.h"
#include "rows.h"
#include "short_attention.h"

namespace fastjepa {
namespace {

// One sequence and head of `run`, with scratch for the longest.
using Run = void (*)(const Head&, float* scratch);

#ifdef FASTJEPA_X86_VERSIONS
#define FASTJEPA_FOR(version) __attribute__((target("arch=x86-64-" version)))
FASTJEPA_FOR("v4") void forward_v4(const Head& at, float* scratch) { forward<4>(at, scratch); }
FASTJEPA_FOR("v3") void forward_v3(const Head& at, float* scratch) { forward<1>(at, scratch); }
FASTJEPA_FOR("v4") void backward_v4(const Head& at, float* scratch) { backward<4>(at, scratch); }
FASTJEPA_FOR("v3") void backward_v3(const Head& at, float* scratch) { backward<1>(at, scratch); }
#endif
void forward_any(const Head& at, float* scratch) { forward<1>(at, scratch); }
void backward_any(const Head& at, float* scratch) { backward<1>(at, scratch); }

Run fastest(bool is_forward) {
#ifdef FASTJEPA_X86_VERSIONS
  if (__builtin_cpu_supports("x86-64-v4")) return is_forward ? forward_v4 : backward_v4;
  if (__builtin_cpu_supports("x86-64-v3")) return is_forward ? forward_v3 : backward_v3;
#endif
  return is_forward ? forward_any : backward_any;
}

struct Starts {
  at::Tensor held;
  const int32_t* at;
  int64_t sequences, longest = 0, end;
};

Starts starts_of(const at::Tensor& cu_seqlens, int64_t tokens) {
  Starts starts{cu_seqlens.contiguous(), nullptr, cu_seqlens.numel() - 1, 0, 0};
  starts.at = starts.held.const_data_ptr<int32_t>();
  for (int64_t s = 0; s < starts.sequences; ++s) {
    const int64_t length = starts.at[s + 1] - starts.at[s];
    TORCH_CHECK_VALUE(length >= 0, "cu_seqlens must not decrease");
    starts.longest = std::max(starts.longest, length);
  }
  starts.end = starts.at[starts.sequences];
  TORCH_CHECK_VALUE(starts.at[0] == 0 && starts.end <= tokens, "cu_seqlens must lie in 0..", tokens);
  return starts;
}

void require(const at::Tensor& qkv, const at::Tensor& cu_seqlens) {
  TORCH_CHECK_VALUE(
      qkv.dim() == 4 && qkv.size(1) == 3 && qkv.size(3) % kVector == 0 && qkv.scalar_type() == at::kFloat,
      "qkv must be float32 [T, 3, H, d], d a multiple of ", kVector);
  TORCH_CHECK_VALUE(
      cu_seqlens.dim() == 1 && cu_seqlens.numel() > 0 && cu_seqlens.scalar_type() == at::kInt,
      "cu_seqlens must be int32 [S + 1]");
}

// Every sequence and head by itself, wherever in the stream it is.
void each_head(const Starts& starts, int64_t heads, Run run, int64_t scratch_floats, const Head& all) {
  parallel_for(starts.sequences * heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(scratch_floats + kVector);
    // Vectors that cross no cache line.
    auto aligned = (reinterpret_cast<uintptr_t>(scratch.data()) + 63) & ~uintptr_t{63};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t s = task / heads, h = task % heads;
      const int64_t length = starts.at[s + 1] - starts.at[s];
      if (length > 0) run(all.of(starts.at[s], h, length), reinterpret_cast<float*>(aligned));
    }
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> packed_attention(
    const at::Tensor& qkv, const at::Tensor& cu_seqlens, double scale) {
  require(qkv, cu_seqlens);
  const at::Tensor rows = qkv.stride(3) == 1 ? qkv : qkv.contiguous();
  const int64_t tokens = rows.size(0), heads = rows.size(2), width = rows.size(3);
  const Starts starts = starts_of(cu_seqlens, tokens);
  const at::Tensor out = rows.new_empty({tokens, heads, width}), lse = rows.new_empty({heads, tokens});
  Head all;
  all.read(rows.const_data_ptr<float>(), rows.stride(0), rows.stride(1), rows.stride(2), width, tokens, scale);
  all.out = out.mutable_data_ptr<float>();
  all.lse = lse.mutable_data_ptr<float>();
  all.out_row = heads * width;
  each_head(starts, heads, fastest(true), forward_scratch(starts.longest, width), all);
  if (starts.end < tokens) {
    out.narrow(0, starts.end, tokens - starts.end).zero_();
    lse.narrow(1, starts.end, tokens - starts.end).zero_();
  }
  return {out, lse};
}

at::Tensor packed_attention_backward(
    const at::Tensor& dout, const at::Tensor& qkv, const at::Tensor& out, const at::Tensor& lse,
    const at::Tensor& cu_seqlens, double scale) {
  require(qkv, cu_seqlens);
  const at::Tensor rows = qkv.stride(3) == 1 ? qkv : qkv.contiguous();
  const int64_t tokens = rows.size(0), heads = rows.size(2), width = rows.size(3);
  const std::vector<int64_t> shape{tokens, heads, width};
  TORCH_CHECK_VALUE(
      dout.sizes() == shape && out.sizes() == shape && lse.dim() == 2 && lse.size(0) == heads &&
          lse.size(1) == tokens && dout.scalar_type() == at::kFloat && out.scalar_type() == at::kFloat &&
          lse.scalar_type() == at::kFloat,
      "dout and out must be float32 [T, H, d] and lse [H, T] as qkv says");
  const Starts starts = starts_of(cu_seqlens, tokens);
  const at::Tensor from = dout.contiguous(), kept = out.contiguous(), sums = lse.contiguous();
  const at::Tensor dqkv = rows.new_empty({tokens, 3, heads, width});
  Head all;
  all.read(rows.const_data_ptr<float>(), rows.stride(0), rows.stride(1), rows.stride(2), width, tokens, scale);
  all.dout = from.const_data_ptr<float>();
  all.out = const_cast<float*>(kept.const_data_ptr<float>());  // read alone
  all.lse = const_cast<float*>(sums.const_data_ptr<float>());
  all.out_row = heads * width;
  all.dqkv = dqkv.mutable_data_ptr<float>();
  all.dqkv_part = heads * width;
  each_head(starts, heads, fastest(false), backward_scratch(starts.longest, width), all);
  if (starts.end < tokens) dqkv.narrow(0, starts.end, tokens - starts.end).zero_();
  return dqkv;
}

}  // namespace fastjepa
