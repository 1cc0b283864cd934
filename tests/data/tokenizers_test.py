"""Tokenizers: ids, control tokens out of reach of text, round trips, clear errors."""

import json
import unicodedata

import chat_fixtures
import data_fixtures
import pytest
import sentencepiece
import tokenizers as hf_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from qlog import data
from qlog.data import formatting, tokenizers
from qlog.errors import ConfigError
from qlog.grading import graders

TEXTS = (
    "Hello, world! It's 34.7% of $ 103.7 million (2009-2010).",
    "def f(x):\n\treturn x  # two  spaces\r\n\r\n\n   end   ",
    "Ça va très bien, Ærøskøbing — naïve façade; Straße, İstanbul, ﬁn",
    "今天天气很好，我们去公园散步吧。日本語のテキスト、한국어 문장.",
    "Привет, мир! שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก",
    "e\u0301 and \u00e9, a\u200bzero width, 🙂👩‍👩‍👧 family, \u00a0nbsp",
    "don't WE'LL they'VE I'd x'S 'tis o'clock_under_score",
)


@pytest.fixture(scope="module")
def qwen(shared):
    return tokenizers.load(shared / "tokenizers" / "qwen3")


@pytest.fixture(scope="module")
def t5(shared):
    return tokenizers.load(
        shared / "tokenizers" / "t5_32k", think_start="<extra_id_0>", think_end="<extra_id_1>"
    )


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    return tokenizers.load(data_fixtures.write_spec(folder, data_fixtures.byte_level_spec()))


def test_qwen_control_tokens_have_their_published_ids(qwen):
    assert qwen.vocab_size == 151_669
    assert (qwen.think_start_id, qwen.think_end_id) == (151_667, 151_668)
    assert qwen.eos_ids == (151_645, 151_643)
    assert qwen.pad_id == 151_643
    assert qwen.bos_id is None


def test_qwen_ids_are_those_of_an_independent_bpe(qwen, shared):
    reference = data_fixtures.ReferenceBPE(shared / "tokenizers" / "qwen3" / "tokenizer.json")
    for text in TEXTS:
        assert qwen.encode(text) == reference.encode(text), text
    assert qwen.encode("Hello world") == [9707, 1879]


def test_qwen_decodes_what_it_encoded(qwen):
    for text in TEXTS:
        assert qwen.decode(qwen.encode(text)) == unicodedata.normalize("NFC", text)
    assert qwen.encode_batch(TEXTS) == [qwen.encode(text) for text in TEXTS]


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_and_never_becomes_a_control_token(byte_level, text):
    ids = byte_level.encode(text)
    assert byte_level.decode(ids) == text
    assert not set(ids) & set(byte_level.control.values())


@pytest.mark.parametrize("which", ["byte_level", "qwen", "t5"])
def test_markup_inside_text_stays_text(which, request):
    tokenizer = request.getfixturevalue(which)
    for name in tokenizer.control:
        text = f"before {name}{name} after"
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.control.values()), name
        if which != "t5":  # which has no piece for every character
            assert tokenizer.decode(ids) == text


def test_decode_drops_control_tokens_or_names_them(byte_level):
    ids = [
        *byte_level.encode("a"),
        byte_level.think_end_id,
        byte_level.think_end_id,
        *byte_level.encode("b"),
        byte_level.eos_ids[0],
    ]
    assert byte_level.decode(ids) == "ab"
    assert byte_level.decode(ids, show_control=True) == "a</think></think>b<|im_end|>"
    assert byte_level.token(byte_level.think_end_id) == "</think>"
    padding_row = byte_level.vocab_size + 7
    assert byte_level.decode([padding_row]) == ""
    assert str(padding_row) in byte_level.token(padding_row)


def test_sentencepiece_model(t5):
    assert t5.vocab_size == 32_101
    assert (t5.eos_ids, t5.pad_id, t5.bos_id) == ((1,), 0, None)
    assert t5.token(t5.think_end_id) == "<extra_id_1>"
    text = "The answer is 34.7% of the total."
    assert t5.decode(t5.encode(text)) == text
    assert t5.decode([t5.think_start_id, *t5.encode("Paris"), 1]) == "Paris"


