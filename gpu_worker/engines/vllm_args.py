"""What vLLM is started with: a model's entry, with defaults that suit the machine."""

import logging
import os
import shutil
from argparse import Namespace
from typing import Any, NoReturn

from gpu_worker.engines.sources import resolve_source
from tasks.contract.errors import ConfigurationError
from tasks.contract.models import Model

log = logging.getLogger(__name__)

# On a CPU vLLM takes 92 % of all memory for itself, which hardly any machine has left.
KV_CACHE_SHARE = 1 / 4
MOST_KV_CACHE_BYTES = 32 * 2**30
ALWAYS: dict[str, Any] = {"scheduling-policy": "priority"}
"""Without it vLLM could not tell chats from batch jobs."""
MEMORY_ARGS = {"gpu-memory-utilization", "kv-cache-memory-bytes"}
MEMORY_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
INVARIANCE_VARIABLE = "VLLM_BATCH_INVARIANT"
PLUGINS_VARIABLE, OWN_PLUGIN = "VLLM_PLUGINS", "sluice"
# Compute capability from which on NVIDIA GPUs have such kernels in vLLM.
INVARIANT_FROM = 80

# Flags of vLLM's HTTP server that are not of its app: Sluice's API stands in its place.
OF_THE_APP = {"middleware", "enable_flash_late_interaction"}

QWEN = {"qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"}
# Types of models, what the chat template of one that was trained on tools has, and vLLM's parser.
TOOL_PARSERS = (
    (QWEN, "<function=", "qwen3_coder"),
    (QWEN | {"llama"}, "<tool_call>", "hermes"),
    ({"llama"}, "Environment: ipython", "llama3_json"),
    ({"mistral", "mixtral", "mistral3", "ministral3"}, "[TOOL_CALLS]", "mistral"),
    ({"granite", "granitemoe"}, "<|tool_call|>", "granite"),
    ({"granitemoehybrid"}, "<tool_call>", "granite4"),
    ({"glm4_moe"}, "<arg_key>", "glm47"),
    ({"gpt_oss"}, "commentary", "openai"),
    ({"olmo3"}, "<function_calls>", "olmo3"),
)


def environment(model: Model) -> dict[str, str]:
    """That of the engine's processes: the entry's variables, unless they are set already.

    What its field `batch_invariant` asks for is not left to them. Some of vLLM's modules read it
    when they are imported. A list of plugins gets Sluice's (vllm_process.py), which it needs.
    """
    given = model.env | os.environ
    asked = {INVARIANCE_VARIABLE: "1"} if model.batch_invariant else {}
    if PLUGINS_VARIABLE in given:
        named = [name for name in given[PLUGINS_VARIABLE].split(",") if name]
        asked[PLUGINS_VARIABLE] = ",".join(dict.fromkeys([*named, OWN_PLUGIN]))
    return given | asked


def refuse_batch_invariance(model: Model) -> None:
    """Refuses `batch_invariant` where vLLM would fail, or take no notice of it.

    Raises:
        ConfigurationError: vLLM has no such kernels for this machine.
    """
    if not model.batch_invariant:
        return
    from vllm.platforms import current_platform

    is_old = current_platform.is_cuda() and not current_platform.has_device_capability(
        INVARIANT_FROM
    )
    if current_platform.is_cpu() or is_old:
        raise ConfigurationError(
            f"batch_invariant of {model.name}: vLLM has such kernels for GPUs only, NVIDIA's from "
            "compute capability 8.0 on, and this machine has none; leave it out here"
        )


def command_line(model: Model) -> list[str]:
    """The model as `vllm serve` on this machine would be given it: flags and values."""
    line = ["--model", resolve_source(model.source)]
    line += ["--served-model-name", model.name, *model.aliases]
    args = {name.replace("_", "-"): value for name, value in model.args.items()}
    for name, value in (ALWAYS | _machine_args(args) | args).items():
        flag = f"--{name}"
        if value is True:
            line.append(flag)
        elif isinstance(value, list):
            line += [flag, *map(str, value)]
        elif value is not False and value is not None:
            line += [flag, str(value)]
    return line


