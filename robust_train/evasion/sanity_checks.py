"""Signs that an evaluation is fooled: hidden gradients, random outputs, inputs in other units.

Each check is a pure function of a few measured numbers and returns a ``Flag``, or None where nothing is wrong. A flag
says that a robust accuracy is too high, or may be; none says that a model is robust.

Reference:
    Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
    2020 (the flags of AutoAttack); Carlini et al., "On Evaluating Adversarial Robustness", 2019, section 5 (the
    checklist); Athalye et al., "Obfuscated Gradients Give a False Sense of Security", 2018, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.stats import binom
from torch import Tensor

from robust_train.evasion.threat import Threat
from robust_train.intervals import clopper_pearson

FEW = 0.01  # share of the examples that may have no gradient
SIGNIFICANT = 0.01  # of the sign test between two attacks
UNFOUND = 0.05  # share of the examples that the white-box attack may leave to the black-box one, or to an unbounded one
NOISE = 1e-3  # of the scores' spread: what rounding may do
ENOUGH = 10  # examples from which a share of those that withstand an attacker without bounds is taken
BEYOND = 1e-5  # of the range: what rounding may do to inputs


@dataclass(frozen=True)
class Flag:
    """One sign that a result is not to be trusted.

    Attributes:
        name: always the same for the same sign, such as ``"zero_gradients"``.
        says: what was seen, with its numbers.
        advice: what to do.
        evidence: the numbers.
    """

    name: str
    says: str
    advice: str
    evidence: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}: {self.says}; {self.advice}."

    def as_dict(self) -> dict[str, Any]:
        """As plain builtins."""
        return {"name": self.name, "says": self.says, "advice": self.advice, "evidence": dict(self.evidence)}


def zero_gradients(loss_gradients: Tensor, margin_gradients: Tensor | None = None) -> Flag | None:
    """Examples whose loss does not change with the input: a gradient attack stands still there.

    Args:
        loss_gradients: of the loss in the input of each example that is right ``(B, ...)``; what is not a number is no
            zero.
        margin_gradients: of the difference of two class scores, where the task has them: tells a loss that is
            saturated from a step that has no gradient.
    """
    flat = torch.nan_to_num(loss_gradients, nan=1.0).flatten(1)
    share = float((flat == 0).all(1).float().mean())
    if share <= FEW:
        return None
    evidence = {"share": share}
    advice = "a step of the model has no gradient: attack with BPDA, or with a black box (Square, HopSkipJump)"
    if margin_gradients is not None:
        evidence["share_of_margins"] = float((margin_gradients.flatten(1) == 0).all(1).float().mean())
        if evidence["share_of_margins"] <= FEW:
            advice = (
                "the loss is saturated: attack its scores with APGD(loss='dlr'), or divide the logits by a constant"
            )
    return Flag(
        "zero_gradients", f"{_percent(share)} of the examples that are right have no gradient", advice, evidence
    )


def nonfinite_gradients(loss_gradients: Tensor, outputs: Tensor | None = None) -> Flag | None:
    """Gradients or outputs that are NaN or infinite: attacks take them for zero.

    Args:
        loss_gradients: as in ``zero_gradients``.
        outputs: of the model, any shape.
    """
    share = float((~torch.isfinite(loss_gradients.flatten(1))).any(1).float().mean())
    wrong = (
        0.0 if outputs is None else float((~torch.isfinite(outputs.reshape(len(outputs), -1))).any(1).float().mean())
    )
    if share == wrong == 0:
        return None
    says = f"{_percent(share)} of the examples have gradients, and {_percent(wrong)} outputs, that are not finite"
    advice = "find the operation that divides by zero or overflows, or evaluate in float32"
    return Flag("nonfinite_gradients", says, advice, {"share": share, "share_of_outputs": wrong})


def one_step_stronger(one_step: Tensor, many_steps: Tensor) -> Flag | None:
    """One step fools examples that many steps do not: the gradient leads nowhere.

    Args:
        one_step: which examples it fooled, bool ``(B,)``.
        many_steps: the same of the attack with many steps, on the same examples.
    """
    more, fewer = int((one_step & ~many_steps).sum()), int((many_steps & ~one_step).sum())
    if not _more_often(more, fewer):
        return None
    says = f"one step fools {int(one_step.sum())} of {len(one_step)} examples, many steps {int(many_steps.sum())}"
    advice = "the loss is rugged or its gradient misleads: add restarts, EOT, Square, or smaller steps"
    return Flag("one_step_stronger", says, advice, _counts(one_step, many_steps, "one_step", "many_steps"))


def black_box_stronger(black_box: Tensor, white_box: Tensor) -> Flag | None:
    """An attack without gradients fools examples that the one with gradients does not.

    Args:
        black_box: which examples it fooled, bool ``(B,)``.
        white_box: the same of the attack that sees gradients, on the same examples.
    """
    more, fewer = int((black_box & ~white_box).sum()), int((white_box & ~black_box).sum())
    unfound = more >= 2 and more > UNFOUND * len(black_box)
    if not (_more_often(more, fewer) or unfound):
        return None
    says = f"of {len(black_box)} examples {more} are fooled without gradients and not with them"
    advice = "gradients are masked: use BPDA or EOT, APGD on the dlr loss, and count the black box in the worst case"
    return Flag("black_box_stronger", says, advice, _counts(black_box, white_box, "black_box", "white_box"))


def unbounded_attack_fails(fooled: Tensor, eps: float) -> Flag | None:
    """An attacker who may do anything must fool every example; who does not has no gradient to follow.

    Args:
        fooled: which examples an attack fooled that may move each input anywhere in its range, bool ``(B,)``.
        eps: the largest radius that was tried.
    """
    left = len(fooled) - int(fooled.sum())
    low, _ = clopper_pearson(left, len(fooled))
    share = left / len(fooled)
    if len(fooled) < ENOUGH or left < 2 or share <= UNFOUND or low <= 0:
        return None
    says = f"{_percent(share)} of the examples withstand an attacker without bounds (eps {eps:.3g})"
    advice = "the attack, not the model, has reached its limit: see zero_gradients and black_box_stronger"
    return Flag("unbounded_attack_fails", says, advice, {"share_left": share, "eps": eps})


def randomised_outputs(passes: Sequence[Tensor], draws: int = 1) -> Flag | None:
    """The same inputs, asked several times, are answered differently.

    Args:
        passes: scores of each pass, all of one shape ``(B, ...)``.
        draws: how many random passes a verdict is made of.
    """
    first = passes[0].float()
    others = torch.stack([scores.float() for scores in passes[1:]])
    change, spread = float((others - first).abs().max()), float(first.std()) if first.numel() > 1 else 1.0
    if not change > NOISE * max(spread, 1e-12):
        return None
    evidence = {"largest_change": change, "spread": spread}
    if first.ndim == 2 and first.shape[1] > 1:
        evidence["share_of_predictions_changed"] = float((others.argmax(2) != first.argmax(1)).float().mean())
    advice = "attack with EOT and judge by several draws (draws=10); a single one is partly the attacker's bad luck"
    if draws > 1:
        advice = f"so the attacks see the mean of {draws} draws (EOT), and each verdict is the mean over {draws} draws"
        evidence["draws"] = float(draws)
    return Flag("randomised_outputs", "two evaluations of the same inputs differ", advice, evidence)


def depends_on_batch(alone: Tensor, together: Tensor) -> Flag | None:
    """An example's scores change with the other examples of its batch.

    Args:
        alone: scores of some examples in a smaller batch ``(B, ...)``.
        together: the same examples' in the whole batch.
    """
    change = float((alone.float() - together.float()).abs().max())
    spread = float(together.float().std()) if together.numel() > 1 else 1.0
    if not change > NOISE * max(spread, 1e-12):
        return None
    says = "the scores of an example depend on the others in its batch"
    advice = "let batch normalisation use its running statistics; verdicts on parts of a batch do not hold otherwise"
    return Flag("depends_on_batch", says, advice, {"largest_change": change, "spread": spread})


def probability_outputs(outputs: Tensor) -> Flag | None:
    """The model returns probabilities: their gradients vanish where it is sure of itself.

    Args:
        outputs: as the model returns them, ``(B, classes, ...)``; rows in [0, 1] that sum to 1 are probabilities. One
            score an example, ``(B,)`` or ``(B, 1)``, is one where all lie in [0, 1], some near each end.
    """
    values = outputs.float()
    if not bool(((values >= 0) & (values <= 1)).all()):
        return None
    if values.ndim >= 2 and values.shape[1] > 1:
        found = float((values.sum(1) - 1).abs().max()) < 1e-3
    else:
        found = values.numel() > 1 and float(values.min()) < 0.1 and float(values.max()) > 0.9
    if not found:
        return None
    advice = "return logits, without the last softmax or sigmoid; of several classes the logarithm is attacked here"
    return Flag(
        "probability_outputs", "the model's outputs are probabilities", advice, {"largest": float(values.max())}
    )


def inputs_out_of_bounds(x: Tensor, threat: Threat) -> Flag | None:
    """Clean inputs that lie outside of the threat's range, by more than rounding.

    Far outside, the evaluation is refused instead; see ``Threat.check_input``.

    Args:
        x: clean inputs ``(B, ...)``.
        threat: whose ``low`` and ``high`` are meant.
    """
    pixels = threat.to_pixels(x.detach().double())
    low, high = threat._vector(threat.low, pixels), threat._vector(threat.high, pixels)
    below, above = float((low - pixels).max()), float((pixels - high).max())
    width = float((high - low).max())
    if max(below, above) <= BEYOND * (width if width < torch.inf else 1.0):
        return None
    says = f"inputs lie outside of the threat's range, by {max(below, above):.3g}"
    advice = "clamp them in the data pipeline, or give the pipeline's numbers as threat.mean and threat.std"
    return Flag("inputs_out_of_bounds", says, advice, {"below": max(below, 0.0), "above": max(above, 0.0)})


def train_mode(modules: Sequence[str]) -> Flag | None:
    """Layers that behave as in training although the model was put into eval mode.

    Args:
        modules: their names.
    """
    if not modules:
        return None
    named = ", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
    says = f"layers are in training mode while the model is judged: {named}"
    advice = "call model.eval(), and do not override train() or eval() so that they skip layers"
    return Flag("train_mode", says, advice, {"layers": float(len(modules))})


def _more_often(more: int, fewer: int) -> bool:
    """Sign test: one of two attacks wins more of the examples on which they differ than chance would explain."""
    return more > 0 and float(binom.sf(more - 1, more + fewer, 0.5)) < SIGNIFICANT


def _counts(a: Tensor, b: Tensor, first: str, second: str) -> dict[str, float]:
    return {
        f"fooled_by_{first}": float(a.sum()),
        f"fooled_by_{second}": float(b.sum()),
        f"only_by_{first}": float((a & ~b).sum()),
        "examples": float(len(a)),
    }


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
