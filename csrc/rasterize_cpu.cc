// The CPU backend's driver: memory, sorting, scattering to tiles, threads. The arithmetic is in the kernels.
#include "rasterize_cpu.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "parallel.h"
#include "workspace.h"

namespace fg3dgs {
namespace {

const Kernels& kernels() {
  static const Kernels& best = FG_BEST(kKernels);
  return best;
}

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

int64_t num_chunks(const Scene& s) { return (s.n + kChunk - 1) / kChunk; }

int64_t num_tiles(const Work& w) { return int64_t{w.tiles_x} * w.tiles_y; }

Work allocate(const Scene& s, Workspace& ws) {
  Work w = {};
  w.scene = &s;
  w.tiles_x = (s.width + kTile - 1) / kTile;
  w.tiles_y = (s.height + kTile - 1) / kTile;
  w.stride = static_cast<int>(round_up(kHeader + s.channels, 16));
  w.pair_stride = static_cast<int>(round_up(7 + s.channels, 16));
  w.records = ws.records.ensure(s.n * w.stride);
  w.ids = ws.ids.ensure(s.n);
  w.keys = ws.keys.ensure(s.n);
  w.boxes = ws.boxes.ensure(s.n);
  w.chunk_count = ws.chunk_count.ensure(num_chunks(s));
  w.chunk_pairs = ws.chunk_pairs.ensure(num_chunks(s));
  w.tile_start = ws.tile_start.ensure(num_tiles(w) + 1);
  return w;
}

// Projects every Gaussian; returns the number of pairs and leaves each chunk's first pair in chunk_pairs.
int64_t project_all(const Work& w, int32_t* radii, const Executor& executor) {
  parallel_for(executor, num_chunks(*w.scene), [&](int, int64_t chunk) { kernels().project(w, chunk, radii); });
  int64_t total = 0;
  for (int64_t c = 0; c < num_chunks(*w.scene); ++c) {
    const int64_t count = w.chunk_pairs[c];
    w.chunk_pairs[c] = total;
    total += count;
  }
  return total;
}

// Slots of the chunks [first, last) in the low half of each word, by depth and then by slot: a radix sort on the key
// bits that differ at all, in either of two buffers.
uint64_t* sort_chunks(const Work& w, int64_t first, int64_t last, uint64_t* from, uint64_t* to, int64_t* visible) {
  int64_t n = 0;
  uint32_t low = ~0u, high = 0;
  for (int64_t c = first; c < last; ++c)
    for (int64_t slot = c * kChunk, end = slot + w.chunk_count[c]; slot < end; ++slot) {
      const uint32_t key = w.keys[slot];
      low = std::min(low, key);
      high = std::max(high, key);
      from[n++] = uint64_t{key} << 32 | static_cast<uint64_t>(slot);
    }
  *visible = n;
  if (n < 2) return from;
  constexpr int kBits = 11;
  int width = 0;
  while (width < 32 && (high - low) >> width) ++width;
  for (int shift = 0; shift < width; shift += kBits) {
    uint32_t start[(1 << kBits) + 1] = {};
    const auto digit = [&](uint64_t item) {
      return (static_cast<uint32_t>(item >> 32) - low) >> shift & ((1u << kBits) - 1);
    };
    for (int64_t i = 0; i < n; ++i) ++start[digit(from[i]) + 1];
    for (int d = 0; d < 1 << kBits; ++d) start[d + 1] += start[d];
    for (int64_t i = 0; i < n; ++i) to[start[digit(from[i])]++] = from[i];
    std::swap(from, to);
  }
  return from;
}

uint64_t* sort_by_depth(const Work& w, Workspace& ws, int64_t* visible) {
  const int64_t n = w.scene->n;
  return sort_chunks(w, 0, num_chunks(*w.scene), ws.order.ensure(n), ws.order2.ensure(n), visible);
}

// Stable counting scatter of the sorted slots to their tiles. Ranges of the order work side by side, each with its own
// counters; the result is the same for any number of ranges.
void scatter_to_tiles(Work& w, Workspace& ws, const uint64_t* order, int64_t visible, int64_t pairs,
                      const Executor& executor) {
  const int64_t tiles = num_tiles(w);
  const int64_t ranges = std::max<int64_t>(1, std::min<int64_t>(2 * executor.num_threads, visible / 2048));
  int64_t* counts = ws.tile_counts.ensure(ranges * tiles);
  w.tile_items = ws.tile_items.ensure(pairs);
  std::memset(counts, 0, sizeof(int64_t) * ranges * tiles);
  const auto for_tiles = [&](int64_t range, const auto& visit) {
    for (int64_t i = visible * range / ranges, end = visible * (range + 1) / ranges; i < end; ++i) {
      const auto slot = static_cast<uint32_t>(order[i]);
      const Box b = w.boxes[slot];
      const int width = b.x1 - b.x0 + 1, count = width * (b.y1 - b.y0 + 1);
      int tile = b.y0 * w.tiles_x + b.x0;
      for (int k = 0, x = 0; k < count; ++k) {  // one loop: its end is hard enough to predict
        visit(tile, slot);
        const bool wraps = ++x == width;
        tile += wraps ? w.tiles_x - width + 1 : 1;
        x = wraps ? 0 : x;
      }
    }
  };
  parallel_for(executor, ranges, [&](int, int64_t range) {
    int64_t* mine = counts + range * tiles;
    for_tiles(range, [mine](int tile, uint32_t) { ++mine[tile]; });
  });
  int64_t total = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    w.tile_start[tile] = total;
    for (int64_t range = 0; range < ranges; ++range) {
      const int64_t count = counts[range * tiles + tile];
      counts[range * tiles + tile] = total;
      total += count;
    }
  }
  w.tile_start[tiles] = total;
  parallel_for(executor, ranges, [&](int, int64_t range) {
    int64_t* mine = counts + range * tiles;
    for_tiles(range, [&](int tile, uint32_t slot) { w.tile_items[mine[tile]++] = slot; });
  });
}

void fill_nan(float* p, int64_t count) { std::fill(p, p + count, std::numeric_limits<float>::quiet_NaN()); }

bool overflows(const Scene& s, int64_t pairs) { return s.max_pairs >= 0 && pairs > s.max_pairs; }

// Pairs are numbered with 32 bits inside a chunk and reported with 32 bits.
constexpr int64_t kMostPairs = std::numeric_limits<int32_t>::max();
constexpr const char* kTooManyPairs = "rasterize: more than 2^31 - 1 tile-Gaussian pairs; set max_pairs or scale less";

// The camera's gradient from the sums over Gaussians; the camera's centre is -R^T t.
void finish_camera(const Scene& s, const double* sums, const Gradients& out) {
  double r[9], t[3];
  std::copy(sums, sums + 9, r);
  std::copy(sums + 9, sums + 12, t);
  const double* center = sums + 16;
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) {
      r[3 * i + j] -= s.viewmat[4 * i + 3] * center[j];
      t[i] -= s.viewmat[4 * i + j] * center[j];
    }
  std::fill(out.viewmat, out.viewmat + 16, 0.0f);
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) out.viewmat[4 * i + j] = static_cast<float>(r[3 * i + j]);
    out.viewmat[4 * i + 3] = static_cast<float>(t[i]);
  }
  for (int i = 0; i < 4; ++i) out.intrinsics[i] = static_cast<float>(sums[12 + i]);
}

