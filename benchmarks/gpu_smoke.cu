// A small scene through every CUDA kernel, without Python or XLA: what compute-sanitizer looks at (benchmarks/gpu.py).
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

constexpr int kWidth = 70, kHeight = 50;
constexpr int64_t kGaussians = 300;

fg3dgs::Scene make_scene(int channels, int coefficients) {
  const int64_t n = kGaussians;
  fg3dgs::Scene s = {};
  s.means = device(uniform(3 * n, -1.2f, 1.2f));
  s.quats = device(uniform(4 * n, -1.0f, 1.0f));
  s.scales = device(uniform(3 * n, 0.02f, 0.2f));
  s.opacities = device(uniform(n, 0.0f, 1.0f));
  s.colors = device(uniform(n * (coefficients ? 3 * coefficients : channels), 0.0f, 1.0f));
  s.viewmat = device(std::vector<float>{1, 0, 0, 0.1f, 0, 1, 0, -0.1f, 0, 0, 1, 3, 0, 0, 0, 1});
  s.intrinsics = device(std::vector<float>{84, 77, 36, 24});
  s.means2d = device(uniform(2 * n, -0.3f, 0.3f));
  s.n = n;
  s.channels = channels;
  s.sh_count = coefficients;
  s.width = kWidth;
  s.height = kHeight;
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
  const int64_t pixels = int64_t{kWidth} * kHeight, n = s.n, colors = s.sh_count ? 3 * s.sh_count : s.channels;
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

int main() {
  for (const int coefficients : {0, 9})
    for (const int channels : {3, 5}) {
      if (coefficients && channels != 3) continue;
      const fg3dgs::Scene s = make_scene(channels, coefficients);
      const int64_t room = fg3dgs::default_room(s);
      run(s, room, false);
      const auto before = generator;  // the same cotangents again
      const std::vector<float> listed = run(s, room, true);
      generator = before;
      const std::vector<float> searched = run(s, 60, true);
      if (std::memcmp(listed.data(), searched.data(), listed.size() * sizeof(float))) check("bits differ");
      for (const float x : listed)
        if (!(x - x == 0.0f)) check("a value is not finite");
    }
  run_grid();
  std::puts("smoke: ok");
}
