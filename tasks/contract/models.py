"""The models of this deployment: `models.yaml`, checked at start, and names resolved to models."""

import hashlib
import itertools
import random
import re
import shlex
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from tasks.contract.errors import ConfigurationError, ModelNotFoundError
from tasks.contract.settings import get_settings

WILDCARD = "*"
BUILT_IN = Path(__file__).parent / "models.yaml"


Share = Annotated[float | None, Field(gt=0, lt=1)]
Limit = Annotated[float | None, Field(gt=0, le=2_592_000, allow_inf_nan=False)]


class Timeouts(BaseModel):
    """How long jobs of a model may take, in seconds; a job that is late ends with 504."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    queue_s: Limit = None
    """Until a worker begins it."""
    first_token_s: Limit = None
    """From there to its first token; of each attempt."""
    between_tokens_s: Limit = None
    total_s: Limit = None
    """From its acceptance to its end, all attempts together."""


class Degradation(BaseModel):
    """What is done before a model's backlog is full, as a share of SLUICE_MAX_BACKLOG."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cap_at: Share = None
    """From there on answers are no longer than a key's limit `tokens_when_busy`, if it has one."""
    shed_at: Share = None
    """From there on keys with a weight below 1 get 503; halfway to the bound, those with 1."""


class Model(BaseModel):
    """One entry of models.yaml: what clients call it, and what serves it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        min_length=1,
        pattern=r"^[^\x00-\x1f\x7f]+$",
        description="what clients ask for; one queue per name",
    )
    source: str = Field("", description="Hub id or path (vllm), base URL (remote); unused by sim")
    engine: Literal["vllm", "sim", "remote"] = "vllm"
    aliases: tuple[str, ...] = Field(
        (), description="other names; one may end with *, for whatever follows"
    )
    fallbacks: tuple[str, ...] = Field(
        (), description="models that get its requests while it cannot serve them"
    )
    fallback_age_s: Limit = Field(
        None, description="age of its oldest waiting job from which on it cannot"
    )
    args: dict[str, Any] = Field({}, description="of the engine: anything `vllm serve` takes")
    env: dict[str, str] = Field({}, description="set for the engine unless already set")
    batch_invariant: bool = Field(
        False, description="vLLM on a GPU: no answer depends on what else runs at the time"
    )
    allow: tuple[str, ...] = Field(
        (), description="fields of requests that are the operator's, and open to this model's users"
    )
    timeouts: Timeouts = Field(
        Timeouts(), description="in s: queue_s, first_token_s, between_tokens_s, total_s"
    )
    degradation: Degradation = Field(
        Degradation(), description="cap_at, shed_at: shares of the most jobs that may wait"
    )
    slots: int = Field(64, ge=1, description="sequences that one worker runs at once")
    frontends: int = Field(
        0, ge=0, description="processes of one worker that feed its engine; 0: as the machine suits"
    )
    interactive_reserve: float = Field(
        0.25,
        ge=0,
        le=1,
        description="share of a worker's slots that batch jobs leave free, while chats come",
    )

    @property
    def reserved_slots(self) -> int:
        """Of each worker, which batch jobs leave free at most."""
        return int(self.slots * self.interactive_reserve)

    def share(self, place: int) -> "Model":
        """The model as one of its front ends serves it: with its part of the worker's slots."""
        slots, rest = divmod(self.slots, self.frontends)
        return self.model_copy(update={"slots": slots + (place < rest)})

    @field_validator("frontends")
    @classmethod
    def _has_slots(cls, frontends: int, given: ValidationInfo) -> int:
        if frontends > (slots := given.data.get("slots", frontends)):
            raise ValueError(f"each needs a slot, and there are {slots}")
        return frontends

    @field_validator("env", mode="before")
    @classmethod
    def _strings(cls, env: Any) -> Any:
        if not isinstance(env, dict):
            return env
        return {name: str(value) for name, value in env.items()}

    @field_validator("batch_invariant")
    @classmethod
    def _is_of_vllm(cls, is_asked: bool, given: ValidationInfo) -> bool:
        engine = given.data.get("engine", "vllm")
        if is_asked and engine != "vllm":
            raise PydanticCustomError(
                "batch_invariant",
                "only vLLM can do this, and the engine is {engine}; leave it out",
                {"engine": engine},
            )
        return is_asked


