"""The plan's times of several processes on this machine are near those that they take."""

import json

import pytest

from learner_times import ANSWER, ANSWERS, GROUPS, PROMPT, TIMED, seconds_of_each
from parallel_ranks import launch
from small_recipe import recipe
from tandem.config import load
from tandem.config.layout import Layout
from tandem.train.plan.axes import Axes
from tandem.train.plan.plan import plan
from tandem.train.plan.request import lengths_of
from tandem.train.plan.together import measured_together, processes_here


@pytest.mark.alone
def test_the_times_of_two_learners_on_this_machine_are_near_those_expected(tmp_path):
    """Medians, in the best of a few tries, each with rates taken right before: other work on the machine disturbs."""
    changes = {
        "model": {"new": {"hidden_size": 256, "layers": 4, "heads": 4, "kv_heads": 2, "max_positions": 256}},
        "sampling": {"prompts_per_step": GROUPS, "answers_per_prompt": ANSWERS, "max_answer_tokens": ANSWER},
        "data": {"max_prompt_tokens": PROMPT, "eval": None},
        "learner": {"tokens_per_forward": PROMPT + ANSWERS * ANSWER},
        "algorithm": {"old_logp": "recompute"},
    }
    run = load(recipe(tmp_path, **changes))
    if processes_here(run, 2) < 2:
        pytest.skip("needs two cores")
    lengths, tries = lengths_of(run, None, None), []
    for _ in range(5):
        rates = measured_together(run, lengths, 2)
        offers = plan(run, rates, count=2, per_node=2, lengths=lengths, top=10**6, offload=False).offers
        expected = {offer.axes: offer.seconds for offer in offers if not offer.samplers}
        launch(seconds_of_each, 2, tmp_path)
        found = json.loads((tmp_path / "seconds.json").read_text())
        tries.append(
            {
                f"{name}, {phase}": expected[Axes.of(Layout(**TIMED[name]), 2)][phase] / seconds
                for name, phases in found.items()
                for phase, seconds in phases.items()
            }
        )
        if all(0.8 < ratio < 1.2 for ratio in tries[-1].values()):
            return
    raise AssertionError(f"expected over measured seconds: {tries}")
