"""Trains a reasoning language model, evaluates it, samples from it, exports it.

Train. The same command takes up a run that was stopped:

    python -m qlog.main --config=configs/quickstart.py
    python -m qlog.main --config=configs/hotpotqa.py:warm,grpo --workdir=runs/first

Behind the colon stand variants, which the config file names. Every field of the
config is a flag, too:

    python -m qlog.main --config=configs/hotpotqa.py --config.train.steps=100

List the fields: their meanings, allowed values, and values in a config:

    python -m qlog.main --help-config
    python -m qlog.main --config=configs/hotpotqa.py:warm --help-config=optimizer

Use what a run has trained (with the config and workdir of the run):

    python -m qlog.main --config=configs/hotpotqa.py --mode=evaluate
    python -m qlog.main --config=configs/hotpotqa.py --mode=sample
    python -m qlog.main --config=configs/hotpotqa.py --mode=export
    python -m qlog.report runs/hotpotqa

Does a run fit on TPUs, and how long does a step take? No TPU is needed:

    python -m qlog.main --config=configs/hotpotqa.py --mode=compile --topology=v5e:4x4

Where qlog is installed, `qlog` is short for `python -m qlog.main`; `qlog report`,
`qlog doctor`, `qlog show`, `qlog stage` and `qlog status` are the other commands.
Each has a --help. --helpfull lists the flags of libraries, too, and --version what
is installed.
"""

import pathlib
import sys

from absl import flags

from qlog.commands import entry, program
from qlog.config import command_line
from qlog.errors import ConfigError

_CONFIG = command_line.define()
_WORKDIR = flags.DEFINE_string("workdir", "", "Where the run is kept; '' is runs/<config's name>.")
_MODES = ("train", "evaluate", "sample", "export", "compile")
_MODE = flags.DEFINE_enum("mode", "train", _MODES, "What to do.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    "best",
    "What evaluate, sample and export read: best, latest, a step, or base: the model "
    "that training begins with.",
)
_FROM_SAMPLES = flags.DEFINE_string(
    "from_samples", "", "With --mode=evaluate: compute the metrics of this file of samples again."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    "",
    "With --mode=compile: the TPU slice, such as v5e:4x4; several, with commas, are compared.",
)
_LENGTHS = flags.DEFINE_string(
    "lengths",
    "",
    "With --mode=compile: a NumPy file with the lengths of a step's rollouts, int [prompts, M]; '' "
    "takes all at their longest.",
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "Connect to the other processes of this run: on, off, or auto: if the environment names them.",
)


def main(argv: list[str]) -> int:
    """Reads the flags, connects the processes of the run, and does what --mode asks for."""
    _only_flags(argv)
    if _CONFIG.value is None:
        raise ConfigError(
            "--config=FILE is needed, such as --config=configs/quickstart.py; --help has examples."
        )
    # Imported after the flags were read, which takes seconds: a wrong flag is reported at once.
    from qlog.parallel import distributed, process

    process.set_up()  # before JAX looks for devices

    with distributed.processes(_DISTRIBUTED.value):
        process.look_for_devices()  # --mode=compile, too, asks which process this is
        if _MODE.value != "compile":
            process.refuse_fallback()
        from qlog.commands import modes
        from qlog.parallel import interrupts

        with interrupts.listening():  # while weights and data are read, too
            return modes.run(
                _MODE.value,
                _CONFIG.value,
                _WORKDIR.value or default_workdir(command_line.spec()),
                checkpoint=_CHECKPOINT.value,
                from_samples=_FROM_SAMPLES.value,
                topology=_TOPOLOGY.value,
                lengths=_LENGTHS.value,
                argv=sys.argv,
            )


def _only_flags(argv: list[str]) -> None:
    """Refuses a word besides the flags: it is often meant as a command, as other programs have it.

    Raises:
      ConfigError: there is one.
    """
    if len(argv) < 2:
        return
    from qlog.losses.checks import closest

    word = argv[1]
    if word in _MODES:
        raise ConfigError(
            f"{word!r} is a mode: write --mode={word}, as in qlog --config=FILE --mode={word}."
        )
    if "=" in word:
        raise ConfigError(
            f"{word!r} is no flag: settings are given as --config.section.key=value, with dashes."
        )
    commands = list(program.SUBCOMMANDS)
    raise ConfigError(
        f"there is no command {word!r}{closest(word, [*commands, *_MODES])}: qlog --config=FILE "
        f"trains, and with --mode={'|'.join(_MODES[1:])} uses what was trained; the commands are "
        f"qlog {', '.join(commands[:-1])} and {commands[-1]}."
    )


def default_workdir(spec: str) -> str:
    """runs/hotpotqa-cold,garl for the config configs/hotpotqa.py:cold,garl."""
    path, _, variant = spec.partition(":")
    return f"runs/{pathlib.Path(path).stem}" + (f"-{variant}" if variant else "")


if __name__ == "__main__":
    entry.run(main)