class Route(BaseModel):
    """A name whose requests are split between models, as for a canary."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f*]+$")
    split: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(min_length=1)
    """Names of models, and the weight of each."""

    def choose(self, user: object) -> str:
        """A model, by weight; the same one for a user each time."""
        share = _hash(f"{self.name}\0{user}") if user else random.random()  # noqa: S311
        names, bounds = list(self.split), list(itertools.accumulate(self.split.values()))
        return names[min(bisect(bounds, share * bounds[-1]), len(names) - 1)]


def _hash(text: str) -> float:
    """Evenly from 0 to 1."""
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class Catalog:
    """All models; the first one is the default."""

    def __init__(self, models: list[Model], routes: Sequence[Route] = ()) -> None:
        """Raises ConfigurationError: a name is there twice, or a model that is named is not."""
        self.models = models
        self.routes = {route.name: route for route in routes}
        self._by_name: dict[str, Model] = {}
        for model in models:
            for name in (model.name, *model.aliases):
                if name in self._by_name:
                    raise ConfigurationError(
                        f"two models have the name {name!r}, one perhaps by SLUICE_MODEL; "
                        "rename the other"
                    )
                self._by_name[name] = model
        patterns = [name for name in self._by_name if name.endswith(WILDCARD)]
        # The longest that fits is the closest.
        self._patterns = sorted(patterns, key=len, reverse=True)
        for route in routes:
            if route.name in self._by_name:
                raise ConfigurationError(f"the route {route.name!r} has the name of a model")
            self._by_name[route.name] = self._named(max(route.split, key=route.split.__getitem__))
        for name in [name for route in routes for name in route.split]:
            self._named(name)
        for name in [name for model in models for name in model.fallbacks]:
            self._named(name)

    def changed(self, entries: Mapping[str, dict[str, Any] | None]) -> "Catalog":
        """A catalog with these entries in place of those of their names; None takes one away.

        Raises:
            ConfigurationError: they do not go together.
        """
        models: dict[str, Any] = {model.name: model for model in self.models}
        for name, entry in entries.items():
            try:
                models[name] = entry and Model.model_validate({**entry, "name": name})
            except ValidationError as refused:
                first = refused.errors()[0]["msg"]
                raise ConfigurationError(f"the entry of {name!r} cannot be read: {first}") from None
        if not (left := [model for model in models.values() if model]):
            raise ConfigurationError("it is the only model")
        return Catalog(left, list(self.routes.values()))

    def _named(self, name: str) -> Model:
        found = next((model for model in self.models if model.name == name), None)
        if found is None:
            raise ConfigurationError(f"a route or fallback names {name!r}, which is no model")
        return found

    @property
    def default(self) -> Model:
        return self.models[0]

    @property
    def names(self) -> dict[str, Model]:
        """Every name, alias and route that clients may use, in the order of models.yaml."""
        names = self._by_name.items()
        return {name: model for name, model in names if not name.endswith(WILDCARD)}

    def resolve(self, name: str | None) -> Model:
        """The model of that name or alias; None and '' ask for the default, as with vLLM.

        Of a route, the one that gets the most.

        Raises:
            ModelNotFoundError: no model has that name.
        """
        if not name:
            return self.default
        fits = (p for p in self._patterns if name.startswith(p.removesuffix(WILDCARD)))
        model = self._by_name.get(name) or self._by_name.get(next(fits, ""))
        if model is None:
            raise ModelNotFoundError(name, self.names)
        return model


class _Document(BaseModel):
    """What models.yaml holds; other keys are for YAML's own anchors."""

    models: list[Model] = Field(min_length=1)
    routes: list[Route] = []


def load_catalog(path: Path, default_source: str = "", default_args: str = "") -> Catalog:
    """Reads models.yaml; `default_source` replaces the first model, `default_args` add to it.

    Raises:
        ConfigurationError: the file is missing, is no YAML, or an entry is wrong.
    """
    try:
        document = _read(path)
    except OSError as missing:
        raise ConfigurationError(
            f"cannot read {path} ({missing.strerror}); set SLUICE_MODELS to the path of a "
            "models.yaml, or unset it: then the bundled demo is served"
        ) from None
    models = document.models
    if default_source:
        models[0] = _replaced(models[0], default_source)
    if default_args and models:
        models[0] = _with_args(models[0], default_args)
    return Catalog(models, document.routes)


