"""Upload of a LoRA to the Hugging Face hub, by the token that `hf auth login` stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tilt.wording import one_line

__all__ = ["check", "upload"]


def check(repo: str) -> None:
    """Create the repository, which others cannot see, unless it exists.

    Raises ValueError, before any work, if that is not possible.
    """
    with _masked(f"the repository {repo!r:.100} of the hub cannot be used", ValueError) as api:
        api.create_repo(repo, exist_ok=True, private=True)


def upload(folder: Path, repo: str) -> str:
    """Upload the files of a LoRA's folder, and return the address of the repository.

    Raises OSError, which says where the LoRA is kept.
    """
    kept = f"{folder} is complete, but could not be uploaded to {repo!r}"
    with _masked(kept, OSError, " with resume=true, which uploads it again") as api:
        message = "LoRA trained by tilt-diffusion"
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=message,
            allow_patterns=["*.safetensors", "*.png", "*.md"],
        )
        return f"{api.endpoint}/{repo}"


@contextmanager
def _masked(what: str, kind: type[Exception], how: str = "") -> Iterator[Any]:
    """Yield the hub's client; its errors become one sentence, which never has the token."""
    import httpx
    from huggingface_hub import HfApi, get_token

    try:
        yield HfApi()
    # a RuntimeError is what the client makes of any error while it sends a file
    except (OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
        said, token = one_line(error), get_token()
        said = said.replace(token, "***") if token else said
        raise kind(
            f"{what} ({said:.300}); log in by hf auth login, and give push_to_hub=OWNER/NAME{how}"
        ) from None
