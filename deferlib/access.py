"""Who gets in where only tasks and admins may (App Engine's `login: admin`), and who sets an engine's headers by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

R = TypeVar("R")

ADMIN_KEY = "deferlib.admin"  # in the environ or the scope of an admin's request, where no HTTP server can put it

_LOCAL_HOST = re.compile(r"(localhost|[a-z0-9-]+\.localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?\Z", re.IGNORECASE)
_LOCAL_ADDRESS = re.compile(r"(127(\.\d{1,3}){3}|::1|::ffff:127(\.\d{1,3}){3})\Z", re.IGNORECASE)
_FORWARDED = (
    *("X-Forwarded-For", "Forwarded", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP", "Via", "True-Client-IP"),
    *("CF-Connecting-IP", "CF-Ray", "Ngrok-Trace-Id", "X-Original-Host"),
)
_PATTERN = re.compile(r"[*<>{}?%()|^$\\]")
_OWN_SITES = ("", "none", "same-origin")

_open = False


class Access(Generic[R]):
    """What one middleware says of it: the paths that are for tasks and admins only, and who is an admin.

    A request is whatever *is_admin* takes: a WSGI environ, or an ASGI scope.
    """

    __slots__ = ("_covered", "is_admin", "paths")

    def __init__(self, paths: Iterable[str] | str = (), is_admin: Callable[[R], object] | None = None) -> None:
        self.paths = (paths,) if isinstance(paths, str) else tuple(paths)
        for path in self.paths:
            if not isinstance(path, str) or not path.startswith("/"):
                raise ValueError(f"paths that are for tasks only begin with '/', like '/tasks', not {path!r}")
            if _PATTERN.search(path) or ".." in path.split("/"):
                raise ValueError(
                    f"a path that is for tasks only stands for itself and all below it, decoded: '/tasks', not {path!r}"
                )
        if is_admin is not None and not callable(is_admin):
            raise ValueError(f"is_admin is a function of the request, not {type(is_admin).__name__}")
        self._covered = [_segments(path) for path in self.paths]
        self.is_admin = is_admin

    def covers(self, path: str, *, anywhere: bool = False) -> bool:
        """Tell whether *path* (decoded, below the app's mount point) is one of the paths, or lies below one.

        However it is spelled: in any letter case, and with empty, `.` and `..` segments as it came, and resolved. With
        *anywhere* also if a covered path stands further behind: where it isn't sure what the app takes for its mount point.
        """
        if not self._covered:
            return False
        came = _segments(path)
        resolved: list[str] = []
        for segment in came:
            if segment == "..":
                del resolved[-1:]
            else:
                resolved.append(segment)
        return any(
            found[start : start + len(prefix)] == prefix
            for prefix in self._covered
            for found in (came, resolved)
            for start in range(len(found) if anywhere and prefix else 1)
        )

    def joined(self, paths: Iterable[str], is_admin: Callable[[R], object] | None) -> Access[R]:
        """Return this one with more *paths*, and with *is_admin*; ValueError if it has another one."""
        if is_admin is not None and self.is_admin is not None and is_admin != self.is_admin:
            raise ValueError("an app that is wrapped has one is_admin, and this would be a second one; leave one of them")
        return Access((*self.paths, *paths), self.is_admin or is_admin)


def _segments(path: str) -> list[str]:
    return [segment for segment in path.casefold().split("/") if segment not in ("", ".")]


def open_to_this_machine() -> None:
    """From now on whoever sits at this machine is an admin of the apps in this process. For development servers only."""
    global _open
    _open = True


def is_at_this_machine(address: str, header: Callable[[str], str]) -> bool:
    """Tell whether a request comes from the developer, in a process that is open to them; *header* returns '' for none.

    Not if it came by way of a tunnel or proxy that says so, by another name than this machine's own (DNS rebinding), or
    from a page of another site that is open in the developer's browser.
    """
    return (
        _open
        and _LOCAL_ADDRESS.match(address) is not None
        and _LOCAL_HOST.match(header("Host")) is not None
        and not any(header(name) for name in _FORWARDED)
        and header("Sec-Fetch-Site") in _OWN_SITES
        and header("Origin") in ("", f"http://{header('Host')}", f"https://{header('Host')}")
    )