def _read(path: Path) -> _Document:
    root = None
    try:
        loader = yaml.SafeLoader(path.read_bytes())
        root = loader.get_single_node()
        document = loader.construct_document(root) if root else None
        found = _Document.model_validate(document if isinstance(document, dict) else {})
    except ValidationError as refused:
        wrong = [_Place(path, root, e["loc"]).error(_message(e)) for e in refused.errors()]
        raise ConfigurationError("; ".join(wrong)) from None
    except (yaml.YAMLError, ValueError) as broken:
        mark = getattr(broken, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        why = getattr(broken, "problem", None) or getattr(broken, "reason", None) or broken
        raise ConfigurationError(f"{where}: not YAML ({why}); mend it") from None
    _refuse_doubled(found.models, path, root)
    return found


def _message(error: ErrorDetails) -> str:
    if error["type"] == "extra_forbidden":
        return f"no model has such a field; there are {', '.join(Model.model_fields)}"
    return error["msg"]


def _refuse_doubled(models: list[Model], path: Path, root: yaml.Node | None) -> None:
    taken: dict[str, _Place] = {}
    for number, model in enumerate(models):
        fields: dict[tuple[int | str, ...], str] = {("name",): model.name}
        fields |= {("aliases", index): alias for index, alias in enumerate(model.aliases)}
        for field, name in fields.items():
            place = _Place(path, root, ("models", number, *field))
            if name in taken:
                raise ConfigurationError(
                    place.error(f"line {taken[name].line} has the name {name!r} already")
                )
            taken[name] = place


@dataclass(frozen=True)
class _Place:
    """A field of models.yaml, there or missing."""

    path: Path
    root: yaml.Node | None
    field: tuple[int | str, ...]

    def error(self, what: str) -> str:
        return f"{self.path}, line {self.line}: {'.'.join(map(str, self.field))}: {what}"

    @property
    def line(self) -> int:
        """That of the field, or of what should hold it."""
        line, node = 0, self.root
        for step in self.field:
            children = _children(node)
            if step not in children:
                break
            line, node = children[step]
        return line + 1


def _children(node: yaml.Node | None) -> dict[int | str, tuple[int, yaml.Node]]:
    """What a list or mapping of the file holds, each with its line."""
    if isinstance(node, yaml.MappingNode):
        return {key.value: (key.start_mark.line, value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return {number: (item.start_mark.line, item) for number, item in enumerate(node.value)}
    return {}


def _replaced(default: Model, source: str) -> Model:
    """The default model served from another source, whose form determines the engine."""
    engine: Literal["vllm", "sim", "remote"] = "vllm"
    name = source
    if source == "sim":
        engine = "sim"
    elif source.startswith(("http://", "https://")):
        engine, name = "remote", "remote"
    elif source.startswith((".", "/", "~")):
        name = Path(source).name or source
    aliases = [alias for alias in (default.name, *default.aliases) if alias != name]
    return Model(name=name, source=source, engine=engine, aliases=tuple(aliases))


def _with_args(default: Model, line: str) -> Model:
    """The default model with more arguments, written as on the command line of `vllm serve`.

    Raises:
        ConfigurationError: they are not flags and their values.
    """
    try:
        words = shlex.split(line)
    except ValueError as unclosed:
        raise ConfigurationError(f"SLUICE_MODEL_ARGS: {unclosed} in {line!r}") from None
    given: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in words:
        if word.startswith("--") and word != "--":
            name, has_value, value = word[2:].partition("=")
            values = given[_flag(name)] = [value] if has_value else []
        elif values is None or re.match("-[A-Za-z]", word):
            raise ConfigurationError(
                f"{word!r} is no flag of the engine; write `--NAME VALUE`, in the long form, "
                "and the model itself as `--model` before the `--`, or in SLUICE_MODEL"
            )
        else:
            values.append(word)
    args = {_flag(name): value for name, value in default.args.items()}
    args |= {
        name: values[0] if len(values) == 1 else values or True for name, values in given.items()
    }
    return default.model_copy(update={"args": args})


def _flag(name: str) -> str:
    """As vLLM does: dashes for underscores, but not in the names of a JSON value's parts."""
    flag, dot, part = name.partition(".")
    return flag.replace("_", "-") + dot + part


@cache
def get_catalog() -> Catalog:
    """The process's models: `SLUICE_MODELS` or the bundled file, the first as the settings say."""
    settings = get_settings()
    return load_catalog(settings.models or BUILT_IN, settings.model, settings.model_args)
