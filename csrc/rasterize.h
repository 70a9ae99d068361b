// What every backend of the rasterizer takes and returns. Arrays are dense, row-major, float32.
#pragma once

#include <cstdint>
#include <functional>

namespace fg3dgs {

constexpr int kTile = 16;
constexpr int64_t kMostGaussians = (int64_t{1} << 29) - 1;  // four numbers of each are indexed with 32 bits
constexpr int64_t kMostChannels = 65535;
constexpr int64_t kMostSide = 65535;  // pixels
constexpr int kCameraSums = 19;  // rotation 9, translation 3, fx, fy, cx, cy, camera centre 3

struct Box {
  uint16_t x0, y0, x1, y1;  // tiles, inclusive
};

struct Scene {
  const float* means;       // [n, 3] world units
  const float* quats;       // [n, 4] w x y z, any length but zero
  const float* scales;      // [n, 3] standard deviations, world units
  const float* opacities;   // [n]; below 1/255 the Gaussian costs nothing
  const float* colors;      // [n, channels], or [n, sh_count, 3]
  const float* viewmat;     // [4, 4] world to camera, OpenCV axes
  const float* intrinsics;  // fx, fy, cx, cy in pixels
  const float* means2d;     // [n, 2] added to the projected means, pixels; null when painting
  int64_t n;
  int channels;  // of the image: 3 with spherical harmonics
  int sh_count;  // 0: plain colours; else 1, 4, 9 or 16 coefficients
  int width, height;
  float near_plane;
  int64_t max_pairs;  // more tile-Gaussian pairs than this is an overflow; negative: no limit
};

// Whether the kernels can index a scene of these sizes. Whoever builds a Scene asks first; no value in its arrays can
// harm, but lengths other than it says can.
static inline bool can_rasterize(int64_t n, int64_t channels, int64_t sh_count, int64_t width, int64_t height) {
  const bool sh = sh_count == 1 || sh_count == 4 || sh_count == 9 || sh_count == 16;
  return n >= 0 && n <= kMostGaussians && channels > 0 && channels <= kMostChannels &&
         (sh_count == 0 || (sh && channels == 3)) && width > 0 && width <= kMostSide && height > 0 &&
         height <= kMostSide;
}

struct Images {
  float* color;  // [height, width, channels], premultiplied
  float* alpha;  // [height, width]
  float* depth;  // [height, width], premultiplied
};

// A finished picture, u8 [height, width, channels]: 3, or 4 with straight alpha.
struct Canvas {
  const uint8_t* backdrop;
  uint8_t* out;
  int channels;
};

constexpr int kMostLayersPainted = 16;

struct ConstImages {
  const float* color;
  const float* alpha;
  const float* depth;
};

struct Gradients {
  float *means, *quats, *scales, *opacities, *colors, *viewmat, *intrinsics, *means2d;  // shapes as in Scene
};

// Threads that somebody else owns. `schedule` runs a task later, on any thread, perhaps on none for a long time.
struct Executor {
  int num_threads;
  std::function<void(std::function<void()>)> schedule;
};

// Both return an error message, or nullptr. Overflow is no error: the images (or gradients) are filled with NaN.
// Where `ticket` is not null, forward keeps its lists for a while: backward of the same scene, given the ticket, need
// not make them again. Any other ticket is as good as 0.
const char* rasterize_forward(const Scene&, const Images&, int32_t* radii, int32_t* num_pairs, int32_t* ticket,
                              const Executor&);
const char* rasterize_backward(const Scene&, const ConstImages& rendered, const ConstImages& cotangents,
                               const Gradients&, int32_t ticket, const Executor&);

// Layers of three channels, front to back, each rendered for itself and laid over the next, the last over the backdrop.
// The layers agree in camera, size and near plane; at most kMostLayersPainted. No limit to the pairs.
const char* rasterize_paint(const Scene* layers, int count, const Canvas&, const Executor&);

}  // namespace fg3dgs
