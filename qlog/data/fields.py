"""The config fields that errors of this package name. Nothing here reads a config: values come as
arguments, and what a user can change about them is written down here, once."""

NAME = "config.data.name"
STYLE = "config.data.style"
OVERLONG = "config.data.overlong"
MANUAL_DIR = "config.data.manual_dir"
DATA_DIR = "config.data.data_dir"
WORLD = "config.data.world"
TOKENIZER = "config.tokenizer.path"
THINK_START = "config.tokenizer.think_start"
THINK_END = "config.tokenizer.think_end"
