// Per-Gaussian maths, forward and backward: projection, conic, spherical harmonics.
//
// Templates over F: a float (one Gaussian; a GPU thread) or a vector of floats (one Gaussian per lane). No XLA here.
// Formulas: EWA splatting (Zwicker 2001) as in 3D Gaussian Splatting (Kerbl 2023), and their derivatives.
#pragma once

#ifdef __CUDACC__
#define FG_HD __host__ __device__ __forceinline__
#else
#define FG_HD inline __attribute__((always_inline))
#endif
#ifndef FG_ISA
#define FG_ISA scalar
#endif

namespace fg3dgs {
namespace FG_ISA {

constexpr float kDilation = 0.3f;        // pixels^2 added to the 2-D covariance's diagonal
constexpr float kMinAlpha = 1.0f / 255;  // less is skipped
constexpr float kMaxAlpha = 0.99f;
constexpr float kMinTransmittance = 1e-4f;  // a pixel stops before the Gaussian that would take it below this
constexpr float kFrameMargin = 0.15f;       // the Jacobian is taken at most this part of the image outside of it

template <class F>
FG_HD F constant(float x) {
  return x - F{};
}

struct Camera {
  float r[9];  // world to camera, row by row
  float t[3];
  float fx, fy, cx, cy;
  float near_plane;
  float width, height;
  float center[3];  // -R^T t, in the world
};

FG_HD Camera make_camera(const float* viewmat, const float* intrinsics, int width, int height, float near_plane) {
  Camera c;
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) c.r[3 * i + j] = viewmat[4 * i + j];
    c.t[i] = viewmat[4 * i + 3];
  }
  for (int j = 0; j < 3; ++j) c.center[j] = -(c.r[j] * c.t[0] + c.r[3 + j] * c.t[1] + c.r[6 + j] * c.t[2]);
  c.fx = intrinsics[0];
  c.fy = intrinsics[1];
  c.cx = intrinsics[2];
  c.cy = intrinsics[3];
  c.near_plane = near_plane;
  c.width = static_cast<float>(width);
  c.height = static_cast<float>(height);
  return c;
}

// Everything the backward pass needs again.
template <class F>
struct Projection {
  F p[3];              // the mean in camera axes
  F iz;                // 1 / p[2]
  F u, v;              // fx x / z, fy y / z
  F uc, vc;            // the same, held near the image: where the Jacobian is taken
  F q[4], inv_norm;    // unit quaternion, 1 / |quaternion|
  F m[9];              // W R: rotation into camera axes
  F s[3];              // scales
  F row0[3], row1[3];  // the 2-D covariance is [row0; row1] [row0; row1]^T + dilation
  F a, b, c, det;      // covariance [[a, b], [b, c]] and its determinant
};

template <class F>
FG_HD void rotation_of(const F* q, F* r) {
  const F w = q[0], x = q[1], y = q[2], z = q[3];
  r[0] = 1.0f - 2.0f * (y * y + z * z);
  r[1] = 2.0f * (x * y - w * z);
  r[2] = 2.0f * (x * z + w * y);
  r[3] = 2.0f * (x * y + w * z);
  r[4] = 1.0f - 2.0f * (x * x + z * z);
  r[5] = 2.0f * (y * z - w * x);
  r[6] = 2.0f * (x * z - w * y);
  r[7] = 2.0f * (y * z + w * x);
  r[8] = 1.0f - 2.0f * (x * x + y * y);
}

template <class F>
FG_HD Projection<F> project(const Camera& cam, const F* mean, const F* quat, const F* scale) {
  Projection<F> o;
  for (int i = 0; i < 3; ++i) {
    const float* r = cam.r + 3 * i;
    o.p[i] = r[0] * mean[0] + r[1] * mean[1] + r[2] * mean[2] + cam.t[i];
  }
  o.iz = 1.0f / o.p[2];
  o.u = cam.fx * o.p[0] * o.iz;
  o.v = cam.fy * o.p[1] * o.iz;
  const float margin_x = kFrameMargin * cam.width, margin_y = kFrameMargin * cam.height;
  o.uc = clamp(o.u, constant<F>(-margin_x - cam.cx), constant<F>(cam.width + margin_x - cam.cx));
  o.vc = clamp(o.v, constant<F>(-margin_y - cam.cy), constant<F>(cam.height + margin_y - cam.cy));

  o.inv_norm = 1.0f / sqrt(quat[0] * quat[0] + quat[1] * quat[1] + quat[2] * quat[2] + quat[3] * quat[3]);
  for (int i = 0; i < 4; ++i) o.q[i] = quat[i] * o.inv_norm;
  F r[9];
  rotation_of(o.q, r);
  for (int i = 0; i < 3; ++i)
    for (int k = 0; k < 3; ++k)
      o.m[3 * i + k] = cam.r[3 * i] * r[k] + cam.r[3 * i + 1] * r[3 + k] + cam.r[3 * i + 2] * r[6 + k];

  for (int k = 0; k < 3; ++k) {
    o.s[k] = scale[k];
    o.row0[k] = o.iz * (cam.fx * o.m[k] - o.uc * o.m[6 + k]) * scale[k];
    o.row1[k] = o.iz * (cam.fy * o.m[3 + k] - o.vc * o.m[6 + k]) * scale[k];
  }
  o.a = o.row0[0] * o.row0[0] + o.row0[1] * o.row0[1] + o.row0[2] * o.row0[2] + kDilation;
  o.b = o.row0[0] * o.row1[0] + o.row0[1] * o.row1[1] + o.row0[2] * o.row1[2];
  o.c = o.row1[0] * o.row1[0] + o.row1[1] * o.row1[1] + o.row1[2] * o.row1[2] + kDilation;
  o.det = o.a * o.c - o.b * o.b;
  return o;
}

