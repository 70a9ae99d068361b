// The grid encoder on CUDA: a thread per point and level of a plane, neighbouring threads on neighbouring points.
#include "cuda_seam.cuh"
#include "grid.h"

namespace fg3dgs {
namespace {

constexpr int kThreads = 256;

// A grid without pointers to the host.
struct DeviceGrid {
  int levels;
  float bound;
  int64_t points, entries;
  GridLevel level[kMostGridLevels];
};

DeviceGrid to_device(const Grid& g) {
  DeviceGrid d = {g.levels, g.bound, g.points, grid_entries(g), {}};
  for (int i = 0; i < g.levels; ++i) d.level[i] = find_level(g, i);
  return d;
}

// Coordinates in [0, 1] of a point; false where any is outside the bound or NaN.
__device__ __forceinline__ bool to_unit(const DeviceGrid& g, const float* positions, int64_t point, float* unit) {
  bool inside = true;
  for (int axis = 0; axis < 3; ++axis) {
    const float x = positions[axis * g.points + point];
    inside &= fabsf(x) <= g.bound;
    unit[axis] = x * (1.0f / (2.0f * g.bound)) + 0.5f;
  }
  return inside;
}

// Entries of the four vertices around a point, and where between them it lies.
struct Cell {
  uint32_t row[4];  // along the plane's axes: 00 01 10 11
  float u, v;
};

__device__ __forceinline__ Cell locate(const GridLevel& level, int plane, const float* unit) {
  const float span = static_cast<float>(level.resolution - 1);
  const float a = (plane == 1 ? unit[1] : unit[0]) * span + 0.5f;  // the planes are xy, yz, xz
  const float b = (plane == 0 ? unit[1] : unit[2]) * span + 0.5f;
  const auto i = static_cast<uint32_t>(a), j = static_cast<uint32_t>(b);
  Cell c;
  c.u = a - static_cast<float>(i);
  c.v = b - static_cast<float>(j);
  const auto stride = static_cast<uint32_t>(level.resolution + 1);
  for (uint32_t k = 0; k < 4; ++k) {
    const uint32_t row = i + k / 2, column = j + k % 2;
    c.row[k] = level.hash_mask ? (row ^ (column * kGridPrime)) & level.hash_mask : row * stride + column;
  }
  return c;
}

// Which point, plane and level a thread works on: blocks run through the points, then levels, then planes.
struct Task {
  int64_t point;
  int plane, level;
  int64_t at;  // in an encoding
};

__device__ __forceinline__ Task find_task(const DeviceGrid& g) {
  const int64_t blocks = (g.points + kThreads - 1) / kThreads, row = int64_t{blockIdx.x} / blocks;
  Task t;
  t.point = int64_t{blockIdx.x} % blocks * kThreads + threadIdx.x;
  t.plane = static_cast<int>(row / g.levels);
  t.level = static_cast<int>(row % g.levels);
  t.at = row * g.points + t.point;
  return t;
}

__global__ void __launch_bounds__(kThreads) encode(DeviceGrid g, const float* tables, const float* positions,
                                                   float* out) {
  const Task t = find_task(g);
  float unit[3];
  if (t.point >= g.points) return;
  if (!to_unit(g, positions, t.point, unit)) {
    out[t.at] = 0.0f;
    return;
  }
  const GridLevel& level = g.level[t.level];
  const Cell c = locate(level, t.plane, unit);
  const float* table = tables + t.plane * g.entries + level.start;
  const float c00 = table[c.row[0]], c01 = table[c.row[1]], c10 = table[c.row[2]], c11 = table[c.row[3]];
  const float low = c00 + c.v * (c01 - c00), high = c10 + c.v * (c11 - c10);
  out[t.at] = low + c.u * (high - low);
}

__global__ void __launch_bounds__(kThreads) backward_tables(DeviceGrid g, const float* positions,
                                                            const float* cotangent, float* out) {
  const Task t = find_task(g);
  float unit[3];
  if (t.point >= g.points || !to_unit(g, positions, t.point, unit)) return;
  const GridLevel& level = g.level[t.level];
  const Cell c = locate(level, t.plane, unit);
  float* table = out + t.plane * g.entries + level.start;
  const float high = cotangent[t.at] * c.u, low = cotangent[t.at] - high;
  atomicAdd(table + c.row[0], low - low * c.v);
  atomicAdd(table + c.row[1], low * c.v);
  atomicAdd(table + c.row[2], high - high * c.v);
  atomicAdd(table + c.row[3], high * c.v);
}

// One thread per point: all planes and levels add to the same three sums.
__global__ void __launch_bounds__(kThreads) backward_positions(DeviceGrid g, const float* tables, const float* positions,
                                                               const float* cotangent, float* out) {
  const int64_t point = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  float unit[3], sum[3] = {};
  if (point >= g.points) return;
  const bool inside = to_unit(g, positions, point, unit);
  for (int row = 0; inside && row < 3 * g.levels; ++row) {
    const int plane = row / g.levels;
    const GridLevel& level = g.level[row % g.levels];
    const Cell c = locate(level, plane, unit);
    const float* table = tables + plane * g.entries + level.start;
    const float c00 = table[c.row[0]], c01 = table[c.row[1]], c10 = table[c.row[2]], c11 = table[c.row[3]];
    const float v0 = c01 - c00, v1 = c11 - c10;
    const float along_u = (c10 - c00) + c.v * (v1 - v0), along_v = v0 + c.u * (v1 - v0);
    const float upstream = cotangent[row * g.points + point] * static_cast<float>(level.resolution - 1) / (2.0f * g.bound);
    if (plane != 1) sum[0] += along_u * upstream;
    sum[1] += plane == 0 ? along_v * upstream : plane == 1 ? along_u * upstream : 0.0f;
    if (plane != 0) sum[2] += along_v * upstream;
  }
  for (int axis = 0; axis < 3; ++axis) out[axis * g.points + point] = sum[axis];
}

int64_t point_blocks(const Grid& g) { return (g.points + kThreads - 1) / kThreads; }

}  // namespace

const char* grid_encode_cuda(const Grid& g, const float* tables, const float* positions, float* out,
                             CUstream_st* stream) {
  return launch(encode, 3 * g.levels * point_blocks(g), kThreads, stream, to_device(g), tables, positions, out);
}

const char* grid_backward_tables_cuda(const Grid& g, const float* positions, const float* cotangent, float* out,
                                      CUstream_st* stream) {
  if (const char* message = clear(out, 3 * grid_entries(g) * static_cast<int64_t>(sizeof(float)), stream)) return message;
  return launch(backward_tables, 3 * g.levels * point_blocks(g), kThreads, stream, to_device(g), positions, cotangent,
                out);
}

const char* grid_backward_positions_cuda(const Grid& g, const float* tables, const float* positions,
                                         const float* cotangent, float* out, CUstream_st* stream) {
  return launch(backward_positions, point_blocks(g), kThreads, stream, to_device(g), tables, positions, cotangent, out);
}

}  // namespace fg3dgs
