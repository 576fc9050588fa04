"""Scores by a classifier: the Inception score, and whether samples show the class that was asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import DataError
from fewstep.evaluation.bootstrap import Estimate, half_samples, spread_of
from fewstep.evaluation.metrics import checked, checked_pair


# ------------------------------------------------------------------------------------ Inception score
def inception_score(logits: Tensor, *, splits: int = 10, replicates: int = 50, seed: int = 0) -> Estimate:
    """exp(mean KL(p(y|x) ‖ p(y))) with p(y|x) = softmax of ``logits [n, classes]``; between 1 and ``classes``.

    The value is the mean over ``splits`` interleaved parts (rows i, i + splits, ...), as published, where each has at
    least as many rows as there are classes, else that of all rows at once: it grows with the size of a part, so compare
    equal n only. The published numbers take logits without the last layer's bias: the net's affair. The spread is over
    halves of the rows, not the published deviation between parts.
    Source: Salimans et al. 2016, section 4.

    Raises:
        DataError: fewer than 2 rows or classes (4 rows with a spread), ``splits`` < 1, or logits that are not finite.
    """
    if splits < 1:
        raise DataError("The Inception score needs at least 1 part", got=f"splits={splits}")
    log_p = checked(logits, least=2).log_softmax(1)
    n, classes = log_p.shape
    if classes < 2:
        raise DataError("The Inception score needs a classifier of at least 2 classes", got=classes)
    p = log_p.exp()
    parts = splits if n >= splits * classes else 1
    halves = half_samples(n, replicates, seed)
    return Estimate(_score(p, parts), spread_of([_score(p[half.to(p.device)], parts) for half in halves]))


def _score(p: Tensor, parts: int) -> float:
    """exp(H(mean p) - mean H(p)), which is exp(mean KL), over ``parts`` interleaved parts."""
    entropy = torch.special.entr(p).sum(1)
    scores = [
        math.exp(float(torch.special.entr(p[i::parts].mean(0)).sum() - entropy[i::parts].mean())) for i in range(parts)
    ]
    return sum(scores) / parts


# ------------------------------------------------------------------------------------ class agreement
def class_agreement(
    real_rows: Tensor,
    real_labels: Tensor | None,
    fake_rows: Tensor,
    fake_labels: Tensor | None,
    *,
    replicates: int = 50,
    seed: int = 0,
) -> Estimate:
    """Share of ``fake_rows [n, d]`` that a probe sees as the class that was asked for, ``fake_labels`` int64 ``[n]``.

    The probe is linear discriminant analysis fitted on ``real_rows [m, d]`` and ``real_labels [m]``
    (:class:`Probe`): read the number against :func:`probe_accuracy`, its own on held-out real data. A share above that
    means samples more typical of their class than the data. The spread is over halves of the fakes; the probe is fixed.
    Source: "GAN-test" of Shmelkov, Schmid & Alahari 2018, section 3.1, with a linear classifier.

    Raises:
        DataError: labels missing, not int64 or not one per row; one class only; a class asked for of which the
            reference has no rows; different dimensions; features that are not finite.
    """
    real, fake = checked_pair(real_rows, fake_rows, least=2)
    asked = _labels(fake_labels, fake, "generated samples")
    probe = Probe.fit(real, _labels(real_labels, real, "reference"))
    unknown = torch.unique(asked[~torch.isin(asked, probe.classes)]).tolist()
    if unknown:
        raise DataError(
            "Samples were asked for of classes that the reference does not have",
            got=f"classes {unknown[:8]}",
            want=f"of {probe.classes.tolist()[:8]}{' and others' if len(probe.classes) > 8 else ''}",
            do="Use a larger reference, or one with all classes",
        )
    right = (probe.classify(fake) == asked).double()
    halves = half_samples(len(right), replicates, seed)
    return Estimate(float(right.mean()), spread_of([float(right[half.to(right.device)].mean()) for half in halves]))


def probe_accuracy(real_rows: Tensor, real_labels: Tensor | None) -> float:
    """Share of real rows that the probe of :func:`class_agreement` classifies rightly: its ceiling for real data.

    Fitted on the 1st, 3rd, ... row of each class, tested on the 2nd, 4th, ...

    Raises:
        DataError: labels missing, not int64 or not one per row; one class only; not 2 rows of any class.
    """
    real = checked(real_rows, least=2)
    labels = _labels(real_labels, real, "reference")
    odd = _rank_in_class(labels) % 2 == 1
    if not bool(odd.any()):
        raise DataError("There are too few labelled samples to hold any out", got="1 of each class", want="at least 2")
    return float((Probe.fit(real[~odd], labels[~odd]).classify(real[odd]) == labels[odd]).double().mean())


@dataclass(frozen=True)
class Probe:
    """A linear classifier: the class with the largest ``x @ weight + bias``; ``classes [c]``, ``weight [d, c]``."""

    classes: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, rows: Tensor, labels: Tensor) -> Probe:
        """Linear discriminant analysis in closed form: class means μ_c, one covariance, equal priors.

            w_c = Σ⁻¹ μ_c,  b_c = -μ_cᵀ Σ⁻¹ μ_c / 2,  Σ = (1 - ρ) S + ρ (tr S/d) I

        S is the within-class covariance, ρ the oracle-approximating shrinkage. ``rows [n, d]`` float64.
        Sources: Fisher 1936; Chen, Wiesel, Eldar & Hero 2010, eq. 23.

        Raises:
            DataError: one class only.
        """
        classes, index = torch.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise DataError("There is nothing to tell apart: all labels are the same", got=f"class {int(classes[0])}")
        centre = rows.mean(0)
        rows = rows - centre
        counts = torch.bincount(index).to(rows.dtype)
        means = rows.new_zeros(len(classes), rows.shape[1]).index_add_(0, index, rows) / counts[:, None]
        weight = torch.linalg.solve(_within(rows - means[index]), means.T)
        bias = -0.5 * (means.T * weight).sum(0) - centre @ weight
        return cls(classes, weight, bias)

    def classify(self, rows: Tensor) -> Tensor:
        """The class of each of ``rows [n, d]``, int64 ``[n]``."""
        return self.classes[(rows @ self.weight + self.bias).argmax(1)]


def _within(residuals: Tensor) -> Tensor:
    """Covariance of ``residuals [n, d]`` (mean 0), shrunk towards its mean variance by ρ; I where there is none."""
    n, d = residuals.shape
    s = residuals.T @ residuals / n
    trace, square = float(s.trace()), float(s.square().sum())
    eye = torch.eye(d, dtype=s.dtype, device=s.device)
    if trace <= 0:
        return eye
    rest = (n + 1 - 2 / d) * (square - trace**2 / d)
    rho = min(1.0, ((1 - 2 / d) * square + trace**2) / rest) if rest > 0 else 1.0
    return (1 - rho) * s + rho * trace / d * eye


def _rank_in_class(labels: Tensor) -> Tensor:
    """How many earlier rows have the same label, int64 ``[n]``."""
    order = labels.argsort(stable=True)
    ordered = labels[order]
    place = torch.arange(len(labels), device=labels.device)
    first = torch.searchsorted(ordered, ordered)
    return torch.empty_like(place).index_copy_(0, order, place - first)


def _labels(labels: Tensor | None, rows: Tensor, whose: str) -> Tensor:
    if labels is None:
        raise DataError(f"The {whose} have no labels", do="Use a conditional model and a reference with labels")
    if labels.shape != (len(rows),) or labels.is_floating_point():
        got = f"{labels.dtype} of shape {list(labels.shape)}"
        raise DataError(
            f"The labels of the {whose} cannot be used", got=got, want=f"integers, one for each of {len(rows)}"
        )
    return labels.long().to(rows.device)
