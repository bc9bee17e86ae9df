"""How long GSM8K's prompts are: a histogram, recorded once from the public data.

    python benchmarks/lengths.py train.jsonl     # writes benchmarks/lengths.json

A length is the number of pieces that Qwen2's pre-tokenizer cuts the prompt into, before any vocabulary; words that a
vocabulary lacks make it a little more. The prompt is the question inside the template `qwen_math_r1`.
"""

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

RECORD = Path(__file__).with_name("lengths.json")
SOURCE = "https://github.com/openai/grade-school-math, train.jsonl"
TEMPLATE = "qwen_math_r1"
CONTROL = re.compile(r"<\|im_start\|>|<\|im_end\|>")


def histogram(data: Path) -> dict[int, int]:
    """Prompts of each length in a GSM8K file."""
    from tokenizers import Regex, pre_tokenizers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    from tandem.data.template import built_in

    template = built_in(TEMPLATE)
    cut = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    counts: Counter[int] = Counter()
    with data.open(encoding="utf-8") as lines:
        for line in lines:
            prompt = template.render([{"role": "user", "content": json.loads(line)["question"]}])
            pieces = sum(len(cut.pre_tokenize_str(part)) for part in CONTROL.split(prompt) if part)
            counts[pieces + len(CONTROL.findall(prompt))] += 1
    return dict(sorted(counts.items()))


def recorded() -> dict[int, int]:
    counts = json.loads(RECORD.read_text(encoding="utf-8"))["prompts_by_length"]
    return {int(length): count for length, count in counts.items()}


def drawn(count: int, rng: random.Random) -> list[int]:
    """Lengths drawn from the recorded histogram."""
    known = recorded()
    return rng.choices(list(known), weights=list(known.values()), k=count)


def main() -> None:
    record = {"source": SOURCE, "template": TEMPLATE, "prompts_by_length": histogram(Path(sys.argv[1]))}
    RECORD.write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
