"""The images of deploy/Dockerfile, made by buildah: without a daemon, and without a registry.

What they stand on is made from the Python of this machine. They run in a mount namespace, changed
to their root, which is read-only: what a container is, but for its network and process ids.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from ssl import get_default_verify_paths
from stat import S_ISREG
from typing import Any

import greenlet._greenlet

from bench.stack import Process

ROOT = Path(__file__).parent.parent
UV = Path(sys.executable).with_name("uv")
BASE = "localhost/python"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What instructions of the Dockerfile run, and what starts its images here.
PROGRAMS = ("sh", "env", "install", "rm", "groupadd", "useradd")
ACCOUNTS = {
    "passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "group": "root:x:0:\n",
    "shadow": "root:*:19000:0:99999:7:::\n",
    "gshadow": "root:*::\n",
}
# As Debian has them; the images' Python need not be where this machine's is.
LINKS = {"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64"}
NOT_NEEDED = ("site-packages", "dist-packages", "test", "idlelib", "ensurepip", "config-*")
# Where a user is not root, buildah makes him root of a namespace of his own.
AS_ROOT = [] if os.geteuid() == 0 else ["buildah", "unshare"]
# A container's mounts: the state directory is a volume, and /tmp as every container's.
START = """
root=$1 user=$2
shift 2
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o "mode=700,uid=${user%:*},gid=${user#*:}" tmpfs "$root/var/lib/sluice"
exec chroot --userspec="$user" "$root" env -i "$@"
"""


class Images:
    """Images in a storage of their own, and what runs from them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        storage = ["--storage-driver", "vfs", "--root", str(directory / "storage")]
        storage += ["--runroot", str(directory / "run")]
        self._command = [*AS_ROOT, "buildah", *storage]
        # What this machine has downloaded already; its hashes are checked all the same.
        self._uv_cache = _output([UV, "cache", "dir"])
        Path(self._uv_cache).mkdir(parents=True, exist_ok=True)
        self._wheels = directory / "wheels"
        self._make_base()

    def build(self, target: str, context: Path = ROOT, **arguments: str) -> str:
        """Follows the Dockerfile to a target; returns the name of the image.

        Raises:
            AssertionError: an instruction failed, with what it printed.
        """
        image = f"localhost/sluice-{target}"
        given = {"PYTHON": BASE, "VLLM": BASE, **arguments}
        self._buildah(
            *("build", "--isolation", "chroot", "--pull-never", "--format", "oci"),
            *("--file", str(ROOT / "deploy" / "Dockerfile"), "--target", target, "--tag", image),
            *("--ignorefile", str(ROOT / "deploy" / "Dockerfile.dockerignore")),
            *("--volume", f"{self._uv_cache}:{self._uv_cache}:rw"),
            *("--volume", f"{self._wheels}:/wheels:ro"),
            *(part for name, value in given.items() for part in ("--build-arg", f"{name}={value}")),
            str(context),
        )
        return image

    def config(self, image: str) -> dict[str, Any]:
        """The image's settings, with OCI's names: `User`, `Env`, `Cmd`, `Labels`."""
        about = json.loads(self._buildah("inspect", "--type", "image", image))
        return dict(about["OCIv1"]["config"])

    def mount(self, image: str) -> Path:
        """The image's files in a container of their own."""
        container = self._buildah("from", "--pull-never", image)
        return Path(self._buildah("mount", container))

    def command(self, image: str, arguments: list[str], **settings: str) -> list[str]:
        """A command line that runs something in a new container, as the image's user."""
        config = self.config(image)
        variables = [*config["Env"], *(f"{name}={value}" for name, value in settings.items())]
        start = ["unshare", "--mount", "sh", "-ec", START, "start"]
        return [*AS_ROOT, *start, str(self.mount(image)), config["User"], *variables, *arguments]

    def run(self, image: str, *arguments: str, **settings: str) -> str:
        """What a command in a new container prints."""
        return _output(self.command(image, list(arguments), **settings))

    @contextmanager
    def running(self, image: str, *arguments: str, **settings: str) -> Iterator[Process]:
        """A command that runs in a new container for as long as the block does."""
        log = self._directory / f"{image.rpartition('/')[2]}.log"
        process = Process(self.command(image, list(arguments), **settings), dict(os.environ), log)
        try:
            yield process
        finally:
            process.kill_all()

    def _make_base(self) -> None:
        files = self._directory / "base"
        _make_files(files)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", self._wheels]
        _output([*pip, "--require-hashes", "--requirement", ROOT / "deploy" / "uv.txt"])
        environment = {
            "PATH": PATH,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": "/wheels",
            "UV_CACHE_DIR": self._uv_cache,
            "SSL_CERT_FILE": str(_certificates()),
            # Where this machine is set to find packages.
            **{name: value for name, value in os.environ.items() if re.match("UV_.*INDEX", name)},
        }
        container = self._buildah("from", "scratch")
        self._buildah("add", "--chown", "0:0", container, str(files), "/")
        for name, value in environment.items():
            self._buildah("config", "--env", f"{name}={value}", container)
        self._buildah("commit", "--rm", container, BASE)
        shutil.rmtree(files)

    def _buildah(self, *arguments: str) -> str:
        return _output([*self._command, *arguments])


