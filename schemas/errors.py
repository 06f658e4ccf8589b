"""Every error that actcache raises on purpose.

    ActcacheError
    ├── InvalidInput (ValueError)   an argument, a file or a spec that cannot be used as it is
    │   └── OutOfRange              a value that the stored dtype cannot hold, or that is not finite
    ├── NotFound (KeyError)         no dataset, site, array or object of that name
    ├── NotSealed                   a build was begun here and is not finished
    ├── SpecMismatch                the place holds, or is building, something else
    ├── Corrupt                     stored bytes are not what was written
    ├── StoreError (OSError)        the store refused or failed: credentials, network, disk full
    ├── Unsupported                 a format, store or model family that this version cannot handle
    └── ProofFailed                 the captured tensors are not what the model computes

A message is one line: what is wrong, where, and the way out. Names and meanings are stable.
"""

from __future__ import annotations


class ActcacheError(Exception):
    """Root of the tree."""


class InvalidInput(ActcacheError, ValueError):
    """An argument, a file or a spec cannot be used as it is."""


class OutOfRange(InvalidInput):
    """A value cannot be held by the stored dtype, or the model computed one that is not finite."""


class NotFound(ActcacheError, KeyError):
    """There is no dataset, site, array or object of that name."""

    def __str__(self) -> str:  # KeyError shows the repr of its message
        return str(self.args[0]) if self.args else ""


class NotSealed(ActcacheError):
    """A build was begun at this URL and is not finished."""


class SpecMismatch(ActcacheError):
    """The URL holds, or is building, a dataset of another spec."""


class Corrupt(ActcacheError):
    """Stored bytes are not what was written, or are missing."""


class StoreError(ActcacheError, OSError):
    """The store refused or failed."""


class Unsupported(ActcacheError):
    """This version cannot handle that format, store or model family."""


class ProofFailed(ActcacheError):
    """An identity that the captured tensors must satisfy does not hold."""
