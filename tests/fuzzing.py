"""What the fuzzers share: how many cases they try, odd texts, and what they tell at the end.

    launch/test -m slow tests/fuzz              the usual number of cases
    FUZZ=10 launch/test -m slow tests/fuzz      ten times as many

Cases are drawn anew each time. One that fails is made small and printed by hypothesis: mend its
whole kind, and write it down as an example of the ordinary tests.
"""

import dataclasses
import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption

TIMES = float(os.environ.get("FUZZ", "1"))
_PROPERTY = "fuzz"  # of a test's report, which goes from the workers of pytest-xdist to the screen


@dataclasses.dataclass
class Tally:
    """How many cases of a kind were tried, and how many held."""

    kind: str
    tried: int = 0
    held: int = 0


def try_cases(record_property, kind, usual, strategy, holds):
    """Draws cases from a strategy and calls `holds` with each; tells how many there were.

    A case that `holds` rejects (`hypothesis.assume`) has shown nothing: it is not counted, and
    another one is drawn.

    Args:
      record_property: pytest's fixture.
      kind: of cases, for the table.
      usual: number of cases, times what the environment's FUZZ says.
      holds: a function that raises where a case does not hold.
    """
    tally = Tally(kind)

    @settings(
        max_examples=max(1, round(usual * TIMES)),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def one(case):
        tally.tried += 1
        try:
            holds(case)
        except UnsatisfiedAssumption:
            tally.tried -= 1
            raise
        tally.held += 1

    try:
        one()
    finally:
        record_property(_PROPERTY, [kind, tally.tried, tally.held])


def show(reports, write_line):
    """The table of what was tried and held.

    Args:
      reports: of pytest.
      write_line: of pytest's terminal reporter.
    """
    found = [
        value
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == _PROPERTY and report.when == "call"
    ]
    if found:
        write_line("fuzzed:")
        for kind, tried, held in sorted(found):
            write_line(f"  {kind}: {tried:,} tried, {held:,} held")


# ---- Odd texts ----

# What text() of hypothesis draws seldom or never.
ODD_TEXTS = (
    "nan inf -inf -0 0 1 -1 2 3 7 0.5 1e-320 1e999 1e-999 0x10 1_000 None null True false () [] {} "
    "[[[ ]]] (1,) 1,2 a,b [1,2] {'a':1} ../x .. . / ~ - -- = : ; # % \\ \\n ' \" ` $HOME ${x} *"
).split() + [
    "",
    " ",
    "\t",
    "\n",
    "a\nb",
    "\x00",
    "\x1b[31m",
    "[red]x[/red]",
    "\ud800",  # half of a character
    "é",
    "e\u0301",
    "\u202e",
    "\ufeff",
    "\U0001f4a5",
    "\u0661\u0662",  # Arabic digits, which Python reads as 12
    "x" * 5000,
    "9" * 5000,
    "[" * 2000,
    str(2**31),
    str(2**32),
    str(2**63),
    str(2**64),
    str(10**20),
    str(10**6),
]
TEXTS = st.one_of(
    st.sampled_from(ODD_TEXTS),
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(repr),
)
