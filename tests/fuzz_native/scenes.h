// Scenes of Gaussians from bytes: rendered and pulled back, and painted in layers.
#pragma once

#include "bytes.h"

namespace fuzz {

inline int number(uint32_t kind, Bytes& b) {
  if (kind < 240) return kind % 6;
  const int more = static_cast<int>(b.byte());
  if (kind < 255) return 6 + more % 32;
  return more < 240 ? 505 + more % 16 : 4200;  // about a chunk; several ranges of the depth order
}
inline int side(uint32_t kind, Bytes& b) {
  if (kind < 244) return 1 + static_cast<int>(kind) % 17;
  if (kind < 255) return 18 + 5 * static_cast<int>(kind - 244);
  return b.byte() < 240 ? 150 : kMostSide;
}

// The arrays of n ordinary Gaussians, sizes and opacities of one of several kinds.
struct Gaussians {
  Floats means, quats, scales, opacities, colors;

  void fill(Random& random, uint32_t kind, int64_t n, int sh_count, int channels) {
    constexpr float kSizes[] = {1, 1, 1, 1, 30, 1e4f, 0, 1e-3f};
    const float size = n > 100 ? 1e-3f : kSizes[kind % 8];  // of many, each touches a pixel or two
    const float spread = kind & 8 ? 1.2f : 0.4f, opaque = kind & 16 ? 0.999f : 0.0f;
    means = random.array(3 * n, -spread, spread);
    quats = random.array(4 * n, -1, 1);
    scales = random.array(3 * n, 0.02f * size, 0.25f * size);
    opacities = random.array(n, opaque, 1);
    colors = random.array(n * (sh_count ? 3 * sh_count : channels), sh_count ? -1.0f : 0.0f, 1);
  }
};

inline Floats camera_pose() { return {1, 0, 0, 0.1f, 0, 1, 0, -0.1f, 0, 0, 1, 3, 0, 0, 0, 1}; }

inline Floats camera_lens(int width, int height) {
  const float w = static_cast<float>(width), h = static_cast<float>(height);
  return {1.2f * w, 1.1f * h, 0.5f * w + 1.3f, 0.5f * h - 0.7f};
}

inline void point(Scene* s, const Gaussians& g, const Floats& viewmat, const Floats& intrinsics) {
  s->means = g.means.data();
  s->quats = g.quats.data();
  s->scales = g.scales.data();
  s->opacities = g.opacities.data();
  s->colors = g.colors.data();
  s->viewmat = viewmat.data();
  s->intrinsics = intrinsics.data();
  s->n = static_cast<int64_t>(g.opacities.size());
}

constexpr int kHarmonics[] = {0, 0, 0, 0, 1, 4, 9, 16};

// A scene, rendered and pulled back.
class SceneCase {
 public:
  explicit SceneCase(Bytes& b) {
    constexpr int kChannels[] = {1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 4, 4, 5, 6, 9, 33};
    n_ = number(b.byte(), b);
    scene_.sh_count = kHarmonics[b.byte() % 8];
    scene_.channels = scene_.sh_count ? 3 : kChannels[b.byte() % 16];
    scene_.width = side(b.byte(), b);
    scene_.height = std::min(side(b.byte(), b), std::max(1, 4096 / scene_.width));  // long images are thin
    const uint32_t limit = b.byte();
    scene_.max_pairs = limit < 128 ? -1 : limit < 192 ? limit - 128 : 1 << (limit - 192) % 32;
    const uint32_t near = b.byte();
    scene_.near_plane = near < 224 ? 0.01f : b.value();
    fill(Random(b.word()), b.byte());
    poke(b, {&g_.means, &g_.quats, &g_.scales, &g_.opacities, &g_.colors, &viewmat_, &intrinsics_, &means2d_,
             &cotangents_[0], &cotangents_[1], &cotangents_[2]});
    point(&scene_, g_, viewmat_, intrinsics_);
    scene_.means2d = means2d_.data();
  }
  SceneCase(const SceneCase&) = delete;  // the scene points into the case

  bool possible() const {
    return can_rasterize(n_, scene_.channels, scene_.sh_count, scene_.width, scene_.height);
  }

  // color, alpha, depth, then the gradients of the eight operands; radii and the number of pairs.
  Results run(const Executor& executor) const {
    const int64_t pixels = int64_t{scene_.width} * scene_.height;
    Results r;
    const Images images{r.floats(pixels * scene_.channels), r.floats(pixels), r.floats(pixels)};
    int32_t *radii = r.integers(n_), *pairs = r.integers(1), ticket = -1;
    expect(!rasterize_forward(scene_, images, radii, pairs, &ticket, executor), "small images never have too many pairs");
    const ConstImages cotangents{cotangents_[0].data(), cotangents_[1].data(), cotangents_[2].data()};
    const ConstImages rendered{images.color, images.alpha, images.depth};
    const auto pull = [&](Results* to, int first) {
      const auto like = [to](const Floats& array) { return to->floats(static_cast<int64_t>(array.size())); };
      const Gradients gradients{like(g_.means),  like(g_.quats), like(g_.scales),   like(g_.opacities),
                                like(g_.colors), like(viewmat_), like(intrinsics_), like(means2d_)};
      expect(!rasterize_backward(scene_, rendered, cotangents, gradients, ticket, executor), "forward fitted");
      for (size_t k = 0; first == 0 && k < 8; ++k)
        expect(!std::memcmp((*to)[k].data(), r[3 + k].data(), 4 * r[3 + k].size()), "kept lists change the gradients");
    };
    Results again;
    pull(&r, 3);
    pull(&again, 0);  // the ticket is spent
    return r;
  }

