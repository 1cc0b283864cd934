"""Lengths of rollouts to plan with: drawn, from a file, or those of an evaluation's samples."""

import pathlib

import numpy as np

from qlog.errors import ConfigError, summary
from qlog.storage import json_lines, paths


def drawn(
    rng: np.random.Generator, prompts: int, rollouts: int, mean: float, longest: int
) -> np.ndarray:
    """int [prompts, rollouts]: exponential around the prompt's mean, which is gamma with shape 2.

    A prompt's mean is at least a twentieth of the mean of all.
    """
    of_prompt = np.maximum(rng.gamma(2, mean / 2, (prompts, 1)), mean / 20)
    return np.minimum(1 + rng.exponential(of_prompt, (prompts, rollouts)).astype(int), longest)


def read(file: str) -> np.ndarray:
    """int [prompts, M] of a NumPy file.

    Raises:
      ConfigError: it cannot be read, or holds something else.
    """
    paths.refuse_what_is_no_file(file, f"--lengths={file}")
    try:
        lengths = np.asarray(np.load(file, allow_pickle=False))
    except Exception as error:  # NumPy raises many kinds for files that are none of its own
        raise ConfigError(f"--lengths={file} cannot be read: {summary(error)}.") from None
    if lengths.ndim != 2 or lengths.dtype.kind not in "iu" or not lengths.size or lengths.min() < 1:
        raise ConfigError(
            f"--lengths={file} holds {lengths.dtype} {list(lengths.shape)}: give integers of at "
            "least 1, [prompts, rollouts]."
        )
    return lengths.astype(int)


def of_samples(file: str) -> np.ndarray:
    """int [questions, n] of the samples that an evaluation wrote.

    Raises:
      ConfigError: the file cannot be read, or its lines have no lengths.
    """
    paths.refuse_what_is_no_file(file, f"--samples={file}")
    try:
        rows = json_lines.loads(pathlib.Path(file).read_bytes())
        return np.array([row["lengths"] for row in rows], int)
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ConfigError(
            f"--samples={file} gives no lengths ({type(error).__name__}: {error}): give the "
            "samples of an evaluation."
        ) from None
