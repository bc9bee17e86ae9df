"""A folder of this machine, or the name of a model on the hub?"""

from difflib import get_close_matches
from pathlib import Path

_SHOWN = 3


def means_folder(path: str) -> bool:
    """Only `owner/name` can be a name on the hub, and not where `owner` is a folder here, for then the rest is a
    mistake that no look-up would mend."""
    owner, slash, name = path.partition("/")
    on_hub = bool(owner and slash and name) and "/" not in name and not path.startswith((".", "~"))
    return not on_hub or Path(owner).is_dir()


def near(folder: Path) -> str:
    """`. Near: ...` with the likeliest folders beside a missing one; nothing where none is like it."""
    try:
        names = sorted(entry.name for entry in folder.parent.iterdir() if entry.is_dir())
    except OSError:
        return ""
    likely = get_close_matches(folder.name, names, n=_SHOWN, cutoff=0.5)
    return f". Near: {', '.join(str(folder.parent / name) for name in likely)}" if likely else ""
