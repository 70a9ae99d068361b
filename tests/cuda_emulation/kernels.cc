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

// The stream of every call; nothing is behind it.
const auto kStream = reinterpret_cast<cudaStream_t>(uintptr_t{64});

void set_order(unsigned order) {
  emulation::block().order = order;
  emulation::block().stream = kStream;
}

// A workspace of rubbish, another in every order: nothing may depend on what was there. Bytes that belong to no field
// must stay as they were.
class Workspace {
 public:
  Workspace(const fg3dgs::Scene& s, fg3dgs::CudaPass pass, int64_t room, unsigned order)
      : rubbish_(order == 0 ? '\xff' : order % 2 ? '\x4b' : '\xcb'),
        bytes_(fg3dgs::workspace_bytes(s, pass, room) + 2 * kGuard + 256, rubbish_) {
    const auto first = reinterpret_cast<uintptr_t>(bytes_.data()) + kGuard;
    begin_ = bytes_.data() + kGuard + (256 - first % 256) % 256;
    fg3dgs::make_work(s, pass, room, begin_, &work_);
  }
  ~Workspace() {
    std::vector<char> field(bytes_.size());
    const auto mark = [&](auto* p, int64_t count) {
      if (!p) return;
      const auto at = reinterpret_cast<char*>(p) - bytes_.data();
      std::fill_n(field.begin() + at, count * static_cast<int64_t>(sizeof *p), 1);
    };
    const fg3dgs::CudaWork& w = work_;
    const int64_t n = w.scene.n;
    mark(begin_, w.zeroed_bytes);
    mark(w.tile_start, w.tiles);
    mark(w.items, w.room);
    mark(w.keys, n);
    mark(w.boxes, n);
    mark(w.splats, 8 * n);
    mark(w.colors, 3 * n);
    mark(w.camera, fg3dgs::gaussian_blocks(n) * fg3dgs::kCameraSums);
    for (size_t i = 0; i < field.size(); ++i)
      if (!field[i] && bytes_[i] != rubbish_) emulation::fail("a write between the fields of the workspace");
  }
  void* begin() { return begin_; }

 private:
  static constexpr int64_t kGuard = 4096;
  char rubbish_;
  std::vector<char> bytes_;
  char* begin_;
  fg3dgs::CudaWork work_;
};

}  // namespace

// sizes: n, channels, coefficients, width, height, max_pairs; room < 0: the default. order: see the emulation.
// Returns an error message, or nullptr.
extern "C" const char* emulated_forward(const float* const* operands, const int64_t* sizes, float near_plane, int64_t room,
                                        unsigned order, float* const* images, int32_t* radii, int32_t* num_pairs) {
  set_order(order);
  const fg3dgs::Scene s = make_scene(operands, sizes, near_plane);
  if (room < 0) room = fg3dgs::default_room(s);
  Workspace workspace(s, fg3dgs::CudaPass::kForward, room, order);
  const fg3dgs::Images out = {images[0], images[1], images[2]};
  return fg3dgs::rasterize_forward_cuda(s, out, radii, num_pairs, workspace.begin(), room, kStream);
}

extern "C" const char* emulated_backward(const float* const* operands, const int64_t* sizes, float near_plane, int64_t room,
                                  unsigned order, const float* const* rendered, const float* const* cotangents,
                                  int deterministic, float* const* gradients) {
  set_order(order);
  const fg3dgs::Scene s = make_scene(operands, sizes, near_plane);
  if (room < 0) room = fg3dgs::default_room(s);
  Workspace workspace(s, fg3dgs::pass_of(true, deterministic), room, order);
  const fg3dgs::Gradients out = {gradients[0], gradients[1], gradients[2], gradients[3],
                                 gradients[4], gradients[5], gradients[6], gradients[7]};
  return fg3dgs::rasterize_backward_cuda(s, {rendered[0], rendered[1], rendered[2]},
                                         {cotangents[0], cotangents[1], cotangents[2]}, out, deterministic,
                                         workspace.begin(), room, kStream);
}

// which: 0 encode(tables, positions), 1 backward_tables(positions, cotangent), 2 backward_positions(all three).
extern "C" const char* emulated_grid(int which, const int32_t* resolutions, int levels, int log2_table, float bound,
                                     int64_t points, const float* tables, const float* positions,
                                     const float* cotangent, float* out) {
  set_order(0);
  const fg3dgs::Grid g = {resolutions, levels, log2_table, bound, points};
  if (which == 0) return fg3dgs::grid_encode_cuda(g, tables, positions, out, kStream);
  if (which == 1) return fg3dgs::grid_backward_tables_cuda(g, positions, cotangent, out, kStream);
  return fg3dgs::grid_backward_positions_cuda(g, tables, positions, cotangent, out, kStream);
}

// The call on the stream after so many more will fail; a negative number: none.
extern "C" void emulated_failure(int calls) { emulation::block().calls_until_failure = calls; }

// `count` equal addends, summed in units of the largest one, which is given by itself.
extern "C" float emulated_exact_sum(float largest, float addend, int count) {
  fg3dgs::CudaWork w = {};
  uint32_t bits = __float_as_uint(largest);
  long long units = 0;
  w.largest = &bits;
  w.exact = &units;
  for (int i = 0; i < count; ++i) fg3dgs::device::add_share<fg3dgs::device::Sum::kExact>(w, 0, addend);
  return fg3dgs::device::read_sum(w, 0);
}

// One launch of a kernel that does nothing.
extern "C" const char* emulated_launch(int64_t blocks) {
  set_order(0);
  return fg3dgs::launch(+[] {}, blocks, 32, kStream);
}

// Kernels that are wrong, to see the emulation notice it. 0: a barrier that half of a block misses; 1: a warp operation
// that one lane misses; 2: two kinds of barrier; 3: the default stream.
extern "C" void emulated_mistake(int kind) {
  set_order(0);
  emulation::launch(1, 64, kind == 3 ? nullptr : kStream, [&] {
    if (kind == 0 && threadIdx.x < 32) __syncthreads();
    if (kind == 1 && threadIdx.x != 5) __syncwarp();
    if (kind == 2 && threadIdx.x < 32) __syncthreads();
    if (kind == 2 && threadIdx.x >= 32) __syncthreads_or(1);
  });
}
