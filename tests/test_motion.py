"""The motion networks against their printed equations, written out one Gaussian at a time in numpy.

The modules multiply small matrices together before they meet the Gaussians and hold the points on the last axis; the
oracle does neither.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fg3dgs_jax.model import motion
from fg3dgs_jax.model.hashgrid import GridSpec, encode
from fg3dgs_jax.types import Condition

GRID = GridSpec(levels=3, min_resolution=4, max_resolution=12)
AUDIO = (16, 5)
EXPRESSION = 6
POINTS = 24

PATHS = {
    "audio": r"audio/(conv[0-3]|linear[01]|attention/(conv[0-4]|linear))/(kernel|bias)",
    "expression": r"expression/layer[01]/(kernel|bias)",
    "cross": r"attention/((query|key|value|output)/kernel|positions)"
    r"|(gate|ffn1|ffn2)/layer[01]/kernel|deform/layer0/kernel",
}
PARTS = {
    "face": [
        PATHS["audio"],
        PATHS["expression"],
        r"attend_(audio|expression)/layer[01]/kernel|deform/layer[012]/kernel",
    ],
    "cross_audio": [PATHS["audio"], PATHS["cross"]],
    "cross_expression": [PATHS["expression"], PATHS["cross"], r"embed/(kernel|bias)"],
    "mouth_mlp": [PATHS["audio"], r"deform/layer[012]/kernel"],
    "eyes_mlp": [PATHS["expression"], r"deform/layer[012]/kernel"],
}
COUNTS = {
    "face": 1 + 24 + 4 + 4 + 3,
    "cross_audio": 1 + 24 + 12,
    "cross_expression": 1 + 4 + 2 + 12,
    "mouth_mlp": 1 + 24 + 3,
    "eyes_mlp": 1 + 4 + 3,
}


def build(kind, audio_shape=AUDIO):
    def create():
        return motion.create(kind, GRID, audio_shape, EXPRESSION, rngs=nnx.Rngs(0))

    graph, _ = nnx.split(nnx.eval_shape(create))
    return graph, jax.jit(lambda: nnx.to_pure_dict(nnx.state(create())))()


def scene(seed=0, audio_shape=AUDIO, count=POINTS):
    rng = np.random.default_rng(seed)
    condition = Condition(
        jnp.asarray(rng.normal(size=(8, *audio_shape)), jnp.float32),
        jnp.asarray(rng.normal(size=(8, EXPRESSION)), jnp.float32),
    )
    return jnp.asarray(rng.uniform(-0.15, 0.15, (count, 3)), jnp.float32), condition


def trained(params, seed=1):
    """Weights as they might be after training: everything of order one, the grid included."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    new = [jnp.asarray(rng.normal(size=x.shape) / max(1, np.sqrt(np.prod(x.shape[:-1]))), jnp.float32) for x in leaves]
    params = jax.tree.unflatten(tree, new)
    params["grid"]["tables"] = jnp.asarray(rng.normal(size=params["grid"]["tables"].shape), jnp.float32)
    return params


def runner(graph):
    return jax.jit(lambda params, means, condition: nnx.merge(graph, params)(means, condition))


def differentiator(graph):
    """Gradients for parameters and means of a random combination of all outputs, aux too; compiled once a kind."""

    def loss(params, means, condition, key):
        leaves = jax.tree.leaves(nnx.merge(graph, params)(means, condition))
        keys = jax.random.split(key, len(leaves))
        return sum(jnp.sum(x * jax.random.normal(k, x.shape)) for x, k in zip(leaves, keys, strict=True))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def names(params):
    return ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]


@pytest.fixture(scope="module", params=motion.KINDS)
def net(request):
    graph, params = build(request.param)
    return request.param, params, runner(graph), differentiator(graph)


def test_paths_are_those_that_optimizers_match(net):
    kind, params, _, _ = net
    found = names(params)
    assert len(found) == COUNTS[kind]
    for path in found:
        assert path == "grid/tables" or any(re.fullmatch(part, path) for part in PARTS[kind]), path


def test_motion_starts_near_zero(net):
    _, params, run, _ = net
    deltas, _ = run(params, *scene())
    # A pixel of a 512-pixel head is about 6e-4 world units; rotations and log-scales of 1e-3 move even less.
    assert float(jnp.abs(deltas.means).max()) < 6e-4
    for more in (deltas.quats, deltas.log_scales):
        assert more is None or float(jnp.abs(more).max()) < 1e-3


