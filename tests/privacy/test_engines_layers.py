"""Every layer that has a rule, in all its settings: norms and clipped sums are those of one example at a time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleHooks
from opacus.layers import DPGRU, DPLSTM, DPMultiheadAttention
from privacy.exact import check
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from robust_train.privacy.engines.base import UnsupportedLayer
from robust_train.privacy.engines.book_keeping import BookKeeping
from robust_train.privacy.engines.hooks import Hooks
from robust_train.privacy.engines.layers import rule
from robust_train.privacy.engines.terms import Outer

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

ROWS = 3
few = settings(max_examples=25, deadline=None)
sizes = st.integers(1, 4)


def mean_loss(module: nn.Module, *batch: Tensor) -> Tensor:
    """A mean over the rows whose gradient differs from row to row and from element to element."""
    output = module(*batch)
    output = output[0] if isinstance(output, tuple) else output
    weights = torch.linspace(-1, 2, output[0].numel(), dtype=output.dtype).view_as(output[0])
    return (weights * output + 0.3 * output.square()).flatten(1).sum(1).mean()


def convolution(draw, kind, dimensions):
    groups = draw(st.sampled_from([1, 2]))
    kernel, stride, dilation = (
        [draw(st.integers(low, high)) for _ in range(dimensions)] for low, high in ((1, 3), (1, 3), (1, 2))
    )
    padding = draw(st.sampled_from(["valid", "same", 0, 1, "each"]))
    if padding == "same":
        stride = [1] * dimensions
    elif padding == "each":
        padding = [draw(st.integers(0, 2)) for _ in range(dimensions)]
    mode = draw(st.sampled_from(["zeros", "zeros", "circular", "reflect", "replicate"]))
    bias = draw(st.booleans())
    size = [draw(st.integers(5, 7)) for _ in range(dimensions)]
    layer = kind(2 * groups, 4, kernel, stride, padding, dilation, groups, bias, mode)
    return layer, torch.randn(ROWS, 2 * groups, *size)


def transposed(draw, kind, dimensions):
    groups = draw(st.sampled_from([1, 2]))
    kernel, stride, dilation, padding = (
        [draw(st.integers(low, high)) for _ in range(dimensions)] for low, high in ((1, 3), (1, 3), (1, 3), (0, 1))
    )
    padding = [min(p, (k - 1) * d) for p, k, d in zip(padding, kernel, dilation, strict=True)]
    more = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    layer = kind(2 * groups, 4, kernel, stride, padding, more, groups, draw(st.booleans()), dilation)
    return layer, torch.randn(ROWS, 2 * groups, *[draw(st.integers(3, 5)) for _ in range(dimensions)])


def linear(draw):
    shape = [draw(sizes) for _ in range(draw(st.integers(0, 2)))]
    layer = nn.Linear(draw(sizes), draw(st.integers(1, 20)), bias=draw(st.booleans()))
    return layer, torch.randn(ROWS, *shape, layer.in_features)


def embedding(draw):
    padding = draw(st.sampled_from([None, 0, 2]))
    layer = nn.Embedding(5, draw(sizes), padding_idx=padding)
    return layer, torch.randint(5, (ROWS, *[draw(sizes) for _ in range(draw(st.integers(0, 2)))]))


def layer_norm(draw):
    shape = [draw(st.integers(4, 5)) for _ in range(draw(st.integers(1, 2)))]
    layer = nn.LayerNorm(shape, bias=draw(st.booleans()))
    return layer, torch.randn(ROWS, *[draw(sizes) for _ in range(draw(st.integers(0, 2)))], *shape)


def rms_norm(draw):
    shape = [draw(st.integers(4, 5)) for _ in range(draw(st.integers(1, 2)))]
    return nn.RMSNorm(shape), torch.randn(ROWS, *[draw(sizes) for _ in range(draw(st.integers(0, 2)))], *shape)


def group_norm(draw):
    shape = [draw(st.integers(2, 4)) for _ in range(draw(st.integers(0, 2)))]
    return nn.GroupNorm(draw(st.sampled_from([1, 2])), 8), torch.randn(ROWS, 8, *shape)


def instance_norm(draw):
    dimensions = draw(st.sampled_from([1, 2]))
    kind = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d}[dimensions]
    return kind(3, affine=True), torch.randn(ROWS, 3, *[draw(st.integers(4, 6)) for _ in range(dimensions)])


LAYERS = {
    "Linear": linear,
    "Conv1d": lambda draw: convolution(draw, nn.Conv1d, 1),
    "Conv2d": lambda draw: convolution(draw, nn.Conv2d, 2),
    "Conv3d": lambda draw: convolution(draw, nn.Conv3d, 3),
    "ConvTranspose1d": lambda draw: transposed(draw, nn.ConvTranspose1d, 1),
    "ConvTranspose2d": lambda draw: transposed(draw, nn.ConvTranspose2d, 2),
    "Embedding": embedding,
    "LayerNorm": layer_norm,
    "RMSNorm": rms_norm,
    "GroupNorm": group_norm,
    "InstanceNorm": instance_norm,
}


def perturbed(layer: nn.Module) -> nn.Module:
    """Normalisations begin with ones and zeros, which hide what they multiply."""
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer


def beyond_opacus(layer: nn.Module) -> bool:
    """What its grad samplers get wrong: rows that are not trained, paddings of other kinds, and a bias left out."""
    if isinstance(layer, nn.Embedding):
        return layer.padding_idx is not None
    if isinstance(layer, nn.LayerNorm):
        return layer.bias is None
    return isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.padding_mode != "zeros"


@pytest.mark.parametrize("name", LAYERS)
@few
@given(data=st.data())
def test_a_layer_in_all_its_settings(name, data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    layer, x = LAYERS[name](data.draw)
    perturbed(layer)
    module = nn.Sequential(layer, nn.ReLU(inplace=True))
    if x.is_floating_point() and data.draw(st.booleans(), "behind another"):
        module.insert(0, nn.Linear(x.shape[-1], x.shape[-1]))
    if x.dim() > 1 and data.draw(st.booleans(), "not contiguous"):
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    expected = module(x)
    engine = BookKeeping(module, list(module.parameters()))
    engine.start()
    assert torch.equal(module(x), expected)
    engine.close()
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-11)):
        module, x = module.to(dtype), x.to(dtype) if x.is_floating_point() else x
        check(BookKeeping, module, mean_loss, (x,), tolerance=tolerance)
        if beyond_opacus(layer):
            with pytest.raises(UnsupportedLayer, match=r"padding_idx|padding_mode|LayerNorm"):
                Hooks(module, list(module.parameters()))
        else:
            check(Hooks, module, mean_loss, (x,), tolerance=tolerance)


class Attention(nn.Module):
    """Self-attention, attention to a memory, or one with keys and values of different kinds."""

    def __init__(self, inner: nn.Module, kind: str, mask: Tensor | None, **settings) -> None:
        super().__init__()
        self.inner, self.kind, self.settings = inner, kind, settings
        self.register_buffer("mask", mask)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> Tensor:
        key = query if self.kind == "self" else key
        value = value if self.kind == "separate" else key
        if not self.inner.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
            if self.kind == "self":
                key = value = query
            elif self.kind == "memory":
                value = key
        padding = padding if padding.any() else None
        output, weights = self.inner(query, key, value, padding, attn_mask=self.mask, **self.settings)
        output = output if self.inner.batch_first else output.transpose(0, 1)
        return output if weights is None else output + weights.square().flatten(1).sum(1)[:, None, None]


@few
@given(
    seed=st.integers(0, 99),
    kind=st.sampled_from(["self", "memory", "separate"]),
    different=st.booleans(),
    bias=st.booleans(),
    batch_first=st.booleans(),
    need_weights=st.booleans(),
    average=st.booleans(),
    mask=st.sampled_from([None, "bool", "float", "causal"]),
    padded=st.booleans(),
)
def test_multihead_attention(seed, kind, different, bias, batch_first, need_weights, average, mask, padded):
    torch.manual_seed(seed)
    targets, sources = 4, 4 if kind == "self" else 5
    sizes = {"kdim": 3, "vdim": 5} if different and kind == "separate" else {}
    inner = nn.MultiheadAttention(6, 2, bias=bias, batch_first=batch_first, **sizes)
    forbidden, ignored = torch.ones(targets, sources).triu(1).bool(), torch.zeros(ROWS, sources).bool()
    ignored[:, -1] = padded
    if mask != "bool":
        forbidden, ignored = (torch.zeros(m.shape).masked_fill(m, -math.inf) for m in (forbidden, ignored))
    options = {"need_weights": need_weights, "average_attn_weights": average, "is_causal": mask == "causal"}
    module = Attention(perturbed(inner), kind, None if mask is None else forbidden, **options)
    batch = (
        torch.randn(ROWS, targets, 6),
        torch.randn(ROWS, sources, sizes.get("kdim", 6)),
        torch.randn(ROWS, sources, sizes.get("vdim", 6)),
        ignored,
    )
    expected = module(*batch)
    engine = BookKeeping(module, list(module.parameters()))
    engine.start()
    assert torch.equal(module(*batch), expected)
    engine.close()
    check(BookKeeping, module, mean_loss, batch)


def test_a_transposed_convolution_to_a_given_size():
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(2, 3, 3, stride=2)

    class Upscale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, output_size=[10, 9])

    check(BookKeeping, Upscale(), mean_loss, (torch.randn(ROWS, 2, 4, 4),))


class LastStep(nn.Module):
    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent, self.head = recurrent, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.recurrent(x)
        return self.head(output[:, -1, :4])


@pytest.mark.parametrize("kind", [DPLSTM, DPGRU])
@pytest.mark.parametrize("directions", [{}, {"bidirectional": True, "num_layers": 2, "bias": False}])
def test_opacus_recurrent_layers(kind, directions):
    torch.manual_seed(0)
    module, x = LastStep(kind(3, 4, batch_first=True, **directions)), torch.randn(ROWS, 5, 3)
    for engine in (BookKeeping, Hooks):
        check(engine, module, mean_loss, (x,))


class Words(nn.Module):
    """An embedding with learnt positions, and a stock transformer behind it."""

    def __init__(self, layers: nn.Module, length: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(7, 8, padding_idx=0), nn.Embedding(length, 8)
        self.layers, self.head = layers, nn.Linear(8, 7)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1]).expand_as(ids)
        return self.head(self.layers(self.words(ids) + self.positions(places)))


@pytest.mark.parametrize("norm_first", [False, True])
def test_stock_transformer(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True, norm_first=norm_first)
    module = Words(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 6)
    ids = torch.randint(7, (ROWS, 6))
    engine = check(BookKeeping, module, mean_loss, (ids,))
    assert set(engine.layers.values()) <= {"ghost", "instantiate"}
    check(BookKeeping, module.eval(), mean_loss, (ids,))  # where torch has a fast path


def test_a_transformer_that_mixes_rows_and_positions_is_refused():
    module = nn.TransformerEncoderLayer(8, 2, batch_first=False)
    for engine in (BookKeeping, Hooks):
        with pytest.raises(UnsupportedLayer, match="batch_first=True"):
            engine(module, list(module.parameters()))


def test_opacus_attention():
    torch.manual_seed(0)
    inner = DPMultiheadAttention(6, 2, batch_first=True, add_bias_kv=True)

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x, need_weights=False)[0]

    check(BookKeeping, Module(), mean_loss, (torch.randn(ROWS, 4, 6),))


class Scale(nn.Module):
    """A layer of somebody's own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(size))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.scale * x) * x


