"""cuDNN's attention gives what the blockwise attention gives, as far as that shows without a GPU.

Values and gradients are those of `jax.nn.dot_product_attention`'s other implementation, given the
same arguments; and a CUDA program is made, though not run.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from attention_fixtures import arrays, rollouts_of, up_to, value_and_gradients
from jax.interpreters import mlir

from qlog import losses
from qlog.benchmark import work
from qlog.errors import ConfigError
from qlog.experiment import build
from qlog.learner import gradient
from qlog.learner.gradient import batch_gradient
from qlog.learner.types import LearnerBatch, Microbatch, Objective
from qlog.models.attention import Segment, blocks, cudnn
from qlog.parallel import sharding
from qlog.policy import Policy

PREFIX = (33, *up_to([33, 5], 60))
OWN = (30, *rollouts_of([6, 9, 15], groups=2), 2)  # the first two are packed into one row
SERVED = {
    "causal": [(20, *rollouts_of([20], groups=2))],
    "rows over a prefix": [PREFIX, OWN],
    "rows over two": [
        PREFIX,
        (8, np.full((1, 60), 3, np.int32), np.full((1, 60), 7, np.int32)),
        OWN,
    ],
}
OTHERS = {
    "packed": [(20, *rollouts_of([9, 11], groups=2))],
    "window": [(20, *rollouts_of([20], window=5, groups=2))],
    "padded": [(20, *up_to([20, 5], 41))],
    "on the rollouts' caches": [PREFIX, (8, *up_to([3], 60), 2), OWN],
}
PATTERNS = SERVED | OTHERS
plain = functools.partial(cudnn.attend, implementation="xla")


@pytest.fixture(autouse=True)
def short_rollouts(monkeypatch):
    monkeypatch.setattr(cudnn, "_FEWEST_TOKENS", 4)


@pytest.mark.parametrize("name", PATTERNS)
def test_equals_the_blockwise_attention_in_value_and_gradients(name):
    given = arrays(PATTERNS[name])
    found = value_and_gradients(plain, PATTERNS[name], *given)
    expected = value_and_gradients(blocks.attend, PATTERNS[name], *given)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def segments_of(pattern, caches):
    return [Segment(*c, *ends[1:]) for c, ends in zip(caches, pattern, strict=True)]


@pytest.mark.parametrize("name", PATTERNS)
def test_training_and_prompts_are_served(name, monkeypatch):
    queries, _, caches = arrays(PATTERNS[name])
    segments = segments_of(PATTERNS[name], caches)
    monkeypatch.setattr(
        cudnn, "_attend_by_run", lambda queries, *_, **__: jnp.full_like(queries, 7)
    )
    assert np.all(plain(queries, segments) == 7) == (name in SERVED)
    monkeypatch.setattr(cudnn, "_FEWEST_TOKENS", 40)
    assert np.all(plain(queries, segments) == 7) == (name == "causal")


@pytest.mark.parametrize("name", SERVED)
def test_only_causal_attention_has_no_mask(name, monkeypatch):
    queries, _, caches = arrays(SERVED[name])
    masks, given = [], jax.nn.dot_product_attention
    spy = lambda *args, mask, **options: masks.append(mask) or given(*args, mask=mask, **options)
    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    plain(queries, segments_of(SERVED[name], caches))
    assert [mask is None for mask in masks] == [name == "causal"]


def test_float32_stays_in_blocks():
    pattern = SERVED["rows over a prefix"]
    given = arrays(pattern)
    for one, other in zip(
        value_and_gradients(cudnn.attend, pattern, *given),
        value_and_gradients(blocks.attend, pattern, *given),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def cudnn_is_here(monkeypatch):
    """JAX's own module, told that there is a GPU."""
    module = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    versions = types.SimpleNamespace(cudnn_get_version=lambda: 91000)
    monkeypatch.setattr(module, "cuda_versions", versions)
    monkeypatch.setattr(module, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(module, "is_cuda_compute_capability_equal", lambda capability: False)
    return module


def gradient_of(policy, size, mesh=None):
    """`batch_gradient` and what it takes."""
    batch = work.make_batch(policy, size)
    params = tiny.params()
    if mesh is not None:
        params = jax.device_put(params, sharding.param_shardings(mesh, params))
    coefficients = losses.Coefficients(*[jnp.asarray(batch.advantages)] * 4)
    keywords = {
        "objective": Objective(losses.linear()),
        "microbatch": Microbatch(size.prompts, 2),
    }
    learner_batch = LearnerBatch(batch.prompts, batch.trajectories, coefficients)
    return functools.partial(batch_gradient, **keywords), (params, policy, learner_batch)


@pytest.mark.parametrize(
    "remat, forwards", [("none", 1), ("dots", 1), ("attention", 1), ("full", 2)]
)
def test_the_gradient_is_lowered_for_cuda_with_cudnn_for_prompts_and_rollouts(
    remat, forwards, cudnn_is_here
):
    policy = Policy(tiny.SHAPE, tiny.VALID_VOCAB, jnp.bfloat16, remat, attention="cudnn")
    size = work.Size(prompts=2, rollouts=2, prompt=12, rationale=5, answer=3)
    compute, arguments = gradient_of(policy, size)
    traced = gradient.add_microbatches.trace(*tiny.microbatch(*arguments), **compute.keywords)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("Softmax", "ScaleBiasSoftmax"):
        # In the text once for all layers or once for each, as the version of JAX has it.
        backwards = program.count(f"@__cudnn$fmha{kernel}Backward(")
        assert backwards in (1, tiny.SHAPE.num_layers)
        assert program.count(f"@__cudnn$fmha{kernel}(") == forwards * backwards


def compute_on_cpus(module):
    """Gives cuDNN's two primitives a CPU's arithmetic; JAX splits them over a mesh by its rules."""

    def attend(queries, keys, values, bias, mask_type):
        keys, values = (jnp.repeat(x, queries.shape[2] // x.shape[2], 2) for x in (keys, values))
        scores = jnp.einsum("btnh,bsnh->bnts", *map(jnp.float32, (queries, keys)))
        if bias.size:
            assert bias.shape[0] == queries.shape[0]
            scores += bias
        if mask_type == module.MaskType.CAUSAL:
            scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e30)
        mixed = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), jnp.float32(values))
        return mixed.astype(queries.dtype)

    def forward(*arrays, mask_type, is_training, **_):
        batch, tokens, heads, _ = arrays[0].shape
        log_total = jnp.zeros((batch, heads, tokens), jnp.float32)  # `backward` does without
        return attend(*arrays[:4], mask_type), *[log_total] * is_training

    def backward(*arrays, mask_type, variadic_args, **_):
        *primals, bias = arrays[:4]
        _, pull = jax.vjp(lambda *primals: attend(*primals, bias, mask_type), *primals)
        return *pull(arrays[-1]), *[jnp.zeros_like(bias)] * variadic_args[1]

    for name, rule in ("fwd", forward), ("bwd", backward):
        primitive = getattr(module, f"_dot_product_attention_{name}_p")
        lowered = mlir.lower_fun(rule, multiple_results=True)
        mlir.register_lowering(primitive, lowered, platform="cpu")


@pytest.mark.parametrize("windows", [(0,), (4, 0)], ids=str)
@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 2, 2)], ids=str)
def test_cudnn_split_over_a_mesh_gives_what_one_device_gives_in_blocks(
    sizes, windows, cudnn_is_here
):
    compute_on_cpus(cudnn_is_here)
    shape = dataclasses.replace(tiny.SHAPE, layer_windows=windows)
    found = []
    for mesh, kernels in (
        (None, "blocks"),
        (sharding.make_mesh(*sizes, devices=jax.devices()[:4]), "cudnn"),
    ):
        policy = Policy(shape, tiny.VALID_VOCAB, jnp.bfloat16, "full", mesh=mesh, attention=kernels)
        size = work.Size(prompts=8, rollouts=2, prompt=12, rationale=5, answer=3)
        compute, arguments = gradient_of(policy, size, mesh)
        found.append(jax.tree.leaves(compute(*arguments)[0]))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=0.05 * np.abs(one).max())


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
        assert build.attention_kernels(config, mesh) == chosen
    else:
        with pytest.raises(ConfigError, match=f"config.attention = '{asked}'.*'blocks'"):
            build.attention_kernels(config, mesh)
