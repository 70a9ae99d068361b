// The CUDA backend under the emulation, as a C library for the tests: arrays are numpy's.
#include "grid_cuda.cu"
#include "rasterize_cuda.cu"

namespace {

fg3dgs::Scene make_scene(const float* const* operands, const int64_t* sizes, float near_plane) {
  return {operands[0],
          operands[1],
          operands[2],
          operands[3],
          operands[4],
          operands[5],
          operands[6],
          operands[7],
          sizes[0],
          static_cast<int>(sizes[1]),
          static_cast<int>(sizes[2]),
          static_cast<int>(sizes[3]),
          static_cast<int>(sizes[4]),
          near_plane,
          sizes[5]};
}

// A workspace of rubbish: nothing may depend on what was there.
std::vector<char> workspace(const fg3dgs::Scene& s, fg3dgs::CudaPass pass, int64_t room) {
  return std::vector<char>(fg3dgs::workspace_bytes(s, pass, room) + 256, '\xa5');
}

void* aligned(std::vector<char>& bytes) {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(bytes.data()) + 255) / 256 * 256);
}

}  // namespace

// sizes: n, channels, coefficients, width, height, max_pairs; room < 0: the default. order: see the emulation.
extern "C" void emulated_forward(const float* const* operands, const int64_t* sizes, float near_plane, int64_t room,
                                 unsigned order, float* const* images, int32_t* radii, int32_t* num_pairs) {
  emulation::block().order = order;
  const fg3dgs::Scene s = make_scene(operands, sizes, near_plane);
  if (room < 0) room = fg3dgs::default_room(s);
  auto bytes = workspace(s, fg3dgs::CudaPass::kForward, room);
  const fg3dgs::Images out = {images[0], images[1], images[2]};
  fg3dgs::rasterize_forward_cuda(s, out, radii, num_pairs, aligned(bytes), room, nullptr);
}

extern "C" void emulated_backward(const float* const* operands, const int64_t* sizes, float near_plane, int64_t room,
                                  unsigned order, const float* const* rendered, const float* const* cotangents,
                                  int deterministic, float* const* gradients) {
  emulation::block().order = order;
  const fg3dgs::Scene s = make_scene(operands, sizes, near_plane);
  if (room < 0) room = fg3dgs::default_room(s);
  auto bytes = workspace(s, deterministic ? fg3dgs::CudaPass::kDeterministic : fg3dgs::CudaPass::kBackward, room);
  const fg3dgs::Gradients out = {gradients[0], gradients[1], gradients[2], gradients[3],
                                 gradients[4], gradients[5], gradients[6], gradients[7]};
  fg3dgs::rasterize_backward_cuda(s, {rendered[0], rendered[1], rendered[2]},
                                  {cotangents[0], cotangents[1], cotangents[2]}, out, deterministic, aligned(bytes),
                                  room, nullptr);
}

// which: 0 encode(tables, positions), 1 backward_tables(positions, cotangent), 2 backward_positions(all three).
extern "C" void emulated_grid(int which, const int32_t* resolutions, int levels, int log2_table, float bound,
                              int64_t points, const float* tables, const float* positions, const float* cotangent,
                              float* out) {
  emulation::block().order = 0;
  const fg3dgs::Grid g = {resolutions, levels, log2_table, bound, points};
  if (which == 0) fg3dgs::grid_encode_cuda(g, tables, positions, out, nullptr);
  if (which == 1) fg3dgs::grid_backward_tables_cuda(g, positions, cotangent, out, nullptr);
  if (which == 2) fg3dgs::grid_backward_positions_cuda(g, tables, positions, cotangent, out, nullptr);
}

// Kernels that are wrong, to see the emulation notice it. 0: a barrier that half of a block misses; 1: a warp operation
// that one lane misses; 2: two kinds of barrier.
extern "C" void emulated_mistake(int kind) {
  emulation::block().order = 0;
  emulation::launch(1, 64, [&] {
    if (kind == 0 && threadIdx.x < 32) __syncthreads();
    if (kind == 1 && threadIdx.x != 5) __syncwarp();
    if (kind == 2 && threadIdx.x < 32) __syncthreads();
    if (kind == 2 && threadIdx.x >= 32) __syncthreads_or(1);
  });
}
