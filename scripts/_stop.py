"""Stops a command at a chosen moment, for crash_matrix.py: after a time, at the n-th change of a file below a directory, or when a name appears.

Changes are heard by inotify where there is one (Linux); elsewhere sizes and names are looked at every few hundred microseconds.
"""

import ctypes
import os
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

MODIFY, CLOSE_WRITE, MOVED_FROM, MOVED_TO, CREATE, DELETE = 0x2, 0x8, 0x40, 0x80, 0x100, 0x200
ALL = MODIFY | CLOSE_WRITE | MOVED_FROM | MOVED_TO | CREATE | DELETE
IS_DIRECTORY = 0x40000000


class Inotify:
    """Changes below a directory, directories that are made meanwhile included."""

    def __init__(self, root):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.fd = self.libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self.paths = {}
        self._add(Path(root))

    def _add(self, path):
        watch = self.libc.inotify_add_watch(self.fd, os.fsencode(path), ALL)
        if watch >= 0:
            self.paths[watch] = path
            for entry in os.scandir(path):
                if entry.is_dir(follow_symlinks=False):
                    self._add(Path(entry.path))

    def wait(self, seconds):
        """The changes that come first within some seconds, as (name, whether a name appeared)."""
        if not select.select([self.fd], [], [], max(0.0, seconds))[0]:
            return []
        data, at, found = os.read(self.fd, 1 << 16), 0, []
        while at < len(data):
            watch, mask, _, length = struct.unpack_from("iIII", data, at)
            name = data[at + 16 : at + 16 + length].rstrip(b"\0").decode(errors="replace")
            at += 16 + length
            if mask & IS_DIRECTORY and mask & (CREATE | MOVED_TO) and watch in self.paths:
                try:
                    self._add(self.paths[watch] / name)
                except OSError:
                    pass
            found.append((name, bool(mask & MOVED_TO)))
        return found

    def close(self):
        os.close(self.fd)


class Looking:
    """As `Inotify`, by looking often."""

    PAUSE = 0.0003

    def __init__(self, root):
        self.root = Path(root)
        self.known = self._look()

    def _look(self):
        found = {}
        for folder, folders, files in os.walk(self.root):
            for name in folders + files:
                try:
                    status = os.lstat(os.path.join(folder, name))
                except OSError:
                    continue
                found[os.path.join(folder, name)] = (status.st_size, status.st_mtime_ns)
        return found

    def wait(self, seconds):
        end = time.perf_counter() + max(0.0, seconds)
        while True:
            now = self._look()
            changed = [path for path in now.keys() | self.known.keys() if now.get(path) != self.known.get(path)]
            appeared = now.keys() - self.known.keys()
            self.known = now
            if changed or time.perf_counter() >= end:
                return [(os.path.basename(path), path in appeared) for path in changed]
            time.sleep(self.PAUSE)

    def close(self):
        pass


def watcher(root):
    return Inotify(root) if sys.platform == "linux" else Looking(root)


class Run:
    """A command that runs in `folder`, in a process group of its own, with its output in a file."""

    def __init__(self, command, folder, env, log):
        self.log = open(log, "wb")
        self.watch = watcher(folder)
        self.start = time.perf_counter()
        self.process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.log, start_new_session=True
        )

    def wait_for(self, moment, limit):
        """Waits for a moment. False if the command ended before it, or `limit` seconds went by."""
        kind, at, delay = moment
        changes, end = 0, self.start + limit
        while self.process.poll() is None and time.perf_counter() < end:
            if kind == "time":
                left = self.start + at - time.perf_counter()
                if left <= 0:
                    return True
                time.sleep(min(left, 0.02))
                continue
            for name, appeared in self.watch.wait(0.02):
                changes += 1
                if (kind == "change" and changes >= at) or (kind == "name" and appeared and name in at):
                    until = time.perf_counter() + delay
                    while time.perf_counter() < until:
                        pass
                    return self.process.poll() is None
        return False

    def stop(self, number, limit):
        """Sends a signal; seconds until the command has ended, and its exit status (None and killed after `limit` seconds)."""
        sent = time.perf_counter()
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass
        status = self.end(limit)
        return time.perf_counter() - sent, status

    def end(self, limit):
        """The exit status; None if the command did not end within `limit` seconds, and is killed."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return None
        finally:
            self.watch.close()
            self.log.close()

    def count(self, limit):
        """Runs to the end; the exit status, seconds, number of changes, and the names that something was renamed to."""
        changes, names = 0, {}
        while True:
            ended = self.process.poll() is not None or time.perf_counter() > self.start + limit
            seconds = time.perf_counter() - self.start
            for name, appeared in self.watch.wait(0 if ended else 0.02):
                changes += 1
                if appeared:
                    names[name] = True
            if ended:
                return self.end(1), seconds, changes, list(names)
