"""Send an export to the Hub: `python -m release.push artifacts/runs/demo/export user/name --private`.

Everything arrives in one commit: whoever downloads meanwhile gets the old model or the new one, never a
mixture, and a push that was killed is simply repeated.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils import parse_ratelimit_headers, validate_repo_id

from release.card import build_card, for_repository, is_empty_form, is_ours, keep_owners_words
from release.folder import (
    ANY_WEIGHTS,
    CARD_FILE,
    RUN_FILES,
    RUN_FOLDER,
    SETTINGS_FILE,
    ReleaseError,
    check_export,
    find_run,
    local_base,
    outgoing_files,
)

RETRIES = 5
FIRST_WAIT_SECONDS = 1.0  # doubles with each retry
LONGEST_WAIT_SECONDS = 600.0  # that the Hub may ask for; its limits count windows of five minutes
NETWORK_MODULES = (
    "httpx",
    "httpx2",
    "httpcore",
    "httpcore2",
)  # what the Hub's client is built on, by version
# What the command says in the end; release.background reads it.
ADDRESS_LINE = "The model is at "
# The pusher's, not the model's: who repeats the run from its settings has another repository, or none.
HUB_SETTINGS = re.compile(rb"^(push_to_hub|hub_\w+):.*\n", re.MULTILINE)
Result = TypeVar("Result")


def push(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    retries: int = RETRIES,
    say: Callable[[str], object] = print,
) -> str:
    """Upload a whole export as the Hub model `repo_id`; returns the commit's address.

    A repository that exists gets the new files; others stay, but for weights that the new ones replace. If
    the folder lies in a run directory, the run's settings, metrics and report go along into `training/`. A
    card is made if the folder has none; one of ours does not replace a person's there, and keeps the licence
    and the language that its forerunner there names. Nothing on this machine is changed.

    `token`: else the one of `hf auth login` or of the variable HF_TOKEN. What may pass (a busy Hub, a lost
    connection) is tried again `retries` times, with pauses from one second, doubling, or as long as the Hub
    asks for.

    Raises:
        ReleaseError: if the export is not whole, the name or the token is refused, or the Hub stays away.
    """
    folder = Path(folder)
    _check_name(repo_id)
    check_export(folder)

    def work(api: HfApi) -> str:
        contents, staying = _contents(folder, repo_id)
        if staying:
            say(f"Stays here: {', '.join(staying)}")
        if base := local_base(folder):
            say(f"The adapter's base is {base}, which is not on the Hub; --merge makes one model of the two.")
        return _patiently(lambda: _push_once(api, contents, repo_id, private, revision, say), retries, say)

    return _with_the_hub(work, repo_id, token)


def prepare_repository(
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    retries: int = RETRIES,
    say: Callable[[str], object] = print,
) -> None:
    """Make the repository if there is none, and see that a `push` would be allowed. Errors as `push`."""
    _check_name(repo_id)
    _with_the_hub(
        lambda api: _patiently(lambda: _open_repository(api, repo_id, private), retries, say), repo_id, token
    )


def _with_the_hub(work: Callable[[HfApi], Result], repo_id: str, token: str | None) -> Result:
    """`work` with the Hub's client; its errors in words."""
    token = token or get_token()
    if not token:
        raise ReleaseError(
            "There is no token for the Hub. Run `hf auth login`, or set HF_TOKEN to one that may write "
            "(https://huggingface.co/settings/tokens)."
        )
    api = HfApi(token=token)
    try:
        return work(api)
    except ReleaseError:
        raise
    except Exception as error:
        raise ReleaseError(
            _explain(error, repo_id, api.endpoint, token)
        ) from None  # its chain may quote headers


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise HFValidationError("the owner is missing")
    except HFValidationError as error:
        raise ReleaseError(
            f"The Hub takes no repository named {repo_id!r}: {error}. A name is user/name, of letters, "
            "digits, '-', '_' and '.'."
        ) from error


def _contents(folder: Path, repo_id: str) -> tuple[dict[str, bytes | Path], list[str]]:
    """What the repository will hold, by its path there; and the names of what is left out.

    Files of the run are read now: one that is training still writes to them.
    """
    going, staying = outgoing_files(folder)
    contents: dict[str, bytes | Path] = {path.name: path for path in going}
    run = find_run(folder)
    if CARD_FILE in contents:
        card = for_repository((folder / CARD_FILE).read_text(encoding="utf-8"), repo_id)
    else:
        card = build_card(folder, run, repo_id)
    contents[CARD_FILE] = card.encode()
    for name in RUN_FILES:
        if run is not None and (run / name).is_file():
            content = (run / name).read_bytes()
            contents[f"{RUN_FOLDER}/{name}"] = (
                HUB_SETTINGS.sub(b"", content) if name == SETTINGS_FILE else content
            )
    return contents, staying


def _push_once(
    api: HfApi,
    contents: dict[str, bytes | Path],
    repo_id: str,
    private: bool,
    revision: str | None,
    say: Callable[[str], object],
) -> str:
    """One attempt from the beginning: what has been done already is found done."""
    there = _open_repository(api, repo_id, private, revision)
    present = [file.rfilename for file in there.siblings or []]
    replaced = [name for name in present if ANY_WEIGHTS.fullmatch(name) and name not in contents]
    if replaced:
        say(f"Replaced by the new weights, so removed there: {', '.join(replaced)}")
    card = contents[CARD_FILE]
    if CARD_FILE in present and isinstance(card, bytes):
        contents = {**contents}
        if merged := _beside_the_card_there(api, repo_id, there, card.decode()):
            contents[CARD_FILE] = merged.encode()
        else:
            say(f"The card of {repo_id} was written by a person, and stays.")
            del contents[CARD_FILE]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()
    ]
    operations += [CommitOperationDelete(path_in_repo=name) for name in replaced]
    commit = api.create_commit(
        repo_id, operations, commit_message="Upload model", revision=revision or "main"
    )
    return str(commit.commit_url)


