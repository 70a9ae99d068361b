// The drivers of a perceptron and of attention: passes of points, threads, sums. The arithmetic is in the kernels.
#include "mlp_pass.h"

namespace fg3dgs {

void mlp_forward(const Mlp& m, const float* start, const float* x, const float* weights, float* out,
                 const Executor& executor) {
  const int64_t floats = floats_of(m.sizes, m.layers + 1);
  Lease ws;
  float* space = ws->scratch.ensure(floats * std::max(1, executor.num_threads));
  for_passes(m.points, executor, [&](int worker, int64_t, int64_t first, int64_t count) {
    const Layers layers(m.sizes, m.layers + 1, space + worker * floats);
    load_points(x, m.points, m.sizes[0], first, count, layers.layer[0]);
    if (start) load_points(start, m.points, m.sizes[1], first, count, layers.layer[1]);
    mlp_kernels().run(m, start != nullptr, weights, m.layers, layers.layer);
    save_points(layers.layer[m.layers], m.points, m.sizes[m.layers], first, count, out);
  });
}

void mlp_backward(const Mlp& m, const float* x, const float* weights, const float* d_out, float* d_x, float* d_weights,
                  const Executor& executor) {
  const int64_t floats = floats_of(m.sizes, m.layers + 1), size = mlp_weights(m);
  ChunkSums sums(size);
  Lease ws;
  float* space = ws->scratch.ensure(2 * floats * std::max(1, executor.num_threads));
  for_passes(m.points, executor, [&](int worker, int64_t chunk, int64_t first, int64_t count) {
    const Layers layers(m.sizes, m.layers + 1, space + 2 * worker * floats);
    const Layers up(m.sizes, m.layers + 1, space + (2 * worker + 1) * floats);
    load_points(x, m.points, m.sizes[0], first, count, layers.layer[0]);
    load_points(d_out, m.points, m.sizes[m.layers], first, count, up.layer[m.layers]);
    mlp_kernels().run(m, false, weights, m.layers - 1, layers.layer);
    mlp_kernels().pull(m, weights, layers.layer, up.layer, sums.of(chunk));
    save_points(up.layer[0], m.points, m.sizes[0], first, count, d_x);
  });
  sums.total(0, size, d_weights);
}

void attend(const Attend& a, const AttendArrays& arrays, const Executor& executor) {
  const int queries = a.heads * a.width;
  const int32_t sizes[] = {queries, a.tokens * a.heads, a.hidden, a.second, a.last};
  const int64_t floats = floats_of(sizes, 5);
  Lease ws;
  float* space = ws->scratch.ensure(floats * std::max(1, executor.num_threads));
  for_passes(a.points, executor, [&](int worker, int64_t, int64_t first, int64_t count) {
    const Layers rows(sizes, 5, space + worker * floats);
    load_points(arrays.queries, a.points, queries, first, count, rows.layer[0]);
    mlp_kernels().attend(a, arrays, rows.layer);
    save_points(rows.layer[4], a.points, a.last, first, count, arrays.out);
  });
}

}  // namespace fg3dgs
