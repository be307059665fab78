"""The models of this deployment: `models.yaml`, checked at start, and names resolved to models."""

from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tasks.errors import ConfigurationError, ModelNotFoundError
from tasks.settings import get_settings

BUILT_IN = Path(__file__).parent / "models.yaml"


class Model(BaseModel):
    """One entry of models.yaml: what clients call it, and what serves it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, description="what clients ask for; one queue per name")
    source: str = Field("", description="Hub id or path (vllm), base URL (remote); unused by sim")
    engine: Literal["vllm", "sim", "remote"] = "vllm"
    aliases: tuple[str, ...] = ()
    args: dict[str, Any] = Field({}, description="of the engine: anything `vllm serve` takes")
    env: dict[str, str] = Field({}, description="set for the engine unless already set")
    allow: tuple[str, ...] = Field(
        (), description="fields of requests that are the operator's, and open to this model's users"
    )
    slots: int = Field(64, ge=1, description="sequences that one worker runs at once")

    @field_validator("env", mode="before")
    @classmethod
    def _strings(cls, env: dict[str, Any]) -> dict[str, str]:
        return {name: str(value) for name, value in env.items()}


class Catalog:
    """All models; the first one is the default."""

    def __init__(self, models: list[Model]) -> None:
        if not models:
            raise ConfigurationError("models.yaml names no model; give it at least one")
        self.models = models
        self._by_name: dict[str, Model] = {}
        for model in models:
            for name in (model.name, *model.aliases):
                if name in self._by_name:
                    raise ConfigurationError(f"models.yaml uses the name {name!r} twice")
                self._by_name[name] = model

    @property
    def default(self) -> Model:
        return self.models[0]

    @property
    def names(self) -> dict[str, Model]:
        """Every name and alias that clients may use, in the order of models.yaml."""
        return self._by_name

    def resolve(self, name: str | None) -> Model:
        """The model of that name or alias; None and '' ask for the default, as with vLLM.

        Raises:
            ModelNotFoundError: no model has that name.
        """
        if not name:
            return self.default
        try:
            return self._by_name[name]
        except KeyError:
            raise ModelNotFoundError(name, self._by_name) from None


def load_catalog(path: Path, default_source: str = "") -> Catalog:
    """Reads models.yaml; `default_source` replaces the first model.

    Raises:
        ConfigurationError: the file is missing, is no YAML, or an entry is wrong.
    """
    try:
        document = yaml.safe_load(path.read_text())
        models = [Model(**entry) for entry in document["models"]]
    except OSError as missing:
        raise ConfigurationError(f"cannot read {path}: {missing.strerror}") from None
    except ValidationError as refused:
        raise ConfigurationError(f"{path}: {_explain(refused)}") from None
    except (yaml.YAMLError, KeyError, TypeError) as broken:
        raise ConfigurationError(f"{path} must hold a list `models:` ({broken!r})") from None
    if default_source and models:
        models[0] = _replaced(models[0], default_source)
    return Catalog(models)


def _explain(refused: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in refused.errors())


def _replaced(default: Model, source: str) -> Model:
    """The default model served from another source, whose kind the source's form tells."""
    if source == "sim":
        return Model(name="sim", engine="sim", aliases=(default.name, *default.aliases))
    engine: Literal["vllm", "remote"] = (
        "remote" if source.startswith(("http://", "https://")) else "vllm"
    )
    name = "remote" if engine == "remote" else source
    return Model(name=name, source=source, engine=engine, aliases=default.aliases)


@cache
def get_catalog() -> Catalog:
    """The process's models, from `SLUICE_MODELS` or the bundled file, and `SLUICE_MODEL`."""
    settings = get_settings()
    return load_catalog(settings.models or BUILT_IN, settings.model)
