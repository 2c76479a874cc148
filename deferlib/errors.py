"""Every error deferlib raises, as one tree under `Error`; a class's docstring is its default message.

Names that App Engine's `taskqueue` and `deferred` modules had keep their name and their place in the tree.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence


class Error(Exception):
    """deferlib could not do what was asked."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(args or (type(self).__doc__,)))


# --- adding tasks: App Engine's names -------------------------------------------------------------------------------


class TaskQueueError(Error):
    """The base of what tasks, queues and the store raise: `taskqueue.Error`."""


class UnknownQueueError(TaskQueueError):
    """The queue does not exist in the store."""


class TransientError(TaskQueueError):
    """The store could not serve this call now; the same call may succeed in a moment."""


class InternalError(TaskQueueError):
    """deferlib met a state that its own rules exclude; please report it."""


class InvalidQueueError(TaskQueueError):
    """The queue's configuration is invalid."""


class InvalidQueueNameError(InvalidQueueError):
    """A queue's name is 1 to 100 letters, digits and hyphens."""


class InvalidTaskError(TaskQueueError):
    """The task's arguments contradict each other or are out of range."""


class InvalidTaskNameError(InvalidTaskError):
    """A task's name is 1 to 500 letters, digits, hyphens and underscores."""


class InvalidUrlError(InvalidTaskError):
    """A task's URL is a path that starts with '/', without scheme, host and fragment."""


class InvalidEtaError(InvalidTaskError):
    """A task's ETA is at most 30 days ahead."""


class TaskTooLargeError(InvalidTaskError):
    """The task is larger than its limit."""


class TransactionalRequestTooLargeError(TaskTooLargeError):
    """The tasks added in one transaction are larger than the limit."""


class TaskAlreadyExistsError(InvalidTaskError):
    """A task of this name is waiting in the queue."""


class TombstonedTaskError(InvalidTaskError):
    """A task of this name was in the queue before; the name is free again when its tombstone expires."""


class DuplicateTaskNameError(TaskQueueError):
    """One call may not add or delete two tasks of the same name."""


class TooManyTasksError(TaskQueueError):
    """Too many tasks in one call."""


class BadTaskStateError(TaskQueueError):
    """The task was added or deleted before; build a new Task to add it again."""


class BadTransactionStateError(TaskQueueError):
    """A transactional add needs a transaction."""


class DatastoreError(TaskQueueError):
    """The datastore failed."""


class PermissionDeniedError(TaskQueueError):
    """The operation is not allowed on this queue."""


class InvalidTaskRetryOptionsError(TaskQueueError):
    """The retry options contradict each other or are out of range."""


class InvalidLeaseTimeError(TaskQueueError):
    """A lease lasts from 0 seconds to 7 days."""


class InvalidMaxTasksError(TaskQueueError):
    """One call leases from 1 to 1,000 tasks."""


class InvalidDeadlineError(TaskQueueError):
    """A deadline is a number of seconds above 0."""


class InvalidQueueModeError(TaskQueueError):
    """A push queue takes push tasks, a pull queue tasks of method PULL."""


class TaskLeaseExpiredError(TaskQueueError):
    """The lease on the task has expired, or belongs to another worker now."""


class QueuePausedError(TaskQueueError):
    """The queue is paused."""


class InvalidTagError(TaskQueueError):
    """A tag has at most 500 characters."""


class InvalidDispatchDeadlineError(TaskQueueError):
    """A dispatch deadline is between 15 seconds and 24 hours, in microseconds."""


class RPCDeadlineExceededError(TransientError):
    """A request to the store took longer than the deadline of its RPC object; it may still be done."""


class UnpicklableCallError(Error, pickle.PicklingError):
    """The call can't be pickled."""


# --- the handler: App Engine's names --------------------------------------------------------------------------------


class DeferredError(Error):
    """A deferred call failed in a way its author declared."""


class PermanentTaskFailure(DeferredError):
    """The task failed and must not be tried again."""


class SingularTaskFailure(DeferredError):
    """The task failed this time; try it again, quietly."""


class DeadlineExceededError(BaseException):
    """The call's dispatch deadline is near; save what matters and return.

    Raised in a call that runs, once, a second (`deadline_margin`) before its deadline; a coroutine is cancelled instead.
    Outside `Error` and `Exception`, as on App Engine, so that a broad `except Exception` doesn't swallow it.
    """


# --- payloads and tokens --------------------------------------------------------------------------------------------


class PayloadError(PermanentTaskFailure):
    """The payload can't be run.

    A `PermanentTaskFailure` for those who run payloads by themselves, as on App Engine; deferlib's own handler keeps such a
    task and tries it again.
    """


class PayloadUnverifiedError(PayloadError):
    """The payload's signature is wrong: it was altered, or moved to another task."""


class PayloadKeyUnknownError(PayloadError):
    """The payload was signed with a key that this process doesn't have."""


class PayloadNewerError(PayloadError):
    """The payload has a newer format than this version of deferlib reads."""


class PayloadUndecodableError(PayloadError):
    """The payload is genuine, but its call can't be unpickled here."""


class CallMismatchError(PayloadUndecodableError):
    """The callable doesn't take the arguments that were deferred: its signature has changed since."""


class TokenError(Error):
    """The request carries no valid dispatch token."""


class TokenMismatchError(TokenError):
    """The dispatch token is genuine, but it isn't for this request: something on the way has changed it."""


class BodyTooLongError(TokenError):
    """The request's body is longer than any task's may be; see the setting `limits`."""


# --- configuration --------------------------------------------------------------------------------------------------


class ConfigError(Error):
    """A setting has a value that isn't allowed."""


class KeyringError(ConfigError):
    """The signing keys can't be used."""


class AppError(ConfigError):
    """The application can't be loaded."""


class NotAvailableError(Error, NotImplementedError):
    """This part of deferlib's public surface isn't available in this version."""


# --- the store ------------------------------------------------------------------------------------------------------


class StoreError(TaskQueueError):
    """The store failed."""


class StoreBusyError(StoreError, TransientError):
    """Another process holds the store's write lock for too long; nothing was written."""


class StoreUnavailableError(StoreError, TransientError):
    """The store can't be reached; nothing was written."""


class StoreFullError(StoreError):
    """The disk is full; nothing was written. Free some space: deliveries go on and the same call will succeed."""


class StoreReadOnlyError(StoreError):
    """The store can't be written to."""


class StoreCorruptError(StoreError):
    """The store is not a sound deferlib database; it is left untouched."""


class StoreVersionError(StoreError):
    """The store was written by a newer version of deferlib; upgrade this one."""


class EnqueueUnknownError(StoreError):
    """The store failed while committing: the tasks may have been added or not.

    Adding the same Task objects again (they are in `tasks`) is safe: what was added isn't added twice.
    """

    tasks: Sequence[object] = ()
