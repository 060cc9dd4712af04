"""A small convolutional network for sentences."""

from torch import Tensor, nn
from torch.nn.functional import embedding, normalize

from ._checks import number, whole


class UnitEmbedding(nn.Embedding):
    """An embedding whose vectors have length 1, and length 0 for padding.

    A perturbation of a given size in embedding space then means the same for every model: a model cannot grow out of
    its reach by growing its embeddings.
    """

    def forward(self, input: Tensor) -> Tensor:
        return embedding(input, normalize(self.weight, dim=1), self.padding_idx)


class TextCNN(nn.Module):
    """Word embeddings, one convolution over three words, the largest response over the sentence, one linear layer.

    The output of ``embedding`` is what embedding-space attacks perturb. Padding has no influence.

    Args:
        vocabulary: number of ids; 0 is padding.
        classes: how many logits to return.
        width: length of a word's vector.
        channels: responses of the convolution.
        dropout: probability of zeroing a response before the linear layer.

    Raises:
        ValueError: a setting is out of range.

    Shapes:
        ``ids: (B, words)`` int64, returns ``(B, classes)``.

    Reference:
        Kim, "Convolutional Neural Networks for Sentence Classification", 2014; unit vectors: Miyato et al.,
        "Adversarial Training Methods for Semi-Supervised Text Classification", 2017, section 3.
    """

    def __init__(
        self, vocabulary: int = 2000, classes: int = 2, width: int = 64, channels: int = 128, dropout: float = 0.3
    ) -> None:
        super().__init__()
        whole("vocabulary", vocabulary, 2, 2**20)
        whole("classes", classes, 1, 2**20)
        whole("width", width, 1, 2**16)
        whole("channels", channels, 1, 2**16)
        number("dropout", dropout, "in [0, 1)", 0, 1)
        self.embedding = UnitEmbedding(vocabulary, width, padding_idx=0)
        self.responses = nn.Sequential(nn.Conv1d(width, channels, 3, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, classes))

    def forward(self, ids: Tensor) -> Tensor:
        words = (ids != 0).unsqueeze(1)
        responses = self.responses(self.embedding(ids).transpose(1, 2)) * words
        return self.head(responses.amax(2))
