// As much of CUDA as the project's kernels use, on one CPU thread, so that their own sources are tested without a GPU.
//
// Every thread of a block is a fiber. Barriers and warp operations wait for all that must come; a block in which
// nobody can go on any more, a warp operation that a lane misses, and barriers of different kinds that meet are
// reported and abort. The order in which warps and lanes run is a setting: a missing barrier shows as a result that
// depends on it. Shared memory is rubbish at the start of every block, another rubbish in every order. A stream that is
// not the one expected aborts; a launch can be made to fail. Not modelled: real concurrency, memory order, the limits of
// a chip.
#pragma once

#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__ inline  // so that all shared memory is of one kind to the linker
#define __device__
#define __host__
#define __forceinline__ inline
#ifdef FG_SANITIZED  // which guards every variable but those of a section of its own
#define __shared__ static
#else
#define __shared__ static __attribute__((section("emulated_shared")))
extern char __start_emulated_shared[], __stop_emulated_shared[];  // the linker's names for its ends
#endif
#define __launch_bounds__(threads)

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess, cudaErrorUnknown };

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline uint3 threadIdx, blockIdx;

cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream);

namespace emulation {

constexpr int kMaxThreads = 1024;
constexpr size_t kStack = 128 << 10;

enum class State { kReady, kWarp, kBlock, kDone };

struct Fiber {
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  bool born = false;
  State state = State::kDone;
  const char* barrier = "";
};

struct Warp {
  int arrived = 0;
  int phase = 0;              // of its exchanges: two buffers take turns, so one barrier per exchange is enough
  uint64_t slots[2][32] = {};
};

struct Block {
  Fiber fibers[kMaxThreads];
  Warp warps[kMaxThreads / 32];
  int threads = 0, current = 0, arrived = 0, alive = 0, vote = 0, votes[2] = {};
  int phase = 0;
  jmp_buf scheduler;
  std::function<void()> body;
  unsigned order = 0;  // 0: ascending; 1: descending; else a seed, and every meeting is another warp's turn
  cudaStream_t stream = nullptr;  // where all work must go
  int calls_until_failure = -1;   // launches and memsets; negative: none fails
  cudaError_t error = cudaSuccess;
};

inline Block& block() {
  static auto* one = new Block;
  return *one;
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s (block %u, thread %d)\n", what, blockIdx.x, block().current);
  std::abort();
}

inline void jump(jmp_buf& where) {
#ifdef FG_SANITIZED  // libc's own: the sanitizer's takes the fiber's stack for a mistake, and a second a thousand times
  using Jump = void (*)(jmp_buf, int);
  static const auto direct = reinterpret_cast<Jump>(dlsym(dlopen("libc.so.6", RTLD_LAZY), "_longjmp"));
  direct(where, 1);
#else
  _longjmp(where, 1);
#endif
}

// Gives the processor back to the scheduler until this fiber is ready again.
inline void pause(State state) {
  Block& b = block();
  Fiber& self = b.fibers[b.current];
  self.state = state;
  if (!_setjmp(self.here)) jump(b.scheduler);
}

inline void fiber_main() {
  for (;;) {
    block().body();
    block().alive--;
    pause(State::kDone);
  }
}

inline void resume(int thread) {
  Block& b = block();
  Fiber& fiber = b.fibers[thread];
  b.current = thread;
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
  if (_setjmp(b.scheduler)) return;
  if (fiber.born) jump(fiber.here);
  fiber.born = true;
  fiber.stack.reset(new char[kStack]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

inline std::vector<int> permutation(int count, unsigned order, unsigned salt) {
  std::vector<int> out(count);
  for (int i = 0; i < count; ++i) out[i] = order == 1 ? count - 1 - i : i;
  unsigned state = order * 2654435761u + salt;
  for (int i = count - 1; order > 1 && i > 0; --i) {
    state = state * 1664525u + 1013904223u;
    std::swap(out[i], out[(state >> 8) % (i + 1)]);
  }
  return out;
}

// Lets the lanes of a warp that are ready run to their next meeting; whether there was one.
inline bool run_warp(int warp, const std::vector<int>& lanes) {
  bool ran = false;
  for (const int lane : lanes)
    if (block().fibers[32 * warp + lane].state == State::kReady) {
      resume(32 * warp + lane);
      ran = true;
    }
  return ran;
}

inline void run_block() {
  Block& b = block();
  const bool seeded = b.order > 1;
  std::vector<int> warps = permutation(b.threads / 32, b.order, 1), lanes = permutation(32, b.order, 2);
  bool any = true;
  for (unsigned round = 0; any; ++round) {
    any = false;
    if (seeded) warps = permutation(b.threads / 32, b.order, 2 * round + 4);
    if (seeded && round % 8 == 0) lanes = permutation(32, b.order, 2 * round + 5);
    for (const int warp : warps) {
      bool ran = run_warp(warp, lanes);
      any |= ran;
      while (ran && !seeded) ran = run_warp(warp, lanes);
    }
  }
  if (b.alive) fail("deadlock: some threads wait for others that have left or wait elsewhere");
}

inline void spoil_shared_memory(unsigned order) {
#ifndef FG_SANITIZED
  // NaN and -1 in the first order, large numbers of either sign in others.
  std::memset(__start_emulated_shared, order == 0 ? 0xff : order % 2 ? 0x4b : 0xcb,
              static_cast<size_t>(__stop_emulated_shared - __start_emulated_shared));
#endif
}

// Whether a call that puts work on a stream goes well; it must name the right one.
inline bool begin_call(cudaStream_t stream) {
  Block& b = block();
  if (stream != b.stream) fail("work on another stream than the caller's");
  if (b.calls_until_failure < 0 || b.calls_until_failure--) return true;
  b.error = cudaErrorUnknown;
  return false;
}

// Runs a kernel's body for every thread of every block, the blocks one after the other.
inline void launch(unsigned blocks, int threads, cudaStream_t stream, const std::function<void()>& body) {
  Block& b = block();
  if (!begin_call(stream)) return;
  if (!blocks || blocks > 0x7fffffffu) fail("a launch of no blocks, or of too many");
  if (threads > kMaxThreads || threads % 32) fail("odd number of threads");
  b.threads = threads;
  b.body = body;
  const std::vector<int> order = permutation(static_cast<int>(blocks), b.order, 3);
  for (const int i : order) {
    blockIdx = {static_cast<unsigned>(i), 0, 0};
    spoil_shared_memory(b.order);
    b.alive = threads;
    b.arrived = 0;
    for (Warp& warp : b.warps) warp.arrived = 0;
    for (int t = 0; t < threads; ++t) b.fibers[t].state = State::kReady;
    run_block();
  }
}

// A whole warp meets here; each lane leaves a word. Returns all 32 words.
inline const uint64_t* meet(unsigned mask, const char* kind, uint64_t word) {
  if (mask != 0xffffffffu) fail("only whole warps are emulated");
  Block& b = block();
  const int warp = b.current / 32, lane = b.current % 32, phase = b.warps[warp].phase;
  Warp& w = b.warps[warp];
  w.slots[phase][lane] = word;
  b.fibers[b.current].barrier = kind;
  if (++w.arrived == 32) {
    w.arrived = 0;
    w.phase ^= 1;
    for (int l = 0; l < 32; ++l) {
      Fiber& other = b.fibers[32 * warp + l];
      if (std::strcmp(other.barrier, kind)) fail("lanes of a warp meet in different operations");
      other.state = State::kReady;
    }
  } else {
    pause(State::kWarp);
  }
  return w.slots[phase];
}

// All threads that are left meet here; returns how many brought `vote`.
inline int meet_block(const char* kind, bool vote) {
  Block& b = block();
  const int phase = b.phase;
  if (!b.arrived) b.votes[phase] = 0;
  b.votes[phase] += vote;
  b.fibers[b.current].barrier = kind;
  if (++b.arrived == b.threads) {
    b.arrived = 0;
    b.phase ^= 1;
    for (int t = 0; t < b.threads; ++t) {
      if (std::strcmp(b.fibers[t].barrier, kind)) fail("threads of a block meet in different barriers");
      b.fibers[t].state = State::kReady;
    }
  } else {
    pause(State::kBlock);
  }
  return b.votes[phase];
}

template <class T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8, "shuffles take up to 64 bits");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}

template <class T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <class T>
T shuffle(unsigned mask, const char* kind, T value, int source) {
  return from_word<T>(meet(mask, kind, to_word(value))[source]);
}

inline int lane() { return block().current % 32; }

template <class T>
T exchange(T* p, T value) {
  const T old = *p;
  *p = value;
  return old;
}

}  // namespace emulation

