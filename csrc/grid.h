// The tri-plane multi-resolution grid encoder (one feature). Layouts as in fg3dgs_jax/model/hashgrid.py.
#pragma once

#include <cfloat>

#include "rasterize.h"

struct CUstream_st;

namespace fg3dgs {

struct Grid {
  const int32_t* resolutions;  // [levels] cells along one axis
  int levels;
  int log2_table;  // a level of more than 2^log2_table vertices is hashed into that many entries
  float bound;     // world units; a position beyond it encodes to zero
  int64_t points;
};

constexpr int32_t kMostCells = 1 << 24;  // along one axis: floats count no further

// Whether the kernels can index such a grid: whoever builds one asks first. With a bound of 0, NaN or infinity a
// position would have no cell.
inline bool can_encode(const Grid& g) {
  bool good = g.levels > 0 && g.log2_table > 0 && g.log2_table < 31 && g.points >= 0 && g.bound >= FLT_MIN &&
              g.bound <= FLT_MAX;
  for (int i = 0; good && i < g.levels; ++i) good = g.resolutions[i] > 0 && g.resolutions[i] <= kMostCells;
  return good;
}

constexpr int kGridPlanes[3][2] = {{0, 1}, {1, 2}, {0, 2}};
constexpr uint32_t kGridPrime = 2654435761;  // Teschner et al. 2003

struct GridLevel {
  int64_t start, size;  // in a plane's table
  int32_t resolution;
  uint32_t hash_mask;  // 0: dense
};

inline GridLevel find_level(const Grid& g, int level) {
  const int64_t table = int64_t{1} << g.log2_table;
  GridLevel out = {0, 0, 0, 0};
  for (int i = 0; i <= level; ++i) {
    const int64_t vertices = int64_t{g.resolutions[i] + 1} * (g.resolutions[i] + 1);
    out.start += out.size;
    out.size = vertices < table ? vertices : table;
    out.resolution = g.resolutions[i];
    out.hash_mask = vertices <= table ? 0 : static_cast<uint32_t>(table - 1);
  }
  return out;
}

// Entries of one plane's table.
inline int64_t grid_entries(const Grid& g) {
  const GridLevel last = find_level(g, g.levels - 1);
  return last.start + last.size;
}

// tables [3, entries], positions [3, points] -> out [3, levels, points]
void grid_encode(const Grid&, const float* tables, const float* positions, float* out, const Executor&);

// Cotangent of the tables from that of the encoding. Each level of a plane is summed by one thread, in the points'
// order.
void grid_backward_tables(const Grid&, const float* positions, const float* cotangent, float* out, const Executor&);

// Cotangent of the positions [3, points].
void grid_backward_positions(const Grid&, const float* tables, const float* positions, const float* cotangent,
                             float* out, const Executor&);

// The same on a CUDA stream, arrays on the device and resolutions on the host: they only put work on the stream and
// return an error message or nullptr. The tables' cotangent is summed in no particular order: its rounding may vary.
constexpr int kMostGridLevels = 32;
const char* grid_encode_cuda(const Grid&, const float* tables, const float* positions, float* out, CUstream_st*);
const char* grid_backward_tables_cuda(const Grid&, const float* positions, const float* cotangent, float* out,
                                      CUstream_st*);
const char* grid_backward_positions_cuda(const Grid&, const float* tables, const float* positions,
                                         const float* cotangent, float* out, CUstream_st*);

}  // namespace fg3dgs
