"""Files elsewhere: a folder, a bucket, a repository on a hub. The door to fsspec; one to ``huggingface_hub``.

Decides which targets there are (`file:`, `s3:`, `hf:` and whatever else fsspec knows, never one wrapped in another) and
that a file appears there whole or not at all. Every method blocks and raises `SwarmError`s only. Leaves what is
written, when, and whether it is believed to the callers.
"""

from __future__ import annotations

import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swarm.errors import ConfigError, NetworkError, NotFound

# On object stores a file appears when it is complete; on a disk only if it is renamed.
_DISKS = frozenset({"file", "local"})
# A bucket that does not answer is given up in a minute, not in half an hour.
_SETTINGS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 10, "read_timeout": 30, "retries": {"max_attempts": 2}}}
}
_HUB = "hf"
_NOBODY: dict[str, dict[str, Any]] = {_HUB: {"token": False}, "s3": {"anon": True}}
_MODELS = re.compile(r"(?!datasets/|spaces/|kernels/)[^/@]+/[^/@]+(?=/|$)")
# Each piece is opened anew, so what the library reads ahead would be thrown away: eight times as much as was asked for.
_READING: dict[str, dict[str, Any]] = {_HUB: {"cache_type": "none"}}


class Storage:
    """The files under one URL."""

    def __init__(self, url: str, *, anonymous: bool = False) -> None:
        """``anonymous``: a hub or bucket is not told who asks.

        Raises `ConfigError` where the URL, or the package that it needs, is of no use."""
        import fsspec

        if "::" in url or ":" not in url:
            raise ConfigError(
                f"{url!r} is no place for files", "write file:///FOLDER, s3://BUCKET/PATH or hf://ORG/NAME"
            )
        self.url = url.rstrip("/")
        self.scheme = url.partition(":")[0]
        who = _NOBODY.get(self.scheme, {}) if anonymous else {}
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url, **_SETTINGS.get(self.scheme, {}), **who)
        except ImportError as error:
            raise ConfigError(
                f"{url}: {error}",
                "install it: pip install 'swarmtrain[mirrors]', or fsspec's package for such URLs",
            ) from error
        except Exception as error:  # an unknown scheme, or settings that the store's own library does not like
            raise ConfigError(f"{url}: {error}", "write file:///FOLDER, s3://BUCKET/PATH or hf://ORG/NAME") from error

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end`` (exclusive) of the file ``name``; fewer where it is shorter."""
        more = _READING.get(self.scheme, {})
        with self._errors(name):
            try:
                data: bytes = self._files.cat_file(self._path(name), start=start, end=end, **more)
            except Exception as error:
                if type(error).__name__ != "NoCredentialsError":
                    raise
                self._files = type(self._files)(
                    anon=True, **_SETTINGS["s3"]
                )  # who has no account may still read what is public
                data = self._files.cat_file(self._path(name), start=start, end=end)
        return data

    def size(self, name: str) -> int | None:
        """How many bytes the file has; None where it is not there."""
        try:
            with self._errors(name):
                self._files.invalidate_cache()
                return int(self._files.info(self._path(name))["size"])
        except NotFound:
            return None

    def write(self, name: str, source: Path) -> None:
        """Copy ``source`` there as ``name``, over what is there."""
        path = self._path(name)
        with self._errors(name):
            if self.scheme == _HUB and not self._root.startswith("buckets/"):
                self._upload(path, source)
                return
            if self.scheme not in _DISKS:
                self._files.put_file(str(source), path)
                return
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            temporary = f"{path}.{secrets.token_hex(4)}.part"
            try:
                self._files.put_file(str(source), temporary)
                self._files.mv(temporary, path)
            finally:
                if self._files.exists(temporary):
                    self._files.rm_file(temporary)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Put ``data`` there as ``name``, over what is there."""
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            self.write(name, Path(file.name))

    def _upload(self, path: str, source: Path) -> None:
        """One commit; a repository for models is made where there is none. fsspec would copy the file first, and leave
        the copy behind where the upload fails."""
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # they belong to no log of a coordinator
        api = HfApi(endpoint=self._files.endpoint, token=self._files.token)
        try:
            place = self._files.resolve_path(path)
        except FileNotFoundError:
            repository = _MODELS.match(self._root)
            if repository is None:
                raise
            api.create_repo(repository[0], exist_ok=True)
            self._files.invalidate_cache()
            place = self._files.resolve_path(path)
        name = place.path_in_repo
        api.upload_file(
            path_or_fileobj=source,
            path_in_repo=name,
            repo_id=place.repo_id,
            repo_type=place.repo_type,
            revision=place.revision,
            commit_message=f"Add {name}",
        )
        self._files.invalidate_cache()

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NotFound(f"{self.url}/{name} is not there") from error
        except Exception as error:  # each store raises what its own library raises
            said = f"{type(error).__name__}: {error}"[:300]
            raise NetworkError(
                f"{self.url}/{name}: {said}", "check the address, the credentials and the connection"
            ) from error
