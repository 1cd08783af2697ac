"""ComfyUI's real web page in a Chromium: opened, given graphs, run.

CHROMIUM names the browser; else chromium, chromium-browser or google-chrome on the PATH is taken. What a page does takes
as long as the machine is busy: a test waits for what it asserts (`becomes`), never for a time.
"""

import contextlib
import json
import os
import shutil
import time

OPTIONS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
OPTIONS += ["--disable-component-update", "--disable-sync"]
SLOW = 120_000  # ms; two slow cores also run the server
ENOUGH = 60  # seconds for what a page does at once when nothing else runs
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # else the template browser opens by itself
    "Comfy.Minimap.Visible": False,
    "Comfy.VueNodes.Enabled": False,  # the server keeps what a page before has set
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # full drawing at every zoom
}


def chromium() -> str | None:
    """Path of the browser, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


class Browser:
    """A Chromium whose pages share one profile: what it has compiled for one opens the next in a third of the time.

    It starts with the first page, and anew after `close`; while it runs nothing else in this process can run an event loop.
    """

    def __init__(self, path):
        self.path, self._running, self._profile = path, contextlib.ExitStack(), None

    def new_page(self, **options):
        if self._profile is None:
            from playwright.sync_api import sync_playwright

            playwright = self._running.enter_context(sync_playwright())
            browser = playwright.chromium.launch(executable_path=self.path, args=OPTIONS)
            self._running.callback(browser.close)
            self._profile = browser.new_context(**options)
        return self._profile.new_page()

    def close(self):
        self._profile = None
        self._running.close()


def opened_page(browser, server, script="", **settings):
    """ComfyUI's page, ready, with nothing that lies over the graph and nothing that a page before has left behind.

    script: JavaScript to run before all others.
    """
    body = json.dumps(SETTINGS | settings).encode()
    server.request("/settings", body, {"Content-Type": "application/json"})
    page = browser.new_page(viewport={"width": 1600, "height": 860})
    page.set_default_timeout(SLOW)
    page.add_init_script(f"localStorage.clear(); localStorage.setItem('vueNodesBannerDismissed', 'true');{script}")
    page.goto(server.url)
    wait_until_ready(page)
    page.evaluate(ENDED)
    return page


# The runs of this page whose messages have all come; the server sends them in order, the end last.
ENDED = """() => {
    window.ended = [];
    for (const end of ["execution_success", "execution_error", "execution_interrupted"])
        app.api.addEventListener(end, ({ detail }) => window.ended.push(detail.prompt_id));
}"""


def wait_until_ready(page):
    """Our nodes are known, and the workflow that the page opens by itself is open: it would lie over another one."""
    page.wait_for_function(
        """() => Boolean(window.app?.graph && window.LiteGraph?.registered_node_types?.LCMKitKSampler
            && window.app.extensionManager?.workflow?.activeWorkflow)"""
    )


def becomes(page, expected, ask, seconds=ENOUGH):
    """What ask() gives: `expected` as soon as it is that, or what it still is at the end of a time that is enough for it."""
    end = time.monotonic() + seconds
    while (found := ask()) != expected and time.monotonic() < end:
        page.wait_for_timeout(50)
    return found


def next_turn(page):
    """Waits until the page has done what it put off till its next turn, and what that put off."""
    page.evaluate("() => new Promise(done => setTimeout(() => setTimeout(done, 0), 0))")


def open_graph(page, graph, name="graph"):
    """A graph in API format, in a tab of its own."""
    types = [node["class_type"] for node in graph.values()]
    page.evaluate("() => { window.before = new Set(app.graph.nodes); }")  # it may have the same types
    page.evaluate("([text, name]) => app.loadApiJson(JSON.parse(text), name)", [json.dumps(graph), name])
    page.wait_for_function(
        "types => { const made = app.graph.nodes.filter(n => !before.has(n)); "
        "return types.every(t => made.some(n => n.type === t)); }",
        arg=types,
    )


def open_graph_in(page, graph, titles, tries=5):
    """open_graph on a page with another language, until its nodes are called `titles`, in order.

    The page names nodes when it hears of them, and loads a language beside: where the nodes were first they stay English
    until they are refreshed. And when a language comes late the page opens its own last workflow over ours.
    """
    from playwright.sync_api import TimeoutError

    for _ in range(tries):
        open_graph(page, graph)
        try:
            page.wait_for_function(
                "titles => titles.every((title, n) => app.graph.nodes[n]?.title === title)", arg=titles, timeout=20_000
            )
            next_turn(page)  # our page script has seen the nodes
            return
        except TimeoutError:
            page.evaluate("() => app.extensionManager.command.execute('Comfy.RefreshNodeDefinitions')")
    raise AssertionError(f"opened {tries} times: {page.evaluate('() => app.graph.nodes.map(n => n.title)')}")


def run_in_page(page):
    """Runs the open graph to its end, good or bad; returns what the server filed in its history."""
    before = set(page.evaluate(HISTORY))
    page.evaluate("() => app.queuePrompt(0)")
    end = time.monotonic() + SLOW / 1000
    while not (new := set(page.evaluate(HISTORY)) - before):
        assert time.monotonic() < end, "the run is not in the history"
        page.wait_for_timeout(100)
    (id_,) = new
    page.wait_for_function("id => ended.includes(id)", arg=id_)
    return page.evaluate("id => fetch('/history/' + id).then(answer => answer.json())", id_)[id_]


# ComfyUI writes a prompt with NaN in it as NaN, which no page can read; other tests' hostile prompts are there too.
HISTORY = """() => fetch('/history').then(answer => answer.text())
    .then(text => Object.keys(JSON.parse(text.replace(/([:[,] ?)(NaN|-?Infinity)/g, '$1null'))))"""


def report_on(page, type_):
    """What the text area on the first node of that type shows, or None."""
    return page.evaluate(
        """type => {
            const node = app.graph.nodes.find(n => n.type === type);
            return node?.widgets?.find(w => w.name === "lcm_kit_report")?.element?.value ?? null;
        }""",
        type_,
    )


def open_help(page, type_):
    """The help page of the first node of that type, in the panel that the page has for it, as wide as that comes."""
    shown, button = page.locator(".node-help-content"), page.get_by_test_id("info-button")
    for _ in range(20):  # a new graph is moved into view; what is selected meanwhile gets no buttons
        page.evaluate(
            """type => {
                app.canvas.deselectAll();
                app.canvas.selectNode(app.graph.nodes.find(n => n.type === type));
            }""",
            type_,
        )
        if shown.first.is_visible():
            break
        if becomes(page, True, button.first.is_visible, seconds=2):
            page.evaluate("""() => document.querySelector("[data-testid='info-button']")?.click()""")
            if becomes(page, True, shown.first.is_visible, seconds=5):
                break
    page.wait_for_function(
        """() => {
            const text = [...document.querySelectorAll(".node-help-content")].find(e => e.offsetParent);
            return text?.querySelector("h1") && [...text.querySelectorAll("img")].every(image => image.complete);
        }"""
    )
