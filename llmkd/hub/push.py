"""`--push_to_hub`: check before the first step, push after the last one."""

from __future__ import annotations

import glob
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llmkd.errors import HubError, LlmkdError
from llmkd.files import read_json, write_text
from llmkd.hub.card import model_card
from llmkd.hub.method import MethodInfo
from llmkd.hub.secrets import TOKEN_SURELY, hide, holds_token, redact

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

log = logging.getLogger(__name__)

REACH_SECONDS = 15.0  # for the first answer; the client itself would wait for ever
NO_TOKEN = "a push to the Hub needs a token and none is known"
LOGIN = ("run `hf auth login`", "or set HF_TOKEN")
DROP = "or drop --push_to_hub"

# Named kinds only: a run folder also holds checkpoints, caches and pickles, and what is not known
# here stays at home. Pickles (training_args.bin among them, which stores `hub_token`) run code when
# they are opened.
PUSHED_SUFFIXES = frozenset(
    {".safetensors", ".json", ".jinja", ".txt", ".model", ".bpe", ".vocab", ".py"}  # the model
    | {".md", ".yaml", ".yml", ".png", ".html", ".cff"}  # what is said about it
)
PUSHED_NAMES = frozenset({"metrics.jsonl", "LICENSE", "NOTICE"})
TRAINING_STATE = ("optimizer", "scheduler", "rng_state", "scaler", "trainer_state", "training_args")
MODEL_SUBFOLDERS = ("additional_chat_templates", "[0-9]_*")  # the rest are other runs, or caches

PICTURES = ("curves.png", "arms.png")  # of a recipe's models, side by side

# Weights of an earlier push that the loader would prefer to the new ones, or mix with them.
STALE_WEIGHTS = [
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
]


