"""Chat templates: the model's own, rendered and turned into ids as transformers does it."""

import json
import pathlib

import chat_fixtures
import data_fixtures
import pytest

from qlog import data
from qlog.data import formatting, tokenizers
from qlog.errors import ConfigError

CONTENTS = (
    "Why?",
    "  leading and trailing \n\n",
    "\n\na\n\n\nb   c\td\r\ne",
    "naïve façade 今天 🙂👩‍👩‍👧 e\u0301 and \u00e9, \u00a0nbsp, \ue000 and \U0010fffd",
    "a <tag> <|nope|> <think {{ x }} {% raw %} </ think>",
    "",
)
ENDING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "<|im_start|>user\n{{ messages[0].content | trim }}<|im_end|>\n" + ENDING
TASK = data.Task("words", "Answer.")


def folder(tmp_path, template, *, config=None, name="chat_template.jinja") -> pathlib.Path:
    """A byte-level vocabulary with Qwen's control tokens and these files."""
    data_fixtures.write_spec(tmp_path, data_fixtures.byte_level_spec())
    if template is not None:
        (tmp_path / name).write_text(template, encoding="utf-8")
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def shown(tokenizer, content="Why?", **options) -> str:
    return tokenizer.decode(
        formatting.chat_prompt(tokenizer, content, **options), show_control=True
    )


def load(name, tmp_path, **options):
    start, end = chat_fixtures.MODELS[name].marks
    return tokenizers.load(tmp_path, think_start=start, think_end=end, **options)


# ---- Where the template comes from ----


def test_the_order_of_the_files_is_that_of_transformers(tmp_path):
    """The first file wins, and is taken away for the next one to be seen."""
    sources = ("jinja", "tool", "legacy")
    for name, source in zip(
        ("chat_template.jinja", "tokenizer_config.json", "chat_template.json"), sources, strict=True
    ):
        template = TURN.replace("user", source)
        text = template
        if name.startswith("tokenizer"):
            named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": text}]
            text = json.dumps({"chat_template": named})
        elif name.endswith("json"):
            text = json.dumps({"chat_template": text})
        folder(tmp_path, text, name=name)
    for name, source in zip(
        ("chat_template.jinja", "tokenizer_config.json", "chat_template.json"), sources, strict=True
    ):
        tokenizer = tokenizers.load(tmp_path / "tokenizer.json")  # a file finds its neighbours
        assert tokenizer.chat_template.path == tmp_path / name
        assert shown(tokenizer).startswith(f"<|im_start|>{source}\nWhy?<|im_end|>")
        (tmp_path / name).unlink()
    assert tokenizers.load(tmp_path).chat_template is None


def test_a_given_file_or_the_built_in_template_goes_before_the_own_one(tmp_path):
    folder(tmp_path, TURN)
    given = tmp_path / "mine.jinja"
    given.write_text("\ufeffMine: {{ messages[0].content }}\r\n", encoding="utf-8", newline="")
    tokenizer = tokenizers.load(tmp_path, chat_template=str(given))
    assert shown(tokenizer) == "Mine: Why?<think>\n"
    assert "mine.jinja (given)" in data.Formatter(tokenizer, TASK).template_name
    built_in = tokenizers.load(tmp_path, chat_template="builtin")
    assert built_in.chat_template is None
    assert shown(built_in, " x ").startswith("<|im_start|>user\n x <|im_end|>")
    assert data.Formatter(built_in, TASK).template_name == "built-in, <|im_start|>"
    assert data.Formatter(tokenizer, TASK, "cold").template_name == "none (style 'cold')"
    with pytest.raises(
        ConfigError, match=r"config.tokenizer.chat_template = .*none.jinja does not"
    ):
        tokenizers.load(tmp_path, chat_template=str(tmp_path / "none.jinja"))


