"""Documentation of the configuration, made from the sections: a key for the console, all for the docs."""

from tandem.config.layers import preset, preset_names
from tandem.config.run import Run
from tandem.config.schema import Key, as_yaml, keys, plain, suggest
from tandem.errors import ConfigError

_INTRODUCTION = """\
# Configuration

Generated from the sections in `src/tandem/config`; `tandem explain KEY` prints one entry of it.

A run is one YAML file. Its layers, from the lowest to the highest:

1. `recipes/algorithms/<algorithm.preset>.yaml`, the keys of a published algorithm;
2. the files named by `extends:` (one path or a list, relative to the file that names them; later ones win);
3. the file itself;
4. overrides on the command line, `section.key=value`, the value read as YAML; `reward.functions.0.weight=2`
   reaches into a list.

A mapping is merged key by key; a list or a value replaces the one below it. Environment variables are not
read into values: secrets stay in the environment, and a value that holds one is refused. An unknown key is an
error. The result is saved as `config.yaml` in the run folder, with every key spelled out.
"""

_PRESETS = """\
## Presets

What each file of `recipes/algorithms` sets under `algorithm`; a blank cell is the default above. The head of
each file names the paper and what departs from it.
"""


_PRESETS_FIRST = """\
The defaults here and in the sections below hold where neither the preset nor the recipe sets the key; the
table of presets at the end says what each preset sets.
"""


def explain(name: str) -> str:
    """What a key means and takes, or the keys of a section; an empty name lists the sections."""
    table = keys()
    wanted = plain(name)
    if not wanted:
        tops = [k for k in table.values() if not k.parent]
        return "\n".join(["Keys of a run:", *(_line(k) for k in tops), "More: tandem explain KEY"])
    if wanted not in table:
        raise ConfigError(f"{name}: unknown key.{suggest(wanted, table)} All keys: tandem explain")
    key = table[wanted]
    lines = [wanted, f"  {key.doc}" if key.doc else "", f"  takes: {key.expected}"]
    if not key.section:
        lines.append(f"  default: {key.default}" if key.default else "  default: none, it must be given")
    elif key.default:
        lines.append(f"  default: {key.default}")
    if set_by := [f"{p} {as_yaml(v)}" for p in preset_names() for n, v in preset(p).items() if n == wanted]:
        lines.append(f"  presets: {', '.join(set_by)}")
    inside = [k for k in table.values() if k.parent.removesuffix("[]") == wanted]
    if inside:
        lines += ["  keys:", *(f"  {_line(k)}" for k in inside)]
    return "\n".join(line for line in lines if line)


def document() -> str:
    """docs/config.md: every key, one table per section, and the presets side by side."""
    table = keys()
    parts = [_INTRODUCTION, "## The run\n", (Run.__doc__ or "").strip() + "\n", _table(table, "")]
    for key in table.values():
        if key.section:
            parts.append(f"## `{key.name}`\n")
            parts.append(f"{key.doc}\n" if key.doc else "")
            parts.append(_table(table, key.name))
            if key.name == "algorithm":
                parts.append(_PRESETS_FIRST)
    parts.append(_PRESETS)
    parts.append(_preset_table())
    return "\n".join(part for part in parts if part)


def _line(key: Key) -> str:
    default = f" = {key.default}" if key.default else ""
    return f"  {key.name}{default}  ({key.expected})"


def _table(table: dict[str, Key], parent: str) -> str:
    rows = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for key in table.values():
        if key.parent.removesuffix("[]") != parent:
            continue
        if key.section:
            link = f"[section](#{key.name.replace('.', '').replace('[]', '')})"
            takes = key.expected.replace("section", link, 1)
        else:
            takes = key.expected
        leaf = key.name.rpartition(".")[2]
        default = f"`{key.default}`" if key.default else ("" if key.section else "(required)")
        rows.append(f"| `{leaf}` | {_cell(takes)} | {_cell(default)} | {_cell(key.doc)} |")
    return "\n".join(rows) + "\n"


def _preset_table() -> str:
    columns = {name: preset(name) for name in preset_names()}
    names = [k for k, key in keys().items() if k.startswith("algorithm.") and not key.section]
    used = [n for n in names if any(n in column for column in columns.values())]
    rows = [f"| key | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name in used:
        cells = [f"`{as_yaml(c[name])}`" if name in c else "" for c in columns.values()]
        rows.append(f"| `{name.removeprefix('algorithm.')}` | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
