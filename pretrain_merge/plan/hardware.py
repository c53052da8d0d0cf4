"""What a rank computes with and where it can put bytes: figures of common machines, each with its source.

This module knows numbers only. Rates are bytes per second that a plain copy reaches; `measured` figures of a machine of
one's own are better than any here.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from pretrain_merge.errors import ConfigError

# What a long copy reaches of the memory bandwidth on a data sheet, and a pinned copy of what its link is called.
_OF_MEMORY = 0.85
_OF_LINK = 0.85


@dataclass(frozen=True)
class Hardware:
    """One rank's device, and the host that it shares with others.

    Attributes:
        flops: Peak operations per second of one rank's device, dense, in the dtype of matrix products.
        device_bytes: Memory of one rank's device; None where tensors live in host memory anyway (a CPU).
        memory_rate: Bytes per second that a copy on the device moves, read plus written.
        link_rate: Bytes per second between a device and its host, in one direction; None without a device.
        file_rate: Bytes per second that one thread copies and another writes into a file in the page cache.
        host_bytes: Memory of one host.
        disk_bytes: Local storage of one host.
        disk_rate: Bytes per second of all local disks of a host together, written or read.
        ranks_per_host: Devices of one host.
        check_rate: Elements per second of the finite check's comparisons, on top of reading; None: hidden behind it.
        rounding_rate: Elements per second rounded to a smaller dtype, on top of the copy; None: hidden behind it.
    """

    flops: float
    device_bytes: int | None
    memory_rate: float
    link_rate: float | None
    file_rate: float
    host_bytes: int
    disk_bytes: int
    disk_rate: float
    ranks_per_host: int
    check_rate: float | None = None
    rounding_rate: float | None = None


@dataclass(frozen=True)
class Measured:
    """Figures of a machine of one's own, each in place of the one that `HARDWARE` has.

    Attributes:
        flops: Peak operations per second of one device, dense, in the dtype of matrix products.
        device_bytes: Memory of one device.
        memory_rate: Bytes per second that a copy on the device moves, read plus written.
        link_rate: Bytes per second between a device and its host, in one direction.
        file_rate: Bytes per second that one thread copies and another writes into a file in the page cache.
        host_bytes: Memory of one host.
        disk_bytes: Local storage of one host.
        disk_rate: Bytes per second of all local disks of a host together.
        ranks_per_host: Ranks that share a host.
        check_rate: Elements per second of the finite check's comparisons, on top of reading.
        rounding_rate: Elements per second rounded to a smaller dtype, on top of the copy.
    """

    flops: float | None = None
    device_bytes: float | None = None
    memory_rate: float | None = None
    link_rate: float | None = None
    file_rate: float | None = None
    host_bytes: float | None = None
    disk_bytes: float | None = None
    disk_rate: float | None = None
    ranks_per_host: int | None = None
    check_rate: float | None = None
    rounding_rate: float | None = None

    def over(self, hardware: Hardware) -> Hardware:
        """The hardware with these figures.

        Raises:
            ConfigError: A figure is not above 0.
        """
        given = {name: value for name, value in asdict(self).items() if value is not None}
        for name, value in given.items():
            if not value > 0:
                raise ConfigError(f"measured.{name}: {value!r}. Allowed: more than 0.")
            if name.endswith("_bytes"):
                given[name] = int(value)
        return replace(hardware, **given)


# A thread's write() into the page cache is a copy and the pages for it; `benchmarks.plan` measures it.
_FILE_RATE = 2e9
# Eight U.2 drives of 3.84 TB, as in DGX systems (NVIDIA DGX A100 and DGX H100 data sheets: 30 TB of NVMe, 2 TB of
# memory); a drive of that kind writes 3.8 GB/s in sequence (Samsung PM1733 data sheet).
_DISKS, _DISKS_RATE = 8 * 3_840 * 10**9, 8 * 3.8e9
_HOST = 2 * 10**12

HARDWARE: Mapping[str, Hardware] = {
    # NVIDIA H100 data sheet, SXM: 989 TFLOPS bfloat16 dense, 80 GB at 3.35 TB/s, PCIe 5.0 x16 (64 GB/s each way)
    "h100": Hardware(
        989e12, 80 * 10**9, 3.35e12 * _OF_MEMORY, 64e9 * _OF_LINK, _FILE_RATE, _HOST, _DISKS, _DISKS_RATE, 8
    ),
    # NVIDIA H200 data sheet, SXM: as the H100, with 141 GB at 4.8 TB/s
    "h200": Hardware(
        989e12, 141 * 10**9, 4.8e12 * _OF_MEMORY, 64e9 * _OF_LINK, _FILE_RATE, _HOST, _DISKS, _DISKS_RATE, 8
    ),
    # NVIDIA A100 data sheet, SXM 80 GB: 312 TFLOPS bfloat16 dense, 2,039 GB/s, PCIe 4.0 x16 (32 GB/s each way)
    "a100": Hardware(
        312e12, 80 * 10**9, 2.039e12 * _OF_MEMORY, 32e9 * _OF_LINK, _FILE_RATE, _HOST, _DISKS, _DISKS_RATE, 8
    ),
    # AMD EPYC 9654 data sheet, one socket as one rank: 96 cores at 2.4 GHz with 32 float32 operations per cycle, twelve
    # channels of DDR5-4800 (460.8 GB/s), here with 64 GB modules and one drive
    "cpu": Hardware(
        96 * 2.4e9 * 32, None, 460.8e9 * _OF_MEMORY, None, _FILE_RATE, 12 * 64 * 10**9, 3_840 * 10**9, 3.8e9, 1
    ),
}
