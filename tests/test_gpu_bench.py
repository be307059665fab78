"""`python -m bench gpu`, as far as it goes without a GPU."""

import json
import os
import struct
from pathlib import Path

import pytest
from rich.console import Console
from tokenizers import Tokenizer

from bench.figures import Report
from bench.gpu import compare, fatbin, faults, model, pack, servers
from bench.gpu.fatbin import MAGIC
from bench.measurement import Load, Measurement, Percentiles
from bench.rounds import Round
from bench.stacks import StackError
from tasks.contract.models import Model
from tests.conftest import SIM

PTX, CODE = 1, 2


def container(*entries: tuple[int, int, bytes]) -> bytes:
    """A fatbin of (kind, architecture, code)."""
    body = b""
    for kind, architecture, code in entries:
        head = struct.pack("<HHIQ", kind, 0, 64, len(code)).ljust(28, b"\0")
        body += (head + struct.pack("<I", architecture)).ljust(64, b"\0") + code
    return MAGIC + struct.pack("<HHQ", 1, 16, len(body)) + body


def measured(name: str, streams: int, number: int, requests_per_s: float) -> Round:
    times = Percentiles(10, 20, 30)
    seen = Measurement(
        wall_s=1,
        completed=round(requests_per_s),
        tokens=1000,
        ttft_ms=times,
        tpot_ms=times,
        gap_ms=times,
        end_to_end_ms=times,
        client_cpu_s=0.1,
        errors={},
    )
    return Round(number, name, streams, seen, {"front end": 0.08, "client": 0.1}, 0)


def test_every_token_of_the_model_has_text_and_prompts_stay_as_they_were(tmp_path: Path) -> None:
    config = model.write(tmp_path, "8b")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"] == model.VOCABULARY
    assert len({tokenizer.id_to_token(number) for number in range(model.VOCABULARY)}) == 128_256
    demo = Tokenizer.from_file(str(model.BUNDLED_MODEL / "tokenizer.json"))
    load = Load("http://127.0.0.1", "bench", 1, 20, prompt_words=servers.PROMPT_WORDS)
    for request in load.http_requests():
        prompt = json.loads(request.partition(b"\r\n\r\n")[2])["messages"][0]["content"]
        assert tokenizer.encode(prompt).ids == demo.encode(prompt).ids
        assert len(tokenizer.encode(prompt).ids) < servers.PROMPT_TOKENS


def test_no_prompt_of_a_round_comes_in_another_one() -> None:
    rounds = [
        Load("http://127.0.0.1", "bench", 1, 50, seed=10_000 * number + 64, prompt_words=120)
        for number in range(3)
    ]
    assert len({request for load in rounds for request in load.http_requests()}) == 150


def test_an_unknown_server_is_refused() -> None:
    servers.refuse_unknown([*servers.DEFAULT, "sluice=../other", "vllm=4"])
    with pytest.raises(StackError, match="vllm=0"):
        servers.refuse_unknown(["vllm=0"])


def test_ratios_are_of_rounds_with_the_same_number() -> None:
    rounds = [
        measured("vLLM", 64, 1, 50),
        measured("Sluice", 64, 1, 40),
        measured("Sluice", 64, 2, 120),
        measured("vLLM", 64, 2, 100),
        measured("vLLM", 64, 0, 1),
        measured("Sluice", 64, 0, 1),
    ]
    table = compare.as_markdown(rounds)
    assert "| Sluice | req/s | 1.00 (0.80..1.20) |" in table
    assert "| vLLM | front end | 0.080 |" in table
    widths = {line.count("|") for line in table.split("\n\n")[0].splitlines()}
    assert len(widths) == 1


def test_only_code_for_the_architecture_is_left() -> None:
    both = container((CODE, 80, b"a" * 8), (CODE, 90, b"b" * 8), (PTX, 90, b"p" * 8))
    older = container((PTX, 80, b"c" * 8), (CODE, 100, b"d" * 8))
    library = b"before" + both + b"between" + older + MAGIC
    thinned = fatbin.thin(library, 90)
    assert len(thinned) == len(library)
    assert b"b" * 8 in thinned
    assert b"c" * 8 in thinned
    assert not any(gone * 8 in thinned for gone in (b"a", b"p", b"d"))
    assert thinned.startswith(b"before")
    assert thinned.endswith(b"between" + older.replace(b"d" * 8, bytes(8)) + MAGIC)


def test_what_is_packed_is_unpacked_elsewhere(tmp_path: Path) -> None:
    site, parts, there = tmp_path / "site", tmp_path / "parts", tmp_path / "there"
    (site / "package" / "left").mkdir(parents=True)
    (site / "package" / "__init__.py").write_text("NAME = 'package'\n")
    (site / "package" / "left" / "data").write_bytes(b"x")
    (site / "package" / "program").write_bytes(os.urandom(5 * pack.MIB // 2))
    (site / "package" / "program").chmod(0o755)
    pack.main(["pack", str(site), str(parts), "--part-mib=1"])
    assert max(part.stat().st_size for part in parts.iterdir()) <= pack.MIB
    count = pack.pack(site, parts, 90, 1, ["package/left"])
    assert count == len(list(parts.iterdir())) == 3
    pack.main(["unpack", str(parts), str(there)])
    found = {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()}
    assert found == {"package/__init__.py", "package/program"}
    program = there / "package" / "program"
    assert program.read_bytes() == (site / "package" / "program").read_bytes()
    assert os.access(program, os.X_OK)


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    (site := tmp_path / "site").mkdir()
    (site / "data").write_bytes(os.urandom(3 * pack.MIB // 2))
    pack.pack(site, tmp_path / "parts", 90, 1, [])
    (tmp_path / "parts" / "part-000-of-002").unlink()
    with pytest.raises(SystemExit, match="lacks part-000-of-002"):
        pack.main(["unpack", str(tmp_path / "parts"), str(tmp_path / "there")])


def test_the_answers_of_a_killed_worker_are_those_of_an_undisturbed_one(home: Path) -> None:
    report = Report(Console(quiet=True))
    sim = Model.model_validate(SIM | {"args": {"tokens-per-s": 40, "first-token-s": 0}})
    faults.measure(report, home, sim, streams=8, tokens=60)
    seen = {one.name: one.values.median for one in report.figures}
    assert seen["undisturbed again: the same bytes"] == 8
    assert seen["kill -9: whole"] == seen["kill -9: the same bytes"] == 8
    assert seen["kill -9: paused for more than 1 s"] >= 1
    assert not report.errors
