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
import itertools
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
# What every rule reads first (`_plain`); README.md of this package has the reason of each rule.
_DASHES = {ord(dash): "-" for dash in "\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d"}
# Thousands as LaTeX, typographers and the Swiss write them: a digit, the sign, three digits.
_THOUSANDS = re.compile(
    r"(?<=\d)(?:\{,\}|\\[,;:! ]|[\u00a0\u2007\u2009\u202f'\u2019])(?=\d{3}(?!\d))"
)
_RAISED = re.compile(
    "(?<=[0-9])(?=[\u00b9\u00b2\u00b3\u2070\u2074-\u2079\u00bc-\u00be\u2150-\u215e])"
)
_FRACTION = re.compile(r"\\[dt]?frac\s?\{([^{}]{1,40})\}\s?\{([^{}]{1,40})\}")
_LATEX = re.compile(r"\\(?:boxed|text|textbf|mathbf|mathrm|left|right)(?![a-z])|\\(?=[%$])")
_PERCENT = re.compile(r"\bper ?cent\b")
_POWER = re.compile(
    r"(?<![\w.])(\d{1,15}(?:\.\d{1,15})?)"
    r"(?:e([+-]?\d{1,2})|\s?(?:\u00d7|\*|\\times)\s?10\s?\^\s?\{?([+-]?\d{1,2})\}?)(?![\w^.]\d|\w)"
)
# "bn" and "mn" mean nothing else. One letter is a scale behind an amount of money, a capital one
# behind decimals, too (1.2M); 5m may be metres, and 221B a house.
_SHORT_SCALES = {"k": "thousand", "m": "million", "mn": "million", "mm": "million", "b": "billion"}
_SHORT_SCALES |= {"bn": "billion", "tn": "trillion"}
_SHORT = re.compile(
    r"(?<![\w.,])((?P<money>[$\u20ac\u00a3]\s?)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)"
    r"(?:(?P<small>[kmb])|(?P<large>[KMB])|\s?(?P<long>(?i:mn|mm|bn|tn)))\b"
)
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}

_LETTER = r"[^\W\d_]"
# Combining marks: re's \w has none of them, and without them Hindi's vowels would be lost. No
# script has marks beyond these planes.
_MARKS = "".join(c for c in map(chr, range(0x300, 0x1F000)) if unicodedata.category(c)[0] == "M")
# What is not seen: joiners, marks of direction, soft hyphens, selectors of a glyph.
_UNSEEN = dict.fromkeys(
    [0xAD, 0x61C, 0x180E, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070)]
    + [0xFEFF, *range(0xFE00, 0xFE10)]
)
# U.S. and A. P. J. are US and APJ.
_INITIALS = re.compile(
    rf"(?<!\w)(?:(?:{_LETTER}\.)+{_LETTER}(?!\w)\.?|(?:{_LETTER}\.\s?){{2,}}(?=\s|\W|\Z))"
)
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?!\w)"
# A minus that stands apart from its number belongs to it where no difference or range can be meant.
_APART = re.compile(
    r"(\A\s*|[=:(,;]\s*|\b(?:is|was|are|were|be|equals|of|to|by|at|about)\s+)-\s+"
    r"(?=[$\u20ac\u00a3]?\s?\.?\d)"
)
# Accountants' brackets: all that the text says, or behind a currency sign. A year is a year.
_BRACKETS = re.compile(
    rf"\A\s*\(\s?(?!(?:19|20)\d\d\s?\))([$\u20ac\u00a3]?\s?{_NUMBER}\s?%?)\s?\)"
    rf"(?=\s?(?:%|{'|'.join(_SCALES)})?[.\s]*\Z)"
    rf"|[$\u20ac\u00a3]\s?\(\s?({_NUMBER})\s?\)"
)
# A minus belongs to a number unless it joins two words ("2008-2010"); currency signs are not read.
# Plus and sharp signs behind a letter belong to the word: C++, C#, A+.
_TOKENS = re.compile(
    rf"(?:(?<![\w)%])-(?:\$\s?)?)?{_NUMBER}|%|[\w{_MARKS}]+(?:(?<={_LETTER})(?:\++|\#)(?!\w))?"
)
_NUMBER_TOKEN = re.compile(rf"-?\$?\s?{_NUMBER}\Z")


