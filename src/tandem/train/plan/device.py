"""What a device can do at best, from its maker's tables, and what is assumed that a program reaches of it."""

from dataclasses import dataclass

from tandem.errors import ConfigError

GB = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device among others. Rates are per second, in one direction."""

    name: str
    bf16: float
    """Operations of dense matrix products."""
    fp32: float
    """The same in float32, whose products PyTorch computes in full precision unless told otherwise."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes from and to its own memory."""
    near: float
    """Bytes to another device of its node."""
    far: float
    """Bytes to a device of another node."""
    host: float
    """Bytes to the memory of the host."""
    host_memory: float
    """Bytes of host memory for each device."""

    def flops(self, dtype: str) -> float:
        return self.bf16 if dtype == "bf16" else self.fp32


# Products, memory and links inside a node: the makers' data sheets (NVIDIA A100, H100, H200, B200, L40S; sums that
# use sparsity halved, links that add both directions halved). Far: the network card per device of the reference
# systems, 200 Gbit/s (DGX A100) and 400 Gbit/s (DGX H100, H200, B200), one card of 100 Gbit/s for L40S. Host: PCIe
# of 16 lanes, 4.0 for A100 and L40S, 5.0 for the others; memory as in those systems (1 TB for eight A100, 2 TB for
# eight of the others), and 96 GB assumed beside an L40S.
DEVICES = {
    "h200": Device(
        name="h200",
        bf16=989e12,
        fp32=67e12,
        memory=141 * GB,
        bandwidth=4.8e12,
        near=450 * GB,
        far=50 * GB,
        host=64 * GB,
        host_memory=256 * GB,
    ),
    "h100": Device(
        name="h100",
        bf16=989e12,
        fp32=67e12,
        memory=80 * GB,
        bandwidth=3.35e12,
        near=450 * GB,
        far=50 * GB,
        host=64 * GB,
        host_memory=256 * GB,
    ),
    "b200": Device(
        name="b200",
        bf16=2250e12,
        fp32=75e12,
        memory=180 * GB,
        bandwidth=8e12,
        near=900 * GB,
        far=50 * GB,
        host=64 * GB,
        host_memory=256 * GB,
    ),
    "a100": Device(
        name="a100",
        bf16=312e12,
        fp32=19.5e12,
        memory=80 * GB,
        bandwidth=2.0e12,
        near=300 * GB,
        far=25 * GB,
        host=32 * GB,
        host_memory=128 * GB,
    ),
    "l40s": Device(
        name="l40s",
        bf16=362e12,
        fp32=91.6e12,
        memory=48 * GB,
        bandwidth=0.864e12,
        near=32 * GB,
        far=12.5 * GB,
        host=32 * GB,
        host_memory=96 * GB,
    ),
}
KEYS = {
    "FLOPS": "bf16",
    "FP32": "fp32",
    "MEMORY": "memory",
    "BANDWIDTH": "bandwidth",
    "NEAR": "near",
    "FAR": "far",
    "HOST": "host",
    "HOST_MEMORY": "host_memory",
}
NEEDED = ("FLOPS", "BANDWIDTH", "MEMORY")


def find(text: str) -> Device:
    """A device of the table, or one given as `FLOPS=..,BANDWIDTH=..,MEMORY=..` and any other of `KEYS`.

    ConfigError where there is none of that name, a figure is missing or is not a positive number.
    """
    if text in DEVICES:
        return DEVICES[text]
    if "=" not in text:
        raise ConfigError(
            f"--device {text}: not known; choose one of {', '.join([*DEVICES, 'cpu'])}, or give figures: "
            "--device FLOPS=989e12,BANDWIDTH=4.8e12,MEMORY=141e9"
        )
    given = dict(_figure(part) for part in text.split(","))
    missing = [name for name in NEEDED if name not in given]
    if missing:
        raise ConfigError(f"--device {text}: {' and '.join(missing)} missing; give {', '.join(NEEDED)}")
    flops = given["FLOPS"]
    values = {KEYS[name]: value for name, value in given.items()}
    slow = {"fp32": flops / 16, "near": 32e9, "far": 12.5e9, "host": 32e9, "host_memory": 128e9}
    return Device(name="own device", **(slow | values))


