"""Every error that the project raises on purpose, and the exit code that the command line gives it.

    SwarmError                     70  a bug or an unexpected state
    ├── ConfigError                78  the user can fix it; the message says how
    │   ├── SpecError                  a run spec or run file that does not hold together
    │   ├── AlreadyRunning         75  a second process uses the same key or folder
    │   └── NotAdmitted            77  the run's rule, or the lack of an admission, keeps this peer out
    ├── DataError                  65  input files or strings that cannot be used
    │   └── InviteError                an invite that is cut short, mistyped or of another version
    ├── NetworkError               69  somebody cannot be reached; trying again may help
    │   ├── Unreachable                no connection
    │   ├── DeadlineExceeded           no answer in time
    │   ├── Busy                       it lives, and has no room now
    │   └── NotFound                   reached, but what was asked for is not there
    ├── VerificationError          76  bytes that are not what they claim; never retried
    │   ├── SignatureError             a signature does not verify, or another key signed
    │   ├── DigestError                bytes do not match their digest
    │   ├── DivergedError              our state is not the one that the run's voters signed
    │   ├── RefusedCheckpoint  65  whoever signed it: code, lying headers, odd names, links, another run
    │   ├── PinError                   the coordinator's key is not the invite's
    │   └── ProtocolError              a message of a wrong shape, size, round or sender
    │       └── EarlierVersion         a record of a version of the protocol that is no longer spoken
    └── ResourceError              74  the machine lacks something
        ├── DiskFull                   no space left, or the disk limit is reached
        ├── DeviceError                no such compute device
        └── PortInUse                  the address is taken

Exit codes follow sysexits.h. `advice` is one sentence that tells the person what to do.
"""

from __future__ import annotations


class SwarmError(Exception):
    """Base of all named errors. ``message`` says what and why, ``advice`` what to do."""

    exit_code = 70
    usual_advice = ""

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice or self.usual_advice


class ConfigError(SwarmError):
    exit_code = 78


class SpecError(ConfigError):
    pass


class AlreadyRunning(ConfigError):
    exit_code = 75


class NotAdmitted(ConfigError):
    exit_code = 77


class DataError(SwarmError):
    exit_code = 65


class InviteError(DataError):
    pass


class NetworkError(SwarmError):
    exit_code = 69


class Unreachable(NetworkError):
    pass


class DeadlineExceeded(NetworkError):
    pass


class Busy(NetworkError):
    pass


class NotFound(NetworkError):
    pass


class VerificationError(SwarmError):
    exit_code = 76
    usual_advice = "nothing of it was used; get it again, and tell the organizer if that does not help"


class SignatureError(VerificationError):
    pass


class DigestError(VerificationError):
    pass


class DivergedError(VerificationError):
    pass


class RefusedCheckpoint(VerificationError):
    exit_code = 65
    usual_advice = "do not use it; tell whoever gave it to you"


class PinError(VerificationError):
    pass


class ProtocolError(VerificationError):
    pass


class EarlierVersion(ProtocolError):
    usual_advice = (
        "go on with the program that wrote it, or begin a new run from its last checkpoint (swarm start --from);"
        " nobody could sign this log anew"
    )


class ResourceError(SwarmError):
    exit_code = 74


class DiskFull(ResourceError):
    pass


class DeviceError(ResourceError):
    pass


class PortInUse(ResourceError):
    pass
