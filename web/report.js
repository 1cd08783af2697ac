// Shows on each node what LCM Kit reports of it, as read-only text below its widgets.
//
// The server sends the report of a node of ours as its output `text`, which the page draws for its own preview nodes
// only; what is told of another pack's node comes by an event. A report is kept with its node in the workflow, in its
// properties. Reports hold names out of files and workflows, so they are set as the value of a text area and never
// become markup.
import { app } from "../../scripts/app.js";

const OURS = /^LCMKit/; // node ids
const NAME = "lcm_kit_report"; // of the widget, and of the property
const TOLD = "lcm_kit.told";
const LONGEST = 20000; // letters that are kept with a workflow
const PROGRESS = "$$node-text-preview"; // the page's own widget for the text of a node that is running
const FONT = { size: 11, line: 15, family: 'ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace' };
const BOX = { margin: 10, padding: 6, tallest: 330 }; // pixels; the margin is the page's own
const NARROWEST = 320; // of a node with a report
const MOST = 4000; // letters that are counted: more fill the tallest box anyway

const STYLE = {
  boxSizing: "border-box",
  width: "100%",
  height: "100%",
  margin: "0",
  padding: `${BOX.padding}px`,
  border: "none",
  borderRadius: "4px",
  resize: "none",
  overflow: "auto",
  whiteSpace: "pre-wrap",
  overflowWrap: "anywhere",
  color: "var(--input-text, #ddd)",
  background: "var(--comfy-input-bg, #222)",
  fontFamily: FONT.family,
  fontSize: `${FONT.size}px`,
  lineHeight: `${FONT.line}px`,
};

let letter; // width of one, in pixels
function widthOfLetter() {
  if (!letter) {
    const context = document.createElement("canvas").getContext("2d");
    context.font = `${FONT.size}px ${FONT.family}`;
    letter = context.measureText("0").width;
  }
  return letter;
}

// Rows that a line takes where each has room for so many letters.
function rowsOf(line, columns) {
  let rows = 1;
  let used = 0;
  for (const { length } of line.match(/ +|[^ ]+/g) ?? []) {
    if (used > 0 && used + length > columns) {
      rows += 1;
      used = 0;
    }
    rows += Math.ceil(length / columns) - 1;
    used = length > columns ? length % columns : used + length;
  }
  return rows;
}

// Pixels that `text` takes in a node of that width, without the margin around.
function heightOf(text, width) {
  const columns = Math.max(16, Math.floor((width - 2 * (BOX.margin + BOX.padding) - 2) / widthOfLetter()));
  const lines = text.slice(0, MOST).split("\n");
  const rows = lines.reduce((sum, line) => sum + rowsOf(line, columns), 0);
  return Math.min(BOX.tallest, rows * FONT.line + 2 * BOX.padding + 2);
}

function addBox(node) {
  const element = document.createElement("textarea");
  element.readOnly = true;
  element.spellcheck = false;
  element.setAttribute("aria-label", `${node.title}: report`);
  Object.assign(element.style, STYLE);
  const widget = node.addDOMWidget(NAME, NAME, element, {
    serialize: false, // not in the prompt
    hideOnZoom: false,
    getValue: () => element.value,
    setValue: () => {}, // a value in an old workflow is not this node's report
    getMinHeight: () => heightOf(element.value, node.size[0]) + 2 * BOX.margin,
  });
  widget.serialize = false; // not in the workflow's widgets_values
  return widget;
}

function removeProgress(node) {
  const at = (node.widgets ?? []).findIndex((widget) => widget.name === PROGRESS);
  if (at < 0) return;
  node.widgets[at].onRemove?.();
  node.widgets.splice(at, 1);
}

// Nodes 2.0 lays its widgets out by their styles, in a width that is known when they are there.
function fitStyles({ element }, width) {
  element.style.minHeight = `${heightOf(element.value, width)}px`;
  setTimeout(() => {
    if (!globalThis.LiteGraph?.vueNodesMode || element.scrollHeight <= element.clientHeight) return;
    element.style.minHeight = `${Math.min(BOX.tallest, element.scrollHeight + 2)}px`;
  }, 200);
}

// The node grows with its report, and shrinks again unless its user has made it larger.
function fit(node, widget) {
  const [width, height] = node.size;
  node.size[0] = Math.max(width, NARROWEST);
  fitStyles(widget, node.size[0]);
  const needed = node.computeSize()[1];
  const grown = height === widget.fitted ? needed : Math.max(height, needed);
  node.setSize([node.size[0], grown]);
  widget.fitted = grown;
}

const isOurs = (node) => OURS.test(node?.comfyClass ?? node?.type ?? "");

function removeBox(node) {
  const widget = node.widgets?.find((one) => one.name === NAME);
  if (!widget) return;
  const fitted = node.size[1] === widget.fitted;
  node.removeWidget(widget);
  if (fitted) node.setSize([node.size[0], node.computeSize()[1]]);
}

function write(node, text) {
  if (!text) return removeBox(node);
  const widget = node.widgets?.find((one) => one.name === NAME) ?? addBox(node);
  if (widget.element.value === text) return;
  widget.element.value = text;
  fit(node, widget);
  node.setDirtyCanvas?.(true, true);
}

function show(node, lines) {
  if (!node) return;
  // A node that ran for each entry of a list reports as often.
  const texts = Array.isArray(lines) ? lines.filter((text) => typeof text === "string") : [];
  const text = [...new Set(texts)].join("\n\n").trim();
  removeProgress(node);
  write(node, text);
  node.properties ??= {};
  if (text) node.properties[NAME] = text.slice(0, LONGEST);
  else delete node.properties[NAME];
}

function showOutput(node, output) {
  if (output && isOurs(node)) show(node, output.text);
}

// "7"; in a subgraph "9:7", through the node that stands for it, or "id of the subgraph:7".
function nodeAt(place) {
  const root = app.rootGraph ?? app.graph?.rootGraph ?? app.graph;
  const way = place.split(":");
  const id = way.pop();
  let graph = root;
  for (const part of way) graph = root?.subgraphs?.get(part) ?? graph?.getNodeById(part)?.subgraph;
  return graph?.getNodeById(id);
}

app.registerExtension({
  name: "lcm-kit.report",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!OURS.test(nodeData.name)) return;
    const executed = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      executed?.apply(this, arguments);
      showOutput(this, output);
    };
  },
  setup() {
    app.api.addEventListener(TOLD, ({ detail }) => show(nodeAt(detail.node), detail.text));
    // A node of another pack that runs anew has nothing told of it yet.
    app.api.addEventListener("executing", ({ detail }) => {
      const node = detail == null ? null : nodeAt(String(detail.node ?? detail));
      if (node?.properties?.[NAME] && !isOurs(node)) show(node, []);
    });
  },
  // A workflow was opened: what its nodes reported when they last ran.
  loadedGraphNode(node) {
    const text = node.properties?.[NAME];
    if (typeof text === "string" && text) write(node, text.slice(0, LONGEST));
  },
  // After a change of tabs, and when a run is opened from the history.
  onNodeOutputsUpdated(outputs) {
    for (const [locator, output] of Object.entries(outputs ?? {})) showOutput(nodeAt(locator), output);
  },
});
