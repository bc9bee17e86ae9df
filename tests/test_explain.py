"""The documentation of the configuration, on the console and in docs/config.md."""

from pathlib import Path

import pytest

from tandem.config import document, explain
from tandem.config.run import Run
from tandem.config.schema import keys
from tandem.errors import ConfigError

ROOT = Path(__file__).parents[1]


def test_explain_tells_type_default_bounds_and_meaning():
    said = explain("sampling.top_p")
    assert "Sample among the fewest tokens" in said
    assert "takes: number above 0 and at most 1" in said and "default: 1.0" in said
    assert "takes: one of `loss`, `reward`" in explain("algorithm.kl.place")
    assert "grpo 0.04" in explain("algorithm.kl.coef") and "rloo 0.03" in explain("algorithm.kl.coef")
    assert "none, it must be given" in explain("data.train")
    assert explain("reward.functions.0.weight") == explain("reward.functions[].weight")
    assert "sampling.prompts_per_step = 16" in explain("sampling")
    assert "reward.functions[].args" in explain("reward.functions")
    assert all(f"  {field}" in explain("") for field in Run.model_fields)


def test_explain_of_an_unknown_key_suggests_one():
    with pytest.raises(ConfigError, match=r"samplng\.top_k: unknown key\. Did you mean sampling\.top_k\?"):
        explain("samplng.top_k")


def test_every_key_can_be_explained_and_every_value_key_says_what_it_means():
    for name, key in keys().items():
        assert name in explain(name)
        assert key.section or key.doc or name == "reward.functions[].name", f"{name} has no documentation"


def test_the_configuration_reference_is_the_sections():
    written = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    fresh = "python -c 'from tandem.config import document; print(document(), end=\"\")' > docs/config.md"
    assert written == document(), f"docs/config.md is out of date: {fresh}"
    for name in keys():
        assert f"| `{name.rpartition('.')[2]}` |" in written
