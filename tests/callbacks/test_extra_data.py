"""Unlabelled data with pseudo-labels in every training batch of unmodified modules and data modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from foreign.batches import TupleBatch
from foreign.cases import CASES
from foreign.data import image_columns, loader
from foreign.runs import assert_same, fit, make_trainer, portrait
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from robust_train import DPSGD, PGD, AdversarialTraining, DataFilter, ExtraData, FreeTraining, Threat
from robust_train.callbacks._batch import find_input, get
from robust_train.callbacks.extra_data import drawn, joined

pytestmark = pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
KINDS = ["tuple", "dict", "named_tuple", "nasty", "manual_accumulation", "soft_labels", "transfer_hook", "unified"]
EXTRA = image_columns(30, seed=5)[0]


def extra(case, data=None, **settings):
    return ExtraData(TensorDataset(EXTRA) if data is None else data, **{"epochs": 1, **case.where, **settings})


def watching(case):
    """A module that notes each real training batch's inputs."""

    class Watching(case.module):
        rows_seen: list = []  # noqa: RUF012  (of the class, so that the callbacks take it for nobody's state)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self._trainer.logger is not None and type(self._trainer.logger).__name__ == "RecordingLogger":
                Watching.rows_seen.append(get(batch, find_input(batch)).clone())

    return Watching


@pytest.mark.parametrize("name", KINDS)
def test_every_batch_has_rows_of_both(name):
    case = CASES[name]
    data = TensorDataset((EXTRA * 255).byte()) if name == "transfer_hook" else None
    module = watching(case)()
    result = fit(case, AdversarialTraining(PGD(steps=1), case.ball(0.1)), extra(case, data, ratio=0.5), module=module)
    assert [len(x) for x in module.rows_seen] == [12, 12, 6] * 2
    pool = {row.numpy().tobytes() for row in EXTRA}
    if name != "transfer_hook":
        for x in module.rows_seen:
            added = [row.cpu().numpy().tobytes() in pool for row in x]
            assert added == [False] * (len(x) * 2 // 3) + [True] * (len(x) // 3)
    assert result.trainer.global_step == fit(case).trainer.global_step


def test_the_order_in_the_list_does_not_matter():
    case = CASES["tuple"]
    order = [extra(case), AdversarialTraining(PGD(steps=1), case.ball(0.1))]
    assert_same(fit(case, *order).trace, fit(case, *order[::-1]).trace)


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=repr)
def test_other_trainers(settings):
    case = CASES["nasty"]
    assert_same(fit(case, extra(case), **settings).trace, fit(case, extra(case), **settings).trace)


