#include <algorithm>
#include <cmath>
#include <cstring>

#include "clones.h"
#include "grid.h"
#include "parallel.h"

namespace fg3dgs {
namespace {

constexpr int kPoints = 512;  // per pass: their cells stay in the first cache

// The cells of some points on one level of one plane, and where in them the points lie.
struct Cells {
  int32_t row00[kPoints], row01[kPoints], row10[kPoints], row11[kPoints];
  float u[kPoints], v[kPoints];
};

// Coordinates in [0, 1], 0.5 where any coordinate is outside the bound or NaN; inside is 1 or 0.
FG3DGS_CLONES
void to_unit(const Grid& g, const float* positions, int64_t first, int count, float (*unit)[kPoints], float* inside) {
  const float* x = positions + first;
  const float* y = x + g.points;
  const float* z = y + g.points;
  const float bound = g.bound, scale = 1.0f / (2.0f * g.bound);
  for (int l = 0; l < count; ++l) {
    const bool in = (std::fabs(x[l]) <= bound) & (std::fabs(y[l]) <= bound) & (std::fabs(z[l]) <= bound);
    inside[l] = in ? 1.0f : 0.0f;
    unit[0][l] = (in ? x[l] : 0.0f) * scale + 0.5f;
    unit[1][l] = (in ? y[l] : 0.0f) * scale + 0.5f;
    unit[2][l] = (in ? z[l] : 0.0f) * scale + 0.5f;
  }
}

FG3DGS_CLONES
void locate(const GridLevel& level, const float* a, const float* b, int count, Cells* cells) {
  const float span = static_cast<float>(level.resolution - 1);
  const int32_t stride = level.resolution + 1;
  if (level.hash_mask == 0) {
    for (int l = 0; l < count; ++l) {
      const float along_a = a[l] * span + 0.5f, along_b = b[l] * span + 0.5f;
      const int32_t i = static_cast<int32_t>(along_a), j = static_cast<int32_t>(along_b);
      cells->u[l] = along_a - static_cast<float>(i);
      cells->v[l] = along_b - static_cast<float>(j);
      const int32_t row = i * stride + j;
      cells->row00[l] = row;
      cells->row01[l] = row + 1;
      cells->row10[l] = row + stride;
      cells->row11[l] = row + stride + 1;
    }
    return;
  }
  const uint32_t mask = level.hash_mask;
  for (int l = 0; l < count; ++l) {
    const float along_a = a[l] * span + 0.5f, along_b = b[l] * span + 0.5f;
    const int32_t i = static_cast<int32_t>(along_a), j = static_cast<int32_t>(along_b);
    cells->u[l] = along_a - static_cast<float>(i);
    cells->v[l] = along_b - static_cast<float>(j);
    const uint32_t i0 = static_cast<uint32_t>(i), i1 = i0 + 1;
    const uint32_t j0 = static_cast<uint32_t>(j) * kGridPrime, j1 = j0 + kGridPrime;
    cells->row00[l] = static_cast<int32_t>((i0 ^ j0) & mask);
    cells->row01[l] = static_cast<int32_t>((i0 ^ j1) & mask);
    cells->row10[l] = static_cast<int32_t>((i1 ^ j0) & mask);
    cells->row11[l] = static_cast<int32_t>((i1 ^ j1) & mask);
  }
}

FG3DGS_CLONES
void interpolate(const float* __restrict table, const Cells& c, const float* __restrict inside, int count,
                 float* __restrict out) {
  for (int l = 0; l < count; ++l) {
    const float c00 = table[c.row00[l]], c01 = table[c.row01[l]], c10 = table[c.row10[l]], c11 = table[c.row11[l]];
    const float low = c00 + c.v[l] * (c01 - c00), high = c10 + c.v[l] * (c11 - c10);
    out[l] = inside[l] * (low + c.u[l] * (high - low));
  }
}

// Adds slope * upstream * scale along both axes of the plane.
FG3DGS_CLONES
void add_slopes(const float* __restrict table, const Cells& c, const float* __restrict upstream, float scale, int count,
                float* __restrict da, float* __restrict db) {
  for (int l = 0; l < count; ++l) {
    const float c00 = table[c.row00[l]], c01 = table[c.row01[l]], c10 = table[c.row10[l]], c11 = table[c.row11[l]];
    const float along_v0 = c01 - c00, along_v1 = c11 - c10;
    const float along_u = (c10 - c00) + c.v[l] * (along_v1 - along_v0);
    const float along_v = along_v0 + c.u[l] * (along_v1 - along_v0);
    da[l] += along_u * upstream[l] * scale;
    db[l] += along_v * upstream[l] * scale;
  }
}

// The corners' shares of the upstream cotangent: two neighbours along v next to each other.
struct Shares {
  float low[kPoints][2], high[kPoints][2];
};

FG3DGS_CLONES
void share(const Cells& c, const float* upstream, const float* inside, int count, Shares* s) {
  for (int l = 0; l < count; ++l) {
    const float g = inside[l] != 0.0f ? upstream[l] : 0.0f;
    const float high = g * c.u[l], low = g - high;
    s->low[l][1] = low * c.v[l];
    s->low[l][0] = low - s->low[l][1];
    s->high[l][1] = high * c.v[l];
    s->high[l][0] = high - s->high[l][1];
  }
}

typedef float Pair __attribute__((vector_size(8)));

inline void add_pair(float* to, const float* from) {
  Pair a, b;
  std::memcpy(&a, to, sizeof a);
  std::memcpy(&b, from, sizeof b);
  a += b;
  std::memcpy(to, &a, sizeof a);
}

void scatter(const GridLevel& level, const Cells& c, const Shares& s, int count, float* table) {
  if (level.hash_mask == 0) {  // neighbours along v are neighbours in memory
    for (int l = 0; l < count; ++l) {
      add_pair(table + c.row00[l], s.low[l]);
      add_pair(table + c.row10[l], s.high[l]);
    }
    return;
  }
  for (int l = 0; l < count; ++l) {
    table[c.row00[l]] += s.low[l][0];
    table[c.row01[l]] += s.low[l][1];
    table[c.row10[l]] += s.high[l][0];
    table[c.row11[l]] += s.high[l][1];
  }
}

int64_t num_chunks(const Grid& g) { return (g.points + kPoints - 1) / kPoints; }

// One chunk of the points, in the unit cube.
struct Points {
  Points(const Grid& g, const float* positions, int64_t chunk)
      : first(chunk * kPoints), count(static_cast<int>(std::min<int64_t>(kPoints, g.points - first))) {
    to_unit(g, positions, first, count, unit, inside);
  }

