"""What the files of a Rust crate use of one another, read from the source without a compiler (for floors.py).

`Crate(root)` follows `mod` from a root file (lib.rs or main.rs) and notes, for each module, what it defines and what it imports. `arrows()`
then resolves every path that starts in the crate (`use crate::x::Y`, `super::Y`, `x::f()`, names that a glob import brings) through
re-exports to the file that defines the item. Comments, strings and what is under `#[cfg(test)]` count for nothing.

Methods are seen in one case: a type whose methods stand in another file too (`impl Session` in head.rs), called in the file of the type. Other
calls of methods are not: which `impl` they reach is known to the compiler alone.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

NOT_CODE = re.compile(
    r"""//[^\n]*
      | /\*
      | \b(?:br|cr|r)(\#*)"(?:.|\n)*?"\1
      | \b[bc]?"(?:\\.|[^"\\])*"
      | \bb?'(?:\\(?:x[0-9a-fA-F]{2}|u\{[^}]*\}|.)|[^'\\\n])'
      | "(?:\\.|[^"\\])*"
      | '(?:\\(?:x[0-9a-fA-F]{2}|u\{[^}]*\}|.)|[^'\\\n])'""",
    re.VERBOSE | re.DOTALL,
)
TEST_ONLY = re.compile(r"#\s*\[\s*cfg\s*\(\s*(?:test\s*\)|all\s*\(\s*test\b[^]]*)\s*\]")
VISIBILITY = r"pub(?:\s*\([^)]*\))?\s+"
MOD = re.compile(rf"(?:{VISIBILITY})?\bmod\s+(?:r#)?(\w+)\s*([;{{])")
USE = re.compile(rf"(?P<visible>{VISIBILITY})?\buse\s+(?P<tree>[^;]*);")
ITEM = re.compile(
    r"\b(?:(?:async|unsafe|const|extern)\s+)*(?:fn|struct|enum|union|trait|type|const|static(?:\s+mut)?|macro_rules\s*!)\s+(?:r#)?([A-Za-z_]\w*)"
)
PATH_ATTRIBUTE = re.compile(r'#\s*\[\s*path\s*=\s*"([^"]*)"\s*\]\s*$')
OWN_IMPL = re.compile(r"\bimpl\b(?:\s*<[^{;]*?>)?\s+([A-Za-z_][\w:]*)[^{;]*\{")
FUNCTION = re.compile(r"\bfn\s+(\w+)")
NAME_PATH = re.compile(r"(?<![\w.:])(?:\$)?([A-Za-z_]\w*)((?:\s*::\s*[A-Za-z_]\w*)*)")


def blank(text):
    """As many characters, none of them code; lines stay where they are."""
    return re.sub(r"[^\n]", " ", text)


def code_only(text):
    """The text with comments, strings and characters blanked."""
    out, at = [], 0
    while match := NOT_CODE.search(text, at):
        end = match.end()
        if match.group().startswith("/*"):
            end = block_comment_end(text, match.start())
        out += [text[at : match.start()], blank(text[match.start() : end])]
        at = end
    return "".join(out) + text[at:]


def block_comment_end(text, start):
    depth, at = 0, start
    for mark in re.finditer(r"/\*|\*/", text[start:]):
        depth += 1 if mark.group() == "/*" else -1
        at = start + mark.end()
        if depth == 0:
            return at
    return len(text)


def closing(text, opening):
    """Where the bracket that opens at `opening` closes."""
    depth = 0
    for at in range(opening, len(text)):
        if text[at] in "([{":
            depth += 1
        elif text[at] in ")]}":
            depth -= 1
            if depth == 0:
                return at
    return len(text) - 1


def item_end(text, start):
    """Where the item, field or statement that starts at `start` (attributes first) ends."""
    at = start
    while attribute := re.compile(r"\s*#\s*\[").match(text, at):
        at = closing(text, attribute.end() - 1) + 1
    head = re.compile(rf"\s*(?:{VISIBILITY})?(use|static|type|let|extern\s+crate|const(?!\s+(?:fn|unsafe|async|extern)))\b")
    to_semicolon = bool(head.match(text, at))
    while at < len(text):
        if text[at] in "([":
            at = closing(text, at)
        elif text[at] == "{":
            at = closing(text, at)
            if not to_semicolon:
                return at + 1
        elif text[at] == ";" or (text[at] == "," and not to_semicolon):
            return at + 1
        elif text[at] in ")]}":
            return at
        at += 1
    return at


