"""Comparing trees of arrays: one structure, and leaf by leaf one shape, dtype and values."""

import jax
import numpy as np


def assert_equal(found, expected) -> None:
    """Bit for bit. `found` and `expected` are pytrees of arrays."""
    for name, one, other in _pairs(found, expected):
        assert one.dtype == other.dtype, f"{name}: {one.dtype}, not {other.dtype}"
        np.testing.assert_array_equal(one, other, err_msg=name, strict=True)


def assert_close(found, expected, *, rtol=1e-7, atol=0.0, scaled: bool = False) -> None:
    """Leaf by leaf within |found - expected| <= atol + rtol |expected|.

    Args:
      scaled: `atol` is a share of a leaf's largest entry, as for gradients.
    """
    for name, one, other in _pairs(found, expected):
        assert one.shape == other.shape, f"{name}: {one.shape}, not {other.shape}"
        limit = atol * (np.abs(other).max() + 1e-6) if scaled else atol
        np.testing.assert_allclose(one, other, rtol=rtol, atol=limit, err_msg=name)


def assert_near(found, expected) -> None:
    """One array or number against what was worked by hand, in float32's precision."""
    np.testing.assert_allclose(found, np.asarray(expected), rtol=1e-5, atol=1e-6)


def _pairs(found, expected):
    """(name, found leaf, expected leaf). A tree that lost or gained a leaf fails here."""
    structures = jax.tree.structure(found), jax.tree.structure(expected)
    assert structures[0] == structures[1], f"found {structures[0]}, expected {structures[1]}"
    leaves = jax.tree_util.tree_leaves_with_path(found)
    for (path, one), other in zip(leaves, jax.tree.leaves(expected), strict=True):
        yield jax.tree_util.keystr(path), np.asarray(one), np.asarray(other)
