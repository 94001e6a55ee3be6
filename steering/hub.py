"""Local folders and Hugging Face hub ids, with loading errors as one sentence."""

import contextlib
import os
import re
import textwrap
from collections.abc import Iterator

__all__ = ["HUB_ID", "one_sentence", "where"]

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def where(name: str) -> tuple[str, bool]:
    """Return the local path if it exists, else the hub id; and whether to load offline only.

    One short request tests the connection; the loaders would retry for half a minute.
    """
    path = os.path.expanduser(name)
    if name and os.path.exists(path):
        return path, True
    if not HUB_ID.fullmatch(name):
        shown = name if name.strip() else repr(name)
        raise ValueError(f"there is no {shown:.80}: give a folder or a hub id (owner/name)")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(name, timeout=10)
    except HfHubHTTPError:  # the hub answered; the loader will report what is wrong
        return name, False
    except Exception:  # which errors the client raises depends on its version
        return name, True
    return name, False


@contextlib.contextmanager
def one_sentence(
    what: str, path: str = "", offline: bool = False, instead: str = ""
) -> Iterator[None]:
    """Turn loading errors into one ValueError, and silence log lines and progress bars.

    path, offline: the result of `where`. If the hub is unreachable, the libraries' own reasons are
    omitted. instead: an alternative to suggest.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    loggings = (diffusers_logging, transformers_logging)
    bars = [library for library in loggings if library.is_progress_bar_enabled()]
    for library in bars:
        library.disable_progress_bar()
    try:
        yield
    except (
        OSError, ValueError, RuntimeError, TypeError, LookupError, ImportError, AttributeError,
    ) as error:  # fmt: skip
        other = f", or {instead}" if instead else ""
        if offline and isinstance(error, OSError | ValueError) and not os.path.exists(path):
            raise ValueError(
                f"cannot load {what}; the hub cannot be reached; give a folder that holds it{other}"
            ) from error
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        # an unknown class in model_index.json, or a class that lacks what is used
        unfit = isinstance(error, AttributeError)
        hint = ": it is of a kind that does not fit here; name one that does" if unfit else ""
        hint += f"; give a folder that holds it{other}" if other else ""
        raise ValueError(f"cannot load {what} ({reason}){hint}") from error
    finally:
        diffusers_logging.set_verbosity(verbosity)
        for library in bars:
            library.enable_progress_bar()
