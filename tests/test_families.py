"""A model of a family that Tandem does not understand is refused by its config, in words, before anything slow."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import GPT2Config, GPTNeoXConfig, OPTConfig, PreTrainedConfig

from plan_runs import planned
from small_recipe import recipe
from tandem.config import load
from tandem.errors import ConfigError
from tandem.model import describe
from tandem.model.load import REFERENCE_KEY
from tandem.model.new import new_tokenizer
from tandem.train.check import check
from tandem.train.run import train
from tiny_models import FAMILIES, VOCABULARY

FOREIGN: dict[str, tuple[PreTrainedConfig, str]] = {
    "gpt2": (
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, n_positions=64),
        "no intermediate_size and no num_key_value_heads",
    ),
    "opt": (
        OPTConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
        "no intermediate_size and no num_key_value_heads",
    ),
    "gpt_neox": (
        GPTNeoXConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
        "no num_key_value_heads",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_every_command_names_the_family_and_what_its_config_lacks(name, tmp_path, quiet, monkeypatch):
    """The folder has no weights: none is asked for."""
    config, lacking = FOREIGN[name]
    config.save_pretrained(tmp_path / name)
    new_tokenizer().save_pretrained(tmp_path / name)
    path = recipe(tmp_path, model={"new": None, "path": str(tmp_path / name)})
    said = f"model.path={tmp_path / name}: models of type {name} are not supported, for their config has {lacking}; use"
    findings = {finding.name: (finding.status, finding.text) for finding in check(load(path))}
    status, text = findings["model"]
    assert status == "problem" and text.startswith(said)
    for start in (lambda: train(load(path), quiet), lambda: planned(load(path), "h200", 8)):
        with pytest.raises(ConfigError) as refused:
            start()
        assert str(refused.value).startswith(said)
    with pytest.raises(ConfigError, match=f"reference.path=.* of type {name}"):
        describe(str(tmp_path / name), key=REFERENCE_KEY)


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_families_that_work_are_described(make: Callable, tmp_path: Path):
    config = make().config
    config.save_pretrained(tmp_path)
    assert describe(str(tmp_path)).model_type == config.model_type
