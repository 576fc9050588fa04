"""Inception score and class agreement: exact answers, naive loops, Bayes accuracies and scikit-learn's LDA."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.errors import DataError
from fewstep.evaluation.bootstrap import half_samples, spread_of
from fewstep.evaluation.scores import Probe, _within, class_agreement, inception_score, probe_accuracy


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- Inception score --------------------------------------------------------------------------------------


def looped(logits: Tensor) -> float:
    """exp(mean KL(p(y|x) ‖ p(y))), one class at a time."""
    p = np.exp(logits.numpy())
    p /= p.sum(1, keepdims=True)
    mean = p.mean(0)
    kl = [sum(q * math.log(q / m) for q, m in zip(row, mean, strict=True)) for row in p]
    return math.exp(sum(kl) / len(kl))


def test_sure_and_even_is_the_number_of_classes_and_ignorant_is_one() -> None:
    sure = 1e4 * torch.eye(10).repeat(30, 1)  # its softmax is one-hot to the last bit
    assert inception_score(sure, splits=1).value == pytest.approx(10, rel=1e-12)
    assert inception_score(torch.full((300, 10), 3.7)).value == pytest.approx(1, rel=1e-12)
    assert inception_score(sure[::10], replicates=0).value == pytest.approx(1, rel=1e-12)  # collapsed to one class
    assert inception_score(sure[: 10 * 30 // 2], splits=1).value == pytest.approx(10, rel=1e-12)


def test_inception_score_against_a_loop() -> None:
    logits = 2 * normal(95, 10, seed=1)
    expected = looped(logits)
    assert 2 < expected < 8
    assert inception_score(logits).value == pytest.approx(expected, rel=1e-12)  # 95 < 10 · 10: one part
    assert inception_score(logits + normal(95, 1, seed=2)).value == pytest.approx(expected, rel=1e-9)
    assert inception_score(logits[torch.randperm(95)]).value == pytest.approx(expected, rel=1e-12)
    assert inception_score(logits.float()).value == pytest.approx(expected, rel=1e-5)


def test_ten_interleaved_parts() -> None:
    """Sorted by class, 1000 rows: each part has all classes, and the score is the mean over the parts."""
    logits = 1e4 * torch.eye(10).repeat_interleave(100, 0)
    assert inception_score(logits).value == pytest.approx(10, rel=1e-12)
    noisy = logits / 5e3 + normal(1000, 10, seed=3)
    expected = sum(looped(noisy[i::10]) for i in range(10)) / 10
    assert inception_score(noisy).value == pytest.approx(expected, rel=1e-12)
    assert abs(expected - looped(noisy)) > 0.005
    assert inception_score(noisy, splits=4).value == pytest.approx(sum(looped(noisy[i::4]) for i in range(4)) / 4)
    assert inception_score(noisy[:99]).value == pytest.approx(looped(noisy[:99]), rel=1e-12)


def test_spread_of_the_inception_score() -> None:
    logits = 2 * normal(90, 5, seed=4)
    halves = [inception_score(logits[half], splits=1, replicates=0).value for half in half_samples(90, 9, 7)]
    assert inception_score(logits, splits=1, replicates=9, seed=7).spread == pytest.approx(spread_of(halves), rel=1e-12)
    runs = [inception_score(2 * normal(400, 5, seed=100 + i), replicates=20, seed=i) for i in range(60)]
    true = float(np.std([run.value for run in runs], ddof=1))
    assert float(np.mean([run.spread for run in runs])) == pytest.approx(true, rel=0.3)


# --- The probe --------------------------------------------------------------------------------------------


def clusters(n: int, classes: int, gap: float, seed: int, d: int = 6) -> tuple[Tensor, Tensor]:
    """Correlated clusters around random centres ``gap`` apart, labels 0, 1, ... in turn."""
    labels = torch.arange(n) % classes
    centres = gap * normal(classes, d, seed=999)
    return centres[labels] + normal(n, d, seed=seed) @ (normal(d, d, seed=998) / 2 + torch.eye(d)), labels


def test_the_probe_of_two_lines() -> None:
    """Means -1 and 5, the same variance in both: the border is at 2."""
    rows = torch.tensor([[-2.0], [0.0], [4.0], [6.0], [5.0], [5.0]], dtype=torch.float64)
    probe = Probe.fit(rows, torch.tensor([7, 7, 3, 3, 3, 3]))
    assert probe.classify(torch.tensor([[1.99], [2.01], [-50.0], [50.0]]).double()).tolist() == [7, 3, 7, 3]


def shrinkage(s: Tensor, n: int) -> float:
    """Chen et al. 2010, eq. 23."""
    d, trace, square = len(s), float(s.trace()), float((s @ s).trace())
    return ((1 - 2 / d) * square + trace**2) / ((n + 1 - 2 / d) * (square - trace**2 / d))


def test_shrinkage_follows_the_formula() -> None:
    """By hand, S = diag(2, 2/3) at n = 3: ρ = min(1, (8/3)²/(3 (40/9 - 32/9))) = 1."""
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-2.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(_within(x), 4 / 3 * torch.eye(2, dtype=torch.float64))
    x = normal(40, 3, seed=5) * torch.tensor([3.0, 1.0, 0.2])
    s = x.T @ x / 40
    rho = shrinkage(s, 40)
    assert 0.01 < rho < 0.5
    assert torch.allclose(_within(x), (1 - rho) * s + rho * s.trace() / 3 * torch.eye(3, dtype=torch.float64))
    assert torch.equal(_within(torch.zeros(4, 2)), torch.eye(2))


@pytest.mark.parametrize("d", [6, 40])
def test_the_probe_agrees_with_scikit_learn(d: int) -> None:
    lda = pytest.importorskip("sklearn.discriminant_analysis", reason="scikit-learn, the referee, is not installed")
    rows, labels = clusters(120, 4, 0.8, seed=6, d=d)
    queries, _ = clusters(500, 4, 0.8, seed=7, d=d)
    residuals = rows - torch.stack([rows[labels == c].mean(0) for c in range(4)])[labels]
    rho = shrinkage(residuals.T @ residuals / 120, 120)
    referee = lda.LinearDiscriminantAnalysis(solver="lsqr", shrinkage=rho, priors=[0.25] * 4)
    referee.fit(rows.numpy(), labels.numpy())  # equal counts: its mean of class covariances is the pooled one
    seen = Probe.fit(rows, labels).classify(queries).numpy()
    assert 0.3 < float((seen == np.arange(500) % 4).mean()) < 1
    assert (seen == referee.predict(queries.numpy())).all()


def test_probe_accuracy_reaches_bayes() -> None:
    """Two Gaussians 2δ apart in Mahalanobis distance: Φ(δ)."""
    n = 8000
    labels = torch.arange(n) % 2
    mixing = torch.tensor([[1.0, 0.9], [0.0, 0.1]], dtype=torch.float64)  # strongly correlated: nearest mean would fail
    shift = torch.tensor([0.6, 0.8], dtype=torch.float64)  # unit length: δ = 1 before mixing
    rows = (normal(n, 2, seed=8) + (2 * labels[:, None] - 1) * shift) @ mixing
    bayes = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    assert probe_accuracy(rows, labels) == pytest.approx(bayes, abs=4 * math.sqrt(0.25 / (n / 2)))


def test_probe_accuracy_is_held_out_and_balanced_by_class() -> None:
    """Random labels and more features than rows: a probe tested on its own rows would be right in nine of ten."""
    rows, labels = normal(200, 300, seed=9), torch.arange(200) % 2
    seen = Probe.fit(rows, labels).classify(rows)
    assert float((seen == labels).double().mean()) > 0.9
    assert abs(probe_accuracy(rows, labels) - 0.5) < 4 * math.sqrt(0.25 / 100)
    separated, labels = clusters(100, 2, 50.0, seed=10)  # classes alternate: even rows hold one class only
    assert probe_accuracy(separated, labels) == 1.0


# --- Class agreement --------------------------------------------------------------------------------------


def test_separated_classes_agree_and_shuffled_labels_do_not() -> None:
    real, labels = clusters(600, 5, 30.0, seed=11)
    fake, asked = clusters(1000, 5, 30.0, seed=12)
    right = class_agreement(real, labels, fake, asked)
    assert right.value == 1.0 and right.spread == 0.0
    shuffled = asked[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    wrong = class_agreement(real, labels, fake, shuffled)
    assert wrong.value == pytest.approx(0.2, abs=4 * math.sqrt(0.16 / 1000))
    assert wrong.spread == pytest.approx(math.sqrt(0.16 / 1000), rel=0.3)
    assert class_agreement(real, labels, fake, (asked + 1) % 5).value == 0.0
    half = class_agreement(real, labels, fake, torch.where(torch.arange(1000) < 500, asked, (asked + 1) % 5))
    assert half.value == 0.5


def test_agreement_ignores_order_scale_and_the_names_of_the_classes() -> None:
    real, labels = clusters(300, 4, 1.0, seed=13)
    fake, asked = clusters(400, 4, 1.0, seed=14)
    expected = class_agreement(real, labels, fake, asked)
    assert 0.5 < expected.value < 0.98
    p, q = torch.randperm(300), torch.randperm(400)
    assert class_agreement(real[p], labels[p], fake[q], asked[q]).value == expected.value
    assert class_agreement(1e3 * real + 5, labels, 1e3 * fake + 5, asked) == expected
    assert class_agreement(real, 10 - 3 * labels, fake, 10 - 3 * asked) == expected
    assert class_agreement(real, labels, fake, asked.int()) == expected


def test_features_that_never_change_do_no_harm() -> None:
    real, labels = clusters(200, 3, 30.0, seed=15)
    fake, asked = clusters(90, 3, 30.0, seed=16)
    still = torch.full((200, 2), 4.0, dtype=torch.float64)
    assert class_agreement(torch.cat([real, still], 1), labels, torch.cat([fake, still[:90]], 1), asked).value == 1.0
    points = torch.eye(3)[torch.arange(30) % 3]  # no variance within the classes at all
    assert class_agreement(points, torch.arange(30) % 3, points, torch.arange(30) % 3).value == 1.0


# --- What is refused --------------------------------------------------------------------------------------

LABELS = torch.arange(8) % 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: class_agreement(x, None, x, LABELS), "reference have no labels"),
        (lambda x: class_agreement(x, LABELS, x, None), "generated samples have no labels"),
        (lambda x: class_agreement(x, LABELS, x, LABELS[:7]), r"shape \[7\].*one for each of 8"),
        (lambda x: class_agreement(x, LABELS.double(), x, LABELS), "float64.*integers"),
        (lambda x: class_agreement(x, torch.full((8,), 4), x, LABELS), r"nothing to tell apart.*Got: class 4"),
        (lambda x: class_agreement(x, LABELS, x, LABELS + 1), r"does not have. Got: classes \[2\]"),
        (lambda x: class_agreement(x, LABELS, x[:, :1], LABELS), "differ in dimension"),
        (lambda x: class_agreement(x, LABELS, x / 0, LABELS), "not finite"),
        (lambda x: probe_accuracy(x, None), "reference have no labels"),
        (lambda x: probe_accuracy(x, torch.arange(8)), "too few labelled samples"),
        (lambda x: inception_score(x[:, :1]), "at least 2 classes"),
        (lambda x: inception_score(x[:1]), "at least 2"),
        (lambda x: inception_score(x[:3]), "at least 4"),
        (lambda x: inception_score(x, splits=0), "at least 1 part"),
        (lambda x: inception_score(x / 0), "not finite"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, message: str) -> None:
    with pytest.raises(DataError, match=message):
        call(normal(8, 3, seed=17))
