"""A seccomp filter for programs that nobody has read: what the kernel refuses to them, in BPF.

Everything that a program which reads its input and prints an answer has no use for: sockets, processes, other
processes' memory, signals and priorities, memory and disk that no limit counts, metadata of files; and, where Landlock
is missing, every way to change a file. Standard library only; it runs in the child process (sandbox_child.py).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

# name -> number on x86-64 and on aarch64 (None: does not exist there); asm/unistd_64.h and asm-generic/unistd.h.
_NETWORK = {
    "socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "accept4": (288, 242), "bind": (49, 200),
    "listen": (50, 201), "sendmsg": (46, 211), "sendmmsg": (307, 269),
}  # fmt: skip
_PROCESSES = {
    "fork": (57, None), "vfork": (58, None), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "process_madvise": (440, 440), "process_mrelease": (448, 448), "setpriority": (141, 140),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274), "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239),
}  # fmt: skip
_MACHINE = {
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "syslog": (103, 116), "acct": (163, 89), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162),
    "quotactl": (179, 60), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "personality": (135, 92),
    "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None), "vhangup": (153, 58),
    # Slow for everybody, or few for a user.
    "sync": (162, 81), "syncfs": (306, 267), "inotify_init": (253, None), "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
}  # fmt: skip
# Shared and anonymous files are memory that RLIMIT_AS does not count; fallocate takes disk that RLIMIT_FSIZE does not.
_MEMORY = {
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192),
    "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180),
    "mq_unlink": (241, 181), "fallocate": (285, 47),
}  # fmt: skip
# Landlock knows none of these.
_METADATA = {
    "truncate": (76, 45), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469),
}  # fmt: skip
_CHANGES = {
    "creat": (85, None), "mkdir": (83, None), "mkdirat": (258, 34), "mknod": (133, None), "mknodat": (259, 33),
    "unlink": (87, None), "unlinkat": (263, 35), "rmdir": (84, None), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36),
    "ftruncate": (77, 46),
}  # fmt: skip
# Their arguments lie in memory, where a filter can't look; libraries fall back to the older call.
_UNKNOWN = {"clone3": (435, 435), "openat2": (437, 437)}

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_X32 = 0x40000000
_CLONE_THREAD = 0x00010000
_O_TMPFILE = 0x400000
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | _O_TMPFILE
_SET_OWNER = (8, 10, 15)  # fcntl: F_SETOWN, F_SETSIG, F_SETOWN_EX send signals to anybody
_PR_SET_PDEATHSIG = 1
_IOCTLS = (0x5412, 0x5452, 0x8901, 0x8902)  # TIOCSTI types into terminals; FIOASYNC, FIOSETOWN, SIOCSPGRP send signals

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_SENDTO = (44, 206)
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2


def why_not() -> str | None:
    """The reason why no filter can be had on this machine, by its kind alone."""
    machine = os.uname().machine
    if not sys.platform.startswith("linux"):
        return f"there is no seccomp on {sys.platform}"
    if machine not in _ARCHITECTURES or sys.maxsize < 2**32:
        return f"no system calls are known here for {machine}"
    return None


def install(*, read_only: bool) -> None:
    """Put the filter on this process, and on all that it may become. `read_only`: no file can be changed either.

    Raises:
        OSError: the kernel refuses it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    code = _program(read_only)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HL", len(code) // 8, ctypes.addressof(buffer))
    for call in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0)):
        if libc.prctl(call[0], *(ctypes.c_char_p(a) if isinstance(a, bytes) else ctypes.c_ulong(a) for a in call[1:])):
            raise OSError(ctypes.get_errno(), "prctl")


def _program(read_only: bool) -> bytes:
    column, architecture = _ARCHITECTURES[os.uname().machine]
    refuse, unknown = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS
    lines = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if column == 0:
        lines += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, refuse)]
    tables = [_NETWORK, _PROCESSES, _MACHINE, _MEMORY, _METADATA, *([_CHANGES] if read_only else [])]
    for answer, found in ((refuse, tables), (unknown, [_UNKNOWN])):
        for number in (numbers[column] for table in found for numbers in table.values()):
            if number is not None:
                lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, answer)]
    # A filter reads 32 bits at a time. An address has 64; every other argument that is judged below has 32.
    lines += [
        (_EQUAL, 0, 4, _SENDTO[column]),
        (_LOAD, 0, 0, _ARGUMENTS + 8 * 4 + 4),
        (_EQUAL, 1, 0, 0),
        (_RETURN, 0, 0, refuse),
        (_LOAD, 0, 0, _NUMBER),
    ]
    for numbers, argument, test, values, allowed in _by_argument(read_only):
        if numbers[column] is None:
            continue
        said = [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument)]
        for value in values:
            said += [(test, 0, 1, value), (_RETURN, 0, 0, _ALLOW if allowed else refuse)]
        said.append((_RETURN, 0, 0, refuse if allowed else _ALLOW))
        lines += [(_EQUAL, 0, len(said), numbers[column]), *said]
    lines.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *line) for line in lines)


def _by_argument(read_only: bool) -> list[tuple]:
    """Calls that are judged by an argument: numbers, its place, the test, values, and whether these are what is
    allowed (anything else refused) or what is refused."""
    own = os.getpid()
    judged = [
        ((56, 220), 0, _ANY_BIT, [_CLONE_THREAD], True),  # clone: threads, no processes
        ((62, 129), 0, _EQUAL, [0, own], True),  # kill
        ((234, 131), 0, _EQUAL, [own], True),  # tgkill: abort() and raise()
        ((302, 261), 0, _EQUAL, [0], True),  # prlimit64
        ((53, 199), 0, _EQUAL, [1], True),  # socketpair: AF_UNIX, which asyncio wakes itself by
        (_SENDTO, 4, _EQUAL, [0], True),  # no address
        ((157, 167), 0, _EQUAL, [_PR_SET_PDEATHSIG], False),  # prctl: it dies with who waits for it
        ((72, 25), 1, _EQUAL, _SET_OWNER, False),  # fcntl
        ((16, 29), 1, _EQUAL, _IOCTLS, False),  # ioctl
    ]
    # A file without a name is in no folder that could be looked at.
    opened = [_WRITES if read_only else _O_TMPFILE]
    return [*judged, ((2, None), 1, _ANY_BIT, opened, False), ((257, 56), 2, _ANY_BIT, opened, False)]  # open, openat