def test_shapes_and_equivariance_over_gaussians(net):
    kind, params, run, _ = net
    means, condition = scene()
    order = np.random.default_rng(3).permutation(POINTS)
    deltas, aux = run(trained(params), means, condition)
    shuffled, _ = run(trained(params), means[order], condition)
    assert deltas.means.shape == (POINTS, 3)
    if kind == "face":
        assert deltas.quats.shape == (POINTS, 4) and deltas.log_scales.shape == (POINTS, 3)
        assert aux["audio_attention"].shape == aux["expression_attention"].shape == (POINTS,)
    else:
        assert deltas.quats is None and deltas.log_scales is None
    for a, b in zip(jax.tree.leaves(deltas), jax.tree.leaves(shuffled), strict=True):
        # Blocks of a matrix product may add in another order: some roundings of outputs up to order ten.
        np.testing.assert_allclose(a[order], b, atol=1e-5 * max(1.0, float(jnp.abs(a).max())))


def test_every_parameter_learns_from_the_first_step(net):
    """No zero-gradient trap: neither at the start nor after a step is any parameter's gradient zero or not finite."""
    _, params, _, differentiate = net
    for step in range(2):
        grads, _ = differentiate(params, *scene(), jax.random.key(step))
        for path, grad in zip(names(grads), jax.tree.leaves(grads), strict=True):
            assert np.all(np.isfinite(grad)), (step, path)
            assert np.any(np.asarray(grad) != 0), (step, path)
        params = jax.tree.map(lambda p, g: p - 1e-3 * jnp.sign(g), params, grads)


def test_means_are_constants(net):
    _, params, _, differentiate = net
    assert not np.any(differentiate(trained(params), *scene(), jax.random.key(0))[1])


def test_hostile_conditions_stay_finite(net):
    _, params, run, differentiate = net
    means, condition = scene()
    for scale in (0.0, 1e4):
        loud = jax.tree.map(lambda x, s=scale: x * s, condition)
        results = run(params, means, loud), differentiate(params, means, loud, jax.random.key(0))
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(results))


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="face, cross_audio"):
        motion.create("torso", GRID, AUDIO, EXPRESSION, rngs=nnx.Rngs(0))


def relu(x):
    return np.maximum(x, 0)


def leaky(x):
    return np.where(x > 0, x, 0.02 * x)


def conv(params, x, stride):
    """Kernel 3, padding 1: x [length, in] -> [ceil(length / stride), out]."""
    kernel, bias = (np.asarray(params[k], np.float64) for k in ("kernel", "bias"))
    padded = np.concatenate([np.zeros((1, x.shape[1])), x, np.zeros((1, x.shape[1]))])
    return np.stack([sum(padded[t + k] @ kernel[k] for k in range(3)) + bias for t in range(0, len(x), stride)])


def linear(params, x):
    return x @ np.asarray(params["kernel"], np.float64) + np.asarray(params.get("bias", 0.0), np.float64)


def mlp(params, x):
    for i in range(len(params)):
        x = linear(params[f"layer{i}"], x if i == 0 else relu(x))
    return x


def audio_encoder(params, audio):
    tokens = []
    for window in np.asarray(audio, np.float64):
        for i in range(4):
            window = leaky(conv(params[f"conv{i}"], window, 2))
        tokens.append(linear(params["linear1"], leaky(linear(params["linear0"], window.mean(0)))))
    tokens = np.stack(tokens)
    x = tokens
    for i in range(5):
        x = leaky(conv(params["attention"][f"conv{i}"], x, 1))
    weights = np.exp(linear(params["attention"]["linear"], x[:, 0]))
    return tokens, (weights / weights.sum()) @ tokens


def expression_encoder(params, expression):
    x = np.asarray(expression, np.float64)
    return x + linear(params["layer1"], relu(linear(params["layer0"], x)))


def face_oracle(params, h, condition):
    f_a, f_e = (
        audio_encoder(params["audio"], condition.audio)[1],
        expression_encoder(params["expression"], condition.expression)[4],
    )
    s_a, s_e = mlp(params["attend_audio"], h), relu(mlp(params["attend_expression"], h))
    out = mlp(params["deform"], np.concatenate([h, s_a * f_a, s_e * f_e]))
    return np.concatenate([0.01 * out[:3], out[3:]]), np.linalg.norm(s_a), np.linalg.norm(s_e)


