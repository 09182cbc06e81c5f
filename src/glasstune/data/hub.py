"""Hub data sets, through `datasets`, with its failures in plain words."""

from __future__ import annotations

from typing import Any

from glasstune.core.errors import InputError


def load_hub(name: str, subset: str | None, split: str) -> Any:
    """Loads one split of a hub data set, in `datasets`' own cache on disk.

    Args:
        name: Hub id, `owner/name`.
        subset: Configuration name, or None.
        split: Split, in the slicing syntax of `datasets` where wanted.

    Returns:
        A `datasets.Dataset`.

    Raises:
        InputError: The data set cannot be had; says whether it is the network, the name, the
            licence, the subset or the split.
    """
    import datasets

    try:
        return datasets.load_dataset(name, subset, split=split)
    except Exception as error:
        raise _explain(error, name, subset, split) from error


def _explain(error: Exception, name: str, subset: str | None, split: str) -> InputError:
    chain: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None and seen not in chain:
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__
    kinds = {kind.__name__ for part in chain for kind in type(part).__mro__}
    text = " ".join(str(part) for part in chain)
    first = (str(error).splitlines() or [type(error).__name__])[0]
    page = f"https://huggingface.co/datasets/{name}"
    if "GatedRepoError" in kinds or "gated" in text or " 401" in text or " 403" in text:
        return InputError(
            "hub_forbidden",
            "the hub refuses this data set: it is gated or private",
            where=name,
            fix=f"accept its terms at {page} and log in (`hf auth login` or HF_TOKEN)",
        )
    if kinds & {
        "OfflineModeIsEnabled",
        "ConnectionError",
        "ConnectError",
        "LocalEntryNotFoundError",
    }:
        return InputError(
            "hub_unreachable",
            "the hub cannot be reached, and the data set is neither a local file nor cached",
            where=name,
            fix="check the path if you meant a file; else the network or HF_ENDPOINT (a mirror), "
            "or download the data set elsewhere and name its files",
        )
    if kinds & {"DatasetNotFoundError", "RepositoryNotFoundError"} or " 404" in text:
        return InputError(
            "hub_not_found",
            "is neither a local file nor a data set that the hub knows",
            where=name,
            fix=f"check the spelling; the page would be {page}; private ones need `hf auth login`",
        )
    return InputError(
        "hub_error",
        f"`datasets` could not load it: {first}",
        where=f"{name} (subset {subset}, split {split})",
        fix="check data.sources subset and split against the data set's page",
    )
