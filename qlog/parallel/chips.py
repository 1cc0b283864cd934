"""Public peaks of accelerators, by the device kind that JAX reports."""

from typing import NamedTuple


class Chip(NamedTuple):
    """Public peaks of one device: bf16 FLOP/s, HBM bytes and bytes/s, interconnect bytes/s sent.

    `usable`: bytes of HBM that the compiler gives to a program, as its own messages say.
    """

    flops: float
    hbm: float
    hbm_speed: float
    link_speed: float
    usable: float


# By the device kind that the topology reports; from the tables "Key chip specifications" of Google's
# pages docs.cloud.google.com/tpu/docs/{v4,v5e,v5p-training,v6e,tpu7x}. They give interconnect in
# both directions together, so it is halved here; v4's page gives none: its all-reduce bandwidth per
# pod, 1.1 PB/s over 4096 chips (v5e's and v6e's, taken so, agree). A TPU7x chip is two devices.
CHIPS = {
    "TPU v4": Chip(275e12, 32 * 2**30, 1200e9, 268e9, 31.75 * 2**30),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 819e9, 200e9, 15.75 * 2**30),
    "TPU v5": Chip(459e12, 95 * 2**30, 2765e9, 600e9, 94.75 * 2**30),
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1638e9, 400e9, 31.25 * 2**30),
    "TPU7x": Chip(1153.5e12, 96 * 2**30, 3690e9, 300e9, 94.75 * 2**30),
}
# FLOP/s alone, dense bfloat16: NVIDIA's data sheets of A100 and H100/H200 (SXM).
GPU_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
}


def peak_flops(kind: str) -> float | None:
    """bf16 FLOP/s of a device of this kind; None where nobody has written it down here."""
    return CHIPS[kind].flops if kind in CHIPS else GPU_FLOPS.get(kind)
