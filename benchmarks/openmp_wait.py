"""How OpenMP's threads wait: steps of a small training a second under three policies, alone and beside busy processes.

    python benchmarks/openmp_wait.py --rounds 3 --busy 0
    python benchmarks/openmp_wait.py --rounds 3 --busy 2

Each round trains mini-llm for some steps under each policy in turn, in a process of its own, since the policy is read when torch is loaded.
Printed are medians of samples a second and their ratio to the first policy.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

POLICIES = {
    "no spinning": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"},
    "mmkit's": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "5000"},
    "active": {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "INFINITE"},
}
WARM_UP = 10  # steps left out


def samples_per_second(policy: dict[str, str], steps: int, threads: int) -> float:
    """Train under a policy and read the pace off the log."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        flags = ["--recipe", "mini_llm", "--run.steps", str(WARM_UP + steps), "--run.log_every", "1", "--held_out", "0"]
        command = [sys.executable, "-m", "llm_stage.train_text", *flags, "--run.output_dir", str(run)]
        environment = {**os.environ, **policy, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    first, last = rows[WARM_UP - 1], rows[-1]
    return (last["samples_seen"] - first["samples_seen"]) / (last["seconds"] - first["seconds"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--busy", type=int, default=0, help="processes that take a core each, meanwhile")
    args = parser.parse_args()
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)]
    found: dict[str, list[float]] = {name: [] for name in POLICIES}
    try:
        for number in range(args.rounds):
            for name, policy in POLICIES.items():
                found[name].append(samples_per_second(policy, args.steps, args.threads))
                print(f"round {number + 1}, {name}: {found[name][-1]:.1f} samples/s", flush=True)
    finally:
        for other in others:
            other.kill()
    medians = {name: statistics.median(values) for name, values in found.items()}
    first = next(iter(medians.values()))
    for name, value in medians.items():
        print(f"{name:12} {value:6.1f} samples/s   {value / first:.2f}x")


if __name__ == "__main__":
    main()
