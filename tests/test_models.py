"""The models of a deployment: what SLUICE_MODEL and SLUICE_MODEL_ARGS make of the first one."""

from pathlib import Path

import pytest

from tasks.contract.errors import ConfigurationError
from tasks.contract.models import BUILT_IN, Model, load_catalog
from tasks.contract.settings import Settings


def test_a_directory_is_served_under_its_own_name(tmp_path: Path) -> None:
    directory = tmp_path / "my-model"
    model = load_catalog(BUILT_IN, str(directory)).default
    assert (model.name, model.source, model.engine) == ("my-model", str(directory), "vllm")
    assert {"sluice-demo", "gpt-3.5-turbo"} <= set(model.aliases)
    assert not model.args


def test_a_directory_is_found_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for given in ("models/mine", "./models/mine", "models/../models/mine/"):
        assert Settings(home=tmp_path, model=given).model == str(tmp_path / "models" / "mine")
    assert Settings(home=tmp_path, model="Qwen/Qwen3-0.6B").model == "Qwen/Qwen3-0.6B"


def test_a_model_may_be_called_as_an_alias_of_the_demo() -> None:
    catalog = load_catalog(BUILT_IN, "meta-llama/Meta-Llama-3-8B-Instruct")
    assert catalog.default.source == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert catalog.resolve("sluice-demo") is catalog.default


def test_flags_are_the_engines_arguments() -> None:
    line = (
        "--max_model_len 4096 --enforce-eager --dtype=float32 --max-num-seqs -1 "
        "--lora-modules a=/a b=/b --hf-overrides.rope_theta 5 --chat-template 'with spaces'"
    )
    assert load_catalog(BUILT_IN, "Qwen/Qwen3-0.6B", line).default.args == {
        "max-model-len": "4096",
        "enforce-eager": True,
        "dtype": "float32",
        "max-num-seqs": "-1",
        "lora-modules": ["a=/a", "b=/b"],
        "hf-overrides.rope_theta": "5",
        "chat-template": "with spaces",
    }


def test_flags_go_before_the_arguments_of_the_entry() -> None:
    demo, changed = load_catalog(BUILT_IN), load_catalog(BUILT_IN, "", "--max_model_len 64")
    assert changed.default.args == demo.default.args | {"max-model-len": "64"}
    assert changed.default.aliases == demo.default.aliases


def test_only_vllm_can_be_asked_for_batch_invariance(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    entry = "models:\n  - name: own\n    engine: {}\n    batch_invariant: true\n"
    file.write_text(entry.format("vllm"))
    assert load_catalog(file).default.batch_invariant
    file.write_text(entry.format("sim"))
    with pytest.raises(ConfigurationError) as refused:
        load_catalog(file)
    assert str(refused.value) == (
        f"{file}, line 4: models.0.batch_invariant: only vLLM can do this, and the engine is sim; "
        "leave it out"
    )


@pytest.mark.parametrize(
    "line", ["Qwen/Qwen3-0.6B", "-tp 2", "--dtype float32 -O3", "-- --dtype", "'"]
)
def test_what_is_no_flag_is_refused(line: str) -> None:
    with pytest.raises(ConfigurationError, match=r"no flag|closing quotation"):
        load_catalog(BUILT_IN, "", line)


def test_front_ends_share_the_slots_of_their_worker() -> None:
    model = Model(name="m", slots=11, frontends=3)
    shares = [model.share(place) for place in range(3)]
    assert [share.slots for share in shares] == [4, 4, 3]


def test_a_front_end_without_a_slot_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text("models:\n  - name: m\n    slots: 2\n    frontends: 3\n")
    with pytest.raises(ConfigurationError, match=r"line 4: models\.0\.frontends: .*there are 2"):
        load_catalog(file)
