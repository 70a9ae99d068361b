// The tri-plane multi-resolution grid encoder (one feature). Layouts as in fg3dgs_jax/model/hashgrid.py.
#pragma once

#include "rasterize.h"

namespace fg3dgs {

struct Grid {
  const int32_t* resolutions;  // [levels] cells along one axis
  int levels;
  int log2_table;  // a level of more than 2^log2_table vertices is hashed into that many entries
  float bound;     // world units; a position beyond it encodes to zero
  int64_t points;
};

// Entries of one plane's table.
int64_t grid_entries(const Grid&);

// tables [3, entries], positions [3, points] -> out [3, levels, points]
void grid_encode(const Grid&, const float* tables, const float* positions, float* out, const Executor&);

// Cotangent of the tables from that of the encoding. Each level of a plane is summed by one thread, in the points'
// order.
void grid_backward_tables(const Grid&, const float* positions, const float* cotangent, float* out, const Executor&);

// Cotangent of the positions [3, points].
void grid_backward_positions(const Grid&, const float* tables, const float* positions, const float* cotangent,
                             float* out, const Executor&);

}  // namespace fg3dgs
