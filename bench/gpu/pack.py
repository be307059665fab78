"""Takes installed packages to a machine without a network, in parts of a bounded size.

    python -m bench.gpu.pack pack SITE PARTS --arch 90 --part-mib 46 --left-out FILE
    python -m bench.gpu.pack unpack PARTS SITE

SITE is a directory of packages, as `uv pip install --target` fills it. What GPUs of other
architectures would run is left out of its libraries, and the symbols of large ones too. It needs
nothing but Python and, to pack, `strip`: the other machine has neither Sluice nor its packages yet.
"""

import argparse
import io
import lzma
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.gpu import fatbin

MIB = 2**20
# Archives are made and unpacked side by side; a larger file has one of its own.
ARCHIVE_MIB = 128
STRIPPED_MIB = 16  # a small library gains little, and patched ones may break
LIBRARY = b"\x7fELF"
ARCHIVE, PART = "{:03}.tar.xz", "part-{:03}-of-{:03}"


class PackError(Exception):
    """The packages cannot be packed or unpacked."""


def pack(site: Path, parts: Path, architecture: int, part_mib: int, left_out: Sequence[str]) -> int:
    """Writes SITE's files into parts of that size; returns how many.

    Paths in it that match a pattern of `left_out` stay here.
    """
    files = [path for path in _files(site) if not _matches(path.relative_to(site), left_out)]
    if not files:
        raise PackError(f"there is nothing to pack in {site}")
    whole = io.BytesIO()
    with ProcessPoolExecutor() as processes, tarfile.open(fileobj=whole, mode="w") as outer:
        groups = list(_groups(files))
        work = ([site] * len(groups), groups, [architecture] * len(groups))
        for number, archive in enumerate(processes.map(_archive, *work)):
            _add(outer, ARCHIVE.format(number), archive, 0o644)
    return _cut(whole.getvalue(), parts, part_mib * MIB)


def unpack(parts: Path, site: Path) -> None:
    """Joins the parts, and puts the packages into SITE.

    Raises:
        PackError: a part is missing.
    """
    found = sorted(parts.glob("part-*"))
    count = int(found[0].name.rpartition("-")[2]) if found else 0
    missing = {PART.format(n, count) for n in range(count)} - {path.name for path in found}
    if missing or not found:
        raise PackError(f"{parts} lacks {', '.join(sorted(missing)) or 'all parts'}")
    whole = io.BytesIO(b"".join(path.read_bytes() for path in found))
    site.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=site.parent) as scratch, ProcessPoolExecutor() as processes:
        with tarfile.open(fileobj=whole) as outer:
            outer.extractall(scratch, filter="data")
        archives = sorted(Path(scratch).iterdir())
        list(processes.map(_extract, archives, [site] * len(archives)))


def _files(site: Path) -> list[Path]:
    """All files, but for what Python has compiled."""
    return sorted(p for p in site.rglob("*") if p.is_file() and "__pycache__" not in p.parts)


def _matches(path: Path, patterns: Iterable[str]) -> bool:
    """Whether the path, or a directory that it is in, fits one."""
    above = [path, *path.parents]
    return any(fnmatch(str(place), pattern) for place in above for pattern in patterns)


def _groups(files: Iterable[Path]) -> Iterator[list[Path]]:
    group: list[Path] = []
    held = 0
    for path in files:
        size = path.stat().st_size
        if group and held + size > ARCHIVE_MIB * MIB:
            yield group
            group, held = [], 0
        group.append(path)
        held += size
    yield group


def _archive(site: Path, files: Sequence[Path], architecture: int) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path in files:
            data = _small(path, architecture)
            _add(archive, str(path.relative_to(site)), data, path.stat().st_mode)
    return lzma.compress(packed.getvalue(), preset=6)


def _small(path: Path, architecture: int) -> bytes:
    """The file; of a library, what the machine needs of it."""
    data = path.read_bytes()
    if not data.startswith(LIBRARY):
        return data
    data = fatbin.thin(data, architecture)
    if len(data) > STRIPPED_MIB * MIB and ".so" in path.name and shutil.which("strip"):
        with TemporaryDirectory() as scratch:
            copy = Path(scratch) / "library.so"
            copy.write_bytes(data)
            done = subprocess.run(
                ["strip", "--strip-unneeded", str(copy)], capture_output=True, check=False
            )
            if done.returncode == 0:
                return copy.read_bytes()
    return data


def _add(archive: tarfile.TarFile, name: str, data: bytes, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode & 0o777
    archive.addfile(entry, io.BytesIO(data))


def _cut(data: bytes, parts: Path, size: int) -> int:
    parts.mkdir(parents=True, exist_ok=True)
    for old in parts.glob("part-*"):
        old.unlink()
    count = -(-len(data) // size)
    for number in range(count):
        piece = data[number * size : (number + 1) * size]
        (parts / PART.format(number, count)).write_bytes(piece)
    return count


def _extract(archive: Path, site: Path) -> None:
    with tarfile.open(archive) as packed:
        packed.extractall(site, filter="data")


def _patterns(file: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    return [line for line in lines if line]


def main(arguments: Sequence[str]) -> None:
    """The command line; exits with a sentence where it cannot go on."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.pack")
    commands = parser.add_subparsers(dest="command", required=True)
    to_pack = commands.add_parser("pack")
    to_pack.add_argument("site", type=Path)
    to_pack.add_argument("parts", type=Path)
    to_pack.add_argument("--arch", type=int, default=90, help="of the GPU, as in sm_90")
    to_pack.add_argument("--part-mib", type=int, default=1024)
    to_pack.add_argument("--left-out", type=Path, help="a file of patterns of paths in SITE")
    to_unpack = commands.add_parser("unpack")
    to_unpack.add_argument("parts", type=Path)
    to_unpack.add_argument("site", type=Path)
    given = parser.parse_args(arguments)
    try:
        if given.command == "unpack":
            unpack(given.parts, given.site)
            return
        left_out = _patterns(given.left_out) if given.left_out else []
        count = pack(given.site, given.parts, given.arch, given.part_mib, left_out)
    except (PackError, OSError) as failed:
        sys.exit(f"bench.gpu.pack: {failed}")
    print(f"{count} parts in {given.parts}")


if __name__ == "__main__":
    main(sys.argv[1:])
