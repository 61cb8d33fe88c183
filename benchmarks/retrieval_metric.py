"""Our retrieval metric against clip_benchmark's: time and peak memory on the same random features, one process each, alternating.

    python benchmarks/retrieval_metric.py                             # 5,000 images, 25,000 captions, three times each
    python benchmarks/retrieval_metric.py --images 1000 --texts 5000

Both sides run with MALLOC_MMAP_THRESHOLD_=1048576 (large blocks go back to the system when freed), without which most of clip_benchmark's
peak would be the allocator's; with one thread; with clip_benchmark's own default of 64 rows at once. Time is that of the metric alone:
scores, ranks and recalls at 1, 5, 10 both ways; processor time beside it, which a busy machine changes less. Peak is that of the whole
process, libraries and features included.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("mmkit", "clip_benchmark")
RECALL_AT = (1, 5, 10)


def main() -> None:
    """Run both sides alternately and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--texts", type=int, default=25000)
    parser.add_argument("--width", type=int, default=512, help="of the joint space")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help="run one side in this process and print its figures (what the rounds call)")
    flags = parser.parse_args()
    if flags.side:
        print(json.dumps(measure(flags.side, flags.images, flags.texts, flags.width)))
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(flags.rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            row = in_a_process(side, flags)
            found[side].append(row)
            times = f"{row['seconds']:.1f} s ({row['cpu_seconds']:.1f} s of processor)"
            print(f"round {number + 1}, {side}: {times}, peak {row['peak_mb']:.0f} MB ({row['before_mb']:.0f} MB before)", flush=True)
    check_equal(found)
    medians = {side: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for side, rows in found.items()}
    ours, theirs = (medians[side] for side in SIDES)
    print(f"\n{flags.images:,} images x {flags.texts:,} captions, width {flags.width}, medians of {flags.rounds}")
    for side in SIDES:
        print(
            f"  {side:<15} {medians[side]['seconds']:8.1f} s   {medians[side]['cpu_seconds']:8.1f} s of processor   peak {medians[side]['peak_mb']:6.0f} MB"
        )
    faster = " and ".join(f"{theirs[key] / ours[key]:.1f} ({name})" for key, name in (("seconds", "time"), ("cpu_seconds", "processor")))
    print(f"  {faster} times as fast, {ours['peak_mb'] / theirs['peak_mb']:.2f} of the peak memory")


def in_a_process(side: str, flags: argparse.Namespace) -> dict[str, float]:
    """One measurement in a process of its own."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    sizes = ["--images", str(flags.images), "--texts", str(flags.texts), "--width", str(flags.width)]
    command = [sys.executable, str(Path(__file__).resolve()), "--side", side, *sizes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(side: str, images: int, texts: int, width: int) -> dict[str, float]:
    """Time one side on random features whose captions lie near their images."""
    import torch

    torch.set_num_threads(1)
    if side == "mmkit":
        from mmkit.retrieval import retrieval_ranks
    else:
        from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(texts) % images
    image_features = torch.nn.functional.normalize(torch.randn(images, width, generator=generator), dim=1)
    text_features = torch.randn(texts, width, generator=generator).mul_(6).add_(image_features[owner], alpha=width**0.5)
    text_features = torch.nn.functional.normalize(text_features, dim=1)
    before, start, cpu_start = peak_mb(), time.perf_counter(), time.process_time()
    recalls: dict[str, float] = {}
    if side == "mmkit":
        by_image, by_text = retrieval_ranks(image_features, text_features, owner)
        for k in RECALL_AT:
            recalls |= {f"text@{k}": by_image.recall(k), f"image@{k}": by_text.recall(k)}
    else:  # the lines of its `evaluate` that follow the encoding
        scores = text_features @ image_features.t()
        positive = torch.zeros_like(scores, dtype=torch.bool)
        positive[torch.arange(len(scores)), owner] = True
        for k in RECALL_AT:
            for name, table, right in (("image", scores, positive), ("text", scores.T, positive.T)):
                recalls[f"{name}@{k}"] = (batchify(recall_at_k, table, right, 64, "cpu", k=k) > 0).float().mean().item()
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
    return {**times, "peak_mb": peak_mb(), "before_mb": before, **recalls}


def peak_mb() -> float:
    """Largest resident size of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 * 1024 if sys.platform == "darwin" else 1024)


def check_equal(found: dict[str, list[dict[str, float]]]) -> None:
    """Refuse to compare the speed of two different results."""
    for key in found["mmkit"][0]:
        values = [row[key] for rows in found.values() for row in rows]
        if "@" in key and max(values) - min(values) > 1e-6:
            sys.exit(f"recall {key} differs: {values}")
    print("recalls agree: " + ", ".join(f"{key} {100 * value:.2f} %" for key, value in found["mmkit"][0].items() if "@" in key))


if __name__ == "__main__":
    main()
