"""The plan's times of several processes on this machine are near those that they take."""

import json
from statistics import mean, median

import pytest

from learner_times import ANSWER, ANSWERS, GROUPS, PROMPT, TIMED, seconds_of_each
from parallel_ranks import launch
from small_recipe import recipe
from tandem.config import load
from tandem.config.layout import Layout
from tandem.config.run import Run
from tandem.train.plan.axes import Axes
from tandem.train.plan.plan import plan
from tandem.train.plan.request import lengths_of
from tandem.train.plan.together import measured_together, processes_here

TRIES, STEADY = 5, 1.18


@pytest.mark.alone
def test_the_times_of_two_learners_on_this_machine_are_near_those_expected(tmp_path):
    """Each try lies between two measurements of the rates, and is void where these differ: other work on the machine
    disturbed it. The median of the tries counts, of as few as will do."""
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
    tries = []
    before = expected(run)
    for _ in range(TRIES):
        launch(seconds_of_each, 2, tmp_path)
        after = expected(run)
        found = json.loads((tmp_path / "seconds.json").read_text())
        if all(1 / STEADY < after[key] / before[key] < STEADY for key in found):
            tries.append({key: mean((before[key], after[key])) / seconds for key, seconds in found.items()})
            if all(0.8 < median(ratios[key] for ratios in tries) < 1.2 for key in found):
                return
        before = after
    if not tries:
        pytest.skip(f"the machine's speed changed by a factor of {STEADY} and more in each of {TRIES} tries")
    raise AssertionError(f"expected over measured seconds: {tries}")


def expected(run: Run) -> dict[str, float]:
    """Seconds of each phase of each layout, by rates that are taken now."""
    lengths = lengths_of(run, None, None)
    rates = measured_together(run, lengths, 2)
    offers = plan(run, rates, count=2, per_node=2, lengths=lengths, top=10**6, offload=False).offers
    seconds = {offer.axes: offer.seconds for offer in offers if not offer.samplers}
    return {
        f"{name}, {phase}": seconds[Axes.of(Layout(**sizes), 2)][phase]
        for name, sizes in TIMED.items()
        for phase in ("update", "old log-probs")
    }
