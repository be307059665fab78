"""Asks the demo model the held-out questions: `python -m gpu_worker.demo.check`."""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpu_worker.demo.texts import read

MODEL = Path(__file__).parent / "model"
MAX_NEW_TOKENS = 80


def answers(model_dir: Path, dtype: str, questions: list[str]) -> list[str]:
    """The model's answer to each question."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval()
    found = []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        found.append(
            tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        )
    return found


def main() -> None:
    """Print every wrong answer and the score; exit with 1 unless all are right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    items = read("questions.yaml")
    right = 0
    replies = answers(arguments.model, arguments.dtype, [item["ask"] for item in items])
    for item, reply in zip(items, replies, strict=True):
        if any(word.lower() in reply.lower() for word in item["expect"]):
            right += 1
        else:
            print(f"{item['ask']}\n  expected one of {item['expect']}\n  got: {reply}")
    print(f"{right} of {len(items)} right at {arguments.dtype}")
    sys.exit(right != len(items))


if __name__ == "__main__":
    main()