@contextmanager
def images(directory: Path) -> Iterator[Images]:
    """A storage with Python's image alone; all of it is removed afterwards."""
    try:
        yield Images(directory)
    finally:
        subprocess.run([*AS_ROOT, "rm", "-rf", directory], check=True)


def size_bytes(directory: Path) -> int:
    """What the files of an image take, each counted once."""
    found = (path.lstat() for path in directory.rglob("*"))
    return sum({about.st_ino: about.st_size for about in found if S_ISREG(about.st_mode)}.values())


def _make_files(root: Path) -> None:
    """The root of a small system: Python with pip, a shell, and the libraries of both."""
    for link, target in LINKS.items():
        (root / target).mkdir(parents=True)
        (root / link).symlink_to(target)
    for name in ("dev", "proc", "root", "sys", "tmp", "var/tmp", "etc", "usr/local/bin"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name, text in ACCOUNTS.items():
        (root / "etc" / name).write_text(text)
    programs = [_find_program(name) for name in PROGRAMS]
    python, library = _copy_python(root)
    modules = [*library.rglob("*.so"), Path(greenlet._greenlet.__file__)]
    for path in {*programs, *_libraries([*programs, python, UV, *modules])}:
        _copy(path, root)
    files = ("/etc/login.defs", "/etc/nsswitch.conf", "/usr/share/zoneinfo/UTC")
    for path in (*map(Path, files), _certificates()):
        _copy(path, root)


def _copy_python(root: Path) -> tuple[Path, Path]:
    """Python's program and library here, which are in /usr/local there, with pip."""
    program, library = Path(sys.executable).resolve(), Path(sysconfig.get_path("stdlib"))
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(program, root / "usr/local/bin" / name)
    for link in ("python", "python3"):
        (root / "usr/local/bin" / link).symlink_to(name)
    there = root / "usr/local/lib" / name
    unneeded = shutil.ignore_patterns(*NOT_NEEDED, "__pycache__")
    shutil.copytree(library, there, symlinks=True, ignore=unneeded)
    for file in metadata.files("pip") or []:
        if file.parts[0].startswith("pip") and file.suffix != ".pyc":
            target = there / "site-packages" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file.locate(), target)
    return program, library / "lib-dynload"


def _libraries(files: list[Path]) -> set[Path]:
    """The shared libraries that programs and modules are linked with."""
    listed = _output(["ldd", *files])
    return {Path(path) for path in re.findall(r"(/\S+) \(0x", listed)}


def _find_program(name: str) -> Path:
    found = shutil.which(name, path=PATH)
    assert found, f"no {name} here"
    return Path(found)


def _certificates() -> Path:
    """Those that this machine trusts."""
    return Path(get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt")


def _copy(path: Path, root: Path) -> None:
    target = root / path.relative_to("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)


def _output(command: list[Any]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout.strip()