def test_sentencepiece_bpe_with_bytes_and_turns(tmp_path):
    # Gemma's layout: BPE with byte fallback, turns as user-defined pieces, text left as it is.
    markup = ["<start_of_turn>", "<end_of_turn>", "<unused0>", "<unused1>"]
    with open(tmp_path / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the start of the turn is the end"] * 20 + list(TEXTS)),
            model_writer=file,
            model_type="bpe",
            vocab_size=420,
            byte_fallback=True,
            user_defined_symbols=[*markup, "\n\n"],
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            pad_piece="<pad>",
            eos_piece="<eos>",
            bos_piece="<bos>",
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    tokenizer = tokenizers.load(tmp_path, think_start="<unused0>", think_end="<unused1>")
    control = tokenizer.control
    assert set(control) == {"<pad>", "<eos>", "<bos>", *markup}
    assert tokenizer.eos_ids == (control["<end_of_turn>"], control["<eos>"])
    assert (tokenizer.bos_id, tokenizer.pad_id) == (control["<bos>"], control["<pad>"])
    for text in (*TEXTS, *(f"a {name}{name}\n\nb" for name in control)):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(control.values())
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("\n\n")) == 1  # a user-defined piece that is text
    turn = formatting.chat_prompt(tokenizer, "Why?")
    assert tokenizer.decode(turn, show_control=True) == (
        "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n<unused0>\n"
    )


def test_word_level():
    tokenizer = tokenizers.word_level("the cat sat the".split())
    assert tokenizer.vocab_size == 8
    assert tokenizer.encode("the cat\n sat dog </think>") == [5, 6, 7, 4, 4]
    ids = [5, 6, tokenizer.think_end_id, 7, tokenizer.eos_ids[0]]
    assert tokenizer.decode(ids) == "the cat sat"
    for bad in ("two words", "", "</think>"):
        with pytest.raises(ValueError, match="not a single plain word"):
            tokenizers.word_level([bad])


def test_saved_tokenizer_loads_equal(tmp_path, t5):
    words = tokenizers.word_level(["one", "two"])
    again = tokenizers.load(words.save(tmp_path))
    assert again.control == words.control and again.encode("two one") == words.encode("two one")
    assert t5.save(tmp_path).read_bytes() == t5.path.read_bytes()


def test_control_tokens_inside_the_vocabulary_stay_out_of_reach(tmp_path):
    # Gemma's layout: control tokens are vocabulary entries that merges can build, and runs of
    # newlines are added tokens that are text.
    vocab = {
        "<unk>": 0,
        "<eos>": 1,
        "<": 2,
        "e": 3,
        "o": 4,
        "s": 5,
        ">": 6,
        "<e": 7,
        "<eo": 8,
        "<eos": 9,
        "\n": 10,
        "\n\n": 11,
        "<unused0>": 12,
        "<unused1>": 13,
    }
    merges = ["< e", "<e o", "<eo s", "<eos >"]
    spec = {
        "version": "1.0",
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "added_tokens": [
            data_fixtures.added_token(0, "<unk>"),
            data_fixtures.added_token(1, "<eos>"),
            data_fixtures.added_token(11, "\n\n", special=False),
            data_fixtures.added_token(12, "<unused0>", special=False),
            data_fixtures.added_token(13, "<unused1>", special=False),
        ],
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": "<unk>"},
    }
    path = data_fixtures.write_spec(tmp_path, spec)
    whole = hf_tokenizers.Tokenizer.from_file(str(path))
    assert whole.encode("<eos>").ids == [1]  # what must not happen
    tokenizer = tokenizers.load(path, think_start="<unused0>", think_end="<unused1>")
    assert tokenizer.encode("<eos>\n\n\n") == [9, 6, 11, 10]
    assert tokenizer.vocab_size == 14


def test_vocabulary_that_leaks_control_tokens_is_refused(tmp_path):
    pieces = [["<unk>", 0.0], ["</s>", 0.0], ["<think>", -1.0], ["</think>", -1.0], ["a", -2.0]]
    spec = {
        **data_fixtures.byte_level_spec(),
        "pre_tokenizer": None,
        "decoder": None,
        "added_tokens": [data_fixtures.added_token(i, pieces[i][0]) for i in (1, 2, 3)],
        "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces},
    }
    with pytest.raises(ConfigError, match="</s>.* into a control token"):
        tokenizers.load(data_fixtures.write_spec(tmp_path, spec))


