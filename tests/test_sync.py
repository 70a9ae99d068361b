"""The lip-sync expert and SyncNet against independent definitions in PyTorch, what they hear, crops, and the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from fg3dgs_jax.data import face_box, foreign_weights, mel
from fg3dgs_jax.losses import sync, syncnet

NO_TORCH = "PyTorch is not installed (CONTRIBUTING.md, parity tests)"
RNG = np.random.default_rng(0)


def random_expert(width=0.0625, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, leaf in sync.flat(sync.structure(width)[1]).items():
        scale = np.sqrt(2.0 / np.prod(leaf.shape[:-1])) if name.endswith("kernel") else 0.1
        middle = float(name.endswith(("scale", "var")))
        arrays[name] = (middle + scale * rng.standard_normal(leaf.shape)).astype(np.float32)
    return sync.create(arrays)


def torch_layer(torch, size_in, size_out, kernel, stride, padding, residual):
    """One layer of the discriminator, written down from its description."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_block = torch.nn.Sequential(
                torch.nn.Conv2d(size_in, size_out, kernel, stride, padding), torch.nn.BatchNorm2d(size_out)
            )

        def forward(self, x):
            y = self.conv_block(x)
            return torch.relu(y + x if residual else y)

    return Block()


def torch_expert(torch):
    """Channel, kernel, stride, padding of every layer, spelled out once more: S is a residual layer."""
    face = "15 32 7 1 3/32 64 5 1,2 1/S/S/64 128 3 2 1/S/S/S/128 256 3 2 1/S/S/256 512 3 2 1/S/S/512 512 3 2 1/"
    face += "512 512 3 1 0/512 512 1 1 0"
    audio = "1 32 3 1 1/S/S/32 64 3 3,1 1/S/S/64 128 3 3 1/S/S/128 256 3 3,2 1/S/S/256 512 3 1 0/512 512 1 1 0"

    def branch(text):
        layers, channels = [], None
        for part in text.split("/"):
            if part == "S":
                layers.append(torch_layer(torch, channels, channels, 3, 1, 1, True))
                continue
            size_in, channels, kernel, stride, padding = part.split()
            size_in, channels, kernel, padding = int(size_in), int(channels), int(kernel), int(padding)
            steps = tuple(map(int, stride.split(","))) if "," in stride else int(stride)
            layers.append(torch_layer(torch, size_in, channels, kernel, steps, padding, False))
        return torch.nn.Sequential(*layers)

    return torch.nn.ModuleDict({"face_encoder": branch(face), "audio_encoder": branch(audio)})