// Runs draw(tile, scratch) for every tile; each thread has floats of its own.
template <typename Draw>
void for_tiles(const Work& w, Workspace& ws, const Executor& executor, const Draw& draw) {
  const int64_t floats = round_up(scratch_floats(w.scene->channels), 16);
  float* space = ws.scratch.ensure(floats * std::max(1, executor.num_threads));
  parallel_for(executor, num_tiles(w),
               [&](int worker, int64_t tile) { draw(static_cast<int>(tile), space + worker * floats); });
}

void fill_gradients_nan(const Scene& s, const Gradients& out) {
  fill_nan(out.means, 3 * s.n);
  fill_nan(out.quats, 4 * s.n);
  fill_nan(out.scales, 3 * s.n);
  fill_nan(out.opacities, s.n);
  fill_nan(out.colors, s.n * (s.sh_count ? 3 * s.sh_count : s.channels));
  fill_nan(out.means2d, 2 * s.n);
  fill_nan(out.viewmat, 16);
  fill_nan(out.intrinsics, 4);
}

std::array<int64_t, 5> sizes_of(const Scene& s) { return {s.n, s.channels, s.sh_count, s.width, s.height}; }

void list_tiles(Work& w, Workspace& ws, int64_t pairs, const Executor& executor) {
  int64_t visible = 0;
  const uint64_t* order = sort_by_depth(w, ws, &visible);
  scatter_to_tiles(w, ws, order, visible, pairs, executor);
}

}  // namespace

