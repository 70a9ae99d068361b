"""The motion networks in PyTorch, Gaussians first: `Linear` and `Conv1d` as they come, so that BLAS and oneDNN do the
work. Attributes bear the names of the checkpoint's paths (`fg3dgs_jax.model.motion`), which is all that conversion
needs."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

PLANES = ((0, 1), (1, 2), (0, 2))
TOKENS, CURRENT, WIDTH, HEADS = 8, 4, 32, 4
PRIME = 2654435761
LEAK = 0.02
MEANS_SCALE = 1e-2

Deltas = tuple[Tensor, Tensor | None, Tensor | None]  # of means [N, 3], quaternions [N, 4] and log-scales [N, 3]


class GridShape(NamedTuple):
    """Of one plane."""

    resolutions: list[int]  # cells along an axis, per level
    starts: list[int]  # first entry of every level, and behind the last the number of entries
    dense: int  # levels that hold every vertex; the others hash
    features: int
    log2_table: int
    bound: float

    @property
    def output_dim(self) -> int:
        return len(PLANES) * len(self.resolutions) * self.features


class Grid(nn.Module):
    """Tri-plane hash grid: four gathers for all planes and levels at once."""

    def __init__(self, spec: GridShape):
        super().__init__()
        self.tables = nn.Parameter(torch.zeros(len(PLANES), spec.starts[-1], spec.features))
        self.bound, self.features, self.mask = spec.bound, spec.features, 2**spec.log2_table - 1
        self.hashes = spec.dense < len(spec.resolutions)
        cells = torch.tensor(spec.resolutions)[:, None]  # [levels, 1], as everything below but the axes
        entries = torch.arange(len(PLANES))[:, None, None] * spec.starts[-1]
        self.register_buffer("cells", cells, persistent=False)
        self.register_buffer("starts", entries + torch.tensor(spec.starts[:-1])[:, None], persistent=False)
        self.register_buffer("dense", torch.arange(len(spec.resolutions))[:, None] < spec.dense, persistent=False)
        self.register_buffer("axes", torch.tensor(PLANES).T.contiguous(), persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """Positions f32 [N, 3] -> [N, 3 * levels * features]; zeros outside the bound."""
        inside = (positions.abs() <= self.bound).all(1)
        unit = torch.where(inside[:, None], positions, 0.0).T / (2 * self.bound) + 0.5
        along, across = (unit[axis][:, None] * (self.cells - 1) + 0.5 for axis in self.axes)  # [3, levels, N]
        i, j = along.long(), across.long()
        u, v = along - i, across - j
        corners = [self._read(i + di, j + dj) for di in (0, 1) for dj in (0, 1)]
        u, v = u[..., None], v[..., None]
        low, high = torch.lerp(corners[0], corners[1], v), torch.lerp(corners[2], corners[3], v)
        encoded = torch.lerp(low, high, u) * inside[:, None]
        return encoded.permute(2, 0, 1, 3).flatten(1)

    def _read(self, i: Tensor, j: Tensor) -> Tensor:
        """Table entries [3, levels, N, features] of vertices i, j."""
        rows = i * (self.cells + 1) + j
        if self.hashes:
            rows = torch.where(self.dense, rows, (i ^ (j * PRIME)) & self.mask)
        rows = (rows + self.starts).flatten()
        return self.tables.view(-1, self.features).index_select(0, rows).view(*i.shape, self.features)


class MLP(nn.Module):
    """Linear layers `layer0..` without biases, ReLU between them."""

    def __init__(self, *sizes: int):
        super().__init__()
        self.count = len(sizes) - 1
        for i in range(self.count):
            setattr(self, f"layer{i}", nn.Linear(sizes[i], sizes[i + 1], bias=False))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.count):
            x = getattr(self, f"layer{i}")(x if i == 0 else functional.relu(x))
        return x


class WindowAttention(nn.Module):
    """Pools tokens [8, C] into [C]."""

    def __init__(self):
        super().__init__()
        channels = (WIDTH, 16, 8, 4, 2, 1)
        for i in range(5):
            setattr(self, f"conv{i}", nn.Conv1d(channels[i], channels[i + 1], 3, padding=1))
        self.linear = nn.Linear(TOKENS, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens.T[None]
        for i in range(5):
            x = functional.leaky_relu(getattr(self, f"conv{i}")(x), LEAK)
        return torch.softmax(self.linear(x[0, 0]), 0) @ tokens


class Projection(nn.Module):
    """Windows [8, A, D] -> their principal components [8, 1, C]; nothing of it learns."""

    def __init__(self, heard: Sequence[int]):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(*heard[:2]), requires_grad=False)
        self.directions = nn.Parameter(torch.zeros(*heard), requires_grad=False)

    def forward(self, audio: Tensor) -> Tensor:
        return torch.tensordot(audio - self.mean, self.directions, 2)[:, None]


class AudioEncoder(nn.Module):
    """Windows [8, A, D] -> tokens [8, 32] and their pooled vector [32].

    heard: [A, D], or [A, D, C] where C principal components of a window are seen in its place.
    """

    def __init__(self, heard: Sequence[int]):
        super().__init__()
        self.basis = Projection(heard) if len(heard) == 3 else nn.Identity()
        channels = (heard[-1], 32, 32, 64, 64)
        for i in range(4):
            setattr(self, f"conv{i}", nn.Conv1d(channels[i], channels[i + 1], 3, stride=2, padding=1))
        self.linear0, self.linear1 = nn.Linear(64, 64), nn.Linear(64, WIDTH)
        self.attention = WindowAttention()

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        x = self.basis(audio).transpose(1, 2)
        for i in range(4):
            x = functional.leaky_relu(getattr(self, f"conv{i}")(x), LEAK)
        tokens = self.linear1(functional.leaky_relu(self.linear0(x.mean(2)), LEAK))
        return tokens, self.attention(tokens)


class ExpressionEncoder(nn.Module):
    """Expressions [8, E] -> tokens [8, E]."""

    def __init__(self, size: int):
        super().__init__()
        self.layer0, self.layer1 = nn.Linear(size, 16), nn.Linear(16, size)

    def forward(self, expression: Tensor) -> Tensor:
        return expression + self.layer1(functional.relu(self.layer0(expression)))


class FaceMotion(nn.Module):
    """FG Eq. 6-8: deltas of means, quaternions and log-scales."""

    def __init__(self, grid: GridShape, heard: Sequence[int], expression_dim: int):
        super().__init__()
        self.grid, self.audio, self.expression = Grid(grid), AudioEncoder(heard), ExpressionEncoder(expression_dim)
        self.attend_audio = MLP(grid.output_dim, 32, WIDTH)
        self.attend_expression = MLP(grid.output_dim, 16, expression_dim)
        self.deform = MLP(grid.output_dim + WIDTH + expression_dim, 64, 64, 10)

    def constants(self, means: Tensor) -> tuple[Tensor, ...]:
        spatial = self.grid(means.detach())
        return spatial, self.attend_audio(spatial), functional.relu(self.attend_expression(spatial))

    def forward(self, constants: tuple[Tensor, ...], audio: Tensor, expression: Tensor) -> Deltas:
        spatial, to_audio, to_expression = constants
        heard, seen = self.audio(audio)[1], self.expression(expression)[CURRENT]
        out = self.deform(torch.cat([spatial, to_audio * heard, to_expression * seen], 1))
        return MEANS_SCALE * out[:, :3], out[:, 3:7], out[:, 7:]


class CrossModalAttention(nn.Module):
    """FG Eq. 10's attention. Keys and values are the same for all Gaussians, so they are folded into the query's and
    the output's kernels first; a softmax over tokens is left between two products."""

    def __init__(self, spatial_dim: int):
        super().__init__()
        self.query = nn.Linear(spatial_dim, WIDTH, bias=False)
        self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.positions = nn.Parameter(torch.zeros(TOKENS, WIDTH))

    def forward(self, spatial: Tensor, tokens: Tensor) -> Tensor:
        keys, values = ((f(tokens) + self.positions).view(TOKENS, HEADS, -1) for f in (self.key, self.value))
        size = keys.shape[-1]
        to_scores = torch.einsum("hcs,thc->sht", self.query.weight.view(HEADS, size, -1), keys) / math.sqrt(size)
        to_output = torch.einsum("thc,ohc->hto", values, self.output.weight.view(-1, HEADS, size))
        weights = torch.softmax((spatial @ to_scores.flatten(1)).view(-1, HEADS, TOKENS), 2)
        return weights.flatten(1) @ to_output.flatten(0, 1)