def check_hub(repo_id: str | None, token: str | None, *, now: bool = False) -> None:
    """Raise HubError now if a push at the end could not even begin; asks nothing of the network.

    `now`: the push is all there is to do, so leaving it out is no way out of an error. Checks the
    repository's name by the Hub's rules, that some token is known (`token`, HF_TOKEN, a saved
    login) and that the client is not set offline.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    drop = () if now else (DROP,)
    way = "name the repository: " + ("" if now else "--hub_model_id ")
    way += "<you>/<name>, of letters, digits, '-', '_', '.'"
    if not repo_id:
        raise HubError.of("hub_model_id", repo_id, "a push needs a repository", way, *drop)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise _error("hub_model_id", repo_id, str(error), way, *drop, token=token) from None
    if TOKEN_SURELY.search(repo_id.encode()) or repo_id == (token or "").strip():
        raise _error("hub_model_id", repo_id, "this is a token, not a name", way, token=repo_id)
    if constants.HF_HUB_OFFLINE:
        problem = "the Hub client is set offline, so the push would fail"
        way = "unset it and TRANSFORMERS_OFFLINE"
        raise HubError.of("HF_HUB_OFFLINE", "1", problem, way, *drop)
    # Exchanging an OIDC identity for a token is a request: believe the setting here.
    if not os.environ.get("HF_OIDC_RESOURCE") and not find_token(token):
        raise HubError.of("hub_token", None, NO_TOKEN, *LOGIN, *drop)


def push_run(
    run_folder: Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = False,
    revision: str | None = None,
    commit_message: str | None = None,
    method: MethodInfo | None = None,
) -> str:
    """Write the card into `run_folder`, make the repository if need be, upload; the commit's URL.

    `private=None` leaves it to the owner's default; a repository that exists stays as it is.
    `revision` is a branch, made if it is not there. The endpoint is HF_ENDPOINT as it is now. Goes
    up: safetensors, tokenizer, configuration, the run's reports. Stays: checkpoints, pickles,
    optimizer state, caches, folders of other runs. Without a `method` the card names that of
    run.json's kind. Call it in one process only.

    Raises HubError if the folder holds no finished model, if one of its files holds a token, or if
    the Hub refuses or cannot be reached. No token is in its text.
    """
    folder = Path(run_folder).resolve()
    _check_folder(folder)
    check_hub(repo_id, token, now=True)
    secret = find_token(token)
    if not secret:
        raise HubError.of("hub_token", None, NO_TOKEN, *LOGIN)
    _bring_pictures(folder)
    _write_card(folder, repo_id, method, revision, secret)
    files = files_to_push(folder)
    _check_no_token(folder, files, secret)

    from huggingface_hub import HfApi, constants

    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    api = HfApi(endpoint=endpoint, token=secret, library_name="llmkd")
    with explained(repo_id, folder, endpoint, secret):
        reach(api, repo_id)
        made = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if made != repo_id:  # a bare name: the Hub has put the owner before it
            _write_card(folder, made, method, revision, secret)
        if revision and revision != "main" and not revision.startswith("refs/"):
            api.create_branch(made, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or f"Upload {folder.name}, trained with llmkd",
            allow_patterns=[glob.escape(name) for name in files],
            delete_patterns=STALE_WEIGHTS,
        )
    url = redact(str(commit.commit_url), secret)
    log.info("pushed %d files to %s: %s", len(files), made, url)
    return url


def files_to_push(folder: Path) -> list[str]:
    """Paths below `folder`, with `/`, of what belongs on the Hub."""
    inside = [path for name in MODEL_SUBFOLDERS for path in folder.glob(f"{name}/*")]
    return sorted(
        path.relative_to(folder).as_posix()
        for path in [*folder.iterdir(), *inside]
        if path.is_file()
        and not path.name.startswith((".", *TRAINING_STATE))
        and (path.suffix in PUSHED_SUFFIXES or path.name in PUSHED_NAMES)
    )


def _check_folder(folder: Path) -> None:
    """Raise HubError unless `folder` is the run folder of a finished model in safetensors."""
    if not folder.is_dir():
        raise HubError.of("run_folder", str(folder), "there is no such folder")
    try:
        run = read_json(folder / "run.json")
        index = read_json(folder / "model.safetensors.index.json")
    except ValueError as error:
        problem = f"run.json or the weight index is not JSON ({error})"
        raise HubError.of("run_folder", str(folder), problem, "train the run again") from None
    if not isinstance(run, dict):
        raise HubError.of(
            "run_folder", str(folder), "it holds no run.json", "give the output folder of a run"
        )
    if run.get("status") != "done":
        raise HubError.of(
            "run_folder",
            str(folder),
            f"the run is not finished (status {run.get('status')!r} in run.json)",
            "let it finish, or start the same command again to resume it",
        )
    adapter = (folder / "adapter_config.json").is_file()
    needed = {"adapter_model.safetensors"} if adapter else {"config.json"}
    if not adapter:
        shards = index.get("weight_map", {}).values() if isinstance(index, dict) else ()
        needed |= set(shards) or {"model.safetensors"}
    missing = sorted(name for name in needed if not (folder / name).is_file())
    if missing:
        arms = [f"push one of its models: {folder / str(arm)}" for arm in run.get("arms") or ()]
        problem = f"no whole model in it: {', '.join(missing[:3])} missing"
        ways = arms or ["save the model with save_pretrained; only safetensors are pushed"]
        raise HubError.of("run_folder", str(folder), problem, *ways)


def _check_no_token(folder: Path, files: list[str], token: str) -> None:
    for name in files:
        path = folder / name
        if path.suffix != ".safetensors" and holds_token(path.read_bytes(), token):
            raise HubError.of(
                name,
                str(path),
                "a Hub token stands in this file; nothing was pushed",
                "take the token out of the file, then push again",
                "revoke it if others could read the file: https://hf.co/settings/tokens",
            )


def _bring_pictures(folder: Path) -> None:
    """Pictures of a recipe with several models lie beside them; a card needs its own copies."""
    if folder.name not in _arms_beside(folder):
        return
    for name in PICTURES:
        if (folder.parent / name).is_file():
            aside = folder / f".{name}.{os.getpid()}.part"
            shutil.copyfile(folder.parent / name, aside)
            os.replace(aside, folder / name)


def _arms_beside(folder: Path) -> list[str]:
    """The models of the recipe in the folder above, by run.json or eval.json there."""
    names: list[str] = []
    for file in ("run.json", "eval.json"):
        try:
            above = read_json(folder.parent / file)
        except ValueError:
            continue
        arms = above.get("arms") if isinstance(above, dict) else None
        names += arms if isinstance(arms, (list, dict)) else []
    return names


def _write_card(
    folder: Path, repo_id: str, method: MethodInfo | None, revision: str | None, token: str
) -> None:
    card = model_card(folder, repo_id=repo_id, method=method, revision=revision)
    write_text(folder / "README.md", hide(card, token))


def find_token(token: str | None) -> str | None:
    """`token`, else HF_TOKEN or the saved login; None if there is none."""
    from huggingface_hub import get_token

    if token and token.strip():
        return token.strip()
    try:
        return get_token()
    except Exception as error:  # an expired login that cannot be renewed raises many things
        problem = f"the saved login cannot be used: {type(error).__name__}: {_brief(error, None)}"
        raise HubError.of("hub_token", None, problem, *LOGIN) from None


def reach(api: HfApi, repo_id: str) -> None:
    """Fail within REACH_SECONDS if nobody answers; what the answer is does not matter yet."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.model_info(repo_id, timeout=REACH_SECONDS)
    except HfHubHTTPError as error:
        if error.response.status_code >= 500:
            raise