def shake(torch, model):
    """Random statistics and scales, so that normalisation counts."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d | torch.nn.BatchNorm3d):
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.normal_(layer.bias, 0.0, 0.1)
            torch.nn.init.normal_(layer.running_mean, 0.0, 0.1)
            torch.nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return model.eval()


def test_expert_parity_with_pytorch():
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    torch.manual_seed(0)
    model = shake(torch, torch_expert(torch))
    arrays = foreign_weights.sync_expert({name: value.numpy() for name, value in model.state_dict().items()})
    expert = sync.create(arrays)
    crops = RNG.random((2, 5, 48, 96, 3), np.float32)
    sound = RNG.uniform(-4, 4, (2, 80, 16)).astype(np.float32)
    stacked = torch.tensor(crops[..., ::-1].transpose(0, 1, 4, 2, 3).reshape(2, 15, 48, 96).copy(), requires_grad=True)
    face = torch.nn.functional.normalize(model["face_encoder"](stacked).flatten(1))
    voice = torch.nn.functional.normalize(model["audio_encoder"](torch.tensor(sound)[:, None]).flatten(1))
    cosine = (face * voice).sum(1)
    cosine.backward(torch.tensor([0.3, -1.1]))
    # float32 sums of up to 4,608 products in another order.
    ours, pull = jax.vjp(lambda x: (expert.see(x) * expert.hear(jnp.asarray(sound))).sum(1), jnp.asarray(crops))
    np.testing.assert_allclose(expert.see(jnp.asarray(crops)), face.detach(), atol=1e-4)
    np.testing.assert_allclose(ours, cosine.detach(), atol=1e-4)
    gradient = stacked.grad.numpy().reshape(2, 5, 3, 48, 96).transpose(0, 1, 3, 4, 2)[..., ::-1]
    found = np.asarray(pull(jnp.float32([0.3, -1.1]))[0])
    np.testing.assert_allclose(found, gradient, atol=1e-3 * np.abs(gradient).max())


def torch_syncnet(torch):
    """SyncNet's two branches, spelled out from its description."""
    n = torch.nn

    def conv(kind, norm, *rest):
        size_out = rest[1]
        return [kind(*rest), norm(size_out), n.ReLU()]

    def conv2(*rest):
        return conv(n.Conv2d, n.BatchNorm2d, *rest)

    def conv3(*rest):
        return conv(n.Conv3d, n.BatchNorm3d, *rest)

    audio = [*conv2(1, 64, 3, 1, 1), n.MaxPool2d(1, 1), *conv2(64, 192, 3, 1, 1), n.MaxPool2d(3, (1, 2))]
    audio += [*conv2(192, 384, 3, 1, 1), *conv2(384, 256, 3, 1, 1), *conv2(256, 256, 3, 1, 1), n.MaxPool2d(3, 2)]
    audio += conv2(256, 512, (5, 4), 1, 0)
    lip = [*conv3(3, 96, (5, 7, 7), (1, 2, 2), 0), n.MaxPool3d((1, 3, 3), (1, 2, 2))]
    lip += [*conv3(96, 256, (1, 5, 5), (1, 2, 2), (0, 1, 1)), n.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))]
    lip += [*conv3(256, 256, (1, 3, 3), 1, (0, 1, 1)), *conv3(256, 256, (1, 3, 3), 1, (0, 1, 1))]
    lip += [*conv3(256, 256, (1, 3, 3), 1, (0, 1, 1)), n.MaxPool3d((1, 3, 3), (1, 2, 2)), *conv3(256, 512, (1, 6, 6))]

    def head():
        return n.Sequential(n.Linear(512, 512), n.BatchNorm1d(512), n.ReLU(), n.Linear(512, 1024))

    parts = {"netcnnaud": n.Sequential(*audio), "netfcaud": head()}
    return n.ModuleDict(parts | {"netcnnlip": n.Sequential(*lip), "netfclip": head()})


def test_syncnet_parity_with_pytorch():
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    torch.manual_seed(0)
    model = shake(torch, torch_syncnet(torch))
    net = syncnet.create(foreign_weights.syncnet({name: v.numpy() for name, v in model.state_dict().items()}))
    faces = RNG.integers(0, 256, (1, 5, 224, 224, 3), dtype=np.uint8)
    sound = RNG.standard_normal((2, 13, 20)).astype(np.float32)
    with torch.no_grad():
        picture = torch.tensor(faces[..., ::-1].transpose(0, 4, 1, 2, 3).astype(np.float32))
        face = model["netfclip"](model["netcnnlip"](picture).flatten(1)).numpy()
        voice = model["netfcaud"](model["netcnnaud"](torch.tensor(sound)[:, None]).flatten(1)).numpy()
    np.testing.assert_allclose(syncnet.see(net, faces), face, atol=1e-4 * np.abs(face).max())
    np.testing.assert_allclose(syncnet.hear(net, sound), voice, atol=1e-4 * np.abs(voice).max())


def speech(seconds=1.3):
    time = np.arange(round(16000 * seconds)) / 16000
    return (0.2 * np.sin(2 * np.pi * (200 + 300 * time) * time) + 0.01 * RNG.standard_normal(len(time))).astype("f4")


