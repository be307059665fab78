"""Checks the pinned packages for known vulnerabilities in osv.dev: `make audit`.

Exit code 1 if there are any. If that database cannot be reached, it prints that and passes.
"""

import subprocess
import sys
from pathlib import Path

LOCK = Path(__file__).with_name("lock.txt")
TIMEOUT_S = 300
UNREACHABLE = ("requests.exceptions.", "ServiceError")


def main() -> int:
    """Runs pip-audit on the lock; returns the exit code."""
    options = ["--vulnerability-service", "osv", "--disable-pip", "--require-hashes"]
    options += ["--progress-spinner", "off", "--requirement", str(LOCK)]
    command = [sys.executable, "-m", "pip_audit", *options]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return _skip(f"no answer after {TIMEOUT_S} s")
    last = done.stderr.strip().rpartition("\n")[2]
    if done.returncode and last.startswith(UNREACHABLE):
        return _skip(last)
    print(done.stdout + done.stderr, end="")
    return done.returncode


def _skip(why: str) -> int:
    print(f"audit: SKIPPED, the database of vulnerabilities cannot be reached: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
