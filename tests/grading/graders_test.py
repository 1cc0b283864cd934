"""The graders against values worked out by hand from the rules, and against answers that cheat."""

import json
import math

import hypothesis
import hypothesis.strategies as st
import pytest

from qlog.data import finqa_program
from qlog.grading import graders
from qlog.grading.graders import contains, exact_match, finqa_numeric, squad_em, squad_f1

TEXT_GRADERS = [exact_match, contains, squad_em, squad_f1]

# ---- Answers that are none ----

NO_ANSWERS = [
    "",
    " \n\t ",
    "\u00a0\u2003",
    "</think>",
    "</think> Paris",
    "Paris</think></think>",
    "<think>Paris</think>Paris",
    "Paris <|im_end|>",
    "<THINK> Paris",
    "Paris</s>",
    "Paris<｜end▁of▁sentence｜>",
    "<｜User｜>Paris",
    "Paris " * 1000,
    "Paris" + " " * 5000,
]


@pytest.mark.parametrize("grader", TEXT_GRADERS)
@pytest.mark.parametrize("answer", NO_ANSWERS)
def test_no_answer_scores_nothing(grader, answer):
    assert grader(answer, "Paris") == 0.0
    assert grader(answer, answer) == 0.0  # even where the gold string itself is broken
    assert grader("Paris", "Paris") == 1.0


@pytest.mark.parametrize("answer", ["", "  ", "</think>34.7%", "<think>34.7%", "34.7% " * 900])
def test_no_answer_is_no_number(answer):
    assert finqa_numeric(answer, 0.347) == 0.0
    assert finqa_numeric("34.7%", 0.347) == 1.0


@pytest.mark.parametrize("grader", TEXT_GRADERS)
def test_empty_gold_strings_match_nothing(grader):
    for golds in ("", " ", [], ["", " "]):
        assert grader("Paris", golds) == 0.0
        assert grader("", golds) == 0.0
    assert grader("Paris", ["", "Paris"]) == 1.0