def test_errors_say_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match="config.tokenizer.path = .*nowhere does not exist"):
        tokenizers.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="neither tokenizer.json nor"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a tokenizer.json"):
        tokenizers.load(tmp_path)
    (tmp_path / "broken.model").write_bytes(b"\xff\xff\xff")
    with pytest.raises(ConfigError, match="not a SentencePiece model"):
        tokenizers.load(tmp_path / "broken.model")
    from sentencepiece import sentencepiece_model_pb2  # needs protobuf

    twice = sentencepiece_model_pb2.ModelProto()
    for piece in ("<unk>", "a", "a"):
        twice.pieces.add(piece=piece, score=0)
    (tmp_path / "broken.model").write_bytes(twice.SerializeToString())
    with pytest.raises(ConfigError, match="not a SentencePiece model"):
        tokenizers.load(tmp_path / "broken.model")
    spec = data_fixtures.byte_level_spec(("<think>", "</think>"))
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        tokenizers.load(data_fixtures.write_spec(tmp_path, spec))


def test_vocabulary_without_thinking_tokens_wants_two_named(shared):
    with pytest.raises(ConfigError, match="config.tokenizer.think_start = '<think>'.*<extra_id_"):
        tokenizers.load(shared / "tokenizers" / "t5_32k")


def test_same_token_for_both_ends_of_a_rationale_is_refused(tmp_path):
    path = data_fixtures.write_spec(tmp_path, data_fixtures.byte_level_spec())
    with pytest.raises(ConfigError, match="two different control tokens"):
        tokenizers.load(path, think_start="<think>", think_end="<think>")


def test_tokens_with_another_use_cannot_surround_a_rationale(tmp_path):
    path = data_fixtures.write_spec(tmp_path, data_fixtures.byte_level_spec())
    with pytest.raises(ConfigError, match="think_end = '<.im_end.>' already begins, ends or pads"):
        tokenizers.load(path, think_end="<|im_end|>")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda spec: spec["added_tokens"][0].update(id="5"), "has no name or no id"),
        (
            lambda spec: spec["added_tokens"][0].update(id=spec["added_tokens"][1]["id"]),
            "two of its",
        ),
        (
            lambda spec: spec.update(added_tokens={"id": 1, "content": "x"}),
            "added_tokens are {'id'",
        ),
        (lambda spec: spec["model"].update(vocab={"a": "x"}), "ids that are not numbers"),
        (lambda spec: spec["model"].update(vocab=None), "its vocabulary is None"),
        (lambda spec: spec["model"].update(vocab=5), "its vocabulary is 5"),
        (lambda spec: spec.update(model=None), "it has no model"),
        (lambda spec: spec["model"].update(merges=5), "its merges are 5"),
        (lambda spec: spec["model"].update(merges=[5]), "5 among its merges is no pair"),
        (lambda spec: spec["model"].update(merges=["a"]), "'a' among its merges is no pair"),
        (lambda spec: spec["model"].update(merges=[["a", 1]]), "among its merges is no pair"),
        (
            lambda spec: spec["model"].update(type="Nope"),
            "not a tokenizer.json.*from the model's own",
        ),
    ],
)
def test_damaged_files_are_named(change, message, tmp_path):
    spec = data_fixtures.byte_level_spec()
    change(spec)
    with pytest.raises(ConfigError, match=message):
        tokenizers.load(data_fixtures.write_spec(tmp_path, spec))


def test_shifted_qwen_ids_are_refused(tmp_path, shared):
    text = (shared / "tokenizers" / "qwen3" / "tokenizer.json").read_text("utf-8")
    far, without = json.loads(text), json.loads(text)
    far["added_tokens"][-2]["id"] = 160_000
    with pytest.raises(ConfigError, match="<think> at id 160000 where Qwen has 151667"):
        tokenizers.load(data_fixtures.write_spec(tmp_path, far))
    without["added_tokens"] = [t for t in without["added_tokens"] if t["content"] != "<|im_end|>"]
    with pytest.raises(ConfigError, match="<.im_end.> at id None where Qwen has 151645"):
        tokenizers.load(data_fixtures.write_spec(tmp_path, without))
    spec = json.loads(text)
    for token in spec["added_tokens"]:
        token["id"] += token["id"] > 151_660  # as if one more token had been added before
    with pytest.raises(ConfigError, match="<think> at id 151668 where Qwen has 151667"):
        tokenizers.load(data_fixtures.write_spec(tmp_path, spec))


