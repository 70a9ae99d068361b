"""Heads of TalkingGaussian's published format, against a definition of that model in PyTorch made from its equations.

The networks are torch modules under the published names; the picture is made by blending every Gaussian into every
pixel. Only the checkpoint goes from there to here.
"""

import itertools
import math

import numpy as np
import pytest
from test_legacy import SIZE, T, make

from fg3dgs_jax import cli, convert
from fg3dgs_jax.data.dataset import open_dataset
from fg3dgs_jax.inference.head import Head
from fg3dgs_jax.model import talking_gaussian as released

torch = pytest.importorskip("torch", reason="PyTorch is not installed (CONTRIBUTING.md, parity tests)")
nn, F = torch.nn, torch.nn.functional
GRIDS = {"face": (16, 38.4), "mouth": (64, 57.6)}
COUNT, DEGREE = {"face": 40, "mouth": 12}, 2


def chain(*layers):
    return nn.Sequential(*layers)


class Plane(nn.Module):
    """One 2-D pyramid with bilinear reads; level l has 16 * (38.4 / 16)^(l / 11) cells, vertices x + y * width."""

    def __init__(self, first, last):
        super().__init__()
        self.cells = [first * (last / first) ** (level / 11) for level in range(12)]
        self.widths = [math.ceil(cells - 1e-9) + 1 for cells in self.cells]
        self.starts = np.cumsum([0] + [8 * math.ceil(width * width / 8) for width in self.widths])
        self.embeddings = nn.Parameter(torch.randn(int(self.starts[-1]), 1))

    def forward(self, points):
        out = []
        for cells, width, start in zip(self.cells, self.widths, self.starts, strict=False):
            place = (points + 0.15) / 0.3 * (cells - 1) + 0.5
            low = place.floor().long()
            share, total = place - low, 0
            for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
                weight = (share[:, 0] if dx else 1 - share[:, 0]) * (share[:, 1] if dy else 1 - share[:, 1])
                total = total + weight * self.embeddings[start + low[:, 0] + dx + (low[:, 1] + dy) * width, 0]
            out.append(total)
        return torch.stack(out, 1)


class Stack(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.net = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes))

    def forward(self, x):
        for layer in self.net[:-1]:
            x = layer(x).relu()
        return self.net[-1](x)


def stack(widths, stride):
    """Convolutions of three frames, each followed by a leaky ReLU."""
    pairs = [(nn.Conv1d(a, b, 3, stride, 1), nn.LeakyReLU(0.02)) for a, b in itertools.pairwise(widths)]
    return chain(*itertools.chain.from_iterable(pairs))


