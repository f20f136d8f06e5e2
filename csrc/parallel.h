// Work split over the threads of torch.set_num_threads, also where there has been a fork.
#pragma once

#include <ATen/Parallel.h>

namespace fastjepa {

// Whether this process is a forked child. The threads of OpenMP stay behind with the parent, and a child
// that asks for them may wait for ever, so a child does its work alone (loader workers have one thread anyway).
bool is_forked();

// f(begin, end) over pieces of at least `grain`. Pieces must not depend on each other, or on where they are cut.
template <typename F>
void parallel_for(int64_t end, int64_t grain, const F& f) {
  if (end <= 0) return;
  if (is_forked()) {
    f(int64_t{0}, end);
  } else {
    at::parallel_for(0, end, grain, f);
  }
}

}  // namespace fastjepa
