"""Makes the folders next to this file: a tiny model per family and what transformers says of it.

    pip install torch==2.13.0 transformers && python tests/testdata/golden/make_golden.py [FAMILY]

Each folder is a Hugging Face model with random bfloat16 weights, and expected.npz:
  tokens int64 [2, T], lengths int64 [2]: two right-padded sequences;
  logits float32 [2, T, V]: of each sequence by itself, in float32; zeros at the padding;
  greedy int64 [8]: the greedy continuation of the first sequence.
Written with torch 2.13.0 and transformers 5.23.0.
"""

import pathlib
import shutil
import sys

import numpy as np
import torch
import transformers

_COMMON = dict(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_hidden_layers=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
MODELS = {
    "qwen3": (transformers.Qwen3Config, dict(tie_word_embeddings=True, rope_theta=1e6)),
    "qwen2": (
        transformers.Qwen2Config,
        dict(tie_word_embeddings=True, rope_theta=1e6, hidden_size=32, head_dim=None),
    ),
    # Untied, and in two files.
    "llama": (
        transformers.LlamaConfig,
        dict(
            tie_word_embeddings=False,
            rope_theta=5e5,
            rms_norm_eps=1e-5,
            rope_scaling=dict(
                rope_type="llama3",
                factor=4.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        ),
    ),
    # Two layers that see four tokens, one that sees all, each kind with its own RoPE.
    "gemma3": (
        transformers.Gemma3TextConfig,
        dict(
            num_hidden_layers=3,
            sliding_window=4,
            query_pre_attn_scalar=12,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            rope_scaling=dict(rope_type="linear", factor=8.0),
        ),
    ),
    # All layers see four tokens; heads that do not share the width.
    "mistral": (
        transformers.MistralConfig,
        dict(tie_word_embeddings=False, rope_theta=1e4, sliding_window=4, rms_norm_eps=1e-5),
    ),
    # The second of three layers has no RoPE.
    "smollm3": (
        transformers.SmolLM3Config,
        dict(
            tie_word_embeddings=True,
            rope_theta=1e4,
            num_hidden_layers=3,
            no_rope_layer_interval=2,
        ),
    ),
}
LENGTHS = (14, 9)


def random_model(config, seed):
    """A float32 model whose weights, norms and biases included, are random bfloat16 numbers."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = parameter if "norm" in name else 0.0
            # Large enough for greedy continuations to vary, small enough for float32 to suffice.
            spread = 1.5 / parameter.shape[-1] ** 0.5 if "proj.weight" in name else 0.25
            parameter.copy_((mean + spread * torch.randn_like(parameter)).bfloat16())
    return model


@torch.no_grad()
def main():
    here = pathlib.Path(__file__).parent
    wanted = sys.argv[1:] or list(MODELS)
    for seed, (name, (config_class, fields)) in enumerate(MODELS.items()):
        if name not in wanted:
            continue
        fields = _COMMON | fields
        fields = {key: value for key, value in fields.items() if key != "head_dim" or value}
        model = random_model(config_class(**fields), seed)
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, 48, (2, max(LENGTHS)))
        logits = np.zeros((*tokens.shape, 48), np.float32)
        for row, length in enumerate(LENGTHS):
            one = torch.from_numpy(tokens[row : row + 1, :length])
            logits[row, :length] = model(one).logits[0].numpy()
        greedy = torch.from_numpy(tokens[:1])
        for _ in range(8):
            best = model(greedy).logits[:, -1:].argmax(-1)
            greedy = torch.cat([greedy, best], dim=1)
        folder = here / name
        shutil.rmtree(folder, ignore_errors=True)
        size = "6KB" if name == "llama" else "1GB"
        model.bfloat16().save_pretrained(folder, max_shard_size=size)
        np.savez_compressed(
            folder / "expected.npz",
            tokens=tokens,
            lengths=np.array(LENGTHS),
            logits=logits,
            greedy=greedy[0, len(tokens[0]) :].numpy(),
        )
        print(name, round(float(np.abs(logits).max()), 2), greedy[0, -8:].tolist())


if __name__ == "__main__":
    main()
