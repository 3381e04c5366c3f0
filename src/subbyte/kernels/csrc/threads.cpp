#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>

#include "sizes.hpp"

#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace subbyte {
namespace {

using Body = void (*)(void*);
using GompParallel = void (*)(Body, void*, unsigned, unsigned);  // libgomp's and LLVM's ABI

GompParallel find_openmp() {
#if defined(__linux__) || defined(__APPLE__)
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

GompParallel openmp() {
  static std::atomic<GompParallel> found{nullptr};
  GompParallel call = found.load(std::memory_order_relaxed);
  if (!call) {  // it may be loaded later: ask again
    call = find_openmp();
    found.store(call, std::memory_order_relaxed);
  }
  return call;
}

// Parts are taken from a counter: a team may be smaller than what was asked for.
struct Job {
  Job(void (*f)(void*, std::int64_t, std::int64_t), void* context, std::int64_t n, int parts)
      : f(f), context(context), n(n), parts(parts) {}

  void (*f)(void*, std::int64_t, std::int64_t);
  void* context;
  std::int64_t n;
  int parts;
  std::atomic<int> next{0};
  std::exception_ptr error;
  std::mutex guard;

  void work() {
    for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < parts;) {
      try {
        f(context, n * i / parts, n * (i + 1) / parts);
      } catch (...) {  // must not leave an OpenMP region
        const std::lock_guard<std::mutex> lock(guard);
        error = std::current_exception();
      }
    }
  }
};

}  // namespace

int team_of(int threads) {
  require(threads >= 1, "threads must be 1 or more");
  static const int most = 4 * static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  return std::min(threads, most);
}

bool has_openmp() { return openmp() != nullptr; }

void parallel(int threads, std::int64_t n, void (*f)(void*, std::int64_t, std::int64_t),
              void* context) {
  const int team = static_cast<int>(std::min<std::int64_t>(threads, n));
  const GompParallel call = team > 1 ? openmp() : nullptr;
  if (!call) {
    if (n > 0) f(context, 0, n);
    return;
  }
  // More parts than threads: one that is held up leaves its share to the others.
  constexpr int kPartsPerThread = 4;
  Job job(f, context, n, static_cast<int>(std::min<std::int64_t>(kPartsPerThread * team, n)));
  call([](void* data) { static_cast<Job*>(data)->work(); }, &job, static_cast<unsigned>(team), 0);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace subbyte