def _plain(text: str, *, is_figure: bool = False) -> str:
    """One spelling of a text: NFKC, case-folded, without LaTeX; numbers in their usual form.

    Args:
      is_figure: whether it states an amount, so that 407M is 407 million.
    """
    # ---- While spaces and letters are as they were written ----
    text = _THOUSANDS.sub(",", _RAISED.sub(" ", text).translate(_DASHES))
    text = _SHORT.sub(functools.partial(_with_long_scale, is_figure=is_figure), text)
    # ---- One form of each character ----
    # Folding a Turkish capital I with its dot leaves the dot as a mark behind the i.
    text = unicodedata.normalize("NFKC", text).casefold().replace("i\u0307", "i")
    text = text.translate(_UNSEEN).replace("\u2044", "/")
    # ---- LaTeX, percent, powers of ten ----
    text = _LATEX.sub(" ", _FRACTION.sub(r"\1/\2", text))
    return _POWER.sub(_written_out, _PERCENT.sub("%", text))


def _with_long_scale(match: re.Match[str], is_figure: bool) -> str:
    """$1.2M -> $1.2 million."""
    is_clear = match["money"] or match["long"]
    if not is_clear and (match["small"] or not (is_figure or "." in match[1])):
        return match[0]
    short = match["small"] or match["large"] or match["long"]
    return f"{match[1]} {_SHORT_SCALES[short.lower()]}"


def _written_out(match: re.Match[str]) -> str:
    """1.5e3 -> 1500."""
    return f"{decimal.Decimal(match[1]).scaleb(int(match[2] or match[3])):f}"


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


def _composed(text: str) -> str:
    """NFC: an accented letter is one character, however the file or the tokenizer spells it."""
    return unicodedata.normalize("NFC", text)


def exact_match(answer: str, golds: str | Sequence[str]) -> float:
    """1 if the answer is the gold string, case included; runs of white space count as one space.

    The reward of the estimators that sample answers (GRPO, RLOO, MaxRL, STaR).
    """
    return _best(lambda a, g: _composed(a).split() == _composed(g).split(), answer, golds)


def substring(answer: str, golds: str | Sequence[str]) -> float:
    """1 if a gold string is a substring of the answer, letter by letter: the paper's literal rule.

    No word boundaries, no other spelling, no limit of length: "no" is in "not known". For tables
    that stand next to the paper's. `contains` is the rule to trust. Blank golds match nothing.
    """
    text = _composed(answer)
    return float(any(_composed(gold.strip()) in text for gold in _golds(golds)))


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


def words(text: str, *, scaled: bool = False) -> list[str]:
    """Lower-case words and numbers of a text, punctuation and currency signs dropped.

    Unicode is brought to NFKC and case-folded. Numbers keep sign and point and lose thousands
    separators and trailing zeros; "%" is a word, and "percent" is read as "%".

    Args:
      scaled: whether a number and the scale behind it are one number: 1.2 million is 1200000.
    """
    text = _BRACKETS.sub(lambda m: f"-{m[1] or m[2]}", _plain(_without_escaped_newlines(text)))
    text = _INITIALS.sub(_without_dots, _APART.sub(r"\1-", text))
    tokens = _TOKENS.findall(text)
    found = [_number_token(t) if _NUMBER_TOKEN.match(t) else t for t in tokens]
    return _scaled(found) if scaled else found


def _without_dots(match: re.Match[str]) -> str:
    """The letters of initials as one word, and the space behind them."""
    return re.sub(r"[.\s]", "", match[0]) + " "


def _scaled(found: list[str]) -> list[str]:
    merged: list[str] = []
    for token in found:
        scale = _SCALES.get(token)
        if scale and merged and re.fullmatch(r"-?\d{1,40}(?:\.\d{1,40})?", merged[-1]):
            merged[-1] = _number_token(f"{decimal.Decimal(merged[-1]).scaleb(scale):f}")
        else:
            merged.append(token)
    return merged


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
    for gold in _golds(golds):
        gold_words = _without_article(words(gold))
        extra = len(answer_words) - len(gold_words)
        if not gold_words:  # nothing but punctuation
            found = answer.strip() == gold.strip()
        elif gold_words in (["yes"], ["no"]):
            found = _said(answer) == set(gold_words)
        else:
            # A scale may be written as a word or as zeros: either reading, the same on both sides.
            found = _has_run(answer_words, gold_words) or _has_run(
                words(answer, scaled=True), _without_article(words(gold, scaled=True))
            )
        if found and extra <= MAX_EXTRA_WORDS:
            return float(not is_copy(answer, source, MAX_COPIED_WORDS + len(gold_words)))
    return 0.0


