"""A folder of bundles, found by name and version."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Union

from nearfar.bundle.bundle import Bundle, open_bundle, read_manifest
from nearfar.bundle.manifest import Manifest
from nearfar.bundle.paths import MANIFEST_NAME
from nearfar.bundle.signature import SIGNATURE_NAME
from nearfar.bundle.versions import version_key
from nearfar.errors import BundleError, ModelNotFound, SecurityError

if TYPE_CHECKING:
    from nearfar.bundle.keys import KeyReference, PublicKey

logger = logging.getLogger(__name__)

_Stamp = tuple[tuple[int, int, int], ...]
_Refusal = Union[BundleError, SecurityError]


class BundleStore:
    """Bundles in `root`, ``root/*`` or ``root/*/*``; hidden folders are passed over.

    The folder is looked at on every call, so bundles may come and go while a program runs;
    manifests are parsed again only when they changed. Thread-safe.

    Args:
        root: Folder that holds the bundles; need not exist yet.
        trusted_keys: When given, bundles that none of these keys signed are as good as broken:
            left out of `models`, refused by `open`. Keys, their text (``ed25519:…``) or paths of
            their files. `None` takes unsigned bundles too.

    Raises:
        ConfigError: `trusted_keys` is empty, or holds what is not a public key.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        trusted_keys: Iterable[KeyReference] | None = None,
    ) -> None:
        self.root = Path(root).expanduser().absolute()
        self.trusted_keys: tuple[PublicKey, ...] | None = None
        if trusted_keys is not None:
            from nearfar.bundle.keys import trusted

            self.trusted_keys = trusted(trusted_keys)
        self._manifests: dict[Path, tuple[_Stamp, Manifest]] = {}
        self._lock = threading.Lock()

    def models(self) -> list[Manifest]:
        """Newest version of each model, sorted by name. Unreadable bundles are logged and left out.

        Nothing but the manifests is looked at here.
        """
        newest: dict[str, Manifest] = {}
        for _, manifest in self._readable()[0]:
            other = newest.get(manifest.name)
            if other is None or version_key(manifest.version) > version_key(other.version):
                newest[manifest.name] = manifest
        return [newest[name] for name in sorted(newest)]

    def open(self, name: str, version: str | None = None) -> Bundle:
        """Open a model's bundle.

        Args:
            name: The manifest's `name`.
            version: Exact version; `None` takes the newest.

        Raises:
            ModelNotFound: No such model or version; the error lists what is there.
            BundleError: It is there, but broken.
            SecurityError: It is there, but no trusted key signed it.
        """
        readable, broken = self._readable()
        matches = [
            (path, manifest)
            for path, manifest in readable
            if manifest.name == name and version in (None, manifest.version)
        ]
        if not matches:
            # The name inside a broken manifest is unknown; its folder is usually called the same.
            for path, error in broken:
                if name in (path.name, path.parent.name):
                    raise error
            self._raise_not_found(name, version, readable, len(broken))
        path, manifest = max(matches, key=lambda match: version_key(match[1].version))
        for other_path, other in matches:
            if other.version == manifest.version and other != manifest:
                raise BundleError(
                    f"{path} and {other_path} are different bundles, but both are {name!r} "
                    f"{manifest.version}",
                    fix="Remove one of them, or give it another version",
                )
        return open_bundle(path, trusted_keys=self.trusted_keys)

    def _raise_not_found(
        self,
        name: str,
        version: str | None,
        readable: list[tuple[Path, Manifest]],
        broken: int,
    ) -> None:
        there = sorted({f"{manifest.name} {manifest.version}" for _, manifest in readable})
        wanted = f"{name!r}" if version is None else f"{name!r} {version}"
        also = f" and {broken} unreadable bundle(s)" if broken else ""
        if not self.root.is_dir():
            problem = f"There is no model {wanted}: the store {self.root} does not exist"
        else:
            listed = ", ".join(there) or "no model"
            problem = f"There is no model {wanted} in {self.root}, which holds {listed}{also}"
        raise ModelNotFound(
            problem,
            fix="Choose one that is there, or make its bundle with `nearfar convert`",
        )

    def _candidates(self) -> Iterator[Path]:
        yield self.root
        for folder in _visible_folders(self.root):
            yield folder
            yield from _visible_folders(folder)

    def _readable(self) -> tuple[list[tuple[Path, Manifest]], list[tuple[Path, _Refusal]]]:
        readable: list[tuple[Path, Manifest]] = []
        broken: list[tuple[Path, _Refusal]] = []
        for folder in self._candidates():
            stamp = _stamp(folder, self.trusted_keys is not None)
            if stamp is None:
                continue
            with self._lock:
                known = self._manifests.get(folder)
            if known is not None and known[0] == stamp:
                readable.append((folder, known[1]))
                continue
            try:
                manifest, _ = read_manifest(folder, self.trusted_keys)
            except (BundleError, SecurityError) as error:
                logger.warning("bundle left out: %s", error)
                broken.append((folder, error))
                continue
            with self._lock:
                self._manifests[folder] = (stamp, manifest)
            readable.append((folder, manifest))
        return readable, broken


def _stamp(folder: Path, is_signed: bool) -> _Stamp | None:
    """Changes when the files behind a manifest do; `None` where there is no bundle."""
    found = []
    for name in (MANIFEST_NAME, SIGNATURE_NAME)[: 1 + is_signed]:
        try:
            status = os.lstat(folder / name)
        except OSError:
            if name == MANIFEST_NAME:
                return None
            continue
        found.append((status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(found)


def _visible_folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if not e.name.startswith(".") and e.is_dir()]
    except OSError:
        return []
    return [folder / name for name in sorted(names)]