def without_tests(text):
    """`text` (of `code_only`) without what `#[cfg(test)]` stands in front of."""
    while match := TEST_ONLY.search(text):
        end = item_end(text, match.start())
        text = text[: match.start()] + blank(text[match.start() : end]) + text[end:]
    return text


def use_tree(tree, prefix=()):
    """The (path, name) pairs of what stands between `use` and `;`. A glob has the name `*`."""
    tree = tree.strip()
    if brace := re.match(r"((?:[^{},]*::)?)\s*\{(.*)\}\s*$", tree, re.DOTALL):
        prefix += tuple(part.strip() for part in brace[1].split("::") if part.strip())
        depth, start, inner = 0, 0, brace[2]
        for at, char in enumerate(inner + ","):
            depth += (char == "{") - (char == "}")
            if char == "," and depth == 0:
                if inner[start:at].strip():
                    yield from use_tree(inner[start:at], prefix)
                start = at + 1
        return
    path, _, alias = re.sub(r"\s+", " ", tree).partition(" as ")
    parts = prefix + tuple(part.strip().removeprefix("r#") for part in path.split("::") if part.strip())
    if parts[-1] == "self" and len(parts) > 1:
        parts = parts[:-1]
    yield parts, alias.strip() or parts[-1]


@dataclass
class Module:
    path: tuple
    file: Path
    items: set = field(default_factory=set)
    children: dict = field(default_factory=dict)
    # (path, name, position in the file, whether it is a re-export)
    uses: list = field(default_factory=list)
    code: str = ""


@dataclass(frozen=True)
class Arrow:
    source: Path
    target: Path
    line: int
    # What is used, as first written there, and everything that is.
    what: str
    names: frozenset
    # A `pub use` whose name the file itself does not use: a shelf for others.
    shelf: bool


