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
    mlp_kernels().pull(m, false, weights, layers.layer, up.layer, sums.of(chunk));
    save_points(up.layer[0], m.points, m.sizes[0], first, count, d_x);
  });
  sums.total(0, size, d_weights);
}

namespace {

// Sizes of a pass's rows.
struct AttendRows {
  int32_t sizes[5];

  explicit AttendRows(const Attend& a) : sizes{a.seen, a.weights(), a.hidden, a.second, a.last} {}
  int64_t floats() const { return floats_of(sizes, 5); }
};

// Calls call(array, size) for all arrays but x.
template <class Call>
void for_sums(const Attend& a, AttendGradients* arrays, const Call& call) {
  const int64_t weights = a.weights();
  call(&arrays->to_scores, weights * a.seen);
  call(&arrays->from_weights, a.hidden * weights);
  call(&arrays->bias, int64_t{a.hidden});
  call(&arrays->from_hidden, int64_t{a.second} * a.hidden);
  call(&arrays->past_weights, a.second * weights);
  call(&arrays->last, int64_t{a.last} * a.second);
}

}  // namespace

void attend(const Attend& a, const AttendArrays& arrays, float* out, const Executor& executor) {
  const AttendRows rows(a);
  Lease ws;
  float* space = ws->scratch.ensure(rows.floats() * std::max(1, executor.num_threads));
  for_passes(a.points, executor, [&](int worker, int64_t, int64_t first, int64_t count) {
    const Layers pass(rows.sizes, 5, space + worker * rows.floats());
    load_points(arrays.x, a.points, a.seen, first, count, pass.layer[0]);
    mlp_kernels().attend(a, arrays, pass.layer);
    save_points(pass.layer[4], a.points, a.last, first, count, out);
  });
}

void attend_backward(const Attend& a, const AttendArrays& arrays, const float* d_out, const AttendGradients& out,
                     const Executor& executor) {
  const AttendRows rows(a);
  AttendGradients totals = out;
  int64_t size = 0;
  for_sums(a, &totals, [&](float**, int64_t count) { size += count; });
  ChunkSums sums(size);
  Lease ws;
  float* space = ws->scratch.ensure(2 * rows.floats() * std::max(1, executor.num_threads));
  for_passes(a.points, executor, [&](int worker, int64_t chunk, int64_t first, int64_t count) {
    const Layers pass(rows.sizes, 5, space + 2 * worker * rows.floats()), up(rows.sizes, 5, pass.end);
    AttendGradients mine = {};
    float* next = sums.of(chunk);
    for_sums(a, &mine, [&](float** array, int64_t floats) { *array = next, next += floats; });
    load_points(arrays.x, a.points, a.seen, first, count, pass.layer[0]);
    load_points(d_out, a.points, a.last, first, count, up.layer[4]);
    mlp_kernels().attend(a, arrays, pass.layer);
    mlp_kernels().pull_attend(a, arrays, pass.layer, up.layer, mine);
    save_points(up.layer[0], a.points, a.seen, first, count, out.x);
  });
  int64_t start = 0;
  for_sums(a, &totals, [&](float** array, int64_t count) { sums.total(start, count, *array), start += count; });
}

}  // namespace fg3dgs
