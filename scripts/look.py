#!/usr/bin/env python3
"""Looks at a self-contained HTML report in Chromium, wide and narrow, light and dark.

    scripts/look.sh FILE.html OUTDIR        (finds chromium, and calls this with --chromium)

Each view is kept whole as OUTDIR/{width}-{scheme}.png and must pass:

    console    no errors, warnings or exceptions
    request    nothing is asked for but the file itself (data: and blob: are part of it); all else is blocked
    sideways   the page does not scroll sideways; elements with their own overflow-x may
    overlap    texts do not lie on each other: HTML with HTML where it is seen, SVG text with that of its svg
    clipped    no text beyond the window's right edge unless it can be scrolled to (or ends in an ellipsis); SVG text within its svg
    contrast   at least 3.0 between a text and what lies under it: backgrounds of its ancestors, and in an svg the shapes drawn before

A text's box is as high as its font size. Not seen: images and gradients under text, text of pseudo-elements, inputs, canvases
and frames. Exit status 1 if anything fails.
"""

import argparse
import sys
from pathlib import Path

from playwright.sync_api import Error, sync_playwright

SIZES = [(1280, 900), (390, 844)]
SCHEMES = ["light", "dark"]
CONTRAST = 3.0  # WCAG 2.2, 1.4.3 and 1.4.11: large text, and graphics
OVERLAP = 2.0  # pixels in both directions, of boxes already made smaller by one on every side
SHOWN = 20  # failures of one check printed for one view; all are counted

