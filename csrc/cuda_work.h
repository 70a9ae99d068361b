// What the CUDA backend's driver shares with its kernels and with its caller. Plain C++: needs no CUDA header.
//
// A call runs in steps, one kernel each: project the Gaussians and count how many meet each tile -> reserve room for the
// tiles' lists -> scatter Gaussians to tiles -> blend tiles, each block sorting its own list by depth in shared memory;
// backward: blend tiles again, adding what each warp finds to its Gaussian's sums -> unproject the Gaussians.
//
// Departure from sorting all pairs by (tile, depth): there is no global sort, so nothing depends on how many pairs there
// are, the host never waits, and a call is a handful of launches, which is what bounds a scene as small as a head.
// A tile whose list finds no room in the workspace searches all Gaussians instead: slower, and the same bits.
#pragma once

#include <type_traits>

#include "rasterize.h"

struct CUstream_st;

namespace fg3dgs {

constexpr int kMoments = 7;       // sums of v, v dx, v dy, v dx^2, v dx dy, v dy^2, and of the depth's share
constexpr int kCudaThreads = 256; // of every block: 16 x 16 pixels, or as many Gaussians
constexpr uint32_t kNoList = ~0u;
constexpr int64_t kMostRoom = int64_t{1} << 31;

struct CudaWork {
  Scene scene;
  int tiles_x;
  int64_t tiles;
  int64_t room;  // pairs that lists have room for
  int stride;    // of a Gaussian's sums: moments, colours

  // Zero at the start.
  unsigned long long* box_pairs;  // [1] tiles in the boxes of all Gaussians
  unsigned long long* reserved;   // [1] room taken
  uint32_t* tile_count;           // [tiles] Gaussians that meet the tile
  uint32_t* tile_fill;            // [tiles] how many of them its list holds
  float* sums;                    // [n, stride], or null
  uint32_t* largest;              // [n, stride] bits of the largest addend, or null
  long long* exact;               // [n, stride] sums in units of 2^-33 of the largest addend's power of two, or null
  int64_t zeroed_bytes;

  uint32_t* tile_start;  // [tiles] into items, or kNoList
  uint32_t* items;       // [room] Gaussians
  uint32_t* keys;        // [n] camera z as a sortable integer; 0: not drawn
  Box* boxes;            // [n]
  float* splats;         // [n, 8] x, y, z, log2(opacity), a, b, c of the exponent, unused
  float* colors;         // [n, 3] with spherical harmonics, else null
  float* camera;         // [blocks of Gaussians, kCameraSums]
};

inline int64_t gaussian_blocks(int64_t n) { return (n + kCudaThreads - 1) / kCudaThreads; }

// Room for pairs: most scenes need less, and no scene needs more than every Gaussian in every tile.
inline int64_t default_room(const Scene& s) {
  const int64_t tiles = int64_t{(s.width + kTile - 1) / kTile} * ((s.height + kTile - 1) / kTile);
  const int64_t usual = 32 * s.n > (1 << 20) ? 32 * s.n : 1 << 20;
  const int64_t most = s.n * tiles < usual ? s.n * tiles : usual < kMostRoom ? usual : kMostRoom;
  return s.max_pairs >= 0 && s.max_pairs < most ? s.max_pairs : most;
}

enum class CudaPass { kForward, kBackward, kDeterministic };

inline CudaPass pass_of(bool backward, bool deterministic) {
  return !backward ? CudaPass::kForward : deterministic ? CudaPass::kDeterministic : CudaPass::kBackward;
}

// Lays a workspace out from `base` on, 256-byte aligned; returns its bytes. With base = nullptr: only the size.
inline int64_t make_work(const Scene& s, CudaPass pass, int64_t room, void* base, CudaWork* w) {
  char* const begin = static_cast<char*>(base);
  int64_t at = 0;
  const auto take = [&](auto** field, int64_t count) {
    *field = reinterpret_cast<std::remove_reference_t<decltype(*field)>>(begin + at);
    at += (count * static_cast<int64_t>(sizeof(**field)) + 255) / 256 * 256;
  };
  *w = {};
  w->scene = s;
  w->tiles_x = (s.width + kTile - 1) / kTile;
  w->tiles = int64_t{w->tiles_x} * ((s.height + kTile - 1) / kTile);
  w->room = room;
  w->stride = (kMoments + s.channels + 7) / 8 * 8;
  take(&w->box_pairs, 1);
  take(&w->reserved, 1);
  take(&w->tile_count, w->tiles);
  take(&w->tile_fill, w->tiles);
  if (pass == CudaPass::kBackward) take(&w->sums, s.n * w->stride);
  if (pass == CudaPass::kDeterministic) {
    take(&w->largest, s.n * w->stride);
    take(&w->exact, s.n * w->stride);
  }
  w->zeroed_bytes = at;
  take(&w->tile_start, w->tiles);
  take(&w->items, room);
  take(&w->keys, s.n);
  take(&w->boxes, s.n);
  take(&w->splats, 8 * s.n);
  if (s.sh_count) take(&w->colors, 3 * s.n);
  if (pass != CudaPass::kForward) take(&w->camera, gaussian_blocks(s.n) * kCameraSums);
  return at;
}

inline int64_t workspace_bytes(const Scene& s, CudaPass pass, int64_t room) {
  CudaWork unused;
  return make_work(s, pass, room, nullptr, &unused);
}

// All pointers are the device's; `workspace` has workspace_bytes. Both only put work on the stream, and return an error
// message or nullptr. Overflow as in rasterize.h.
const char* rasterize_forward_cuda(const Scene&, const Images&, int32_t* radii, int32_t* num_pairs, void* workspace,
                                   int64_t room, CUstream_st* stream);
const char* rasterize_backward_cuda(const Scene&, const ConstImages& rendered, const ConstImages& cotangents,
                                    const Gradients&, bool deterministic, void* workspace, int64_t room,
                                    CUstream_st* stream);

}  // namespace fg3dgs
