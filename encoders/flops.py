"""What a training step must compute at least, and how near to that a run comes.

    step = teacher forward + 3 x student forward        (the backward costs two forwards)

The count is torch's own, of a copy of the network without memory; recomputation by gradient checkpointing is not counted, as is the custom
where a share of the peak (MFU) is given.
"""

import statistics
import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from encoders.modeling import VisionEncoder, VisionEncoderConfig

# Dense bfloat16 peaks in TFLOP/s, by a part of the name that CUDA gives; the first that matches counts. Source: NVIDIA's data sheets.
PEAKS = {"H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "GH200": 989.0, "A100": 312.0, "L40S": 362.0, "A10G": 70.0, "RTX 4090": 165.0}
SETTLING_STEPS = 3  # at first memory is claimed, kernels are chosen, graphs compiled


def forward_flops(encoder: VisionEncoder, kept: int | None = None) -> int:
    """Count the operations (2 for a multiply-add) of one image's way to its tokens.

    Args:
        encoder: Any; its weights are not touched.
        kept: K, patches that enter the network; None is all. All patches are embedded in either case.
    """
    with torch.device("meta"):
        bare = VisionEncoder(VisionEncoderConfig(**_network_of(encoder))).requires_grad_(False).eval()
        size = encoder.config.image_size or 0
        images = torch.empty(1, 3, size, size)
        keep = None if kept is None else torch.zeros(1, kept, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bare.tokens(images, keep) if bare.config.joint_width else bare(images)
    return int(counter.get_total_flops())


def _network_of(encoder: VisionEncoder) -> dict[str, object]:
    keys = ("architecture", "model_args", "image_spec", "joint_width")
    return {key: getattr(encoder.config, key) for key in keys}


def peak_of(device: torch.device, precision: str) -> float:
    """Give the peak in TFLOP/s that the data sheet of this device says, or 0 where none is known (CPUs, float32)."""
    if device.type != "cuda" or precision == "fp32":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), 0.0)


@dataclass
class StepBound:
    """The operations of a step, and clocks to hold against them.

    Args:
        teacher, student: Operations of one forward of one image (one view for the student).
        views: Times the student sees a crop.
        batch: Crops in a step, of one process.
        peak: TFLOP/s that the device can do at best; 0 is unknown.
    """

    teacher: int
    student: int
    views: int
    batch: int
    peak: float = 0.0

    def __post_init__(self) -> None:
        self._last, self._times = time.monotonic(), list[float]()

    @property
    def per_image(self) -> int:
        """Operations for one crop."""
        return self.teacher + 3 * self.views * self.student

    @property
    def seconds(self) -> float | None:
        """The least time of a step on this device, if its peak is known."""
        return self.per_image * self.batch / self.peak / 1e12 if self.peak else None

    def tick(self) -> dict[str, float]:
        """Note that a step is done; give its time, and the share of the peak, as terms for the log."""
        now = time.monotonic()
        self._times.append(now - self._last)
        self._last = now
        return {"step_seconds": self._times[-1], **({"mfu": self.seconds / self._times[-1]} if self.seconds else {})}

    def describe(self) -> str:
        """Say what a step needs, before the first one."""
        views = f"{self.views} x " if self.views > 1 else ""
        bound = (
            f"at least {self.seconds:.3g} s a step at {self.peak:g} TFLOP/s" if self.seconds else "device peak unknown: give --peak_tflops"
        )
        return (
            f"{self.per_image / 1e9:.4g} GFLOP an image (teacher {self.teacher / 1e9:.4g}, "
            f"student 3 x {views}{self.student / 1e9:.4g}); {bound}"
        )

    def summary(self) -> str:
        """Say how long a step took, beside its bound; empty before enough steps were seen."""
        settled = self._times[SETTLING_STEPS:]
        if not settled:
            return ""
        median = statistics.median(settled)
        rate = self.per_image * self.batch / median / 1e12
        share = f", {100 * rate / self.peak:.1f} % of the peak (bound {self.seconds:.3g} s)" if self.peak else ""
        return f"step {median:.3g} s (median of {len(settled)}), {self.batch / median:.4g} images/s, {rate:.3g} TFLOP/s a process{share}"