def _has_run(text_words: list[str], run: list[str]) -> bool:
    """Whether the words of `run` follow each other in the text."""
    # With spaces at both ends a substring is a run of whole words.
    return f" {' '.join(run)} " in f" {' '.join(text_words)} "


def _said(answer: str) -> set[str]:
    """Which of yes and no an answer says. "No. 5" says neither, and "not yes" does not say yes."""
    found = words(re.sub(r"\b[Nn]os?\.\s?(?=\d)", " ", answer))
    return {
        word
        for before, word in itertools.pairwise(["", *found])
        if word in ("yes", "no") and before != "not"
    }


def is_copy(answer: str, source: str, allowed: int = MAX_COPIED_WORDS) -> bool:
    """Whether the whole answer stands verbatim in `source` and has more than `allowed` words."""
    answer_words = words(answer) if source else []
    return len(answer_words) > allowed and f" {' '.join(answer_words)} " in _joined(source)


def vote_key(answer: str) -> str:
    """The normal form that a majority vote counts: `words` without a leading article.

    "" for text that is no answer: it casts no vote.
    """
    return " ".join(_without_article(words(answer, scaled=True))) if is_answer(answer) else ""


# ---- SQuAD's exact match and F1 ----

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def squad_normalise(text: str) -> str:
    """The scripts' normal form: lower case, no ASCII punctuation, no articles, single spaces."""
    lower = _composed(text).lower()
    return " ".join(_ARTICLES.sub(" ", lower.translate(_PUNCTUATION)).split())


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

_YEAR = re.compile(r"\s*(?:19|20)\d\d\s*\Z")
_QUANTITY = re.compile(
    r"(?P<open>\(\s?(?:\$\s?)?)?(?P<sign>(?<![\w)%])-(?:\$\s?)?)?"
    r"(?<!\w)(?P<number>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?!\w|[.,]\d)"
    r"(?:\s?/\s?(?P<over>\d{1,20})(?![\w/]|[.,]\d))?"
    r"(?P<close>\s?%?\s?\))?"
    rf"\s?(?P<percent>%)?\s?(?P<scale>(?:{'|'.join(_SCALES)})s?\b)?"
)
# Brackets that explain: with letters in them, or right behind a number.
_EXPLANATION = re.compile(
    rf"\([^()]*[^\W\d_][^()]*\)|(?<=[\d%])\s?\([^()]*\)|(?<=\d)\s(?:{'|'.join(_SCALES)})\s?\([^()]*\)"
)
_BOXED = re.compile(r"\\boxed\s?\{((?:[^{}]|\{[^{}]*\})*)\}")
_FALL = re.compile(r"\b(?:decreas|declin|drop|fell|fall|down|lower|reduc|shrank|shrunk|loss)")
_RISE = re.compile(r"\b(?:increas|rise|rose|grew|grow|up\b|higher|gain)")


