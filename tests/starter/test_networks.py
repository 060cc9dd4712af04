import subprocess
import sys

import pytest
import torch
from torch import nn

from robust_train.starter import MLP, SmallCNN, SmallResNet, TanhCNN

NETWORKS = {
    "cnn": lambda shape: SmallCNN(in_channels=shape[0], classes=7, channels=8),
    "cnn without norm": lambda shape: SmallCNN(in_channels=shape[0], classes=7, channels=6, norm="none"),
    "resnet": lambda shape: SmallResNet(in_channels=shape[0], classes=7, width=8),
    "resnet with batch norm": lambda shape: SmallResNet(in_channels=shape[0], classes=7, width=6, norm="batch"),
    "deep resnet": lambda shape: SmallResNet(in_channels=shape[0], classes=7, width=4, blocks=[2, 3]),
    "tanh cnn": lambda shape: TanhCNN(shape=shape, classes=7, channels=(4, 6), hidden=5),
    "mlp": lambda shape: MLP(shape=shape, classes=7, hidden=[16], dropout=0.1),
    "linear": lambda shape: MLP(shape=shape, classes=7, hidden=()),
}


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 9, 13)], ids=str)
@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_every_network_maps_images_to_logits_and_learns_with_all_its_weights(build, shape):
    network = build(shape)
    logits = network(torch.rand(4, *shape))
    assert logits.shape == (4, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_weights_depend_on_the_global_seed_alone(build):
    def weights(seed):
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(build((1, 8, 8)).parameters())

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize("build", [NETWORKS["resnet"], NETWORKS["mlp"], NETWORKS["cnn without norm"]])
def test_without_batch_norm_an_example_does_not_depend_on_its_batch(build):
    network = build((1, 8, 8)).eval()
    x = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(network(x)[:1], network(x[:1]))


def test_tanh_cnn_is_the_published_network():
    assert sum(p.numel() for p in TanhCNN().parameters()) == 26_010


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="norm must be"):
        SmallCNN(norm="layer")
    with pytest.raises(ValueError, match="at least one block"):
        SmallResNet(blocks=())
    with pytest.raises(ValueError, match="at least one block"):
        SmallResNet(blocks=(1, 0))


def test_names_are_resolved_on_first_use():
    import robust_train.starter as starter

    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        starter.Missing  # noqa: B018
    assert {"Digits", "SmallCNN"} <= set(dir(starter))
    code = (
        "import sys, robust_train.starter as s; s.MLP; assert not {'pytorch_lightning', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