def test_mel_by_scipy_and_by_known_points():
    """Slaney's scale has 1 kHz at 15 and 6.4 kHz at 42; the spectrogram is scipy's, scaled."""
    assert float(mel.slaney_mel(1000.0)) == 15.0 and float(mel.slaney_mel(6400.0)) == pytest.approx(42.0)
    np.testing.assert_allclose(mel.slaney_hertz(mel.slaney_mel(np.array([55.0, 999.0, 7600.0]))), [55.0, 999.0, 7600.0])
    sound = speech()
    sharp = scipy.signal.lfilter([1, -0.97], [1], sound.astype(np.float64))
    window = scipy.signal.get_window("hann", 800)
    _, _, spectrum = scipy.signal.stft(sharp, 16000, window, 800, 600, boundary="zeros", padded=False)
    magnitude = np.abs(spectrum) * window.sum()
    decibel = 20 * np.log10(np.maximum(mel.filters().T @ magnitude, 1e-5)) - 20
    expected = np.clip(8 * (decibel + 100) / 100 - 4, -4, 4)
    found = mel.spectrogram(sound)
    np.testing.assert_allclose(found[:, : expected.shape[1]], expected[:, : found.shape[1]], atol=1e-5)


def test_mel_filters_are_librosas():
    librosa = pytest.importorskip("librosa", reason="librosa is not installed (CONTRIBUTING.md, parity tests)")
    basis = librosa.filters.mel(sr=16000, n_fft=800, n_mels=80, fmin=55, fmax=7600)
    np.testing.assert_allclose(mel.filters().T, basis, atol=1e-6)


def test_mfcc_are_those_of_python_speech_features():
    reason = "python_speech_features is not installed (CONTRIBUTING.md, parity tests)"
    psf = pytest.importorskip("python_speech_features", reason=reason)
    sound = speech()
    expected = psf.mfcc(np.round(sound.astype(np.float64) * 32767), 16000)
    np.testing.assert_allclose(mel.mfcc(sound), expected, atol=1e-4)  # float32 of values up to 30


def test_mfcc_of_one_frame_by_hand():
    """Every step written out once more for the second frame of a sound, by sums instead of transforms."""
    sound = speech(0.1)
    samples = np.round(sound.astype(np.float64) * 32767)
    sharp = np.append(samples[0], samples[1:] - 0.97 * samples[:-1])[160:560]
    n = np.arange(400)
    power = np.array([abs((sharp * np.exp(-2j * np.pi * k * n / 512)).sum()) ** 2 / 512 for k in range(257)])
    top = 2595 * np.log10(1 + 8000 / 700)
    edges = [int(513 * 700 * (10 ** (top * i / 27 / 2595) - 1) / 16000) for i in range(28)]
    logs = []
    for low, middle, high in zip(edges, edges[1:], edges[2:], strict=False):
        weights = [(k - low) / (middle - low) if k < middle else (high - k) / (high - middle) for k in range(low, high)]
        logs.append(np.log(sum(w * power[k] for w, k in zip(weights, range(low, high), strict=True))))
    cosines = [sum(v * np.cos(np.pi * c * (2 * i + 1) / 52) for i, v in enumerate(logs)) for c in range(13)]
    expected = np.array(cosines) * np.sqrt(2 / 26) * (1 + 11 * np.sin(np.pi * np.arange(13) / 22))
    expected[0] = np.log(power.sum())
    np.testing.assert_allclose(mel.mfcc(sound)[1], expected, atol=1e-4)


def test_windows_begin_with_their_frame():
    sound = np.zeros(32000, np.float32)
    sound[16000:] = 0.1 * RNG.standard_normal(16000)
    windows = mel.mel_windows(sound, 60)
    assert windows.shape == (60, 80, 16) and windows.dtype == np.float32
    loud = windows.mean(axis=1) > -2  # per column
    # The noise begins at frame 25, column 80; a column's 50 ms reach two columns further.
    assert not loud[19].any() and loud[25].sum() >= 14 and loud[20, -3:].any()
    assert (windows[55] == -4).any() and (windows[59, :, -1] == -4).all()  # silence after the end
    assert mel.mfcc_windows(sound, 60).shape == (45, 13, 20)
    assert np.isfinite(mel.mfcc(np.zeros(1000, np.float32))).all()


