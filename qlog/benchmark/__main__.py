"""Times the phases of a training step of any config on the devices that are here.

    python -m qlog.benchmark --config=configs/hotpotqa.py:tiny
    python -m qlog.benchmark --config=configs/hotpotqa.py --rationale=512 \\
        --out=result.json --profile=trace

Random weights and tokens: nothing is read or downloaded. Every rollout has the full length.
"""

from absl import flags

from qlog.benchmark.report import report
from qlog.commands import entry
from qlog.config import command_line
from qlog.parallel import process

_CONFIG = command_line.define()
_PROMPT = flags.DEFINE_integer("prompt", 0, "Prompt tokens; 0 is data.max_prompt_tokens.")
_RATIONALE = flags.DEFINE_integer(
    "rationale", 0, "Rationale tokens; 0 is rollout.rationale_budget."
)
_ANSWER = flags.DEFINE_integer("answer", 16, "Gold answer tokens.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Repeats; their median counts.")
_OUT = flags.DEFINE_string("out", "", "JSON file for the numbers.")
_PROFILE = flags.DEFINE_string("profile", "", "Folder for a profiler's trace of one step.")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    entry.only_flags(argv)
    process.set_up()
    process.look_for_devices()
    report(
        _CONFIG.value,
        prompt=_PROMPT.value,
        rationale=_RATIONALE.value,
        answer=_ANSWER.value,
        repeats=_REPEATS.value,
        out=_OUT.value,
        profile=_PROFILE.value,
    )


if __name__ == "__main__":
    entry.run(main)
