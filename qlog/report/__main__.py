"""From runs to tables, figures and one HTML page.

    python -m qlog.report runs/quickstart                          # into report/
    python -m qlog.report runs/paper gs://BUCKET/paper --table=3 --out=tables
    python -m qlog.report runs/hotpotqa --serve                    # a page that follows a live run

A place is the folder of a run, or a folder above runs, here or in a bucket. Runs may be finished,
under way, stopped or failed: each number says which.
"""

import argparse
import contextlib
import os
import sys

from qlog.console import count_text, output, versions


def main(argv: list[str]) -> int:
    """Returns the exit status: 2 where nothing is found or a place is wrong."""
    with output():
        return _main(argv)


def _main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m qlog.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("places", nargs="+", metavar="WORKDIR_OR_BUCKET", help="folders of runs")
    parser.add_argument(
        "--table",
        type=int,
        action="append",
        choices=(1, 2, 3),
        help="a table of the paper, whether a run belongs to it or not; may be repeated",
    )
    parser.add_argument("--out", default="report", help="the folder to write (default report)")
    parser.add_argument("--serve", action="store_true", help="show the page on this machine")
    parser.add_argument("--port", type=int, default=8080, help="of --serve (default 8080)")
    parser.add_argument("--version", action="version", version=versions())
    options = parser.parse_args(argv)
    # Imported after the flags were read. JAX must not look for a TPU: it may be the run's.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from qlog.console import complain, show_markdown
    from qlog.errors import QLOG_ERRORS, ConfigError
    from qlog.report import comparison, read, server
    from qlog.storage import paths

    try:
        if options.serve:
            live = server.Server(options.places, options.port)
            print(f"{live.url} (Ctrl-C ends it)", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                live.serve_forever()
            return 0
        folders = read.find(options.places)
        if not folders and not options.table:
            raise ConfigError(
                f"no run is in {', '.join(options.places)}: name the --workdir of a run, which has "
                "a config.json, or a folder above it."
            )
        out = paths.parse(options.out, "--out")
        names = comparison.write_report(read.read(folders), options.table or (), out)
    except QLOG_ERRORS as error:
        complain(str(error))
        return error.status
    except OSError as error:  # a port that is in use, a folder that cannot be written
        complain(str(error))
        return 2
    show_markdown(paths.read(out / "report.md"))
    number = count_text(len(folders), "run")
    print(f"{number}. The report is {out / 'report.html'}: open it in a browser.")
    print(f"Next to it: {', '.join(name for name in names if name != 'report.html')}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
