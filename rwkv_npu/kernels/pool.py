"""The threads that execute tapes: one pool for the process.

Between tapes the helpers look for the next one for a moment before they go to sleep: a token is many tapes with little
in between, and to wake a sleeper takes longer than most of them. All of that happens in compiled code, so that no
exception of Python's (Ctrl-C) can come between handing out a tape and doing one's own share of it.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import weakref
from typing import Any

import numpy as np
from numba import carray, from_dtype, njit, types
from numba.extending import intrinsic

from rwkv_npu import kernels
from rwkv_npu.kernels.instructions import INSTRUCTION
from rwkv_npu.kernels.machine import execute
from rwkv_npu.kernels.products import SCRATCH_BYTES
from rwkv_npu.kernels.program import aligned_bytes
from rwkv_npu.kernels.simd import add_atomically, pause, read_atomically, write_atomically

ROUNDS = 20_000  # of looking for a tape before a helper goes to sleep: about a millisecond

# What the threads share, by offset in bytes: 64-bit numbers, each on a cache line of its own.
_LINE = 64
_TICKET, _MET, _TAPE, _LENGTH, _PER_THREAD = (_LINE * i for i in range(5))
_ASLEEP, _SEMAPHORE, _THREAD_BYTES = 0, _LINE, 2 * _LINE  # within what each thread has

# Semaphores of the C library: a helper sleeps, and is woken, without Python.
_libc = ctypes.CDLL(None)
_sem_post = types.ExternalFunction("sem_post", types.int32(types.intp))
_sem_wait = types.ExternalFunction("sem_wait", types.int32(types.intp))

_Instructions = types.CPointer(from_dtype(INSTRUCTION))
_I8 = types.int64


@intrinsic
def _instructions(_context: Any, address: Any) -> Any:
    def code(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(_Instructions))

    return _Instructions(types.int64), code


@njit(nogil=True)
def _tape(address, length):  # type: ignore[no-untyped-def]
    return carray(_instructions(address), (length,))  # type: ignore[call-arg]


@njit(nogil=True)
def _of_thread(control, thread):  # type: ignore[no-untyped-def]
    return control + _PER_THREAD + thread * _THREAD_BYTES


@njit(nogil=True)
def _publish(control, threads, tape, length):  # type: ignore[no-untyped-def]
    """Hand a tape to the helpers; no length ends them."""
    write_atomically(control + _TAPE, tape)
    write_atomically(control + _LENGTH, length)
    add_atomically(control + _TICKET, 1)
    for thread in range(1, threads):
        if read_atomically(_of_thread(control, thread) + _ASLEEP):
            _sem_post(_of_thread(control, thread) + _SEMAPHORE)


@njit(nogil=True)
def _help(control, thread, threads, scratch):  # type: ignore[no-untyped-def]
    """Execute this thread's share of every tape that is published, until one without length."""
    mine = _of_thread(control, thread)
    ticket, met, rounds = 0, 0, 0
    while True:
        if read_atomically(control + _TICKET) != ticket:
            ticket += 1
            length = read_atomically(control + _LENGTH)
            if length == 0:
                return
            tape = _tape(read_atomically(control + _TAPE), length)
            met = execute(tape, thread, threads, control + _MET, met, scratch)
            rounds = 0
        elif rounds < ROUNDS:
            rounds += 1
            pause()
        else:
            write_atomically(mine + _ASLEEP, 1)
            # Looked at once more, now that whoever publishes can see that we sleep.
            while read_atomically(control + _TICKET) == ticket:
                _sem_wait(mine + _SEMAPHORE)
            write_atomically(mine + _ASLEEP, 0)
            rounds = 0


# The one entry: each is compiled, and read again, with a copy of the whole machine.
@njit(types.void(_I8, _I8, _I8, _I8, _I8, _I8), nogil=True, cache=kernels.KEEP)
def _work(control, thread, threads, address, length, scratch):  # type: ignore[no-untyped-def]
    """Thread 0: have a tape executed by all threads, this one among them. Others: help until there are no more."""
    if thread > 0:
        _help(control, thread, threads, scratch)
        return
    met = read_atomically(control + _MET)  # all are done with the tape before: nobody counts on
    _publish(control, threads, address, length)
    if length > 0:
        execute(_tape(address, length), 0, threads, control + _MET, met, scratch)


class Pool:
    """`threads` threads, the caller's among them. One tape at a time."""

    def __init__(self, threads: int):
        self.threads = threads
        self._lock = threading.Lock()
        self._scratch: list[np.ndarray] = []
        self._start()
        _open_pools.add(self)

    def run(self, address: int, length: int) -> None:
        """Execute the tape of so many instructions at `address`."""
        with self._lock:
            if self._owner != os.getpid():  # a forked child has no threads but its own
                self._start()
            _work(self._address, 0, self.threads, address, length, self._own)

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
                target=_work,
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
            _work(self._address, 0, self.threads, 0, 0, self._own)
            for helper in self._helpers:
                helper.join()
        self._helpers = []


_open_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


@atexit.register
def _close_pools() -> None:
    """Compiled code must not run on when the memory it lies in is given back."""
    for pool in list(_open_pools):
        pool.close()


_shared: dict[int, Pool] = {}


def shared_pool(threads: int) -> Pool:
    """The process's pool of so many threads, made at first use."""
    if threads not in _shared:
        _shared[threads] = Pool(threads)
    return _shared[threads]
