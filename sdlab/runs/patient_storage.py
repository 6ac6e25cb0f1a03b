"""Optuna's storage on a database server that may be away for a while: each call waits for it and is made again."""

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import tenacity
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from sqlalchemy.exc import InterfaceError, OperationalError, PendingRollbackError

from sdlab.errors import first_line
from sdlab.runs.files import write_errno

PATIENCE = 600.0  # seconds
LOST = (OperationalError, InterfaceError, PendingRollbackError)  # the last: Optuna asked again in a broken session
this_thread = threading.local()


def is_away(error: BaseException) -> bool:
    """True for a server that was restarted or cannot be reached, not for one whose disk is full."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    return isinstance(cause, LOST) and not write_errno(cause)


def say(state: tenacity.RetryCallState) -> None:
    if state.attempt_number == 1:
        storage, error = state.args[0], state.outcome.exception()
        url = storage.engine.url.render_as_string(hide_password=True)
        print(
            f"{url} is away ({first_line(error.__cause__ or error)}): waiting up to {PATIENCE / 60:g} minutes for it."
        )


def stop(state: tenacity.RetryCallState) -> bool:
    return state.seconds_since_start > PATIENCE


def patiently(method: Callable) -> Callable:
    """The method, repeated while the server is away; its own error after `PATIENCE`.

    The outermost call is repeated: those inside use its session, which is lost with the connection.
    """
    retry, wait = tenacity.retry_if_exception(is_away), tenacity.wait_exponential(multiplier=0.5, max=10)
    repeated = tenacity.retry(retry=retry, wait=wait, stop=stop, before_sleep=say, reraise=True)(method)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if getattr(this_thread, "is_inside", False):
            return method(*args, **kwargs)
        this_thread.is_inside = True
        try:
            return repeated(*args, **kwargs)
        finally:
            this_thread.is_inside = False

    return call


class PatientStorage(RDBStorage):
    """A server's storage. A lost connection is noticed before it is used (`pool_pre_ping`).

    An interrupted transaction is rolled back, so a call can be made again: all calls set a value, which may be set twice. A new
    trial could be made twice, if only the server's answer was lost; `open_trial` then takes the first.
    """

    def __init__(self, url: str):
        patiently(RDBStorage.__init__)(self, url, engine_kwargs=dict(pool_pre_ping=True))  # makes the tables

    def set_trial_state_values(self, trial_id: int, state: Any, values: Any = None) -> bool:
        try:
            return super().set_trial_state_values(trial_id, state, values)
        except UpdateFinishedTrialError:
            if self.get_trial(trial_id).state != state:
                raise
            return True  # told before, and only the answer was lost


for name, method in {**vars(RDBStorage), **vars(PatientStorage)}.items():
    if inspect.isfunction(method) and not name.startswith("__"):
        setattr(PatientStorage, name, patiently(method))
