"""A team: several processes on one or more hosts, joined by torch.distributed, the first of which leads.

Processes wait for each other at a store, where a wait can end whenever somebody has failed or fallen silent; only
when both sides of a transfer are there do tensors move. So no process waits for one that is gone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from secateur.engine.environment import place_in_environment
from secateur.engine.messages import blank, decode, encode, is_small, raw
from secateur.engine.processes import ALONE, Processes, Shared
from secateur.errors import InternalError, SecateurError, refuse
from secateur.evidence import Total

SILENCE: Final = "SECATEUR_SILENCE"
"""Environment variable: seconds after which a process that gives no sign of life is given up, 120 without it."""
_JOIN = timedelta(minutes=10)
_TRANSFER = timedelta(minutes=30)
_SHORTEST, _LONGEST = 1e-4, 0.02  # seconds between two looks at the store
_BEAT = 2.0  # seconds between two signs of life
_PARTING = 5.0  # seconds in which the others may still ask why
_CPU = torch.device("cpu")
_FAILED, _RESUME = "failed", "the same command resumes"

Opener = Callable[..., Shared]


class Team(Processes):
    """Several processes.

    Args:
        rank: which one this is.
        count: how many there are.
        store: where they meet, this run's own part of it.
        second: another connection to it, for signs of life.
    """

    def __init__(self, rank: int, count: int, store: Store, second: Store) -> None:
        self.rank, self.count, self._store = rank, count, store
        self._meetings: Counter[str] = Counter()
        self._opened = 0
        self._known: dict[int, weakref.ref[Shared]] = {}
        self._objects: dict[int, Any] = {}
        self._area: Path | None = None
        self._device = _CPU
        self._fast: dist.ProcessGroup | None = None
        self._watch = _Watch(self, second)
        self._own = not dist.is_initialized()
        if self._own:
            inner = PrefixStore("group", store)
            dist.init_process_group("gloo", store=inner, rank=rank, world_size=count, timeout=_TRANSFER)
            self._group = dist.group.WORLD
        else:
            self._group = dist.new_group(backend="gloo", timeout=_TRANSFER)
        self._watch.start()

    # -- what all code sees --------------------------------------------------------------------------------------------

    def opened(self, shared: Shared, kind: str, arguments: dict[str, Any]) -> int:
        if self.rank:
            return 0
        self._opened += 1
        self._cast({"do": "open", "number": self._opened, "kind": kind, "arguments": arguments})
        self._known[self._opened] = weakref.ref(shared)
        return self._opened

    def order(self, shared: Shared, method: str, arguments: Sequence[Any], options: dict[str, Any]) -> None:
        if not self.rank:
            call = {"number": shared.number, "method": method, "arguments": list(arguments), "options": options}
            self._cast({"do": "call", **call})

    def combine(self, totals: Sequence[Total]) -> None:
        small = [total for total in totals if is_small(total.running)]
        for together in (small, *([total] for total in totals if not is_small(total.running))):
            if not together:
                continue
            device = together[0].running.device
            if not self.rank:
                self._post([total.value for total in together], 1)
                for total, value in zip(together, self._take(self.count - 1, device), strict=True):
                    total.value.copy_(value)
                continue
            values = self._take(self.rank - 1, device)
            found = [total.continue_from(value) for total, value in zip(together, values, strict=True)]
            self._post(found, (self.rank + 1) % self.count)

    def gather(self, content: Any) -> list[Any]:
        if not self.rank:
            return [self._take(rank) for rank in range(1, self.count)]
        self._post(content, 0)
        return []

    def folder(self, leaders: Path) -> Path:
        if self._area is None:
            return leaders
        found = self._area / leaders.relative_to(self._area.parent)
        found.mkdir(parents=True, exist_ok=True)
        return found

    # -- the course of a run -------------------------------------------------------------------------------------------

    def begin(self, work: Path, device: torch.device, model: str) -> None:
        threads = torch.get_num_threads()
        self._cast({"do": "begin", "work": str(work), "threads": threads, "model": model, "device": device.type})
        self._use(device)

    def end(self, result: Mapping[str, Any]) -> None:
        self._cast({"do": "end", "result": dict(result)})

    def serve(self, kinds: Mapping[str, Opener], device: torch.device, model: str) -> dict[str, Any]:
        """Do what the first process orders, until it ends; returns what came out.

        Args:
            kinds: what opens an object of each kind.
            device: of this process.
            model: digest of the model that it reads.
        """
        while True:
            match self._hear():
                case {"do": "begin", **said}:
                    self._agree(said, device, model)
                case {"do": "open", "number": number, "kind": kind, "arguments": arguments}:
                    self._objects[number] = kinds[kind](processes=self, **arguments)
                case {"do": "call", "number": number, "method": name, "arguments": arguments, "options": options}:
                    method = getattr(self._objects[number], name)
                    if not getattr(method, "everywhere", False):
                        raise InternalError("order", f"an order {name!r}", "it is none that is given to others")
                    method(*arguments, **options)
                case {"do": "end", "result": result}:
                    self._clean()
                    found: dict[str, Any] = result
                    return found
                case other:
                    raise InternalError("order", f"an order {sorted(other)}", "there is none like that")

    def _agree(self, said: Mapping[str, Any], device: torch.device, model: str) -> None:
        if (said["model"], said["device"]) != (model, device.type):
            found = f"process {self.rank} finds another model or device than process 0"
            refuse("other-model", "a run of several processes", found, "the same folder and device on every host")
        torch.set_num_threads(said["threads"])
        self._area = Path(said["work"]) / f"process-{self.rank}"
        self._use(device)

    def _use(self, device: torch.device) -> None:
        self._device = device
        enough = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
        if device.type == "cuda" and enough and dist.is_nccl_available():
            self._fast = dist.new_group(backend="nccl", timeout=_TRANSFER)

    def _clean(self) -> None:
        """Nothing of this process stays, nor a work folder that is none of the first process'."""
        self._objects.clear()
        if self._area is not None:
            shutil.rmtree(self._area, ignore_errors=True)
            with suppress(OSError):
                self._area.parent.rmdir()

    # -- failures ------------------------------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process fails, and why, and let those that wait for it know."""
        told = error if isinstance(error, SecateurError) else None
        if told is None:
            name = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
            told = InternalError("process-failed", f"process {self.rank} of {self.count}", name, _RESUME)
        with suppress(RuntimeError):
            content = json.dumps({"error": told.as_dict(), "exit_code": told.exit_code})
            self._store.compare_set(_FAILED, "", content)
        if self._own:
            with suppress(RuntimeError):
                dist.destroy_process_group()  # whoever is in the middle of a transfer learns it

    def leave(self) -> None:
        """Part; the first process, which may be the one that keeps the store, last."""
        with suppress(RuntimeError):
            deadline = time.monotonic() + _PARTING
            if self.rank:
                self._store.set(f"gone/{self.rank}", "")
            while not self.rank and time.monotonic() < deadline:
                if self._store.check([f"gone/{rank}" for rank in range(1, self.count)]):
                    break
                time.sleep(_LONGEST)
        self._watch.stop()
        if self._own and dist.is_initialized():
            dist.destroy_process_group()

    def check(self) -> None:
        """Fail if another process has."""
        if self._watch.failure is not None:
            raise self._watch.failure

    def lost(self, found: str) -> SecateurError:
        """Why a connection broke, as soon as the others say."""
        deadline = time.monotonic() + _PARTING
        while self._watch.failure is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return self._watch.failure or InternalError("process-died", f"a run of {self.count} processes", found, _RESUME)

    @contextmanager
    def _transfers(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self.lost("another process ended in the middle of a transfer") from error

    # -- meeting -------------------------------------------------------------------------------------------------------

    def _meet(self, others: Sequence[int], message: bytes = b"", of: int | None = None) -> bytes:
        """Wait until these others are here, too.

        Args:
            others: processes; all, or one.
            message: what this one says there.
            of: whose message to return.
        """
        members = sorted((self.rank, *others))
        name = "all" if len(members) == self.count else "-".join(map(str, members))
        self._meetings[name] += 1
        turn = self._meetings[name]
        try:
            self._store.set(f"{name}/{turn}/{self.rank}", message)  # type: ignore[arg-type]  # it takes bytes, too
            keys, pause = [f"{name}/{turn}/{other}" for other in others], _SHORTEST
            while not self._store.check(keys):
                self.check()
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST)
            if turn > 1:  # whoever is here has read what was said the last time
                self._store.delete_key(f"{name}/{turn - 1}/{self.rank}")
            return b"" if of is None else bytes(self._store.get(f"{name}/{turn}/{of}"))
        except (dist.DistNetworkError, dist.DistStoreError, ConnectionError) as error:
            raise self.lost("the host of the first process is gone") from error

    # -- messages ------------------------------------------------------------------------------------------------------

    def _cast(self, content: dict[str, Any]) -> None:
        """Say something to all."""
        gone = [number for number, known in self._known.items() if known() is None]
        for number in gone:
            del self._known[number]
        message, tensors = encode({**content, "gone": gone})
        self._meet(range(1, self.count), message)
        with self._transfers():
            for tensor in tensors:
                self._broadcast(tensor)

    def _hear(self) -> dict[str, Any]:
        def receive(dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
            return self._broadcast(blank(dtype, shape, _CPU))

        message = self._meet([rank for rank in range(self.count) if rank != self.rank], of=0)
        with self._transfers():
            found: dict[str, Any] = decode(message, receive, self._objects)
        for number in found.pop("gone"):
            self._objects.pop(number, None)
        return found

    def _broadcast(self, tensor: Tensor) -> Tensor:
        """A tensor of the first process, in every one; floating point ones stay on the GPU that they came to."""
        group = self._fast if self._fast is not None and tensor.is_floating_point() else self._group
        moved = tensor.cpu() if group is self._group else tensor.to(self._device)
        dist.broadcast(raw(moved), 0, group=group)
        return moved

    def _post(self, content: Any, to: int) -> None:
        message, tensors = encode(content)
        self._meet([to], message)
        with self._transfers():
            for tensor in tensors:
                direct = self._fast is not None and tensor.device.type == "cuda"
                dist.send(raw(tensor if direct else tensor.cpu()), to, group=self._fast if direct else self._group)

    def _take(self, sender: int, device: torch.device = _CPU) -> Any:
        """What another process posts, its large tensors on a device."""

        def receive(dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
            direct = self._fast is not None and device.type == "cuda"
            found = blank(dtype, shape, device if direct else _CPU)
            dist.recv(raw(found), sender, group=self._fast if direct else self._group)
            return found.to(device)

        message = self._meet([sender], of=sender)
        with self._transfers():
            return decode(message, receive, {})


class _Watch(threading.Thread):
    """Gives signs of life and looks for those of others: the first process for all, the others for the first."""

    def __init__(self, team: Team, store: Store) -> None:
        super().__init__(daemon=True)
        self.failure: SecateurError | None = None
        self._team, self._store, self._stopped = team, store, threading.Event()
        self._limit = float(os.environ.get(SILENCE, "120"))

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def run(self) -> None:
        team = self._team
        others = [0] if team.rank else list(range(1, team.count))
        last = {rank: (b"", time.monotonic()) for rank in others}
        number = 0
        while not self._stopped.wait(_BEAT if number else 0):
            number += 1
            try:
                self._store.set(f"beat/{team.rank}", str(number))
                if self._store.check([_FAILED]):
                    content = json.loads(self._store.get(_FAILED))
                    self.failure = SecateurError.revived(content["error"], content["exit_code"])
                    return
                for rank in others:
                    seen = self._store.get(f"beat/{rank}") if self._store.check([f"beat/{rank}"]) else b""
                    if seen != last[rank][0]:
                        last[rank] = seen, time.monotonic()
                    elif time.monotonic() - last[rank][1] > self._limit:
                        self._give_up(f"process {rank} has given no sign of life for {self._limit:.0f} seconds")
                        return
            except (RuntimeError, ConnectionError):
                self._give_up("the host of the first process is gone")
                return

    def _give_up(self, found: str) -> None:
        self.failure = InternalError("process-died", f"a run of {self._team.count} processes", found, _RESUME)


_stores: list[TCPStore] = []
"""Of this process: the one that others may depend on, and its second connection."""
_runs = 0


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that the environment says there are, for one run; whoever fails inside ends all of them."""
    rank, count = place_in_environment()
    if count == 1:
        yield ALONE
        return
    team = _join(rank, count)
    before: Any = None
    if threading.current_thread() is threading.main_thread():

        def ended(*_: Any) -> None:  # what torchrun sends to those that are left
            raise team.lost("another process of this run has ended")

        before = signal.signal(signal.SIGTERM, ended)
    try:
        yield team
    except BaseException as error:
        team.fail(error)
        raise
    finally:
        team.leave()
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _join(rank: int, count: int) -> Team:
    global _runs
    try:
        if not _stores:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            keeps = rank == 0 and not agent and not dist.is_initialized()
            _stores.append(TCPStore(host, port, None, keeps, _JOIN, wait_for_workers=False))
            _stores.append(TCPStore(host, port, None, False, _JOIN, wait_for_workers=False))
        _runs += 1
        prefix = f"secateur/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_runs}"
        first, second = (PrefixStore(prefix, store) for store in _stores)
        return Team(rank, count, first, second)
    except (RuntimeError, KeyError, ValueError) as error:
        found = f"process {rank} of {count} does not reach the others ({' '.join(str(error).split())[:200]})"
        raise InternalError("no-team", "a run of several processes", found, "start it with torchrun") from error
