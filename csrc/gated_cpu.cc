// The driver of a perceptron with gated conditions: everything between x and out stays in the second cache.
#include "gated.h"
#include "mlp_pass.h"

namespace fg3dgs {
namespace {

// One pass's layers, or their gradients. The perceptron's first layer holds x and, behind it, the gated conditions.
struct Pass {
  Layers main, gate[kGates];

  Pass(const Mlp& m, const Gate* g, float* memory)
      : main(m.sizes, m.layers + 1, memory),
        gate{Layers(g[0].net.sizes, g[0].net.layers + 1, main.end),
             Layers(g[1].net.sizes, g[1].net.layers + 1, gate[0].end)} {}

  static int64_t floats(const Mlp& m, const Gate* g) {
    int64_t sum = floats_of(m.sizes, m.layers + 1);
    for (int i = 0; i < kGates; ++i) sum += floats_of(g[i].net.sizes, g[i].net.layers + 1);
    return sum;
  }

  // Where a gate's rows of the perceptron's first layer begin.
  float* rows(const Gate* g, int which) const {
    int64_t row = g[0].net.sizes[0];
    for (int i = 0; i < which; ++i) row += g[i].net.sizes[g[i].net.layers];
    return main.layer[0] + row * kMlpStride;
  }
};

int height(const Gate& gate) { return gate.net.sizes[gate.net.layers]; }

// The perceptron's first layer of one pass.
void see(const Mlp& m, const Gate* gates, const float* x, int64_t first, int64_t count, Pass* pass) {
  load_points(x, m.points, gates[0].net.sizes[0], first, count, pass->main.layer[0]);
  for (int i = 0; i < kGates; ++i) {
    const Gate& g = gates[i];
    pass->gate[i].layer[0] = pass->main.layer[0];
    mlp_kernels().run(g.net, false, g.weights, g.net.layers, pass->gate[i].layer);
    mlp_kernels().gate(g.condition, g.rectified, height(g), pass->gate[i].layer[g.net.layers], pass->rows(gates, i));
  }
}

}  // namespace

void gated_forward(const Mlp& m, const Gate* gates, const float* x, const float* weights, float* out,
                   const Executor& executor) {
  const int64_t floats = Pass::floats(m, gates);
  Lease ws;
  float* space = ws->scratch.ensure(floats * std::max(1, executor.num_threads));
  for_passes(m.points, executor, [&](int worker, int64_t, int64_t first, int64_t count) {
    Pass pass(m, gates, space + worker * floats);
    see(m, gates, x, first, count, &pass);
    mlp_kernels().run(m, false, weights, m.layers, pass.main.layer);
    save_points(pass.main.layer[m.layers], m.points, m.sizes[m.layers], first, count, out);
  });
}

void gated_backward(const Mlp& m, const Gate* gates, const float* x, const float* weights, const float* d_out,
                    float* d_x, float* d_weights, const GateGradients* d_gates, const Executor& executor) {
  const int64_t floats = Pass::floats(m, gates);
  const int in = gates[0].net.sizes[0];
  int64_t starts[kGates + 1] = {mlp_weights(m)};  // of the gates' sums: weights, then condition
  for (int i = 0; i < kGates; ++i) starts[i + 1] = starts[i] + mlp_weights(gates[i].net) + height(gates[i]);
  ChunkSums sums(starts[kGates]);
  Lease ws;
  float* space = ws->scratch.ensure(2 * floats * std::max(1, executor.num_threads));
  for_passes(m.points, executor, [&](int worker, int64_t chunk, int64_t first, int64_t count) {
    Pass pass(m, gates, space + 2 * worker * floats), up(m, gates, space + (2 * worker + 1) * floats);
    see(m, gates, x, first, count, &pass);
    load_points(d_out, m.points, m.sizes[m.layers], first, count, up.main.layer[m.layers]);
    mlp_kernels().run(m, false, weights, m.layers - 1, pass.main.layer);
    mlp_kernels().pull(m, false, weights, pass.main.layer, up.main.layer, sums.of(chunk));
    for (int i = 0; i < kGates; ++i) {
      const Gate& g = gates[i];
      float *sum = sums.of(chunk) + starts[i], *d_gate = up.rows(gates, i);
      mlp_kernels().pull_gate(g.condition, g.rectified, height(g), pass.gate[i].layer[g.net.layers], d_gate,
                              sum + mlp_weights(g.net));
      up.gate[i].layer[g.net.layers] = d_gate;
      up.gate[i].layer[0] = up.main.layer[0];
      mlp_kernels().pull(g.net, true, g.weights, pass.gate[i].layer, up.gate[i].layer, sum);
    }
    save_points(up.main.layer[0], m.points, in, first, count, d_x);
  });
  sums.total(0, starts[0], d_weights);
  for (int i = 0; i < kGates; ++i) {
    const int64_t size = mlp_weights(gates[i].net);
    sums.total(starts[i], size, d_gates[i].weights);
    sums.total(starts[i] + size, height(gates[i]), d_gates[i].condition);
  }
}

}  // namespace fg3dgs
