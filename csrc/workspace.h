// Memory of the CPU backend that outlives a call.
#pragma once

#include <algorithm>
#include <array>
#include <cstdlib>
#include <limits>
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
  // Of a scene that `Lease::keep` left here: its ticket (0: none), sizes and pairs.
  int32_t ticket = 0;
  std::array<int64_t, 5> sizes = {};
  int64_t pairs = 0;

  int64_t bytes() const {
    return records.bytes() + pair_gradients.bytes() + scratch.bytes() + ids.bytes() + chunk_count.bytes() +
           keys.bytes() + tile_items.bytes() + boxes.bytes() + chunk_pairs.bytes() + tile_start.bytes() +
           tile_counts.bytes() + order.bytes() + order2.bytes() + camera_sums.bytes();
  }
};

inline constexpr size_t kKeptWorkspaces = 6;  // a head's three regions between their passes, and what runs meanwhile
inline constexpr int64_t kKeptBytes = int64_t{256} << 20;  // a larger one is freed at once

class Lease {
 public:
  // The workspace that was kept under a ticket, with all that was left in it, or any other.
  explicit Lease(int32_t ticket = 0) {
    std::lock_guard<std::mutex> lock(mutex());
    auto& all = pool();
    auto found = all.end();
    for (auto it = all.begin(); it != all.end(); ++it)
      if ((*it)->ticket == ticket) found = it;
    if (found == all.end() && all.size() == kKeptWorkspaces) found = all.begin();  // the oldest
    if (found == all.end()) {
      workspace_ = std::make_unique<Workspace>();
      return;
    }
    workspace_ = std::move(*found);
    all.erase(found);
    found_ = ticket != 0 && workspace_->ticket == ticket;
    workspace_->ticket = 0;
  }
  ~Lease() {
    std::lock_guard<std::mutex> lock(mutex());
    if (pool().size() < kKeptWorkspaces && workspace_->bytes() <= kKeptBytes) pool().push_back(std::move(workspace_));
  }
  // Leaves the contents for whoever asks with the ticket, unless others need the memory first.
  int32_t keep() {
    static int32_t last = 0;
    std::lock_guard<std::mutex> lock(mutex());
    last = last % std::numeric_limits<int32_t>::max() + 1;
    return workspace_->ticket = last;
  }
  bool found() const { return found_; }
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
  bool found_ = false;
};

}  // namespace fg3dgs
