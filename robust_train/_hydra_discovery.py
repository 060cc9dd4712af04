"""Shipped as ``hydra_plugins/robust_train_configs.py``, the only place where Hydra looks for plugins."""

from robust_train.hydra_plugin import RobustTrainConfigs, RobustTrainSearchPath

__all__ = ["RobustTrainConfigs", "RobustTrainSearchPath"]
