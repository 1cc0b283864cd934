"""Graders: does a generated answer agree with the gold one? Pure Python, linear time, no eval.

A grader is a function (answer, golds) -> float in [0, 1]. `answer` is the text after the
thinking-end token, `golds` one gold string or several (the answer and its aliases; the best
counts). Text that is no answer scores 0 with every grader but `substring`: empty or blank text,
more than `MAX_CHARS` characters, and text with control tags such as `</think>` or `<|im_end|>`.
Only `finqa_numeric` takes something else than gold strings: FinQA's executed answer.

| grader                 | use                | rule                                               |
|------------------------|--------------------|----------------------------------------------------|
| `exact_match`          | reward in training | the gold string itself, up to white space          |
| `contains`             | p@k, m@k           | the gold answer occurs, as whole words and numbers |
| `substring`            | the paper's tables | the gold string is a substring of the answer       |
| `squad_em`, `squad_f1` | metrics em, f1     | as the official scripts of HotPotQA and MuSiQue    |
| `finqa_numeric`        | metrics numeric/   | the number is FinQA's executed answer, at the      |
|                        |                    | precision written                                  |

A grader of your own needs no line here: a config names its function (scorers.py). One that should
have a name is a function here and a line in `GRADERS`.
"""

import collections
import decimal
import functools
import math
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

Grade = Callable[..., float]  # (answer: str, golds: str | Sequence[str], **options) -> [0, 1]

MAX_CHARS = 4096  # 128 answer tokens are about 600 characters: a longer text is no answer
MAX_EXTRA_WORDS = 50  # `contains`: words beyond the gold; a copied paragraph has more
MAX_COPIED_WORDS = 12  # `contains`: words beyond the gold that may be copied from the source

_TAGS = re.compile(
    r"</?think>|<\|[a-z_]{1,40}\|>|</?s>|<(?:eos|bos|pad|start_of_turn|end_of_turn)>"
    r"|<｜[^<>｜]{1,40}｜>",  # DeepSeek's have fullwidth bars: <｜end▁of▁sentence｜>
    re.IGNORECASE,
)
_DASHES = {ord(dash): "-" for dash in "\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d"}
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?!\w)"
# A minus belongs to a number unless it joins two words ("2008-2010"); currency signs are not read.
_TOKENS = re.compile(rf"(?:(?<![\w)%])-(?:\$\s?)?)?{_NUMBER}|%|\w+")
_NUMBER_TOKEN = re.compile(rf"-?\$?\s?{_NUMBER}\Z")


def _golds(golds: str | Sequence[str]) -> list[str]:
    """The gold strings that an answer can match: not blank, not longer than an answer may be."""
    golds = (golds,) if isinstance(golds, str) else golds
    return [gold for gold in golds if gold.strip() and len(gold) <= MAX_CHARS]


def is_answer(text: str) -> bool:
    """Whether `text` may be graded: not blank, not longer than MAX_CHARS, no control tag in it."""
    return len(text) <= MAX_CHARS and bool(text.strip()) and not _TAGS.search(text)


def _best(score: Callable[[str, str], float], answer: str, golds: str | Sequence[str]) -> float:
    """The best score over the gold strings; 0 for text that is no answer, and for empty golds."""
    if not is_answer(answer):
        return 0.0
    return max((float(score(answer, gold)) for gold in _golds(golds)), default=0.0)


def exact_match(answer: str, golds: str | Sequence[str]) -> float:
    """1 if the answer is the gold string, case included; runs of white space count as one space.

    The reward of the estimators that sample answers (GRPO, RLOO, MaxRL, STaR).
    """
    return _best(lambda a, g: a.split() == g.split(), answer, golds)


def substring(answer: str, golds: str | Sequence[str]) -> float:
    """1 if a gold string is a substring of the answer, letter by letter: the paper's literal rule.

    No word boundaries, no other spelling, no limit of length: "no" is in "not known". For tables
    that stand beside the paper's. `contains` is the rule to trust. Blank golds match nothing.
    """
    return float(any(gold.strip() in answer for gold in _golds(golds)))


def _number_token(token: str) -> str:
    """A number in its one spelling: "-$1,200.50" is "-1200.5", ".50" is "0.5"."""
    sign = "-" if token[0] == "-" else ""
    digits = token.lstrip("-$ ").replace(",", "")
    # 1.50 and 1.5 are one number, and so are .5 and 0.5; zero has no sign.
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
        digits = "0" + digits if digits.startswith(".") else digits
    return sign + (digits or "0") if digits.strip("0.") else "0"


def _without_escaped_newlines(text: str) -> str:
    """Drops the literal backslash-n tails that some of FinQA's gold strings carry."""
    text = text.rstrip()
    while text.endswith("\\n"):
        text = text[:-1].rstrip("\\").rstrip()
    return text


