"""cuDNN's attention gives what the blockwise attention gives, as far as that shows without a GPU.

Values and gradients are those of `jax.nn.dot_product_attention`'s other implementation, given the
same arguments; and a CUDA program is made, though not run.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from models_attention_tpu_test import arrays, rollouts_of, up_to, value_and_gradients

from qlog import experiment, learner, losses
from qlog.benchmark import work
from qlog.errors import ConfigError
from qlog.models import attention, attention_cudnn
from qlog.policy import Policy

PREFIX = (33, *up_to([33, 5], 60))
OWN = (30, *rollouts_of([6, 9, 15], groups=2), 2)  # the first two are packed into one row
SERVED = {
    "causal": [(20, *rollouts_of([20], groups=2))],
    "rows over a prefix": [PREFIX, OWN],
    "rows over two": [PREFIX, (8, np.full((1, 60), 3, np.int32), np.full((1, 60), 7, np.int32)), OWN],
}
OTHERS = {
    "packed": [(20, *rollouts_of([9, 11], groups=2))],
    "window": [(20, *rollouts_of([20], window=5, groups=2))],
    "padded": [(20, *up_to([20, 5], 41))],
    "on the rollouts' caches": [PREFIX, (8, *up_to([3], 60), 2), OWN],
}
PATTERNS = SERVED | OTHERS
plain = functools.partial(attention_cudnn.attend, implementation="xla")


@pytest.fixture(autouse=True)
def short_rollouts(monkeypatch):
    monkeypatch.setattr(attention_cudnn, "_FEWEST_TOKENS", 4)


@pytest.mark.parametrize("name", PATTERNS)
def test_equals_the_blockwise_attention_in_value_and_gradients(name):
    given = arrays(PATTERNS[name])
    found = value_and_gradients(plain, PATTERNS[name], *given)
    expected = value_and_gradients(attention.attend, PATTERNS[name], *given)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def segments_of(pattern, caches):
    return [attention.Segment(*c, *ends[1:]) for c, ends in zip(caches, pattern)]


@pytest.mark.parametrize("name", PATTERNS)
def test_training_and_prompts_are_served(name, monkeypatch):
    queries, _, caches = arrays(PATTERNS[name])
    segments = segments_of(PATTERNS[name], caches)
    monkeypatch.setattr(attention_cudnn, "_attend_by_run", lambda queries, *_, **__: jnp.full_like(queries, 7))
    assert np.all(plain(queries, segments) == 7) == (name in SERVED)
    monkeypatch.setattr(attention_cudnn, "_FEWEST_TOKENS", 40)
    assert np.all(plain(queries, segments) == 7) == (name == "causal")


@pytest.mark.parametrize("name", SERVED)
def test_only_causal_attention_has_no_mask(name, monkeypatch):
    queries, _, caches = arrays(SERVED[name])
    masks, given = [], jax.nn.dot_product_attention
    spy = lambda *args, mask, **options: masks.append(mask) or given(*args, mask=mask, **options)  # noqa: E731
    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    plain(queries, segments_of(SERVED[name], caches))
    assert [mask is None for mask in masks] == [name == "causal"]


def test_float32_stays_in_blocks():
    pattern = SERVED["rows over a prefix"]
    given = arrays(pattern)
    for one, other in zip(
        value_and_gradients(attention_cudnn.attend, pattern, *given),
        value_and_gradients(attention.attend, pattern, *given), strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("remat, forwards", [("none", 1), ("dots", 1), ("attention", 1), ("full", 2)])
def test_the_gradient_is_lowered_for_cuda_with_cudnn_for_prompts_and_rollouts(remat, forwards, monkeypatch):
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "cuda_versions", types.SimpleNamespace(cudnn_get_version=lambda: 91000))
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    policy = Policy(tiny.SHAPE, tiny.VALID_VOCAB, jnp.bfloat16, remat, attention="cudnn")
    batch = work.make_batch(policy, work.Size(prompts=2, rollouts=2, prompt=12, rationale=5, answer=3))
    zeros = jnp.zeros((2, 2))
    traced = learner.gradient.trace(
        tiny.params(), policy, batch.prompts, batch.trajectories, losses.Coefficients(*[zeros] * 4),
        None, surrogate=losses.linear(), microbatch=(2, 2),
    )  # fmt: skip
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("Softmax", "ScaleBiasSoftmax"):
        assert program.count(f"@__cudnn$fmha{kernel}(") == forwards
        assert program.count(f"@__cudnn$fmha{kernel}Backward(") == 1


CUDA, ROCM = "PJRT C API\ncuda 13000", "PJRT C API\nrocm 60000"


@pytest.mark.parametrize(
    "asked, platform, version, capability, chosen",
    [
        ("auto", "gpu", CUDA, "9.0", "cudnn"),
        ("auto", "gpu", CUDA, "12.0", "cudnn"),
        ("auto", "gpu", CUDA, "7.5", "blocks"),
        ("auto", "gpu", ROCM, "gfx942", "blocks"),
        ("auto", "cpu", "", None, "blocks"),
        ("auto", "tpu", "", None, "tpu"),
        ("blocks", "gpu", CUDA, "9.0", "blocks"),
        ("cudnn", "gpu", CUDA, "8.0", "cudnn"),
        ("cudnn", "gpu", CUDA, "7.5", None),
        ("cudnn", "cpu", "", None, None),
        ("cudnn", "gpu", ROCM, "gfx942", None),
        ("tpu", "gpu", CUDA, "9.0", None),
    ],
)
def test_kernels_are_chosen_by_device(asked, platform, version, capability, chosen):
    client = types.SimpleNamespace(platform_version=version)
    device = types.SimpleNamespace(platform=platform, client=client, compute_capability=capability)
    mesh = types.SimpleNamespace(devices=np.array([device]))
    config = tiny.config(attention=asked)
    if chosen:
        assert experiment.attention(config, mesh) == chosen
    else:
        with pytest.raises(ConfigError, match=f"config.attention = '{asked}'.*'blocks'"):
            experiment.attention(config, mesh)
