"""The upload of a folder to the Hugging Face hub, with ``huggingface_hub``'s own client."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hipa_deploy.errors import HipaError, as_line
from hipa_deploy.publish.leaks import CARD

LOGIN = "Run: hf auth login, or set HF_TOKEN."


def check_token() -> None:
    """Check that there is a token, in HF_TOKEN or where ``hf auth login`` keeps it.

    Raises:
        HipaError: there is none, or HF_HUB_OFFLINE forbids the network.

    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE"):
        raise HipaError("HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it.")
    if get_token() is None:
        raise HipaError(f"there is no token of the Hugging Face hub. {LOGIN}")


def upload(folder: Path, repo: str, *, private: bool, force: bool, api: Any = None) -> str:
    """Upload a folder as one commit; the repository is made if it is missing.

    Nobody else's commit is lost: the upload fails where the repository changed since it was looked
    at.

    Args:
        folder: what to upload.
        repo: owner/name.
        private: a new repository is private; one that exists stays as it is.
        force: a README.md that is there is replaced.
        api: a HfApi; None is one of this machine's settings.

    Returns:
        The address of the commit.

    Raises:
        HipaError: the repository has a README.md and ``force`` is False, or the hub refuses or
            cannot be reached.

    """
    from huggingface_hub import HfApi

    api = api or HfApi()
    remedy = f"Check the name, the network and the token's write access. {LOGIN}"
    with as_line(f"{repo} cannot be uploaded", remedy):
        api.create_repo(repo, private=private, exist_ok=True)
        found = api.model_info(repo)
        names = {file.rfilename for file in found.siblings or ()}
        if CARD in names and not force:
            raise HipaError(
                f"{repo} has a {CARD} already. Add --force to replace it, or choose another --repo."
            )
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Upload with hipa-publish",
            parent_commit=found.sha,
        )
    return str(commit.commit_url)