# What is on the page: texts with their corners (quads, in window pixels) and colours (pairs of the text's and what is under it).
COLLECT = r"""
() => {
  const root = document.documentElement, body = document.body;
  const cached = make => {
    const known = new Map();
    return key => known.has(key) ? known.get(key) : (known.set(key, make(key)), known.get(key));
  };
  const styleOf = cached(e => getComputedStyle(e));

  // Any CSS colour as [red, green, blue, alpha], 0 to 1, colours multiplied by alpha.
  const dot = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d", {willReadFrequently: true});
  const colour = cached(css => {
    dot.clearRect(0, 0, 1, 1);
    dot.fillStyle = css;
    dot.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = dot.getImageData(0, 0, 1, 1).data;
    return [r, g, b, 255].map(c => c / 255 * a / 255);
  });
  const clear = [0, 0, 0, 0];
  const over = (top, below) => top.map((c, i) => c + below[i] * (1 - top[3]));
  const faded = (c, by) => c.map(part => part * by);
  const probe = root.appendChild(document.createElement("i"));
  probe.style.cssText = "position: absolute; background: Canvas";
  const paper = colour(getComputedStyle(probe).backgroundColor);
  probe.remove();
  // What is seen of a colour that an element paints: over backgrounds of the element and its ancestors, each with its opacity.
  const seen = (e, top) => {
    for (; e; e = e.parentElement) top = faded(over(top, colour(styleOf(e).backgroundColor)), +styleOf(e).opacity);
    return over(top, paper);
  };

  const shown = e => e.checkVisibility({opacityProperty: true, visibilityProperty: true, contentVisibilityAuto: false});
  const name = e => e.localName + (e.id ? "#" + e.id : "") + [...e.classList].map(c => "." + c).join("");
  const label = (e, text) => {
    const words = text.trim().replace(/\s+/g, " ");
    return `"${words.length > 40 ? words.slice(0, 39) + "…" : words}" (${name(e)})`;
  };
  const ids = new Map();
  const id = e => ids.get(e) ?? (ids.set(e, ids.size), ids.get(e));

  // The boxes that clip an element's content: all of them, and those that cannot be scrolled.
  const meet = (a, b) => [Math.max(a[0], b[0]), Math.max(a[1], b[1]), Math.min(a[2], b[2]), Math.min(a[3], b[3])];
  const everywhere = [-Infinity, -Infinity, Infinity, Infinity];
  const clips = cached(element => {
    let all = everywhere, hard = everywhere, forgiven = false, absolute = false;
    for (let e = element; e && e !== body && e !== root; e = e.parentElement) {
      const style = styleOf(e), positioned = style.position !== "static" || style.transform !== "none";
      if (absolute && !positioned) continue;
      const r = e.getBoundingClientRect(), x = style.overflowX, y = style.overflowY;
      if (style.display !== "inline" && !(e instanceof SVGElement && e.ownerSVGElement)) {
        const left = r.left + e.clientLeft, top = r.top + e.clientTop;
        const box = [left, top, left + e.clientWidth, top + e.clientHeight];
        const [fixed, scrolled] = [["hidden", "clip"], ["auto", "scroll"]].map(kinds => [
          kinds.includes(x) ? box[0] : -Infinity, kinds.includes(y) ? box[1] : -Infinity,
          kinds.includes(x) ? box[2] : Infinity, kinds.includes(y) ? box[3] : Infinity]);
        hard = meet(hard, fixed);
        all = meet(all, meet(fixed, scrolled));
        forgiven ||= x === "auto" || x === "scroll" || (x !== "visible" && style.textOverflow === "ellipsis");
      }
      if (style.position === "fixed") break;
      absolute = style.position === "absolute";
    }
    return {all, hard, forgiven};
  });

  const corners = ([l, t, r, b]) => [[l, t], [r, t], [r, b], [l, b]];
  const trimmed = (low, high, size) => {
    const extra = Math.max(0, high - low - size) / 2;
    return [low + extra, high - extra];
  };
  const solid = ([l, t, r, b]) => r - l > 2 && b - t > 2;
  const texts = [];

  const walker = document.createTreeWalker(body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const e = node.parentElement;
    if (!node.data.trim() || !(e instanceof HTMLElement) || !shown(e)) continue;
    const style = styleOf(e), {all, hard, forgiven} = clips(e), size = parseFloat(style.fontSize);
    const ink = colour(style.color);
    const range = document.createRange();
    range.selectNodeContents(node);
    const boxes = [...range.getClientRects()].map(r => {
      const upright = style.writingMode === "horizontal-tb";
      const [l, right] = upright ? [r.left, r.right] : trimmed(r.left, r.right, size);
      const [t, b] = upright ? trimmed(r.top, r.bottom, size) : [r.top, r.bottom];
      return [l, t, right, b];
    }).filter(box => solid(meet(box, hard)));
    if (!boxes.length || ink[3] === 0) continue;
    texts.push({
      label: label(e, node.data), owner: id(e), group: -1, colours: [[seen(e, ink), seen(e, clear)]],
      quads: boxes.map(box => meet(box, all)).filter(solid).map(corners), frame: null,
      right: forgiven ? 0 : Math.max(...boxes.map(box => box[2])),
    });
  }

  const undrawn = "defs, clipPath, mask, marker, pattern, symbol";
  for (const svg of document.querySelectorAll("svg")) {
    if (svg.ownerSVGElement || !shown(svg)) continue;
    const box = svg.getBoundingClientRect(), frame = [box.left, box.top, box.right, box.bottom];
    const opacity = cached(e => e === svg ? 1 : +styleOf(e).opacity * opacity(e.parentElement));
    // Null for a gradient or pattern, whose colour is not known.
    const fill = e => {
      const style = styleOf(e), css = style.fill;
      if (css === "none") return clear;
      return /^(url|context)/.test(css) ? null : faded(colour(css), +style.fillOpacity * opacity(e));
    };
    const shapes = [...svg.querySelectorAll("rect, circle, ellipse, path, polygon, polyline")]
      .filter(e => !e.closest(undrawn) && shown(e))
      .map(e => ({e, fill: fill(e), box: e.getBoundingClientRect(), place: DOMMatrix.fromMatrix(e.getScreenCTM()).inverse()}))
      .filter(shape => shape.fill?.[3] !== 0);
    // What the shapes before a text have painted at a point of the window.
    const painted = (e, [x, y]) => {
      let below = clear;
      for (const {e: shape, fill, box, place} of shapes) {
        if (x < box.left || x > box.right || y < box.top || y > box.bottom) continue;
        if (!(shape.compareDocumentPosition(e) & Node.DOCUMENT_POSITION_FOLLOWING)) break;
        if (!shape.isPointInFill(new DOMPoint(x, y).matrixTransform(place))) continue;
        below = fill?.[3] > 0.999 ? fill : fill && below && over(fill, below);
      }
      return below;
    };
    for (const e of svg.querySelectorAll("text, tspan, textPath")) {
      const own = [...e.childNodes].filter(n => n.nodeType === Node.TEXT_NODE).map(n => n.data).join(" ");
      const ink = fill(e);
      if (!own.trim() || e.closest(undrawn) || !shown(e) || ink?.[3] === 0) continue;
      // Runs of characters of one line, in the text's own coordinates.
      const size = parseFloat(styleOf(e).fontSize), runs = [];
      for (let i = 0; i < e.getNumberOfChars(); i++) {
        const c = e.getExtentOfChar(i), [t, b] = trimmed(c.y, c.y + c.height, size), run = runs.at(-1);
        const level = run && Math.abs(run[1] - t) < 0.01 && Math.abs(run[3] - b) < 0.01;
        const right = c.x + c.width;
        if (level && c.x < run[2] + size && right > run[0] - size) [run[0], run[2]] = [Math.min(run[0], c.x), Math.max(run[2], right)];
        else runs.push([c.x, t, right, b]);
      }
      const matrix = e.getScreenCTM();
      const moved = ([x, y]) => {
        const p = new DOMPoint(x, y).matrixTransform(matrix);
        return [p.x, p.y];
      };
      const quads = runs.map(run => corners(run).map(moved));
      if (!quads.length) continue;
      const points = runs.flatMap(([l, t, r, b]) => [0.05, 0.5, 0.95].map(at => moved([l + (r - l) * at, (t + b) / 2])));
      const below = ink ? points.map(point => painted(e, point)).filter(Boolean) : [];
      texts.push({
        label: label(e, own), owner: id(e.closest("text")), group: id(svg), quads, frame,
        colours: below.map(under => [seen(svg, over(ink, under)), seen(svg, under)]),
        right: clips(svg).forgiven ? 0 : Math.max(...quads.flat().map(([x]) => x)),
      });
    }
  }

  const inner = e => e.parentElement && clips(e.parentElement);
  const wide = [...body.querySelectorAll("*")].map(e => ({e, right: e.getBoundingClientRect().right}))
    .filter(({e, right}) => right > innerWidth + 0.5 && shown(e) && inner(e).all[2] > innerWidth)
    .sort((a, b) => b.right - a.right).slice(0, 3).map(({e, right}) => `${name(e)} to ${Math.round(right)}`);
  return {texts, width: root.scrollWidth, window: innerWidth, wide};
}
"""


