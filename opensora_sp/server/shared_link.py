"""The connection to the database of a shared queue, opened again when it is lost."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from opensora_sp.base.screen import one_line
from opensora_sp.server.queue_url import without_password

CHANNEL = "opensora_sp"
T = TypeVar("T")
# It warns of every rollback that a lost connection makes impossible. We say once that it is lost.
logging.getLogger("psycopg").setLevel(logging.ERROR)


class QueueLost(Exception):  # noqa: N818 (a state that ends by itself)
    """The database does not answer now. It is tried again with the next call."""


class Link:
    """One connection, opened again when it is lost. Threads take turns.

    name: what the database shows of it. listens: whether `wait` is to hear of new jobs.
    """

    def __init__(self, url: str, name: str, *, listens: bool = False) -> None:
        self._url, self._name, self._listens = url, name, listens
        self._lock = threading.Lock()
        self._connection: Any = None
        self._since: float | None = None
        # Counts connections: whoever has seen another number may have missed something.
        self.contact = 0

    def run(self, work: Callable[[Any], T]) -> T:
        """Do `work` in a transaction. Raises QueueLost; what was begun may have been done then."""
        import psycopg

        with self._lock:
            try:
                with self._transaction() as connection:
                    return work(connection)
            except (KeyboardInterrupt, SystemExit):
                self._drop()  # a signal came in the middle of a statement
                raise
            except (psycopg.OperationalError, psycopg.InterfaceError) as error:
                self._drop()
                raise QueueLost(without_password(one_line(str(error)), self._url)) from None

    def wait(self, seconds: float) -> bool:
        """Wait for a word of another process that there may be something to do; whether it came."""
        import psycopg

        with self._lock:
            try:
                # All that have come, not the first: each of the others would end a wait later on.
                return bool(list(self._opened().notifies(timeout=seconds, stop_after=1)))
            except (KeyboardInterrupt, SystemExit):
                self._drop()
                raise
            except (psycopg.OperationalError, psycopg.InterfaceError) as error:
                self._drop()
                raise QueueLost(without_password(one_line(str(error)), self._url)) from None

    def steady_seconds(self) -> float:
        """How long there has been contact without a break."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def close(self) -> None:
        """Give the connection back."""
        with self._lock:
            self._drop()

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        """The connection, in a transaction.

        A connection that was lost while nobody used it is found out by BEGIN. Nothing has been done
        then, so a new one is tried at once.
        """
        import psycopg

        fresh = self._connection is None
        with ExitStack() as stack:
            connection = self._opened()
            try:
                stack.enter_context(connection.transaction())
            except psycopg.OperationalError:
                if fresh:
                    raise
                self._drop()
                connection = self._opened()
                stack.enter_context(connection.transaction())
            yield connection

    def _opened(self) -> Any:
        import psycopg

        if self._connection is None or self._connection.closed:
            self._drop()
            self._connection = psycopg.connect(
                self._url,
                autocommit=True,
                application_name=self._name,
                connect_timeout=5,
                # A cut cable is noticed within seconds, not when TCP gives up.
                keepalives_idle=5,
                keepalives_interval=2,
                keepalives_count=3,
                tcp_user_timeout=10_000,
                options="-c statement_timeout=15000 -c idle_in_transaction_session_timeout=60000",
            )
            if self._listens:
                self._connection.execute(f"LISTEN {CHANNEL}")
            self._since = time.monotonic()
            self.contact += 1
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection, self._since = None, None