@contextmanager
def explained(repo_id: str, folder: Path, endpoint: str, token: str) -> Iterator[None]:
    """Turn whatever the client raises into one HubError. The original is cut off (`from None`):
    its text may quote a request."""
    try:
        yield
    except LlmkdError:
        raise
    except Exception as error:
        raise _explain(error, repo_id, folder, endpoint, token) from None


def _explain(error: Exception, repo_id: str, folder: Path, endpoint: str, token: str) -> LlmkdError:
    kept = f"the model is whole in {folder}; later: llmkd push {folder} {repo_id}"
    refusal = _refusal(error)
    status = refusal.response.status_code if refusal else None
    detail = _brief(refusal or error, token)
    if status == 401:
        problem = f"the Hub does not accept the token (401): {detail}"
        ways = ["make a new one at https://hf.co/settings/tokens, then `hf auth login` or HF_TOKEN"]
    elif status == 403:
        problem = f"the token may not write there (403): {detail}"
        ways = ["use a token with write access to this owner", "or another --hub_model_id"]
    elif status == 404:
        problem = f"the Hub does not find it (404): {detail}"
        ways = ["check the owner, the name and the revision", "and that the token may see it"]
    elif status is not None:
        problem, ways = f"the Hub answered {status}: {detail}", ["push again later"]
    elif _is_connection(error):
        problem = f"the connection failed: {type(error).__name__}: {detail}"
        ways = ["check the network, the proxy and HF_ENDPOINT"]
        # Weights travel over Xet where the client has it; a proxy may let only plain HTTP through.
        ways += ["or set HF_HUB_DISABLE_XET=1 to upload without Xet"] if "xet" in detail else []
        return _error("HF_ENDPOINT", endpoint, problem, *ways, kept, token=token)
    else:
        problem, ways = f"the push failed: {type(error).__name__}: {detail}", []
    return _error("hub_model_id", repo_id, problem, *ways, kept, token=token)


def _refusal(error: BaseException) -> HfHubHTTPError | None:
    """The Hub's answer behind `error`, which upload threads wrap in others; None if none came."""
    from huggingface_hub.errors import HfHubHTTPError

    link: BaseException | None = error
    while link is not None:
        if isinstance(link, HfHubHTTPError):
            return link
        link = link.__cause__ or link.__context__
    return None


def _is_connection(error: BaseException | None) -> bool:
    """Whether the network failed. Told by module: huggingface_hub 1 uses httpx, 2 uses httpx2."""
    while error is not None:
        library = type(error).__module__.split(".")[0]
        if isinstance(error, (ConnectionError, TimeoutError)) or library.startswith("http"):
            return True
        error = error.__cause__ or error.__context__
    return False


def _brief(error: BaseException, token: str | None) -> str:
    """The error's text on one line, at most 300 characters, without secrets."""
    return redact(" ".join(str(error).split()), token)[:300]


def _error(key: str, value: str, problem: str, *ways: str, token: str | None) -> LlmkdError:
    """`HubError.of` with every secret taken out of the whole text."""
    return HubError(redact(str(HubError.of(key, value, problem, *ways)), token))
