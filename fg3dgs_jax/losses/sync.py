"""The lip-sync expert (Wav2Lip's discriminator, Prajwal et al. 2020): do five frames of a mouth fit 0.2 s of sound?

Two convolutional branches end in one vector each; the cosine between them is the probability of being in sync. L_lip of
FG Eq. 16 is its binary cross-entropy. `width` scales all channels: 1 is the published network.
"""

import functools
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fg3dgs_jax.losses.lpips import check_shapes

FRAMES = 5  # consecutive, at 25 FPS
CROP = 96  # pixels: edge of the face before its upper half is cut off
TINY = 1e-6

# (channels, kernel, strides, padding, residual) of each layer; kernel and strides as (height, width).
_SAME = (3, (1, 1), 1)
FACE = (
    (32, 7, (1, 1), 3, False), (64, 5, (1, 2), 1, False), *((64, *_SAME, True),) * 2,
    (128, 3, (2, 2), 1, False), *((128, *_SAME, True),) * 3,
    (256, 3, (2, 2), 1, False), *((256, *_SAME, True),) * 2,
    (512, 3, (2, 2), 1, False), *((512, *_SAME, True),) * 2,
    (512, 3, (2, 2), 1, False), (512, 3, (1, 1), 0, False), (512, 1, (1, 1), 0, False),
)  # fmt: skip
AUDIO = (
    (32, *_SAME, False), *((32, *_SAME, True),) * 2,
    (64, 3, (3, 1), 1, False), *((64, *_SAME, True),) * 2,
    (128, 3, (3, 3), 1, False), *((128, *_SAME, True),) * 2,
    (256, 3, (3, 2), 1, False), *((256, *_SAME, True),) * 2,
    (512, 3, (1, 1), 0, False), (512, 1, (1, 1), 0, False),
)  # fmt: skip


class Layer(nnx.Module):
    """Convolution, batch normalisation, the input again where `residual`, ReLU."""

    def __init__(self, size_in, size_out, kernel, strides, padding, residual, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            size_in, size_out, (kernel, kernel), strides, padding=((padding, padding),) * 2, rngs=rngs
        )  # fmt: skip
        self.norm = nnx.BatchNorm(size_out, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.residual = residual

    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        y = self.norm(self.conv(x), use_running_average=not training)
        return jax.nn.relu(y + x if self.residual else y)


class SyncExpert(nnx.Module):
    """Both branches. Vectors have unit length and no negative entries, so that their cosine lies in [0, 1]."""

    def __init__(self, width: float = 1.0, *, rngs: nnx.Rngs):
        self.face = nnx.List(_branch(3 * FRAMES, FACE, width, rngs))
        self.audio = nnx.List(_branch(1, AUDIO, width, rngs))

    def see(self, crops: jax.Array, training: bool = False) -> jax.Array:
        """Lower faces f32 [B, 5, 48, 96, 3] RGB in [0, 1] -> [B, D]. The network itself sees blue first."""
        batch, _, height, breadth, _ = crops.shape
        x = crops[..., ::-1].transpose(0, 2, 3, 1, 4).reshape(batch, height, breadth, 3 * FRAMES)
        return _vector(self.face, x, training)

    def hear(self, mel: jax.Array, training: bool = False) -> jax.Array:
        """Mel windows f32 [B, 80, 16] as `data.mel` makes them -> [B, D]."""
        return _vector(self.audio, mel[..., None], training)


def _branch(size_in: int, rows: tuple, width: float, rngs: nnx.Rngs) -> list[Layer]:
    layers = []
    for channels, *rest in rows:
        size_out = max(1, round(channels * width))
        layers.append(Layer(size_in, size_out, *rest, rngs=rngs))
        size_in = size_out
    return layers


def _vector(layers: nnx.List, x: jax.Array, training: bool) -> jax.Array:
    for layer in layers:
        x = layer(x, training)
    x = x.reshape(x.shape[0], -1)
    return x / jnp.sqrt((x * x).sum(-1, keepdims=True) + TINY**2)


@flax.struct.dataclass
class Sync:
    """A frozen expert: its structure and its arrays."""

    graph: nnx.GraphDef = flax.struct.field(pytree_node=False)
    state: dict

    def see(self, crops: jax.Array) -> jax.Array:
        """`SyncExpert.see` with running statistics."""
        return nnx.merge(self.graph, self.state).see(crops)

    def hear(self, mel: jax.Array) -> jax.Array:
        """`SyncExpert.hear` with running statistics."""
        return nnx.merge(self.graph, self.state).hear(mel)


@functools.cache
def structure(width: float) -> tuple[nnx.GraphDef, dict]:
    """Graph and shapes of an expert; nothing is computed."""
    graph, state = nnx.split(nnx.eval_shape(lambda: SyncExpert(width, rngs=nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def flat(state: Mapping) -> dict[str, jax.Array]:
    """Nested arrays by dotted name: `face.0.conv.kernel`."""
    leaves = jax.tree_util.tree_flatten_with_path(dict(state))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def create(arrays: Mapping[str, np.ndarray]) -> Sync:
    """An expert from its arrays, whose first kernel tells its width. Raises ValueError, naming a wrong array."""
    first = arrays.get("face.0.conv.kernel")
    if first is None or first.ndim != 4:
        raise ValueError("face.0.conv.kernel is missing")
    graph, shapes = structure(first.shape[-1] / FACE[0][0])
    check_shapes({name: leaf.shape for name, leaf in flat(shapes).items()}, arrays)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    return Sync(graph, treedef.unflatten([jnp.asarray(arrays[name]) for name in names]))


def lower_faces(images: jax.Array, boxes: jax.Array, margin: int = 0) -> jax.Array:
    """Crops f32 [T, 48, 96, 3] of images f32 [T, H, W, 3]: boxes f32 [T, 4] (row0, row1, col0, col1) at 96x96 pixels,
    the lower half, with `margin` more pixels on every side. Bilinear and differentiable by the images; black outside.

    Departure: every pixel under a coarser one counts (antialiasing), so that every pixel gets a gradient.
    """

    def one(image: jax.Array, box: jax.Array) -> jax.Array:
        scale = CROP / jnp.stack([box[1] - box[0], box[3] - box[2]])
        shift = margin - scale * jnp.stack([box[0], box[2]]) - jnp.array([CROP // 2, 0.0])
        shape = (CROP // 2 + 2 * margin, CROP + 2 * margin, image.shape[-1])
        return jax.image.scale_and_translate(image, shape, (0, 1), scale, shift, "linear")

    return jax.vmap(one)(images, boxes)


def loss(expert: Sync, images: jax.Array, boxes: jax.Array, mel: jax.Array) -> jax.Array:
    """L_lip (FG Eq. 16) of five consecutive frames f32 [5, H, W, 3] and their sound f32 [80, 16]: -log cosine."""
    crops = lower_faces(jnp.clip(images, 0.0, 1.0), boxes)
    cosine = (expert.see(crops[None]) * expert.hear(mel[None])).sum()
    return -jnp.log(jnp.clip(cosine, TINY, 1.0))
