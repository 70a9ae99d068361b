// Many callers at once on one pool of threads, as XLA's: every kernel, under ThreadSanitizer. Their results must have
// the bits that one thread finds alone.
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "cases.h"

namespace {

using namespace fuzz;

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ends_ = true;
    }
    changed_.notify_all();
    for (auto& thread : threads_) thread.join();
  }
  Executor executor() {
    return {static_cast<int>(threads_.size()), [this](std::function<void()> task) {
              {
                std::lock_guard<std::mutex> lock(mutex_);
                tasks_.push_back(std::move(task));
              }
              changed_.notify_one();
            }};
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return ends_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      auto task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      task = nullptr;
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  bool ends_ = false;
  std::vector<std::thread> threads_;
};

// One caller: `calls` cases of its own.
void call(uint32_t caller, int calls, const Executor& executor, std::atomic<int64_t>* done) {
  Random random(caller + 1);
  for (int i = 0; i < calls;) {
    uint8_t data[40];
    for (uint8_t& x : data) x = static_cast<uint8_t>(random.uniform(0, 256));
    Bytes bytes(data, sizeof data);
    with_case(bytes, [&](const auto& c) {
      expect(c.run(executor).same_bits(c.run({1, nullptr})), "the bits depend on the threads");
      ++i;
      ++*done;
    });
  }
}

}  // namespace

// CALLERS CALLS THREADS: each caller makes that many calls on a pool of so many threads.
int main(int argc, char** argv) {
  expect(argc == 4, "three numbers: callers, calls, threads");
  const int callers = std::atoi(argv[1]), calls = std::atoi(argv[2]);
  std::atomic<int64_t> done{0};
  {
    Pool pool(std::atoi(argv[3]));
    std::vector<std::thread> threads;
    for (int i = 0; i < callers; ++i)
      threads.emplace_back([&, i] { call(static_cast<uint32_t>(i), calls, pool.executor(), &done); });
    for (auto& thread : threads) thread.join();
  }
  std::fprintf(stderr, "Done %lld calls by %d callers\n", static_cast<long long>(done.load()), callers);
}