// Cotangents that arrive at one Gaussian's projection.
template <class F>
struct ScreenGradient {
  F x, y;     // of the 2-D mean
  F a, b, c;  // of the conic [[a, b], [b, c]]
  F depth;    // of the camera z
};

template <class F>
struct PointGradient {
  F mean[3], quat[4], scale[3];
  F rotation[9], translation[3], fx, fy, cx, cy;  // this Gaussian's share of the camera's gradient
};

// Cotangent of the covariance from that of its inverse: with X the conic and D its symmetric cotangent, -X D X.
template <class F>
FG_HD void unproject_conic(const Projection<F>& o, const ScreenGradient<F>& g, F* da, F* db, F* dc) {
  const F inv = 1.0f / o.det;
  const F xa = o.c * inv, xb = -o.b * inv, xc = o.a * inv;
  const F half = 0.5f * g.b;
  const F l0 = xa * g.a + xb * half, l1 = xa * half + xb * g.c;  // rows of X D
  const F l2 = xb * g.a + xc * half, l3 = xb * half + xc * g.c;
  *da = -(l0 * xa + l1 * xb);
  *db = -2.0f * (l0 * xb + l1 * xc);
  *dc = -(l2 * xb + l3 * xc);
}

template <class F>
FG_HD void unproject_quat(const Projection<F>& o, const F* dr, F* dquat) {
  const F w = o.q[0], x = o.q[1], y = o.q[2], z = o.q[3];
  F d[4];
  d[0] = 2.0f * (z * (dr[3] - dr[1]) + y * (dr[2] - dr[6]) + x * (dr[7] - dr[5]));
  d[1] = 2.0f * (y * (dr[1] + dr[3]) + z * (dr[2] + dr[6]) + w * (dr[7] - dr[5]) - 2.0f * x * (dr[4] + dr[8]));
  d[2] = 2.0f * (x * (dr[1] + dr[3]) + z * (dr[5] + dr[7]) + w * (dr[2] - dr[6]) - 2.0f * y * (dr[0] + dr[8]));
  d[3] = 2.0f * (x * (dr[2] + dr[6]) + y * (dr[5] + dr[7]) + w * (dr[3] - dr[1]) - 2.0f * z * (dr[0] + dr[4]));
  const F radial = d[0] * w + d[1] * x + d[2] * y + d[3] * z;
  for (int i = 0; i < 4; ++i) dquat[i] = o.inv_norm * (d[i] - o.q[i] * radial);
}

template <class F>
FG_HD PointGradient<F> unproject(const Camera& cam, const F* mean, const Projection<F>& o, const ScreenGradient<F>& g) {
  PointGradient<F> out;
  const F none = constant<F>(0);
  F da, db, dc;
  unproject_conic(o, g, &da, &db, &dc);

  // Covariance -> its two rows -> rotation, scales, and the Jacobian's iz, uc, vc, fx, fy.
  F dm[9];
  F diz = none, duc = none, dvc = none;
  out.fx = none;
  out.fy = none;
  for (int k = 0; k < 3; ++k) {
    const F d0 = (2.0f * da * o.row0[k] + db * o.row1[k]) * o.s[k];
    const F d1 = (2.0f * dc * o.row1[k] + db * o.row0[k]) * o.s[k];
    const F j0 = cam.fx * o.m[k] - o.uc * o.m[6 + k];
    const F j1 = cam.fy * o.m[3 + k] - o.vc * o.m[6 + k];
    out.scale[k] =
        o.iz * (j0 * (2.0f * da * o.row0[k] + db * o.row1[k]) + j1 * (2.0f * dc * o.row1[k] + db * o.row0[k]));
    dm[k] = o.iz * cam.fx * d0;
    dm[3 + k] = o.iz * cam.fy * d1;
    dm[6 + k] = -o.iz * (o.uc * d0 + o.vc * d1);
    diz += j0 * d0 + j1 * d1;
    duc -= o.iz * o.m[6 + k] * d0;
    dvc -= o.iz * o.m[6 + k] * d1;
    out.fx += o.iz * o.m[k] * d0;
    out.fy += o.iz * o.m[3 + k] * d1;
  }

  F r[9], dr[9];
  rotation_of(o.q, r);
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) {
      dr[3 * i + j] = cam.r[i] * dm[j] + cam.r[3 + i] * dm[3 + j] + cam.r[6 + i] * dm[6 + j];
      out.rotation[3 * i + j] = dm[3 * i] * r[3 * j] + dm[3 * i + 1] * r[3 * j + 1] + dm[3 * i + 2] * r[3 * j + 2];
    }
  unproject_quat(o, dr, out.quat);

  // Where the Jacobian's point is held at the margin, its cotangent goes to the principal point instead.
  const auto free_u = o.uc == o.u, free_v = o.vc == o.v;
  const F du = g.x + (free_u ? duc : none), dv = g.y + (free_v ? dvc : none);
  out.cx = g.x - (free_u ? none : duc);
  out.cy = g.y - (free_v ? none : dvc);
  out.fx += o.p[0] * o.iz * du;
  out.fy += o.p[1] * o.iz * dv;
  diz += cam.fx * o.p[0] * du + cam.fy * o.p[1] * dv;
  const F dp[3] = {cam.fx * o.iz * du, cam.fy * o.iz * dv, g.depth - o.iz * o.iz * diz};
  for (int j = 0; j < 3; ++j) {
    out.mean[j] = cam.r[j] * dp[0] + cam.r[3 + j] * dp[1] + cam.r[6 + j] * dp[2];
    out.translation[j] = dp[j];
    for (int i = 0; i < 3; ++i) out.rotation[3 * i + j] += dp[i] * mean[j];
  }
  return out;
}

