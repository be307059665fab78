"""A model with the shape of a Llama and without weights: its config, and a tokenizer of its size.

Both are the demo model's, enlarged, so that nothing is downloaded.
"""

import itertools
import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_worker.engines.sources import BUNDLED_MODEL

VOCABULARY = 128_256
CONTEXT_TOKENS = 4096
DTYPE_BYTES = 2  # bfloat16

COMMON: dict[str, Any] = {
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"},
    "vocab_size": VOCABULARY,
}
# Of Llama 3.1 8B and Llama 3.2 1B; `tiny` is the demo model's, to try the commands without a GPU.
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "1b": {
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "tiny": {},
}


def write(directory: Path, shape: str) -> dict[str, Any]:
    """Writes the model of that shape there; returns its config."""
    directory.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = _read("config.json") | COMMON | SHAPES[shape]
    documents = {
        "config.json": config,
        "generation_config.json": _read("generation_config.json"),
        "tokenizer.json": _enlarged(_read("tokenizer.json")),
        "tokenizer_config.json": _read("tokenizer_config.json") | {"model_max_length": 8192},
    }
    for name, document in documents.items():
        (directory / name).write_text(json.dumps(document, ensure_ascii=False))
    return config


def kv_bytes_per_token(config: dict[str, Any]) -> int:
    """What the KV cache holds of each token: a key and a value in every layer."""
    heads, size = config["num_key_value_heads"], config["head_dim"]
    return int(2 * config["num_hidden_layers"] * heads * size * DTYPE_BYTES)


def _read(name: str) -> Any:
    return json.loads((BUNDLED_MODEL / name).read_text())


def _enlarged(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer with a made-up word for each id that has none, so that all tokens have text.

    They have no merges: no prompt is made of them.
    """
    vocabulary = tokenizer["model"]["vocab"]
    # An added token that is not in the vocabulary gets the id that follows its last one.
    vocabulary |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    used = set(vocabulary.values())
    words = (word for word in _words() if word not in vocabulary)
    for number in range(VOCABULARY):
        if number not in used:
            vocabulary[next(words)] = number
    return tokenizer


def _words() -> Iterator[str]:
    """Four letters after what a byte-level tokenizer writes for a space."""
    return (
        "\u0120" + "".join(four) for four in itertools.product(string.ascii_lowercase, repeat=4)
    )
