"""The documentation says what the code does: generated pages, the loop, the table of algorithms, links, examples."""

import inspect
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import typer
import yaml

from tandem.cli import app
from tandem.config import FREE_ON_RESUME, document, load, preset_names, recipes
from tandem.config.yaml_text import parse
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


def test_the_page_on_checkpoints_lists_what_a_resumed_run_may_change():
    told = re.search(
        r"but for these keys.*?More `steps`", (ROOT / "docs" / "checkpoints.md").read_text(), re.DOTALL
    )
    assert told is not None
    assert re.findall(r"`([\w.]+)`", told[0])[:-1] == list(FREE_ON_RESUME)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


COMMANDS = typer.main.get_command(app)


def commands(page: Path) -> list[list[str]]:
    """Words after `tandem` in each command of a page's blocks."""
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    said = [line.removeprefix("$ ").split("  ")[0] for line in lines if re.match(r"(\$ )?tandem \w", line)]
    return [shlex.split(line, comments=True)[1:] for line in said if not re.search(r"\.\.\.|\[|<", line)]


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: p.name)
def test_the_commands_of_pages_have_the_options_and_arguments_that_they_show(page):
    for name, *words in commands(page):
        if "quickstrt" in words or "samplng.top_k=2" in words:
            continue  # Shown for what they are told.
        COMMANDS.commands[name].make_context(name, list(words))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_yaml_in_pages_is_yaml(page):
    for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        assert parse(block, page.name).data


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_keys_that_pages_set_exist(page):
    """`tandem train RECIPE a.b=c` in a page is a command that loads."""
    for line in re.findall(
        r"^\s*tandem (?:train|check|show) (recipes/\S+\.yaml)([^#\n`]*)", page.read_text(), re.MULTILINE
    ):
        recipe, overrides = line[0], [word for word in line[1].split() if "=" in word]
        missing = [] if "gsm8k" not in recipe else ["model.path=DIR", "data.train=FILE"]
        load(ROOT / recipe, [*missing, *overrides])
