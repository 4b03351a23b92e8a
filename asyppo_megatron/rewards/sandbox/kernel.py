"""Calls of the Linux kernel that Python has no function for, and the filter of system calls."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import signal
import struct
from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
CLONE_NEWCGROUP, CLONE_NEWTIME = 0x2000000, 0x80
_CLONE_NEW = 0x7E020000 | CLONE_NEWTIME

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 36, 38, 47
_SECCOMP_MODE_FILTER, _PR_CAP_AMBIENT_CLEAR_ALL = 2, 4
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MOUNT_ATTR = {"rdonly": 1, "nosuid": 2, "nodev": 4}

_libc = ctypes.CDLL(None, use_errno=True)

# By machine: its audit number, then its numbers of system calls.
_ARCHITECTURES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "clone": 56, "socket": 41, "ptrace": 101, "pivot_root": 155, "chroot": 161, "acct": 163,
            "settimeofday": 164, "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168,
            "reboot": 169, "sethostname": 170,
            "setdomainname": 171, "init_module": 175, "delete_module": 176, "quotactl": 179, "clock_settime": 227,
            "kexec_load": 246, "keyctl": 250, "unshare": 272, "perf_event_open": 298, "open_by_handle_at": 304,
            "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "finit_module": 313,
            "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323,
            "shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240, "add_key": 248, "request_key": 249,
            "memfd_create": 319, "personality": 135, "kcmp": 312, "name_to_handle_at": 303,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "clone": 220, "socket": 198, "ptrace": 117, "pivot_root": 41, "chroot": 51, "acct": 89, "settimeofday": 170,
            "mount": 40, "umount2": 39, "swapon": 224, "swapoff": 225, "reboot": 142, "sethostname": 161,
            "setdomainname": 162, "init_module": 105, "delete_module": 106, "quotactl": 60, "clock_settime": 112,
            "kexec_load": 104, "keyctl": 219, "unshare": 97, "perf_event_open": 241, "open_by_handle_at": 265,
            "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271, "finit_module": 273,
            "kexec_file_load": 294, "bpf": 280, "userfaultfd": 282,
            "shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180, "add_key": 217, "request_key": 218,
            "memfd_create": 279, "personality": 92, "kcmp": 272, "name_to_handle_at": 264,
        },
    ),
}  # fmt: skip
# These have the same number on every machine.
_COMMON = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "clone3": 435, "pidfd_getfd": 438,
    "mount_setattr": 442, "memfd_secret": 447,
}  # fmt: skip
# No program that solves a problem calls these: the caller is killed, and the cause counted. Some hold memory that no
# limit counts, some are merely probed for by libraries: they fail.
_FAIL = {
    "shmget", "semget", "msgget", "mq_open", "add_key", "request_key", "memfd_create", "memfd_secret", "personality",
    "kcmp", "name_to_handle_at", "io_uring_setup", "io_uring_enter", "io_uring_register",
}  # fmt: skip
_SECCOMP_ALLOW, _SECCOMP_KILL, _SECCOMP_ERRNO = 0x7FFF0000, 0x80000000, 0x50000


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, *arguments: int) -> None:
    values = [ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4]]
    _check(_libc.prctl(option, *values), f"prctl {option}")


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    def text(value: str | None) -> bytes | None:
        return None if value is None else os.fsencode(value)

    result = _libc.mount(text(source), text(target), text(kind), ctypes.c_ulong(flags), text(data))
    _check(result, f"mount of {source} on {target}")


def unmount(target: str) -> None:
    _check(_libc.umount2(os.fsencode(target), MNT_DETACH), f"umount of {target}")


def pivot_root_here() -> None:
    """Make the current directory the root of this mount namespace; nothing of the old root stays in sight."""
    number = _numbers()["pivot_root"]
    _check(_libc.syscall(ctypes.c_long(number), b".", b"."), "pivot_root")
    unmount(".")
    os.chdir("/")


def make_read_only(path: str) -> None:
    """A mount and those below it: no writing, no set-user-id files, no devices."""
    attributes = struct.pack("=QQQQ", sum(_MOUNT_ATTR.values()), 0, 0, 0)
    number = ctypes.c_long(_COMMON["mount_setattr"])
    if _libc.syscall(number, _AT_FDCWD, os.fsencode(path), _AT_RECURSIVE, attributes, ctypes.c_size_t(32)) == 0:
        return
    if ctypes.get_errno() != errno.ENOSYS:
        _check(-1, f"mount_setattr of {path}")
    kept = os.statvfs(path).f_flag & (MS_NOEXEC | 1024 | 2048 | 4096)  # flags that a user namespace may not clear
    mount("none", path, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | kept)


def bound_capabilities() -> None:
    """Nothing can be gained by execve any more; while this process still may say so."""
    prctl(PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    for capability in range(64):
        if _libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) < 0:
            break  # EINVAL: beyond the last one; EPERM: none to drop


def drop_capabilities() -> None:
    """Of this process."""
    header, data = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _check(_libc.capset(header, data), "capset")


def kill_children() -> None:
    """SIGKILL to the children of this process, adopted ones included."""
    own = os.getpid()
    with open(f"/proc/{own}/task/{own}/children") as file:
        for pid in file.read().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def _numbers() -> dict[str, int]:
    return _ARCHITECTURES.get(platform.machine(), (0, {}))[1] | _COMMON


def filter_available() -> bool:
    return platform.machine() in _ARCHITECTURES


def filter_system_calls() -> None:
    """Deny sockets, tracing, mounts, namespaces, kernel interfaces and memory outside the limits, for good."""
    program = _filter_program()
    code = ctypes.create_string_buffer(program)
    fprog = struct.pack("=HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    held: Any = ctypes.create_string_buffer(fprog)
    result = _libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), held, 0, 0)
    _check(result, "seccomp")


def _filter_program() -> bytes:
    """Classic BPF over (number, architecture, arguments)."""
    architecture, numbers = _ARCHITECTURES[platform.machine()][0], _numbers()

    def op(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, k)

    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    number = op(load, 0)
    steps = [op(load, 4), op(equal, architecture, 1, 0), op(give, _SECCOMP_KILL), number]
    if platform.machine() == "x86_64":
        steps += [op(at_least, 0x40000000, 0, 1), op(give, _SECCOMP_KILL)]  # the x32 twins of all calls
    for name, value in sorted(numbers.items()):
        if name == "clone3":  # its flags lie in memory, out of reach: glibc falls back to clone
            steps += [op(equal, value, 0, 1), op(give, _SECCOMP_ERRNO | errno.ENOSYS)]
        elif name == "clone":
            steps += [op(equal, value, 0, 4), op(load, 16), op(any_bit, _CLONE_NEW, 0, 1), op(give, _SECCOMP_KILL)]
            steps += [number]
        else:
            verdict = _SECCOMP_ERRNO | errno.EPERM if name in _FAIL else _SECCOMP_KILL
            steps += [op(equal, value, 0, 1), op(give, verdict)]
    return b"".join([*steps, op(give, _SECCOMP_ALLOW)])
