"""The documentation says what the code does: generated pages, the loop, the table of algorithms, links, examples."""

import inspect
import re
import textwrap
from pathlib import Path

import pytest
import yaml

from tandem.config import document, load, preset_names, recipes
from tandem.journal import document_metrics
from tandem.train.reinforce import reinforce

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_the_generated_pages_are_up_to_date():
    assert (ROOT / "docs" / "config.md").read_text() == document(), "run: make docs"
    assert (ROOT / "docs" / "metrics.md").read_text() == document_metrics(), "run: make docs"


def test_the_readme_shows_the_loop_whole():
    block = re.search(r"```python\n(def reinforce.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    assert block[1] == textwrap.dedent(inspect.getsource(reinforce))


def test_the_readme_lists_every_preset_with_its_choices():
    text = (ROOT / "README.md").read_text()
    for name in preset_names():
        keys = yaml.safe_load((recipes() / "algorithms" / f"{name}.yaml").read_text())
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        assert keys["advantage"] in row and keys["weight"] in row
        kl = keys["kl"]
        assert (f"{kl['coef']:g} {kl['estimator']} in the {kl['place']}" if kl["coef"] else "| none |") in row


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_keys_that_pages_set_exist(page):
    """`tandem train RECIPE a.b=c` in a page is a command that loads."""
    for line in re.findall(
        r"^\s*tandem (?:train|check|show) (recipes/\S+\.yaml)([^#\n`]*)", page.read_text(), re.MULTILINE
    ):
        recipe, overrides = line[0], [word for word in line[1].split() if "=" in word]
        missing = [] if "gsm8k" not in recipe else ["model.path=DIR", "data.train=FILE"]
        load(ROOT / recipe, [*missing, *overrides])