def test_the_cold_style_reads_no_template(tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    example = data.Example("1", "Why?", "b")
    broken = data.Formatter(tokenizers.load(folder(tmp_path, "{% if %}")), TASK, "cold")
    other = data.Formatter(tokenizers.load(folder(plain, None)), TASK, "cold")
    assert broken.prompt(example) == other.prompt(example)
    assert broken.digest == other.digest == other.tokenizer.digest


def test_the_digest_of_the_warm_style_has_the_template_and_its_variables(tmp_path):
    template = TURN + "{{ date_string }}{{ eos_token }}"

    def digest(folder, **options):
        return data.Formatter(tokenizers.load(folder, **options), TASK).digest

    for name in "abc":
        (tmp_path / name).mkdir()
    bare = digest(folder(tmp_path / "a", None))
    own = digest(folder(tmp_path / "b", template))
    assert (
        bare
        == tokenizers.load(tmp_path / "a").digest
        == digest(tmp_path / "b", chat_template="builtin")
    )
    assert len({bare, own, digest(tmp_path / "b", chat_template_kwargs={"date_string": "1"})}) == 3
    # Where the same text comes from does not count.
    assert own == digest(
        folder(tmp_path / "c", None), chat_template=str(tmp_path / "b/chat_template.jinja")
    )
    assert own != digest(folder(tmp_path / "b", template, config={"eos_token": "<|endoftext|>"}))


# ---- What a template sees ----


def test_templates_see_special_tokens_as_the_files_name_them(tmp_path):
    template = "{{ bos_token }}|{{ eos_token }}|{{ image_token }}|{{ pad_token }}|" + TURN
    tokens = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}}
    folder(tmp_path, template, config={**tokens, "image_token": "(i)", "pad_token": None})
    assert shown(tokenizers.load(tmp_path)).startswith("<|endoftext|>|<|im_end|>|(i)||")
    # The older file counts where the config does not list the added tokens.
    older = tmp_path / "special_tokens_map.json"
    older.write_text('{"bos_token": "<|im_start|>"}')
    assert shown(tokenizers.load(tmp_path)).startswith("<|im_start|>|<|im_end|>")
    folder(tmp_path, template, config={**tokens, "added_tokens_decoder": {}})
    assert shown(tokenizers.load(tmp_path)).startswith("<|endoftext|>|<|im_end|>")
    # Without files, those that the vocabulary's names tell.
    older.unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    assert shown(tokenizers.load(tmp_path)).startswith("|<|im_end|>||<|endoftext|>|")


def test_the_date_is_fixed_and_the_user_may_set_another(tmp_path):
    chat_fixtures.write(tmp_path, "llama32")
    assert "Today Date: 26 Jul 2024\n" in shown(load("llama32", tmp_path))
    dated = load("llama32", tmp_path, chat_template_kwargs={"date_string": "1 Jan 2030"})
    assert "Today Date: 1 Jan 2030\n" in shown(dated)


