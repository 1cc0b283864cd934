"""Paths on disks: which faults are tried again."""

import errno
import os

import pytest

from qlog.storage import paths


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between tries, which are not waited for."""
    found = []
    monkeypatch.setattr(paths.time, "sleep", found.append)
    return found


def test_links_that_lead_to_each_other_are_no_folder(pauses, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.symlink_to(second)
    second.symlink_to(first)
    assert paths.names(paths.Path(first)) == [] and not pauses
    with pytest.raises(OSError) as caught:
        paths.read(paths.Path(first))
    assert caught.value.errno == errno.ELOOP and not pauses


@pytest.mark.parametrize(
    "number, is_tried_again",
    [
        *[(number, False) for number in (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG)],
        *[(number, False) for number in (errno.EINVAL, errno.EISDIR, errno.EDQUOT, errno.EXDEV)],
        *[(number, True) for number in (errno.EIO, errno.ETIMEDOUT, errno.ESTALE)],
    ],
    ids=lambda value: errno.errorcode.get(value) if value > 1 else "",
)
def test_only_faults_that_pass_are_tried_again(number, is_tried_again, pauses):
    def fail():
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError):
        paths.retried(fail)
    assert bool(pauses) == is_tried_again
