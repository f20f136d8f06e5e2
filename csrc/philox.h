// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
#pragma once

#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <array>
#include <cstdint>

namespace fastjepa {

using Words = std::array<uint32_t, 4>;

inline Words philox(Words counter, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter[2];
    counter = {
        static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ k0, static_cast<uint32_t>(product1),
        static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ k1, static_cast<uint32_t>(product0)};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return counter;
}

// Words number 0 to count - 1 of an index, for one purpose: as fastjepa.masks.counter.random_words draws them.
template <typename Word>
void random_words(uint64_t key, uint32_t index, uint32_t epoch, uint32_t purpose, int64_t count, Word* words) {
  int64_t first = 0;
  for (; first + 4 <= count; first += 4) {
    const Words four = philox({static_cast<uint32_t>(first / 4), index, epoch, purpose}, key);
    for (int i = 0; i < 4; ++i) words[first + i] = four[i];
  }
  if (first == count) return;
  const Words four = philox({static_cast<uint32_t>(first / 4), index, epoch, purpose}, key);
  for (int i = 0; first + i < count; ++i) words[first + i] = four[i];
}

inline uint32_t purpose_of(int64_t stream, int64_t attempt) {
  return static_cast<uint32_t>((stream << 12) | attempt);
}

inline void check_32_bits(const char* name, const int64_t* numbers, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(
        0 <= numbers[i] && numbers[i] < (int64_t{1} << 32), name, " must lie in 0..2**32-1, got ", numbers[i]);
  }
}

// Of its low and its high 32 bits.
inline uint64_t key_of(c10::IntArrayRef halves) {
  TORCH_CHECK_VALUE(halves.size() == 2, "key must be two numbers, got ", halves.size());
  check_32_bits("key", halves.data(), 2);
  return static_cast<uint64_t>(halves[0]) | (static_cast<uint64_t>(halves[1]) << 32);
}

// An integer in [0, bound), by the high half of a product.
inline int64_t below(uint32_t word, int64_t bound) {
  return static_cast<int64_t>((static_cast<uint64_t>(word) * static_cast<uint64_t>(bound)) >> 32);
}

}  // namespace fastjepa
