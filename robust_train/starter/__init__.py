"""What the command line trains when a user brings nothing of their own.

Ordinary Lightning code, as it could stand in anybody's project: it knows nothing of the rest of the package, so that
whatever hardens it hardens a stranger's code just as well. Names are resolved on first use: asking for a network loads
neither Lightning nor scikit-learn.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .classifier import Classifier as Classifier
    from .digits import Digits as Digits
    from .fashion_mnist import FashionMNIST as FashionMNIST
    from .mlp import MLP as MLP
    from .python_docs import PythonDocs as PythonDocs
    from .small_cnn import SmallCNN as SmallCNN
    from .small_resnet import SmallResNet as SmallResNet
    from .tanh_cnn import TanhCNN as TanhCNN
    from .text_cnn import TextCNN as TextCNN
    from .wavelets import WaveletFeatures as WaveletFeatures
    from .wavelets import WaveletLinear as WaveletLinear

_HOME = {
    "Classifier": "classifier",
    "Digits": "digits",
    "FashionMNIST": "fashion_mnist",
    "MLP": "mlp",
    "PythonDocs": "python_docs",
    "SmallCNN": "small_cnn",
    "SmallResNet": "small_resnet",
    "TanhCNN": "tanh_cnn",
    "TextCNN": "text_cnn",
    "WaveletFeatures": "wavelets",
    "WaveletLinear": "wavelets",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
