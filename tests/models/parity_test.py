"""The decoder against transformers on random weights; needs the extra `parity`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from testdata.golden import make_golden  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

from qlog import models  # noqa: E402
from qlog.models import huggingface, rope  # noqa: E402

pytestmark = pytest.mark.parity
FAMILIES = list(make_golden.MODELS)
_SLIDING = dict(layer_types=None, sliding_window=6)  # Gemma's own pattern: five slide, one does not
# Changes to the golden shapes: no grouping, one key/value head, odd groups, depth, wide vocabulary.
SHAPES = {
    "grouped": dict(hidden_size=48, num_key_value_heads=1, vocab_size=97),
    "ungrouped": dict(hidden_size=64, num_key_value_heads=4, num_hidden_layers=3),
    "deep": dict(
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=3,
        num_hidden_layers=7,
        head_dim=16,
        intermediate_size=80,
    ),
}
forward = jax.jit(models.extend, static_argnums=1, static_argnames=("execution",))
decode_step = jax.jit(models.decode_step, static_argnums=1)


def reference(family, seed=0, **changes):
    """A random transformers model; tied where the golden one is not, and the other way round."""
    config_class, fields = make_golden.MODELS[family]
    fields = make_golden._COMMON | fields | changes
    if family == "gemma3":
        fields |= _SLIDING | {k: v for k, v in changes.items() if k == "sliding_window"}
    if family == "qwen2":  # derives it from the width
        fields.pop("head_dim")
    return make_golden.random_model(config_class(**fields), seed)


def ours(model, folder, dtype=jnp.float32):
    """The same model, through a folder that transformers writes."""
    model.save_pretrained(folder)
    config = huggingface.read_config(folder)
    return huggingface.load(folder, config, dtype=dtype), config


def our_logits(params, config, tokens, start=0, dtype=jnp.float32):
    offsets = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    execution = models.Execution(jnp.dtype(dtype))
    hidden = forward(params, config, tokens[:, None], offsets=offsets[:, None], execution=execution)
    return np.asarray((hidden[:, 0] @ models.unembedding(params).astype(dtype).T), np.float32)


def prompts(model, size=3, length=30, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, model.config.vocab_size, (size, length))
    return tokens, np.linspace(length, length // 3, size).astype(int)


def left_padded(tokens, lengths):
    out, mask = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, length in enumerate(lengths):
        out[row, -length:], mask[row, -length:] = tokens[row, :length], 1
    return torch.from_numpy(out), torch.from_numpy(mask)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_float32_logits_with_left_padding(family, shape, tmp_path):
    """transformers pads on the left, we on the right: equal where there are tokens."""
    tied = not make_golden.MODELS[family][1].get("tie_word_embeddings", True)
    model = reference(family, **SHAPES[shape], tie_word_embeddings=tied)
    params, config = ours(model, tmp_path)
    assert config.tied_embeddings == tied
    tokens, lengths = prompts(model)
    padded, mask = left_padded(tokens, lengths)
    at = (mask.cumsum(-1) - 1).clamp(min=0)
    theirs = model(padded, attention_mask=mask, position_ids=at).logits.numpy()
    mine = our_logits(params, config, tokens)
    for row, length in enumerate(lengths):
        difference = np.abs(theirs[row, -length:] - mine[row, :length]).max()
        print(f"{family} {shape}: {difference:.1e}")
        assert difference < 1e-4, (row, difference)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@torch.no_grad()
def test_sliding_windows_that_qwen_can_switch_on(family, tmp_path):
    model = reference(
        family,
        **SHAPES["ungrouped"],
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
    )
    params, config = ours(model, tmp_path)
    assert config.windows == (0, 6, 6)
    tokens, _ = prompts(model)
    theirs = model(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(theirs - our_logits(params, config, tokens)).max() < 1e-4


@torch.no_grad()
def test_smollm3_with_windows_on_layers_without_rope_and_yarn_on_the_others(tmp_path):
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    model = reference(
        "smollm3",
        **SHAPES["deep"],
        use_sliding_window=True,
        sliding_window=6,
        no_rope_layer_interval=3,
        rope_scaling=yarn,
    )
    params, config = ours(model, tmp_path)
    assert config.has_rope == (True, True, False) * 2 + (True,)
    assert config.windows == (0, 0, 6) * 2 + (0,)
    tokens, _ = prompts(model)
    theirs = model(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(theirs - our_logits(params, config, tokens)).max() < 1e-4


@torch.no_grad()
def test_mistral_without_windows(tmp_path):
    model = reference("mistral", **SHAPES["deep"], sliding_window=None)
    params, config = ours(model, tmp_path)
    assert config.windows == (0,) * 7
    tokens, _ = prompts(model)
    theirs = model(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(theirs - our_logits(params, config, tokens)).max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bfloat16_is_as_close_to_float32_as_transformers_is(family, tmp_path):
    model = reference(family, **SHAPES["deep"])
    params, config = ours(model, tmp_path)
    tokens, _ = prompts(model, size=8, length=40)
    exact = model(torch.from_numpy(tokens)).logits.numpy()
    rounded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager"
    )  # .bfloat16() would round RoPE's frequencies too
    theirs = rounded(torch.from_numpy(tokens)).logits.float().numpy()
    mine = our_logits(params, config, tokens, dtype=jnp.bfloat16)
    spread = np.abs(theirs - exact)
    difference = np.abs(mine - exact)
    print(f"{family}: ours {difference.mean():.4f}, transformers {spread.mean():.4f}")
    assert difference.mean() < 1.1 * spread.mean()
    assert difference.max() < 1.5 * spread.max()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_long_contexts_and_far_positions(family, tmp_path):
    """1,500 tokens in a row, and 40 tokens that begin at position 100,000."""
    model = reference(
        family,
        **SHAPES["grouped"],
        sliding_window=512,
        max_position_embeddings=2**17,
        num_hidden_layers=6 if family == "gemma3" else 2,  # the sixth is the first to see it all
    )
    params, config = ours(model, tmp_path)
    for length, start in ((1500, 0), (40, 100_000)):
        tokens, _ = prompts(model, size=1, length=length)
        at = torch.arange(start, start + length)[None]
        theirs = model(torch.from_numpy(tokens), position_ids=at).logits.numpy()
        difference = np.abs(theirs - our_logits(params, config, tokens, start)).max()
        print(f"{family} {length} tokens from {start}: {difference:.1e}")
        assert difference < 1e-4, (length, start, difference)


YARNS = {
    "plain": {},
    "exact bounds": dict(truncate=False),
    "own bounds": dict(beta_fast=16, beta_slow=2.5),
    "deepseek": dict(mscale=1.0, mscale_all_dim=0.7),
    "own magnitude": dict(attention_factor=1.3),
}


@pytest.mark.parametrize("options", YARNS)
@torch.no_grad()
def test_yarn_by_frequency_and_by_logits(options, tmp_path):
    """Frequencies bit for bit; of size 128 torch rounds some powers of the base differently."""
    scaling = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    scaling |= YARNS[options]
    for size, theta, length in ((8, 1e4, 16), (64, 1e6, 4096), (128, 1e6, 32_768)):
        own = scaling | dict(rope_theta=theta, original_max_position_embeddings=length)
        config = transformers.Qwen3Config(
            head_dim=size, rope_parameters=own, max_position_embeddings=4 * length
        )
        theirs, magnitude = ROPE_INIT_FUNCTIONS["yarn"](config)
        read = models.from_hf_config(config.to_dict())
        mine = rope.frequencies(size, theta, read.rope_scaling)
        assert read.rope_scaling.magnitude == magnitude
        np.testing.assert_array_max_ulp(mine, theirs.numpy(), size == 128)

    model = reference("qwen3", **SHAPES["deep"], rope_scaling=scaling)
    params, config = ours(model, tmp_path / "theirs")
    tokens, _ = prompts(model, length=60)
    theirs = model(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(theirs - our_logits(params, config, tokens)).max() < 1e-4
    plain = dataclasses.replace(config, rope_scaling=None)
    assert np.abs(theirs - our_logits(params, plain, tokens)).max() > 1e-2
    huggingface.export(params, config, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    np.testing.assert_array_equal(again(torch.from_numpy(tokens)).logits.numpy(), theirs)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_greedy_generations_are_identical(family, tmp_path):
    model = reference(family, **SHAPES["deep"], tie_word_embeddings=False)
    params, config = ours(model, tmp_path)
    tokens, lengths = prompts(model)
    padded, mask = left_padded(tokens, lengths)
    steps = 24
    theirs = model.generate(
        padded, attention_mask=mask, do_sample=False, max_new_tokens=steps, pad_token_id=0
    )[:, padded.shape[1] :]

    prefix = models.prefill(params, config, tokens, jnp.asarray(lengths - 1))
    suffix = models.empty_suffix(config, len(tokens), 1, steps, jnp.float32)
    last, mine = jnp.asarray(tokens[np.arange(len(tokens)), lengths - 1]), []
    for slot in range(steps):
        hidden, suffix = decode_step(params, config, last[:, None], prefix, suffix, jnp.int32(slot))
        last = (hidden[:, 0] @ models.unembedding(params).T).argmax(-1)
        mine.append(last)
    np.testing.assert_array_equal(np.stack(mine, axis=1), theirs.numpy())
    assert len(np.unique(theirs)) > 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_exported_folders_load_in_transformers_bit_for_bit(family, dtype, tmp_path):
    def read(folder):
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", attn_implementation="eager", output_loading_info=True
        )

    made = reference(family, **SHAPES["ungrouped"]).to(getattr(torch, dtype))
    params, config = ours(made, tmp_path / "theirs", dtype=dtype)
    model, _ = read(tmp_path / "theirs")
    huggingface.export(
        params,
        config,
        tmp_path / "ours",
        generation={"eos_token_id": [5, 7], "pad_token_id": 5},
        max_file_bytes=20_000,
    )
    again, info = read(tmp_path / "ours")
    assert not any(info.values()), info
    assert type(again) is type(model) and again.dtype == getattr(torch, dtype)
    assert again.generation_config.eos_token_id == [5, 7] == again.config.eos_token_id
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    tied = again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    assert tied == config.tied_embeddings
    tokens = torch.from_numpy(prompts(model)[0])
    assert torch.equal(model(tokens).logits, again(tokens).logits)
