"""The software bill of materials of what deploy/lock.txt pins, as SPDX 2.3 in JSON: `make sbom`.

The same lock gives the same bytes, wherever the same packages are installed: licences, and what
needs what, are in their metadata. The time in it is SOURCE_DATE_EPOCH's.
"""

import json
import os
import re
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote
from uuid import NAMESPACE_URL, uuid5

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.install import TORCH

LOCK = Path(__file__).with_name("lock.txt")
TIME = "SOURCE_DATE_EPOCH"
PRODUCT = "sluice"
# The extras that images are made with.
SHIPPED = {"cpu", "postgres", "tracing"}
UNKNOWN = "NOASSERTION"
# Classifiers that mean one licence; `BSD License` may be any of several.
LICENCES = {
    "Apache Software License": "Apache-2.0",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}


class Pin(NamedTuple):
    """A package of the lock: one version, where it is installed, and the hashes of its files."""

    name: str
    version: str
    marker: str
    sha256: tuple[str, ...]

    @property
    def spdx_id(self) -> str:
        """Its identifier in the document: letters, digits, dots and hyphens."""
        return re.sub(r"[^A-Za-z0-9.-]", "-", f"SPDXRef-Package-python-{self.name}-{self.version}")


def main() -> None:
    """Prints the document; exits with a message where the time is no number."""
    given = os.environ.get(TIME) or "0"
    try:
        created = datetime.fromtimestamp(int(given), UTC)
    except (ValueError, OverflowError, OSError):
        sys.exit(f"sbom: {TIME}={given} is no time; give the seconds since 1970, as `date +%s`")
    print(json.dumps(describe(LOCK.read_text(encoding="utf-8"), created), indent=2))


def describe(lock: str, created: datetime) -> dict[str, Any]:
    """The SPDX document about a lock's text."""
    pins = [*read_pins(lock), *read_pins(TORCH)]
    version = metadata.version(PRODUCT)
    product = {
        **_package(PRODUCT, version),
        "SPDXID": f"SPDXRef-Package-{PRODUCT}",
        "licenseDeclared": find_licence(PRODUCT, version),
        "primaryPackagePurpose": "APPLICATION",
        "externalRefs": [_purl("generic", PRODUCT, version)],
    }
    shipped, known = reach(SHIPPED), reach({*SHIPPED, "test"})
    time = created.strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": f"{PRODUCT}-{version}",
        # Unique, as it must be, and nowhere to be fetched from.
        "documentNamespace": f"https://spdx.org/spdxdocs/{PRODUCT}-{version}-"
        f"{uuid5(NAMESPACE_URL, time + lock)}",
        "creationInfo": {"created": time, "creators": [f"Tool: {PRODUCT}-{version}"]},
        "packages": [product, *map(_describe_pin, pins)],
        "relationships": [
            _relate("SPDXRef-DOCUMENT", "DESCRIBES", product["SPDXID"]),
            *(
                _relate(pin.spdx_id, "TEST_DEPENDENCY_OF", product["SPDXID"])
                if pin.name in known - shipped
                else _relate(product["SPDXID"], "DEPENDS_ON", pin.spdx_id)
                for pin in pins
            ),
        ],
    }


def read_pins(lock: str) -> list[Pin]:
    """The packages of a lock's text in its order."""
    pins = []
    for entry in re.split(r"\n(?=\S)", lock.strip()):
        line = entry.partition("\n")[0].removesuffix("\\")
        pinned, _, marker = line.partition(";")
        name, _, version = pinned.strip().partition("==")
        hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})", entry)
        pins.append(Pin(name, version, marker.strip(), tuple(hashes)))
    return pins


def reach(extras: set[str]) -> set[str]:
    """The names of the packages that Sluice with these extras needs on a machine like this."""
    asked: dict[str, set[str]] = {}
    open_ends = [(PRODUCT, extras)]
    while open_ends:
        name, wanted = open_ends.pop()
        if name in asked and wanted <= asked[name]:
            continue
        asked[name] = asked.get(name, set()) | wanted
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        needed = [need for need in map(Requirement, lines) if _applies(need, asked[name])]
        open_ends += [(canonicalize_name(need.name), need.extras) for need in needed]
    return asked.keys() - {PRODUCT}


def _applies(need: Requirement, extras: set[str]) -> bool:
    return need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras | {""})


def find_licence(name: str, version: str) -> str:
    """The SPDX expression of a package's licence, where this very version is installed."""
    try:
        about = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return UNKNOWN
    if about.version != version:
        return UNKNOWN
    stated = [
        line
        for field in ("License-Expression", "License", "Classifier")
        for line in about.metadata.get_all(field) or []
    ]
    try:
        expression = str(canonicalize_license_expression(stated[0] if stated else ""))
    except InvalidLicenseExpression:
        return _by_classifier(stated)
    # A licence of its own, whose text SPDX wants in the document.
    return UNKNOWN if "LicenseRef-" in expression else expression


def _by_classifier(classifiers: list[str]) -> str:
    stated = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License ::")]
    # Of two, nobody knows whether both or either apply.
    return LICENCES.get(stated[0], UNKNOWN) if len(stated) == 1 else UNKNOWN


def _describe_pin(pin: Pin) -> dict[str, Any]:
    place = f", only where {pin.marker}" if pin.marker else ""
    source = f"pinned in deploy/lock.txt{place}; the checksums are of all files of this release"
    return {
        **_package(pin.name, pin.version),
        "SPDXID": pin.spdx_id,
        "sourceInfo": source if pin.sha256 else "pinned in deploy/install.py, without a checksum",
        "licenseDeclared": find_licence(pin.name, pin.version),
        "primaryPackagePurpose": "LIBRARY",
        "checksums": [{"algorithm": "SHA256", "checksumValue": value} for value in pin.sha256],
        "externalRefs": [_purl("pypi", pin.name, pin.version)],
    }


def _package(name: str, version: str) -> dict[str, Any]:
    return {
        "name": name,
        "versionInfo": version,
        "supplier": UNKNOWN,
        "downloadLocation": UNKNOWN,
        "filesAnalyzed": False,
        "licenseConcluded": UNKNOWN,
        "copyrightText": UNKNOWN,
    }


def _purl(kind: str, name: str, version: str) -> dict[str, str]:
    return {
        "referenceCategory": "PACKAGE-MANAGER",
        "referenceType": "purl",
        "referenceLocator": f"pkg:{kind}/{name}@{quote(version, safe='')}",
    }


def _relate(element: str, kind: str, related: str) -> dict[str, str]:
    return {
        "spdxElementId": element,
        "relationshipType": kind,
        "relatedSpdxElement": related,
    }


if __name__ == "__main__":
    main()