def words(text: str) -> list[str]:
    """Lower-case words and numbers of a text, punctuation and currency signs dropped.

    Unicode is brought to NFKC and case-folded. Numbers keep sign and point and lose thousands
    separators and trailing zeros; "%" is a word, and "percent" is read as "%".
    """
    text = unicodedata.normalize("NFKC", text.translate(_DASHES)).casefold()
    text = re.sub(r"\bper ?cent\b", "%", _without_escaped_newlines(text))
    tokens = _TOKENS.findall(text)
    return [_number_token(t) if _NUMBER_TOKEN.match(t) else t for t in tokens]


@functools.lru_cache(maxsize=64)
def _joined(text: str) -> str:
    return " " + " ".join(words(text)) + " "


def _without_article(text_words: list[str]) -> list[str]:
    """Drops a leading article, unless it is all there is ("A" may be an answer)."""
    has_article = len(text_words) > 1 and text_words[0] in ("a", "an", "the")
    return text_words[1:] if has_article else text_words


def contains(answer: str, golds: str | Sequence[str], *, source: str = "") -> float:
    """Relaxed substring match, the paper's evaluation: 1 if a gold answer occurs in the answer.

    It must occur as a run of whole `words` (a leading article of the gold is not required): "no"
    is not in "not known", 407 is not in 1407 or 407.5, and 3.47% is not 34.7%. An answer scores 0
    if it
      * has both "yes" and "no" where the gold is one of them,
      * has over MAX_EXTRA_WORDS words more than the gold (a copied paragraph), or
      * is copied verbatim from `source` with over MAX_COPIED_WORDS words more than the gold.

    Args:
      answer: the text after the thinking-end token.
      golds: the gold answer, or several.
      source: the prompt's text; "" looks for no copies.
    """
    if not is_answer(answer):
        return 0.0
    answer_words = words(answer)
    text = " " + " ".join(answer_words) + " "
    for gold in _golds(golds):
        gold_words = _without_article(words(gold))
        extra = len(answer_words) - len(gold_words)
        if not gold_words:  # nothing but punctuation
            found = answer.strip() == gold.strip()
        elif gold_words in (["yes"], ["no"]):
            found = {"yes", "no"} & set(answer_words) == set(gold_words)
        else:  # with spaces at both ends a substring is a run of whole words
            found = " " + " ".join(gold_words) + " " in text
        if found and extra <= MAX_EXTRA_WORDS:
            return float(not is_copy(answer, source, MAX_COPIED_WORDS + len(gold_words)))
    return 0.0


def is_copy(answer: str, source: str, allowed: int = MAX_COPIED_WORDS) -> bool:
    """Whether the whole answer stands verbatim in `source` and has more than `allowed` words."""
    answer_words = words(answer) if source else []
    return len(answer_words) > allowed and f" {' '.join(answer_words)} " in _joined(source)


def vote_key(answer: str) -> str:
    """The normal form that a majority vote counts: `words` without a leading article.

    "" for text that is no answer: it casts no vote.
    """
    return " ".join(_without_article(words(answer))) if is_answer(answer) else ""


