// random_words: 32-bit words by Philox, for each index as many as asked for.

#include <c10/util/Exception.h>

#include "ops.h"
#include "parallel.h"
#include "philox.h"

namespace fastjepa {

at::Tensor random_words(
    const at::Tensor& index, at::IntArrayRef key, int64_t stream, int64_t epoch, int64_t count, int64_t attempt) {
  TORCH_CHECK_VALUE(
      index.dim() == 1 && index.scalar_type() == at::kLong, "index must be int64 [B], got ", index.sizes(), " ",
      index.scalar_type());
  TORCH_CHECK_VALUE(
      0 <= stream && stream < (1 << 20) && 0 <= attempt && attempt < (1 << 12) && 0 <= count && count < (1 << 18),
      "stream must be below 2**20, attempt below 2**12 and count below 2**18, got ", stream, ", ", attempt,
      " and ", count);
  const at::Tensor given = index.contiguous();
  const int64_t* const numbers = given.const_data_ptr<int64_t>();
  check_32_bits("epoch", &epoch, 1);
  check_32_bits("index", numbers, index.numel());
  const uint64_t philox_key = key_of(key);

  const at::Tensor out = index.new_empty({index.numel(), count});  // [B, count]
  int64_t* const words = out.mutable_data_ptr<int64_t>();
  const uint32_t purpose = purpose_of(stream, attempt);
  parallel_for(index.numel(), (1 << 14) / (count + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      random_words(
          philox_key, static_cast<uint32_t>(numbers[b]), static_cast<uint32_t>(epoch), purpose, count,
          words + b * count);
    }
  });
  return out;
}

}  // namespace fastjepa
