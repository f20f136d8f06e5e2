#include "parallel.h"

#include <pthread.h>

namespace fastjepa {
namespace {

bool forked = false;

// A child starts with one thread, so nobody reads while this is written.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool is_forked() { return forked; }

}  // namespace fastjepa
