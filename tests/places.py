"""Where the tests find what they read."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
TESTDATA = TESTS / "testdata"  # raw records in the official formats
GOLDEN = TESTDATA / "golden"  # small models in Hugging Face's format