def cross_oracle(params, h, condition):
    if "audio" in params:
        tokens, f_r = audio_encoder(params["audio"], condition.audio)
    else:
        tokens = linear(params["embed"], expression_encoder(params["expression"], condition.expression))
        f_r = tokens[4]
    weights = params["attention"]
    place = np.asarray(weights["positions"], np.float64)
    query, key, value = (
        linear(weights["query"], h),
        linear(weights["key"], tokens) + place,
        linear(weights["value"], tokens) + place,
    )
    heads = []
    for c in range(0, 32, 8):  # four heads of eight
        score = np.exp(key[:, c : c + 8] @ query[c : c + 8] / np.sqrt(8))
        heads.append((score / score.sum()) @ value[:, c : c + 8])
    gate = 1 / (1 + np.exp(-mlp(params["gate"], f_r)[0]))
    z = gate * linear(weights["output"], np.concatenate(heads))
    z2 = mlp(params["ffn2"], mlp(params["ffn1"], f_r + z) + z)
    return 0.01 * mlp(params["deform"], z2), gate


def mouth_oracle(params, h, condition):
    out = mlp(params["deform"], np.concatenate([h, audio_encoder(params["audio"], condition.audio)[1]]))
    return 0.01 * out * [0.2, 1, 0.2]


def eyes_oracle(params, h, condition):
    seen = expression_encoder(params["expression"], condition.expression)[4]
    return 0.01 * mlp(params["deform"], np.concatenate([h, seen]))


def test_each_network_equals_its_equations(net):
    kind, params, run, _ = net
    params = trained(params)
    means, condition = scene()
    deltas, aux = run(params, means, condition)
    got = np.concatenate([np.asarray(x) for x in jax.tree.leaves(deltas)], axis=-1)
    spatial = np.asarray(encode(params["grid"]["tables"], means, GRID), np.float64)
    if kind == "face":
        rows = [face_oracle(params, h, condition) for h in spatial]
        np.testing.assert_allclose(aux["audio_attention"], [r[1] for r in rows], rtol=1e-4)
        np.testing.assert_allclose(aux["expression_attention"], [r[2] for r in rows], rtol=1e-4, atol=1e-5)
        want = np.stack([r[0] for r in rows])
    elif kind in ("mouth_mlp", "eyes_mlp"):
        oracle = mouth_oracle if kind == "mouth_mlp" else eyes_oracle
        want = np.stack([oracle(params, h, condition) for h in spatial])
    else:
        rows = [cross_oracle(params, h, condition) for h in spatial]
        np.testing.assert_allclose(aux["gate"], rows[0][1], rtol=1e-5)
        assert aux["gate"].shape == () and all(r[1] == rows[0][1] for r in rows)  # one gate a frame
        want = np.stack([r[0] for r in rows])
    # float32 against float64 through some ten layers of random weights: a few 1e-6 of the largest value.
    np.testing.assert_allclose(got, want, atol=3e-5 * np.abs(want).max())
    assert np.all(want.std(0) > 0)


@pytest.mark.parametrize("audio_shape", [(2, 40), (21, 3)])
def test_any_audio_window(audio_shape):
    """Windows of odd length too: their last step is heard."""
    graph, params = build("mouth_mlp", audio_shape)
    params = trained(params)
    means, condition = scene(audio_shape=audio_shape)
    deltas, _ = runner(graph)(params, means, condition)
    spatial = np.asarray(encode(params["grid"]["tables"], means, GRID), np.float64)
    want = np.stack([mouth_oracle(params, h, condition) for h in spatial])
    np.testing.assert_allclose(deltas.means, want, atol=3e-5 * np.abs(want).max())  # as for each network above


def test_the_order_of_the_tokens_matters(net):
    kind, params, run, _ = net
    params = trained(params)
    means, condition = scene()
    order = np.array([1, 0, 2, 3, 4, 6, 5, 7])  # the current frame, token 4, stays
    swapped = jax.tree.map(lambda x: x[order], condition)
    a, b = run(params, means, condition)[0].means, run(params, means, swapped)[0].means
    if kind == "eyes_mlp":  # a perceptron sees the current frame alone
        np.testing.assert_array_equal(a, b)
    else:
        assert float(jnp.abs(a - b).max()) > 1e-3 * float(jnp.abs(a).max())


def test_face_sees_only_the_current_expression_and_nothing_beyond_its_grid():
    graph, params = build("face")
    params, run = trained(params), runner(graph)
    means, condition = scene()
    other = condition.replace(expression=condition.expression.at[jnp.array([0, 1, 2, 3, 5, 6, 7])].set(9.0))
    a, b = run(params, means, condition)[0], run(params, means, other)[0]
    np.testing.assert_array_equal(a.means, b.means)
    blink = condition.replace(expression=condition.expression.at[4, 2].add(1.0))
    assert np.any(run(params, means, blink)[0].means != a.means)
    far = run(params, means + 1.0, condition)[0]  # without biases, no spatial features: no motion
    assert not any(np.any(x) for x in jax.tree.leaves(far))