class Crate:
    def __init__(self, root):
        self.root = Path(root)
        self.modules = {}
        self._read(self.root, (), self.root.parent)

    def _read(self, file, path, folder):
        original = file.read_text()
        text = without_tests(code_only(original))
        if re.match(r"\s*#!\s*\[\s*cfg\s*\(\s*test\s*\)", text):
            return False
        self._module(file, path, folder, text, original)
        return True

    def _module(self, file, path, folder, text, original):
        module = self.modules[path] = Module(path, file)
        depths = depth_of(text)
        for match in MOD.finditer(text):
            if depths[match.start()] != 0:
                continue
            name = match[1]
            if match[2] == "{":
                end = closing(text, match.end() - 1)
                inside = blank(text[: match.end()]) + text[match.end() : end]
                self._module(file, (*path, name), folder / name, inside, original)
                text = text[: match.start()] + blank(text[match.start() : end + 1]) + text[end + 1 :]
                module.children[name] = (*path, name)
                continue
            given = PATH_ATTRIBUTE.search(original[: match.start()])
            places = [file.parent / given[1]] if given else [folder / f"{name}.rs", folder / name / "mod.rs"]
            place = next((place for place in places if place.exists()), None)
            if place is None:
                raise ValueError(f"{file}: no file for `mod {name}`")
            inner = place.parent if place.name == "mod.rs" else folder / name
            if self._read(place, (*path, name), inner):
                module.children[name] = (*path, name)
        depths = depth_of(text)
        for match in USE.finditer(text):
            visible = bool(match["visible"])
            for parts, name in use_tree(match["tree"]):
                module.uses.append((parts, name, match.start("tree"), visible))
        for pattern in (USE, MOD):
            text = pattern.sub(lambda match: blank(match.group()), text)
        module.items = {m[1] for m in ITEM.finditer(text) if depths[m.start()] == 0}
        module.code = text

    def lookup(self, base, name, seen=frozenset()):
        """What `name` is in the module `base`: modules (paths), items (files) and None for what another crate brings. A name may be several."""
        module = self.modules[base]
        found = {module.children[name]} if name in module.children else set()
        if (base, name) in seen:
            return found
        seen = seen | {(base, name)}
        if name in module.items:
            found.add(module.file)
        for parts, alias, _, _ in module.uses:
            if alias == name:
                found |= self.resolve(parts, base, seen)
        if not found:
            for parts, alias, _, _ in module.uses:
                if alias == "*":
                    for place in self.resolve(parts[:-1], base, seen):
                        found |= self.lookup(place, name, seen) if isinstance(place, tuple) else {None} & {place}
        return found

    def resolve(self, parts, here, seen=frozenset()):
        """What a path names, seen from the module `here`; as `lookup`."""
        parts = list(parts)
        if parts[0] in ("crate", "self", "super"):
            at = {{"crate": (), "self": here, "super": here[:-1]}[parts[0]]}
        else:
            at = self.lookup(here, parts[0], seen) or {None}
        for name in parts[1:]:
            # A function may bear the name of a module; only the module leads further.
            at = {place for place in at if isinstance(place, tuple)} or at
            at = set().union(*(self._step(place, name, seen) for place in at))
        return at

    def _step(self, place, name, seen):
        if not isinstance(place, tuple):
            # What an item has (variants, functions) stands in its file, as far as anybody can see.
            return {place}
        if name in ("self", "super"):
            return {place if name == "self" else place[:-1]}
        found = self.lookup(place, name, seen)
        # What nothing defines in so many words a macro makes.
        return found or ({self.modules[place].file} if (place, name) not in seen else set())

    def definers(self, parts, here):
        """The files that define what a path names, other than as a module."""
        return {place for place in self.resolve(parts, here) if isinstance(place, Path)}

    def far_methods(self):
        """The (file of a type, file that has more of its methods, their names)."""
        for here, module in self.modules.items():
            for match in OWN_IMPL.finditer(module.code):
                if re.search(r"\bfor\b(?!\s*<)", match.group()):
                    continue
                body = module.code[match.end() : closing(module.code, match.end() - 1)]
                for home in self.definers(match[1].split("::"), here) - {module.file}:
                    yield home, module.file, set(FUNCTION.findall(body))

    def arrows(self):
        """The first arrow from each file to each other one, shelves only where there is nothing else."""
        first, names_of = {}, defaultdict(set)

        def add(source, targets, position, what, shelf, text):
            for target in targets - {source}:
                key = (source, target)
                if not shelf:
                    names_of[key].add(what)
                if key not in first or (first[key].shelf and not shelf):
                    first[key] = Arrow(source, target, text.count("\n", 0, position) + 1, what, frozenset(), shelf)

        for here, module in self.modules.items():
            names = defaultdict(list)
            for match in NAME_PATH.finditer(module.code):
                parts = (match[1], *re.findall(r"\w+", match[2]))
                names[parts].append(match.start())
            used = {parts[0] for parts in names}
            for parts, name, position, visible in module.uses:
                if name != "*":
                    add(module.file, self.definers(parts, here), position, "::".join(parts), visible and name not in used, module.code)
            imported = {name for _, name, _, _ in module.uses}
            for parts, positions in names.items():
                if len(parts) == 1 and (parts[0] in imported or parts[0] in module.items or parts[0] in ("self", "super", "crate", "Self")):
                    continue
                if parts[0] == "Self" or (len(parts) == 1 and parts[0] in module.children):
                    continue
                add(module.file, self.definers(parts, here), positions[0], "::".join(parts), False, module.code)
        for home, other, methods in self.far_methods():
            for module in self.modules.values():
                if module.file == home:
                    for call in re.finditer(r"(?:\.|\bSelf\s*::)\s*(\w+)\s*(?:::\s*<[^>]*>\s*)?\(", module.code):
                        if call[1] in methods - set(FUNCTION.findall(module.code)):
                            add(home, {other}, call.start(), f"a method, {call[1]}()", False, module.code)
        for key, arrow in first.items():
            first[key] = replace(arrow, names=frozenset(names_of[key]))
        return sorted(first.values(), key=lambda a: (str(a.source), a.line, str(a.target)))


def depth_of(text):
    """How deep in braces each character stands."""
    depths, depth = [], 0
    for char in text:
        if char == "}":
            depth -= 1
        depths.append(depth)
        if char == "{":
            depth += 1
    return depths