def test_lower_faces_are_what_opencv_cuts():
    import cv2

    lower_faces = jax.jit(sync.lower_faces)
    image = cv2.GaussianBlur(RNG.random((120, 110, 3), np.float32), (0, 0), 3)
    crop = np.asarray(lower_faces(jnp.asarray(image[None]), jnp.float32([[4, 100, 8, 104]])))[0]
    np.testing.assert_allclose(crop, image[52:100, 8:104], atol=1e-5)  # one to one
    crop = np.asarray(lower_faces(jnp.asarray(image[None]), jnp.float32([[10, 58, 20, 68]])))[0]
    expected = cv2.resize(image[10:58, 20:68], (96, 96), interpolation=cv2.INTER_LINEAR)[48:]
    np.testing.assert_allclose(crop[:, 2:-2][:-2], expected[:, 2:-2][:-2], atol=1e-4)  # the border sees beyond the box


def test_every_pixel_of_the_lower_face_has_a_gradient():
    images = jnp.asarray(RNG.random((1, 200, 200, 3), np.float32))
    boxes = jnp.float32([[10, 190, 10, 190]])
    pulled = np.asarray(jax.jit(jax.grad(lambda x: (sync.lower_faces(x, boxes) ** 2).sum()))(images))[0].max(-1)
    assert (pulled[104:188, 14:186] > 0).all() and (pulled[:98] == 0).all()


def test_loss_prefers_what_the_expert_prefers():
    expert = random_expert()
    images = jnp.asarray(RNG.random((5, 64, 64, 3), np.float32))
    boxes = jnp.tile(jnp.float32([[8, 60, 6, 58]]), (5, 1))
    sound = jnp.asarray(RNG.uniform(-4, 4, (80, 16)).astype(np.float32))
    value, gradient = jax.jit(jax.value_and_grad(lambda x: sync.loss(expert, x, boxes, sound)))(images)
    judged = jax.jit(lambda x: (expert.see(sync.lower_faces(x, boxes)[None]) * expert.hear(sound[None])).sum())
    cosine = float(judged(images))
    assert float(value) == pytest.approx(-np.log(cosine), rel=1e-4)
    gradient = np.asarray(gradient)
    assert np.isfinite(gradient).all() and np.abs(gradient[:, 36:58]).max() > 0 and not gradient[:, :33].any()


def test_a_wrong_array_is_named():
    arrays = sync.flat(random_expert().state)
    with pytest.raises(ValueError, match=r"audio\.3\.norm\.var has the shape nothing"):
        sync.create({name: value for name, value in arrays.items() if name != "audio.3.norm.var"})
    with pytest.raises(ValueError, match=r"face\.0\.conv\.kernel is missing"):
        sync.create({})
    with pytest.raises(ValueError, match=r"lip\.0\.conv\.kernel has the shape nothing"):
        syncnet.create({})


def test_face_boxes_hold_the_face_and_follow_it_smoothly():
    points = np.zeros((40, 68, 2))
    angle = np.linspace(0, np.pi, 17)
    points[:, :17] = np.stack([100 - 50 * np.cos(angle), 80 + 60 * np.sin(angle)], 1)
    points[:, 17:27] = np.stack([np.linspace(60, 140, 10), np.full(10, 60)], 1)
    points[:, 27:36] = (100, 90)
    points[::2, 5:12, 1] += 8  # the jaw drops in every other frame
    points += np.linspace(0, 30, 40)[:, None, None]  # and the head moves
    boxes = face_box.face_boxes(points)
    assert boxes.shape == (40, 4) and boxes.dtype == np.float32
    np.testing.assert_allclose(np.diff(boxes[5:-5], axis=0), 30 / 39, atol=0.15)  # hardly a jaw in it
    assert boxes[0, 0] < 60 - 10 and boxes[0, 1] > 138 and boxes[0, 2] == pytest.approx(50, abs=2)
    squares = face_box.crop_boxes(boxes)
    np.testing.assert_allclose(squares[:, 1] - squares[:, 0], squares[:, 3] - squares[:, 2], rtol=1e-4)
