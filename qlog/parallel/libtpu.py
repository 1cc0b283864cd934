"""libtpu, the TPU runtime, on machines without a TPU: it stays quiet. Imports no JAX."""

import contextlib
import glob
import os
import pathlib

from qlog import extras

# Devices that the kernel has for TPUs, by generation.
_DEVICES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
_GOOGLE = "0x1ae0"  # the vendor of TPUs on the PCI bus
# What TPU VMs, GKE and queued resources set.
_VARIABLES = (
    "TPU_WORKER_HOSTNAMES",
    "TPU_WORKER_ID",
    "TPU_ACCELERATOR_TYPE",
    "TPU_CHIPS_PER_HOST_BOUNDS",
    "TPU_TOPOLOGY",
    "CLOUD_TPU_TASK_ID",
    "MEGASCALE_NUM_SLICES",
    "JAX_FORCE_TPU_INIT",
)
# What libtpu complains about where no TPU VM sets it: here one host, with the smallest slice. It
# still finds no chips. And --mode=compile names its own topology, so its programs are the same.
_QUIET = {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}


def may_have_tpu() -> bool:
    """Whether this machine may have a TPU: by devices, the PCI bus, or what launchers set."""
    if any(os.environ.get(name) for name in _VARIABLES):
        return True
    if "tpu" in os.environ.get("JAX_PLATFORMS", "").split(","):  # the user says so
        return True
    if any(glob.glob(pattern) for pattern in _DEVICES):
        return True
    for vendor in glob.glob("/sys/bus/pci/devices/*/vendor"):
        with contextlib.suppress(OSError):  # a device that was taken out just now
            if pathlib.Path(vendor).read_text().strip() == _GOOGLE:
                return True
    return False


def keep_quiet() -> None:
    """Silences libtpu where there is no TPU; `import qlog` calls it.

    JAX must not have looked for devices yet, which it does at the first computation. With the extra
    `tpu` on a laptop it asks libtpu for devices, and libtpu complains about worker hostnames that
    only a TPU VM has; so does --mode=compile. It does so before it reads its own log levels, so
    these do not help. What the user has set stays.
    """
    if extras.is_installed("libtpu") and not may_have_tpu():
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
