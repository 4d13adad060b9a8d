"""Tests of floors.py and _rust.py on small made-up crates: `scripts/floors.py --self-test`."""

import tempfile
import unittest
from pathlib import Path

from _rust import Crate, code_only, use_tree, without_tests
from floors import check_crate, check_ladder


class Floors(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.source = Path(folder.name) / "made" / "src"

    def crate(self, **files):
        """A crate of these files; `a__b` stands for a/b.rs."""
        for name, text in files.items():
            path = self.source / (name.replace("__", "/") + ".rs")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return self.source / "lib.rs"

    def arrows(self, **files):
        """The arrows as `from>to`, without the endings of the files and without shelves."""
        root = self.crate(**files)

        def short(path):
            return str(path.relative_to(self.source)).removesuffix(".rs")

        return {f"{short(a.source)}>{short(a.target)}" for a in Crate(root).arrows() if not a.shelf}

    def faults(self, floors, **files):
        return check_crate("made", self.crate(**files), floors)

    def test_what_is_not_code_is_no_arrow(self):
        text = 'let a = "crate::b"; // crate::b\n/* crate::b /* nested */ crate::b */ let c = \'"\'; let d = r#"" crate::b"#; fn f<\'a>() {}'
        left = code_only(text)
        self.assertNotIn("crate", left)
        self.assertIn("fn f<'a>() {}", left)
        self.assertEqual(len(left), len(text))

    def test_tests_are_left_out(self):
        text = "#[cfg(test)]\nmod tests { use crate::b; }\n#[cfg(test)] use crate::{b, c};\n#[cfg(test)]\n#[allow(x)]\nfn f() -> T { crate::b }\nstruct S { #[cfg(test)] a: crate::b, d: u8 }\nfn kept() {}"
        left = without_tests(text)
        self.assertNotIn("crate", left)
        self.assertIn("d: u8", left)
        self.assertIn("fn kept() {}", left)

    def test_trees_of_imports(self):
        tree = "crate::a::{self, b::{C, D as E}, f::*}"
        expected = [(("crate", "a"), "a"), (("crate", "a", "b", "C"), "C"), (("crate", "a", "b", "D"), "E"), (("crate", "a", "f", "*"), "*")]
        self.assertEqual(list(use_tree(tree)), expected)

    def test_a_name_leads_to_the_file_that_defines_it(self):
        found = self.arrows(
            lib="mod a; mod b; pub use b::Thing;",
            a="use crate::Thing; use super::b::helper as h; fn f() { h(); }",
            b__mod="mod thing; mod help; pub use thing::Thing; pub(crate) use help::*;",
            b__thing="pub struct Thing;",
            b__help="pub fn helper() {}",
        )
        self.assertEqual(found, {"a>b/thing", "a>b/help"})

    def test_paths_in_code_and_globs(self):
        found = self.arrows(
            lib="mod a; mod b; mod c;",
            a="use super::c::*; fn f() { crate::b::g(); let x: Item; }",
            b="pub fn g() {} fn unused() { let r#fn = 1; }",
            c="pub struct Item; pub struct Other;",
        )
        self.assertEqual(found, {"a>b", "a>c"})

    def test_a_module_named_as_its_item_and_as_a_crate(self):
        found = self.arrows(
            lib="mod a; mod b; mod walk; pub use walk::{Step, walk};",
            a="use anyhow::anyhow; use serde::serde; use crate::walk; fn f() { walk(); anyhow!(); }",
            b="use crate::Step;",
            walk__mod="mod step; pub use step::Step; pub fn walk() {}",
            walk__step="pub struct Step;",
        )
        self.assertEqual(found, {"a>walk/mod", "b>walk/step"})

    def test_a_circle_of_files_is_found_and_what_to_move_named(self):
        found = self.faults(
            ["a b"],
            lib="mod a; mod b;",
            a__mod="mod child; pub struct Own; fn f() { child::g(); }",
            a__child="use super::Own; pub fn g() {}",
            b="",
        )
        self.assertEqual(len(found), 3, found)
        self.assertIn("circle of 2 files: made/src/a/child.rs made/src/a/mod.rs", found[0])
        self.assertTrue("(Own)" in found[2] or "(g)" in found[2], found)

    def test_a_circle_that_stays_is_named_file_by_file(self):
        files = {"lib": "mod a; mod b; mod c;", "a": "use crate::b::B; pub struct A;", "b": "use crate::a::A; pub struct B;", "c": "use crate::a::A;"}
        root = self.crate(**files)
        self.assertEqual(check_crate("made", root, ["a b", "c"], allowed=[["a.rs", "b.rs"]]), [])
        low = check_crate("made", root, ["c", "a b"], allowed=[["a.rs", "b.rs"]])
        self.assertEqual(len(low), 1, low)
        self.assertIn("c may not use a", low[0])
        for other in (["a.rs"], ["a.rs", "b.rs", "c.rs"]):
            found = check_crate("made", root, ["a b", "c"], allowed=[other])
            self.assertTrue(any("circle of 2 files" in line for line in found), found)
            self.assertTrue(any("has no circle of just" in line for line in found), found)

    def test_a_shelf_is_no_circle_unless_its_names_are_used(self):
        child = "use super::Own; pub struct Made;"
        lib = "mod a;"
        self.assertEqual(self.faults(["a"], lib=lib, a__mod="mod child; pub use child::Made; pub struct Own;", a__child=child), [])
        used = self.faults(["a"], lib=lib, a__mod="mod child; pub use child::Made; pub struct Own { made: Made }", a__child=child)
        self.assertIn("circle", used[0])

    def test_circles_in_tests_alone_do_not_count(self):
        found = self.faults(["b", "a"], lib="mod a; mod b;", a="use crate::b::B;", b="pub struct B; #[cfg(test)] mod tests { use crate::a::X; }")
        self.assertEqual(found, [])

    def test_methods_in_another_file_close_a_circle(self):
        found = self.faults(
            ["a"],
            lib="mod a;",
            a__mod="mod more; pub struct Session; impl Session { fn run(&self) { self.finish(); } }",
            a__more="use super::Session; impl Session { pub fn finish(&self) {} }",
        )
        self.assertIn("circle of 2 files", found[0])

    def test_upward_imports(self):
        files = {"lib": "mod low; mod high; pub struct Root;", "low": "use crate::high::H;\nuse crate::Root;", "high": "pub struct H;"}
        found = self.faults(["low", "high"], **files)
        self.assertEqual(len(found), 2, found)
        self.assertIn("upward: made/src/low.rs:1 -> made/src/high.rs (crate::high::H): low may not use high", found[0])
        self.assertIn("the root of the crate is above low", found[1])
        files["low"] = "use crate::high::H;"
        self.assertIn("same floor", self.faults(["low high"], **files)[0])
        self.assertEqual(self.faults(["high", "low"], **files), [])

    def test_floors_and_modules_agree(self):
        found = self.faults(["a gone"], lib="mod a; mod b;", a="", b="")
        self.assertEqual(len(found), 2, found)
        self.assertIn("b has no floor", found[0])
        self.assertIn("no module gone", found[1])

    def test_the_ladder_of_crates(self):
        floors = ["low", "high"]
        self.assertEqual(check_ladder({"low": [], "high": ["low"]}, floors), [])
        self.assertEqual(len(check_ladder({"low": ["high"], "high": []}, floors)), 1)
        self.assertEqual(len(check_ladder({"low": [], "new": []}, floors)), 2)


def run():
    """0 if every test passes, 1 otherwise."""
    tests = unittest.defaultTestLoader.loadTestsFromTestCase(Floors)
    return 0 if unittest.TextTestRunner().run(tests).wasSuccessful() else 1
