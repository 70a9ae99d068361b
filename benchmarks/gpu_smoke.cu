// Small scenes through every CUDA kernel, without Python or XLA: what compute-sanitizer looks at (benchmarks/gpu.py), and
// the compiler's own sanitizers in the tests, which have no GPU.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "grid_cuda.cu"
#include "rasterize_cuda.cu"

namespace {

void check(const char* message) {
  if (!message) return;
  std::fprintf(stderr, "%s\n", message);
  std::exit(1);
}

void check(cudaError_t error) { check(error == cudaSuccess ? nullptr : cudaGetErrorString(error)); }

template <class T>
T* device(const std::vector<T>& host) {
  void* p = nullptr;
  check(cudaMalloc(&p, host.size() * sizeof(T) + 16));
  check(cudaMemcpy(p, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return static_cast<T*>(p);
}

std::vector<float> host(const float* p, int64_t count) {
  std::vector<float> out(count);
  check(cudaMemcpy(out.data(), p, count * sizeof(float), cudaMemcpyDeviceToHost));
  return out;
}

std::mt19937 generator(1);

std::vector<float> uniform(int64_t count, float low, float high) {
  std::uniform_real_distribution<float> draw(low, high);
  std::vector<float> out(count);
  for (float& x : out) x = draw(generator);
  return out;
}

// Values that must not be drawn, one to each Gaussian from the first on, `width` numbers apart.
std::vector<float> broken(std::vector<float> values, int64_t width, int64_t first) {
  for (const float bad : {NAN, INFINITY, -INFINITY, 3e38f}) values.at(width * first++) = bad;
  return values;
}

struct Sizes {
  int64_t n;
  int channels, coefficients, width, height;
  bool hostile;
};

fg3dgs::Scene make_scene(const Sizes& z) {
  const int64_t n = z.n, colors = z.coefficients ? 3 * z.coefficients : z.channels;
  const auto draw = [&](int64_t width, float low, float high, int64_t first) {
    const std::vector<float> values = uniform(width * n, low, high);
    return device(z.hostile ? broken(values, width, first) : values);
  };
  fg3dgs::Scene s = {};
  s.means = draw(3, -1.2f, 1.2f, 0);
  s.quats = draw(4, -1.0f, 1.0f, 4);
  s.scales = draw(3, 0.02f, 0.2f, 8);
  s.opacities = draw(1, 0.0f, 1.0f, 12);
  s.colors = device(uniform(n * colors, 0.0f, 1.0f));
  s.viewmat = device(std::vector<float>{1, 0, 0, 0.1f, 0, 1, 0, -0.1f, 0, 0, 1, 3, 0, 0, 0, 1});
  s.intrinsics = device(std::vector<float>{1.2f * z.width, 1.1f * z.width, 0.51f * z.width, 0.48f * z.height});
  s.means2d = draw(2, -0.3f, 0.3f, 16);
  s.n = n;
  s.channels = z.channels;
  s.sh_count = z.coefficients;
  s.width = z.width;
  s.height = z.height;
  s.near_plane = 0.01f;
  s.max_pairs = -1;
  return s;
}

void* workspace(const fg3dgs::Scene& s, fg3dgs::CudaPass pass, int64_t room) {
  void* p = nullptr;
  check(cudaMalloc(&p, fg3dgs::workspace_bytes(s, pass, room)));
  return p;
}

// Images and gradients one after the other.
std::vector<float> run(const fg3dgs::Scene& s, int64_t room, bool deterministic) {
  const int64_t pixels = int64_t{s.width} * s.height, n = s.n, colors = s.sh_count ? 3 * s.sh_count : s.channels;
  const int64_t images = pixels * (s.channels + 2);
  const int64_t sizes[8] = {3 * n, 4 * n, 3 * n, n, colors * n, 16, 4, 2 * n};
  float* rendered = device(std::vector<float>(images));
  float* cotangents = device(uniform(images, -1.0f, 1.0f));
  int32_t* radii = device(std::vector<int32_t>(n + 1));
  const auto split = [&](float* p) { return fg3dgs::Images{p, p + pixels * s.channels, p + pixels * (s.channels + 1)}; };
  const fg3dgs::Images out = split(rendered), d = split(cotangents);
  check(fg3dgs::rasterize_forward_cuda(s, out, radii, radii + n, workspace(s, fg3dgs::CudaPass::kForward, room), room,
                                       nullptr));
  float* gradients[8];
  for (int i = 0; i < 8; ++i) gradients[i] = device(std::vector<float>(sizes[i]));
  const fg3dgs::Gradients g = {gradients[0], gradients[1], gradients[2], gradients[3],
                               gradients[4], gradients[5], gradients[6], gradients[7]};
  void* space = workspace(s, fg3dgs::pass_of(true, deterministic), room);
  check(fg3dgs::rasterize_backward_cuda(s, {out.color, out.alpha, out.depth}, {d.color, d.alpha, d.depth}, g,
                                        deterministic, space, room, nullptr));
  check(cudaDeviceSynchronize());
  std::vector<float> all = host(rendered, images);
  for (int i = 0; i < 8; ++i) {
    const std::vector<float> one = host(gradients[i], sizes[i]);
    all.insert(all.end(), one.begin(), one.end());
  }
  return all;
}

void run_grid() {
  const int32_t resolutions[4] = {16, 32, 64, 128};
  const fg3dgs::Grid g = {resolutions, 4, 11, 1.0f, 500};
  const int64_t tables = 3 * fg3dgs::grid_entries(g), encoding = 3 * 4 * g.points;
  const float *t = device(uniform(tables, -1, 1)), *p = device(uniform(3 * g.points, -1.1f, 1.1f));
  const float* d = device(uniform(encoding, -1, 1));
  float *out = device(std::vector<float>(encoding)), *dt = device(std::vector<float>(tables));
  float* dp = device(std::vector<float>(3 * g.points));
  check(fg3dgs::grid_encode_cuda(g, t, p, out, nullptr));
  check(fg3dgs::grid_backward_tables_cuda(g, p, d, dt, nullptr));
  check(fg3dgs::grid_backward_positions_cuda(g, t, p, d, dp, nullptr));
  check(cudaDeviceSynchronize());
}

}  // namespace

void run_scene(const Sizes& sizes) {
  fg3dgs::Scene s = make_scene(sizes);
  const int64_t room = fg3dgs::default_room(s);
  run(s, room, false);
  const auto before = generator;  // the same cotangents again
  const std::vector<float> listed = run(s, room, true);
  generator = before;
  const std::vector<float> searched = run(s, room < 60 ? room : 60, true);
  if (std::memcmp(listed.data(), searched.data(), listed.size() * sizeof(float))) check("bits differ");
  for (const float x : listed)
    if (!(x - x == 0.0f)) check("a value is not finite");
  if (s.n == 0) return;
  s.max_pairs = 0;
  for (const float x : run(s, fg3dgs::default_room(s), false))
    if (x - x == 0.0f) check("an overflow was not said");
}

int main() {
  run_scene({300, 3, 0, 40, 35, false});
  run_scene({300, 5, 0, 33, 19, true});
  run_scene({257, 3, 9, 40, 35, true});
  run_scene({3000, 3, 0, 20, 18, false});  // more than a block sorts at a time
  run_scene({0, 3, 0, 17, 1, false});
  run_grid();
  std::puts("smoke: ok");
}
