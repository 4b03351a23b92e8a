"""The jail of one program: namespaces and a root directory of its own where the kernel allows, limits everywhere."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from dataclasses import dataclass

from . import kernel

MODES = ("root", "user", "limits")
INNER_UID = 65534  # nobody, inside a user namespace
_NAMESPACES = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
_LIBRARIES = ("/usr/lib", "/usr/lib32", "/usr/lib64", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
WORK = "/tmp"  # the program's only writable directory


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        memory: bytes, address space of a process and resident memory of all together.
        processes: processes and threads at once.
        file_bytes: size of a file, and of all files together where the jail has a file system of its own.
        open_files: file descriptors of a process.
        output_bytes: standard output, and as much of standard error.
        test_s: wall-clock and CPU seconds of one test.
        total_s: wall-clock seconds of all tests.
    """

    memory: int
    processes: int
    file_bytes: int
    open_files: int
    output_bytes: int
    test_s: float
    total_s: float


def describe(mode: str) -> str:
    """The active protection, in words."""
    filtered = "filtered system calls" if kernel.filter_available() else "NO filter of system calls on this machine"
    common = f"resource limits, no new privileges, {filtered}"
    own = "PID, network, mount, IPC and host name spaces of its own, a read-only root directory with a small /tmp"
    return {
        "root": f"user id of its own, {own}, no capabilities, {common}",
        "user": f"unprivileged user namespace, {own}, no capabilities, {common}",
        "limits": f"NOT ISOLATED (no namespaces: files of this user are in reach): {common}",
    }[mode]


def enter_namespaces(mode: str, uid: int, gid: int) -> None:
    """Of the caller's children: everything but mounts takes effect in them. `uid`, `gid`: who runs this."""
    if mode == "limits":
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        return
    kernel.unshare(_NAMESPACES | (kernel.CLONE_NEWUSER if mode == "user" else 0))
    if mode == "user":
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{INNER_UID} {uid} 1"),
            ("gid_map", f"{INNER_UID} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def build_root(scratch: str, prefixes: list[str], files: dict[str, bytes]) -> int | None:
    """A root directory of libraries, interpreter and files, all read-only; then nothing else is in sight.

    Args:
        scratch: an existing directory, mounted over in this namespace only.
        prefixes: what the interpreter consists of.
        files: content by absolute path.

    Returns:
        A directory descriptor of this PID namespace's /proc, which the program never sees; None where it cannot be
        mounted (a container that hides parts of its own).
    """
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("jail", scratch, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=16m,nr_inodes=4096,mode=755")
    for path in dict.fromkeys([*_LIBRARIES, *prefixes]):
        _show(path, scratch)
    for path in _DEVICES:
        _show(path, scratch, read_only=False)
    for path, content in files.items():
        with open(scratch + path, "wb") as file:
            file.write(content)
        os.chmod(scratch + path, 0o444)
    os.mkdir(scratch + WORK)
    proc = _open_proc(scratch)
    os.chdir(scratch)
    kernel.pivot_root_here()
    return proc


def seal_root() -> None:
    """The root itself; mounts below it keep their own mode, so the working directory is mounted after this."""
    kernel.make_read_only("/")


def _show(path: str, scratch: str, read_only: bool = True) -> None:
    """The same path inside: a link as a link, else a read-only mount of what is there."""
    inside = scratch + path
    if not os.path.lexists(path) or os.path.lexists(inside):
        return
    os.makedirs(os.path.dirname(inside), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), inside)
        return
    if os.path.isdir(path):
        os.mkdir(inside)
    else:
        os.close(os.open(inside, os.O_CREAT | os.O_WRONLY, 0o600))
    kernel.mount(path, inside, None, kernel.MS_BIND | kernel.MS_REC)
    if read_only:
        kernel.make_read_only(inside)


def _open_proc(scratch: str) -> int | None:
    target = scratch + "/proc"
    os.mkdir(target)
    try:
        kernel.mount("proc", target, "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    except PermissionError:
        return None
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    kernel.unmount(target)  # what is open stays
    return fd


def fresh_work_directory(mode: str, limits: Limits, uid: int, directory: str) -> None:
    """An empty private directory of bounded size; what a former test left is gone."""
    if mode == "limits":
        _remove(directory)
        os.mkdir(directory, 0o700)
        if os.geteuid() == 0:
            os.chown(directory, uid, uid)
        return
    with contextlib.suppress(OSError):  # EINVAL: the first time there is none
        kernel.unmount(WORK)
    data = f"size={limits.file_bytes},nr_inodes=1024,mode=700"
    kernel.mount("work", WORK, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, data)
    if mode == "root":
        os.chown(WORK, uid, uid)


def _remove(path: str) -> None:
    import shutil  # only where there are no namespaces

    shutil.rmtree(path, ignore_errors=True)
    if os.path.exists(path):  # directories without permissions
        for where, names, _ in os.walk(path):
            for name in names:
                os.chmod(os.path.join(where, name), 0o700)
        shutil.rmtree(path)


def confine(mode: str, limits: Limits, uid: int, directory: str) -> None:
    """Give up everything, in the process that becomes the program; there is no way back."""
    os.setsid()
    seconds = max(1, int(limits.test_s + 0.999))
    for what, value in (
        (resource.RLIMIT_AS, limits.memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files),
        # One more, to tell the limit from the excess; a user namespace counts the two processes around it.
        (resource.RLIMIT_NPROC, limits.processes + (3 if mode == "user" else 1)),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    os.chdir(directory)
    os.umask(0o077)
    kernel.bound_capabilities()
    if os.geteuid() == 0 and mode != "user":
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    kernel.drop_capabilities()
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    if kernel.filter_available():
        kernel.filter_system_calls()


def usage(proc: int | None) -> tuple[int, int]:
    """Threads of this PID namespace but those of its first process, and their resident memory in bytes."""
    threads = memory = 0
    if proc is None:
        return 0, 0
    page = resource.getpagesize()
    for name in os.listdir(proc):
        if not name.isdigit() or name == "1":
            continue
        try:
            fd = os.open(f"{name}/stat", os.O_RDONLY, dir_fd=proc)
        except OSError:  # it ended in the meantime
            continue
        with open(fd, "rb") as file, contextlib.suppress(OSError, IndexError):
            fields = file.read().rpartition(b")")[2].split()
            threads += int(fields[17])
            memory += int(fields[21]) * page
    return threads, memory
