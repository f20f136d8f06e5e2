// Multi-block masks: the draws of fastjepa/masks/multiblock.py, bit for bit, image by image.

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "ops.h"
#include "parallel.h"
#include "philox.h"

namespace fastjepa {
namespace {

// Streams of fastjepa.masks.counter.Stream.
enum class Stream : uint32_t { target_places = 1, context_places = 2, target_tokens = 3, context_tokens = 4 };
constexpr int64_t kTries = 20;  // draws of a context before one more target is let go of
constexpr int64_t kGrain = 256;  // images: a thread that has to be waited for costs more than a few of them

struct Block {
  int64_t height, width;
  int64_t area() const { return height * width; }
};

struct Corner {
  int64_t top, left;
};

struct Setting {
  uint64_t key;
  uint32_t epoch;
  Block grid, target, context;
  int64_t target_blocks;
  int64_t needed;          // context tokens without which an image is drawn again
  bool as_published;       // no block reaches the last row or column, and targets are never drawn again
  int64_t context_tokens;  // to be chosen of each image's; 0 takes all
  int64_t target_tokens;   // to be chosen of each block; 0 takes all
};

// What phase one leaves of an image for phase two: everything else follows from it.
struct Draw {
  Corner context;
  int64_t kept_out;  // target blocks that the context does without
  int64_t length;    // of the context
};

class Sampler {
 public:
  explicit Sampler(const Setting& setting)
      : setting_(setting), allowed_(setting.grid.area()), places_(setting.grid.area()) {}

  // `targets` gets the corners of the target blocks, [M].
  Draw draw(uint32_t image, Corner* targets) {
    Draw drawn{};
    for (int64_t attempt = 0; attempt < kTries * (setting_.target_blocks + 1); ++attempt) {
      if (attempt == 0 || !setting_.as_published) {
        draw_words(Stream::target_places, image, 2 * setting_.target_blocks, attempt);
        for (int64_t m = 0; m < setting_.target_blocks; ++m) targets[m] = corner(m, setting_.target);
      }
      draw_words(Stream::context_places, image, 2, attempt);
      drawn.context = corner(0, setting_.context);
      drawn.kept_out = setting_.target_blocks - attempt / kTries;
      mark(drawn, targets);
      drawn.length = std::accumulate(allowed_.begin(), allowed_.end(), int64_t{0});
      if (drawn.length >= setting_.needed) break;
    }
    return drawn;
  }

  // Positions of the context, ascending: at most `room`.
  void write_context(uint32_t image, const Draw& drawn, const Corner* targets, int64_t* out, int64_t room) {
    mark(drawn, targets);
    int64_t count = 0;
    for (int64_t place = 0; place < setting_.grid.area(); ++place) {
      places_[count] = place;
      count += allowed_[place];
    }
    if (setting_.context_tokens > 0 && count > room) {
      draw_words(Stream::context_tokens, image, places_[count - 1] + 1);
      choose(count, room, [&](int64_t i) { return words_[places_[i]]; });
    }
    std::copy_n(places_.begin(), std::min(count, room), out);
  }

  // Positions of the target blocks, ascending in each: `tokens` of block m at out + m * step.
  void write_targets(uint32_t image, const Corner* targets, int64_t* out, int64_t step, int64_t tokens) {
    const Block block = setting_.target;
    const bool choosing = tokens < block.area();
    if (choosing) draw_words(Stream::target_tokens, image, setting_.target_blocks * block.area());
    for (int64_t m = 0; m < setting_.target_blocks; ++m) {
      const int64_t first = targets[m].top * setting_.grid.width + targets[m].left;
      int64_t count = 0;
      for (int64_t row = 0; row < block.height; ++row) {
        for (int64_t column = 0; column < block.width; ++column) {
          places_[count++] = first + row * setting_.grid.width + column;
        }
      }
      if (choosing) choose(count, tokens, [&](int64_t i) { return words_[m * block.area() + i]; });
      std::copy_n(places_.begin(), tokens, out + m * step);
    }
  }

 private:
  void draw_words(Stream stream, uint32_t image, int64_t count, int64_t attempt = 0) {
    words_.resize(count);
    const uint32_t purpose = purpose_of(static_cast<int64_t>(stream), attempt);
    random_words(setting_.key, image, setting_.epoch, purpose, count, words_.data());
  }

  // Where the words put block number m of their purpose.
  Corner corner(int64_t m, Block block) const {
    const int64_t last = setting_.as_published ? 0 : 1;
    return {
        below(words_[2 * m], setting_.grid.height - block.height + last),
        below(words_[2 * m + 1], setting_.grid.width - block.width + last)};
  }

  void fill(Corner corner, Block block, uint8_t value) {
    for (int64_t row = corner.top; row < corner.top + block.height; ++row) {
      std::memset(&allowed_[row * setting_.grid.width + corner.left], value, block.width);
    }
  }

  void mark(const Draw& drawn, const Corner* targets) {
    std::memset(allowed_.data(), 0, allowed_.size());
    fill(drawn.context, setting_.context, 1);
    for (int64_t m = 0; m < drawn.kept_out; ++m) fill(targets[m], setting_.target, 0);
  }

  // Keep those `kept` of the first `count` places_ that have the smallest words, the earlier of equals.
  template <typename WordOf>
  void choose(int64_t count, int64_t kept, const WordOf& word_of) {
    keys_.resize(count);
    for (int64_t i = 0; i < count; ++i) keys_[i] = (static_cast<uint64_t>(word_of(i)) << 32) | i;
    chosen_ = keys_;
    std::nth_element(chosen_.begin(), chosen_.begin() + (kept - 1), chosen_.end());
    const uint64_t largest = chosen_[kept - 1];
    int64_t to = 0;
    for (int64_t i = 0; i < count; ++i) {
      places_[to] = places_[i];
      to += keys_[i] <= largest;
    }
  }

