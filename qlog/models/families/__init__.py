"""The families of models that qlog reads and writes, one file each."""

from qlog.models.families.family import Family
from qlog.models.families.gemma import GEMMA3
from qlog.models.families.llama import LLAMA
from qlog.models.families.mistral import MISTRAL
from qlog.models.families.qwen import QWEN2, QWEN3
from qlog.models.families.smollm3 import SMOLLM3

__all__ = ["FAMILIES", "Family"]

# DecoderConfig.family -> the family. A new one is one file, and its name here.
FAMILIES: dict[str, Family] = {
    QWEN3.name: QWEN3,
    QWEN2.name: QWEN2,
    LLAMA.name: LLAMA,
    GEMMA3.name: GEMMA3,
    MISTRAL.name: MISTRAL,
    SMOLLM3.name: SMOLLM3,
}
