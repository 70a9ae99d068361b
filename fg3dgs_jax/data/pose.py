"""Head poses of a whole clip: one rigid face, one focal length and a camera per frame, fitted to landmarks together.

MediaPipe's own 4x4 pose is per frame, assumes a 63 degree field of view and the same face for everybody. Here the
shape of this person's rigid landmarks, the focal length and every pose minimise the re-projection error (bundle
adjustment; the poses are eliminated by a Schur complement), then the poses are smoothed over time.
"""

import dataclasses

import numpy as np
from scipy.linalg import solveh_banded
from scipy.spatial.transform import Rotation

from fg3dgs_jax.data.face import ROW_CHIN, ROW_FOREHEAD

# Landmarks of the mesh that hardly move with expression: nose, eye corners, forehead, temples, cheekbones.
RIGID = np.array([
    6, 168, 197, 195, 5, 4, 1, 19, 94, 2, 98, 327, 129, 358, 48, 278, 115, 344, 131, 360, 198, 420, 236, 456, 174, 399,
    188, 412, 122, 351, 196, 419, 3, 248, 51, 281, 45, 275, 33, 133, 362, 263, 130, 359, 243, 463, 10, 151, 9, 67, 109,
    338, 297, 103, 332, 54, 284, 108, 337, 69, 299, 104, 333, 68, 298, 21, 251, 162, 389, 127, 356, 234, 454,
    116, 345, 117, 346, 111, 340, 123, 352, 93, 323, 143, 372, 34, 264, 227, 447,
])  # fmt: skip
HUBER = 2.0  # pixels at 512, where outliers start to count less
FACE_HEIGHT = 0.125  # world units, hairline to chin, before the head's own size is known
FIT_FRAMES = 150  # shape and focal length need no more; every frame gets its own pose afterwards
SHAPE_SIGMA = 0.04  # prior on the shape, as a share of the face height: MediaPipe's depth is rough
FOCAL_PRIOR, FOCAL_SIGMA = 2.4, 0.35  # focal length / image size, and the deviation of its logarithm
# Chosen by optical flow at the landmarks of a lively clip: pose differences between frames disagree with the flow by
# 0.67 px RMS unsmoothed, 0.59 with these values, 0.73 and more where fast turns are smoothed like slow ones.
MAX_RISE = 1.08  # smoothing may raise the re-projection error by this factor
KNEE = 3.0  # accelerations above so many medians count as real and are smoothed less (Cauchy weights)


@dataclasses.dataclass(frozen=True)
class Poses:
    """Cameras of a clip around a head at rest. World axes: x to the image's right, y up, z towards the camera."""

    viewmats: np.ndarray  # f32 [T, 4, 4], world to camera, OpenCV axes
    intrinsics: np.ndarray  # f32 [4], fx, fy, cx, cy in pixels
    shape: np.ndarray  # f32 [L, 3], the rigid landmarks in world units
    raw_error: float  # RMS re-projection error before smoothing, pixels
    error: float  # and after
    smoothing: float  # frames, the filter's time constant; 0: none