def shrunk(quad):
    """The parallelogram without a border of one pixel; None if nothing is left."""
    (x, y), right, _, down = quad
    u, v = (right[0] - x, right[1] - y), (down[0] - x, down[1] - y)
    lengths = [(d[0] ** 2 + d[1] ** 2) ** 0.5 for d in (u, v)]
    if min(lengths) <= 2:
        return None
    a, b = (1 / length for length in lengths)
    return [(x + i * u[0] + j * v[0], y + i * u[1] + j * v[1]) for i, j in ((a, b), (1 - a, b), (1 - a, 1 - b), (a, 1 - b))]


def depth(one, two):
    """How deep two parallelograms lie in each other, in pixels: the least overlap along any normal of a side."""
    least = float("inf")
    for quad in (one, two):
        for start, end in ((quad[0], quad[1]), (quad[1], quad[2])):
            normal = (start[1] - end[1], end[0] - start[0])
            length = (normal[0] ** 2 + normal[1] ** 2) ** 0.5
            a, b = ([(x * normal[0] + y * normal[1]) / length for x, y in q] for q in (one, two))
            least = min(least, min(max(a), max(b)) - max(min(a), min(b)))
    return least


def overlaps(texts):
    groups = {}
    for text in texts:
        for quad in filter(None, map(shrunk, text["quads"])):
            groups.setdefault(text["group"], []).append((min(y for _, y in quad), max(y for _, y in quad), quad, text))
    found = {}
    for boxes in groups.values():
        boxes.sort(key=lambda box: box[0])
        for i, (_, bottom, quad, text) in enumerate(boxes):
            for top, _, other_quad, other in boxes[i + 1 :]:
                if top > bottom - OVERLAP:
                    break
                if text["owner"] != other["owner"] and (by := depth(quad, other_quad)) > OVERLAP:
                    pair = tuple(sorted((text["owner"], other["owner"])))
                    found[pair] = max(found.get(pair, (0, "")), (by, f"{text['label']} and {other['label']}"))
    return [f"{pair} by {by:.0f} px" for by, pair in found.values()]


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def ratio(one, two):
    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def code(colour):
    return "#" + "".join(f"{round(c * 255):02x}" for c in colour[:3])


