"""The client's half of an attestation plug-in: found by name, and kept from failing open.

nearfar has no verifier of its own. Reference: docs/reference/configuration.md, "Attestation".
"""

from __future__ import annotations

import importlib
import inspect
import operator
from typing import TYPE_CHECKING

from nearfar.errors import ConfigError, SecurityError
from nearfar.secure.attestation import AttestedFacts

if TYPE_CHECKING:
    from nearfar.secure.attestation import Verifier

_FIX = (
    "Name a class or function that takes nothing and gives a nearfar.secure.attestation.Verifier, "
    'as in attestation = "package.module:Verifier"'
)


def load_verifier(reference: str, *, cloud: str) -> CheckedVerifier:
    """The verifier that ``package.module:name`` makes.

    Args:
        reference: As the configuration has it.
        cloud: Name of the cloud, for messages.

    Raises:
        ConfigError: Module, name, call or what it gives is wrong; says which.
    """
    module_name, _, name = reference.partition(":")

    def unusable(why: str, fix: str = _FIX) -> ConfigError:
        return ConfigError(
            f"cloud '{cloud}': 'attestation' names {reference!r}, {why}",
            field="attestation",
            fix=fix,
        )

    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        missing = exc.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise unusable(
                f"and there is no module {missing!r}",
                "Install the plug-in into the environment of this app, or correct the name",
            ) from exc
        raise unusable(
            f"which needs the module {missing!r}", "Install what the plug-in needs"
        ) from exc
    except Exception as exc:
        raise unusable(
            f"and importing it failed with {type(exc).__name__}: {exc}",
            "Repair or update the plug-in; the traceback shows where",
        ) from exc
    try:
        found = operator.attrgetter(name)(found)
    except Exception as exc:
        raise unusable(f"and {module_name} has no {name!r}") from exc
    if not callable(found):
        raise unusable("which is no class or function")
    try:
        made = found()
    except Exception as exc:
        raise unusable(
            f"and calling it failed with {type(exc).__name__}: {exc}",
            "It must take no arguments; repair or update the plug-in",
        ) from exc
    verify = getattr(made, "verify", None)
    if not callable(verify):
        raise unusable(f"and what it gives ({type(made).__name__}) has no method 'verify'")
    if inspect.iscoroutinefunction(verify):
        raise unusable("whose 'verify' is a coroutine function; it must be a plain one")
    return CheckedVerifier(made, reference)


class CheckedVerifier:
    """A plug-in that can only accept by saying what it accepted; all else refuses.

    Args:
        plug_in: Whoever wrote it.
        name: For messages.
    """

    def __init__(self, plug_in: Verifier, name: str) -> None:
        self._plug_in = plug_in
        self._name = name

    def verify(self, evidence: bytes, binding: bytes) -> AttestedFacts:
        """As `Verifier.verify`.

        Raises:
            SecurityError: The plug-in refused, failed, or gave something else.
        """
        try:
            facts = self._plug_in.verify(evidence, binding)
        except SecurityError:
            raise
        except Exception as exc:
            raise SecurityError(
                f"The attestation plug-in {self._name} failed with {type(exc).__name__}, so the "
                "cloud's evidence counts as refused",
                fix="See the cause; repair or update the plug-in",
            ) from exc
        if not isinstance(facts, AttestedFacts) or not isinstance(facts.claims, bytes):
            raise SecurityError(
                f"The attestation plug-in {self._name} gave {type(facts).__name__} and not "
                "AttestedFacts, so the cloud's evidence counts as refused",
                fix="Let `verify` return nearfar.secure.attestation.AttestedFacts, with the claims "
                "as bytes",
            )
        return facts
