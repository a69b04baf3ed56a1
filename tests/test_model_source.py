"""What a user calls a model leads to a folder, or to one clear line.

The hub's cache is laid out by hand, as huggingface_hub documents it. Not covered: downloads, for there is no network;
what the hub answers is played by a stand-in.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from streamda import model_source
from streamda.errors import ModelError
from streamda.model_source import find_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no way out."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):  # read from the environment at import only
        monkeypatch.setattr(huggingface_hub.constants, name, str(folder), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return folder


def add(cache: Path, repository: str, *files: str, revision: str = "main") -> Path:
    """A repository in the cache; a file that starts with "-" is known not to exist."""
    base = cache / ("models--" + repository.replace("/", "--"))
    snapshot = base / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (base / "refs").mkdir()
    (base / "refs" / revision).write_text(COMMIT)
    for file in files:
        if file.startswith("-"):
            missing = base / ".no_exist" / COMMIT / file[1:]
            missing.parent.mkdir(parents=True, exist_ok=True)
            missing.touch()
        else:
            (snapshot / file).write_text("{}")
    return snapshot


def test_a_folder_with_a_configuration_is_itself(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    for name in ("mine", "./mine", str(tmp_path / "mine")):
        source = find_model(name, None, weights=True)
        assert source.folder.resolve() == tmp_path / "mine"
        assert (source.name, source.revision, source.notices) == (name, None, ())


def test_a_folder_wins_over_a_repository_of_that_name(tmp_path: Path, cache: Path) -> None:
    add(cache, "org/model", "config.json")
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "org" / "model" / "config.json").write_text("{}")
    assert find_model("org/model", None, weights=True).revision is None


def test_a_folder_without_one_stands_for_its_sibling_in_transformers_format(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama-hf").mkdir()
    (tmp_path / "llama-hf" / "config.json").write_text("{}")
    source = find_model("llama", None, weights=True)
    assert source.folder.resolve() == tmp_path / "llama-hf"
    assert source.name == "llama-hf"
    assert source.notices == ("llama has no config.json; using its sibling llama-hf",)


@pytest.mark.parametrize("weights", [True, False])
def test_a_cached_repository_is_found_offline_with_its_commit(weights: bool, cache: Path) -> None:
    snapshot = add(cache, "org/model", "config.json", "model.safetensors")
    source = find_model("org/model", None, weights=weights)
    assert source.folder.resolve() == snapshot.resolve()
    assert (source.name, source.revision, source.notices) == ("org/model", COMMIT, ())


def test_a_revision_is_followed(cache: Path) -> None:
    add(cache, "org/model", "config.json", revision="v2")
    assert find_model("org/model", "v2", weights=True).revision == COMMIT
    with pytest.raises(ModelError, match=r"org/model.*cache"):
        find_model("org/model", None, weights=True)


@pytest.mark.parametrize("original", [(), ("-config.json",), ("consolidated.00.pth", "-config.json")])
def test_a_repository_in_another_format_stands_for_its_hf_sibling(original: tuple[str, ...], cache: Path) -> None:
    """`meta-llama/Llama-2-13b` holds Meta's own format, whether that is known offline or not."""
    if original:
        add(cache, "meta-llama/Llama-2-13b", *original)
    snapshot = add(cache, "meta-llama/Llama-2-13b-hf", "config.json", "model.safetensors")
    source = find_model("meta-llama/Llama-2-13b", None, weights=True)
    assert source.folder.resolve() == snapshot.resolve()
    assert source.name == "meta-llama/Llama-2-13b-hf"
    assert source.notices == ("meta-llama/Llama-2-13b is not in transformers format; using meta-llama/Llama-2-13b-hf",)


def test_the_repository_itself_comes_before_its_sibling(cache: Path) -> None:
    add(cache, "org/model", "config.json")
    add(cache, "org/model-hf", "config.json")
    source = find_model("org/model", None, weights=True)
    assert (source.name, source.notices) == ("org/model", ())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("org/model", r"^neither org/model nor org/model-hf is in the local cache.*HF_HUB_OFFLINE is set.*hf download"),
        ("org/model-hf", r"^org/model-hf is not in the local cache.*HF_HUB_OFFLINE is set.*hf download org/model-hf"),
        ("gpt2", r"^neither gpt2 nor gpt2-hf is in the local cache"),
    ],
)
def test_a_miss_offline_is_one_line_that_says_what_to_do(model: str, reason: str, cache: Path) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        find_model(model, None, weights=True)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("./nowhere", r"^\./nowhere is not a folder"),
        ("/nowhere/at/all", r"is not a folder"),
        ("a/b/c", r"^a/b/c is not a folder"),
        ("file.bin", r"^file\.bin is not a folder"),
        ("empty", r"^empty holds no config\.json"),
        ("not a name!", r"not a name! is neither a local folder nor a valid hub id"),
    ],
)
def test_what_is_neither_folder_nor_hub_id_is_refused(model: str, reason: str, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "file.bin").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=reason) as caught:
        find_model(model, None, weights=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("refuses", ["is_dir", "is_file"])
def test_a_folder_without_permission_is_refused_in_one_line(
    refuses: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "closed").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(Path, refuses, refuse)
        with pytest.raises(ModelError, match=r"^\./closed cannot be looked into: .*Permission denied") as caught:
            find_model("./closed", None, weights=True)
    assert "\n" not in str(caught.value)


def test_the_folder_of_no_user_is_refused_in_one_line(cache: Path) -> None:
    with pytest.raises(ModelError, match=r"^~nouser/x cannot be looked into: .*home"):
        find_model("~nouser/x", None, weights=True)


def test_a_cache_that_cannot_be_read_is_said_in_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> str:
        raise PermissionError(13, "Permission denied", "hub")

    monkeypatch.setattr(model_source, "hf_hub_download", refuse)
    with pytest.raises(ModelError, match=r"^org/model-hf cannot be looked up: .*Permission denied: 'hub'$"):
        find_model("org/model-hf", None, weights=True)


def test_a_hub_out_of_reach_is_tried_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt takes the hub's client half a minute of its own attempts."""
    asked = []

    def refuse(repository: str, _file: str, *, local_files_only: bool, **_: Any) -> str:
        asked.append((repository, local_files_only))
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(model_source, "hf_hub_download", refuse)
    with pytest.raises(ModelError, match=r"^neither org/model nor org/model-hf is in the local cache"):
        find_model("org/model", None, weights=True)
    assert asked == [("org/model", False), ("org/model-hf", True)]


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (GatedRepoError, 403, r"org/model-hf is gated: accept its licence on the hub and run `hf auth login`$"),
        (RevisionNotFoundError, 404, r"org/model-hf has no revision 'v9'$"),
        (RepositoryNotFoundError, 404, r"org/model-hf is neither a local folder nor a repository on the hub"),
        (HfHubHTTPError, 503, r"org/model-hf: the hub answered "),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(
    error: type[HfHubHTTPError], status: int, reason: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)

    def refuse(*_args: Any, **_kwargs: Any) -> str:
        raise error("answer\nmore of it", response=response)

    monkeypatch.setattr(model_source, "hf_hub_download", refuse)
    with pytest.raises(ModelError, match=reason) as caught:
        find_model("org/model-hf", "v9", weights=True)
    assert "\n" not in str(caught.value)
