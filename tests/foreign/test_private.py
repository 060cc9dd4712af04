"""Modules that other people wrote, trained with differential privacy as they are, or refused for a reason."""

from __future__ import annotations

import pytest
import torch
from foreign.cases import CASES, NAMES
from foreign.runs import fit, portrait

from robust_train import DPSGD

pytestmark = [  # the last two are torch.compile's own
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]
REFUSED = {
    "gan": "manual optimization",
    "manual_accumulation": "manual optimization",
    "manual_closure": "manual optimization",
    "manual_skips": "manual optimization",
    "second_order": "LBFGS",
    "skips_batches": "returned no loss",
    "gradient_penalty": "gradient of a gradient",
    "nasty": "parametrization",  # a spectral norm that is estimated step by step
    "old_spectral_norm": "no epsilon would hold",
    "hidden_teacher": "other examples of its batch",  # batch normalisation in a module that no one else can see
    "lazy_buffer": "other examples of its batch",
    "queue": "writes into queue",
    "holds_iterator": "an iterator of the module's own",
}


@pytest.mark.parametrize("name", NAMES)
def test_trains_privately_or_says_why_not(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case, settings = CASES[name], {"max_epochs": 1, "limit_val_batches": 0}
    module = case.module()
    callback = DPSGD(noise_multiplier=1.0, accountant="rdp", fix_modules=True)
    if name in REFUSED:
        with pytest.raises((ValueError, RuntimeError), match=f"DPSGD.*{REFUSED[name]}"):
            fit(case, callback, module=module, **settings)
        return
    start = portrait(module.state_dict())
    fit(case, callback, module=module, **settings)
    weights = module.state_dict()
    assert all(bool(torch.isfinite(w).all()) for w in weights.values() if w.is_floating_point())
    assert portrait(weights) != start
    assert sum(steps for *_, steps in callback.history) > 0
    assert callback.epsilon() > 0