  int64_t first;
  int count;
  alignas(64) float unit[3][kPoints];
  alignas(64) float inside[kPoints];
};

// Calls visit(plane, row of the encoding, level, cells of the points) for each level of each plane.
template <class Visit>
void for_each_level(const Grid& g, const Points& points, Visit&& visit) {
  Cells cells;
  for (int plane = 0; plane < 3; ++plane)
    for (int i = 0; i < g.levels; ++i) {
      const GridLevel level = find_level(g, i);
      locate(level, points.unit[kGridPlanes[plane][0]], points.unit[kGridPlanes[plane][1]], points.count, &cells);
      visit(plane, int64_t{plane} * g.levels + i, level, cells);
    }
}

}  // namespace

void grid_encode(const Grid& g, const float* tables, const float* positions, float* out, const Executor& executor) {
  const int64_t entries = grid_entries(g);
  parallel_for(executor, num_chunks(g), [&](int, int64_t chunk) {
    Points points(g, positions, chunk);
    for_each_level(g, points, [&](int plane, int64_t row, const GridLevel& level, const Cells& cells) {
      interpolate(tables + plane * entries + level.start, cells, points.inside, points.count,
                  out + row * g.points + points.first);
    });
  });
}

void grid_backward_tables(const Grid& g, const float* positions, const float* cotangent, float* out,
                          const Executor& executor) {
  const int64_t entries = grid_entries(g);
  parallel_for(executor, 3 * g.levels, [&](int, int64_t task) {
    Cells cells;
    Shares shares;
    const int64_t plane = task / g.levels;
    const GridLevel level = find_level(g, static_cast<int>(task % g.levels));
    float* table = out + plane * entries + level.start;
    std::memset(table, 0, sizeof(float) * level.size);
    for (int64_t chunk = 0; chunk < num_chunks(g); ++chunk) {
      Points points(g, positions, chunk);
      locate(level, points.unit[kGridPlanes[plane][0]], points.unit[kGridPlanes[plane][1]], points.count, &cells);
      share(cells, cotangent + task * g.points + points.first, points.inside, points.count, &shares);
      scatter(level, cells, shares, points.count, table);
    }
  });
}

void grid_backward_positions(const Grid& g, const float* tables, const float* positions, const float* cotangent,
                             float* out, const Executor& executor) {
  const int64_t entries = grid_entries(g);
  parallel_for(executor, num_chunks(g), [&](int, int64_t chunk) {
    alignas(64) float gradient[3][kPoints] = {};
    Points points(g, positions, chunk);
    for_each_level(g, points, [&](int plane, int64_t row, const GridLevel& level, const Cells& cells) {
      add_slopes(tables + plane * entries + level.start, cells, cotangent + row * g.points + points.first,
                 static_cast<float>(level.resolution - 1) / (2.0f * g.bound), points.count,
                 gradient[kGridPlanes[plane][0]], gradient[kGridPlanes[plane][1]]);
    });
    for (int axis = 0; axis < 3; ++axis)
      for (int l = 0; l < points.count; ++l)
        out[axis * g.points + points.first + l] = points.inside[l] != 0.0f ? gradient[axis][l] : 0.0f;
  });
}

}  // namespace fg3dgs
