"""What a checkpoint's model needs beside it to be judged as it was meant to be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from robust_train.config import build

# by callback: what its checkpoint is without it, and the config that brings it back
PART_OF_THE_MODEL = {
    "InputReconstruction": ("the model alone, without its reconstruction", "input_reconstruction"),
    "DefensiveDistillation": ("the student, by attacks that do not know of the distillation", "defensive_distillation"),
}


def beside(cfg: DictConfig, path: Path) -> list[Any]:
    """The callbacks that are named in ``cfg.callbacks`` and act at test, as the checkpoint left them.

    Says aloud where the checkpoint's run had one that is not named.

    Args:
        cfg: ``conf/evaluate.yaml``, composed.
        path: the checkpoint, of the model that is judged.
    """
    import torch

    nodes: Any = OmegaConf.to_container(cfg.callbacks, resolve=True) if cfg.get("callbacks") else {}
    built = build({"callbacks": nodes}, allow=list(cfg.allow))["callbacks"].values() if nodes else ()
    found = [callback for callback in built if getattr(callback, "at_test", False)]
    states = torch.load(path, map_location="cpu", weights_only=True).get("callbacks")
    states = states if isinstance(states, dict) else {}
    for callback in found:
        if callback.state_key in states:
            callback.load_state_dict(states[callback.state_key])
    named = {type(callback).__name__ for callback in found}
    for kind, (judged, config) in PART_OF_THE_MODEL.items():
        if kind not in named and any(key.partition("{")[0] == kind for key in states):
            print(
                f"The checkpoint's run had {kind}: what is judged here is {judged}. With it, and against it: "
                f"+callback@callbacks.{config}={config}, and the settings that it was given."
            )
    return found
