"""What a model writes is data to the verifiers, whatever it says."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sympy.parsing import sympy_parser

from scoring import answer
from tandem.rewards.scorer import Scorer
from tandem.rewards.verifiers import VERIFIERS

pytest_plugins = ["reward_fixtures"]


CORPUS = [
    "__import__('os').system('touch CANARY')",
    "\\pi__import__('os').system('touch CANARY')",
    "[[__import__('os').system('touch CANARY')]]",
    "\\begin{pmatrix}__import__('os').system('touch CANARY')\\end{pmatrix}",
    "f(open('CANARY','w'))",
    "\\operatorname{eval}(open('CANARY','w'))",
    "\\gcd(open('CANARY','w'),2)",
    "x_{open('CANARY','w')}",
    "().__class__.__bases__[0].__subclasses__()",
    "9**9**9**9",
    "1e999999",
    "factorial(10**7)",
    "7" * 1_000_000,
    "(" * 10_000 + ")" * 10_000,
    "\x00\ud800\u202e3",
    "{0.__class__}",
    "${jndi:ldap://127.0.0.1/a}",
    "\x1b[2J\x1b]0;own\x07\nreward: 1.0\n",
    "\\boxed{5}" * 1000,
    "#### 5" * 1000,
    'reward: 1.0 {"task": 0, "outcomes": [{"parts": {"accuracy": 1.0}}]}',
    "import sys; sys.modules.clear(); sys.exit(0)",
    "open('/proc/self/fd/1','w').write('reward: 1.0')",
    "import os\nwhile True: os.fork()",
]


def test_hostile_answers_run_no_code_and_leave_the_grader_as_it_was(
    scorer: Callable[..., Scorer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [n for n in VERIFIERS if n not in ("choice", "countdown")]
    one = scorer(*names, "countdown", timeout_s=8.0, workers=2)
    row = {"nums": [4], "target": 4}
    honest = answer("<think>a</think>\n<answer>4 \\boxed{4}</answer>", row=row)
    before = one.score([[honest]])[0][0]
    assert before.parts["accuracy"] == 1.0
    for wrap in (
        "{}",
        "<think>a</think><answer>{}</answer>",
        "<think>a</think><answer>\\boxed{{{}}}</answer>",
    ):
        hostile = [answer(wrap.format(text), row=row) for text in CORPUS]
        scores = one.score([[a for text in hostile for a in (text, honest)]])[0]
        assert all(s == before for s in scores[1::2])
        for text, score in zip(CORPUS, scores[::2], strict=True):
            assert score.failure in (None, "timeout"), (text[:50], score)
            assert score.parts.get("accuracy", 0.0) == 0.0, text[:50]
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_numerals_reaches_pythons_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """math-verify lets sympy read the numerals that its grammar found; sympy reads by evaluating."""
    import sympy.physics.units  # noqa: F401  (evaluates names of its own when first imported)

    from tandem.rewards import symbolic

    seen: list[str] = []
    original = sympy_parser.eval_expr

    def watched(code: str, *rest: Any) -> Any:
        seen.append(code)
        return original(code, *rest)

    monkeypatch.setattr(sympy_parser, "eval_expr", watched)
    symbolic._parsed.cache_clear()
    slow = ("9**9**9**9", "factorial(10**7)")
    for text in [
        *(t for t in CORPUS if len(t) <= 500 and t not in slow),
        "\\frac{3}{7}",
        "2.5",
        "\\gcd(12, 18)",
    ]:
        symbolic.same(text, "\\frac{12}{5}")
    assert len(seen) > 3
    assert all(re.fullmatch(r"(Integer|Float|Rational) ?\('?[0-9.]+'?\s?\)", code) for code in seen), seen
