// Loops over somebody else's thread pool.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "rasterize.h"

namespace fg3dgs {

// Runs body(worker, item) for every item in [0, count), worker < max(1, num_threads); body must not throw.
//
// The calling thread takes part, and waits only for items that another thread has already begun. So it never depends on
// a free thread in the pool, and many calls at once cannot deadlock. A task that starts late finds nothing left and
// touches only the shared counters, which it keeps alive.
template <class Body>
void parallel_for(const Executor& executor, int64_t count, const Body& body) {
  struct Job {
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<int> workers{0};
    std::mutex mutex;
    std::condition_variable finished;
  };
  if (executor.num_threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) body(0, i);
    return;
  }
  auto job = std::make_shared<Job>();
  const auto work = [job, count, &body] {
    const int worker = job->workers.fetch_add(1);
    int64_t mine = 0;
    for (int64_t i; (i = job->next.fetch_add(1)) < count; ++mine) body(worker, i);
    if (mine && job->done.fetch_add(mine) + mine == count) {
      std::lock_guard<std::mutex> lock(job->mutex);
      job->finished.notify_all();
    }
  };
  const int64_t others = executor.num_threads - 1 < count - 1 ? executor.num_threads - 1 : count - 1;
  for (int64_t i = 0; i < others; ++i) executor.schedule(work);
  work();
  for (int spin = 0; spin < 2000 && job->done.load() != count; ++spin) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  std::unique_lock<std::mutex> lock(job->mutex);
  job->finished.wait(lock, [&] { return job->done.load() == count; });
}

}  // namespace fg3dgs