@dataclasses.dataclass
class _Fit:
    rotation: np.ndarray  # [T, 3, 3]
    translation: np.ndarray  # [T, 3]
    shape: np.ndarray  # [L, 3]
    log_focal: float
    centre: np.ndarray  # [2] principal point

    def project(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixels [T, L, 2], rotated points [T, L, 3] and camera points [T, L, 3]."""
        turned = self.shape @ self.rotation.swapaxes(1, 2)
        points = turned + self.translation[:, None]
        return np.exp(self.log_focal) * points[..., :2] / points[..., 2:] + self.centre, turned, points


def solve_poses(landmarks: np.ndarray, size: int, times: np.ndarray, centre: np.ndarray | None = None) -> Poses:
    """Fits shape, focal length and smooth poses.

    Args:
      landmarks: [T, 478, 3] in pixels of a square image, x right, y down, z away from the camera in the same unit
        (rough); NaN rows where no face was found, their poses are interpolated.
      size: edge of the image in pixels.
      times: [T] capture times in seconds, ascending; smoothing respects uneven ones (30 FPS shown at 25).
      centre: [2] principal point in pixels, by default the image's centre.
    """
    centre = np.full(2, size / 2.0) if centre is None else np.asarray(centre, float)
    found = np.flatnonzero(np.isfinite(landmarks[:, 0, 0]))
    points = landmarks[found][:, RIGID].astype(float)
    fit, height = _start(landmarks[found].astype(float), points, size, centre)
    chosen = np.unique(np.linspace(0, len(found) - 1, FIT_FRAMES).round().astype(int))
    part = dataclasses.replace(fit, rotation=fit.rotation[chosen], translation=fit.translation[chosen])
    weights = np.ones(len(RIGID))
    for _ in range(3):
        weights = _adjust(part, points[chosen, :, :2], weights, size, height)
    fit.shape, fit.log_focal = part.shape, part.log_focal
    for _ in range(4):
        _step_poses(fit, points[..., :2], weights, size)
    smooth, raw_error, error, frames = _smooth(fit, points[..., :2], weights, size, times[found])
    return _poses(smooth, height, times, found, raw_error, error, frames)


def _start(all_points: np.ndarray, points: np.ndarray, size: int, centre: np.ndarray) -> tuple[_Fit, float]:
    """Mean shape by generalised Procrustes alignment, axes set by eyes and chin, poses by similarity."""
    some = all_points[np.unique(np.linspace(0, len(all_points) - 1, FIT_FRAMES).round().astype(int))]
    reference = some[len(some) // 2]
    for _ in range(3):
        scale, rotation, offset = _similarity(some[:, RIGID], reference[RIGID])
        aligned = scale[:, None, None] * some @ rotation.swapaxes(1, 2) + offset[:, None]
        reference = np.median(aligned, axis=0)
    across = reference[263] - reference[33]
    down = reference[ROW_CHIN] - reference[ROW_FOREHEAD]
    x = across / np.linalg.norm(across)
    y = down - x * (down @ x)
    y /= np.linalg.norm(y)
    reference = (reference - reference[RIGID].mean(0)) @ np.stack([x, y, np.cross(x, y)]).T
    shape, height = reference[RIGID], float(np.linalg.norm(reference[ROW_CHIN] - reference[ROW_FOREHEAD]))
    focal = FOCAL_PRIOR * size
    scale, rotation, offset = _similarity(np.broadcast_to(shape, points.shape), points)
    translation = np.concatenate([offset[:, :2] - centre, np.full((len(points), 1), focal)], 1) / scale[:, None]
    return _Fit(rotation, translation, shape, float(np.log(focal)), centre), height


def _similarity(source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales [T], rotations [T, 3, 3], offsets [T, 3] with target = s R source + o in least squares (Umeyama)."""
    target = np.broadcast_to(target, source.shape)
    a, b = source - source.mean(1, keepdims=True), target - target.mean(1, keepdims=True)
    u, _, vt = np.linalg.svd(b.swapaxes(1, 2) @ a)
    u[:, :, 2] *= np.sign(np.linalg.det(u @ vt))[:, None]
    rotation = u @ vt
    scale = np.einsum("tij,tij->t", b, a @ rotation.swapaxes(1, 2)) / (a**2).sum((1, 2))
    moved = scale[:, None] * (rotation @ source.mean(1)[..., None])[..., 0]
    return scale, rotation, target.mean(1) - moved


def _jacobians(fit: _Fit) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pixels [T, L, 2] and their derivatives by pose (turn, shift) [T, L, 2, 6], point [T, L, 2, 3], log focal."""
    pixels, turned, points = fit.project()
    focal, (x, y, z) = np.exp(fit.log_focal), np.moveaxis(points, -1, 0)
    by_point = np.zeros((*x.shape, 2, 3))
    by_point[..., 0, 0] = by_point[..., 1, 1] = focal / z
    by_point[..., 0, 2], by_point[..., 1, 2] = -focal * x / z**2, -focal * y / z**2
    by_turn = np.cross(turned[..., None, :], by_point)  # d(w x p) = -[p]x w, so rows become p x row
    by_shape = (by_point.reshape(len(x), -1, 3) @ fit.rotation).reshape(by_point.shape)
    return pixels, np.concatenate([by_turn, by_point], -1), by_shape, pixels - fit.centre


def _robust(residual: np.ndarray, weights: np.ndarray, size: int) -> np.ndarray:
    """Weights [T, L]: the landmark's own, less for outliers (Huber)."""
    limit = HUBER * size / 512
    return weights * np.minimum(1.0, limit / np.maximum(np.linalg.norm(residual, axis=-1), 1e-9))


def _adjust(fit: _Fit, target: np.ndarray, weights: np.ndarray, size: int, height: float) -> np.ndarray:
    """Gauss-Newton on shape, focal length and poses; returns landmark weights by their own scatter."""
    start, count, frames = fit.shape.copy(), 3 * len(fit.shape), len(target)
    prior = np.append(np.full(count, frames * (SHAPE_SIGMA * height) ** -2.0), frames / FOCAL_SIGMA**2)
    for _ in range(4):
        pixels, by_pose, by_shape, by_focal = _jacobians(fit)
        root = np.sqrt(_robust(target - pixels, weights, size))[..., None]
        right = root * (target - pixels)
        hessian, gradient = _shape_equations(root[..., None] * by_shape, root * by_focal, right)
        hessian[np.diag_indices(count + 1)] += prior
        gradient += prior * np.append((start - fit.shape).ravel(), np.log(FOCAL_PRIOR * size) - fit.log_focal)
        own, cross, pose_right = _pose_equations(
            root[..., None] * by_pose, root[..., None] * by_shape, root * by_focal, right
        )
        # Schur complement: each frame's pose depends only on shape and focal length.
        # (An inverse of 6x6 blocks: solving for wide right sides would start LAPACK's threads once a frame.)
        solved = np.linalg.inv(own) @ np.concatenate([cross, pose_right], -1)
        reduced = hessian - np.tensordot(cross, solved[..., :-1], ([0, 1], [0, 1]))
        change = np.linalg.solve(reduced, gradient - np.tensordot(cross, solved[..., -1], ([0, 1], [0, 1])))
        _move(fit, solved[..., -1] - solved[..., :-1] @ change)
        fit.shape = fit.shape + change[:count].reshape(-1, 3)
        fit.log_focal = float(fit.log_focal + np.clip(change[-1], -0.3, 0.3))
    scatter = np.sqrt(np.median(((target - fit.project()[0]) ** 2).sum(-1), axis=0))
    return (np.median(scatter) / np.maximum(scatter, 0.3 * np.median(scatter))) ** 2


def _shape_equations(shape: np.ndarray, focal: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normal equations [3L+1, 3L+1], [3L+1] of all points and the focal length, which share no pose."""
    frames, points = shape.shape[:2]
    count = 3 * points
    rows = shape.swapaxes(0, 1).reshape(points, -1, 3).swapaxes(1, 2)  # [L, 3, 2T]
    columns = np.stack([focal, right], -1).swapaxes(0, 1).reshape(points, 2 * frames, 2)
    hessian = np.zeros((points, 3, points, 3))
    hessian[np.arange(points), :, np.arange(points)] = rows @ rows.swapaxes(1, 2)
    mixed = (rows @ columns).reshape(count, 2)
    full = np.zeros((count + 1, count + 1))
    full[:count, :count] = hessian.reshape(count, count)
    full[:count, count] = full[count, :count] = mixed[:, 0]
    full[count, count] = (focal**2).sum()
    return full, np.append(mixed[:, 1], (focal * right).sum())


def _pose_equations(pose: np.ndarray, shape: np.ndarray, focal: np.ndarray, right: np.ndarray):
    """Per frame: normal matrix [T, 6, 6], coupling to points and focal length [T, 6, 3L+1], right side [T, 6, 1]."""
    frames = len(pose)
    flat = pose.reshape(frames, -1, 6).swapaxes(1, 2)
    columns, rows = pose[..., None], shape[:, :, :, None]
    both = columns[:, :, 0] * rows[:, :, 0] + columns[:, :, 1] * rows[:, :, 1]  # [T, L, 6, 3]
    cross = [both.swapaxes(1, 2).reshape(frames, 6, -1), flat @ focal.reshape(frames, -1, 1)]
    own = flat @ flat.swapaxes(1, 2) + 1e-9 * np.eye(6)
    return own, np.concatenate(cross, -1), flat @ right.reshape(frames, -1, 1)


def _step_poses(fit: _Fit, target: np.ndarray, weights: np.ndarray, size: int) -> np.ndarray:
    """One Gauss-Newton step of every pose alone; returns the normal matrices [T, 6, 6]."""
    pixels, by_pose, _, _ = _jacobians(fit)
    residual = target - pixels
    weight = _robust(residual, weights, size)
    flat = by_pose.reshape(len(target), -1, 6)
    weighted = (by_pose * weight[..., None, None]).reshape(flat.shape).swapaxes(1, 2)
    own = weighted @ flat + 1e-9 * np.eye(6)
    _move(fit, (np.linalg.inv(own) @ (weighted @ residual.reshape(len(target), -1, 1)))[..., 0])
    return own


def _move(fit: _Fit, change: np.ndarray) -> None:
    fit.rotation = Rotation.from_rotvec(change[:, :3]).as_matrix() @ fit.rotation
    fit.translation = fit.translation + change[:, 3:]


def _error(fit: _Fit, target: np.ndarray, weights: np.ndarray) -> float:
    squared = ((fit.project()[0] - target) ** 2).sum(-1)
    return float(np.sqrt((squared * weights).sum() / (len(target) * weights.sum())))


def _smooth(fit: _Fit, target: np.ndarray, weights: np.ndarray, size: int, times: np.ndarray):
    """The strongest smoothing that raises the re-projection error by no more than MAX_RISE.

    Minimises sum_t |p_t - raw_t|^2 in the metric of the frame's normal matrix (so that what the landmarks hardly
    determine, depth above all, is smoothed most) + strength * sum_t |second difference in time|^2.
    """
    information = _step_poses(fit, target, weights, size)
    raw = _error(fit, target, weights)
    best = (fit, raw, raw, 0.0)
    for frames in (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0):
        smooth = _smoothed(fit, information, times, frames)
        error = _error(smooth, target, weights)
        if error > MAX_RISE * raw:
            break
        best = (smooth, raw, error, frames)
    return best


def _smoothed(fit: _Fit, information: np.ndarray, times: np.ndarray, frames: float) -> _Fit:
    count = len(times)
    if count < 5:
        return fit
    mean = Rotation.from_matrix(fit.rotation).mean()
    turns = (Rotation.from_matrix(fit.rotation) * mean.inv()).as_rotvec()
    track = np.concatenate([turns, fit.translation], -1)
    unit = np.diag(np.median(information, 0)) ** -0.5
    scaled = information * unit[:, None] * unit  # unit diagonal in the median frame
    rows, raw = _second_differences(times), track / unit
    loose, smooth = np.ones(count - 2), raw
    for _ in range(6):
        smooth = _penalised(scaled, raw, rows, frames**4 * loose)
        bend = np.linalg.norm(sum(rows[:, k : k + 1] * smooth[k : count - 2 + k] for k in range(3)), axis=-1)
        loose = 1.0 / (1.0 + (bend / (KNEE * np.median(bend) + 1e-12)) ** 2)
    smooth = smooth * unit
    rotation = (Rotation.from_rotvec(smooth[:, :3]) * mean).as_matrix()
    return dataclasses.replace(fit, rotation=rotation, translation=smooth[:, 3:])


def _penalised(metric: np.ndarray, raw: np.ndarray, rows: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Minimises sum_t |p_t - raw_t|^2 in `metric` [T, 6, 6] + sum_t strength_t |rows_t . (p_t, p_t+1, p_t+2)|^2."""
    count = len(raw)
    band = np.zeros((18, count, 6))  # upper banded form: entry (i, j) at [17 + i - j, j]
    for a in range(6):
        for b in range(a, 6):
            band[17 + a - b, :, b] = metric[:, a, b]
    for i in range(3):
        for j in range(i, 3):
            band[17 + 6 * (i - j), j : count - 2 + j] += (strength * rows[:, i] * rows[:, j])[:, None]
    right = np.einsum("tab,tb->ta", metric, raw)
    return solveh_banded(band.reshape(18, -1), right.ravel()).reshape(count, 6)


def _second_differences(times: np.ndarray) -> np.ndarray:
    """Coefficients [T-2, 3] of the second derivative at uneven times, in units of the median step."""
    steps = np.maximum(np.diff(times) / np.median(np.diff(times)), 0.2)
    a, b = steps[:-1], steps[1:]
    return np.stack([2 / (a * (a + b)), -2 / (a * b), 2 / (b * (a + b))], -1)


def _poses(fit: _Fit, height: float, times: np.ndarray, found: np.ndarray, raw: float, error: float, frames: float):
    """World axes and units; frames without a face between their neighbours."""
    scale = FACE_HEIGHT / height
    flip = np.diag([1.0, -1.0, -1.0])
    rotation = Rotation.from_matrix(fit.rotation @ flip)
    full = _interpolate(rotation, times[found], times)
    translation = np.stack([np.interp(times, times[found], v) for v in fit.translation.T], -1) * scale
    viewmats = np.tile(np.eye(4, dtype=np.float32), (len(times), 1, 1))
    viewmats[:, :3, :3], viewmats[:, :3, 3] = full.as_matrix(), translation
    focal = np.exp(fit.log_focal)
    intrinsics = np.array([focal, focal, *fit.centre], np.float32)
    return Poses(viewmats, intrinsics, (fit.shape @ flip * scale).astype(np.float32), raw, error, frames)


def _interpolate(rotation: Rotation, known: np.ndarray, times: np.ndarray) -> Rotation:
    from scipy.spatial.transform import Slerp

    if len(known) == 1:
        return Rotation.from_matrix(np.repeat(rotation.as_matrix(), len(times), 0))
    return Slerp(known, rotation)(np.clip(times, known[0], known[-1]))


def recentre(poses: Poses, origin: np.ndarray, scale: float) -> Poses:
    """The same cameras in a world whose origin is at `origin` [3] of the old one and whose unit is 1/scale of it."""
    viewmats = poses.viewmats.copy()
    viewmats[:, :3, 3] = (viewmats[:, :3, 3] + viewmats[:, :3, :3] @ origin) * scale
    shape = ((poses.shape - origin) * scale).astype(np.float32)
    return dataclasses.replace(poses, viewmats=viewmats.astype(np.float32), shape=shape)
