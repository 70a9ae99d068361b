// Memory of the CPU backend that outlives a call.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "rasterize_cpu.h"

#ifdef FG_SANITIZED
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

namespace fg3dgs {

// Memory that only grows, is 64-byte aligned and starts uninitialised.
template <class T>
class Buffer {
 public:
  T* ensure(int64_t count) {
    if (count > capacity_) {
      std::free(data_);
      data_ = nullptr;
      capacity_ = 0;
      const int64_t wanted = count + count / 4;  // sizes drift from frame to frame
      const size_t bytes = (wanted * sizeof(T) + 63) / 64 * 64;
      data_ = static_cast<T*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64)));
      if (!data_) throw std::bad_alloc();
      capacity_ = wanted;
    }
    // To AddressSanitizer, what this call did not ask for is not there, although the memory is kept.
    ASAN_UNPOISON_MEMORY_REGION(data_, capacity_ * sizeof(T));
    ASAN_POISON_MEMORY_REGION(data_ + count, (capacity_ - count) * sizeof(T));
    return data_;
  }
  T* get() const { return data_; }
  int64_t bytes() const { return capacity_ * sizeof(T); }
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

 private:
  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

// What one call needs besides its arguments. Kept between calls: fresh pages cost more than the sort.
struct Workspace {
  Buffer<float> records, pair_gradients, scratch;
  Buffer<int32_t> ids, chunk_count;
  Buffer<uint32_t> keys, tile_items;
  Buffer<Box> boxes;
  Buffer<int64_t> chunk_pairs, tile_start, tile_counts;
  Buffer<uint64_t> order, order2;
  Buffer<double> camera_sums;

  int64_t bytes() const {
    return records.bytes() + pair_gradients.bytes() + scratch.bytes() + ids.bytes() + chunk_count.bytes() +
           keys.bytes() + tile_items.bytes() + boxes.bytes() + chunk_pairs.bytes() + tile_start.bytes() +
           tile_counts.bytes() + order.bytes() + order2.bytes() + camera_sums.bytes();
  }
};

inline constexpr size_t kKeptWorkspaces = 4;
inline constexpr int64_t kKeptBytes = int64_t{256} << 20;  // a larger one is freed at once

class Lease {
 public:
  Lease() {
    std::lock_guard<std::mutex> lock(mutex());
    if (pool().empty()) {
      workspace_ = std::make_unique<Workspace>();
    } else {
      workspace_ = std::move(pool().back());
      pool().pop_back();
    }
  }
  ~Lease() {
    std::lock_guard<std::mutex> lock(mutex());
    if (pool().size() < kKeptWorkspaces && workspace_->bytes() <= kKeptBytes) pool().push_back(std::move(workspace_));
  }
  Workspace* operator->() const { return workspace_.get(); }
  Workspace& operator*() const { return *workspace_; }

 private:
  // Never destroyed: a pool thread may still run a call while the process exits.
  static std::mutex& mutex() {
    static auto* m = new std::mutex;
    return *m;
  }
  static std::vector<std::unique_ptr<Workspace>>& pool() {
    static auto* p = new std::vector<std::unique_ptr<Workspace>>;
    return *p;
  }
  std::unique_ptr<Workspace> workspace_;
};

}  // namespace fg3dgs
