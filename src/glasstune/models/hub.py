"""What can go wrong between a hub id and its files, each with its remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import errors, snapshot_download, try_to_load_from_cache

from glasstune.core.errors import InputError

_ADAPTER = ("adapter_*", "*.json", "*.jinja", "*.model", "*.txt")
_OFFLINE_FIX = (
    "go online, or set HF_ENDPOINT to a mirror you can reach, or point HF_HOME to a cache that "
    "holds the model, or give a local folder as model.path"
)


@contextmanager
def hub_errors_explained(model_id: str) -> Iterator[None]:
    """Turns the hub's exceptions into messages that say what to do.

    Args:
        model_id: The hub id being read.

    Raises:
        InputError: `gated_model`, `model_not_found`, `hub_unreachable`, `not_a_model` or
            `bad_model_id`; anything else passes unchanged.
    """
    try:
        yield
    except Exception as error:  # transformers wraps the hub's errors in OSError
        chain = list(_causes(error))
        for seen in chain:
            explained = _explain(seen, model_id)
            if explained is not None:
                raise explained from error
        if isinstance(error, OSError) and any(_is_network(seen) for seen in chain):
            raise _unreachable(model_id, error) from error
        raise


def hub_adapter(adapter_id: str) -> Path | None:
    """Fetches an adapter from the hub, and nothing else of its repository.

    Returns:
        Its folder in the cache; None where the repository holds no adapter.

    Raises:
        InputError: The hub refuses or cannot be reached.
    """
    with hub_errors_explained(adapter_id):
        folder = Path(snapshot_download(adapter_id, allow_patterns=list(_ADAPTER)))
    return folder if (folder / "adapter_config.json").is_file() else None


def cached_folder(model_id: str) -> Path | None:
    """Returns the folder of a model's files in the local cache; None where they are not there."""
    try:
        found = try_to_load_from_cache(model_id, "config.json")
    except errors.HFValidationError:
        return None
    folder = Path(found).parent if isinstance(found, str) else None
    return folder if folder is not None and any(folder.glob("*.safetensors")) else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explain(error: BaseException, model_id: str) -> InputError | None:
    page = f"https://huggingface.co/{model_id}"
    where = f"model.path={model_id}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return InputError(
            "gated_model",
            f"the hub refuses {model_id} ({status or 403}): its licence must be accepted first",
            where=where,
            fix=f"accept the licence on {page}, then log in with `hf auth login` (or set HF_TOKEN)",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            "model_not_found",
            f"the hub has no model {model_id} that this account may see ({status or 404})",
            where=where,
            fix=f"check the spelling on {page}; for a private model log in with `hf auth login`; "
            "a local folder needs a path that exists",
        )
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        return _unreachable(model_id, error)
    if isinstance(error, errors.EntryNotFoundError):
        return InputError(
            "not_a_model",
            f"{model_id} on the hub has no config.json: it holds no transformers model",
            where=where,
            fix="give the id of a transformers checkpoint; a repository of GGUF files: download "
            "one and give the file",
        )
    if isinstance(error, errors.HFValidationError):
        return InputError(
            "bad_model_id",
            f"{model_id!r} is neither a path that exists nor a hub id (owner/name)",
            where="model.path",
            fix="check the path",
        )
    if isinstance(error, errors.HfHubHTTPError):
        if status in (401, 403):
            return InputError(
                "gated_model",
                f"the hub refuses {model_id} ({status})",
                where=where,
                fix=f"log in with `hf auth login` (or set HF_TOKEN) and check access on {page}",
            )
        return _unreachable(model_id, error)
    return _unreachable(model_id, error) if _is_network(error) else None


def _is_network(error: BaseException) -> bool:
    """Whether an exception is a failed connection, whatever HTTP library raised it."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return any(
        kind.__name__ in ("ConnectError", "ConnectTimeout", "ReadTimeout", "TransportError")
        for kind in type(error).__mro__
    )


def _unreachable(model_id: str, error: BaseException) -> InputError:
    reason = "offline mode is set" if "ffline" in type(error).__name__ else "no connection"
    return InputError(
        "hub_unreachable",
        f"{model_id} is not in the local cache and the hub cannot be reached ({reason})",
        where=f"model.path={model_id}",
        fix=_OFFLINE_FIX,
    )
