"""What would fail only after hours, refused before the first step."""

from __future__ import annotations

import numpy as np

from fewstep.data import Source
from fewstep.denoiser import Denoiser
from fewstep.errors import ConfigError, DataError
from fewstep.evaluation.features import PCA_ROWS, open_features
from fewstep.evaluation.samples import check_captions, shown_shape
from fewstep.training.config import RunConfig
from fewstep.training.synthetic import compared_with


def check_fit(model: Denoiser, source: Source) -> None:
    """Refuse data whose shape, labels or captions do not fit the model.

    Raises:
        DataError: with both shapes and the remedy.
    """
    check_shape(model, source)
    if model.conditioning.parts:
        check_captions(model, source)
    if model.num_classes and not 1 <= source.num_classes <= model.num_classes:
        raise DataError(
            f"The labels of '{source.name}' do not fit the class-conditional model",
            got=f"{source.num_classes} classes" if source.num_classes else "no labels",
            want=f"labels of at most {model.num_classes} classes",
        )


def check_shape(model: Denoiser, source: Source) -> None:
    """Refuse data whose shape is not that of the model's samples, or of the images that these decode to.

    Raises:
        DataError: with both shapes and the remedy.
    """
    have, want = tuple(source.shape), shown_shape(model) if source.is_images else model.sample_shape
    if have != want:
        remedy = []
        if len(have) == len(want) == 3:
            remedy += [f"--resize {want[1]}"] if have[1:] != want[1:] and want[1] == want[2] else []
            remedy += [f"--channels {want[0]}"] if have[0] != want[0] and want[0] in (1, 3) else []
        raise DataError(
            f"The images of '{source.name}' do not have the shape that the model was trained for",
            got=have,
            want=want,
            do=f"Add {' '.join(remedy)}" if remedy else "Use data of that shape, or another model",
        )


def check_table(config: RunConfig, source: Source) -> None:
    """Refuse settings of the closing table that would fail only after the training.

    Raises:
        FewstepError: an unknown feature net, one that does not read this data, or unusable counts.
    """
    table = config.eval
    if table.samples == 0:
        return
    if table.samples < 2 or min((*table.steps, *table.teacher_nfe), default=1) < 1:
        raise ConfigError(
            "The settings under 'eval' cannot be used",
            got=f"samples: {table.samples}, steps: {list(table.steps)}, teacher_nfe: {list(table.teacher_nfe)}",
            want="samples: 0 (no table) or at least 2; steps and teacher_nfe from 1",
        )
    source = compared_with(config, source)
    if table.features not in ("auto", "pixels"):
        rows = np.linspace(0, len(source) - 1, min(PCA_ROWS, len(source))).round().astype(np.int64)
        open_features(table.features, reference=source.read(rows))
