// The encoder of sound and its gradients: the native twin of fg3dgs_jax/model/listen.py. No XLA, no Python.
#pragma once

#include <cstdint>

namespace fg3dgs {

// Four convolutions of stride 2 and two linear layers make a token of each window; five convolutions along the tokens
// and a linear layer make the tokens' shares in their sum.
constexpr int kListenLayers = 12, kStrided = 4, kLastOfTokens = 5;
constexpr int64_t kMostHeard = 1 << 20;  // of any size

// A convolution of `taps` neighbours, 1 or 3, zeros beyond the ends: kernel [taps, in, out], bias [out].
struct ListenLayer {
  const float *kernel, *bias;
  int64_t in, out;
};

struct ListenSlopes {  // gradients
  float *kernel, *bias;
};

struct Listen {
  const float* windows;  // [tokens, steps, layers[0].in]
  int64_t tokens, steps;
  ListenLayer layers[kListenLayers];

  int64_t features() const { return layers[kLastOfTokens].out; }
};

constexpr int listen_taps(int layer) { return layer == 4 || layer == 5 || layer == kListenLayers - 1 ? 1 : 3; }

// Whether the layers fit each other, and sizes are such that the kernels can index them: whoever builds one asks first.
bool can_listen(const Listen&);

// tokens [tokens, features], pooled [features]
void listen(const Listen&, float* tokens, float* pooled);

// From the gradients by both results, those by the windows and by every layer; what lies between is computed again.
void listen_backward(const Listen&, const float* d_tokens, const float* d_pooled, float* d_windows,
                     const ListenSlopes (&slopes)[kListenLayers]);

}  // namespace fg3dgs