def test_what_templates_of_transformers_may_use(tmp_path):
    template = (
        "{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}|"
        "{% generation %}{% set inside = 1 %}g{% endgeneration %}{{ inside is defined }}|"
        "{{ {'b': '<é>', 'a': [1]} | tojson }}|{{ [1] | tojson(indent=1) }}|"
        "{{ tools is none and documents is none }}|" + TURN
    )
    expected = '13|gFalse|{"b": "<é>", "a": [1]}|[\n 1\n]|True|<|im_start|>user\nWhy?'
    assert shown(tokenizers.load(folder(tmp_path, template))).startswith(expected)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% if %}", r"chat_template.jinja, line 1 cannot be rendered \(TemplateSyntaxError"),
        ("{{ raise_exception('no user') }}", r"\(TemplateError: no user\)"),
        ("{{ messages[3].content.strip() }}", r"\(UndefinedError"),
        ("{{ messages.__class__.__mro__ }}", r"\(SecurityError"),
        ("{{ messages.append(1) }}", r"\(SecurityError"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", r"\(SecurityError"),
        ("{{ 1 / 0 }}" + TURN, r"\(ZeroDivisionError"),
        ("{% for x in range(10**9) %}x{% endfor %}", r"\(OverflowError"),
        (
            "{% for x in range(9999) %}{% for y in range(9999) %}{% endfor %}{% endfor %}",
            r"\(SecurityError: it does not end within [0-9,]+ steps of its loops, macros",
        ),
        (
            "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
            "{{ m(99) }}",
            r"\(SecurityError: it does not end",
        ),
        ("{{ 9 ** (9 ** 9) }}" + TURN, r"\(SecurityError: \*\* makes more"),
        ("{{ 'x' * 10 ** 12 }}" + TURN, r"\(SecurityError: \* makes more"),
        ("{{ '\\ud800' }}" + TURN, r"\(UnicodeEncodeError"),
        ("nothing", "does not write the user's text"),
        ("", "does not write the user's text"),
        ("{{ dict.fromkeys }}" + TURN, "prints a builtin_function_or_method"),
        ("{{ 'ab' | map('upper') }}" + TURN, "prints a generator"),
        (TURN + "<think>\n<think>\n", "opens the rationale twice"),
        (TURN + "<think>\n\n</think>\n\n", "closes the rationale although thinking is on"),
    ],
)
def test_templates_that_fail_are_one_sentence_with_the_file(template, message, tmp_path):
    tokenizer = tokenizers.load(folder(tmp_path, template))
    with pytest.raises(ConfigError, match=message) as caught:
        data.Formatter(tokenizer, TASK)
    assert str(tmp_path / "chat_template.jinja") in str(caught.value)
    assert "config.tokenizer.chat_template" in str(caught.value)


@pytest.mark.parametrize(
    "written",
    [
        "{{ c[:30] | e }}",
        "{{ c | truncate(60) }}",
        "{{ c | striptags }}",
        "{{ c | replace('<', '[') }}",
        "{{ c[:30] }}{{ c[30:] | upper }}",
        "{{ c }} {{ c }}",
        "{{ c if 'many are 2 and 3' in c else c[:9] }}",
        "How many are 2 and 3?",
    ],
)
def test_templates_that_change_the_question_are_refused(written, tmp_path):
    template = "{% set c = messages[0].content %}<|im_start|>" + written + ENDING
    tokenizer = tokenizers.load(folder(tmp_path, template))
    with pytest.raises(ConfigError, match="does not write the user's text exactly once"):
        data.Formatter(tokenizer, TASK)


def test_every_prompt_is_looked_at(tmp_path):
    """A template that passes the check, and drops one question."""
    template = "{% set c = messages[0].content %}{{ c if 'Rome' not in c else 'none' }}" + ENDING
    formatter = data.Formatter(tokenizers.load(folder(tmp_path, template)), TASK)
    formatter.prompt(data.Example("1", "Where is Oslo?", "a"))
    with pytest.raises(ConfigError, match="does not write the user's text exactly once"):
        formatter.prompt(data.Example("2", "Where is Rome?", "a"))


@pytest.mark.parametrize("content", ["user", "e", "", " assistant ", "<|im_start|>", "\n"])
def test_a_content_in_the_words_of_the_template_is_no_repetition(content, tmp_path):
    tokenizer = tokenizers.load(folder(tmp_path, TURN))
    expected = f"<|im_start|>user\n{content.strip()}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert shown(tokenizer, content) == expected


@pytest.mark.parametrize(
    "files, message",
    [
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json is not JSON"),
        ({"tokenizer_config.json": "[]"}, "tokenizer_config.json holds no JSON object"),
        ({"tokenizer_config.json": '{"chat_template": 3}'}, "neither a text nor a list"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "rag"}]}'}, "named 'default'"),
        ({"tokenizer_config.json": '{"eos_token": 3}'}, "eos_token = 3 is not a token's name"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": ["u"]}]}'}, "named 'default'"),
        ({"tokenizer_config.json": '{"add_bos_token": "yes"}'}, "add_bos_token = 'yes' must be"),
        ({"chat_template.json": '{"chat_template": {}}'}, "chat_template.json: chat_template is"),
    ],
)
def test_damaged_files_are_named(files, message, tmp_path):
    folder(tmp_path, None)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        tokenizers.load(tmp_path)


def test_a_variable_that_makes_the_template_fail_is_named(tmp_path):
    tokenizer = tokenizers.load(
        folder(tmp_path, "{{ '' + (date_string or '') }}" + TURN),
        chat_template_kwargs={"date_string": 2024},
    )
    with pytest.raises(ConfigError, match="kwargs.date_string = 2024 makes the chat template"):
        data.Formatter(tokenizer, TASK)


