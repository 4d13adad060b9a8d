"""Tests of crash_matrix.py on made-up commands that go wrong in known ways: `scripts/crash_matrix.py --self-test`."""

import argparse
import sys
import tempfile
import unittest
from pathlib import Path

from crash_matrix import BEFORE, Matrix

# Writes ten files, ten milliseconds each, as a command does that quantizes; MODE says what it does wrong.
COMMAND = """#!{python} -IS
import os, shutil, signal, sys, time
mode, out, partial = sys.argv[1], "out", ".out.partial"
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
if mode == "removes first":
    shutil.rmtree(out, ignore_errors=True)
if os.path.exists(out) and mode != "in place":
    os._exit(2)
place = out if mode == "in place" else partial
resumed = os.path.exists(place)
os.makedirs(place, exist_ok=True)
for number in range(10):
    if asked and mode != "deaf":
        os._exit(130)
    path = os.path.join(place, str(number))
    if resumed and os.path.exists(path):
        continue
    with open(path + ".tmp", "w") as file:
        file.write("x" if mode == "other bytes" and resumed else "o")
        file.flush()
        time.sleep(0.1 if mode == "deaf" else 0.01)
        file.write("k" * 100)
    os.rename(path + ".tmp", path)
if mode == "left over":
    open(".state", "w").close() if resumed else None
if mode != "in place":
    os.rename(partial, out)
if mode == "late":
    # Long enough that a kill at the rename falls before it on a slow machine too.
    time.sleep(0.2)
    open(out + "/last", "w").close()
"""


class Harness(unittest.TestCase):
    def faults(self, mode, signals, moments=5, within=2.0):
        """What the harness finds of a command that does `mode` wrong."""
        with tempfile.TemporaryDirectory() as folder:
            binary = Path(folder) / "made-up"
            binary.write_text(COMMAND.replace("{python}", sys.executable))
            binary.chmod(0o755)
            args = argparse.Namespace(bin=str(binary), seed=1, latency=False, scale=1, keep=False, moments=moments, within=within)
            matrix = Matrix(args, Path(folder) / "work", {mode: [mode]})
            matrix.work.mkdir()
            known = matrix.undisturbed(mode)
            results = [matrix.try_one(mode, name, index, known) for name in signals for index in range(moments)]
            self.assertTrue(any(result["stops"][0]["reached"] for result in results))
            return [fault for result in results for fault in result["faults"]]

    def test_a_sound_command_passes(self):
        # Not SIGINT: Python itself answers it otherwise until the command has set its own handler.
        self.assertEqual(self.faults("sound", ["KILL", "TERM"]), [])

    def test_a_final_name_before_its_time(self):
        self.assertTrue(any("out has its name, but missing" in fault for fault in self.faults("in place", ["KILL"])))

    def test_an_old_model_that_goes_before_the_new_one_is_there(self):
        BEFORE["removes first"] = ["sound"]
        self.assertTrue(any("out is gone" in fault for fault in self.faults("removes first", ["KILL"])))

    def test_something_written_after_the_name_is_given(self):
        found = self.faults("late", ["KILL"], moments=25)
        self.assertTrue(any("out has its name, but missing: out/last" in fault for fault in found), found)

    def test_other_bytes_after_going_on(self):
        self.assertTrue(any("at the end: other bytes: out/" in fault for fault in self.faults("other bytes", ["KILL"])))

    def test_what_is_left_beside(self):
        self.assertTrue(any("at the end: left over: .state" in fault for fault in self.faults("left over", ["KILL"])))

    def test_a_command_that_does_not_hear(self):
        self.assertTrue(any("s to stop" in fault for fault in self.faults("deaf", ["INT"], within=0.3)))


def run():
    """0 if every test passes, 1 otherwise."""
    tests = unittest.defaultTestLoader.loadTestsFromTestCase(Harness)
    return 0 if unittest.TextTestRunner(verbosity=2).run(tests).wasSuccessful() else 1