# ---- SQuAD's exact match and F1 ----

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def squad_normalise(text: str) -> str:
    """The scripts' normal form: lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_em(answer: str, golds: str | Sequence[str]) -> float:
    """Equality of the SQuAD normal forms, the best over `golds` (answer and aliases)."""
    return _best(lambda a, g: squad_normalise(a) == squad_normalise(g), answer, golds)


def squad_f1(
    answer: str, golds: str | Sequence[str], *, closed: Sequence[str] = ("yes", "no", "noanswer")
) -> float:
    """F1 between the bags of words of the SQuAD normal forms, the best over `golds`.

    Args:
      closed: HotPotQA's special case: where one side is one of these, only equality scores, and
        normal forms without a word never do. MuSiQue's script has no such case and counts two
        normal forms without a word as equal: pass ().
    """

    def f1(a: str, g: str) -> float:
        a, g = squad_normalise(a), squad_normalise(g)
        # HotPotQA: "yes" against "yes, it is" scores nothing, although they share a word.
        if a != g and (a in closed or g in closed):
            return 0.0
        a_words, g_words = a.split(), g.split()
        same = sum((collections.Counter(a_words) & collections.Counter(g_words)).values())
        if not a_words and not g_words:
            return float(not closed)
        return 2 * same / (len(a_words) + len(g_words))

    return _best(f1, answer, golds)


# ---- FinQA's numbers ----

_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_YEAR = re.compile(r"\s*(?:19|20)\d\d\s*\Z")
_QUANTITY = re.compile(
    r"(?P<open>\(\s?(?:\$\s?)?)?(?P<sign>(?<![\w)%])-(?:\$\s?)?)?"
    r"(?<!\w)(?P<number>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?!\w|[.,]\d)"
    r"(?:\s?/\s?(?P<over>\d{1,20})(?![\w/]|[.,]\d))?"
    r"(?P<close>\s?%?\s?\))?"
    rf"\s?(?P<percent>%)?\s?(?P<scale>(?:{'|'.join(_SCALES)})s?\b)?"
)


def _quantity(text: str) -> re.Match | None:
    """The number that an answer states: the last one after the last "=", bare years skipped."""
    text = unicodedata.normalize("NFKC", text.translate(_DASHES)).casefold()
    text = re.sub(r"\\(?=[%$])|\*\*", "", text)  # LaTeX's escapes, Markdown's bold
    text = re.sub(r"\bper ?cent\b", "%", text.rsplit("=", 1)[-1])
    # Longer runs of digits are noise, not figures. A year is taken where nothing else is left.
    found = [m for m in _QUANTITY.finditer(text) if len(m["number"]) <= 40]
    return ([m for m in found if not _YEAR.match(m[0])] or found or [None])[-1]


def _agrees(value: decimal.Decimal, unit: decimal.Decimal, target: decimal.Decimal) -> bool:
    """Whether `value`, written down to `unit`, is `target` rounded or cut there."""
    error = abs(value - target)
    # FinQA's executed answers have 5 decimals.
    if error <= decimal.Decimal("0.000005"):
        return True
    if not value or (value < 0) != (target < 0):
        return False
    # Rounded, the value lies at most half a unit from the target, on either side. Cut, it lies less
    # than a unit below it. The 5% keep "0%" from being right for everything small.
    cut = abs(target) - abs(value)
    return 20 * error <= abs(target) and -unit / 2 <= cut < unit


def finqa_numeric(answer: str, target: float | int | str, *, gold: str = "") -> float:
    """1 if the answer states FinQA's executed answer `exe_ans`: 5 decimals, or "yes" or "no".

    The official script executes programs. Free text needs another rule:
      * The number is the last one after the last "="; bare years (1900-2099) are skipped when there
        is another number. Thousands separators and currency signs are skipped; "-", a minus
        sign proper and accounting brackets "(2.4)" are negative. The sign must agree.
      * It must be the target rounded or truncated at the decimals written (34.7% for 0.34719) and
        within 5% of it, so that "0%" is not right for everything small; or equal at 5 decimals.
      * n% is n/100. Where the annotator's answer `gold` shows that percent is meant (it has "%", or
        is 100 times the target), n and n% both mean n/100 or n, since FinQA's programs do both.
      * "n million" (thousand, billion, trillion) is n or n * 10^6: questions fix the unit in words.
        "n/m" is a fraction, and must be equal to 5 decimals.

    Args:
      target: exe_ans, as a number or as its string.
      gold: the annotator's string (qa.answer), read only to see whether percent is meant.
    """
    if not is_answer(answer):
        return 0.0
    if isinstance(target, str) and target.strip().lower() in ("yes", "no"):
        return contains(answer, target)
    value = _target(target)
    match = _quantity(answer)
    if value is None or match is None or not int(match["over"] or 1):
        return 0.0
    number = decimal.Decimal(match["number"].replace(",", ""))
    unit = decimal.Decimal(1).scaleb(int(number.as_tuple().exponent))  # of its last digit
    if match["over"]:  # a fraction is exact
        number, unit = number / int(match["over"]), decimal.Decimal(0)
    if match["sign"] or (match["open"] and match["close"]):
        number = -number
    # Which powers of ten may the number be multiplied by? Any reading that agrees counts.
    is_percent = bool(match["percent"] or "%" in (match["close"] or ""))
    powers = [-2] if is_percent else [0]
    if _means_percent(gold, value):
        powers = [0, -2]
    if match["scale"]:
        powers = powers + [p + _SCALES[match["scale"].rstrip("s")] for p in powers]
    return float(any(_agrees(number.scaleb(p), unit.scaleb(p), value) for p in powers))


def _target(target: float | int | str) -> decimal.Decimal | None:
    """The gold number, or None where there is none (text, NaN, infinities)."""
    try:
        number = float(target)
    except ValueError:
        return None
    return decimal.Decimal(repr(number)) if math.isfinite(number) else None


def _means_percent(gold: str, value: decimal.Decimal) -> bool:
    """Whether the annotator's string means percent: it has "%", or is about 100 times the value."""
    if "%" in gold or not gold.strip():
        return "%" in gold
    # Some gold strings leave the sign out: 34.7 for 0.34719. Rounding needs the room of 1%.
    stated = _quantity(gold)
    if stated is None or not value:
        return False
    hundredfold = decimal.Decimal(stated["number"].replace(",", "")) / abs(value)
    return decimal.Decimal(99) <= hundredfold <= decimal.Decimal(101)


# ---- Graders by name ----


def numeric(answer: str, golds: Sequence[str], example: Any) -> float:
    """`finqa_numeric` on the executed answer of a FinQA example, or else on its gold answer."""
    return finqa_numeric(answer, example.official_answer or golds[0], gold=golds[0])


# What `rollout.reward`, `evaluation.grader` and `evaluation.metrics` may name. Each is called with
# keywords, as `scorers` says.
GRADERS: dict[str, Grade] = {
    "exact_match": exact_match,
    "contains": contains,
    "substring": substring,
    "squad_em": squad_em,
    "squad_f1": squad_f1,
    "numeric": numeric,
}


def by_name(name: str) -> Grade:
    """The grader of `GRADERS` of this name.

    Raises:
      ValueError: there is none.
    """
    if name not in GRADERS:
        raise ValueError(f"{name!r} is not a grader: use one of {', '.join(GRADERS)}")
    return GRADERS[name]