def test_labels_are_those_of_the_checkpoint_in_eval_mode(tmp_path):
    teacher, seen = TupleBatch(), []
    teacher.net(torch.rand(16, 1, 8, 8) * 3)
    torch.save({"state_dict": teacher.state_dict()}, tmp_path / "teacher.ckpt")
    np.save(tmp_path / "rows.npy", EXTRA.numpy())

    class Spy(TupleBatch):
        def on_train_batch_start(self, batch, batch_idx):
            seen.append((batch[0].clone(), batch[1].clone()))

    case = CASES["tuple"]
    fit(case, extra(case, str(tmp_path / "rows.npy"), checkpoint=str(tmp_path / "teacher.ckpt")), module=Spy())
    teacher.eval()
    assert len(seen) == 6
    for x, y in seen:
        half = len(x) // 2
        assert torch.equal(y[half:], teacher(x[half:]).argmax(1))
    drawn_rows = torch.cat([x[len(x) // 2 :] for x, _ in seen[:3]])
    assert len({row.numpy().tobytes() for row in drawn_rows}) == 20  # none twice before all were seen


def test_the_module_learns_from_itself_where_no_checkpoint_is_given():
    module = TupleBatch()
    before = portrait(dict(module.state_dict()))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    fit(CASES["tuple"], extra(CASES["tuple"]), module=module, max_epochs=1)
    kept = {
        k: v for k, v in portrait(dict(module.state_dict())).items() if "running" not in k and "num_batches" not in k
    }
    assert kept == {k: before[k] for k in kept}


def test_beside_free_training_each_mixed_batch_is_replayed():
    case = CASES["tuple"]
    for order in ([FreeTraining(Threat(eps=0.1), 2), extra(case)], [extra(case), FreeTraining(Threat(eps=0.1), 2)]):
        module = watching(case)()
        fit(case, *order, module=module, max_epochs=1)
        assert [len(x) for x in module.rows_seen] == [16, 16, 16, 16, 8, 8]


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5))
def test_rows_are_drawn_without_replacement_until_all_were_seen(rows, size, seed):
    sizes = [size, size, max(1, size // 2)]
    stream = torch.cat([drawn(rows, n, sum(sizes[:i]), seed) for i, n in enumerate(sizes)])
    assert len(stream) == sum(sizes)
    for part in stream.split(rows):
        assert len(set(part.tolist())) == len(part)
    assert int(stream.max()) < rows


def test_labels_take_the_form_of_those_that_there_are():
    x, classes = torch.zeros(2, 4), torch.tensor([2, 0])
    batch = joined((torch.ones(3, 4), torch.full((3, 3), 1 / 3)), ((0,), (1,)), x, classes)
    assert batch[0].shape == (5, 4)
    assert batch[1][3:].tolist() == [[0, 0, 1], [1, 0, 0]]
    binary = joined((torch.ones(3, 4), torch.zeros(3, 1)), ((0,), (1,)), x, torch.tensor([[1], [0]]))
    assert binary[1].tolist() == [[0], [0], [0], [1], [0]]
    assert joined({"x": torch.ones(1, 4), "y": torch.ones(1).long()}, (("x",), ("y",)), x, classes)["y"].tolist() == [
        1,
        2,
        0,
    ]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"data": 3}, "extra_data.data must be a dataset"),
        ({"ratio": 0}, "extra_data.ratio must be > 0"),
        ({"epochs": 0}, "extra_data.epochs"),
        ({"seed": -1}, "extra_data.seed"),
        ({"checkpoint": 3}, "extra_data.checkpoint"),
    ],
)
def test_bad_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        ExtraData(**{"data": TensorDataset(EXTRA), **settings})


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("rows.npy", "is no .npy file"),
        (TensorDataset(EXTRA[:, :, :4]), "rows of shape"),
        (TensorDataset(EXTRA[:0]), "holds no rows"),
    ],
    ids=["no file", "shape", "empty"],
)
def test_data_that_do_not_fit_are_refused_before_anything_is_trained(data, says):
    with pytest.raises((ValueError, RuntimeError), match=says):
        fit(CASES["tuple"], extra(CASES["tuple"], data))


@pytest.mark.parametrize("other", [DPSGD(noise_multiplier=1.0, sample_rate=0.5), DataFilter()], ids=["dp", "filter"])
def test_what_it_cannot_stand_beside_is_refused(other):
    with pytest.raises(ValueError, match="ExtraData cannot stand beside"):
        make_trainer(CASES["tuple"].trainer, extra(CASES["tuple"]), other).fit(TupleBatch(), **CASES["tuple"].data())


def test_batches_with_something_else_for_every_row_are_refused():
    x, y = image_columns(8)
    data = {"train_dataloaders": loader(x, y, torch.arange(8), as_batch=lambda x, y, i: (x, y, i))}

    class Third(TupleBatch):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:2], batch_idx)

    with pytest.raises(ValueError, match=r"also holds \[2\] for every row"):
        fit(CASES["tuple"], extra(CASES["tuple"]), module=Third(), data=data)


def test_a_task_without_classes_is_refused():
    case = CASES["regression"]
    with pytest.raises(ValueError, match="ExtraData labels rows by class"):
        fit(case, extra(case, TensorDataset(torch.zeros(4, 6))))