@pytest.mark.parametrize("grader", TEXT_GRADERS)
@pytest.mark.parametrize(
    "piece",
    [
        "a",
        "1",
        "1,",
        "(",
        "-$ ",
        "1,111",
        "<|",
        "\\n",
        "\u0316\u0301",
        "the ",
        "%",
        ".",
        "\U0001f600",
        "<think",
        "=",
        "\x00",
    ],
)
def test_huge_and_strange_inputs_are_graded_at_once(grader, piece):
    # Ten million characters: anything slower than linear would not come back.
    assert grader(piece * (10_000_000 // len(piece)), "Paris") == 0.0
    longest = (piece * graders.MAX_CHARS)[: graders.MAX_CHARS]
    assert grader(longest + "x", "Paris") == grader(longest[:-1] + "x", "Paris") == 0.0
    assert finqa_numeric(longest[:-1] + "x", 0.5) in (0.0, 1.0)
    assert grader("Paris", piece * 100_000) == 0.0


@hypothesis.given(st.text(max_size=200), st.text(max_size=50))
@hypothesis.settings(deadline=None, max_examples=200)
def test_any_text_gets_a_score(answer, gold):
    for grader in TEXT_GRADERS:
        assert 0.0 <= grader(answer, gold) <= 1.0
    assert finqa_numeric(answer, gold) in (0.0, 1.0)
    assert finqa_numeric(answer, 0.5, gold=gold) in (0.0, 1.0)
    assert isinstance(graders.vote_key(answer), str)


# ---- Exact match, the reward ----


@pytest.mark.parametrize(
    "answer, score",
    [
        ("34.7%", 1),
        (" 34.7%\n", 1),
        ("34.70%", 0),
        ("34.7", 0),
        ("34.7%.", 0),
        ("= 34.7%", 0),
    ],
)
def test_exact_match(answer, score):
    assert exact_match(answer, "34.7%") == score


def test_exact_match_is_exact():
    assert exact_match("new york", "New York") == 0.0
    assert exact_match("New  York", "New York") == 1.0
    assert exact_match("NY", ["New York", "NY"]) == 1.0


# ---- Relaxed substring, the evaluation ----


@pytest.mark.parametrize(
    "answer, golds, score",
    [
        ("The answer is Paris.", "Paris", 1),
        ("**paris**", "Paris", 1),
        ("Parisian", "Paris", 0),
        ("comparison", "Paris", 0),
        ("United States", "the United States", 1),
        ("the united states of america", "United States", 1),
        ("A. P. J. Abdul Kalam", "A.P.J. Abdul Kalam", 1),
        ("Hudson\u2019s Bay", "Hudson's Bay", 1),
        ("Hewlett Packard", ["HP Inc", "Hewlett-Packard"], 1),
        ("York New", "New York", 0),
        ("grade A", "A", 1),
        ("Vitamin C", "Vitamin A", 0),
        ("Alu\u0302", "Al\u00fb", 1),  # decomposed and composed
        ("Alu", "Al\u00fb", 0),
        ("\uff30aris", "Paris", 1),  # full-width letter
        ("東京 です", "東京", 1),
        ("STRASSE", "stra\u00dfe", 1),
        ("?!", "?!", 1),
        ("what?!", "?!", 0),
    ],
)
def test_contains_words(answer, golds, score):
    assert contains(answer, golds) == score


@pytest.mark.parametrize(
    "answer, gold, score",
    [
        ("407", "407", 1),
        ("about $ 407 million", "407", 1),
        ("1407", "407", 0),
        ("407.5", "407", 0),
        ("40.7", "407", 0),
        ("-407", "407", 0),
        ("407", "-407", 0),
        ("\u2212407", "-407", 1),
        ("-$407", "-407", 1),
        ("from 300 to 407", "407", 1),
        ("300-407", "407", 1),
        ("1,149,309", "1149309", 1),
        ("$103.7 million", "$ 103.7 million", 1),
        ("3.47%", "34.7%", 0),
        ("34.7 %", "34.7%", 1),
        ("34.70 percent", "34.7%", 1),
        ("34.7", "34.7%", 0),
        ("34.7%", "34.7", 1),
        (".5", "0.50", 1),
        ("127.4", "127.40", 1),
        ("4.9", "4.9\\\\n", 1),
        ("11,736,600", "$ 11736600.00 \\\\n", 1),
        ("10th", "10", 0),
        ("0", "-0.0", 1),
    ],
)
def test_contains_numbers(answer, gold, score):
    assert contains(answer, gold) == score


@pytest.mark.parametrize(
    "answer, yes, no",
    [
        ("yes", 1, 0),
        ("No.", 0, 1),
        ("Yes, it was.", 1, 0),
        ("yes no", 0, 0),
        ("no yes", 0, 0),
        ("Yes and no", 0, 0),
        ("yes/no", 0, 0),
        ("not known", 0, 0),
        ("nothing", 0, 0),
        ("yesterday", 0, 0),
        ("I do know", 0, 0),
    ],
)
def test_contains_yes_and_no(answer, yes, no):
    assert contains(answer, "yes") == yes and contains(answer, "no") == no


def test_contains_no_copied_context():
    sentence = "The Whitworth was completed in 1908 and stands near the park that it is named after"
    source = f"Many museums. {sentence}. It is run by the university. " + "Other text. " * 30
    assert contains("It was 1908", "1908", source=source) == 1.0
    assert contains("completed in 1908", "1908", source=source) == 1.0  # a copied phrase may answer
    assert contains(sentence, "1908", source=source) == 0.0
    assert contains(sentence.upper() + "!", "1908", source=source) == 0.0
    assert contains(sentence, sentence, source=source) == 1.0  # unless the gold is that long itself
    paragraph = source[:400]
    assert len(paragraph.split()) > graders.MAX_EXTRA_WORDS + 1
    assert contains(paragraph, "1908") == 0.0  # too long, whatever its source
    assert contains(" ".join(["so"] * graders.MAX_EXTRA_WORDS) + " 1908", "1908") == 1.0


word = st.sampled_from(["red", "Lisbon", "12", "-3.5", "4%", "the", "no", "O'Neil", "été"])


@hypothesis.given(
    st.lists(word, max_size=8), st.lists(word, min_size=1, max_size=4), st.lists(word, max_size=8)
)
@hypothesis.settings(deadline=None)
def test_contains_finds_the_gold_wherever_it_stands(before, gold, after):
    if [w for w in gold if w != "the"] in ([], ["no"]):
        return  # tested above
    assert contains(" ".join(before + gold + after), " ".join(gold)) == 1.0


@pytest.mark.parametrize(
    "one, other",
    [
        ("The Paris", "paris."),
        ("1,200", "$ 1200.00"),
        ("34.70%", "34.7 percent"),
        ("Yes", "yes!"),
    ],
)
def test_votes_are_normalised(one, other):
    assert graders.vote_key(one) == graders.vote_key(other) != ""


@pytest.mark.parametrize("answer", NO_ANSWERS + ["...", "$"])
def test_no_answer_casts_no_vote(answer):
    assert graders.vote_key(answer) == ""


# ---- SQuAD's EM and F1, by hand from the official scripts' definitions ----


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("an apple a day", "apple day"),
        ("A.P.J. Abdul Kalam", "apj abdul kalam"),
        ("Hewlett-Packard", "hewlettpackard"),
        ("  two\n spaces ", "two spaces"),
        ("the", ""),
        ("theatre", "theatre"),
        ("$34.7%", "347"),
        ("it\u2019s", "it\u2019s"),  # only ASCII punctuation goes
    ],
)
def test_squad_normal_form(text, normal):
    assert graders.squad_normalise(text) == normal


