"""The embedded PostgreSQL: started on first use, shared by every process that wants it, stopped by the last one.

What lies where, for a data folder ``.kitrocket/pg``:

* ``.kitrocket/pg``            the data, owned by the account that the server runs under, mode 0700
* ``.kitrocket/pg.log``        what the server prints
* ``.kitrocket/pg.locks/``     three kinds of files, each meaning something only while the kernel holds a lock on it:
  ``start`` (somebody is starting or stopping), ``holder-<pid>-<n>`` (this process uses the server) and ``server``
  (inherited by every process of the server, so that it is free only when the last of them is gone)
* ``/tmp/kitrocket-<uid>-…/``  the socket, in a folder of mode 0700 with a short path

The kernel drops a lock when its process dies, however it dies. So nothing here is a list that can go stale, and
nothing is believed or signalled because of a number in a file.
"""

from kitrocket.embedded.server import Address, ConnectArguments, EmbeddedServer, ServerStatus

__all__ = ["Address", "ConnectArguments", "EmbeddedServer", "ServerStatus"]
