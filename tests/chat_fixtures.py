"""Folders of made-up models, as published ones look: vocabulary, special tokens, chat template.

The templates are written here in the structure of the published ones, with what one user turn goes
through: loops, namespaces, `trim`, dates, default system prompts, refusals.
"""

import json
import pathlib
from typing import Any, NamedTuple

import data_fixtures

QWEN3 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == "user"
        and not message.content.startswith('<tool_response>') %}
        {%- set ns.searching = false %}
        {%- set ns.last = (messages|length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- generation %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > ns.last %}
            {{- '<|im_start|>assistant\\n<think>\\n' + message.reasoning_content.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content + '<|im_end|>\\n' }}
        {%- endif %}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
QWEN25 = """\
{%- if tools %}
    {{- tools | tojson }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a made-up model.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Llama 3.1 has one fixed date; 3.2 asks for today's.
LLAMA31 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: made up\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
        + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
LLAMA32 = LLAMA31.replace(
    '{%- set date_string = "26 Jul 2024" %}', '{%- set date_string = strftime_now("%d %b %Y") %}'
)
GEMMA3 = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set prefix = "" -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Roles must alternate") }}
    {%- endif -%}
    {{ '<start_of_turn>' + message['role'] + '\\n' + (prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\\n'}}
{%- endif -%}
"""
DEEPSEEK = (
    "{% set ns = namespace(system='') %}{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{% set ns.system = message['content'] %}{%- endif %}"
    "{%- endfor %}{{bos_token}}{{ns.system}}{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- endfor %}{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)
LLAMA_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
)
GEMMA_TOKENS = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
    *("<unused0>", "<unused1>"),
)
# DeepSeek-R1-Distill-Qwen's added tokens, at their published ids; the rest up to 151664 is Qwen's.
DEEPSEEK_TOKENS = {
    "<｜end▁of▁sentence｜>": (151643, True),
    "<｜User｜>": (151644, False),
    "<｜Assistant｜>": (151645, False),
    "<｜begin▁of▁sentence｜>": (151646, True),
    "<|EOT|>": (151647, False),
    "<think>": (151648, False),
    "</think>": (151649, False),
    "<|quad_start|>": (151650, True),
    "<|file_sep|>": (151664, False),
}


class Model(NamedTuple):
    """One made-up model.

    Attributes:
      template: its chat template.
      config: of tokenizer_config.json, without the template.
      marks: the tokens around a rationale.
    """

    template: str
    config: dict[str, Any]
    marks: tuple[str, str] = ("<think>", "</think>")


_QWEN = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_LLAMA = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
_UNUSED = ("<|reserved_special_token_0|>", "<|reserved_special_token_1|>")
MODELS = {
    "qwen3": Model(QWEN3, {**_QWEN, "add_bos_token": False}),
    "qwen25": Model(QWEN25, {**_QWEN, "add_bos_token": False}),
    "llama31": Model(LLAMA31, _LLAMA, _UNUSED),
    "llama32": Model(LLAMA32, _LLAMA, _UNUSED),
    "gemma3": Model(
        GEMMA3,
        {
            "bos_token": "<bos>",
            "eos_token": {"__type": "AddedToken", "content": "<eos>", "normalized": False},
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "add_bos_token": True,
        },
        ("<unused0>", "<unused1>"),
    ),
    "deepseek": Model(
        DEEPSEEK,
        {
            "bos_token": {"__type": "AddedToken", "content": "<｜begin▁of▁sentence｜>"},
            "eos_token": {"__type": "AddedToken", "content": "<｜end▁of▁sentence｜>"},
            "pad_token": {"__type": "AddedToken", "content": "<｜end▁of▁sentence｜>"},
            "add_bos_token": True,
            "add_eos_token": False,
        },
    ),
}


def write(
    folder: pathlib.Path,
    name: str,
    qwen: pathlib.Path | None = None,
    template: str | None = None,
    in_config: bool = True,
) -> pathlib.Path:
    """Writes a model's folder.

    Args:
      name: of one in MODELS.
      qwen: the true Qwen3 tokenizer.json; None: one id per byte.
      template: instead of the model's own.
      in_config: the template is in tokenizer_config.json; else in chat_template.jinja.
    """
    model = MODELS[name]
    template = model.template if template is None else template
    folder.mkdir(parents=True, exist_ok=True)
    data_fixtures.write_spec(folder, spec(name, qwen))
    config = dict(model.config)
    if in_config:
        config["chat_template"] = template
    else:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def spec(name: str, qwen: pathlib.Path | None = None) -> dict[str, Any]:
    """The tokenizer.json of a model in MODELS."""
    if name == "gemma3":
        return gemma_spec()
    if name.startswith("llama"):
        return data_fixtures.byte_level_spec(LLAMA_TOKENS)
    if name == "deepseek":
        found = json.loads(qwen.read_text("utf-8")) if qwen else data_fixtures.byte_level_spec()
        first = 0 if qwen else 151643 - 256
        found["added_tokens"] = [
            data_fixtures.added_token(id_ - first, token, special)
            for token, (id_, special) in DEEPSEEK_TOKENS.items()
        ]
        return found
    return json.loads(qwen.read_text("utf-8")) if qwen else data_fixtures.byte_level_spec()


def gemma_spec() -> dict[str, Any]:
    """Gemma's layout: spaces as '▁', bytes for unknown characters, runs of newlines as tokens."""
    pieces = [*GEMMA_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\n", "\n\n", "\n\n\n", "▁", "▁▁", *map(chr, range(33, 127))]
    vocab = {piece: id_ for id_, piece in enumerate(pieces)}
    runs = ("\n\n", "\n\n\n", "▁▁")
    return {
        "version": "1.0",
        "added_tokens": [
            *(data_fixtures.added_token(vocab[t], t) for t in GEMMA_TOKENS),
            *(data_fixtures.added_token(vocab[t], t, special=False) for t in runs),
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [["▁", "▁"], ["\n", "\n"], ["\n\n", "\n"]],
            "unk_token": "<unk>",
            "byte_fallback": True,
        },
    }
