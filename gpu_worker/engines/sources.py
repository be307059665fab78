"""Where a vLLM model's files are: bundled, in a directory, or on the Hugging Face Hub.

What is missing is reported here within seconds; vLLM itself would take a minute.
"""

import os
from importlib.util import find_spec
from pathlib import Path

from tasks.contract.errors import ConfigurationError
from tasks.contract.models import Model

BUNDLED_MODEL = Path(__file__).parents[1] / "demo" / "model"
# The file by which vLLM determines the kind of a model: in Hugging Face's format, in Mistral's.
CONFIGS = ("config.json", "params.json")
HUB_TIMEOUT_S = 5.0


def resolve_source(source: str) -> str:
    """The Hub id or directory that vLLM loads.

    Raises:
        ConfigurationError: it is a path, and nothing is there.
    """
    if source == "bundled":
        return str(BUNDLED_MODEL)
    directory = Path(source).expanduser()
    if directory.is_dir():
        return str(directory)
    if source.startswith((".", "/", "~")):
        raise ConfigurationError(
            f"there is no model at {source}; give a directory in Hugging Face's format or a Hub id"
        )
    return source


def refuse_missing(model: Model) -> None:
    """Checks for the model's files on this machine, else on the Hub.

    Raises:
        ConfigurationError: they are not there, or the Hub cannot be reached.
    """
    source = resolve_source(model.source)
    directory = Path(source)
    if directory.is_dir():
        if not any((directory / name).is_file() for name in CONFIGS):
            raise ConfigurationError(
                f"{source} holds no model (no config.json); "
                "give a directory in Hugging Face's format, or a Hub id"
            )
    elif _is_on_hub(source) and find_spec("huggingface_hub"):
        _refuse_missing_on_hub(source, model.args.get("revision"))


def _is_on_hub(source: str) -> bool:
    """Not in a bucket, nor a single file of a repository; those are left to vLLM."""
    return ":" not in source and "VLLM_USE_MODELSCOPE" not in os.environ


def _refuse_missing_on_hub(hub_id: str, revision: str | None) -> None:
    import httpx2
    from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache

    mend = "give a directory, or the id of a model that was downloaded before"
    try:
        cached = [try_to_load_from_cache(hub_id, name, revision=revision) for name in CONFIGS]
        if any(isinstance(path, str) for path in cached):
            return
        if constants.is_offline_mode():
            raise ConfigurationError(
                f"{hub_id} is no directory here, was not downloaded before, and HF_HUB_OFFLINE "
                f"forbids to download it; unset that, or {mend}"
            )
        HfApi().model_info(hub_id, revision=revision, timeout=HUB_TIMEOUT_S)
    except errors.HFValidationError:
        raise ConfigurationError(f"{hub_id} is neither a directory here nor a Hub id") from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as missing:
        what = "" if revision is None else f" in revision {revision}"
        raise ConfigurationError(
            f"{hub_id} is no directory here, and {constants.ENDPOINT} has no model of that "
            f"name{what} for you; if it is private or gated, set HF_TOKEN "
            f"({type(missing).__name__})"
        ) from None
    except (httpx2.HTTPError, OSError) as away:
        raise ConfigurationError(
            f"{hub_id} is no directory here, was not downloaded before, and {constants.ENDPOINT} "
            f"cannot be reached ({away}); {mend}"
        ) from None
