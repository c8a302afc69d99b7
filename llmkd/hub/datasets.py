"""A label store on the Hub: a dataset repository that anybody can load, and `llmkd` train from."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from llmkd.errors import HubError
from llmkd.hub.push import LOGIN, NO_TOKEN, check_hub, explained, find_token, reach
from llmkd.hub.secrets import redact
from llmkd.labels import Store, verify_checksums

log = logging.getLogger(__name__)


def push_store(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = False,
    revision: str | None = None,
) -> str:
    """Read every checksum of a finished store, then upload it as a dataset; the commit's URL.

    Goes up: shards, head, manifest, card. The recipe stays, it may name local paths. A store that
    was there before is replaced, stale shards included. Raises DataError for a store that is not
    whole and HubError where the Hub refuses or cannot be reached; no token is in its text.
    """
    store = Store.open(folder)
    if problems := verify_checksums(store):
        raise HubError.of(
            "store", str(folder), f"is damaged and was not pushed: {problems[0]}",
            "run the same `llmkd label` command again: what is whole is kept",
        )  # fmt: skip
    check_hub(repo_id, token, now=True)
    secret = find_token(token)
    if not secret:
        raise HubError.of("hub_token", None, NO_TOKEN, *LOGIN)
    from huggingface_hub import HfApi, constants

    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    api = HfApi(endpoint=endpoint, token=secret, library_name="llmkd")
    with explained(repo_id, store.folder, endpoint, secret):
        reach(api, repo_id)
        made = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
        if revision and revision != "main" and not revision.startswith("refs/"):
            api.create_branch(made, branch=revision, repo_type="dataset", exist_ok=True)
        commit = api.upload_folder(
            repo_id=made,
            repo_type="dataset",
            folder_path=store.folder,
            revision=revision,
            commit_message=f"Upload soft labels {store.manifest['key']}, made with llmkd",
            allow_patterns=["README.md", "manifest.json", "head.*", "data/shard-*"],
            delete_patterns=["data/shard-*", "head.*"],
        )
    url = redact(str(commit.commit_url), secret)
    log.info("pushed %d shards to %s: %s", len(store.shards), made, url)
    return url