// Real spherical harmonics with the signs of 3D Gaussian Splatting; `count` = 1, 4, 9 or 16 of them.
template <class F>
FG_HD void sh_basis(int count, F x, F y, F z, F* out) {
  out[0] = constant<F>(0.28209479177387814f);
  if (count < 4) return;
  out[1] = -0.4886025119029199f * y;
  out[2] = 0.4886025119029199f * z;
  out[3] = -0.4886025119029199f * x;
  if (count < 9) return;
  const F xx = x * x, yy = y * y, zz = z * z;
  out[4] = 1.0925484305920792f * x * y;
  out[5] = -1.0925484305920792f * y * z;
  out[6] = 0.31539156525252005f * (2.0f * zz - xx - yy);
  out[7] = -1.0925484305920792f * x * z;
  out[8] = 0.5462742152960396f * (xx - yy);
  if (count < 16) return;
  out[9] = -0.5900435899266435f * y * (3.0f * xx - yy);
  out[10] = 2.890611442640554f * x * y * z;
  out[11] = -0.4570457994644658f * y * (4.0f * zz - xx - yy);
  out[12] = 0.3731763325901154f * z * (2.0f * zz - 3.0f * xx - 3.0f * yy);
  out[13] = -0.4570457994644658f * x * (4.0f * zz - xx - yy);
  out[14] = 1.445305721320277f * z * (xx - yy);
  out[15] = -0.5900435899266435f * x * (xx - 3.0f * yy);
}

// Cotangent of the direction (x, y, z) from those of the basis.
template <class F>
FG_HD void sh_basis_backward(int count, F x, F y, F z, const F* g, F* dx, F* dy, F* dz) {
  *dx = *dy = *dz = constant<F>(0);
  if (count < 4) return;
  *dy = -0.4886025119029199f * g[1];
  *dz = 0.4886025119029199f * g[2];
  *dx = -0.4886025119029199f * g[3];
  if (count < 9) return;
  constexpr float c4 = 1.0925484305920792f, c6 = 0.31539156525252005f, c8 = 0.5462742152960396f;
  *dx += c4 * (y * g[4] - z * g[7]) + 2.0f * x * (c8 * g[8] - c6 * g[6]);
  *dy += c4 * (x * g[4] - z * g[5]) - 2.0f * y * (c8 * g[8] + c6 * g[6]);
  *dz += 4.0f * c6 * z * g[6] - c4 * (y * g[5] + x * g[7]);
  if (count < 16) return;
  constexpr float c9 = 0.5900435899266435f, c10 = 2.890611442640554f, c11 = 0.4570457994644658f;
  constexpr float c12 = 0.3731763325901154f, c14 = 1.445305721320277f;
  const F xx = x * x, yy = y * y, zz = z * z, xy = x * y, yz = y * z, xz = x * z;
  *dx += -c9 * (6.0f * xy * g[9] + 3.0f * (xx - yy) * g[15]) + c10 * yz * g[10] + c11 * 2.0f * xy * g[11] -
         c12 * 6.0f * xz * g[12] - c11 * (4.0f * zz - 3.0f * xx - yy) * g[13] + c14 * 2.0f * xz * g[14];
  *dy += -c9 * (3.0f * (xx - yy) * g[9] - 6.0f * xy * g[15]) + c10 * xz * g[10] -
         c11 * (4.0f * zz - xx - 3.0f * yy) * g[11] - c12 * 6.0f * yz * g[12] + c11 * 2.0f * xy * g[13] -
         c14 * 2.0f * yz * g[14];
  *dz += c10 * xy * g[10] - c11 * 8.0f * yz * g[11] + c12 * (6.0f * zz - 3.0f * xx - 3.0f * yy) * g[12] -
         c11 * 8.0f * xz * g[13] + c14 * (xx - yy) * g[14];
}

}  // namespace FG_ISA
}  // namespace fg3dgs
