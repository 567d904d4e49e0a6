"""``echo4o push FOLDER user/name``: a verified model folder becomes one commit of a hub repository.

Large files are stored first, one by one; then one commit names them all. So nobody ever sees half a model there, and a
push that broke off goes on where it was: what the hub has stored already is not sent again. (`upload_folder` of the
hub's library makes several commits where it streams, and decides itself which files it takes.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from echo4o.checkpoint.folders import MARKER, CheckpointError
from echo4o.checkpoint.hf.card import CARD, is_generated, named
from echo4o.checkpoint.hf.findings import Finding, exit_status, report_text
from echo4o.checkpoint.hub import TRAINING_STATE, patiently, size_text
from echo4o.checkpoint.hub_errors import (
    first_cause,
    holds_token,
    in_words,
    is_of_the_hub,
    quiet_requests,
    without_token,
)
from echo4o.checkpoint.inventory import OPTIMIZER, TRAINING

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN = "main"
#: Links to such files are followed.
LINKED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.md", "*.png")
TEXTS = (".json", ".md", ".txt", ".py", ".yaml", ".jinja")
#: Beside hidden files: left out wherever they lie.
LEFT_OUT = ("*.partial", "*.tmp", "*.lock", "__pycache__", *TRAINING_STATE)
#: Bytes from which a file is sent before the commit.
LARGE = 1_000_000
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Upload:
    """A file and its path in the repository.

    Attributes:
        content: sent instead of the file's.
    """

    path: Path
    name: str
    size: int
    content: bytes | None = None


@dataclass(frozen=True)
class Pushed:
    """What a push did, or would do.

    Attributes:
        url: of the model on the hub.
        uploads: the files, the card first.
        commit: None after a dry run.
    """

    url: str
    uploads: tuple[Upload, ...]
    commit: str | None = None


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    mirror: bool = False,
    endpoint: str | None = None,
    token: str | None = None,
    check: Callable[[Path], Sequence[Finding]] | None = None,
    say: Callable[[str], None] = print,
) -> Pushed:
    """Verify a folder, list what is sent, create the repository if need be, and commit.

    Args:
        repository: ``user/name``.
        private: of a repository that is created here.
        revision: branch, created if need be; None is ``main``.
        message: of the commit.
        dry_run: stop after the list; nothing is asked of the hub.
        force: send it although verification found errors.
        mirror: remove the repository's other files in the same commit.
        endpoint: of another hub; None is the library's, HF_ENDPOINT.
        token: None takes the login's (`hf auth login`) or HF_TOKEN.
        check: returns findings (`echo4o.checkpoint.hf.verify.verify` by default).
        say: where lines for people go.

    Raises:
        CheckpointError: if the folder or the name is unfit, or the hub refuses; never with a token in it.
    """
    folder = Path(folder)
    _require_name(repository)
    uploads, left_out = list_uploads(folder)
    uploads = [_with_name(upload, repository) if upload.name == CARD else upload for upload in uploads]
    _verify(folder, check, force, say)
    branch = revision or MAIN
    say(describe(uploads, left_out, f"{repository} (branch {branch})"))
    from huggingface_hub import HfApi, constants, get_token

    url = f"{endpoint or constants.ENDPOINT}/{repository}" + ("" if branch == MAIN else f"/tree/{branch}")
    if dry_run:
        say(f"dry run: nothing was sent to {url}")
        return Pushed(url, tuple(uploads))
    token = token or get_token()
    if not token:
        raise CheckpointError(
            "nobody is logged in to the hub: run `hf auth login`, or set HF_TOKEN (a token that may write)"
        )
    api = HfApi(endpoint=endpoint, token=token)
    try:
        with quiet_requests():
            there = _prepare(api, repository, branch, private, say)
            uploads = _keep_edited_card(api, repository, branch, uploads, there, say)
            others = sorted(set(there) - {upload.name for upload in uploads} - {".gitattributes", CARD})
            _say_of_others(others, mirror, say)
            commit = _send(api, repository, branch, uploads, others if mirror else [], message, say)
    except CheckpointError:
        raise
    except Exception as error:
        if not (is_of_the_hub(error) or isinstance(error, RuntimeError | ValueError)):
            raise
        # Without its cause: requests with the token hang on those.
        cause = first_cause(error)
        text = _taken(cause, repository) or in_words(cause, repository, branch, to_write=True)
        raise CheckpointError(without_token(f"not pushed: {text}", token)) from None
    say(url)
    return Pushed(url, tuple(uploads), commit)


def _require_name(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not _NAME.fullmatch(repository):
        raise CheckpointError(f"{repository!r} is no name of a repository: pass user/name, or organisation/name")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise CheckpointError(f"{repository!r} is no name of a repository: {error}") from None


# ---------------------------------------------------------------- what is sent


def list_uploads(folder: Path) -> tuple[list[Upload], list[str]]:
    """(files to send, the card first; names of those that stay here).

    Raises:
        CheckpointError: if there is nothing to send, or it is no folder for others.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; pass one that `echo4o export` has written")
    if found := [name for name in (TRAINING, MARKER, OPTIMIZER, "ranks") if (folder / name).exists()]:
        raise CheckpointError(
            f"{folder} is a training checkpoint ({', '.join(found)}), not a model for others: run `echo4o export "
            f"{folder} --out DIR` and push DIR"
        )
    uploads, left_out = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path} is a link to nothing; remove it, or export the folder again")
        if path.is_dir():
            if path.is_symlink():
                left_out.append(f"{name}/ (a link)")
            continue
        if _stays(path, name):
            left_out.append(name)
        else:
            uploads.append(Upload(path, name, path.stat().st_size))
    if not any(upload.name.endswith(".safetensors") for upload in uploads):
        raise CheckpointError(f"{folder} holds no weights (*.safetensors); pass one that `echo4o export` has written")
    for upload in uploads:
        if upload.path.suffix in TEXTS and holds_token(upload.path.read_text(encoding="utf-8", errors="replace")):
            raise CheckpointError(f"{upload.path} holds what looks like an access token; take it out, and revoke it")
    return sorted(uploads, key=lambda upload: (upload.name != CARD, upload.name)), left_out