class CrossModalMotion(nn.Module):
    """FG Eq. 9-12, eyes and mouth: deltas of the means."""

    def __init__(self, modality: str, grid: GridShape, size: int):
        super().__init__()
        self.hears = modality == "audio"
        self.grid = Grid(grid)
        if self.hears:
            self.audio = AudioEncoder(size)
        else:
            self.expression, self.embed = ExpressionEncoder(size), nn.Linear(size, WIDTH)
        self.attention = CrossModalAttention(grid.output_dim)
        self.gate = MLP(WIDTH, 16, 1)
        self.ffn1, self.ffn2 = MLP(WIDTH, 32, WIDTH), MLP(WIDTH, 32, WIDTH)
        self.deform = MLP(WIDTH, 3)

    def constants(self, means: Tensor) -> tuple[Tensor, ...]:
        return (self.grid(means.detach()),)

    def forward(self, constants: tuple[Tensor, ...], audio: Tensor, expression: Tensor) -> Deltas:
        if self.hears:
            tokens, pooled = self.audio(audio)
        else:
            tokens = self.embed(self.expression(expression))
            pooled = tokens[CURRENT]
        z = torch.sigmoid(self.gate(pooled)) * self.attention(constants[0], tokens)
        return MEANS_SCALE * self.deform(self.ffn2(self.ffn1(pooled + z) + z)), None, None


class MouthMotion(nn.Module):
    """TG's inside of the mouth: deltas of the means."""

    def __init__(self, grid: GridShape, heard: Sequence[int]):
        super().__init__()
        self.grid, self.audio = Grid(grid), AudioEncoder(heard)
        self.deform = MLP(grid.output_dim + WIDTH, 32, 32, 3)

    def constants(self, means: Tensor) -> tuple[Tensor, ...]:
        return (self.grid(means.detach()),)

    def forward(self, constants: tuple[Tensor, ...], audio: Tensor, expression: Tensor) -> Deltas:
        heard = self.audio(audio)[1]
        out = self.deform(torch.cat([constants[0], heard.expand(len(constants[0]), -1)], 1))
        return MEANS_SCALE * out * out.new_tensor([0.2, 1.0, 0.2]), None, None


def create(kind: str, grid: GridShape, heard: Sequence[int], expression_dim: int) -> nn.Module:
    """A region's network: `constants(means)` is what no condition changes, the rest takes it with the condition."""
    if kind == "face":
        return FaceMotion(grid, heard, expression_dim)
    if kind == "cross_audio":
        return CrossModalMotion("audio", grid, heard)
    if kind == "cross_expression":
        return CrossModalMotion("expression", grid, expression_dim)
    if kind == "mouth_mlp":
        return MouthMotion(grid, heard)
    raise ValueError(f"the motion network {kind!r} has no PyTorch twin here")
