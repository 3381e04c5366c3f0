// Work for several threads: on the OpenMP runtime of the process where it has one (PyTorch's, whose
// threads spin), else on threads of our own.
#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#include "sizes.hpp"

#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace subbyte {
namespace {

using Body = void (*)(void*);
using GompParallel = void (*)(Body, void*, unsigned, unsigned);  // libgomp's and LLVM's ABI

GompParallel openmp() {
#if defined(__linux__) || defined(__APPLE__)
  static std::atomic<GompParallel> found{nullptr};
  GompParallel call = found.load(std::memory_order_relaxed);
  if (!call) {  // it may be loaded later: ask again
    call = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.store(call, std::memory_order_relaxed);
  }
  return call;
#else
  return nullptr;
#endif
}

// Parts are taken from a counter: a team may be smaller than what was asked for.
struct Job {
  void (*f)(void*, std::int64_t, std::int64_t);
  void* context;
  std::int64_t n;
  int parts;
  std::atomic<int> next{0};
  int helpers = 0;  // at work now; under the pool's lock
  std::exception_ptr error;
  std::mutex guard;

  Job(void (*f)(void*, std::int64_t, std::int64_t), void* context, std::int64_t n, int parts)
      : f(f), context(context), n(n), parts(parts) {}

  void work() {
    for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < parts;) {
      try {
        f(context, n * i / parts, n * (i + 1) / parts);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(guard);
        error = std::current_exception();
      }
    }
  }
};

// Never ends: a process may end, or fork, while its threads wait.
class Pool {
 public:
  static Pool& get() {
    static Pool& pool = *new Pool;
    return pool;
  }

  void run(Job& job, int team) {
    {
      const std::lock_guard<std::mutex> lock(guard_);
      grow(team - 1);
      for (int i = 1; i < team; ++i) waiting_.push_back(&job);
      ready_.fetch_add(team - 1, std::memory_order_release);
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(guard_);
    const auto left = std::remove(waiting_.begin(), waiting_.end(), &job);
    ready_.fetch_sub(static_cast<int>(waiting_.end() - left), std::memory_order_release);
    waiting_.erase(left, waiting_.end());
    done_.wait(lock, [&] { return job.helpers == 0; });
  }

 private:
  void grow(int wanted) {
    while (threads_ < wanted) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        return;  // the caller does what nobody takes
      }
      ++threads_;
    }
  }

  void serve() {
    constexpr int kSpins = 4000;  // a wait is cheaper than a wake-up between two layers
    while (true) {
      for (int i = 0; i < kSpins && ready_.load(std::memory_order_acquire) <= 0; ++i) pause();
      std::unique_lock<std::mutex> lock(guard_);
      wake_.wait(lock, [&] { return !waiting_.empty(); });
      Job* job = waiting_.front();
      waiting_.pop_front();
      ready_.fetch_sub(1, std::memory_order_release);
      ++job->helpers;
      lock.unlock();
      job->work();
      lock.lock();
      --job->helpers;
      lock.unlock();
      done_.notify_all();
    }
  }

  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }

  std::mutex guard_;
  std::condition_variable wake_, done_;
  std::deque<Job*> waiting_;
  std::atomic<int> ready_{0};
  int threads_ = 0;
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
  if (team <= 1) {
    if (n > 0) f(context, 0, n);
    return;
  }
  // More parts than threads: one that is held up leaves its share to the others.
  constexpr int kPartsPerThread = 4;
  Job job(f, context, n, static_cast<int>(std::min<std::int64_t>(kPartsPerThread * team, n)));
  if (const GompParallel call = openmp())
    call([](void* data) { static_cast<Job*>(data)->work(); }, &job, static_cast<unsigned>(team), 0);
  else
    Pool::get().run(job, team);
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace subbyte
