"""The comparison that all equivalence tests rest on can fail."""

import numpy as np
import pytest
import trees

ONE = {"a": np.ones(3, np.float32), "b": np.zeros((2, 2), np.float32)}
OTHERS = {
    "a leaf less": {"a": ONE["a"]},
    "a leaf more": ONE | {"c": ONE["a"]},
    "another name": {"a": ONE["a"], "c": ONE["b"]},
    "another dtype": ONE | {"a": np.ones(3)},
    "another shape": ONE | {"a": np.ones((1, 3), np.float32)},
    "another value": ONE | {"b": np.full((2, 2), 1e-3, np.float32)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_trees_that_differ_are_told_apart(name):
    trees.assert_equal(ONE, ONE)
    trees.assert_close(ONE, ONE)
    for one, other in (ONE, OTHERS[name]), (OTHERS[name], ONE):
        with pytest.raises(AssertionError):
            trees.assert_equal(one, other)
        if name != "another dtype":
            with pytest.raises(AssertionError):
                trees.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_close_is_within_the_tolerance_of_a_leaf_or_of_its_scale():
    near = ONE | {"a": np.array([1.0, 1.0, 1.01], np.float32)}
    trees.assert_close(near, ONE, atol=0.02)
    trees.assert_close(near, ONE, atol=0.02, scaled=True)
    large, off = {"a": np.array([100.0, 0.0])}, {"a": np.array([100.0, 1.0])}
    trees.assert_close(off, large, atol=0.02, scaled=True)
    with pytest.raises(AssertionError):
        trees.assert_close(off, large, atol=0.02)