def test_keys_that_nothing_reads_refuse_no_tokenizer(tmp_path):
    config = {"add_bos_token": 1, "weird_token": 7, "bos_token": "<|endoftext|>"}
    tokenizer = tokenizers.load(folder(tmp_path, None, config=config))
    assert tokenizer.token(tokenizer.bos_id) == "<|endoftext|>"
    (tmp_path / "tokenizer_config.json").write_bytes(b"\xff")
    with pytest.raises(
        ConfigError, match="tokenizer_config.json is not UTF-8 .*: save it"
    ) as caught:
        tokenizers.load(tmp_path)
    assert str(caught.value).count("download it again") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"date_strin": "x"}, r"date_strin = 'x' is not read by .*did you mean 'date_string'"),
        ({"messages": []}, r"messages = \[\] is a variable that qlog sets itself"),
        ({"enable_thinking": False}, "enable_thinking = False is a variable that qlog sets"),
    ],
)
def test_variables_that_no_template_reads_are_refused(arguments, message, tmp_path):
    tokenizer = tokenizers.load(
        folder(tmp_path, TURN + "{{ date_string }}"), chat_template_kwargs=arguments
    )
    with pytest.raises(ConfigError, match=message):
        data.Formatter(tokenizer, TASK)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="is read by nothing, since .* a built-in chat template"):
        tokenizers.load(tmp_path, chat_template_kwargs=arguments)


# ---- Where the rationale begins ----


@pytest.mark.parametrize(
    "ending, thinking, answering",
    [
        ("", "<think>\n", "<think>\n\n</think>\n\n"),
        # DeepSeek-R1's and GLM's templates open the rationale.
        ("<think>\n", "<think>\n", "<think>\n\n</think>\n\n"),
        ("<think>", "<think>", "<think>\n\n</think>\n\n"),
        # Qwen3's, DeepSeek-V3.1's and SmolLM3's have a form of their own without thinking.
        (
            "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
            "<think>\n",
            "<think>\n\n</think>\n\n",
        ),
        ("{{ '<think>' if thinking else '</think>' }}", "<think>", "</think>"),
        (
            "{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n{% endif %}",
            "<think>\n",
            "<think>\n\n</think>\n",
        ),
    ],
)
def test_the_rationale_is_opened_or_closed_once(ending, thinking, answering, tmp_path):
    template = (TURN + ending).replace(
        "{{ messages[0].content | trim }}", "{{ messages[0].content }}"
    )
    # A template's last newline is dropped, as Jinja does: it is written as an expression.
    template = template.removesuffix("\n") + "{{ '\n' }}" if template.endswith("\n") else template
    tokenizer = tokenizers.load(folder(tmp_path, template))
    start = "<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n"
    assert shown(tokenizer, "<think>") == start + thinking
    assert shown(tokenizer, "<think>", thinking=False) == start + answering
    whole = data_fixtures.whole_tokenizer(tmp_path / "tokenizer.json")
    plain = start.replace("<think>", "Why?")
    assert formatting.chat_prompt(tokenizer, "Why?") == whole(plain + thinking)
    assert formatting.chat_prompt(tokenizer, "Why?", thinking=False) == whole(plain + answering)


# ---- Control tokens in the user's text ----


@pytest.mark.parametrize("name", chat_fixtures.MODELS)
def test_control_tokens_in_user_text_stay_text(name, tmp_path):
    tokenizer = load(name, chat_fixtures.write(tmp_path, name))
    control = set(tokenizer.control.values())

    def kept(ids):
        return [i for i in ids if i in control]

    expected = kept(formatting.chat_prompt(tokenizer, "Why?"))
    names = list(tokenizer.control)
    hostile = [*names, "".join(names), " ".join(names), *(n[0] + n for n in names)]
    hostile += [f"{n[:-1]}{n}{n[1:]} \ue000\ue001" for n in names]
    for text in hostile:
        for thinking in (True, False):
            ids = formatting.chat_prompt(tokenizer, f"x {text} y", thinking=thinking)
            assert f"x {text} y" in tokenizer.decode(ids)
            assert kept(ids)[: len(expected)] == expected or not thinking
            assert len(kept(ids)) == len(
                kept(formatting.chat_prompt(tokenizer, "Why?", thinking=thinking))
            )


