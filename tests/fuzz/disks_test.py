"""Any write of a real run fails: no hang, no traceback, and the same command goes on."""

import commanded
import faulty_disk
import fuzzing
import pytest
from hypothesis import assume
from hypothesis import strategies as st

pytestmark = pytest.mark.slow
cache, file, whole = commanded.cache, commanded.file, commanded.whole  # fixtures


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return faulty_disk.library(tmp_path_factory.mktemp("library"))


def test_writes_that_fail(record_property, library, cache, file, whole, tmp_path):
    numbers = iter(range(10**6))

    def holds(case):
        error, first, how_many = case
        number = next(numbers)
        workdir, mark = tmp_path / f"run{number}", tmp_path / f"failed{number}"
        faults = faulty_disk.variables(library, workdir, mark, error, first, first + how_many - 1)
        status, out, err = commanded.run(file, workdir, cache, faults)
        # A run that ends before its write number `first` has met no fault: it counts for nothing.
        assume(mark.exists())
        # One that did no harm (a beat of the owner's file), a folder that cannot be used, a disk.
        assert status in (0, 2, 75), (status, out, err)
        assert "Traceback" not in out + err, out + err
        if status:
            assert len(err.strip().splitlines()) == 1 and err.startswith("qlog: "), err
        status, out, err = commanded.run(file, workdir, cache)
        assert status == 0, (out, err)
        commanded.assert_same_run(workdir, whole)

    cases = st.tuples(
        st.sampled_from(sorted(faulty_disk.ERRORS)),
        st.integers(1, 700),
        st.sampled_from([1, 1, 2**30]),  # once, or from then on
    )
    fuzzing.try_cases(record_property, "writes that fail", 20, cases, holds)
