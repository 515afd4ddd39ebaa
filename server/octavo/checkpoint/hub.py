"""Downloads model files from the Hugging Face hub. Knows huggingface_hub and its errors."""

from __future__ import annotations

import re
from pathlib import Path

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "tokenizer*", "vocab*", "merges.txt")


def is_hub_id(name: str) -> bool:
    """Whether ``name`` reads as ``org/name``."""
    return _ID.fullmatch(name) is not None and not name.endswith((".gguf", ".safetensors"))


def download(
    repo_id: str, *, revision: str | None, download_dir: str | None, with_weights: bool
) -> Path:
    """Local folder with the repository's config, tokenizer and (asked for) safetensors files.

    ``HF_TOKEN`` and the hub's cache apply. Raises `ValueError` saying why it cannot be had.
    """
    # Imported here because a local model must not pay for the hub's client at start-up.
    from huggingface_hub import errors, snapshot_download

    patterns = [*_TOKENIZER_FILES, *(["*.safetensors"] if with_weights else [])]
    shown = repo_id if revision is None else f"{repo_id} at revision {revision}"
    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            cache_dir=download_dir,
            allow_patterns=patterns,
            # "consolidated" repeats the weights in Mistral's own layout; folders hold other forms.
            ignore_patterns=["consolidated*", "*/*"],
        )
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{shown} is gated: accept its terms on the hub and set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{shown} does not exist on the Hugging Face hub") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{shown} is not on the Hugging Face hub, or is private (set HF_TOKEN), "
            "and there is no such local folder"
        ) from error
    except errors.HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not a Hugging Face id: {error}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"{shown} is not in the local cache and the Hugging Face hub cannot be reached "
            f"({type(error).__name__}); offline, name a local folder or a .gguf file"
        ) from error
    return Path(folder)
