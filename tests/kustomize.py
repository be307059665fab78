"""What `kubectl kustomize` makes of deploy/kubernetes, in the part of its language in use there.

Anything else is refused, so that nothing is checked that would come out otherwise. Names of
generated ConfigMaps are left without the hash of their content.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

Resource = dict[str, Any]

KNOWN = {"apiVersion", "kind", "namespace", "resources", "configMapGenerator", "patches"}
# They belong to no namespace.
CLUSTER_WIDE = {"Namespace"}


def render(overlay: Path, *components: Path) -> list[Resource]:
    """The resources of the overlay, changed by the components."""
    built = _build(overlay, [])
    for component in components:
        built = _build(component, built)
    return built


def named(resources: list[Resource], kind: str, name: str) -> Resource:
    """The only one of that kind and name."""
    (found,) = (
        each for each in resources if (each["kind"], each["metadata"]["name"]) == (kind, name)
    )
    return found


def _build(directory: Path, built: list[Resource]) -> list[Resource]:
    content = yaml.safe_load((directory / "kustomization.yaml").read_text())
    assert content.keys() <= KNOWN, f"{directory}: cannot render {content.keys() - KNOWN}"
    built = [*built]
    for name in content.get("resources", []):
        path = directory / name
        built += _build(path, []) if path.is_dir() else yaml.safe_load_all(path.read_text())
    built = deepcopy(built)
    for generator in content.get("configMapGenerator", []):
        _generate(built, generator, directory)
    for patch in content.get("patches", []):
        target = named(built, patch["target"]["kind"], patch["target"]["name"])
        for operation in yaml.safe_load(patch["patch"]):
            _apply(target, **operation)
    if namespace := content.get("namespace"):
        for resource in built:
            if resource["kind"] not in CLUSTER_WIDE:
                resource["metadata"]["namespace"] = namespace
    return built


def _generate(built: list[Resource], generator: dict[str, Any], directory: Path) -> None:
    data = {name: (directory / name).read_text() for name in generator["files"]}
    if generator.get("behavior") == "replace":
        named(built, "ConfigMap", generator["name"])["data"] = data
        return
    metadata = {"name": generator["name"]}
    built.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})


def _apply(target: Any, op: str, path: str, value: Any = None) -> None:
    """One operation of a JSON patch."""
    *parents, last = path.removeprefix("/").split("/")
    for part in parents:
        target = target[int(part) if isinstance(target, list) else part]
    if isinstance(target, list):
        assert (op, last) == ("add", "-"), f"cannot {op} {path}"
        target.append(value)
        return
    assert op == "add" or last in target, f"nothing to {op} at {path}"
    if op == "remove":
        del target[last]
    else:
        target[last] = value
