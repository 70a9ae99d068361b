"""LPIPS against the `lpips` package on the same random weights, where PyTorch is there, and what needs no oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fg3dgs_jax.data import foreign_weights
from fg3dgs_jax.losses import lpips

NETS = sorted(lpips.NETS)
EDGE = 40


def random_judge(net: str, seed: int = 0) -> lpips.Lpips:
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, shape in lpips.shapes(net).items():
        scale = np.sqrt(2.0 / np.prod(shape[:-1])) if name.endswith("kernel") else 0.1
        arrays[name] = (scale * rng.standard_normal(shape)).astype(np.float32)
    arrays |= {name: np.abs(value) for name, value in arrays.items() if name.startswith("linear")}
    return lpips.create(net, arrays)


def pair(shape=(2, EDGE, EDGE + 7, 3), seed=1):
    rng = np.random.default_rng(seed)
    a = rng.random(shape, np.float32)
    return a, np.clip(a + 0.2 * rng.standard_normal(shape), 0, 1).astype(np.float32)


@pytest.mark.filterwarnings("ignore:.*since 0.13.*:UserWarning")  # how lpips calls torchvision
@pytest.mark.parametrize("net", NETS)
def test_parity_with_the_lpips_package(net):
    reason = "PyTorch and lpips are not installed (CONTRIBUTING.md, parity tests)"
    torch = pytest.importorskip("torch", reason=reason)
    package = pytest.importorskip("lpips", reason=reason)
    torch.manual_seed(0)
    theirs = package.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False).eval()
    for linear in theirs.lins:
        torch.nn.init.uniform_(linear.model[1].weight, 0.0, 1.0)
    # Through the converter: backbone under torchvision's names, linear layers under the package's.
    layers = torch.nn.Sequential()
    for part in theirs.net.children():
        for name, layer in part.named_children():
            layers.add_module(name, layer)
    arrays = {f"features.{name}": value.numpy() for name, value in layers.state_dict().items()}
    linears = {f"lin{i}.model.1.weight": lin.model[1].weight.detach().numpy() for i, lin in enumerate(theirs.lins)}
    found, named = foreign_weights.lpips(arrays | linears)
    assert found == net
    judge = lpips.create(net, named)
    a, b = pair()
    cotangent = np.float32([0.7, -1.3])
    left = torch.tensor(a.transpose(0, 3, 1, 2), requires_grad=True)
    value = theirs(left, torch.tensor(b.transpose(0, 3, 1, 2)), normalize=True)[:, 0, 0, 0]
    value.backward(torch.tensor(cotangent))
    ours, pull = jax.vjp(lambda x: lpips.distance(judge, x, jnp.asarray(b)), jnp.asarray(a))
    # float32 convolutions sum up to 4,608 products in another order.
    np.testing.assert_allclose(ours, value.detach().numpy(), rtol=1e-4, atol=1e-6)
    expected = left.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(pull(jnp.asarray(cotangent))[0], expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("net", ["alex", "vgg"])  # squeezenet's last windows may reach beyond the border
def test_smallest_edge_is_the_smallest(net):
    judge, edge = random_judge(net), lpips.MIN_EDGE[net]
    last = jax.eval_shape(lambda x: lpips.features(judge, x), jnp.zeros((1, edge, edge, 3)))[-1]
    assert last.shape[1:3] == (1, 1)
    smaller = jax.eval_shape(lambda x: lpips.features(judge, x), jnp.zeros((1, edge - 1, edge - 1, 3)))[-1]
    assert 0 in smaller.shape


def test_a_region_below_the_smallest_edge_is_padded():
    judge = random_judge("alex")
    a, b = pair((1, 12, 20, 3))
    value, gradient = jax.jit(jax.value_and_grad(lambda x: lpips.distance(judge, x, b).sum()))(a)
    assert float(value) > 0 and np.isfinite(gradient).all() and float(jnp.abs(gradient).max()) > 0


def test_equal_images_have_no_distance_and_finite_gradient():
    judge = random_judge("alex")
    differentiate = jax.jit(jax.value_and_grad(lambda x, y: lpips.distance(judge, x, y).sum()))
    random = pair()[0]
    for image in (random, np.zeros_like(random)):
        value, gradient = differentiate(image, image)
        assert float(value) < 1e-10 and np.isfinite(gradient).all()  # convolutions of threads may round differently


def test_features_that_are_all_zero_have_a_finite_gradient():
    judge = random_judge("alex")
    dead = judge.replace(convs=tuple((k * 0, b * 0) for k, b in judge.convs))
    a, b = pair()
    assert np.isfinite(jax.jit(jax.grad(lambda x: lpips.distance(dead, x, b).sum()))(a)).all()


def test_patches_lie_on_the_head_and_follow_the_key():
    judge = random_judge("alex")
    a, b = (x[0] for x in pair((1, 96, 96, 3)))
    head = np.zeros((96, 96), np.float32)
    head[60:70, 20:30] = 1

    def loss(x, key):
        return lpips.patches(judge, x, jnp.asarray(b), jnp.asarray(head), key, 3, 32)

    grad = jax.jit(jax.value_and_grad(loss))
    values, gradients = zip(*(grad(jnp.asarray(a), jax.random.key(i)) for i in (0, 0, 1)), strict=True)
    assert float(values[0]) == float(values[1]) != float(values[2])
    touched = np.abs(np.asarray(gradients[0])).max(-1) > 0
    rows, cols = np.nonzero(touched)
    assert rows.min() >= 60 - 16 and rows.max() < 70 + 16 and cols.min() >= 20 - 16 and cols.max() < 30 + 16
    patches = jax.jit(lpips.patches, static_argnums=(5, 6))
    small = patches(judge, a[:20, :24], b[:20, :24], head[:20, :24], jax.random.key(0), 2, 64)
    assert np.isfinite(float(small))


def test_wrong_arrays_are_named():
    arrays = {name: np.zeros(shape, np.float32) for name, shape in lpips.shapes("alex").items()}
    with pytest.raises(ValueError, match=r"conv2\.bias has the shape nothing where"):
        lpips.create("alex", {name: value for name, value in arrays.items() if name != "conv2.bias"})
    with pytest.raises(ValueError, match=r"linear1 has the shape \(3,\)"):
        lpips.create("alex", arrays | {"linear1": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="'resnet' is none of"):
        lpips.create("resnet", arrays)