def _quantity(text: str) -> re.Match | None:
    """The number that an answer states, by the rules of `finqa_numeric`."""
    boxes = _BOXED.findall(text)
    text = re.sub(r"\*\*", "", _plain(boxes[-1] if boxes else text, is_figure=True)).rsplit("=", 1)[
        -1
    ]
    text = _APART.sub(r"\1-", text)
    # Without its explanations, if a number is left.
    for part in (_EXPLANATION.sub(lambda m: re.sub(r"\(.*", " ", m[0]), text), text):
        # Longer runs of digits are noise, not figures.
        found = [m for m in _QUANTITY.finditer(part) if len(m["number"]) <= 40]
        if stated := [m for m in found if not _YEAR.match(m[0])]:
            return stated[-1]
    return (found or [None])[-1]  # a year, where nothing else is left


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
    r"""1 if the answer states FinQA's executed answer `exe_ans`: 5 decimals, or "yes" or "no".

    The official script executes programs. Free text needs another rule:
      * The number is the one in the last \boxed{}, else the last one after the last "=". Brackets
        that explain ("(from 100 to 134.7)") are skipped, and bare years (1900-2099), when there is
        another number. Thousands separators and currency signs are skipped; "-", a minus sign
        proper and accounting brackets "(2.4)" are negative.
      * The sign must agree. An answer that says "decrease" (or fell, loss, ...) and does not say
        "increase" states either sign: questions ask for the change or for the decrease.
      * It must be the target rounded or truncated at the decimals written (34.7% for 0.34719) and
        within 5% of it, so that "0%" is not right for everything small; or equal at 5 decimals.
      * n% is n/100. Where the annotator's answer `gold` shows that percent is meant (it has "%", or
        is 100 times the target), n and n% both mean n/100 or n, since FinQA's programs do both.
      * "n million" (thousand, billion, trillion, or short: $1.2M, 1.2bn) is n or n * 10^6:
        questions fix the unit in words. Where `gold` states a scale, too, both must agree: 1.2
        billion is not $ 1.2 million, and 1,200,000 is.
      * "n/m" and \frac{n}{m} are fractions, and must be equal to 5 decimals.

    Args:
      target: exe_ans, as a number or as its string.
      gold: the annotator's string (qa.answer), read only to see whether percent or a scale is
        meant.
    """
    if not is_answer(answer):
        return 0.0
    if isinstance(target, str) and target.strip().lower() in ("yes", "no"):
        return contains(answer, target)
    value = _target(target)
    match = _quantity(answer)
    if value is None or match is None or not int(match["over"] or 1):
        return 0.0
    number = _decimal(match)
    unit = decimal.Decimal(1).scaleb(int(number.as_tuple().exponent))  # of its last digit
    if match["over"]:  # a fraction is exact
        number, unit = number / int(match["over"]), decimal.Decimal(0)
    # ---- Which signs may it have? ----
    is_negative = match["sign"] or (match["open"] and match["close"])
    numbers = [-number if is_negative else number]
    if not is_negative and _FALL.search(_plain(answer)) and not _RISE.search(_plain(answer)):
        numbers.append(-number)
    # ---- Which powers of ten may it be multiplied by? Any reading that agrees counts ----
    is_percent = bool(match["percent"] or "%" in (match["close"] or ""))
    powers = [-2] if is_percent else [0]
    if _means_percent(gold, value):
        powers = [0, -2]
    shifts = _scale_shifts(match, gold, value)
    powers = [power + shift for power in powers for shift in shifts]
    return float(any(_agrees(n.scaleb(p), unit.scaleb(p), value) for n in numbers for p in powers))


def _decimal(match: re.Match[str]) -> decimal.Decimal:
    return decimal.Decimal(match["number"].replace(",", ""))


def _scale_of(match: re.Match[str]) -> int:
    """The power of ten of the word behind a number; 0 where there is none."""
    return _SCALES[match["scale"].rstrip("s")] if match["scale"] else 0


def _scale_shifts(match: re.Match[str], gold: str, value: decimal.Decimal) -> list[int]:
    """The powers of ten that bring an answer's number to the unit of the target."""
    scale, stated = _scale_of(match), _quantity(gold) if gold.strip() else None
    gold_scale = _scale_of(stated) if stated else 0
    if scale and "%" in gold:  # millions of something are no percentage
        return [scale]
    if not stated or not gold_scale:
        return [0, scale] if scale else [0]
    # Is the target in millions, as the annotator's number, or written out?
    written_out = abs(_decimal(stated).scaleb(gold_scale) - abs(value)) <= abs(value) / 100
    unit = 0 if written_out else gold_scale
    if scale:
        return [scale - unit]
    return [0] if written_out else [0, -unit]


def _target(target: float | int | str) -> decimal.Decimal | None:
    """The gold number, or None where no float is (text, NaN, infinities, what is too large)."""
    try:
        number = float(target)
    except (ValueError, OverflowError):
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
    hundredfold = _decimal(stated) / abs(value)
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
