"""cuDNN's attention gives what the blockwise attention gives, as far as that shows without a GPU.

Values and gradients are those of `jax.nn.dot_product_attention`'s other implementation, given the
same arguments; and a CUDA program is made, though not run.
"""

import functools
import types

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

CAUSAL = [(20, *rollouts_of([20], groups=2))]
OTHERS = {
    "packed": [(20, *rollouts_of([9, 11], groups=2))],
    "window": [(20, *rollouts_of([20], window=5, groups=2))],
    "over a prefix": [(33, *up_to([33, 5], 40)), *CAUSAL],
    "padded": [(20, *up_to([20, 5], 40))],
}
plain = functools.partial(attention_cudnn.attend, implementation="xla")


@pytest.mark.parametrize("name", ["causal", *OTHERS])
def test_equals_the_blockwise_attention_in_value_and_gradients(name):
    pattern = OTHERS.get(name, CAUSAL)
    given = arrays(pattern)
    found = value_and_gradients(plain, pattern, *given)
    for one, other in zip(found, value_and_gradients(attention.attend, pattern, *given), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["causal", *OTHERS])
def test_only_causal_attention_is_taken(name, monkeypatch):
    pattern = OTHERS.get(name, CAUSAL)
    queries, _, caches = arrays(pattern)
    monkeypatch.setattr(attention_cudnn, "_causal", lambda queries, *_: jnp.full_like(queries, 7))
    segments = [attention.Segment(*c, *ends[1:]) for c, ends in zip(caches, pattern)]
    assert np.all(plain(queries, segments) == 7) == (name == "causal")
    traced = [s._replace(start=jnp.asarray(s.start), stop=jnp.asarray(s.stop)) for s in segments]
    assert not np.any(plain(queries, traced) == 7)


def test_float32_stays_in_blocks():
    given = arrays(CAUSAL)
    for one, other in zip(
        value_and_gradients(attention_cudnn.attend, CAUSAL, *given),
        value_and_gradients(attention.attend, CAUSAL, *given), strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_gradient_is_lowered_for_cuda_with_cudnn_for_its_prompts(remat, monkeypatch):
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
    assert "__cudnn$fmhaSoftmax(" in program and "__cudnn$fmhaSoftmaxBackward(" in program


@pytest.mark.parametrize(
    "asked, platform, version, dtype, chosen",
    [
        ("auto", "gpu", "PJRT C API\ncuda 13000", "bfloat16", "cudnn"),
        ("auto", "gpu", "PJRT C API\ncuda 13000", "float32", "blocks"),
        ("auto", "gpu", "PJRT C API\nrocm 60000", "bfloat16", "blocks"),
        ("auto", "cpu", "", "bfloat16", "blocks"),
        ("auto", "tpu", "", "bfloat16", "tpu"),
        ("blocks", "gpu", "cuda", "bfloat16", "blocks"),
        ("cudnn", "cpu", "", "bfloat16", None),
        ("cudnn", "gpu", "cuda", "float32", None),
        ("tpu", "gpu", "cuda", "bfloat16", None),
    ],
)
def test_kernels_are_chosen_by_device_and_dtype(asked, platform, version, dtype, chosen):
    client = types.SimpleNamespace(platform_version=version)
    device = types.SimpleNamespace(platform=platform, client=client)
    mesh = types.SimpleNamespace(devices=np.array([device]))
    config = tiny.config(attention=asked, dtype=dtype)
    if chosen:
        assert experiment.attention(config, mesh) == chosen
    else:
        with pytest.raises(ConfigError, match=f"config.attention = '{asked}'.*'blocks'"):
            experiment.attention(config, mesh)