@pytest.mark.parametrize(
    "answer, gold, em, f1",
    [
        ("the Eiffel Tower", "Eiffel tower", 1, 1.0),
        ("Eiffel Tower in Paris", "Eiffel Tower", 0, 2 * (2 / 4) * 1 / (2 / 4 + 1)),
        ("Tower", "Eiffel Tower", 0, 2 * 1 * 0.5 / 1.5),
        ("Paris Paris Paris", "Paris Texas", 0, 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
        ("tower Eiffel", "Eiffel tower", 0, 1.0),
        ("London", "Eiffel Tower", 0, 0.0),
        ("yes", "yes", 1, 1.0),
        ("Yes.", "yes", 1, 1.0),
        ("yes it is", "yes", 0, 0.0),  # HotPotQA: where one side is yes or no, only equality scores
        ("no", "no man's land", 0, 0.0),
        ("noanswer", "the noanswer club", 0, 0.0),
    ],
)
def test_squad_em_and_f1(answer, gold, em, f1):
    assert squad_em(answer, gold) == em
    assert squad_f1(answer, gold) == pytest.approx(f1)


def test_musique_has_no_closed_answers_and_takes_the_best_alias():
    assert squad_f1("no", "no man's land", closed=()) == pytest.approx(2 * 1 * (1 / 3) / (4 / 3))
    golds = ["Pittsburgh Pirates", "Orioles", "Baltimore Orioles", "Mets"]
    assert squad_em("the Orioles", golds) == 1.0
    assert squad_f1("New York Mets", golds) == pytest.approx(2 * (1 / 3) * 1 / (4 / 3))
    assert squad_f1("New York Mets", golds[:1]) == 0.0
    # Normal forms without a word: equal for MuSiQue's script, never for HotPotQA's.
    assert squad_em("The", "a.") == 1.0
    assert squad_f1("The", "a.", closed=()) == 1.0 and squad_f1("The", "a.") == 0.0
    assert squad_f1("The", "Mets", closed=()) == squad_f1("Mets", "The", closed=()) == 0.0


@hypothesis.given(st.text("ab the.no", max_size=12), st.text("ab the.no", max_size=12))
@hypothesis.settings(deadline=None)
def test_f1_is_symmetric_and_one_for_equal_bags(one, other):
    if not one.strip() or not other.strip():
        return
    assert squad_f1(one, other) == squad_f1(other, one)
    bags = [sorted(graders.squad_normalise(text).split()) for text in (one, other)]
    assert (squad_f1(one, other, closed=()) == 1.0) == (bags[0] == bags[1])


# ---- FinQA's numbers ----


@pytest.mark.parametrize(
    "answer, target, gold, score",
    [
        # percent and fraction
        ("34.7%", 0.34719, "34.7%", 1),
        ("34.72%", 0.34719, "34.7%", 1),
        ("0.347", 0.34719, "34.7%", 1),
        ("0.34719", 0.34719, "34.7%", 1),
        ("34.7", 0.34719, "34.7%", 1),  # the question asks for percent, as the gold string shows
        ("34.7", 0.34719, "", 0),
        ("34.7 percent", 0.34719, "", 1),
        ("37.81%", 37.81139, "37.81%", 1),  # the program multiplies by 100
        ("66.94%", 0.6694, "66.94", 1),
        ("66.94", 0.6694, "66.94", 1),
        ("3.47%", 0.34719, "34.7%", 0),
        ("407%", 407.0, "407", 0),
        ("3/4", 0.75, "0.75", 1),
        ("114400/329500", 0.34719, "34.7%", 1),
        ("1/3", 0.34719, "34.7%", 0),
        ("1/0", 0.5, "", 0),
        # rounding: as written, and within 5%
        ("35%", 0.34719, "34.7%", 1),
        ("34%", 0.34719, "34.7%", 1),  # truncated
        ("36%", 0.34719, "34.7%", 0),
        ("8953", 8953.33333, "8953", 1),
        ("8954", 8953.33333, "8953", 0),
        ("10861", 10863.0, "10861", 0),  # the annotator's string is wrong, the program right
        ("1", 1.13451, "1.14", 0),
        ("0", 0.34719, "", 0),
        ("0%", 0.00563, "0.6%", 0),
        ("0%", 0.0, "0%", 1),
        ("0.347192", 0.34719, "", 1),
        ("0.3472", 0.34719, "", 1),
        ("0.3473", 0.34719, "", 0),
        ("0.00001", 1e-05, "", 1),
        # sign
        ("-2.4", -2.4, "-2.4", 1),
        ("\u22122.4", -2.4, "-2.4", 1),
        ("(2.4)", -2.4, "-2.4", 1),
        ("($ 2.4)", -2.4, "-2.4", 1),
        ("(7.8%)", -0.07838, "-7.8%", 1),
        ("-$2.4", -2.4, "-2.4", 1),
        ("$ -2.4", -2.4, "-2.4", 1),
        ("2.4", -2.4, "-2.4", 0),
        ("-2.4", 2.4, "2.4", 0),
        # units, thousands, where the number stands
        ("$ 103.7 million", 103.7, "$ 103.7 million", 1),
        ("$ 103.7 million", 103700000.0, "", 1),
        ("$ 386.8 million", 386797189.66, "", 1),
        ("103.7 billion", 103700000.0, "", 0),
        ("122,604,300", 122604300.0, "122604300", 1),
        ("122,604,300.00 dollars", 122604300.0, "", 1),
        ("407 in 2008", 407.0, "407", 1),
        ("In 2008, it was 407.", 407.0, "407", 1),
        ("2008", 2008.0, "2008", 1),
        ("482 - 75 = 407", 407.0, "407", 1),
        ("407 = 482 - 75", 407.0, "407", 0),  # what follows the last "=" counts
        ("**407**", 407.0, "407", 1),
        ("\\boxed{34.7\\%}", 0.34719, "34.7%", 1),
        ("between 2008-2010: 12", 12.0, "12", 1),
        ("Q3", 3.0, "3", 0),
        # listing candidates gives one try
        ("1 2 3 407 5", 407.0, "407", 0),
        # no numbers
        ("nan", math.nan, "", 0),
        ("NaN", 0.5, "", 0),
        ("inf", math.inf, "", 0),
        ("1" * 400, 1e308, "", 0),
        ("nothing", 407.0, "407", 0),
        ("407", "n/a", "", 0),
        # yes and no
        ("Yes.", "yes", "yes", 1),
        ("no", "yes", "yes", 0),
        ("yes no", "yes", "yes", 0),
        # exe_ans as a string
        ("34.7%", "0.34719", "34.7%", 1),
        ("407", "407.0", "407", 1),
    ],
)
def test_finqa_numeric(answer, target, gold, score):
    assert finqa_numeric(answer, target, gold=gold) == score


# ---- The decisions of grading/README.md, one or more rows for each ----


@pytest.mark.parametrize(
    "answer, gold, score",
    [
        ("9{,}500", "9,500", 1),
        ("9{,}500", "500", 0),
        ("9\\,500", "9,500", 1),
        ("9\\,500", "500", 0),
        ("9\u202f500", "9,500", 1),
        ("9\u202f500", "500", 0),
        ("9\xa0500", "9,500", 1),
        ("9\xa0500", "500", 0),
        ("9\u2019500", "9500", 1),
        ("- 5", "-5", 1),
        ("- 5", "5", 0),
        ("(2.4)", "-2.4", 1),
        ("It is - 5", "-5", 1),
        ("3 - 5", "5", 1),
        ("3 - 5", "-5", 0),
        ("(1995)", "1995", 1),
        ("the ratio (2.4)", "2.4", 1),
        ("$(2.4) million", "-2.4", 1),
        ("(5%)", "-5%", 1),
        ("$1.2 million", "1.2", 1),
        ("$1.2 million", "1.2 million", 1),
        ("1,200,000", "1.2 million", 1),
        ("$1.2M", "1.2 million", 1),
        ("1.2bn", "1.2 billion", 1),
        ("1.2 billion", "$ 1.2 million", 0),
        ("1.2 million", "1,200,000", 1),
        ("$1.2M", "1.2", 1),
        ("221b Baker Street", "221B Baker Street", 1),
        ("4k", "4K", 1),
        ("5m", "5 million", 0),
        ("407M", "407 million", 0),
        ("C", "C++", 0),
        ("C++", "C", 0),
        ("C++ is it", "C++", 1),
        ("C#", "C", 0),
        ("A+", "A", 0),
        ("No. 5", "no", 0),
        ("No.", "no", 1),
        ("not yes", "yes", 0),
        ("not yes", "no", 0),
        ("no. 5 and no", "no", 1),
        ("No, 5 were", "no", 1),
        ("का", "की", 0),
        ("का", "का", 1),
        ("x\u0302", "x", 0),
        ("İstanbul", "istanbul", 1),
        ("İstanbul", "İSTANBUL", 1),
        ("US", "U.S.", 1),
        ("the U.S.", "US", 1),
        ("A. P. J. Abdul Kalam", "A.P.J. Abdul Kalam", 1),
        ("APJ Abdul Kalam", "A. P. J. Abdul Kalam", 1),
        ("Washington, D.C.", "Washington DC", 1),
        ("5 p.m.", "5 pm", 1),
        ("J. R. R. Tolkien", "J.R.R. Tolkien", 1),
        ("The grade is A. I think", "A", 1),
        ("Beyonce", "Beyoncé", 0),
        ("Cafe\u0301", "Café", 1),
        ("\\frac{1}{2}", "1/2", 1),
        ("1.5e3", "1500", 1),
        ("1.5 \\times 10^3", "1,500", 1),
        ("\\boxed{407}", "407", 1),
        ("\\boxed{\\text{Paris}}", "Paris", 1),
        ("10²", "102", 0),
        ("½", "1/2", 1),
        ("2½", "2 1/2", 1),
        (
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
            "\u0645\u06cc\u062e\u0648\u0627\u0647\u0645",
            1,
        ),
        ("34.7% decrease", "-34.7%", 0),
        ("from 2008\u20132010", "2010", 1),
        ("Boeing \u2013 5 planes", "5", 1),
        ("St. John's", "St Johns", 0),
    ],
)
def test_decisions_of_contains(answer, gold, score):
    assert contains(answer, gold) == score


@pytest.mark.parametrize(
    "answer, target, gold, score",
    [
        ("$1.2 million", 1.2, "1.2", 1),
        ("1,200,000", 1.2, "1.2", 0),
        ("1,200,000", 1.2, "$ 1.2 million", 1),
        ("$1.2M", 1.2, "$ 1.2 million", 1),
        ("1.2bn", 1200000000.0, "", 1),
        ("1.2 billion", 1.2, "$ 1.2 million", 0),
        ("1.2 million", 1.2, "$ 1.2 million", 1),
        ("$1200 thousand", 1.2, "$1.2 million", 1),
        ("1.2", 1.2, "$1.2 million", 1),
        ("407M", 407000000.0, "", 1),
        ("103.7", 103700000.0, "$ 103.7 million", 0),
        ("0.1037 billion", 103700000.0, "$ 103.7 million", 1),
        ("\\frac{1}{2}", 0.5, "", 1),
        ("-\\frac{1}{2}", -0.5, "", 1),
        ("1.5e3", 1500, "", 1),
        ("1.5 \\times 10^{3}", 1500, "", 1),
        ("\\boxed{407} which is 3 more", 407, "", 1),
        ("It rose by 34.7% (from 100 to 134.7)", 0.347, "34.7%", 1),
        ("34.7% decrease", -0.347, "-34.7%", 1),
        ("34.7% decrease", 0.347, "34.7%", 1),
        ("34.7% increase", -0.347, "-34.7%", 0),
        ("34.7% (0.347)", 0.347, "", 1),
        ("(2.4)", -2.4, "", 1),
        ("loss of $(2.4) million in 2008", -2.4, "", 1),
        ("- 5", -5, "", 1),
        ("it was - 5", -5, "", 1),
        ("9{,}500", 9500, "", 1),
        ("9\xa0500", 9500, "", 1),
        ("$2.4 million (about)", 2.4, "", 1),
        ("net loss of 2.4", -2.4, "", 1),
        ("did not decrease, it rose 5", -5, "", 0),
        ("2.4 million (2.39)", 2.4, "", 1),
    ],
)
def test_decisions_of_finqa_numeric(answer, target, gold, score):
    assert finqa_numeric(answer, target, gold=gold) == score


@pytest.mark.parametrize("grader", [*TEXT_GRADERS, graders.substring])
def test_both_spellings_of_an_accent_are_one(grader):
    """Tokenizers make NFC of what a file may have as NFD: without this no answer could be right."""
    composed, decomposed = "Caf\u00e9 No\u00ebl", "Cafe\u0301 Noe\u0308l"
    assert grader(composed, decomposed) == grader(decomposed, composed) == 1
    assert grader("Cafe Noel", composed) == 0


# ---- By name ----


def test_graders_have_names():
    assert graders.by_name("exact_match") is exact_match
    with pytest.raises(ValueError, match="'exact' is not a grader: use one of exact_match"):
        graders.by_name("exact")


# ---- Real records ----


def finqa_records(shared):
    for split in ("train", "dev"):
        yield from json.loads((shared / "data" / "finqa" / f"{split}.json").read_text())


def test_real_finqa_answers(shared):
    agreeing = total = 0
    for record in finqa_records(shared):
        qa = record["qa"]
        target, gold = qa["exe_ans"], qa["answer"]
        executed = finqa_program.run(qa["program"], record["table"])[-1].value
        assert finqa_numeric(str(executed), target) == 1.0
        assert finqa_numeric(finqa_program.number_text(executed), target, gold=gold) == 1.0
        if isinstance(target, float):
            assert finqa_numeric(f"{target:,.5f}", target) == 1.0
            assert finqa_numeric(f"{100 * target:,.3f}%", target) == 1.0
            assert finqa_numeric(f"$ {target:,.5f} million", target) == 1.0
            assert finqa_numeric(str(-target), target) == (target == 0.0)
            assert finqa_numeric(str(10 * target), target) == (target == 0.0)
        if gold.strip():
            assert contains(f"The answer is {gold}.", gold) == 1.0
            total += 1
            agreeing += finqa_numeric(gold, target, gold=gold)
    # About one string in twelve disagrees with the program, coarse rounding apart.
    assert 0.88 < agreeing / total < 0.95


def test_real_hotpotqa_and_musique_answers(shared):
    folder = shared / "data"
    hotpot = json.loads((folder / "hotpotqa" / "hotpot_dev_distractor_v1.json").read_text())
    for record in hotpot:
        gold = record["answer"]
        for grader in TEXT_GRADERS:
            assert grader(gold, gold) == 1.0
        paragraphs = ["".join(sentences) for _, sentences in record["context"]]
        assert contains("\n".join(paragraphs), gold) == 0.0
        source = "\n\n".join(paragraphs)
        limit = graders.MAX_COPIED_WORDS + len(graders.words(gold))
        copies = [p for p in paragraphs if len(graders.words(p)) > limit]
        assert copies and not any(contains(copy, gold, source=source) for copy in copies)
    lines = (folder / "musique" / "musique_ans_v1.0_dev.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        golds = [record["answer"], *record["answer_aliases"]]
        for gold in golds:
            for grader in TEXT_GRADERS:
                assert grader(gold, golds) == 1.0, gold


def test_the_papers_rule_is_the_literal_one():
    """Letter by letter, where `contains` asks for whole words; and nothing is no answer."""
    assert graders.substring("not known", "no") == 1 and graders.contains("not known", "no") == 0
    assert graders.substring("1407", ["x", "407"]) == 1
    assert graders.substring("The Answer", "answer") == 0
    assert graders.substring("anything", ["", "  "]) == 0
    assert graders.substring("", "no") == 0
    assert graders.substring("42</think>", "42") == 1
