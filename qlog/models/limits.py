"""What the numbers of a decoder may be, whether config.architecture or a config.json says them.

Arrays of other sizes could not be counted, and numbers beyond these are slips of the hand: told in
a sentence, before anything walks through a billion layers.
"""

from typing import Any

LARGEST_SIZE = 2**31 - 1  # of a dimension of an array, which int32 counts
LARGEST_NUMBER = 1e30  # float32 has it, and its products with lengths
# DecoderConfig field -> its greatest value, where that is another one.
_GREATEST = {
    "num_layers": 2**16,  # functions of Python walk through all of them
    "norm_eps": 1.0,  # of states whose mean square is about 1
}


def is_size(value: Any, field: str = "") -> bool:
    """Whether it is a whole number that a DecoderConfig's field may be; 0 and less the field tells.

    Args:
      field: '' of other sizes.
    """
    # isinstance would take True for one.
    return type(value) is int and value <= _GREATEST.get(field, LARGEST_SIZE)


def is_number(value: Any, field: str = "") -> bool:
    """Whether it is a number above 0 that a DecoderConfig's field may be; a NaN is none."""
    greatest = _GREATEST.get(field, LARGEST_NUMBER)
    return type(value) in (int, float) and 0 < value <= greatest


def size_text(field: str = "") -> str:
    """What `is_size` asks for, for "... must be"."""
    return f"a whole number of at most {_GREATEST.get(field, LARGEST_SIZE)}"


def number_text(field: str = "") -> str:
    """What `is_number` asks for, for "... must be"."""
    return f"a number above 0 and at most {_GREATEST.get(field, LARGEST_NUMBER):g}"