def _with_name(card: Upload, repository: str) -> Upload:
    """The card with the repository's name in its commands."""
    content = named(card.path.read_text(encoding="utf-8"), repository).encode()
    return replace(card, size=len(content), content=content)


def _stays(path: Path, name: str) -> bool:
    parts = name.split("/")
    if any(part.startswith(".") or fnmatch(part, pattern) for part in parts for pattern in LEFT_OUT):
        return True
    if any(fnmatch(name, pattern) for pattern in LEFT_OUT):
        return True
    return path.is_symlink() and not any(fnmatch(path.name, pattern) for pattern in LINKED)


def describe(uploads: Sequence[Upload], left_out: Iterable[str], where: str) -> str:
    """The list of files, a line each."""
    total = size_text(sum(upload.size for upload in uploads))
    lines = [f"{where}: {len(uploads)} files, {total}"]
    lines += [f"  {size_text(upload.size):>12}  {upload.name}" for upload in uploads]
    if left_out := list(left_out):
        lines.append(f"  not sent: {', '.join(left_out[:10])}{' …' if len(left_out) > 10 else ''}")
    if uploads[0].name != CARD:
        lines.append(f"  there is no {CARD}: people will not learn what this is")
    return "\n".join(lines)


def _verify(
    folder: Path, check: Callable[[Path], Sequence[Finding]] | None, force: bool, say: Callable[[str], None]
) -> None:
    if check is None:
        from echo4o.checkpoint.hf.verify import verify

        check = verify
    findings = [finding for finding in check(folder) if finding.level != "note"]
    report = report_text(findings, folder).rstrip()
    if exit_status(findings) and not force:
        raise CheckpointError(f"not pushed, as verification finds errors (--force sends it all the same)\n{report}")
    say(report)


# ---------------------------------------------------------------- the hub


def _prepare(api: HfApi, repository: str, branch: str, private: bool, say: Callable[[str], None]) -> list[str]:
    """Repository and branch are there afterwards; the files of the branch."""
    patiently(lambda: api.create_repo(repository, private=private, exist_ok=True))
    if branch != MAIN:
        patiently(lambda: api.create_branch(repository, branch=branch, exist_ok=True))
    info = patiently(lambda: api.model_info(repository, revision=branch))
    if private and not info.private:
        say(f"{repository} was there before, and is public: make it private in its settings on the hub")
    return [file.rfilename for file in info.siblings or []]


def _keep_edited_card(
    api: HfApi,
    repository: str,
    branch: str,
    uploads: list[Upload],
    there: Iterable[str],
    say: Callable[[str], None],
) -> list[Upload]:
    """Without our card where somebody has edited the one that is there, and ours is just generated."""
    if CARD not in there or uploads[0].name != CARD:
        return uploads
    if not is_generated((uploads[0].content or b"").decode()):
        return uploads
    path = patiently(lambda: api.hf_hub_download(repository, CARD, revision=branch))
    if is_generated(Path(path).read_text(encoding="utf-8")):
        return uploads
    say(f"{CARD} stays as it was edited on the hub; to replace it, edit the one here too, or delete it there")
    return uploads[1:]


def _say_of_others(others: Sequence[str], mirror: bool, say: Callable[[str], None]) -> None:
    if not others:
        return
    names = ", ".join(others[:5]) + (" …" if len(others) > 5 else "")
    weights = any(name.endswith((".safetensors", ".index.json")) for name in others)
    trouble = "; old weights among them can be taken for the model's" if weights else ""
    say(f"removed there: {names}" if mirror else f"also there, and kept: {names} (--mirror removes them{trouble})")


def _send(
    api: HfApi,
    repository: str,
    branch: str,
    uploads: Sequence[Upload],
    removed: Sequence[str],
    message: str | None,
    say: Callable[[str], None],
) -> str:
    """Store large files one by one, then commit; returns the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    additions = {upload: CommitOperationAdd(upload.name, upload.content or str(upload.path)) for upload in uploads}
    large = sorted((upload for upload in uploads if upload.size >= LARGE), key=lambda upload: upload.size)
    for number, upload in enumerate(large, 1):
        say(f"sending {number}/{len(large)} {upload.name}, {size_text(upload.size)}")
        patiently(lambda addition=additions[upload]: api.preupload_lfs_files(repository, [addition], revision=branch))
    info = patiently(
        lambda: api.create_commit(
            repository,
            [*additions.values(), *(CommitOperationDelete(name) for name in removed)],
            commit_message=message or "Upload with echo4o push",
            revision=branch,
        )
    )
    return info.oid


def _taken(error: BaseException, repository: str) -> str | None:
    from huggingface_hub.errors import RepositoryNotFoundError

    if isinstance(error, RepositoryNotFoundError):
        return f"{repository} is taken by something that is no model (a data set or a Space); choose another name"
    return None
