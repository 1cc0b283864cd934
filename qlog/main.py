"""The command line: `python -m qlog.main --config=configs/quickstart.py`."""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with variants after a colon.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Where the run is kept; '' is runs/<config's name>.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate", "sample", "export", "compile"], "What to do.")
_FROM_SAMPLES = flags.DEFINE_string(
    "from_samples", "", "With --mode=evaluate: compute the metrics of this file of samples again."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", "With --mode=compile: the TPU slice, as v5e:4x4; several, after commas, compare."
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed", "auto", ["auto", "on", "off"],
    "Connect to the other processes of this run: on, off, or auto, where the environment names them.",
)  # fmt: skip
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]!r}? Settings are given as --config.section.key=value")
    logging.set_verbosity(logging.WARNING)  # Orbax tells its every move at INFO
    from qlog import distributed, runtime  # after the flags: a wrong one is reported at once

    runtime.set_up()

    workdir = pathlib.Path(_WORKDIR.value or default_workdir(sys.argv))
    with distributed.processes(_DISTRIBUTED.value):
        from qlog import commands

        return commands.run(
            _MODE.value, _CONFIG.value, workdir, _FROM_SAMPLES.value, _TOPOLOGY.value
        )


def default_workdir(argv: list[str]) -> str:
    """runs/hotpotqa-cold,garl for --config=configs/hotpotqa.py:cold,garl."""
    value = next(a.partition("=")[2] for a in argv if a.startswith(("--config=", "-config=")))
    path, _, variant = value.partition(":")
    return f"runs/{pathlib.Path(path).stem}" + (f"-{variant}" if variant else "")


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parsing, but a mistake is one sentence and status 2."""
    try:
        rest = flags.FLAGS(argv)
        getattr(_CONFIG.value, "seed", None)  # a file that did not load says so when it is read
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, OSError) as error:
        # config_flags folds the traceback of a config file into its message; an override of a key
        # that does not exist arrives as ml_collections' AttributeError.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        sentence = lines[-1] if "Traceback" in str(error) else " ".join(lines)
        print(f"qlog: {sentence.removeprefix('qlog.errors.ConfigError: ')}", file=sys.stderr)
        sys.exit(2)


def run() -> None:
    """Runs `main`; a ConfigError is one sentence and status 2."""
    from qlog.errors import ConfigError

    try:
        app.run(main, flags_parser=parse_flags)
    except ConfigError as error:
        print(f"qlog: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()
