"""docs/kubernetes.md: the files that it has one write, with the manifests that they name."""

import os
import re
import shlex
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from deploy.operate import autoscale
from tests.kustomize import Resource, named, render
from tests.test_kubernetes import (
    DOCS,
    OVERLAYS,
    ROOT,
    assert_valid,
    of_kind,
    parts,
    policies,
    selected,
)


def selecting(resources: list[Resource], kind: str, labels: dict[str, str]) -> list[str]:
    """The names of those of that kind whose selector takes what has these labels."""
    return [
        each["metadata"]["name"]
        for each in of_kind(resources, kind)
        if selected(each["spec"]["selector"], labels)
    ]


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The directory that docs/kubernetes.md has one write, with its `kustomization.yaml`."""
    for name, text in re.findall(r"```yaml\n# (\S+)\n(.*?)```", DOCS, re.DOTALL):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "sluice").symlink_to(ROOT)
    shutil.copy(OVERLAYS / "gpu" / "models.yaml", tmp_path)
    return tmp_path


def test_a_second_model_has_workers_of_its_own(example: Path) -> None:
    file = example / "kustomization.yaml"
    content = yaml.safe_load(file.read_text())
    content["resources"].append("embed")
    file.write_text(yaml.safe_dump(content))
    resources = render(example)
    assert_valid(resources)
    models = {"sluice-worker": "chat", "sluice-worker-embed": "embed"}
    first, second = (one for one in parts(resources) if one.name == "worker")
    assert second.container["command"] == ["sluice", "worker", "--model", "embed"]
    same = "image", "resources", "env", "readinessProbe"
    assert [first.container[key] for key in same] == [second.container[key] for key in same]
    for one in (first, second):
        name = one.resource["metadata"]["name"]
        for kind in ("Deployment", "PodDisruptionBudget"):
            assert selecting(resources, kind, one.labels) == [name]
        scaled = named(resources, "ScaledObject", name)["spec"]
        assert scaled["scaleTargetRef"]["name"] == name
        assert "replicas" not in one.resource["spec"]
        # Prometheus scrapes each once, under the name that the alerts expect.
        services = of_kind(resources, "Service")
        assert [
            each["metadata"]["name"]
            for each in services
            if each["spec"]["selector"].items() <= one.labels.items()
        ] == ["sluice-worker"]
        for trigger in scaled["triggers"]:
            assert trigger["metadata"]["query"].count(f'model="{models[name]}"') == 1
    assert policies(resources, first.labels) == policies(resources, second.labels)


def test_the_example_runs_images_of_ones_own(example: Path) -> None:
    resources = render(example)
    assert_valid(resources)
    images = {one.container["image"] for one in parts(resources) if one.name != "redis"}
    names = {"sluice-api", "sluice-worker-gpu"}
    assert images == {f"registry.example.com/{name}:{version('sluice')}" for name in names}


def test_a_namespace_is_reached_by_its_label(example: Path) -> None:
    """Which docs/kubernetes.md gives it, for collectors, receivers of alerts and other servers."""
    resources = render(example)
    (key, value) = re.findall(r"kubectl label namespace \S+ (\S+)=(\S+?)`", DOCS)[0]
    reached = {"to": [{"namespaceSelector": {"matchLabels": {key: value}}}]}
    allowed = {
        one.name
        for one in parts(resources)
        for policy in policies(resources, one.labels)
        if reached in policy["spec"].get("egress", [])
    }
    assert allowed == {"api", "maintenance", "worker"}


def test_the_command_for_systemd_asks_for_so_many_units(tmp_path: Path) -> None:
    (script,) = re.findall(r"```\n(#!/bin/sh\n.*?)```", DOCS, re.DOTALL)
    (line,) = re.findall(r"^sluice autoscale (.*--exec.*)$", DOCS, re.MULTILINE)
    options = autoscale.make_context("autoscale", shlex.split(line)).params
    assert "{workers}" in options["hook"]
    asked = tmp_path / "systemctl"
    asked.write_text("#!/bin/sh\necho $*\n")
    asked.chmod(0o700)
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["sh", "-c", script, "sluice-fleet", "3"]
    run = subprocess.run(command, env=path, capture_output=True, text=True, check=True)
    changes = [text.split()[0] for text in run.stdout.splitlines()]
    assert changes == ["start"] * 3 + ["stop"] * (options["max_workers"] - 3)
