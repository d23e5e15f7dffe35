"""The enums of the C headers. Written by constants.py: change the headers instead."""

from enum import IntEnum, IntFlag


class Status(IntEnum):
    """vm_status"""

    OK = 0
    E_INVALID = -1
    E_NOMEM = -2
    E_BUSY = -3
    E_EXISTS = -4
    E_NOTFOUND = -5
    E_UNSUPPORTED = -6
    E_FAULT = -7
    E_FORMAT = -8
    E_HOST = -9
    E_INTERNAL = -10


class Prot(IntFlag):
    """vm_prot"""

    NONE = 0
    R = 1
    W = 2
    X = 4
    RW = 3
    RX = 5
    RWX = 7


class Backend(IntEnum):
    """vm_backend"""

    AUTO = 0
    KVM = 1
    JIT = 2
    INTERP = 3


class Platform(IntEnum):
    """vm_platform"""

    BARE = 0
    PC = 1


class Mode(IntEnum):
    """vm_mode"""

    RESET = 0
    REAL = 1
    FLAT32 = 2
    FLAT64 = 3


class ExitReason(IntEnum):
    """vm_exit_reason"""

    HALT = 1
    IO = 2
    MMIO = 3
    UNMAPPED = 4
    BUDGET = 5
    DEADLINE = 6
    KICK = 7
    HOOK = 8
    UNTIL = 9
    BREAKPOINT = 10
    STEP = 11
    EXCEPTION = 12
    HYPERCALL = 13
    SHUTDOWN = 14
    RESET = 15
    POWEROFF = 16
    GUEST_EXIT = 17
    INTERNAL = 18
    VIOLATION = 19
    REPLAY = 20


class Reg(IntEnum):
    """vm_reg_id"""

    NONE = 0
    RAX = 1
    RCX = 2
    RDX = 3
    RBX = 4
    RSP = 5
    RBP = 6
    RSI = 7
    RDI = 8
    R8 = 9
    R9 = 10
    R10 = 11
    R11 = 12
    R12 = 13
    R13 = 14
    R14 = 15
    R15 = 16
    RIP = 17
    RFLAGS = 18
    ES = 19
    CS = 20
    SS = 21
    DS = 22
    FS = 23
    GS = 24
    LDTR = 25
    TR = 26
    ES_BASE = 27
    CS_BASE = 28
    SS_BASE = 29
    DS_BASE = 30
    FS_BASE = 31
    GS_BASE = 32
    LDTR_BASE = 33
    TR_BASE = 34
    CR0 = 35
    CR2 = 36
    CR3 = 37
    CR4 = 38
    CR8 = 39
    DR0 = 40
    DR1 = 41
    DR2 = 42
    DR3 = 43
    DR6 = 44
    DR7 = 45
    EFER = 46
    XCR0 = 47
    ST0 = 48
    ST1 = 49
    ST2 = 50
    ST3 = 51
    ST4 = 52
    ST5 = 53
    ST6 = 54
    ST7 = 55
    FCW = 56
    FSW = 57
    FTW = 58
    MXCSR = 59
    MM0 = 60
    MM1 = 61
    MM2 = 62
    MM3 = 63
    MM4 = 64
    MM5 = 65
    MM6 = 66
    MM7 = 67
    XMM0 = 68
    XMM1 = 69
    XMM2 = 70
    XMM3 = 71
    XMM4 = 72
    XMM5 = 73
    XMM6 = 74
    XMM7 = 75
    XMM8 = 76
    XMM9 = 77
    XMM10 = 78
    XMM11 = 79
    XMM12 = 80
    XMM13 = 81
    XMM14 = 82
    XMM15 = 83
    YMM0 = 84
    YMM1 = 85
    YMM2 = 86
    YMM3 = 87
    YMM4 = 88
    YMM5 = 89
    YMM6 = 90
    YMM7 = 91
    YMM8 = 92
    YMM9 = 93
    YMM10 = 94
    YMM11 = 95
    YMM12 = 96
    YMM13 = 97
    YMM14 = 98
    YMM15 = 99


class TraceCategory(IntFlag):
    """vm_trace_category"""

    DECODE = 1
    IR = 2
    MCODE = 4
    EXIT = 8
    MMIO = 16
    IRQ = 32
    MMU = 64
    ALL = 127


class HookKind(IntEnum):
    """vm_hook_kind"""

    INSN = 1
    BLOCK = 2
    EDGE = 3
    MEM_READ = 4
    MEM_WRITE = 5
    EXCEPTION = 6
    SYSCALL = 7
    CPUID = 8
    MSR = 9
    INTERRUPT = 10
    PORT = 11
    FETCH = 12


class HookResult(IntEnum):
    """vm_hook_result"""

    CONTINUE = 0
    STOP = 1
    SKIP = 2
    RETRY = 3


class Advice(IntFlag):
    """vm_advice"""

    HUGE = 1
    SMALL = 2
    MERGEABLE = 4
    UNMERGEABLE = 8
    PREFAULT = 16


class EptAction(IntEnum):
    """vm_ept_action"""

    STOP = 0
    RETRY = 1
    EMULATE = 2
    STEP = 3


class CompareKind(IntEnum):
    """vm_compare_kind"""

    CMP = 1
    TEST = 2
    SUB = 3
    STRING = 4
    SCAN = 5
    VECTOR = 6


class SnapshotFlags(IntFlag):
    """vm_snapshot_flags"""

    COMPRESS = 1
    NO_VERIFY = 2
    NO_SYNC = 4


class GdbAction(IntEnum):
    """vm_gdb_action"""

    DEFAULT = 0
    RUN = 1
    STOP = 2
    END = 3


class SandboxFlags(IntFlag):
    """vm_sandbox_flags"""

    KVM = 1
    THREADS = 2
    SOCKETS = 4
    ERRNO = 8


class ReplayMode(IntEnum):
    """vm_replay_mode"""

    OFF = 0
    RECORDING = 1
    PLAYING = 2


class MmuContext(IntEnum):
    """VM_MMU_*"""

    SUPERVISOR = 0
    USER = 1
    SUPERVISOR_AC = 2


class HookFlags(IntFlag):
    """VM_HOOK_*"""

    GPA = 1
    EXACT = 2
    SWITCH = 4


class EventFlags(IntFlag):
    """VM_EVENT_*"""

    WRITE = 1
    SOFT = 2
    ERROR = 4
    SYSENTER = 8


__all__ = ["Status", "Prot", "Backend", "Platform", "Mode", "ExitReason", "Reg", "TraceCategory", "HookKind", "HookResult", "Advice", "EptAction", "CompareKind", "SnapshotFlags", "GdbAction", "SandboxFlags", "ReplayMode", "MmuContext", "HookFlags", "EventFlags"]
