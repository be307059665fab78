"""What `kubectl kustomize` makes of deploy/kubernetes, in the part of its language in use there.

Anything else is refused, so that nothing is checked that would come out otherwise. Names of
generated ConfigMaps are left without the hash of their content.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

Resource = dict[str, Any]

KNOWN = {
    *("apiVersion", "kind", "namespace", "resources", "components", "configMapGenerator"),
    *("patches", "nameSuffix", "labels", "images"),
}
# What labels are added to, and to their selectors.
LABELLED = {"Deployment", "PodDisruptionBudget", "ScaledObject"}
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
    for name in content.get("components", []):
        built = _build(directory / name, built)
    built = deepcopy(built)
    for generator in content.get("configMapGenerator", []):
        _generate(built, generator, directory)
    for patch in content.get("patches", []):
        for target in _targets(built, patch["target"]):
            for operation in yaml.safe_load(patch["patch"]):
                _apply(target, **operation)
    _transform(built, content)
    return built


def _targets(built: list[Resource], target: dict[str, str]) -> list[Resource]:
    """One with that name, or all with that label; a patch for none is a mistake."""
    if "name" in target:
        return [named(built, target["kind"], target["name"])]
    label, value = target["labelSelector"].split("=")
    found = [
        each
        for each in built
        if each["kind"] == target["kind"] and each["metadata"].get("labels", {}).get(label) == value
    ]
    assert found, f"nothing to patch: {target}"
    return found


def _transform(built: list[Resource], content: dict[str, Any]) -> None:
    """What is changed in all resources, in kustomize's order."""
    for resource in built:
        metadata = resource["metadata"]
        if resource["kind"] not in CLUSTER_WIDE:
            metadata["name"] += content.get("nameSuffix", "")
            if namespace := content.get("namespace"):
                metadata["namespace"] = namespace
        for label in content.get("labels", []):
            assert label.keys() == {"pairs", "includeSelectors"}
            assert label["includeSelectors"] is True
            assert resource["kind"] in LABELLED, f"cannot label a {resource['kind']}"
            metadata.setdefault("labels", {})
            _label(resource, label["pairs"])
        for image in content.get("images", []):
            _rename_image(resource, image)


def _label(part: Any, pairs: dict[str, str]) -> None:
    """Adds labels wherever there are labels, or a selector of them."""
    if isinstance(part, list):
        for each in part:
            _label(each, pairs)
    elif isinstance(part, dict):
        for key, value in part.items():
            if key in ("labels", "matchLabels"):
                value.update(pairs)
            else:
                _label(value, pairs)


def _rename_image(resource: Resource, renaming: dict[str, str]) -> None:
    assert renaming.keys() == {"name", "newName"}
    pod = resource.get("spec", {}).get("template", {}).get("spec", {})
    for container in pod.get("containers", []):
        name, _, tag = container["image"].partition(":")
        if name == renaming["name"]:
            container["image"] = f"{renaming['newName']}:{tag}"


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
