"""A page in a real browser, without a screen: `python browser.py PAGE PICTURE light|dark` prints its measures, as JSON.

Chromium as Qt carries it. For widths of 400 and 1200 pixels, a picture and what `MEASURES` returns.
"""

import json
import os
import sys

# The page is our own, and the user may be root.
FLAGS = "--no-sandbox --disable-gpu --blink-settings=preferredColorScheme="
#: Boxes are [left, top, right, bottom] in CSS pixels.
MEASURES = """(() => {
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const all = (query, of) => [...document.querySelectorAll(query)].map(of);
const solid = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
  if (!/, 0\\)$/.test(c)) return c; } return "rgb(255, 255, 255)"; };
const inner = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
const sorted = [];
for (const times of [1, 2]) {
  document.querySelector("table.sortable th:last-child").click();
  sorted.push(all("table.sortable tbody tr td:last-child", e => Number(e.textContent.replaceAll(",", ""))));
}
return JSON.stringify({
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  width: innerWidth, height: document.documentElement.scrollHeight, wanted: document.documentElement.scrollWidth,
  tracks: all(".track", e => ({box: box(e), marks: [...e.querySelectorAll(".dot")].map(box)})),
  names: all(".rows .name", e => ({box: box(e), cut: e.scrollWidth > e.clientWidth})),
  ticks: all(".ticks", e => [...e.children].map(box)),
  tables: all(".scroll", e => ({visible: e.clientWidth, wanted: e.scrollWidth})),
  lines: all("td.text", e => (box(e)[3] - box(e)[1])),
  texts: all("main *", e => e).filter(inner).map(e => [getComputedStyle(e).color, solid(e), e.textContent.trim()]),
  marks: all(".legend i, .bars i, .size i:last-child", e => ({box: box(e), color: solid(e)})),
  sorted,
});
})()"""


def main(page: str, picture: str, scheme: str) -> None:
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = FLAGS + ("0" if scheme == "dark" else "1")
    from PyQt6.QtCore import QEventLoop, QTimer, QUrl
    from PyQt6.QtWebEngineWidgets import QWebEngineView
    from PyQt6.QtWidgets import QApplication

    app = QApplication(sys.argv[:1])
    loop = QEventLoop()
    found = []
    for width in (400, 1200):
        view = QWebEngineView()
        settings = view.settings()
        assert settings is not None
        settings.setAttribute(settings.WebAttribute.ShowScrollBars, False)
        view.resize(width, 800)
        view.loadFinished.connect(loop.quit)
        view.load(QUrl.fromLocalFile(page))
        view.show()
        loop.exec()
        one = _measures(view, loop)
        view.resize(width, one["height"])
        for _ in range(100):  # until it is painted
            QTimer.singleShot(100, loop.quit)
            loop.exec()
            image = view.grab().toImage()
            one["painted"] = [_painted(image, mark["box"]) for mark in one["marks"]]
            if one["painted"] == [mark["color"] for mark in one["marks"]]:
                break
        view.grab().save(f"{picture}-{scheme}-{width}.png")
        found.append(one)
    print(json.dumps(found))
    app.quit()


def _measures(view, loop):
    values = []

    def take(value):
        values.append(json.loads(value))
        loop.quit()

    view.page().runJavaScript(MEASURES, take)
    loop.exec()
    return values[0]


def _painted(image, box):
    """The color in the middle of a box, as CSS writes it."""
    color = image.pixelColor(round((box[0] + box[2]) / 2), round((box[1] + box[3]) / 2))
    return f"rgb({color.red()}, {color.green()}, {color.blue()})"


if __name__ == "__main__":
    main(*sys.argv[1:])