# ---- The files next to a tokenizer ----


def beside(folder, spec=None, **files):
    """A tokenizer.json and JSON files next to it, by their names without .json."""
    path = data_fixtures.write_spec(folder, spec or data_fixtures.byte_level_spec())
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return path


def names(tokenizer):
    return [tokenizer.token(id_) for id_ in tokenizer.eos_ids]


def test_all_ends_that_the_files_name_end_an_answer(tmp_path):
    known = tokenizers.load(beside(tmp_path))
    assert names(known) == ["<|im_end|>", "<|endoftext|>"]
    # The same ends in another order change nothing, nor the digest of runs that began without.
    path = beside(tmp_path, generation_config={"eos_token_id": [256, 258]})
    assert tokenizers.load(path).eos_ids == known.eos_ids
    assert tokenizers.load(path).digest == known.digest
    spec = data_fixtures.byte_level_spec((*data_fixtures.CHATML, "<a>", "<b>", "<c>"))
    files = {
        "tokenizer_config": {"eos_token": {"content": "<a>", "__type": "AddedToken"}},
        "generation_config": {"eos_token_id": [262, 258]},
    }
    more = tokenizers.load(beside(tmp_path, spec, **files))
    assert names(more) == ["<|im_end|>", "<|endoftext|>", "<a>", "<b>"]
    chosen = tokenizers.load(beside(tmp_path, spec, **files), eos=("<c>", "<a>"))
    assert names(chosen) == ["<c>", "<a>", "<b>", "<|im_end|>"]
    for path in tmp_path.glob("*_config.json"):
        path.unlink()
    assert more.digest != tokenizers.load(beside(tmp_path, spec)).digest != chosen.digest


def test_a_vocabulary_without_known_names_is_told_its_ends(tmp_path):
    spec = data_fixtures.byte_level_spec(
        ("<s>", "<stop>", "<halt>", "<fill>", "<think>", "</think>")
    )
    with pytest.raises(ConfigError, match="no end-of-sequence token .*config.tokenizer.eos"):
        tokenizers.load(beside(tmp_path, spec))
    by_user = tokenizers.load(beside(tmp_path, spec), eos=("<halt>",))
    assert (names(by_user), by_user.pad_id, by_user.bos_id) == (["<halt>"], 258, None)
    by_generation = tokenizers.load(beside(tmp_path, spec, generation_config={"eos_token_id": 257}))
    assert names(by_generation) == ["<stop>"]
    config = {"eos_token": "<halt>", "bos_token": "<s>", "pad_token": "<fill>"}
    by_config = tokenizers.load(beside(tmp_path, spec, tokenizer_config=config))
    assert names(by_config) == ["<halt>", "<stop>"]
    assert (by_config.bos_id, by_config.pad_id) == (None, 259)
    beside(tmp_path, spec, tokenizer_config=config | {"add_bos_token": True})
    begun = tokenizers.load(tmp_path)
    assert (begun.token(begun.bos_id), begun.digest != by_config.digest) == ("<s>", True)
    cold = data.Formatter(begun, data.Task("words", ""), "cold")
    assert cold.prompt(data.Example("1", "a", "b"))[0] == begun.bos_id
    assert cold.gold(data.Example("1", "a", "b"))[-1] == begun.control["<halt>"]
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "generation_config.json").unlink()
    beside(tmp_path, spec, special_tokens_map={"eos_token": "<halt>"})
    assert names(tokenizers.load(tmp_path)) == ["<halt>"]


