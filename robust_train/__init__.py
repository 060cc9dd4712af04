"""Harden any Lightning training run, measure what that bought, and prove it.

The public names below are imported on first use, so ``import robust_train`` costs nothing: it imports neither torch nor
Lightning nor Hydra.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robust_train.callbacks.adversarial_training import AdversarialTraining as AdversarialTraining
    from robust_train.callbacks.data_filter import DataFilter as DataFilter
    from robust_train.callbacks.data_validation import DataValidation as DataValidation
    from robust_train.callbacks.dp_sgd import DPSGD as DPSGD
    from robust_train.callbacks.poison_simulation import PoisonSimulation as PoisonSimulation
    from robust_train.callbacks.robust_evaluation import RobustEvaluation as RobustEvaluation
    from robust_train.config import recipe as recipe
    from robust_train.evasion.attacks.apgd import APGD as APGD
    from robust_train.evasion.attacks.apgd_targeted import APGDT as APGDT
    from robust_train.evasion.attacks.auto_attack import AutoAttack as AutoAttack
    from robust_train.evasion.attacks.base import Attack as Attack
    from robust_train.evasion.attacks.bpda import BPDA as BPDA
    from robust_train.evasion.attacks.eot import EOT as EOT
    from robust_train.evasion.attacks.fab import FAB as FAB
    from robust_train.evasion.attacks.fgsm import FGSM as FGSM
    from robust_train.evasion.attacks.fmn import FMN as FMN
    from robust_train.evasion.attacks.mi_fgsm import MIFGSM as MIFGSM
    from robust_train.evasion.attacks.pgd import PGD as PGD
    from robust_train.evasion.attacks.square import Square as Square
    from robust_train.evasion.attacks.torchattack import TorchAttack as TorchAttack
    from robust_train.evasion.attacks.uniform_noise import UniformNoise as UniformNoise
    from robust_train.evasion.attacks.worst_case import WorstCase as WorstCase
    from robust_train.evasion.evaluate import evaluate as evaluate
    from robust_train.evasion.metrics import AttackSuccessRate as AttackSuccessRate
    from robust_train.evasion.metrics import RobustAccuracy as RobustAccuracy
    from robust_train.evasion.objectives.alp import ALP as ALP
    from robust_train.evasion.objectives.base import Objective as Objective
    from robust_train.evasion.objectives.mart import MART as MART
    from robust_train.evasion.objectives.pgd_at import PGDAT as PGDAT
    from robust_train.evasion.objectives.trades import TRADES as TRADES
    from robust_train.evasion.threat import Threat as Threat
    from robust_train.evasion.victim import ClassifierVictim as ClassifierVictim
    from robust_train.evasion.victim import Victim as Victim
    from robust_train.poisoning.policy import Policy as Policy
    from robust_train.poisoning.probe import Probe as Probe
    from robust_train.privacy.plan import PrivacyPlan as PrivacyPlan

__version__ = "0.1.0"

_HOME = {
    "ALP": "evasion.objectives.alp",
    "APGD": "evasion.attacks.apgd",
    "APGDT": "evasion.attacks.apgd_targeted",
    "AdversarialTraining": "callbacks.adversarial_training",
    "Attack": "evasion.attacks.base",
    "AttackSuccessRate": "evasion.metrics",
    "AutoAttack": "evasion.attacks.auto_attack",
    "BPDA": "evasion.attacks.bpda",
    "ClassifierVictim": "evasion.victim",
    "DPSGD": "callbacks.dp_sgd",
    "DataFilter": "callbacks.data_filter",
    "DataValidation": "callbacks.data_validation",
    "EOT": "evasion.attacks.eot",
    "FAB": "evasion.attacks.fab",
    "FGSM": "evasion.attacks.fgsm",
    "FMN": "evasion.attacks.fmn",
    "MART": "evasion.objectives.mart",
    "MIFGSM": "evasion.attacks.mi_fgsm",
    "Objective": "evasion.objectives.base",
    "PGD": "evasion.attacks.pgd",
    "PGDAT": "evasion.objectives.pgd_at",
    "PoisonSimulation": "callbacks.poison_simulation",
    "Policy": "poisoning.policy",
    "PrivacyPlan": "privacy.plan",
    "Probe": "poisoning.probe",
    "RobustAccuracy": "evasion.metrics",
    "RobustEvaluation": "callbacks.robust_evaluation",
    "Square": "evasion.attacks.square",
    "TRADES": "evasion.objectives.trades",
    "Threat": "evasion.threat",
    "TorchAttack": "evasion.attacks.torchattack",
    "UniformNoise": "evasion.attacks.uniform_noise",
    "Victim": "evasion.victim",
    "WorstCase": "evasion.attacks.worst_case",
    "evaluate": "evasion.evaluate",
    "recipe": "config",
}

__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