def _machine_args(given: dict[str, Any]) -> dict[str, Any]:
    """On a CPU: a KV cache that this machine has room for, and a context that has room in it.

    Without a compiler for C++ vLLM cannot compile the model, and would exit.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    args: dict[str, Any] = {"max-model-len": "auto"}
    if not MEMORY_ARGS & given.keys() and MEMORY_VARIABLE not in os.environ:
        args["kv-cache-memory-bytes"] = kv_cache_bytes(_available_bytes())
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        args["enforce-eager"] = True
    return args


def kv_cache_bytes(available_bytes: int) -> int:
    """The KV cache's part of the memory: the weights, and all other programs, get the rest."""
    return min(int(available_bytes * KV_CACHE_SHARE), MOST_KV_CACHE_BYTES)


def _available_bytes() -> int:
    """As the engine will see it: of its memory node, and in a container of that."""
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

    available: int = get_memory_node_info(get_allowed_cpu_list()[0].numa_node).available_memory
    return available


def parse(model: Model) -> Namespace:
    """The model's arguments, read and checked by vLLM's own parser.

    Raises:
        ConfigurationError: vLLM refuses one, or it is none of the engine's.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise ConfigurationError(f"the arguments of {model.name}: {message}")

    cli_env_setup()
    parser = make_arg_parser(Parser(prog="vllm serve", add_help=False))
    args: Namespace = parser.parse_args(command_line(model))
    _refuse_foreign(args, parser, model)
    try:
        validate_parsed_serve_args(args)
    except (KeyError, TypeError, ValueError) as refused:
        raise ConfigurationError(f"the arguments of {model.name}: {refused}") from None
    return args


def _refuse_foreign(args: Namespace, parser: Any, model: Model) -> None:
    """Refuses flags that would do nothing here, as users may rely on them, say `--api-key`."""
    from vllm.entrypoints.launchers.cli_args import BaseFrontendArgs, FrontendArgs

    servers = set(FrontendArgs.__dataclass_fields__) - set(BaseFrontendArgs.__dataclass_fields__)
    foreign = sorted(
        f"--{name.replace('_', '-')}"
        for name in (servers | {"headless", "api_server_count", "grpc"}) - OF_THE_APP
        if getattr(args, name) != parser.get_default(name)
    )
    if args.model != resolve_source(model.source):
        foreign.append("--model")
    if args.model_tag is not None:
        foreign.append(args.model_tag)
    if foreign:
        raise ConfigurationError(
            f"the arguments of {model.name}: {', '.join(foreign)} would do nothing here: Sluice "
            "names the model and has an API of its own; leave it out"
        )


def choose_tool_parser(args: Namespace, model_type: str, tokenizer: Any) -> None:
    """Sets the parser of the model's tool calls, unless its entry does, or none is known."""
    from vllm.renderers.chat_utils import load_chat_template

    template = load_chat_template(args.chat_template) or getattr(tokenizer, "chat_template", "")
    if isinstance(template, dict):
        template = template.get("tool_use")
    if args.tool_call_parser is None and (found := tool_parser(model_type, template or "")):
        args.tool_call_parser, args.enable_auto_tool_choice = found, True
        log.info("tool calls are read by vLLM's parser %s", found)


def tool_parser(model_type: str, template: str) -> str | None:
    """The parser of vLLM for tool calls of such a model; None when that is not certain."""
    from vllm.tool_parsers import ToolParserManager

    if "tools" not in template:
        return None
    known = ToolParserManager.list_registered()
    return next(
        (
            parser
            for types, mark, parser in TOOL_PARSERS
            if model_type in types and mark in template and parser in known
        ),
        None,
    )