def _beside_the_card_there(api: HfApi, repo_id: str, there: ModelInfo, card: str) -> str | None:
    """The card to send, where the repository has one; None if that one is a person's, and this one is not."""
    with tempfile.TemporaryDirectory() as temporary:
        path = api.hf_hub_download(repo_id, CARD_FILE, revision=there.sha, local_dir=temporary)
        present = Path(path).read_text(encoding="utf-8", errors="replace")
    if not is_ours(card):
        return card  # written by a person, here
    if not is_ours(present) and not is_empty_form(present):
        return None
    return keep_owners_words(card, present)


def _open_repository(api: HfApi, repo_id: str, private: bool, revision: str | None = None) -> ModelInfo:
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if revision not in (None, "main"):
        api.create_branch(repo_id, branch=str(revision), exist_ok=True)
    there = api.model_info(repo_id, revision=revision)
    if private and not there.private:
        raise ReleaseError(
            f"{repo_id} exists and is public, so nothing was uploaded. Make it private in its settings on "
            "the Hub, choose another name, or do not ask for a private one."
        )
    return there


def _patiently(action: Callable[[], Result], retries: int, say: Callable[[str], object]) -> Result:
    """The action's result, tried again with growing pauses while its failures are such as may pass."""
    for attempt in range(retries):
        try:
            return action()
        except Exception as error:
            culprit = _culprit(error)
            if not _may_pass(culprit):
                raise
            wait = max(FIRST_WAIT_SECONDS * 2**attempt, _asked_to_wait(culprit))
            say(f"The Hub is not well ({_in_short(culprit)}); trying again in {wait:g} s.")
            time.sleep(wait)
    return action()


def _culprit(error: BaseException) -> BaseException:
    """The error, or that among its causes which says what happened: an answer of the Hub, or the network.

    The client wraps what happens to a large file in a RuntimeError that names the file and no reason.
    """
    cause: BaseException | None = error
    while cause is not None:
        if _status(cause) is not None or _is_network(cause):
            return cause
        cause = cause.__cause__
    return error


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _asked_to_wait(error: BaseException) -> float:
    """Seconds, by the answer's `Retry-After` or the Hub's own `RateLimit`; 0 if it does not say."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    limit, asked = parse_ratelimit_headers(headers), headers.get("Retry-After", "").strip()
    if limit is not None and limit.remaining == 0:
        return min(LONGEST_WAIT_SECONDS, limit.reset_in_seconds + 1)
    # Its other form, a date, is not what the Hub sends.
    return min(LONGEST_WAIT_SECONDS, float(asked)) if asked.isdecimal() else 0.0


def _may_pass(error: BaseException) -> bool:
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return _is_network(error) and not isinstance(error, OfflineModeIsEnabled)


def _is_network(error: BaseException) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0] in (
        NETWORK_MODULES
    )


def _in_short(error: BaseException) -> str:
    status = _status(error)
    return f"HTTP {status}" if status is not None else type(error).__name__


def _explain(error: Exception, repo_id: str, endpoint: str, token: str) -> str:
    """The failure for the model's owner; addresses lose their query, which may be a signature."""
    culprit = _culprit(error)
    said = str(error) if culprit is error else f"{error} {_in_short(culprit)}: {culprit}"
    what = re.sub(r"(https?://[^\s'\"?]+)\?[^\s'\"]*", r"\1", said).replace(token, "***").strip()
    safe = f"Nothing on this machine was changed, and {repo_id} is as it was."
    if isinstance(culprit, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, so the Hub cannot be reached. Unset it and push again. {safe}"
    status = _status(culprit)
    # Of a large file it is the storage that answers, and that does not look at the token.
    if status in (401, 403) and culprit is error:
        return (
            f"The Hub refuses this token (HTTP {status}): {what}\nIt must be allowed to write to {repo_id}: "
            f"see `hf auth whoami` and https://huggingface.co/settings/tokens. {safe}"
        )
    if status is not None or isinstance(error, HfHubHTTPError):
        return f"The Hub did not take {repo_id}: {what}\n{safe} The same command tries again."
    if _is_network(culprit):
        return (
            f"{endpoint} cannot be reached ({type(culprit).__name__}: {what}). {safe} The same command tries "
            "again; what was uploaded is not uploaded twice."
        )
    return f"The push to {repo_id} failed ({type(error).__name__}: {what}). {safe}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m release.push", description="Send an export, its card and its run's record to the Hub."
    )
    parser.add_argument("folder", type=Path, help="an export, such as artifacts/runs/demo/export")
    parser.add_argument(
        "repo_id", metavar="user/name", help="the model's name on the Hub; updated if it exists"
    )
    parser.add_argument("--private", action="store_true", help="a new repository is for its owner only")
    parser.add_argument("--revision", help="a branch of the repository, made if it is missing; main")
    parser.add_argument("--retries", type=int, default=RETRIES, help=f"of what may pass; {RETRIES}")
    arguments = parser.parse_args(argv)
    hub_logging.set_verbosity_error()  # its warnings quote signed addresses, and our own say the rest
    try:
        url = push(
            arguments.folder,
            arguments.repo_id,
            private=arguments.private,
            revision=arguments.revision,
            retries=arguments.retries,
        )
    except (ReleaseError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{ADDRESS_LINE}{url}")


if __name__ == "__main__":
    main()