  const Setting& setting_;
  std::vector<uint8_t> allowed_;  // of each patch: whether it is in the context. [N]
  std::vector<int64_t> places_;
  std::vector<uint32_t> words_;
  std::vector<uint64_t> keys_, chosen_;
};

Block block_of(at::IntArrayRef sides) { return {sides[0], sides[1]}; }

void check(const Setting& s, bool budget, int64_t min_keep) {
  TORCH_CHECK_VALUE(
      s.grid.height > 0 && s.grid.width > 0 && s.grid.height < (1 << 16) && s.grid.width < (1 << 16) &&
          s.grid.area() < (1 << 18),
      "grid must have 1 to 2**18 - 1 patches, got ", s.grid.height, " x ", s.grid.width);
  const int64_t margin = s.as_published ? 1 : 0;
  for (const Block block : {s.target, s.context}) {
    TORCH_CHECK_VALUE(
        block.height > 0 && block.width > 0 && block.height <= s.grid.height - margin &&
            block.width <= s.grid.width - margin,
        "a block must fit into the grid, got ", block.height, " x ", block.width);
  }
  // An attempt has 12 bits in a counter, and the tokens of all blocks of an image 2**18 words.
  TORCH_CHECK_VALUE(
      s.target_blocks > 0 && kTries * (s.target_blocks + 1) <= (1 << 12) &&
          s.target_blocks * s.target.area() < (1 << 18),
      "target_blocks must be 1 to 203, of less than 2**18 patches in all, got ", s.target_blocks);
  TORCH_CHECK_VALUE(
      min_keep >= 0 && s.needed <= s.context.area(),
      "the context block has ", s.context.area(), " patches, fewer than the ", s.needed, " needed");
  TORCH_CHECK_VALUE(
      s.target_tokens <= s.target.area() && (budget ? std::min(s.context_tokens, s.target_tokens) > 0
                                                    : std::max(s.context_tokens, s.target_tokens) == 0),
      "context_tokens and target_tokens must be given for budget alone, and lie within a block");
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> multiblock_masks(
    const at::Tensor& image_index, at::IntArrayRef key, int64_t epoch, at::IntArrayRef grid,
    at::IntArrayRef target, at::IntArrayRef context, int64_t target_blocks, int64_t min_keep,
    std::string_view mode, int64_t context_tokens, int64_t target_tokens) {
  const bool truncate = mode == "truncate", budget = mode == "budget", packed = mode == "packed";
  TORCH_CHECK_VALUE(truncate || budget || packed, "mode must be truncate, budget or packed, got ", mode);
  TORCH_CHECK_VALUE(
      image_index.dim() == 1 && image_index.scalar_type() == at::kLong && image_index.numel() > 0,
      "image_index must be int64 [B] with B > 0");
  check_32_bits("epoch", &epoch, 1);
  const Setting setting{
      key_of(key), static_cast<uint32_t>(epoch), block_of(grid), block_of(target),
      block_of(context), target_blocks, std::max(min_keep + 1, context_tokens), truncate,
      context_tokens, target_tokens};
  check(setting, budget, min_keep);

  const at::Tensor index = image_index.contiguous();
  const int64_t batch = index.numel();
  const int64_t* const images = index.const_data_ptr<int64_t>();
  check_32_bits("image_index", images, batch);

  std::vector<Draw> draws(batch);
  std::vector<Corner> corners(batch * target_blocks);  // [B, M]
  parallel_for(batch, kGrain, [&](int64_t begin, int64_t end) {
    Sampler sampler(setting);
    for (int64_t b = begin; b < end; ++b) {
      draws[b] = sampler.draw(static_cast<uint32_t>(images[b]), &corners[b * target_blocks]);
    }
  });

  std::vector<int64_t> starts(batch + 1, 0);  // of the images in `context_out`
  const auto shorter = [](const Draw& one, const Draw& other) { return one.length < other.length; };
  const int64_t constant = budget ? context_tokens : std::min_element(draws.begin(), draws.end(), shorter)->length;
  for (int64_t b = 0; b < batch; ++b) starts[b + 1] = starts[b] + (packed ? draws[b].length : constant);
  TORCH_CHECK_VALUE(!packed || starts[batch] <= INT32_MAX, "so many tokens do not fit into int32 cu_seqlens");

  const int64_t tokens = budget ? target_tokens : setting.target.area();
  const at::Tensor context_out =
      packed ? index.new_empty({starts[batch]}) : index.new_empty({batch, constant});  // [T] or [B, K]
  const at::Tensor targets_out = index.new_empty({target_blocks, batch, tokens});    // [M, B, P]
  const at::Tensor cu_seqlens = index.new_empty({packed ? batch + 1 : 0}, at::kInt);
  if (packed) std::copy(starts.begin(), starts.end(), cu_seqlens.mutable_data_ptr<int32_t>());

  int64_t* const context_to = context_out.mutable_data_ptr<int64_t>();
  int64_t* const targets_to = targets_out.mutable_data_ptr<int64_t>();
  parallel_for(batch, kGrain, [&](int64_t begin, int64_t end) {
    Sampler sampler(setting);
    for (int64_t b = begin; b < end; ++b) {
      const auto image = static_cast<uint32_t>(images[b]);
      const Corner* const own = &corners[b * target_blocks];
      sampler.write_context(image, draws[b], own, context_to + starts[b], starts[b + 1] - starts[b]);
      sampler.write_targets(image, own, targets_to + b * tokens, batch * tokens, tokens);
    }
  });
  return {context_out, targets_out, cu_seqlens};
}

}  // namespace fastjepa
