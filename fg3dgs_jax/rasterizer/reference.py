"""The rasterizer's specification: pure JAX, any float dtype, differentiable by autodiff. Exact and slow.

Every pixel meets every Gaussian in depth order, so there are no tiles and no capacity.
Equations: EWA splatting (Zwicker et al. 2001) as in 3D Gaussian Splatting (3DGS, Kerbl et al. 2023).
"""

import jax
import jax.numpy as jnp

from fg3dgs_jax.types import Array, Rendered

TILE = 16  # pixels; only `num_pairs` depends on it
DILATION = 0.3  # pixels^2, added to the diagonal of the 2-D covariance
MIN_ALPHA = 1 / 255  # less is skipped
MAX_ALPHA = 0.99
MIN_TRANSMITTANCE = 1e-4  # a pixel stops before the Gaussian that would take it below this
FRAME_MARGIN = 0.15  # the Jacobian is taken at most this part of the image outside of it (3DGS)
RADIUS_SIGMAS = 3.0
MAX_RESIDUALS = 2**23  # pixel-Gaussian meetings that the backward pass may hold at once, some 24 bytes each


def rotation_matrix(quats: Array) -> jax.Array:
    """Rotations [..., 3, 3] of quaternions [..., 4] (w, x, y, z) of any length but zero."""
    w, x, y, z = jnp.moveaxis(quats / jnp.linalg.norm(quats, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return jnp.stack([jnp.stack(row, -1) for row in rows], -2)


def sh_basis(directions: Array, count: int) -> jax.Array:
    """Real spherical harmonics [..., count] at unit directions [..., 3], count in (1, 4, 9, 16); signs as in 3DGS."""
    x, y, z = jnp.moveaxis(directions, -1, 0)
    basis = [jnp.full_like(x, 0.28209479177387814)]
    if count > 1:
        basis += [-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x]
    if count > 4:
        basis += [
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (2 * z * z - x * x - y * y),
            -1.0925484305920792 * x * z,
            0.5462742152960396 * (x * x - y * y),
        ]
    if count > 9:
        basis += [
            -0.5900435899266435 * y * (3 * x * x - y * y),
            2.890611442640554 * x * y * z,
            -0.4570457994644658 * y * (4 * z * z - x * x - y * y),
            0.3731763325901154 * z * (2 * z * z - 3 * x * x - 3 * y * y),
            -0.4570457994644658 * x * (4 * z * z - x * x - y * y),
            1.445305721320277 * z * (x * x - y * y),
            -0.5900435899266435 * x * (x * x - 3 * y * y),
        ]
    return jnp.stack(basis, -1)


def sh_colors(sh: Array, means: Array, viewmat: Array) -> jax.Array:
    """Colours [N, 3] >= 0 of coefficients [N, K, 3] seen from the camera: max(0, 1/2 + SH(direction))."""
    center = -viewmat[:3, :3].T @ viewmat[:3, 3]
    directions = means - center
    directions = directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)
    return jnp.maximum(0.5 + jnp.einsum("nk,nkc->nc", sh_basis(directions, sh.shape[1]), sh), 0.0)


def project_covariance(points: Array, covariances: Array, intrinsics: Array, width: int, height: int) -> jax.Array:
    """2-D covariances [N, 2, 2] in pixels^2: J Sigma J^T + dilation, J the projection's Jacobian at the point.

    points [N, 3] and covariances [N, 3, 3] in camera axes. Outside the image the Jacobian is taken at its margin:
    the linearisation would blow up there (3DGS).
    """
    fx, fy, cx, cy = intrinsics
    x, y, z = points.T
    u = jnp.clip(fx * x / z, -FRAME_MARGIN * width - cx, (1 + FRAME_MARGIN) * width - cx)
    v = jnp.clip(fy * y / z, -FRAME_MARGIN * height - cy, (1 + FRAME_MARGIN) * height - cy)
    zero = jnp.zeros_like(z)
    jacobian = jnp.stack([jnp.stack([fx / z, zero, -u / z], -1), jnp.stack([zero, fy / z, -v / z], -1)], -2)
    projected = jnp.einsum("nij,njk,nlk->nil", jacobian, covariances, jacobian)
    return projected + DILATION * jnp.eye(2, dtype=projected.dtype)


def _splats(means, quats, scales, opacities, colors, viewmat, intrinsics, means2d, width, height):
    """Per Gaussian: camera z [N], 2-D mean [N, 2], covariance [N, 2, 2], its determinant [N], colour [N, C]."""
    rotation = viewmat[:3, :3]
    points = means @ rotation.T + viewmat[:3, 3]
    axes = rotation @ rotation_matrix(quats) * scales[:, None, :]  # W R S
    covariance = project_covariance(points, axes @ axes.mT, intrinsics, width, height)
    mean = intrinsics[:2] * points[:, :2] / points[:, 2:] + intrinsics[2:] + means2d
    det = covariance[:, 0, 0] * covariance[:, 1, 1] - covariance[:, 0, 1] * covariance[:, 1, 0]
    rgb = sh_colors(colors, means, viewmat) if colors.ndim == 3 else colors
    return points[:, 2], mean, covariance, det, rgb


def _half_extent(opacities, covariance):
    """Half-extents [N, 2] in pixels of the ellipse where alpha >= 1/255."""
    reach = 2 * jnp.log(jnp.maximum(opacities / MIN_ALPHA, 1))
    return jnp.sqrt(reach[:, None] * jnp.stack([covariance[:, 0, 0], covariance[:, 1, 1]], -1))


def _visible(splats, quats, opacities, near, width, height):
    """[N] bool: drawable, in front of the near plane, touching a pixel; and pixel boxes lo, hi [N, 2], inclusive."""
    z, mean, covariance, det, rgb = splats
    extent = _half_extent(opacities, covariance)
    limit = jnp.array([width - 1, height - 1], mean.dtype)
    lo = jnp.maximum(jnp.ceil(mean - extent - 0.5), 0)
    hi = jnp.minimum(jnp.floor(mean + extent - 0.5), limit)
    squared_norm = jnp.sum(quats * quats, -1)
    finite = jnp.isfinite(opacities) & jnp.isfinite(z) & jnp.isfinite(det) & jnp.isfinite(squared_norm)
    finite &= jnp.isfinite(mean + extent).all(-1) & jnp.isfinite(rgb).all(-1)
    drawable = (opacities >= MIN_ALPHA) & (z > near) & (det > 0) & (squared_norm > 0)
    return finite & drawable & (lo <= hi).all(-1), lo, hi


def _radii(visible, covariance, det):
    middle = 0.5 * (covariance[:, 0, 0] + covariance[:, 1, 1])
    largest = middle + jnp.sqrt(jnp.maximum(middle * middle - det, 0))
    radius = jnp.minimum(jnp.ceil(RADIUS_SIGMAS * jnp.sqrt(largest)), 1e9)
    return jnp.where(visible, radius, 0).astype(jnp.int32)


def _composite(x, y, splats):
    """Front-to-back compositing of pixels at x [W], y [R, 1] over sorted Gaussians: C = sum_i c_i alpha_i T_i.

    Returns color [R, W, C], alpha [R, W], depth [R, W]. A stopped pixel has transmittance 0.
    """

    def blend(carry, splat):
        transmittance, color, total, depth = carry
        z, mean, conic, opacity, rgb = splat
        dx, dy = x - mean[0], y - mean[1]
        power = -0.5 * (conic[0, 0] * dx * dx + 2 * conic[0, 1] * dx * dy + conic[1, 1] * dy * dy)
        alpha = jnp.minimum(opacity * jnp.exp(power), MAX_ALPHA)
        alpha = jnp.where(alpha >= MIN_ALPHA, alpha, 0.0)
        after = transmittance * (1 - alpha)
        goes_on = after >= MIN_TRANSMITTANCE
        weight = jnp.where(goes_on, alpha * transmittance, 0.0)
        after = jnp.where(goes_on, after, 0.0)
        return (after, color + weight[..., None] * rgb, total + weight, depth + weight * z), None

    none = jnp.zeros(jnp.broadcast_shapes(x.shape, y.shape), x.dtype)
    start = (none + 1, jnp.zeros((*none.shape, splats[-1].shape[-1]), x.dtype), none, none)
    return jax.lax.scan(blend, start, splats)[0][1:]


def rasterize(
    means: Array,
    quats: Array,
    scales: Array,
    opacities: Array,
    colors: Array,
    viewmat: Array,
    intrinsics: Array,
    means2d: Array,
    width: int,
    height: int,
    near: float = 0.01,
) -> Rendered:
    """Arguments and result as in `fg3dgs_jax.rasterizer.rasterize`; `means2d` [N, 2] is required."""
    inputs = (means, quats, scales, opacities, colors)
    splats = _splats(*map(jax.lax.stop_gradient, (*inputs, viewmat, intrinsics, means2d)), width, height)
    visible, lo, hi = _visible(splats, *map(jax.lax.stop_gradient, (quats, opacities)), near, width, height)

    # Culled Gaussians become harmless constants before anything is differentiated: a NaN times zero is a NaN.
    def keep(x, neutral):
        return jnp.where(visible.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.asarray(neutral, x.dtype))

    in_front = jax.lax.stop_gradient(viewmat[:3, :3].T @ (jnp.array([0, 0, 1.0], viewmat.dtype) - viewmat[:3, 3]))
    neutrals = (in_front, [1.0, 0, 0, 0], 1.0, 0.0, 0.0)
    means, quats, scales, opacities, colors = map(keep, inputs, neutrals)
    z, mean, covariance, det, rgb = _splats(
        means, quats, scales, opacities, colors, viewmat, intrinsics, keep(means2d, 0.0), width, height
    )
    a, b, c = covariance[:, 0, 0], covariance[:, 0, 1], covariance[:, 1, 1]
    conic = jnp.stack([jnp.stack([c, -b], -1), jnp.stack([-b, a], -1)], -2) / det[:, None, None]

    order = jnp.argsort(jnp.where(visible, z, jnp.inf), stable=True)
    drawn = jax.tree.map(lambda x: x[order], (z, mean, conic, opacities, rgb))

    # A few rows at a time, recomputed in the backward pass: otherwise it would hold every pixel of every Gaussian.
    rows = max(1, min(height, MAX_RESIDUALS // max(1, width * means.shape[0])))
    y = jnp.arange(-(-height // rows) * rows, dtype=mean.dtype).reshape(-1, rows, 1) + 0.5
    x = jnp.arange(width, dtype=mean.dtype) + 0.5
    images = jax.lax.map(jax.checkpoint(lambda y: _composite(x, y, drawn)), y)
    color, alpha, depth = (image.reshape(-1, *image.shape[2:])[:height] for image in images)
    tiles = jnp.where(visible[:, None], hi // TILE - lo // TILE + 1, 0).astype(jnp.int32)
    return Rendered(color, alpha, depth, _radii(visible, covariance, det), jnp.sum(tiles[:, 0] * tiles[:, 1]))
