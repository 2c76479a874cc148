"""Whose files a process may believe: its own user's and root's, where nobody else can put others in their place."""

from __future__ import annotations

import os
import stat

_ROOT = 0


def is_trusted(uid: int) -> bool:
    """Tell whether *uid* is root, or the user that this process runs as."""
    return uid in (_ROOT, os.geteuid())


def name(uid: int) -> str:
    """Return the user's name, for people; the number of one who has none."""
    import pwd  # here and below: only errors need it, and every process imports this module

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def myself() -> str:
    """Return the name of the user that this process runs as."""
    return name(os.geteuid())


def trusted() -> str:
    """Return who `is_trusted`, for people."""
    return "root" if os.geteuid() == _ROOT else f"{myself()} or root"


def replaceable(folder: str) -> str:
    """Return why somebody else could put another file in the place of one in *folder*, and the remedy; '' if nobody can.

    In a sticky folder, like /tmp, they can't: there everybody removes their own files only. `OSError` if it can't be
    looked at.
    """
    found = os.stat(folder)
    if not is_trusted(found.st_uid):
        return f"its folder belongs to {name(found.st_uid)}, not to {trusted()}; keep the store in one of your own"
    mode = stat.S_IMODE(found.st_mode)
    if mode & stat.S_ISVTX or not (mode & 0o002 or (mode & 0o020 and not _is_alone_in(found.st_gid))):
        return ""
    return (
        f"others can write to its folder (mode {mode:04o}); run `chmod go-w {folder}`, or keep the store in a folder below "
        "it, which is made for you alone"
    )


def _is_alone_in(gid: int) -> bool:
    """Tell whether a group is root's, or has nobody but this process's user in it, as most systems give one to each."""
    import grp
    import pwd

    if gid == _ROOT:
        return True
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return user.pw_gid == gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
