"""Poisson sampling, entropy, and the journal."""

import json
import math
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_train.privacy import journal as journals
from robust_train.privacy.entropy import Entropy
from robust_train.privacy.journal import Journal
from robust_train.privacy.sampling import PoissonBatches, micro_batches_for

CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 60),
    rate=st.floats(0.01, 1.0),
    micro=st.integers(1, 5),
    views=st.integers(1, 3),
    world=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_a_logical_batch_holds_every_example_at_most_once(size, rate, micro, views, world, seed):
    for step in range(3):
        drawn = []
        for rank in range(world):
            kind = {"rank": rank, "world": world, "views": views}
            batches = PoissonBatches(size, rate, 3, micro, **kind, entropy=Entropy(seed + rank))
            lists = list(batches)
            assert len(lists) == len(batches) == len(batches.sizes) == 3 * micro
            for at, (place, examples) in enumerate(batches.sizes):
                assert place == at % micro
                assert all(0 <= i < size for i in lists[at])
                assert len(lists[at]) == max(examples, 1) * views
                if at // micro == step and examples:
                    drawn += lists[at][::views]
                    assert lists[at] == [i for i in lists[at][::views] for _ in range(views)]
        assert max(Counter(drawn).values(), default=1) == 1


def test_every_example_is_drawn_with_the_rate_and_independently():
    size, rate, steps = 50, 0.3, 4000
    batches = PoissonBatches(size, rate, steps, 1, entropy=Entropy())
    hits = np.zeros((steps, size))
    for step, (indices, (_, examples)) in enumerate(zip(batches, _taken(batches), strict=False)):
        if examples:
            hits[step, indices] = 1
    deviation = math.sqrt(rate * (1 - rate) / steps)
    assert np.all(np.abs(hits.mean(0) - rate) < 5 * deviation)
    counts = hits.sum(1)
    assert counts.var() == pytest.approx(size * rate * (1 - rate), rel=0.15)  # binomial: no fixed batch size
    assert abs(np.corrcoef(hits[:, 0], hits[:, 1])[0, 1]) < 5 / math.sqrt(steps)


def _taken(batches):
    while True:
        yield batches.sizes.popleft()


def test_a_run_that_goes_on_within_a_logical_batch_stays_aligned():
    batches = PoissonBatches(40, 0.5, 3, 4, entropy=Entropy(0))
    batches.skip = 3
    assert len(list(batches)) == 1 + 2 * 4
    assert [place for place, _ in batches.sizes] == [3, *range(4), *range(4)]
    assert len(list(batches)) == 3 * 4  # only that once


def test_micro_batches_stay_within_their_size():
    rng = np.random.default_rng(0)
    for size, rate, world, examples in ((60_000, 2048 / 60_000, 1, 256), (1000, 0.5, 2, 64), (10, 1.0, 1, 3)):
        k = micro_batches_for(size, rate, world, examples)
        drawn = rng.binomial(math.ceil(size / world), rate, 2000)
        assert math.ceil(drawn.max() / k) <= examples
        assert k <= 1.3 * math.ceil(size * rate / world / examples) + 1


def test_noise_is_standard_normal_and_never_the_same_twice():
    from scipy.stats import kstest

    for secure in (False, True):
        a, b = (Entropy().gaussian(20_001, CPU, secure) for _ in range(2))
        assert a.dtype == torch.float32
        assert a.shape == (20_001,)
        assert not torch.equal(a, b)
        assert kstest(a.numpy(), "norm").pvalue > 1e-4


def test_randomness_ignores_and_leaves_the_global_seeds():
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()
        entropy = Entropy()
        draws.append((entropy.uniform(5).tolist(), entropy.gaussian(5, CPU).tolist()))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]
    assert draws[0] != draws[1]
    assert Entropy(3).uniform(4).tolist() == Entropy(3).uniform(4).tolist()


def test_uniform_draws_have_53_bits():
    values = Entropy().uniform(1000)
    assert values.dtype == np.float64
    assert np.all((values >= 0) & (values < 1))
    assert np.any((values * 2**30) % 1 != 0)  # finer than float32 could tell


# --- journal ------------------------------------------------------------------------------------------------------


def test_a_journal_counts_what_was_recorded(tmp_path):
    journal = Journal.begin(tmp_path, [(2.0, 0.1, 7)])
    for _ in range(3):
        journal.record(1.5, 0.1)
    assert journals.read(journal.path, journal.key) == [(2.0, 0.1, 7), (1.5, 0.1, 3)]
    journal.close()
    again = Journal.resume(journals.find(journal.key, [tmp_path / "nowhere", tmp_path]), journal.key)
    again.record(1.5, 0.1)
    assert journals.read(again.path, again.key)[-1] == (1.5, 0.1, 4)
    again.close()


def test_a_line_that_was_cut_short_counts_nothing_and_is_taken_off(tmp_path):
    journal = Journal.begin(tmp_path)
    journal.record(1.0, 0.1)
    journal.close()
    with journal.path.open("a") as file:
        file.write("[1.0, 0.")
    assert journals.read(journal.path, journal.key) == [(1.0, 0.1, 1)]
    again = Journal.resume(journal.path, journal.key)
    again.record(1.0, 0.1)
    again.close()
    assert journals.read(journal.path, journal.key) == [(1.0, 0.1, 2)]


def test_foreign_journals_are_refused(tmp_path):
    journal = Journal.begin(tmp_path)
    journal.close()
    with pytest.raises(ValueError, match="not a readable privacy journal"):
        journals.read(journal.path, "0" * 16)
    journal.path.write_text(json.dumps({"journal": journal.key, "format": 1}) + "\n[1.0]\n")
    with pytest.raises(ValueError, match="not a readable privacy journal"):
        journals.read(journal.path, journal.key)
    with pytest.raises(ValueError, match="not the key"):
        journals.find("../../etc/passwd", [tmp_path])


def test_what_was_recorded_survives_a_kill(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from robust_train.privacy.journal import Journal\n"
        "j = Journal.begin(Path(sys.argv[1]), key='0' * 16)\n"
        "for _ in range(5): j.record(1.0, 0.5)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    assert journals.read(journals.find("0" * 16, [tmp_path]), "0" * 16) == [(1.0, 0.5, 5)]
