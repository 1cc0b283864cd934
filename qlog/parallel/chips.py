"""Public peaks of accelerators, by the device kind that JAX reports."""

from typing import NamedTuple


class Chip(NamedTuple):
    """Public peaks of one device, as the compiler sees devices (a TPU7x chip is two of them)."""

    flops: float  # bf16 FLOP/s, dense
    hbm: float  # bytes of memory
    hbm_speed: float  # bytes/s, to and from that memory
    link_speed: float  # bytes/s sent to neighbours, all links together
    usable: float  # bytes of memory that the compiler gives to a program, as its messages say


# By the device kind that JAX reports. The source is the table "Key chip specifications" of Google's
# pages docs.cloud.google.com/tpu/docs/{v4,v5e,v5p-training,v6e,tpu7x}. They count the interconnect
# in both directions, so it is halved here. The page on v4 has no such number: this one is from its
# all-reduce bandwidth per pod, 1.1 PB/s over 4096 chips (v5e and v6e agree when reckoned so).
CHIPS = {
    "TPU v4": Chip(275e12, 32 * 2**30, 1200e9, 268e9, 31.75 * 2**30),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 819e9, 200e9, 15.75 * 2**30),
    "TPU v5": Chip(459e12, 95 * 2**30, 2765e9, 600e9, 94.75 * 2**30),
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1638e9, 400e9, 31.25 * 2**30),
    "TPU7x": Chip(1153.5e12, 96 * 2**30, 3690e9, 300e9, 94.75 * 2**30),
}


class Gpu(NamedTuple):
    """Public peaks of a GPU; no more is needed, since no program is compiled for it elsewhere."""

    flops: float  # bf16 FLOP/s, dense
    hbm: float  # bytes of memory
    hbm_speed: float  # bytes/s, to and from that memory


# From NVIDIA's data sheets of A100 and H100/H200 (SXM). Of memory these say 40, 80 and 141 GB;
# counted in units of 2^30 that is no less than what the driver reports.
GPUS = {
    "NVIDIA A100-SXM4-40GB": Gpu(312e12, 40 * 2**30, 1555e9),
    "NVIDIA A100-SXM4-80GB": Gpu(312e12, 80 * 2**30, 2039e9),
    "NVIDIA H100 80GB HBM3": Gpu(989.4e12, 80 * 2**30, 3350e9),
    "NVIDIA H200": Gpu(989.4e12, 141 * 2**30, 4800e9),
}


def peaks(kind: str) -> Chip | Gpu | None:
    """Of a device of this kind, as `jax.Device.device_kind`; None for unknown kinds."""
    return CHIPS.get(kind) or GPUS.get(kind)