def _figure(part: str) -> tuple[str, float]:
    name, _, number = part.partition("=")
    if name.upper() not in KEYS:
        raise ConfigError(f"--device {part}: unknown figure; the figures are {', '.join(KEYS)}")
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"--device {part}: not a positive number; write it like 4.8e12")
    return name.upper(), value


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one kind of exchange between processes."""

    message_s: float
    """Seconds of each of the steps that it takes, however short."""
    rate: float
    """Bytes per second that each process sends."""

    def seconds(self, size_bytes: float, steps: int) -> float:
        return steps * self.message_s + size_bytes / self.rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanges:
    """What processes of one machine were measured to take. Nothing of it is hidden behind products: both need the same
    cores."""

    gather: Cost
    """Parts to a whole, for everyone."""
    scatter: Cost
    """Sums to parts."""
    reduce: Cost
    """Sums for everyone."""
    turn: Cost
    """A part from everyone to everyone."""
    send: Cost
    """From one process to another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """What a version of the weights was measured to take from one process to an engine's, with what proves it on
    average."""

    byte_s: float
    """Seconds of a byte that travels."""
    probe_s: float
    """Seconds of a pass over the probe, of each weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a program reaches."""

    update: float
    """Operations per second in forward and backward pass."""
    forward: float
    """Operations per second in a forward pass alone."""
    decode: float
    """Operations per second in the products of a decoding step."""
    bandwidth: float
    """Bytes per second."""
    step_s: float
    """Seconds that a decoding step takes beside its layers, however little it computes."""
    layer_s: float
    """The same for each layer."""
    start_s: float = 0.0
    """Seconds for each layer before the first token, beside the prompts."""
    near: float
    far: float
    host: float
    usable: float
    """Bytes of memory; the rest is the allocator's, the libraries' and the network's."""
    host_memory: float
    """The same of the host's, for each device; 0 where the device is the host."""
    origin: str
    """Where the figures come from, in words."""
    overlaps: bool = True
    """A decoding step reads weights while it multiplies others."""
    exchanges: Exchanges | None = None
    sending: Sending | None = None
    """Both where they were measured."""


UPDATE, FORWARD, DECODE, BANDWIDTH, LINK, USABLE = 0.4, 0.5, 0.5, 0.7, 0.7, 0.9
"""Shares of the device's figures that are assumed to be reached."""
STEP_S, LAYER_S = 1e-3, 10e-6
"""Assumed fixed time of a decoding step: scheduling and sampling, and a few kernels for each layer."""


def assumed(device: Device, dtype: str) -> Rates:
    """The shares that well-made programs reach, applied to a device's figures."""
    flops = device.flops(dtype)
    return Rates(
        update=UPDATE * flops,
        forward=FORWARD * flops,
        decode=DECODE * flops,
        bandwidth=BANDWIDTH * device.bandwidth,
        step_s=STEP_S,
        layer_s=LAYER_S,
        near=LINK * device.near,
        far=LINK * device.far,
        host=LINK * device.host,
        usable=USABLE * device.memory,
        host_memory=USABLE * device.host_memory,
        origin=(
            f"assumed shares of its data sheet ({flops / 1e12:,.0f} TFLOP/s in {dtype}, "
            f"{device.bandwidth / 1e12:.2f} TB/s, {device.memory / GB:,.0f} GB): update {UPDATE:.0%}, other forward "
            f"passes {FORWARD:.0%}, products while decoding {DECODE:.0%}, bandwidth {BANDWIDTH:.0%}, links {LINK:.0%}, "
            f"memory {USABLE:.0%}; {1e3 * STEP_S:g} ms and {1e6 * LAYER_S:g} µs a layer for a decoding step"
        ),
    )
