"""Harden any Lightning training run, measure what that bought, and prove it.

The public names below are imported on first use, so ``import robust_train`` costs nothing: it imports neither torch nor
Lightning nor Hydra.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robust_train.callbacks.adversarial_training import AdversarialTraining as AdversarialTraining
    from robust_train.callbacks.average_training import AverageTraining as AverageTraining
    from robust_train.callbacks.catastrophic_overfitting import CatastrophicOverfitting as CatastrophicOverfitting
    from robust_train.callbacks.certified_evaluation import CertifiedEvaluation as CertifiedEvaluation
    from robust_train.callbacks.certified_training import CertifiedTraining as CertifiedTraining
    from robust_train.callbacks.curriculum_training import CurriculumTraining as CurriculumTraining
    from robust_train.callbacks.data_filter import DataFilter as DataFilter
    from robust_train.callbacks.data_validation import DataValidation as DataValidation
    from robust_train.callbacks.defensive_distillation import DefensiveDistillation as DefensiveDistillation
    from robust_train.callbacks.dp_audit import audit_dp_sgd as audit_dp_sgd
    from robust_train.callbacks.dp_sgd import DPSGD as DPSGD
    from robust_train.callbacks.extra_data import ExtraData as ExtraData
    from robust_train.callbacks.free_training import FreeTraining as FreeTraining
    from robust_train.callbacks.gaussian_augmentation import GaussianAugmentation as GaussianAugmentation
    from robust_train.callbacks.helper_training import HelperTraining as HelperTraining
    from robust_train.callbacks.input_reconstruction import InputReconstruction as InputReconstruction
    from robust_train.callbacks.membership_audit import MembershipAudit as MembershipAudit
    from robust_train.callbacks.poison_simulation import PoisonSimulation as PoisonSimulation
    from robust_train.callbacks.privacy_audit import PrivacyAudit as PrivacyAudit
    from robust_train.callbacks.robust_evaluation import RobustEvaluation as RobustEvaluation
    from robust_train.callbacks.robust_overfitting import RobustOverfitting as RobustOverfitting
    from robust_train.config import recipe as recipe
    from robust_train.evasion.attacks.apgd import APGD as APGD
    from robust_train.evasion.attacks.apgd_targeted import APGDT as APGDT
    from robust_train.evasion.attacks.auto_attack import AutoAttack as AutoAttack
    from robust_train.evasion.attacks.base import Attack as Attack
    from robust_train.evasion.attacks.bpda import BPDA as BPDA
    from robust_train.evasion.attacks.each_threat import EachThreat as EachThreat
    from robust_train.evasion.attacks.eot import EOT as EOT
    from robust_train.evasion.attacks.fab import FAB as FAB
    from robust_train.evasion.attacks.fgsm import FGSM as FGSM
    from robust_train.evasion.attacks.fmn import FMN as FMN
    from robust_train.evasion.attacks.mi_fgsm import MIFGSM as MIFGSM
    from robust_train.evasion.attacks.patch import Patch as Patch
    from robust_train.evasion.attacks.pgd import PGD as PGD
    from robust_train.evasion.attacks.sparse_rs import SparseRS as SparseRS
    from robust_train.evasion.attacks.spatial import Spatial as Spatial
    from robust_train.evasion.attacks.square import Square as Square
    from robust_train.evasion.attacks.torchattack import TorchAttack as TorchAttack
    from robust_train.evasion.attacks.uniform_noise import UniformNoise as UniformNoise
    from robust_train.evasion.attacks.universal import Universal as Universal
    from robust_train.evasion.attacks.universal import save_universal as save_universal
    from robust_train.evasion.attacks.universal import universal_perturbation as universal_perturbation
    from robust_train.evasion.attacks.worst_case import WorstCase as WorstCase
    from robust_train.evasion.certified.crown_ibp import CROWNIBP as CROWNIBP
    from robust_train.evasion.certified.ibp import IBP as IBP
    from robust_train.evasion.certified.smoothing import Smoothing as Smoothing
    from robust_train.evasion.certified.verifier import Verifier as Verifier
    from robust_train.evasion.corruptions import Corruptions as Corruptions
    from robust_train.evasion.distillation import TemperedAttack as TemperedAttack
    from robust_train.evasion.evaluate import evaluate as evaluate
    from robust_train.evasion.examples import AdversarialExamples as AdversarialExamples
    from robust_train.evasion.gain import Gain as Gain
    from robust_train.evasion.metrics import AttackSuccessRate as AttackSuccessRate
    from robust_train.evasion.metrics import RobustAccuracy as RobustAccuracy
    from robust_train.evasion.objectives.alp import ALP as ALP
    from robust_train.evasion.objectives.awp import AWP as AWP
    from robust_train.evasion.objectives.base import Objective as Objective
    from robust_train.evasion.objectives.free_lb import FreeLB as FreeLB
    from robust_train.evasion.objectives.grad_align import GradAlign as GradAlign
    from robust_train.evasion.objectives.mart import MART as MART
    from robust_train.evasion.objectives.pgd_at import PGDAT as PGDAT
    from robust_train.evasion.objectives.trades import TRADES as TRADES
    from robust_train.evasion.outcomes import Evaluation as Evaluation
    from robust_train.evasion.reconstruction.adaptive import AdaptiveAttack as AdaptiveAttack
    from robust_train.evasion.reconstruction.base import Reconstruction as Reconstruction
    from robust_train.evasion.reconstruction.bit_depth import BitDepth as BitDepth
    from robust_train.evasion.reconstruction.denoising_autoencoder import DenoisingAutoencoder as DenoisingAutoencoder
    from robust_train.evasion.reconstruction.gaussian_smoothing import GaussianSmoothing as GaussianSmoothing
    from robust_train.evasion.reconstruction.median_smoothing import MedianSmoothing as MedianSmoothing
    from robust_train.evasion.threat import Threat as Threat
    from robust_train.evasion.threat_union import ThreatUnion as ThreatUnion
    from robust_train.evasion.victim import ClassifierVictim as ClassifierVictim
    from robust_train.evasion.victim import Victim as Victim
    from robust_train.poisoning.policy import Policy as Policy
    from robust_train.poisoning.probe import Probe as Probe
    from robust_train.privacy.output.base import PerturbedOutputs as PerturbedOutputs
    from robust_train.privacy.plan import PrivacyPlan as PrivacyPlan

__version__ = "0.1.0"

_HOME = {
    "ALP": "evasion.objectives.alp",
    "APGD": "evasion.attacks.apgd",
    "APGDT": "evasion.attacks.apgd_targeted",
    "AWP": "evasion.objectives.awp",
    "AdaptiveAttack": "evasion.reconstruction.adaptive",
    "AdversarialExamples": "evasion.examples",
    "AdversarialTraining": "callbacks.adversarial_training",
    "Attack": "evasion.attacks.base",
    "AttackSuccessRate": "evasion.metrics",
    "AutoAttack": "evasion.attacks.auto_attack",
    "AverageTraining": "callbacks.average_training",
    "BPDA": "evasion.attacks.bpda",
    "BitDepth": "evasion.reconstruction.bit_depth",
    "CROWNIBP": "evasion.certified.crown_ibp",
    "CatastrophicOverfitting": "callbacks.catastrophic_overfitting",
    "CertifiedEvaluation": "callbacks.certified_evaluation",
    "CertifiedTraining": "callbacks.certified_training",
    "ClassifierVictim": "evasion.victim",
    "Corruptions": "evasion.corruptions",
    "CurriculumTraining": "callbacks.curriculum_training",
    "DPSGD": "callbacks.dp_sgd",
    "DataFilter": "callbacks.data_filter",
    "DataValidation": "callbacks.data_validation",
    "DefensiveDistillation": "callbacks.defensive_distillation",
    "DenoisingAutoencoder": "evasion.reconstruction.denoising_autoencoder",
    "EOT": "evasion.attacks.eot",
    "EachThreat": "evasion.attacks.each_threat",
    "Evaluation": "evasion.outcomes",
    "ExtraData": "callbacks.extra_data",
    "FAB": "evasion.attacks.fab",
    "FGSM": "evasion.attacks.fgsm",
    "FMN": "evasion.attacks.fmn",
    "FreeLB": "evasion.objectives.free_lb",
    "FreeTraining": "callbacks.free_training",
    "Gain": "evasion.gain",
    "GaussianAugmentation": "callbacks.gaussian_augmentation",
    "GaussianSmoothing": "evasion.reconstruction.gaussian_smoothing",
    "GradAlign": "evasion.objectives.grad_align",
    "HelperTraining": "callbacks.helper_training",
    "IBP": "evasion.certified.ibp",
    "InputReconstruction": "callbacks.input_reconstruction",
    "MART": "evasion.objectives.mart",
    "MIFGSM": "evasion.attacks.mi_fgsm",
    "MedianSmoothing": "evasion.reconstruction.median_smoothing",
    "MembershipAudit": "callbacks.membership_audit",
    "Objective": "evasion.objectives.base",
    "PGD": "evasion.attacks.pgd",
    "PGDAT": "evasion.objectives.pgd_at",
    "Patch": "evasion.attacks.patch",
    "PerturbedOutputs": "privacy.output.base",
    "PoisonSimulation": "callbacks.poison_simulation",
    "Policy": "poisoning.policy",
    "PrivacyAudit": "callbacks.privacy_audit",
    "PrivacyPlan": "privacy.plan",
    "Probe": "poisoning.probe",
    "Reconstruction": "evasion.reconstruction.base",
    "RobustAccuracy": "evasion.metrics",
    "RobustEvaluation": "callbacks.robust_evaluation",
    "RobustOverfitting": "callbacks.robust_overfitting",
    "Smoothing": "evasion.certified.smoothing",
    "SparseRS": "evasion.attacks.sparse_rs",
    "Spatial": "evasion.attacks.spatial",
    "Square": "evasion.attacks.square",
    "TRADES": "evasion.objectives.trades",
    "TemperedAttack": "evasion.distillation",
    "Threat": "evasion.threat",
    "ThreatUnion": "evasion.threat_union",
    "TorchAttack": "evasion.attacks.torchattack",
    "UniformNoise": "evasion.attacks.uniform_noise",
    "Universal": "evasion.attacks.universal",
    "Verifier": "evasion.certified.verifier",
    "Victim": "evasion.victim",
    "WorstCase": "evasion.attacks.worst_case",
    "audit_dp_sgd": "callbacks.dp_audit",
    "evaluate": "evasion.evaluate",
    "recipe": "config",
    "save_universal": "evasion.attacks.universal",
    "universal_perturbation": "evasion.attacks.universal",
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
