"""Trains the demo model from scratch: `python -m gpu_worker.demo.train --out DIR`.

First the tokenizer, then a small Llama, on conversations drawn from text/. The same seed gives the
same text. A chat's loss counts only the assistant's messages, a plain text's loss everything.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim.lr_scheduler import LambdaLR
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gpu_worker.demo.corpus import Corpus, Sample
from gpu_worker.demo.texts import TEXT

SEED = 7
VOCABULARY = 2048
CONTEXT = 2048
BATCH_TOKENS = 2048
MATRIX_RATE = 4e-3
OTHER_RATE = 2e-3
WARMUP_STEPS = 30
CUT_SHARE = 0.6  # of the one-question chats, whose answers are cut after
CUT_TOKENS = 10
IGNORED = -100  # the label that cross entropy skips
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TOOL_TAGS = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<tools>",
    "</tools>",
)

Batch = tuple[torch.Tensor, torch.Tensor]


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE, so that any UTF-8 text can be encoded."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(TOOL_TAGS),
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    # Not special: a decoder that skips special tokens must still show a tool call to its parser.
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in TOOL_TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[START],
        chat_template=(TEXT / "chat_template.jinja").read_text(encoding="utf-8"),
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of about five million parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


class Encoder:
    """Turns samples into token ids and labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rng: Random) -> None:
        """Prepare the marks by which the assistant's messages are found."""
        self.tokenizer = tokenizer
        self.rng = rng
        self.header: list[int] = tokenizer.encode(f"{START}assistant\n", add_special_tokens=False)
        self.end: int = tokenizer.convert_tokens_to_ids(END)

    def encode(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Ids and labels of one sample."""
        if sample.text:
            ids = self.tokenizer.encode(sample.text + END_OF_TEXT, add_special_tokens=False)
            return ids, ids
        text = self.tokenizer.apply_chat_template(
            list(sample.messages), tools=list(sample.tools) or None, tokenize=False
        )
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        labels = self._assistant_labels(ids)
        if len(sample.messages) == 2 and not sample.tools and self.rng.random() < CUT_SHARE:
            # The hard part is to find the right answer; its rest is learnt by heart soon.
            end = next(i for i, label in enumerate(labels) if label != IGNORED) + CUT_TOKENS
            ids, labels = ids[:end], labels[:end]
        return ids, labels

    def _assistant_labels(self, ids: list[int]) -> list[int]:
        labels = [IGNORED] * len(ids)
        width = len(self.header)
        inside = False
        for i, token in enumerate(ids):
            if inside:
                labels[i] = token
                inside = token != self.end
            elif ids[i - width + 1 : i + 1] == self.header:
                inside = True
        return labels


def batches(corpus: Corpus, encoder: Encoder, rng: Random) -> Iterator[Batch]:
    """Endless batches of up to BATCH_TOKENS tokens; like lengths together, to save padding."""
    while True:
        pool = sorted(
            (encoder.encode(corpus.sample()) for _ in range(1000)), key=lambda pair: len(pair[0])
        )
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for pair in pool:
            if len(pair[0]) * (len(groups[-1]) + 1) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append(pair)
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            yield (
                torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in group]),
                torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in group]),
            )


def optimizers_for(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, where it needs half of AdamW's steps, AdamW for the rest."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else rest).append(parameter)
    return [
        torch.optim.Muon(
            matrices, lr=MATRIX_RATE, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_factor(step: int, steps: int) -> float:
    """Share of the full learning rate: linear warm-up, then linearly down to nearly zero."""
    return min((step + 1) / WARMUP_STEPS, (steps - step) / max(1, steps - WARMUP_STEPS))


def fit(model: LlamaForCausalLM, source: Iterator[Batch], steps: int) -> float:
    """Train for so many steps, print the progress, return the smoothed loss."""
    optimizers = optimizers_for(model)
    schedulers = [
        LambdaLR(optimizer, lambda step: rate_factor(step, steps)) for optimizer in optimizers
    ]
    smooth, started = math.nan, time.monotonic()
    model.train()
    for step in range(steps):
        loss = train_step(model, optimizers, next(source))
        for scheduler in schedulers:
            scheduler.step()
        smooth = loss if math.isnan(smooth) else 0.97 * smooth + 0.03 * loss
        if (step + 1) % 25 == 0 or step + 1 == steps:
            spent = time.monotonic() - started
            eta = spent / (step + 1) * (steps - step - 1)
            print(
                f"step {step + 1}/{steps} loss {smooth:.4f} {spent:.0f}s eta {eta:.0f}s", flush=True
            )
    return smooth


def train_step(
    model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], batch: Batch
) -> float:
    """One update; the matrix products run in bfloat16, which halves the time on recent CPUs."""
    ids, labels = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss: torch.Tensor = model(input_ids=ids, labels=labels).loss
    model.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return float(loss.item())


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model in bfloat16 and everything that a server needs to load it."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    stops = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = GenerationConfig(
        eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(out)
    sizes: dict[str, Any] = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    print(json.dumps(sizes))


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory to write the model to")
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    corpus = Corpus(Random(SEED))
    tokenizer = train_tokenizer(corpus.documents())
    model = build_model(tokenizer)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(corpus.topics) + len(corpus.talk)} topics, {count:,} parameters", flush=True)
    rng = Random(SEED)
    fit(model, batches(corpus, Encoder(tokenizer, rng), rng), arguments.steps)
    save(model, tokenizer, arguments.out)


if __name__ == "__main__":
    main()