const char* rasterize_forward(const Scene& s, const Images& out, int32_t* radii, int32_t* num_pairs, int32_t* ticket,
                              const Executor& executor) {
  if (ticket) *ticket = 0;
  Lease ws;
  Work w = allocate(s, *ws);
  const int64_t pairs = project_all(w, radii, executor);
  *num_pairs = static_cast<int32_t>(std::min(pairs, kMostPairs));
  if (overflows(s, pairs)) {
    const int64_t pixels = int64_t{s.width} * s.height;
    fill_nan(out.color, pixels * s.channels);
    fill_nan(out.alpha, pixels);
    fill_nan(out.depth, pixels);
    return nullptr;
  }
  if (pairs > kMostPairs) return kTooManyPairs;
  list_tiles(w, *ws, pairs, executor);
  for_tiles(w, *ws, executor, [&](int tile, float* scratch) { kernels().blend(w, out, tile, scratch); });
  if (ticket) {
    ws->sizes = sizes_of(s);
    ws->pairs = pairs;
    *ticket = ws.keep();
  }
  return nullptr;
}

const char* rasterize_paint(const Scene* layers, int count, const Canvas& canvas, const Executor& executor) {
  int64_t first[kMostLayersPainted + 1] = {};  // chunk of each layer; they share records, but no chunk
  for (int i = 0; i < count; ++i) first[i + 1] = first[i] + num_chunks(layers[i]);
  Scene all = layers[0];
  all.n = first[count] * kChunk;
  Lease ws;
  Work w = allocate(all, *ws);
  const auto layer_of = [&](int64_t chunk) {
    return static_cast<int>(std::upper_bound(first, first + count + 1, chunk) - first) - 1;
  };
  parallel_for(executor, first[count], [&](int, int64_t chunk) {
    const int layer = layer_of(chunk);
    Work own = w;
    own.scene = &layers[layer];
    own.records += first[layer] * kChunk * w.stride;
    own.ids += first[layer] * kChunk;
    own.keys += first[layer] * kChunk;
    own.boxes += first[layer] * kChunk;
    own.chunk_count += first[layer];
    own.chunk_pairs += first[layer];
    kernels().project(own, chunk - first[layer], nullptr);
  });
  int64_t pairs = 0;
  for (int64_t c = 0; c < first[count]; ++c) pairs += w.chunk_pairs[c];
  if (pairs > kMostPairs) return kTooManyPairs;

  uint64_t* order = ws->order.ensure(all.n);
  uint64_t* spare = ws->order2.ensure(all.n);
  const uint64_t* sorted[kMostLayersPainted];
  int64_t visible[kMostLayersPainted], total = 0;
  parallel_for(executor, count, [&](int, int64_t i) {
    const int64_t slot = first[i] * kChunk;
    sorted[i] = sort_chunks(w, first[i], first[i + 1], order + slot, spare + slot, &visible[i]);
  });
  for (int i = 0; i < count; ++i) {
    w.layer_end[i] = static_cast<uint32_t>(first[i + 1] * kChunk);
    std::copy_n(sorted[i], visible[i], order + total);  // layers before it end before its first slot
    total += visible[i];
  }
  scatter_to_tiles(w, *ws, order, total, pairs, executor);
  for_tiles(w, *ws, executor, [&](int tile, float* scratch) { kernels().paint(w, canvas, tile, scratch); });
  return nullptr;
}

const char* rasterize_backward(const Scene& s, const ConstImages& rendered, const ConstImages& cotangents,
                               const Gradients& out, int32_t ticket, const Executor& executor) {
  Lease ws(ticket);
  const bool listed = ws.found() && ws->sizes == sizes_of(s);
  Work w = allocate(s, *ws);  // leaves what is in memory of these sizes
  const int64_t pairs = listed ? ws->pairs : project_all(w, nullptr, executor);
  if (overflows(s, pairs)) {
    fill_gradients_nan(s, out);
    return nullptr;
  }
  if (pairs > kMostPairs) return kTooManyPairs;
  if (listed) {
    w.tile_items = ws->tile_items.get();
  } else {
    list_tiles(w, *ws, pairs, executor);
  }
  w.pair_gradients = ws->pair_gradients.ensure(pairs * w.pair_stride);
  for_tiles(w, *ws, executor, [&](int tile, float* scratch) { kernels().blend_backward(w, rendered, cotangents, tile, scratch); });
  double* sums = ws->camera_sums.ensure(num_chunks(s) * kCameraSums);
  parallel_for(executor, num_chunks(s),
               [&](int, int64_t chunk) { kernels().unproject(w, out, chunk, sums + chunk * kCameraSums); });
  double total[kCameraSums] = {};
  for (int64_t c = 0; c < num_chunks(s); ++c)
    for (int i = 0; i < kCameraSums; ++i) total[i] += sums[c * kCameraSums + i];
  finish_camera(s, total, out);
  return nullptr;
}

}  // namespace fg3dgs