inline cudaError_t cudaGetLastError() { return std::exchange(emulation::block().error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "" : "told to fail"; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  if (!emulation::begin_call(stream)) return cudaErrorUnknown;
  std::memset(p, value, bytes);
  return cudaSuccess;
}

// For the smoke test of benchmarks/ alone: the device's memory is the host's.
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
template <class T>
cudaError_t cudaMalloc(T** p, size_t bytes) {
  *p = static_cast<T*>(std::malloc(bytes));
  if (*p) std::memset(*p, 0xff, bytes);
  return *p ? cudaSuccess : cudaErrorUnknown;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

inline void __syncthreads() { emulation::meet_block("syncthreads", false); }
inline int __syncthreads_or(int predicate) { return emulation::meet_block("syncthreads_or", predicate != 0) != 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::meet(mask, "syncwarp", 0); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* votes = emulation::meet(mask, "ballot", predicate != 0);
  unsigned bits = 0;
  for (int l = 0; l < 32; ++l) bits |= static_cast<unsigned>(votes[l]) << l;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulation::shuffle(mask, "shfl", value, source);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulation::shuffle(mask, "shfl_xor", value, emulation::lane() ^ bits);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta) {
  const int lane = emulation::lane();
  return emulation::shuffle(mask, "shfl_up", value, lane >= delta ? lane - delta : lane);
}

template <class T>
T atomicAdd(T* p, T value) {
  return emulation::exchange(p, *p + value);
}
inline uint32_t atomicMax(uint32_t* p, uint32_t value) { return emulation::exchange(p, std::max(*p, value)); }

inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline uint32_t __float_as_uint(float x) { return emulation::from_word<uint32_t>(emulation::to_word(x)); }