class Temperature(nn.Module):
    """A parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.inverse = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.inverse


class LowRank(nn.Module):
    """A frozen layer with a trained addition of low rank."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features))
        self.up = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


class Doubled(nn.Linear):
    """A subclass that does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x).sin()


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Bilinear(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, input2=x.flip(1))


@pytest.mark.parametrize(
    ("layer", "hooks"),
    [
        (Scale(4), True),
        (LowRank(nn.Linear(4, 3)), True),
        (Doubled(4, 3), True),
        (nn.PReLU(), True),
        (Temperature(), True),
        (Pair(), False),
        (parametrizations.weight_norm(nn.Linear(4, 3)), False),
    ],
    ids=["own", "low rank", "subclass", "PReLU", "scalar", "Bilinear", "weight_norm"],
)
def test_layers_without_a_rule_are_combined_with_the_rest(layer, hooks):
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(4, 4), layer, nn.ReLU(inplace=True)), torch.randn(ROWS, 4)
    assert "vmap" in check(BookKeeping, module, mean_loss, (x,)).layers.values()
    if hooks:
        check(Hooks, module, mean_loss, (x,))


def test_a_grad_sampler_registered_with_opacus_is_used(monkeypatch):
    def sampler(layer, activations, backprops):
        s = torch.sigmoid(layer.scale * activations[0])
        return {layer.scale: backprops * activations[0].square() * s * (1 - s)}

    monkeypatch.setitem(GradSampleHooks.GRAD_SAMPLERS, Scale, sampler)
    module, x = nn.Sequential(nn.Linear(4, 4), Scale(4)), torch.randn(ROWS, 4)
    assert check(BookKeeping, module, mean_loss, (x,)).layers == {"0": "ghost", "1": "opacus"}


class Token(nn.Module):
    """A bare parameter beside layers."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.inner = nn.Parameter(torch.zeros(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.token)


