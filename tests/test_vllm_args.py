"""What vLLM is started with: an entry's own arguments, then what suits the machine."""

import shutil
from pathlib import Path

import pytest

from gpu_worker.engines.vllm_args import (
    command_line,
    environment,
    kv_cache_bytes,
    parse,
    refuse_batch_invariance,
    tool_parser,
)
from gpu_worker.engines.vllm_process import KILLED, describe, root_cause
from tasks.contract.errors import ConfigurationError
from tasks.contract.models import Model

pytestmark = pytest.mark.timeout(600)

GIB = 2**30


def _model(**args: object) -> Model:
    return Model(name="own", source="bundled", args=args)


def test_on_a_cpu_an_engine_takes_a_part_of_the_memory_that_is_left() -> None:
    assert [kv_cache_bytes(n * GIB) / GIB for n in (2, 8, 64, 1024)] == [0.5, 2, 16, 32]
    args = parse(_model())
    assert 0 < args.kv_cache_memory_bytes <= 32 * GIB
    assert args.max_model_len == -1  # as long as the cache has room for


@pytest.mark.parametrize("own", [{"gpu-memory-utilization": 0.5}, {"kv_cache_memory_bytes": "1G"}])
def test_an_entrys_own_memory_is_left_alone(own: dict[str, object]) -> None:
    args = parse(_model(**own, max_model_len=64))
    assert args.kv_cache_memory_bytes in {None, GIB}
    assert args.max_model_len == 64


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shutil.which("g++") is None or "--enforce-eager" not in command_line(_model())
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "--enforce-eager" in command_line(_model())


@pytest.mark.parametrize(
    ("named", "loaded"), [("", "sluice"), ("own", "own,sluice"), ("sluice,own", "sluice,own")]
)
def test_a_list_of_vllms_plugins_gets_the_one_that_a_worker_needs(
    named: str, loaded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it EngineCore outlives a killed worker, and several front ends cannot begin."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert "VLLM_PLUGINS" not in environment(_model())
    assert (
        environment(_model().model_copy(update={"env": {"VLLM_PLUGINS": named}}))["VLLM_PLUGINS"]
        == loaded
    )
    monkeypatch.setenv("VLLM_PLUGINS", named)
    assert environment(_model())["VLLM_PLUGINS"] == loaded


def test_variables_of_an_entry_leave_those_alone_that_are_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    env = {"VLLM_BATCH_INVARIANT": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    own = Model(name="own", source="bundled", env=env)
    assert env.items() - environment(own).items() == {("VLLM_BATCH_INVARIANT", "1")}
    # That is not left to the environment: the entry promises it.
    asking = own.model_copy(update={"batch_invariant": True})
    assert env.items() <= environment(asking).items()


def test_on_a_cpu_batch_invariance_is_refused() -> None:
    refuse_batch_invariance(_model())
    with pytest.raises(ConfigurationError) as refused:
        refuse_batch_invariance(_model().model_copy(update={"batch_invariant": True}))
    assert str(refused.value).startswith("batch_invariant of own: vLLM has such kernels for GPUs")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"dtype": "float33"}, "argument --dtype: invalid choice: 'float33'"),
        ({"api-key": "secret"}, "--api-key would do nothing here"),
        ({"model": "other"}, "--model would do nothing here"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(args: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse(_model(**args))
    assert str(refused.value).startswith(f"the arguments of own: {sentence}")


@pytest.mark.parametrize(
    ("model_type", "template", "parser"),
    [
        ("qwen3", "{% if tools %}<tools>… <tool_call>\n{name}</tool_call>", "hermes"),
        ("qwen3_moe", "{% if tools %}<tool_call>\n<function=…>", "qwen3_coder"),
        ("llama", "{% if tools %}Environment: ipython", "llama3_json"),
        ("llama", "{% if tools %}<tool_call>", "hermes"),
        ("mistral", "{% if tools %}[TOOL_CALLS]", "mistral"),
        ("granite", "{% if tools %}<|tool_call|>", "granite"),
        ("llama", "{% for message in messages %}", None),
        ("qwen3", "{% if tools %}something of its own", None),
        ("a_new_type", "{% if tools %}<tool_call>", None),
    ],
)
def test_tool_calls_are_parsed_where_it_is_certain_how(
    model_type: str, template: str, parser: str | None
) -> None:
    assert tool_parser(model_type, template) == parser


# Errors of vLLM 0.32 in its processes, in the order in which they fail.
IN_THE_WORKER = "ValueError: Available memory on node 0 (8.31/14.71 GiB) on startup is less than"
OF_ANOTHER = (
    "Exception: WorkerProc initialization failed due to an exception in a background process. "
    "See stack trace for root cause."
)
IN_FRONT = RuntimeError(
    "Engine core initialization failed. See root cause above. "
    "Failed core proc(s): {'EngineCore': 1}"
)


@pytest.mark.parametrize(
    ("noted", "error", "cause"),
    [
        ([IN_THE_WORKER, OF_ANOTHER], IN_FRONT, IN_THE_WORKER),
        ([OF_ANOTHER], IN_FRONT, KILLED),
        ([], OSError("no such file"), "OSError: no such file"),
    ],
)
def test_the_cause_is_what_failed_first(
    tmp_path: Path, noted: list[str], error: Exception, cause: str
) -> None:
    (tmp_path / "failures").write_text("".join(f"{line}\n" for line in noted))
    assert root_cause(tmp_path / "failures", error) == cause


def test_a_cause_is_one_line_of_a_bounded_length() -> None:
    cause = describe(ValueError("Model architectures ['X'] are not supported:\n" + "name, " * 1000))
    assert cause.startswith("ValueError: Model architectures ['X'] are not supported: name, name")
    assert len(cause) < 700
    assert "\n" not in cause