class Hears(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.audio_net = nn.Module()
        self.audio_net.encoder_conv = stack((channels, 32, 32, 64, 64), 2)
        self.audio_net.encoder_fc1 = chain(nn.Linear(64, 64), nn.LeakyReLU(0.02), nn.Linear(64, 32))
        self.audio_att_net = nn.Module()
        self.audio_att_net.attentionConvNet = stack((32, 16, 8, 4, 2, 1), 1)
        self.audio_att_net.attentionNet = chain(nn.Linear(8, 8), nn.Softmax(1))

    def hear(self, windows):  # [8, 16, D]
        tokens = self.audio_net.encoder_fc1(self.audio_net.encoder_conv(windows.transpose(1, 2))[..., 0])
        weights = self.audio_att_net.attentionNet(self.audio_att_net.attentionConvNet(tokens.T[None])[0])
        return (weights[0][:, None] * tokens).sum(0)

    def planes(self, first, last):
        for name in ("xy", "yz", "xz"):
            setattr(self, f"encoder_{name}", Plane(first, last))

    def where(self, means):
        planes = ((self.encoder_xy, (0, 1)), (self.encoder_yz, (1, 2)), (self.encoder_xz, (0, 2)))
        return torch.cat([plane(means[:, axes]) for plane, axes in planes], 1)


class Face(Hears):
    def __init__(self, channels):
        super().__init__(channels)
        self.planes(*GRIDS["face"])
        self.exp_encode_net, self.eye_att_net = Stack(5, 16, 5), Stack(36, 16, 6)
        self.sigma_net, self.aud_ch_att_net = Stack(74, 64, 64, 11), Stack(36, 32, 32)

    def forward(self, means, windows, units):
        place = self.where(means)
        audio = self.hear(windows) * self.aud_ch_att_net(place)
        eyes = torch.cat([self.exp_encode_net(units[:5]), units[5:]]) * self.eye_att_net(place).relu()
        out = self.sigma_net(torch.cat([place, audio, eyes], 1))
        return out[:, :3] * 0.01, out[:, 3:7], out[:, 8:]


class Mouth(Hears):
    def __init__(self, channels):
        super().__init__(channels)
        self.planes(*GRIDS["mouth"])
        self.sigma_net, self.aud_ch_att_net = Stack(68, 32, 32, 3), Stack(36, 32, 32)

    def forward(self, means, windows):
        out = self.sigma_net(torch.cat([self.where(means), self.hear(windows).expand(len(means), -1)], 1))
        return out * 0.01 * torch.tensor([0.2, 1.0, 0.2])


def gaussians(count):
    """The tuple that a training run stores, with an identity and an optimizer's state in it."""
    fields = [
        0.05 * torch.randn(count, 3).clamp(-2, 2), torch.randn(count, 1, 3), 0.2 * torch.randn(count, 8, 3),
        torch.zeros(count, 1), torch.randn(count, 3) * 0.5 - 4.5, torch.randn(count, 4), torch.randn(count, 1),
    ]  # fmt: skip
    fields = [nn.Parameter(field) for field in fields]
    optimizer = torch.optim.Adam([{"params": [field], "name": str(k)} for k, field in enumerate(fields)])
    seen = torch.zeros(count)
    return (DEGREE, *fields, seen, seen[:, None], seen[:, None], optimizer.state_dict(), 1.0)


SH = (0.28209479177387814, 0.4886025119029199, (1.0925484305920792, -1.0925484305920792, 0.31539156525252005,
      -1.0925484305920792, 0.5462742152960396))  # fmt: skip


def colours(coefficients, direction):
    x, y, z = direction.T[..., None]
    basis = [SH[0] + 0 * x, -SH[1] * y, SH[1] * z, -SH[1] * x]
    c = SH[2]
    basis += [c[0] * x * y, c[1] * y * z, c[2] * (2 * z * z - x * x - y * y), c[3] * x * z, c[4] * (x * x - y * y)]
    return (sum(b * coefficients[:, k] for k, b in enumerate(basis)) + 0.5).clamp(min=0)


def splat(means, quats, scales, opacities, coefficients, viewmat, focal):
    """Premultiplied colour [S, S, 3] and alpha [S, S]: every Gaussian in every pixel, nearest first."""
    rotation, shift = viewmat[:3, :3], viewmat[:3, 3]
    w, x, y, z = F.normalize(quats, dim=1).T
    turn = torch.stack([
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], 1).reshape(-1, 3, 3)  # fmt: skip
    half = turn * scales[:, None]
    seen = means @ rotation.T + shift
    tx, ty, tz = seen.T
    zero = torch.zeros_like(tx)
    slope = torch.stack([focal / tz, zero, -focal * tx / tz**2, zero, focal / tz, -focal * ty / tz**2], 1).reshape(
        -1, 2, 3
    )
    flat = slope @ rotation @ half
    spread = flat @ flat.transpose(1, 2) + 0.3 * torch.eye(2)
    centre = torch.stack([focal * tx / tz, focal * ty / tz], 1) + SIZE / 2
    colour = colours(coefficients, F.normalize(means - (-rotation.T @ shift), dim=1))
    grid = torch.stack(torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="xy"), -1) + 0.5
    picture, through = torch.zeros(SIZE, SIZE, 3), torch.ones(SIZE, SIZE)
    for k in torch.argsort(tz):
        offset = grid - centre[k]
        power = torch.einsum("abi,ij,abj->ab", offset, torch.linalg.inv(spread[k]), offset)
        alpha = (opacities[k] * torch.exp(-0.5 * power)).clamp(max=0.99)
        alpha = torch.where((alpha < 1 / 255) | (through < 1e-4), 0.0, alpha)
        picture = picture + (through * alpha)[..., None] * colour[k]
        through = through * (1 - alpha)
    return picture, 1 - through


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = make(tmp_path_factory.mktemp("legacy") / "clip")
    rng = np.random.default_rng(0)
    np.save(path / "aud_ds.npy", rng.normal(size=(T, 16, 29)).astype(np.float32))
    names = [*released.UNITS, "AU02"]
    rows = [f"{i}, " + ", ".join(f"{value:.3f}" for value in rng.uniform(0, 3, len(names))) for i in range(T)]
    (path / "au.csv").write_text("\n".join(["frame, " + ", ".join(f"{name}_r" for name in names), *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def trained(folder):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    face, mouth = Face(29), Mouth(29)
    parts = gaussians(COUNT["face"]), face, gaussians(COUNT["mouth"]), mouth
    stored = parts[0], face.state_dict(), parts[2], mouth.state_dict()
    torch.save(stored, folder.parent / "chkpnt_fuse_latest.pth")
    return parts


@pytest.fixture(scope="module")
def head(folder, trained):
    run = folder.parent / "run"
    argv = [str(folder.parent / "chkpnt_fuse_latest.pth"), f"--data={folder}", f"--out={run}"]
    assert cli.exit_code(convert.main, argv) == 0
    return Head.load(run)


def expected(parts, dataset, index) -> np.ndarray:
    """The frame that the published method makes, f32 [S, S, 3]."""
    face, face_net, mouth, mouth_net = parts
    rows = np.arange(index - 4, index + 4)
    inside = (rows >= 0) & (rows < T)
    windows = np.zeros((8, 16, 29), np.float32)
    windows[inside] = dataset.audio_features[rows[inside]]
    table = np.genfromtxt(dataset.path / "au.csv", delimiter=",", names=True)
    units = np.array([table[f"{name}_r"][index] for name in released.UNITS], np.float32)
    units[5] = np.clip(units[5], 0, 2)
    viewmat = torch.from_numpy(dataset.viewmats[index])
    with torch.no_grad():
        windows, units = torch.from_numpy(windows), torch.from_numpy(units)
        moved, turned, grown = face_net(face[1], windows, units)
        _, xyz, dc, rest, _, scaling, rotation, opacity, *_ = face
        front = splat(xyz + moved, rotation + turned, F.softplus(scaling + grown), opacity[:, 0].sigmoid(),
                      torch.cat([dc, rest], 1), viewmat, 90.0)  # fmt: skip
        _, xyz, dc, rest, _, scaling, rotation, opacity, *_ = mouth
        behind = splat(xyz + mouth_net(xyz, windows), rotation, F.softplus(scaling), opacity[:, 0].sigmoid(),
                       torch.cat([dc, rest], 1), viewmat, 90.0)  # fmt: skip
        picture = torch.from_numpy(dataset.pictures(index).backdrop / np.float32(255))
        for colour, alpha in (behind, front):
            picture = colour + (1 - alpha)[..., None] * picture
        return picture.clamp(0, 1).numpy()


def test_the_same_images(head, trained, folder):
    dataset, original = head.dataset, open_dataset(folder)
    assert dataset.expression_names == released.UNITS and dataset.expression.max() > 1.5  # raw
    shown = []
    for index in (0, 5, 11):
        frame = dataset.frame(index)
        picture = head.render(frame.condition, frame.viewmat, frame.backdrop)
        wanted = 255 * expected(trained, original, index)
        # One grey level for rounding; near a cut-off (1/255, transmittance 1e-4) a pixel may take one Gaussian more.
        difference = np.abs(picture - wanted)
        assert (difference > 1.0).mean() < 2e-3 and difference.max() < 6
        shown.append(picture)
    assert np.abs(shown[0].astype(int) - shown[1]).max() > 20  # it moves, and the head covers something
    assert np.abs(shown[1].astype(int) - dataset.pictures(5).backdrop).max() > 50


def test_a_converted_head_speaks_from_features(head, folder):
    windows = head.read_windows(folder / "aud_ds.npy", T)
    assert len(list(head.speak(windows))) == T


def test_what_is_not_such_a_checkpoint_is_refused(trained, folder, tmp_path, capsys):
    face, net, mouth, mouth_net = trained
    state = net.state_dict()
    wrong = {
        "list.pth": [1, 2, 3],
        "short.pth": (face, state),
        "names.pth": (face, {"a": torch.zeros(3)}, mouth, mouth_net.state_dict()),
        "grids.pth": (face, {**state, "encoder_xy.embeddings": torch.zeros(99, 1)}, mouth, mouth_net.state_dict()),
        "shapes.pth": ((2, *face[2:]), state, mouth, mouth_net.state_dict()),
        "nan.pth": ((2, face[1] * math.nan, *face[2:]), state, mouth, mouth_net.state_dict()),
    }
    for name, content in wrong.items():
        torch.save(content, tmp_path / name)
        argv = [str(tmp_path / name), f"--data={folder}", f"--out={tmp_path / 'run'}"]
        assert cli.exit_code(convert.main, argv) == 2
        error = capsys.readouterr().err
        assert "not a fused checkpoint of TalkingGaussian" in error and error.count("\n") == 1
        assert not (tmp_path / "run").exists()
    good = str(folder.parent / "chkpnt_fuse_latest.pth")
    assert (
        cli.exit_code(convert.main, [good, f"--data={folder}", f"--out={tmp_path / 'run'}", "--audio-features=hu"]) == 2
    )
    assert "hears features of 29 values" in capsys.readouterr().err