REFUSED = {
    "batch normalisation": (nn.BatchNorm1d(4), "mixes examples"),
    "without statistics": (nn.BatchNorm1d(4, track_running_stats=False), "mixes examples"),
    "instance statistics": (nn.InstanceNorm1d(4, affine=True, track_running_stats=True), "statistics of the batch"),
    "recurrent": (nn.LSTM(4, 4), "opacus.layers.DPLSTM"),
    "bag": (nn.EmbeddingBag(4, 4), "nn.Embedding"),
    "max_norm": (nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
    "by frequency": (nn.Embedding(4, 4, scale_grad_by_freq=True), "scale_grad_by_freq"),
    "sparse": (nn.Embedding(4, 4, sparse=True), "sparse"),
    "key bias": (nn.MultiheadAttention(4, 2, add_bias_kv=True), "add_bias_kv"),
    "bare parameter": (Token(), "0: Token owns the parameters token"),
    "spectral norm": (parametrizations.spectral_norm(nn.Linear(4, 4)), "buffers"),
}


@pytest.mark.parametrize("engine", [BookKeeping, Hooks])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(engine, name):
    layer, reason = REFUSED[name]
    module = nn.Sequential(layer)
    before = {key: set(vars(part)) for key, part in module.named_modules()}
    with pytest.raises(UnsupportedLayer, match=reason):
        engine(module, list(module.parameters()))
    assert before == {key: set(vars(part)) for key, part in module.named_modules()}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_weights_computed_by_hooks_are_refused():
    module = torch.nn.utils.weight_norm(nn.Linear(4, 3))
    for engine in (BookKeeping, Hooks):
        with pytest.raises(UnsupportedLayer, match="weight_g, weight_v"):
            engine(module, list(module.parameters()))


def test_parts_that_are_not_trained_stop_nothing():
    module = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4).eval().requires_grad_(False), Token().requires_grad_(False)
    )
    module.register_buffer("seen", torch.zeros(3))
    for engine in (BookKeeping, Hooks):
        check(engine, module, mean_loss, (torch.randn(ROWS, 4),))


