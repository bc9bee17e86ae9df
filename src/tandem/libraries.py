"""The libraries below, imported once and for all by whatever process is to hold a model."""

import atexit
import gc
import os


def import_libraries() -> None:
    """Import what every process with a model needs, without progress bars (but for downloads) or advice from below.
    Once in a process."""
    if gc.get_freeze_count():
        return
    # Set by hand, or it warns at every new process; none of ours goes on in a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Threads that wait for each other spin only briefly: beside another busy process, long spinning starves both.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # Imports make a million objects that stay: to look for garbage among them, now or later, takes a fifth of the time.
    gc.disable()
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as advice

    advice.set_verbosity_error()
    advice.disable_progress_bar()
    enable_progress_bars()
    import tandem.model  # noqa: F401

    gc.freeze()
    gc.enable()
    # Libraries that count what they made find it again when the process ends.
    atexit.register(gc.unfreeze)
