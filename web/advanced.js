// Folds the advanced fields of LCM Kit's nodes away in the classic page, as Nodes 2.0 does by itself, behind a button.
// A field that is linked, or was saved with another value than it comes with, stays in sight. Whether a node is open
// is kept in its properties; all values are saved and sent as they are.
import { app } from "../../scripts/app.js";

const OURS = /^LCMKit/; // node ids
const OPEN = "lcm_kit_advanced"; // property of a node whose fields are all shown
const BUTTON = "lcm_kit_more"; // widget
const REPORT = "lcm_kit_report"; // widget, which stays the last
const FEWEST = 2; // fields that are worth a button
const NEAR = 30; // pixels by which a node may be taller or shorter than its fields and is still as tall as they are

const cameWith = new WeakMap(); // node -> name of a field -> the value that it came with

const isClassic = () => !globalThis.LiteGraph?.vueNodesMode;

const label = (open, hidden) => (open ? "fewer settings" : `more settings (${hidden})`);

function folds(node, widget) {
  if (!widget.options?.advanced) return false;
  const linked = node.inputs?.some((input) => input.widget?.name === widget.name && input.link != null);
  return !linked && cameWith.get(node)?.get(widget.name) === widget.value;
}

function setButton(node, text) {
  const at = node.widgets.findIndex((widget) => widget.name === BUTTON);
  if (!text) {
    if (at >= 0) node.removeWidget(node.widgets[at]);
    return;
  }
  const press = () => toggle(node);
  const button = at >= 0 ? node.widgets[at] : node.addWidget("button", BUTTON, null, press, { serialize: false });
  button.serialize = false; // not in the workflow's widgets_values
  button.label = text;
  const report = node.widgets.findIndex((widget) => widget.name === REPORT);
  if (at < 0 && report >= 0) node.widgets.push(...node.widgets.splice(report, 1));
}

// Hides what is folded and shows the rest. The node keeps the height that its user gave it.
// asSaved: the node comes from a workflow, where it may have been as tall as all of its fields.
function fold(node, asSaved = false) {
  const advanced = (node.widgets ?? []).filter((widget) => widget.options?.advanced);
  if (!advanced.length) return;
  const fitted = [node.computeSize()[1]];
  if (asSaved) {
    for (const widget of advanced) if (widget.hidden) widget.hidden = false;
    fitted.push(node.computeSize()[1]);
  }
  const open = Boolean(node.properties?.[OPEN]);
  const foldable = isClassic() ? advanced.filter((widget) => folds(node, widget)) : [];
  const worth = foldable.length >= FEWEST;
  for (const widget of advanced) {
    const hidden = worth && !open && foldable.includes(widget);
    if (Boolean(widget.hidden) !== hidden) widget.hidden = hidden;
  }
  setButton(node, worth ? label(open, foldable.length) : "");
  const needed = node.computeSize()[1];
  const [width, height] = node.size;
  const asTall = fitted.some((one) => Math.abs(height - one) <= NEAR);
  if (height !== needed && (asTall || height < needed)) node.setSize([width, needed]);
  node.setDirtyCanvas?.(true, true);
}

function toggle(node) {
  node.properties ??= {};
  if (node.properties[OPEN]) delete node.properties[OPEN];
  else node.properties[OPEN] = true;
  fold(node);
}

function* nodesOf(graph, seen = new Set()) {
  if (!graph || seen.has(graph)) return;
  seen.add(graph);
  for (const node of graph.nodes ?? graph._nodes ?? []) {
    yield node;
    yield* nodesOf(node.subgraph, seen);
  }
}

let drawnClassic; // which of the two the page draws with
// After whatever was done by hand: the page draws otherwise now, or a hidden field has got a link or a value.
function refresh() {
  const changed = drawnClassic !== isClassic();
  drawnClassic = isClassic();
  for (const node of nodesOf(app.rootGraph ?? app.graph)) {
    if (!OURS.test(node.comfyClass ?? node.type ?? "")) continue;
    if (changed || node.widgets?.some((widget) => widget.hidden && !folds(node, widget))) fold(node);
  }
}

app.registerExtension({
  name: "lcm-kit.advanced",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!OURS.test(nodeData.name)) return;
    const changed = nodeType.prototype.onConnectionsChange;
    nodeType.prototype.onConnectionsChange = function () {
      const result = changed?.apply(this, arguments);
      setTimeout(() => this.graph && fold(this), 0); // when the link is there, or gone
      return result;
    };
  },
  setup() {
    drawnClassic = isClassic();
    const soon = () => setTimeout(refresh, 0);
    for (const type of ["pointerup", "keyup"]) document.addEventListener(type, soon, true);
  },
  nodeCreated(node) {
    if (!OURS.test(node.comfyClass ?? node.type ?? "")) return;
    cameWith.set(node, new Map((node.widgets ?? []).map((widget) => [widget.name, widget.value])));
    fold(node);
    setTimeout(() => node.graph && fold(node), 0); // a copy, or a graph in API format, has its values by then
  },
  // A workflow was opened: its values are there now, and its nodes as large as they were saved.
  loadedGraphNode(node) {
    if (OURS.test(node.comfyClass ?? node.type ?? "")) fold(node, true);
  },
});
