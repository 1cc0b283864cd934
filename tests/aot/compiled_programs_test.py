"""What must not be in the programs that a TPU's compiler makes: needs libtpu, else skips.

Sizes are chosen so that the sets of arrays can be told apart: activations are small next to one
layer's caches, and caches next to the logits.
"""

import functools
import math
from typing import NamedTuple

import pytest
import tiny

from qlog import experiment
from qlog.aot.compiler import compile_lowered, topology_devices
from qlog.aot.hlo import Module
from qlog.aot.hlo_cost import all_slices, module_cost
from qlog.aot.programs import step_programs
from qlog.config import schema

VOCAB, WIDTH, CHUNK = 8192, 64, 1024
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def _config(mesh):
    config = tiny.config(
        train={"prompts_per_step": 8, "remat": "full"},
        evaluation={"prompts_per_batch": 2},
        mesh=mesh,
        rollout={"rollouts_per_prompt": 8, "rationale_budget": 1023, "answer_reserve": 16},
        data={"max_prompt_tokens": 256},
        dtype="bfloat16",
    )
    config.architecture = dict(
        vocab_size=VOCAB,
        num_layers=1,
        width=WIDTH,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        mlp_width=128,
    )
    return config


MESHES = [{"data": 1, "fsdp": 2, "tensor": 2}, {"data": 4}, {"data": 1, "fsdp": 4}]


@functools.cache
def _compiled(name, **mesh):
    """The experiment and one of its programs."""
    run = experiment.prepare_shapes(_config(mesh), _devices())
    return run, _module(run, name)


def _devices():
    pytest.importorskip("libtpu", reason="no TPU compiler: pip install libtpu (the extra 'tpu')")
    return topology_devices("v5e:2x2")


def _module(run, name):
    program = next(each for each in step_programs(run) if each.name == name)
    return Module(compile_lowered(program.lowered).as_text())


def _programs(*names, fast=()):
    """Every mesh with every name; all but `fast` of the first mesh are marked slow."""
    cases = [(name, mesh) for mesh in MESHES for name in names]
    return pytest.mark.parametrize(
        "name, mesh",
        [
            pytest.param(
                name, mesh, marks=[] if mesh is MESHES[0] and name in fast else pytest.mark.slow
            )
            for name, mesh in cases
        ],
        ids=str,
    )


class Sent(NamedTuple):
    """A collective."""

    bytes: float  # of its largest array
    what: str  # its name and arrays, for a failing test's message


def _sent(module, in_loops=False):
    """Every collective, only those in loops if asked."""
    for each, depth in module.instructions():
        if each.opcode.removesuffix("-start") in _COLLECTIVES and depth >= in_loops:
            largest = max(shape.bytes for shape in each.results)
            yield Sent(largest, f"{each.name} {each.results}")


def _cache_bytes(run):
    """Of one layer's keys of a chip's rollouts."""
    rows = run.config.train.prompts_per_step * run.rollouts_per_prompt / 4
    return rows * run.sampling.max_length * 2 * 64 * 2


@_programs("decode", fast=["decode"])
def test_no_cache_and_no_logits_are_sent_while_decoding(name, mesh):
    run, module = _compiled(name, **mesh)
    rows = run.config.train.prompts_per_step * run.rollouts_per_prompt / 4
    logits = rows * VOCAB * 4
    found = list(_sent(module, in_loops=True))
    assert [x for x in found if x.bytes >= min(logits, _cache_bytes(run)) / 4] == []
    if run.mesh.shape["tensor"] > 1:
        assert found, "heads are split: their results must be summed"


def _scopes(module):
    """Names of the loops whose end depends on data; kernels of attention count as such."""
    scopes = set()

    def note(loop):
        scopes.add(loop.scope)
        return all_slices(loop)

    module_cost(module, note)
    return scopes


def test_decodings_loops_are_found_by_their_names():
    """`StepLoops` counts by these names. It would take a nameless loop to its array's end."""
    _, module = _compiled("decode", **MESHES[0])
    assert _scopes(module) == {"decode_steps", "attention_blocks"}


@pytest.mark.slow
def test_the_learners_loop_is_found_by_its_name():
    config = schema.merge(_config(MESHES[0]), {"train": {"rollouts_per_microbatch": 2}})
    module = _module(experiment.prepare_shapes(config, _devices()), "gradient")
    assert _scopes(module) == {"packs", "attention_blocks"}


@_programs("decode", "score", fast=["decode"])
def test_caches_stay_where_they_are(name, mesh):
    """Neither sent nor copied: a copy would double the memory."""
    run, module = _compiled(name, **mesh)
    assert [x for x in _sent(module) if x.bytes >= _cache_bytes(run) / 4] == []
    copies = [
        each
        for each, _ in module.instructions()
        if each.opcode == "copy"
        and each.results[0].in_hbm
        and each.results[0].bytes >= _cache_bytes(run)
    ]
    assert copies == []


@_programs("score", "gradient")
def test_logits_of_a_chunk_of_tokens_are_the_most_that_exists(name, mesh):
    run, module = _compiled(name, **mesh)
    tokens = run.config.train.prompts_per_step * run.rollouts_per_prompt * 16 / 4
    local = VOCAB // run.mesh.shape["tensor"]
    for each, _ in module.instructions():
        for shape in each.results:
            if {VOCAB, local} & set(shape.dimensions):
                assert math.prod(shape.dimensions) <= max(CHUNK, WIDTH) * VOCAB, each
    assert tokens < CHUNK  # of the gold answers; the gradient has 32 times as many
    assert [x for x in _sent(module) if x.bytes >= CHUNK * local * 4] == []


@_programs("prefill")
def test_no_chip_computes_the_prompts_of_another(name, mesh):
    """FLOPs are those of its own prompts; with a tensor axis, of its heads of them."""
    run, module = _compiled(name, **mesh)
    projections = 2 * WIDTH * (2 * 4 * 64 + 2 * 2 * 64 + 3 * 128)
    attention = 2 * 2 * 256 * 4 * 64
    assert module_cost(module).flops <= 8 * 256 / 4 * (projections + attention) * 1.05
    prompts = 8 / (4 / run.mesh.shape["tensor"])
    activations = prompts * 256 * WIDTH * 2  # summed over the tensor axis
    table = VOCAB * WIDTH * 2  # the parameters are gathered; nothing else is as large
    assert [x for x in _sent(module) if x.bytes > activations and x.bytes != table] == []
