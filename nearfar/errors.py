"""Every error nearfar raises, in one tree.

    NearfarError
    ├── InvalidInput            the caller's request is wrong: name, dtype, shape, length, option
    │   ├── ConfigError         a configuration, policy or argument does not parse or fit
    │   │   └── CalibrationError a calibration is missing, damaged, or made for other variants
    │   └── LocalProtocolError  our own side asked the wire for something illegal
    ├── ModelNotFound           no such model, version or variant here
    ├── BundleError             a bundle is missing, corrupt, or not what its manifest says
    ├── PolicyDenied            policy forbids every route; never retried
    ├── SecurityError           wrong pin, certificate or login, or a token's limit; never retried
    ├── AgreementNotMet         an answer that may differ from the cloud's, and the app wants none
    ├── DeadlineExceeded        the absolute deadline passed first
    ├── CloudUnavailable        no cloud could be reached, or it went away
    │   ├── StreamInterrupted   an answer was cut before its FIN
    │   ├── ResumeMissed        the cloud no longer keeps what a cut answer would go on with
    │   └── RemoteProtocolError the peer broke the wire protocol
    ├── Overloaded              a queue, slot or memory limit is reached; try later
    ├── Cancelled               the caller cancelled
    ├── EngineError             an inference engine failed, or cannot run here
    └── ConversionError         a converter step refused or failed

Errors hold fields and build their text in ``__str__``: first what is wrong, then what to do.
They cross the wire as (code, problem, fix) and come back as the same class; see `from_code`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class NearfarError(Exception):
    """Root of all errors raised on purpose by nearfar.

    Args:
        problem: What is wrong, naming the thing: a full sentence without the final dot.
        fix: What the reader can do about it, a full sentence without the final dot.

    Attributes:
        code: Stable identifier, sent on the wire and usable in metrics.
        retryable: Whether the same request may succeed elsewhere or later.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, problem: str, *, fix: str = "") -> None:
        super().__init__(problem, fix)
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.problem}. {self.fix}." if self.fix else f"{self.problem}."

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions pickle through positional args; ours take `fix` by keyword.
        return (_rebuild, (type(self), self.problem, self.fix, self.__dict__.copy()))


class InvalidInput(NearfarError):
    """The request itself is wrong; sending it again changes nothing.

    Attributes:
        field: Name of the offending argument, tensor or setting; "" for the whole request.
    """

    code = "invalid_input"

    def __init__(self, problem: str, *, field: str = "", fix: str = "") -> None:
        super().__init__(problem, fix=fix)
        self.field = field


class ConfigError(InvalidInput):
    """A configuration file, policy file or setting does not parse or does not fit."""

    code = "config"


class CalibrationError(ConfigError):
    """A calibration of the cascade is missing, damaged, or was made for other variants."""

    code = "calibration"

    def __init__(self, problem: str, *, field: str = "min_agreement", fix: str = "") -> None:
        super().__init__(problem, field=field, fix=fix)


class LocalProtocolError(InvalidInput):
    """Our own side asked for a message that is illegal in the connection's state."""

    code = "local_protocol"


class ModelNotFound(NearfarError):
    """No such model, version or variant where it was looked for."""

    code = "model_not_found"


class BundleError(NearfarError):
    """A bundle is missing, corrupt, or not what its manifest says."""

    code = "bundle"


class PolicyDenied(NearfarError):
    """Policy forbids every route for this request. Never retried.

    Attributes:
        rule: Id of the rule that decided, or "" when no rule matched (deny by default).
    """

    code = "policy_denied"

    def __init__(self, problem: str, *, rule: str = "", fix: str = "") -> None:
        super().__init__(problem, fix=fix)
        self.rule = rule


class SecurityError(NearfarError):
    """Authentication, pinning or decryption failed, or a token does not allow the request.

    Never retried, never downgraded.
    """

    code = "security"


class AgreementNotMet(NearfarError):
    """The edge model was not sure enough, and the cloud could not be asked.

    Raised only for requests that demand the agreement; others get the edge's answer, marked.

    Attributes:
        target: The stated agreement; 0 when it is not known.
    """

    code = "agreement_not_met"

    def __init__(self, problem: str, *, target: float = 0.0, fix: str = "") -> None:
        super().__init__(problem, fix=fix)
        self.target = target


class DeadlineExceeded(NearfarError):
    """The request's absolute deadline passed before an answer was complete.

    Attributes:
        tried: Routes that were tried, in order.
    """

    code = "deadline_exceeded"

    def __init__(self, problem: str, *, tried: tuple[str, ...] = (), fix: str = "") -> None:
        super().__init__(problem, fix=fix)
        self.tried = tried


class CloudUnavailable(NearfarError):
    """No cloud runtime could be reached, or the connection to it was lost."""

    code = "cloud_unavailable"
    retryable = True


class StreamInterrupted(CloudUnavailable):
    """A streamed answer was cut before its FIN.

    Attributes:
        received_tokens: Tokens that arrived before the cut.
    """

    code = "stream_interrupted"

    def __init__(self, problem: str, *, received_tokens: int = 0, fix: str = "") -> None:
        super().__init__(problem, fix=fix)
        self.received_tokens = received_tokens


class ResumeMissed(CloudUnavailable):
    """A cut answer cannot be taken up where it stopped: not kept, too late, or a wrong ticket."""

    code = "resume_missed"


class RemoteProtocolError(CloudUnavailable):
    """The peer sent something the wire protocol does not allow; the connection is closed."""

    code = "remote_protocol"


class Overloaded(NearfarError):
    """A queue, slot or memory limit is reached; the same request may succeed later or elsewhere."""

    code = "overloaded"
    retryable = True


class Cancelled(NearfarError):
    """The caller cancelled the request."""

    code = "cancelled"


class EngineError(NearfarError):
    """An inference engine failed, or is not available on this machine."""

    code = "engine"
    retryable = True


class ConversionError(NearfarError):
    """A converter step refused its input or failed."""

    code = "conversion"


def _all_subclasses(cls: type[NearfarError]) -> list[type[NearfarError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in _all_subclasses(sub))]


_BY_CODE: dict[str, type[NearfarError]] = {cls.code: cls for cls in _all_subclasses(NearfarError)}


def from_code(code: str, problem: str, fix: str = "") -> NearfarError:
    """Rebuild an error that crossed the wire; an unknown code becomes a plain `NearfarError`."""
    return _BY_CODE.get(code, NearfarError)(problem, fix=fix)


@contextmanager
def about(name: str) -> Iterator[None]:
    """Say which of several inputs an `InvalidInput` is about; it may not know its own name."""
    try:
        yield
    except InvalidInput as error:
        if type(error) is not InvalidInput or name in error.problem:
            raise
        raise InvalidInput(f"{name}: {error.problem}", field=error.field, fix=error.fix) from error


def _rebuild(
    cls: type[NearfarError], problem: str, fix: str, fields: dict[str, object]
) -> NearfarError:
    error = cls(problem, fix=fix)
    error.__dict__.update(fields)
    return error