@pytest.mark.parametrize(
    "files, eos, message",
    [
        ({}, ("<|im_edn|>",), "eos = '<.im_edn.>' is not a control token .*mean '<.im_end.>'"),
        ({}, ("a",), "config.tokenizer.eos = 'a' is not a control token of .*its 5 control"),
        (
            {},
            ("</think>",),
            "eos = '</think>' ends answers, but it is config.tokenizer.think_start",
        ),
        ({"generation_config": {"eos_token_id": [258, 261]}}, (), "eos_token_id = 261 is outside"),
        ({"generation_config": {"eos_token_id": 65}}, (), "eos_token_id = 65 is the plain text"),
        ({"generation_config": {"eos_token_id": -1}}, (), "eos_token_id = -1 is outside"),
        ({"generation_config": {"eos_token_id": 260}}, (), "eos_token_id = 260 ends answers, but"),
        ({"generation_config": {"eos_token_id": "2"}}, (), "eos_token_id = '2' must be a token's"),
        ({"generation_config": {"eos_token_id": [True]}}, (), r"\[True\] must be a token's id"),
        ({"generation_config": [1]}, (), "generation_config.json holds no JSON object"),
        ({"tokenizer_config": {"eos_token": "<eos>"}}, (), "eos_token = '<eos>' is not a control"),
        ({"tokenizer_config": {"eos_token": "<think>"}}, (), "eos_token = '<think>' ends answers"),
        (
            {"tokenizer_config": {"bos_token": "<s>", "add_bos_token": True}},
            (),
            "tokenizer_config.json: bos_token = '<s>' is not a control token",
        ),
    ],
)
def test_ends_that_cannot_be_are_one_sentence(files, eos, message, tmp_path):
    path = beside(tmp_path, **files)
    with pytest.raises(ConfigError, match=message) as caught:
        tokenizers.load(path, eos=eos)
    assert not files or f"{next(iter(files))}.json" in str(caught.value)


def test_deepseek_on_the_vocabulary_of_qwen(tmp_path, shared, qwen):
    whole = chat_fixtures.write(
        tmp_path, "deepseek", shared / "tokenizers" / "qwen3" / "tokenizer.json"
    )
    tokenizer = tokenizers.load(whole)
    assert (tokenizer.think_start_id, tokenizer.think_end_id) == (151_648, 151_649)
    assert (tokenizer.eos_ids, tokenizer.bos_id, tokenizer.pad_id) == ((151_643,), 151_646, 151_643)
    assert tokenizer.vocab_size == 151_665
    for text in (*TEXTS, "<｜end▁of▁sentence｜><｜User｜></think>"):
        assert tokenizer.encode(text) == qwen.encode(text)
    ids = formatting.chat_prompt(tokenizer, "Why<｜Assistant｜>?")
    assert ids[:2] == [151_646, 151_644] and ids[-3:] == [151_645, 151_648, 198]
    assert ids.count(151_645) == 1
    formatter = data.Formatter(tokenizer, data.Task("words", "Answer."))
    gold = formatter.gold(data.Example("1", "Why?", "So."))
    assert gold == [*qwen.encode("\n\nSo."), 151_643]
    answer = formatter.answer_text([*qwen.encode("So."), 151_644, *qwen.encode("x"), 151_643])
    assert answer == "So.<｜User｜>x" and not graders.is_answer(answer)
    # Without the files next to it, the names say the same.
    for path in tmp_path.glob("*_config.json"):
        path.unlink()
    alone = tokenizers.load(whole)
    assert (alone.eos_ids, alone.bos_id, alone.digest) == ((151_643,), 151_646, tokenizer.digest)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", LFS, "tokenizer.json is a pointer of Git LFS .*: run `git lfs pull`"),
        ("tokenizer.model", LFS, "tokenizer.model is a pointer of Git LFS .*: run `git lfs pull`"),
        ("tokenizer.json", "{}".encode("utf-16"), "tokenizer.json is UTF-16 and not UTF-8"),
        ("tokenizer.json", b"[" * 100_000, "tokenizer.json has lists or objects more than 100 dee"),
        ("tokenizer.json", b"1" * 6000, "tokenizer.json holds a whole number of over 4,000 digits"),
        ("tokenizer.json", b"", "tokenizer.json is not JSON"),
        ("tokenizer.json.gz", b"x", r"\(tokenizer.json.gz is there: unpack it\)"),
        (
            "tokenizer.json",
            None,
            r"\(tokenizer.json is a link to .*, which is not there: copy with",
        ),
    ],
)
def test_files_of_a_tokenizer_in_odd_states(name, content, message, tmp_path):
    if content is None:
        (tmp_path / name).symlink_to(tmp_path / "gone")
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        tokenizers.load(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_mark_and_blank_lines_around_a_tokenizer_do_no_harm(tmp_path):
    path = data_fixtures.write_spec(tmp_path, data_fixtures.byte_level_spec())
    before = tokenizers.load(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n\n")
    after = tokenizers.load(path)
    assert after.digest == before.digest and after.encode("a b") == before.encode("a b")
