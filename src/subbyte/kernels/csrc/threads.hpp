// Work for several threads, on the OpenMP runtime that the process already has.
//
// PyTorch's worker threads spin for a while after each of its own loops; a second pool beside them
// would wait for its cores. So their runtime is asked, by name: no compile-time dependence on it.
#pragma once

#include <cstdint>
#include <type_traits>

namespace subbyte {

// `threads`, and no more than four a core: an OpenMP runtime that cannot have a thread ends the
// process. Throws std::invalid_argument for less than one.
int team_of(int threads);

// f(context, begin, end) over [0, n), cut into parts for at most `threads` threads. Without an
// OpenMP runtime in the process everything runs on the caller's thread.
void parallel(int threads, std::int64_t n, void (*f)(void*, std::int64_t, std::int64_t),
              void* context);

template <class F>
void parallel(int threads, std::int64_t n, F&& f) {
  parallel(
      threads, n,
      [](void* context, std::int64_t begin, std::int64_t end) {
        (*static_cast<std::remove_reference_t<F>*>(context))(begin, end);
      },
      &f);
}

bool has_openmp();

}  // namespace subbyte
