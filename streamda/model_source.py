"""From what a user calls a model to a local folder: a path, a hub id, or a hub id whose ``-hf`` sibling is meant."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from streamda.errors import ModelError

CONFIG_FILES = ("*.json", "tokenizer*", "*.jinja", "*.model", "*.txt")
OTHER_FORMATS = ["consolidated*", "original/*"]
"""The same weights once more, in their makers' own format."""
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that has been found."""

    folder: Path
    """Local folder with config.json."""
    name: str
    """What the adapter should name as its base model: the hub id, or the local path as given."""
    revision: str | None
    """Commit on the hub; None for a local folder."""
    notices: tuple[str, ...]
    """What the user should know about how it was found."""


def find_model(model: str, revision: str | None, *, weights: bool, code: bool = False) -> ModelSource:
    """Finds a model locally or on the hub; downloads what is missing unless offline.

    Args:
        model: local folder or hub id. A repository without a transformers ``config.json`` whose ``-hf`` sibling has one
            (``meta-llama/Llama-2-13b``) stands for that sibling.
        revision: branch, tag or commit on the hub.
        weights: whether the weights are needed, or the configuration and tokenizer only.
        code: whether the model's own Python code is trusted, and so needed.

    Raises:
        ModelError: not found, gated, or offline and not in the cache.
    """
    try:
        if (source := _find_locally(model)) is not None:
            return source
    except (OSError, RuntimeError) as error:  # no permission; no such user after a ~
        raise ModelError(
            f"{model} cannot be looked into: {_reason(error)}; check --model and its permissions"
        ) from error
    repositories = [model] if model.endswith("-hf") else [model, model + "-hf"]
    reasons: list[str] = []
    is_reachable = True
    for repository in repositories:
        try:
            reason = _has_config(repository, revision, is_reachable)
        except LocalEntryNotFoundError as error:
            is_reachable = False  # found out by half a minute of attempts; the sibling may still be in the cache
            if repository != repositories[-1]:
                continue
            raise ModelError(_offline(repositories)) from error
        if reason is None:
            notices = () if repository == model else (f"{model} is not in transformers format; using {repository}",)
            folder = _download(repository, revision, weights, code)
            commit = folder.name if folder.parent.name == "snapshots" else revision
            return ModelSource(folder, repository, commit, notices)
        reasons.append(reason)
    raise ModelError("; ".join(dict.fromkeys(reasons)))


def _find_locally(model: str) -> ModelSource | None:
    """The local folder that is meant; None where a hub id may be.

    Raises:
        ModelError: it is no hub id either, or the folder has no configuration.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        for folder, notices in (
            (path, ()),
            (path.with_name(path.name + "-hf"), (f"{model} has no config.json; using its sibling {model}-hf",)),
        ):
            if (folder / "config.json").is_file():
                return ModelSource(folder, str(model) + ("-hf" if notices else ""), None, notices)
        raise ModelError(f"{model} holds no config.json; give the folder of a transformers checkpoint")
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(f"{model} is not a folder; give a folder with config.json, or a hub id")
    return None


def _has_config(repository: str, revision: str | None, is_reachable: bool) -> str | None:
    """None if the repository has a config.json, else one clause that says why it cannot be used.

    Raises:
        LocalEntryNotFoundError: that cannot be told, being offline.
    """
    try:
        hf_hub_download(repository, "config.json", revision=revision, local_files_only=not is_reachable)
    except LocalEntryNotFoundError:
        raise
    except GatedRepoError:
        return f"{repository} is gated: accept its licence on the hub and run `hf auth login`"
    except RevisionNotFoundError:
        return f"{repository} has no revision {revision!r}"
    except RepositoryNotFoundError:
        return f"{repository} is neither a local folder nor a repository on the hub that you can read"
    except EntryNotFoundError:
        return f"{repository} has no config.json, so it is no transformers checkpoint"
    except HFValidationError:
        return f"{repository} is neither a local folder nor a valid hub id"
    except HfHubHTTPError as error:
        return f"{repository}: the hub answered {(str(error).splitlines() or ['an error'])[0]}"
    except OSError as error:  # the cache, or the connection
        return f"{repository} cannot be looked up: {_reason(error)}"
    return None


def _offline(repositories: list[str]) -> str:
    why = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "no connection"
    names = (
        f"neither {repositories[0]} nor {repositories[1]} is" if len(repositories) > 1 else f"{repositories[0]} is not"
    )
    return (
        f"{names} in the local cache, and the hub cannot be reached ({why}): run `hf download {repositories[0]}` "
        "while online, or give --model a local folder"
    )


def _download(repository: str, revision: str | None, weights: bool, code: bool) -> Path:
    patterns = [*CONFIG_FILES, *(WEIGHT_FILES if weights else ()), *(("*.py",) if code else ())]
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=OTHER_FORMATS)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{repository}: the download did not finish ({_reason(error)}); run the same command again"
        ) from error


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
