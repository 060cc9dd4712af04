"""Adversarial examples to look at, to train on or to show: a few of them, in a file that nothing can hide in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from robust_train.evasion._tensors import read_tensors, write_tensors
from robust_train.evasion.victim import Victim, is_binary

FORMAT = "robust-train adversarial examples 1"
LARGEST = 2**28  # bytes of a file
STOOD, WRONG = "none", "clean"


def adversarial_examples(
    victim: Victim, x: Tensor, found: Mapping[str, Tensor], scores: Mapping[str, Tensor], clean: Tensor
) -> dict[str, Tensor]:
    """Of each example what the first successful attack found.

    Args:
        victim: the model under attack, with logits ``(B, classes)``, or one an example, and one label an example.
        x: clean inputs ``(B, ...)``.
        found: inputs of each attack ``(B, ...)``.
        scores: of each attack's inputs ``(B,)``; 0 is a success, of a model that draws at random a fall.
        clean: scores of ``x`` ``(B,)``.

    Returns:
        On the CPU ``"inputs"``, ``"adversarial"``, ``"labels"``, the classes seen, ``"clean_predictions"`` and
        ``"predictions"``, and ``"attack"``: 0 where all attacks failed, 1 where the model was wrong when clean, else 2
        plus the attack's number. Where all failed, what the first one found.
    """
    names = list(found)
    chosen, attack = found[names[0]].clone(), torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for number, name in reversed(list(enumerate(names))):
        hit = (scores[name] < 0.5) & (clean >= 0.5)
        chosen[hit], attack[hit] = found[name][hit], number + 2
    attack[clean < 0.5] = 1
    labels = victim.known_labels()
    with torch.no_grad():
        seen, then = (_classes(victim.logits(inputs), labels) for inputs in (x, chosen))
    kept = {
        "inputs": x,
        "adversarial": chosen,
        "labels": labels.flatten().long(),
        "clean_predictions": seen,
        "predictions": then,
        "attack": attack,
    }
    return {name: tensor.detach().cpu() for name, tensor in kept.items()}


@dataclass(frozen=True, eq=False)
class AdversarialExamples:
    """Examples with what became of them.

    Attributes:
        inputs: clean ``(N, ...)``.
        adversarial: what the attacker made of them, same shape.
        labels: true classes ``(N,)``.
        clean_predictions: classes seen in the clean inputs ``(N,)``.
        predictions: classes seen in the adversarial ones ``(N,)``.
        attack: for each the name of the attack that succeeded, ``"none"`` where all failed, ``"clean"`` where the model
            was wrong without one.
        threat: the threat in words.
    """

    inputs: Tensor
    adversarial: Tensor
    labels: Tensor
    clean_predictions: Tensor
    predictions: Tensor
    attack: tuple[str, ...]
    threat: str

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], attacks: Sequence[str], threat: str) -> AdversarialExamples:
        """From what ``adversarial_examples`` returned.

        Raises:
            ValueError: a tensor is missing, or they do not fit one another.
        """
        names = (STOOD, WRONG, *attacks)
        try:
            x, adversarial, labels, seen, then, attack = (
                tensors[name]
                for name in ("inputs", "adversarial", "labels", "clean_predictions", "predictions", "attack")
            )
            which = tuple(names[int(number)] for number in attack)
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"these are no adversarial examples: {error}") from None
        if x.shape != adversarial.shape or any(len(t) != len(x) for t in (labels, seen, then, attack)):
            raise ValueError("these are no adversarial examples: the tensors differ in length")
        return cls(x, adversarial, labels, seen, then, which, threat)

    def write(self, path: str | Path) -> None:
        """Write them as safetensors, whole or not at all; at most 256 MiB, the last examples left out where needed."""
        size = self.inputs[:1].nelement() * self.inputs.element_size() * 2 + 32
        rows = min(len(self.inputs), (LARGEST - 2**16) // size)
        names = [STOOD, WRONG, *dict.fromkeys(name for name in self.attack if name not in (STOOD, WRONG))]
        tensors = {
            "inputs": self.inputs[:rows],
            "adversarial": self.adversarial[:rows],
            "labels": self.labels[:rows],
            "clean_predictions": self.clean_predictions[:rows],
            "predictions": self.predictions[:rows],
            "attack": torch.tensor([names.index(name) for name in self.attack[:rows]], dtype=torch.int64),
        }
        about = {"format": FORMAT, "attacks": json.dumps(names[2:]), "threat": self.threat}
        write_tensors(path, tensors, about)

    @classmethod
    def read(cls, path: str | Path) -> AdversarialExamples:
        """What ``write`` wrote.

        Raises:
            ValueError: it is no such file.
        """
        tensors, about = read_tensors(path, LARGEST)
        if about.get("format") != FORMAT:
            raise ValueError(f"{path}: the file holds no adversarial examples of this package")
        return cls.of(tensors, json.loads(about.get("attacks", "[]")), about.get("threat", ""))


def _classes(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.flatten() > 0).long() if is_binary(logits, labels) else logits.argmax(1)
