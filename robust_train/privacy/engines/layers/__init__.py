"""Which layers have a rule: one file a family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from opacus.layers import dp_multihead_attention
from opacus.layers.dp_rnn import RNNLinear
from torch import nn
from torch.nn.utils import parametrize

from robust_train.privacy.engines.base import UnsupportedLayer
from robust_train.privacy.engines.layers.attention import MultiheadAttention, SequenceBias
from robust_train.privacy.engines.layers.base import Rule
from robust_train.privacy.engines.layers.convolution import Convolution, TransposedConvolution
from robust_train.privacy.engines.layers.fallback import Fallback
from robust_train.privacy.engines.layers.linear import Embedding, Linear, RecurrentLinear
from robust_train.privacy.engines.layers.normalization import GroupNorm, InstanceNorm, LayerNorm, RMSNorm

# By exact type: a subclass may do anything in its forward.
RULES: dict[type[nn.Module], type[Rule]] = {
    nn.Linear: Linear,
    RNNLinear: RecurrentLinear,
    nn.Embedding: Embedding,
    nn.Conv1d: Convolution,
    nn.Conv2d: Convolution,
    nn.Conv3d: Convolution,
    nn.ConvTranspose1d: TransposedConvolution,
    nn.ConvTranspose2d: TransposedConvolution,
    nn.ConvTranspose3d: TransposedConvolution,
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
    nn.GroupNorm: GroupNorm,
    nn.InstanceNorm1d: InstanceNorm,
    nn.InstanceNorm2d: InstanceNorm,
    nn.InstanceNorm3d: InstanceNorm,
    nn.MultiheadAttention: MultiheadAttention,
    dp_multihead_attention.SequenceBias: SequenceBias,
}

Owner = tuple[str, nn.Module, dict[str, nn.Parameter]]


def owners(module: nn.Module, wanted: set[nn.Parameter]) -> Iterator[Owner]:
    """The layers of ``module`` whose parameters are among ``wanted``, each once.

    Returns:
        Of each, its name, itself, and its wanted parameters, by their names within it.
    """
    return _owners(module, wanted, "", set())


def _owners(module: nn.Module, wanted: set[nn.Parameter], name: str, seen: set[nn.Module]) -> Iterator[Owner]:
    trained = {inner: p for inner, p in module.named_parameters() if p in wanted}
    if module in seen or not trained:
        return
    seen.add(module)
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) and not module.self_attn.batch_first:
        raise UnsupportedLayer(f"{name or 'the module'}: {type(module).__name__} has to have batch_first=True")
    # Opacus' recurrent layers repeat their cells' parameters under other names.
    inner = {p for child in module.children() for p in child.parameters()}
    own = any(p not in inner for p in trained.values())
    if own or type(module) in RULES or parametrize.is_parametrized(module):
        yield name, module, trained
        return
    for child_name, child in module.named_children():
        yield from _owners(child, wanted, f"{name}.{child_name}" if name else child_name, seen)


def rule(name: str, layer: nn.Module, trained: Mapping[str, nn.Parameter]) -> Rule:
    """The rule of a layer.

    Raises:
        UnsupportedLayer: it has none, and cannot do without; with the layer's ``name``.
    """
    try:
        return RULES.get(type(layer), Fallback)(layer, trained)
    except UnsupportedLayer as error:
        raise UnsupportedLayer(f"{name or 'the module'}: {error}") from None