  void check(const Results& r) const {
    const int32_t pairs = r.ints(1)[0];
    expect(pairs >= 0, "pairs are counted");
    const bool overflow = scene_.max_pairs >= 0 && pairs > scene_.max_pairs;
    for (size_t i = 0; overflow && i < 11; ++i) expect(all_nan(r[i]), "an overflow shows in every number");
    if (overflow) return;
    for (float a : r[1]) expect(a >= 0 && a <= 1, "alpha is in [0, 1], whatever the Gaussians");
    for (int radius : r.ints(0)) expect(radius >= 0 && radius <= 1000000000, "radii are in [0, 1e9]");
    const int64_t sizes[] = {3, 4, 3, 1, coefficients(), 0, 0, 2};
    for (int64_t i = 0; i < n_; ++i)
      for (int k = 0; r.ints(0)[i] == 0 && k < 8; ++k)
        for (int64_t j = 0; j < sizes[k]; ++j)
          expect(r[3 + k][i * sizes[k] + j] == 0, "what is not drawn has no gradient");
  }

 private:
  int64_t coefficients() const { return scene_.sh_count ? 3 * scene_.sh_count : scene_.channels; }
  void fill(Random random, uint32_t kind) {
    const int64_t pixels = int64_t{scene_.width} * scene_.height;
    g_.fill(random, kind, n_, scene_.sh_count, scene_.channels);
    viewmat_ = camera_pose();
    intrinsics_ = camera_lens(scene_.width, scene_.height);
    means2d_ = random.array(2 * n_, -0.5f, 0.5f);
    cotangents_[0] = random.array(pixels * scene_.channels, -1, 1);
    cotangents_[1] = random.array(pixels, -1, 1);
    cotangents_[2] = random.array(pixels, -1, 1);
  }

  int64_t n_;
  Scene scene_ = {};
  Gaussians g_;
  Floats viewmat_, intrinsics_, means2d_, cotangents_[3];
};

// One to three layers, painted over a backdrop.
class PaintCase {
 public:
  explicit PaintCase(Bytes& b) {
    const int width = side(b.byte(), b), height = std::min(side(b.byte(), b), std::max(1, 4096 / width));
    const uint32_t kind = b.byte();
    channels_ = kind & 1 ? 3 : 4;
    near_plane_ = kind < 224 ? 0.01f : b.value();
    viewmat_ = camera_pose();
    intrinsics_ = camera_lens(width, height);
    Random random(b.word());
    for (uint32_t i = 0; i < 1 + kind / 2 % 3; ++i) {
      const int n = number(b.byte(), b), sh_count = kHarmonics[b.byte() % 8];
      layers_[i].fill(random, b.byte(), n, sh_count, 3);
      Scene& s = scenes_[count_++];
      s = {};
      s.channels = 3;
      s.sh_count = sh_count;
      s.width = width;
      s.height = height;
      s.near_plane = near_plane_;
      s.max_pairs = -1;
    }
    backdrop_.resize(int64_t{width} * height * channels_);
    for (uint8_t& x : backdrop_) x = static_cast<uint8_t>(random.uniform(0, 256));
    Gaussians& last = layers_[count_ - 1];
    poke(b, {&layers_[0].means, &layers_[0].quats, &layers_[0].scales, &layers_[0].opacities, &layers_[0].colors,
             &last.means, &last.quats, &last.scales, &last.opacities, &last.colors, &viewmat_, &intrinsics_});
    for (int i = 0; i < count_; ++i) point(&scenes_[i], layers_[i], viewmat_, intrinsics_);
  }
  PaintCase(const PaintCase&) = delete;

  bool possible() const { return true; }

  // The picture. It begins with another colour for every number of threads: what is not painted differs.
  Results run(const Executor& executor) const {
    std::vector<uint8_t> out(backdrop_.size(), static_cast<uint8_t>(17 * executor.num_threads));
    expect(!rasterize_paint(scenes_, count_, {backdrop_.data(), out.data(), channels_}, executor), "small pictures fit");
    Results r;
    std::copy(out.begin(), out.end(), r.integers(static_cast<int64_t>(out.size())));
    return r;
  }

  void check(const Results&) const {}

 private:
  Gaussians layers_[3];
  Scene scenes_[3];
  int count_ = 0, channels_;
  float near_plane_;
  Floats viewmat_, intrinsics_;
  std::vector<uint8_t> backdrop_;
};

}  // namespace fuzz
