// What the CPU backend's driver (rasterize_cpu.cc) shares with its kernels (compiled once per instruction set).
//
// A call runs in steps: project chunks of Gaussians -> sort by depth -> scatter to tiles -> blend tiles, and backward:
// blend tiles again, writing one gradient record per tile-Gaussian pair -> sum the records of each Gaussian in a fixed
// order. No step's result depends on which thread ran what.
#pragma once

#include "isa.h"
#include "rasterize.h"

namespace fg3dgs {

constexpr int kChunk = 512;      // Gaussians per task
constexpr int kHeader = 12;      // floats of a record before its colours
constexpr int kBlockLanes = 16;  // a tile is 4 x 4 blocks of 4 x 4 pixels

// A record is what blending needs of a visible Gaussian: `stride` floats, 64-byte aligned. Slot s belongs to chunk
// s / kChunk and lies there in the order of the Gaussians.
enum RecordField {
  kX,  // projected mean, pixels
  kY,
  kA,  // log2 of alpha at (dx, dy) = kA dx^2 + kB dx dy + kC dy^2 + kLevel
  kB,
  kC,
  kLevel,   // log2(opacity)
  kZ,       // camera z
  kSlopeX,  // the best dx at a given dy is kSlopeX dy
  kSlopeY,
  kOffset,  // int32: first of its pairs, counted from its chunk's first pair
  kBox0,    // int32: first tile, x | y << 16
  kBoxW     // int32: tiles in x
};

struct Work {
  const Scene* scene;
  int tiles_x, tiles_y;
  int stride;       // floats per record
  int pair_stride;  // floats per pair gradient: v, v dx, v dy, v dx^2, v dx dy, v dy^2, depth, colours
  float* records;
  int32_t* ids;           // Gaussian of each slot
  uint32_t* keys;         // depth of each slot as a sortable integer
  Box* boxes;             // of each slot
  int32_t* chunk_count;   // visible Gaussians per chunk
  int64_t* chunk_pairs;   // pairs per chunk, then the first pair of each chunk
  int64_t* tile_start;    // [tiles + 1] into tile_items
  uint32_t* tile_items;   // slots, nearest first
  float* pair_gradients;  // [pairs, pair_stride], Gaussian by Gaussian
  uint32_t layer_end[kMostLayersPainted];  // when painting: the slot behind each layer's last
};

struct Kernels {
  void (*project)(const Work&, int64_t chunk, int32_t* radii);  // radii may be null
  void (*blend)(const Work&, const Images&, int tile, float* scratch);
  void (*blend_backward)(const Work&, const ConstImages& rendered, const ConstImages& cotangents, int tile,
                         float* scratch);
  void (*unproject)(const Work&, const Gradients&, int64_t chunk, double* camera_sums);
  void (*paint)(const Work&, const Canvas&, int tile, float* scratch);
};

// Floats of 64-byte aligned scratch that one blending task needs: planes of 256 pixels, and a pair's sums.
static inline int64_t scratch_floats(int channels) { return 256 * (int64_t{channels} + 4) + 16 * (channels + 7 + 16); }

FG_PER_ISA(extern const Kernels kKernels;)

}  // namespace fg3dgs