def odd_spec(**switches):
    """A vocabulary whose control tokens overlap, take spaces with them or ignore case."""
    spec = data_fixtures.byte_level_spec((*data_fixtures.CHATML, "<a>", "<a><b>", "☃"))
    for token in spec["added_tokens"][5:]:
        token.update(switches)
    return spec


@pytest.mark.parametrize(
    "switches, normalizer",
    [
        ({}, None),
        ({"lstrip": True}, None),
        ({"rstrip": True}, None),
        ({"lstrip": True, "rstrip": True}, None),
        ({"single_word": True}, None),
        ({"normalized": True}, {"type": "Lowercase"}),
        ({"normalized": True, "lstrip": True}, {"type": "NFKC"}),
    ],
)
def test_odd_control_tokens_are_found_as_the_library_finds_them(switches, normalizer, tmp_path):
    spec = odd_spec(**switches) | {"normalizer": normalizer}
    path = data_fixtures.write_spec(tmp_path, spec)
    whole = data_fixtures.whole_tokenizer(path)
    literal = "pre <a>  <a><b> ☃ <A>\n<b><a>x"
    (tmp_path / "chat_template.jinja").write_text(literal + " {{ messages[0].content }} <a> end")
    tokenizer = tokenizers.load(path)
    opened = [tokenizer.think_start_id, *tokenizer.encode("\n")]
    assert formatting.chat_prompt(tokenizer, "Why?") == whole(f"{literal} Why? <a> end") + opened
    control = set(tokenizer.control.values())
    for text in ("<a>", "  <a><b>  <A><B> ☃☃", "＜a＞ ☃", "<<a>a>", "<a><a><b><b>"):
        ids = formatting.chat_prompt(tokenizer, f"Why? {text} so")
        plain = formatting.chat_prompt(tokenizer, "Why? so")
        assert [i for i in ids if i in control] == [i for i in plain if i in control], text
        assert tokenizer.decode(tokenizer.encode(f"Why? {text} so")) in tokenizer.decode(ids)


def test_words_behind_a_control_token_get_no_space_of_their_own(tmp_path):
    """Mistral's layout: Metaspace puts a space in front of a whole prompt, not of its parts."""
    spec = chat_fixtures.gemma_spec() | {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        },
    }
    path = data_fixtures.write_spec(tmp_path, spec)
    tokenizer = tokenizers.load(path, think_start="<unused0>", think_end="<unused1>")
    whole = data_fixtures.whole_tokenizer(path)
    turn = "<bos><start_of_turn>user\nWhy  not?<end_of_turn>\n<start_of_turn>model\n<unused0>\n"
    assert formatting.chat_prompt(tokenizer, "Why  not?") == whole(turn)


# ---- Against transformers ----


@pytest.mark.parity
@pytest.mark.parametrize("name", chat_fixtures.MODELS)
@pytest.mark.parametrize("in_config", [True, False])
def test_prompts_are_those_of_transformers(name, in_config, tmp_path, shared):
    transformers = pytest.importorskip("transformers")
    qwen = shared / "tokenizers" / "qwen3" / "tokenizer.json"
    chat_fixtures.write(tmp_path, name, qwen, in_config=in_config)
    published = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer = load(name, tmp_path)
    start, newlines = tokenizer.think_start_id, tokenizer.encode("\n\n")
    opened = [start, *tokenizer.encode("\n")]
    empty = [start, *newlines, tokenizer.think_end_id, *newlines]
    for content in CONTENTS:
        on, off = (
            published.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                enable_thinking=thinking,
                date_string="26 Jul 2024",
                return_dict=True,
            )["input_ids"]
            for thinking in (True, False)
        )
        is_open = on[-2:] == opened
        assert is_open == (name == "deepseek")
        assert formatting.chat_prompt(tokenizer, content) == (on if is_open else on + opened)
        # Only Qwen3's template has a form without thinking. DeepSeek's opening is closed.
        closed = off if name == "qwen3" else [*(off[:-2] if is_open else off), *empty]
        assert formatting.chat_prompt(tokenizer, content, thinking=False) == closed
