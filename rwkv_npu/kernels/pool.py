"""The threads that execute programs: one pool for the process.

A program is a sequence of stages. The work of a stage is cut into pieces. A free thread takes the next piece from a
counter that all threads share. The thread that finishes the last piece opens the next stage. So a thread whose core is
taken by another process delays no more than the piece it has begun. A stage with too little work for two threads is one
piece: the thread that opens it executes it at once.

Thread 0 is the caller's; the others are helpers. A thread without work looks for some for a moment, then sleeps, and
the thread that opens a stage wakes it. A helper that had to wait for its core stays away until the core is free again:
otherwise it could lose the core during a piece, and all others would wait for it.

All of this is compiled code, so that no Python exception (Ctrl-C) can interrupt it.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
import weakref
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from rwkv_npu.kernels.compiler import Kernel, inner
from rwkv_npu.kernels.instructions import LINEAR, WKV
from rwkv_npu.kernels.machine import instruction, run_piece
from rwkv_npu.kernels.products import SCRATCH_BYTES
from rwkv_npu.kernels.program import aligned_bytes
from rwkv_npu.kernels.simd import (
    ADDRESS,
    add_atomically,
    load_long,
    operation,
    pause,
    pointer,
    read_atomically,
    store_long,
    write_atomically,
)

SPIN_NS = 100_000  # during a program: a thread looks for work this long, then sleeps
# After a program: a helper looks for work this long. A token is a few programs, with little time in between.
LINGER_NS = 1_000_000
LOOKS = 64  # a thread without work reads the clock once in 64 looks for some
LATE_NS = 500_000  # a helper that was without a core for so long stays away
AWAY_NS = 50_000_000  # it comes back when it has not been without a core for so long
AWAY_US = 5_000  # the time it sleeps between two tests of this
NAP_US = 50  # on systems without semaphores: the time a thread sleeps between two looks for work

GRAIN = 1 << 15  # the least multiplications of a piece: some microseconds
PIECES = 4  # pieces of a stage for each thread, if there is enough work
# The cost of an element of other instructions, in multiplications.
ROW_COST, RECURRENCE_COST = 4, 256

# The memory that the threads share, int64 by offset in bytes. Numbers that change often have a cache line each.
_LINE = 64
_NEXT = 0  # the number of pieces of the open stage (upper half), and of the next one to take (lower half)
_DONE = _LINE  # the finished pieces of this stage
_ENDED = 2 * _LINE  # the programs that have ended
_CLOSED = 3 * _LINE  # 1 once the pool is closed: helpers end
_WAITED = 4 * _LINE  # how often a thread fell asleep during a program
_STAGE = 5 * _LINE  # written by the thread that opens a stage, read by those that execute its pieces:
_PROGRAM, _LENGTH, _BEGIN, _END, _CLOCK, _SINCE = (_STAGE + 8 * i for i in range(6))
_PER_THREAD = 6 * _LINE
# The memory of each thread: times at which it was last woken, and at which its clocks were last noted.
_ASLEEP, _SEMAPHORE, _WOKEN = (_LINE * i for i in range(3))
_WALL, _CPU = _WOKEN + 8, _WOKEN + 16
_THREAD_BYTES = 3 * _LINE

_HALF = 32
_LOW = (1 << _HALF) - 1

# Only Linux has unnamed semaphores. On other systems a sleeping thread looks for work every NAP_US.
SEMAPHORES = sys.platform == "linux"
_libc = ctypes.CDLL(None)
_sem_post = types.ExternalFunction("sem_post", types.int32(types.intp))
_sem_wait = types.ExternalFunction("sem_wait", types.int32(types.intp))
_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.intp))
_MONOTONIC, _THREAD_CPU = (6, 16) if sys.platform == "darwin" else (1, 3)
_SECOND = 1_000_000_000  # nanoseconds


@operation(types.int64, ADDRESS, types.int64)
def _swap(b: Any, address: Any, number: Any) -> Any:
    """Replace an int64 that threads share and return its old value."""
    return b.atomic_rmw("xchg", pointer(b, address, ir.IntType(64)), number, "seq_cst")


@inner
def _time(clock, scratch):  # type: ignore[no-untyped-def]
    """The time of a clock of the C library, in ns. It overwrites 16 bytes of scratch."""
    _clock_gettime(types.int32(clock), scratch)
    return load_long(scratch) * _SECOND + load_long(scratch + 8)


@inner
def _of_thread(control, thread):  # type: ignore[no-untyped-def]
    """The address of a thread's own memory."""
    return control + _PER_THREAD + thread * _THREAD_BYTES


@inner
def _is_open(control):  # type: ignore[no-untyped-def]
    """True if the open stage has a piece that no thread has taken."""
    word = read_atomically(control + _NEXT)
    return (word & _LOW) < (word >> _HALF)