def test_a_layer_that_draws_when_run_again_is_refused():
    class Noisy(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x * self.scale)

    with pytest.raises(UnsupportedLayer, match="Noisy has no rule, and cannot be run"):
        check(BookKeeping, nn.Sequential(Noisy(4)), mean_loss, (torch.randn(ROWS, 4),))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_both_ways_to_write_out_a_convolution(kind, groups):
    torch.manual_seed(0)
    layer = kind(4, 6, 3, stride=2, padding=1, groups=groups)
    found, x = rule("", layer, dict(layer.named_parameters())), torch.randn(6, 4, 7, 5)
    gradient = torch.randn_like(layer(x))
    steps, field = found.roles(x, gradient)
    field = field[..., : 2 * steps.shape[2] + 1, : 2 * steps.shape[3] + 1]
    for examples in (6, 2):
        rows, outer = found._rows(steps, field, examples), found._outer(steps, field, examples)
        torch.testing.assert_close(rows.rows, outer.written_out().rows)
        torch.testing.assert_close(rows.squared_norms(), outer.squared_norms(), rtol=5e-5, atol=0)
        factors = torch.rand(examples)
        torch.testing.assert_close(rows.weighted_sum(factors), outer.weighted_sum(factors).flatten())


@few
@given(
    positions=st.integers(2, 40),
    cancelled=st.floats(0, 1),
    seed=st.integers(0, 99),
    size=st.sampled_from([1e-3, 1, 1e3]),
)
def test_ghost_norms_never_understate_where_positions_cancel(positions, cancelled, seed, size):
    torch.manual_seed(seed)
    left, right = size * torch.randn(4, 1, positions, 50), torch.randn(4, 1, positions, 60)
    half = positions // 2
    left[:, :, half : 2 * half] = -left[:, :, :half]
    right[:, :, half : 2 * half] = right[:, :, :half] + (1 - cancelled) * right[:, :, half : 2 * half]
    true = Outer(left.double(), right.double()).written_out().rows.norm(dim=1)
    told = Outer(left, right).squared_norms().sqrt()
    assert (told >= 0.999 * true).all()
    largest = left.norm(dim=3).mul(right.norm(dim=3)).sum((1, 2))
    assert ((told - true) <= 1e-5 * true + 1e-3 * largest).all()