def judge(page):
    """Failures of what lies on the page, as (check, what)."""
    failures = []
    if page["width"] > page["window"]:
        widest = "; widest: " + ", ".join(page["wide"]) if page["wide"] else ""
        failures.append(("sideways", f"the page is {page['width']} px wide in a window of {page['window']}{widest}"))
    failures += [("overlap", pair) for pair in overlaps(page["texts"])]
    for text in page["texts"]:
        if text["right"] > page["window"] + 1:
            failures.append(("clipped", f"{text['label']} runs to {text['right']:.0f} px in a window of {page['window']}"))
        if text["frame"]:
            left, top, right, bottom = text["frame"]
            points = [point for quad in text["quads"] for point in quad]
            out = max(max(left - x, x - right, top - y, y - bottom) for x, y in points)
            if out > 1:
                failures.append(("clipped", f"{text['label']} leaves its svg by {out:.0f} px"))
        worst, ink, under = min(((ratio(*pair), *pair) for pair in text["colours"]), default=(CONTRAST, None, None))
        if worst < CONTRAST:
            failures.append(("contrast", f"{worst:.2f} of {text['label']}: {code(ink)} on {code(under)}"))
    return failures


def look(browser, file, size, scheme, shot):
    """One view: number of texts, and failures as (check, what)."""
    url = file.as_uri()
    failures, blocked = [], []
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce")

    def routed(route):
        if route.request.url.split("#")[0] == url or route.request.url.startswith(("data:", "blob:", "about:")):
            route.continue_()
        else:
            blocked.append(route.request.url)
            failures.append(("request", f"{route.request.resource_type} {route.request.url}"))
            route.abort()

    def said(message):
        # A blocked request is reported once, as such.
        if message.type in ("error", "warning", "assert") and message.location.get("url") not in blocked:
            failures.append(("console", f"{message.type}: {message.text}"))

    context.route("**/*", routed)
    page = context.new_page()
    page.on("console", said)
    page.on("pageerror", lambda error: failures.append(("console", f"exception: {error.message}")))
    page.on("websocket", lambda socket: failures.append(("request", f"websocket {socket.url}")))
    texts = 0
    try:
        page.goto(url)
        page.evaluate("() => document.fonts.ready.then(() => new Promise(done => requestAnimationFrame(() => setTimeout(done, 200))))")
        page.screenshot(path=shot, full_page=True, animations="disabled")
        seen = page.evaluate(COLLECT)
        texts = len(seen["texts"])
        failures += judge(seen)
    except Error as error:
        failures.append(("view", error.message.splitlines()[0]))
    context.close()
    return texts, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", required=True)
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if not args.file.is_file():
        parser.error(f"{args.file} is not a file")
    args.out.mkdir(parents=True, exist_ok=True)
    views, failed = 0, 0
    with sync_playwright() as playwright:
        # No host is found: what is not routed (sockets, the browser's own calls) goes nowhere.
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--host-resolver-rules=MAP * ~NOTFOUND"])
        for size in SIZES:
            for scheme in SCHEMES:
                texts, failures = look(browser, args.file.resolve(), size, scheme, args.out / f"{size[0]}-{scheme}.png")
                views += 1
                failed += len(failures)
                print(f"{size[0]} {scheme}: " + (f"{len(failures)} failures, {texts} texts" if failures else f"ok, {texts} texts"))
                for check in dict.fromkeys(check for check, _ in failures):
                    lines = [what for kind, what in failures if kind == check]
                    for what in lines[:SHOWN]:
                        print(f"  {check}: {what}")
                    if len(lines) > SHOWN:
                        print(f"  {check}: and {len(lines) - SHOWN} more")
                sys.stdout.flush()
        browser.close()
    print(f"{views} views, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