@inner
def _measure(program, begin, length, threads):  # type: ignore[no-untyped-def]
    """(end, pieces) of the stage that begins at instruction `begin`: its end, and into how many pieces to cut it."""
    work, most, end = 0, 1, begin
    while end < length:
        t = instruction(program, end)
        if end > begin and t.wait:
            break
        if t.op == LINEAR:
            work += t.rows * t.k * t.n
            most = max(most, t.rows * t.n // 16)
        elif t.op == WKV:
            work += t.rows * t.width * RECURRENCE_COST
            most = max(most, t.n * load_long(load_long(t.vector)))  # heads of segments
        else:
            work += t.rows * t.width * ROW_COST
            most = max(most, t.rows)
        end += 1
    pieces = min(work // GRAIN, PIECES * threads)
    if pieces > threads:
        pieces -= pieces % threads
    return end, max(1, min(pieces, most)) if threads > 1 else 1


@inner
def _wake(control, first, last, count, scratch):  # type: ignore[no-untyped-def]
    """Wake up to `count` of the threads first .. last that sleep."""
    for thread in range(first, last):
        mine = _of_thread(control, thread)
        if count > 0 and read_atomically(mine + _ASLEEP) and _swap(mine + _ASLEEP, 0):
            store_long(_time(_MONOTONIC, scratch), mine + _WOKEN)
            if SEMAPHORES:
                _sem_post(mine + _SEMAPHORE)
            count -= 1


@inner
def _charge(control, clock, scratch):  # type: ignore[no-untyped-def]
    """Stop the clock that runs, adding the time since it was started, and start another (0: none)."""
    last = load_long(control + _CLOCK)
    if last != clock:
        now = _time(_MONOTONIC, scratch)
        if last:
            store_long(load_long(last) + now - load_long(control + _SINCE), last)
        store_long(now, control + _SINCE)
        store_long(clock, control + _CLOCK)


@inner
def _advance(control, begin, threads, scratch):  # type: ignore[no-untyped-def]
    """Open the stage that begins at instruction `begin`. A stage of one piece is executed, and the next one opened."""
    program, length = load_long(control + _PROGRAM), load_long(control + _LENGTH)
    while begin < length:
        _charge(control, instruction(program, begin).clock, scratch)
        end, pieces = _measure(program, begin, length, threads)
        if pieces > 1:
            store_long(begin, control + _BEGIN)
            store_long(end, control + _END)
            write_atomically(control + _DONE, 0)
            write_atomically(control + _NEXT, pieces << _HALF)
            _wake(control, 0, threads, pieces - 1, scratch)
            return
        run_piece(program, begin, end, 0, 1, scratch)
        begin = end
    _charge(control, 0, scratch)
    add_atomically(control + _ENDED, 1)
    _wake(control, 0, 1, 1, scratch)


@inner
def _is_over(control, thread, ended):  # type: ignore[no-untyped-def]
    """True if this thread shall return: thread 0 at the end of its program, helpers when the pool is closed."""
    if thread == 0:
        return read_atomically(control + _ENDED) != ended
    return read_atomically(control + _CLOSED) != 0


@inner
def _sleep(control, thread, ended):  # type: ignore[no-untyped-def]
    """Sleep until a stage is opened or this thread shall return. It may wake up earlier."""
    mine = _of_thread(control, thread)
    write_atomically(mine + _ASLEEP, 1)
    # Look again: a stage that was opened before the line above has woken nobody.
    if _is_open(control) or _is_over(control, thread, ended):
        if _swap(mine + _ASLEEP, 0):
            return
    if SEMAPHORES:
        _sem_wait(mine + _SEMAPHORE)
    else:
        _usleep(types.uint32(NAP_US))  # type: ignore[call-overload]
    write_atomically(mine + _ASLEEP, 0)  # a signal may have woken us


@inner
def _note_times(mine, scratch):  # type: ignore[no-untyped-def]
    """Note the time, and the CPU time of this thread."""
    store_long(_time(_MONOTONIC, scratch), mine + _WALL)
    store_long(_time(_THREAD_CPU, scratch), mine + _CPU)


@inner
def _lost(mine, scratch):  # type: ignore[no-untyped-def]
    """The time that this thread was without a core since `_note_times`."""
    wall = _time(_MONOTONIC, scratch) - load_long(mine + _WALL)
    return wall - (_time(_THREAD_CPU, scratch) - load_long(mine + _CPU))


@inner
def _stay_away(control, scratch):  # type: ignore[no-untyped-def]
    """Wait until this thread got a core whenever it wanted one, for AWAY_NS. The others work without it until then."""
    now = _time(_MONOTONIC, scratch)
    until = now + AWAY_NS
    while now < until and not read_atomically(control + _CLOSED):
        _usleep(types.uint32(AWAY_US))  # type: ignore[call-overload]
        after = _time(_MONOTONIC, scratch)
        if after - now > AWAY_US * 1000 + LATE_NS:
            until = after + AWAY_NS
        now = after


@inner
def _take_pieces(control, thread, threads, ended, scratch):  # type: ignore[no-untyped-def]
    """Execute pieces until this thread shall return."""
    mine, is_helper = _of_thread(control, thread), thread > 0
    looks, since, before = 0, 0, 0
    late = False
    if is_helper:
        _note_times(mine, scratch)
    while True:
        if late:  # this helper was without a core
            _stay_away(control, scratch)
            _note_times(mine, scratch)
            late, looks = False, 0
        if _is_open(control):
            waited = read_atomically(control + _WAITED)
            word = add_atomically(control + _NEXT, 1)
            piece, pieces = word & _LOW, word >> _HALF
            if piece < pieces:
                begin, end = load_long(control + _BEGIN), load_long(control + _END)
                run_piece(load_long(control + _PROGRAM), begin, end, piece, pieces, scratch)
                if add_atomically(control + _DONE, 1) + 1 == pieces:
                    _advance(control, end, threads, scratch)
                if is_helper and read_atomically(control + _WAITED) != waited:
                    # Another thread fell asleep meanwhile, perhaps waiting for this one, which was without a core.
                    late = _lost(mine, scratch) > LATE_NS
                    _note_times(mine, scratch)
                looks = 0
        elif _is_over(control, thread, ended):
            return
        else:
            pause()
            if looks % LOOKS == 0:
                now = _time(_MONOTONIC, scratch)
                between = load_long(control + _CLOCK) == 0  # no program runs
                if looks == 0:
                    since = before = now
                late = is_helper and now - before > LATE_NS
                before = now
                if not late and now - since > (LINGER_NS if between else SPIN_NS):
                    if not between:
                        add_atomically(control + _WAITED, 1)
                    _sleep(control, thread, ended)
                    if is_helper:
                        _note_times(mine, scratch)
                        woken = load_long(mine + _WOKEN)  # earlier than `now` if nobody has woken it
                        late = woken > now and load_long(mine + _WALL) - woken > LATE_NS
                    looks = -1
            looks += 1


def _work(control, thread, threads, address, length, scratch):  # type: ignore[no-untyped-def]
    """Thread 0: execute a program with the helpers, or close the pool if length is 0. Helpers: help until then."""
    ended = read_atomically(control + _ENDED)
    if thread == 0:
        if length == 0:
            write_atomically(control + _CLOSED, 1)
            _wake(control, 1, threads, threads, scratch)
            return
        store_long(address, control + _PROGRAM)
        store_long(length, control + _LENGTH)
        _advance(control, 0, threads, scratch)
    _take_pieces(control, thread, threads, ended, scratch)


work = Kernel(_work, name="work")


class Pool:
    """`threads` threads, the caller's among them. One program at a time."""

    def __init__(self, threads: int):
        self.threads = threads
        self._lock = threading.Lock()
        self._scratch: list[np.ndarray] = []
        self._helpers: list[threading.Thread] = []
        self._owner = 0  # the process that started the threads; 0 before the first run
        _open_pools.add(self)

    def run(self, address: int, length: int) -> None:
        """Execute the program of `length` instructions at `address`."""
        with self._lock:
            if self._owner != os.getpid():  # a forked child has none of its parent's threads
                self._start()
            work.ctypes(self._address, 0, self.threads, address, length, self._own)

    def close(self) -> None:
        with self._lock:
            self._stop()
        _open_pools.discard(self)

    def _start(self) -> None:
        self._owner = os.getpid()
        self._scratch = [aligned_bytes(SCRATCH_BYTES) for _ in range(self.threads)]
        self._control = aligned_bytes(_PER_THREAD + self.threads * _THREAD_BYTES)
        control = self._address = int(self._control.ctypes.data)
        self._own = int(self._scratch[0].ctypes.data)
        for thread in range(self.threads):
            _libc.sem_init(ctypes.c_void_p(control + _PER_THREAD + thread * _THREAD_BYTES + _SEMAPHORE), 0, 0)
        self._helpers = [
            threading.Thread(
                target=work.ctypes,
                args=(control, thread, self.threads, 0, 0, self._scratch[thread].ctypes.data),
                name=f"rwkv_npu-{thread}",
                daemon=True,
            )
            for thread in range(1, self.threads)
        ]
        for helper in self._helpers:
            helper.start()

    def _stop(self) -> None:
        if self._owner == os.getpid():
            work.ctypes(self._address, 0, self.threads, 0, 0, self._own)
            for helper in self._helpers:
                helper.join()
        self._helpers = []


_open_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


@atexit.register
def _close_pools() -> None:
    """Stop all helpers before the interpreter frees the memory of their code."""
    for pool in list(_open_pools):
        pool.close()


_shared: dict[int, Pool] = {}


def shared_pool(threads: int) -> Pool:
    """The process's pool of `threads` threads, made at first use."""
    if threads not in _shared:
        _shared[threads] = Pool(threads)
    return _shared[threads]
